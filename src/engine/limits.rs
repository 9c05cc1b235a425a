// SPDX-License-Identifier: GPL-2.0

//! What can be changed only while nothing is merged.

use super::{Core, Engine};
use kernel::{prelude::*, sync::atomic::Relaxed};

/// The smallest `max_page_sharing`: a page that is mapped once is not merged.
const MIN_SHARING: u32 = 2;

impl Engine {
    /// Sets how many places are mapped to one merged page at most. `EINVAL` for fewer than two, `EBUSY`
    /// while pages are merged. May sleep.
    pub(super) fn set_max_page_sharing(&self, most: u32) -> Result {
        if most < MIN_SHARING {
            return Err(EINVAL);
        }
        let mut state = self.lock_settled()?;
        let sharing = most as usize;
        if state.core.max_sharing == sharing {
            return Ok(());
        }
        state.core.release_unused()?;
        state.core.max_sharing = sharing;
        self.max_page_sharing.store(most, Relaxed);
        Ok(())
    }

    /// Sets whether pages on different memory nodes are merged. `EBUSY` while pages are merged. May sleep.
    pub(super) fn set_merge_across_nodes(&self, across: bool) -> Result {
        let mut state = self.lock_settled()?;
        if state.core.by_node != across {
            return Ok(());
        }
        state.core.release_unused()?;
        // The next step takes it up again with the samples that count then. Pages whose samples are other
        // ones now are taken for changed when they are looked at.
        let hasher = self.hasher(&state.core);
        state.use_zero_page(hasher, false);
        state.core.by_node = !across;
        self.merge_across_nodes.store(across.into(), Relaxed);
        Ok(())
    }
}

impl Core {
    /// Frees all nodes, if no page is merged. `EBUSY` if one is: known to be, or mapped by somebody nobody
    /// knows of.
    fn release_unused(&mut self) -> Result {
        if self.index.stable_len() != 0 {
            return Err(EBUSY);
        }
        let mut result = Ok(());
        let mut next = self.index.next_limbo(None);
        while let Some(key) = next {
            next = self.index.next_limbo(Some(key));
            if self.index.node(key).is_some_and(|node| node.abandon(false)) {
                self.release(key);
            } else {
                result = Err(EBUSY);
            }
            crate::mm::cond_resched();
        }
        self.swept = None;
        result
    }
}
