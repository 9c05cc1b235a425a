// SPDX-License-Identifier: GPL-2.0

//! What can be changed only while nothing is merged.

use super::{Core, Engine, State};
use kernel::{
    prelude::*,
    sync::{
        atomic::Relaxed,
        lock::{mutex::MutexBackend, Guard},
    },
    time::{delay::fsleep, Delta},
};

/// The smallest `max_page_sharing`: a page that is mapped once is not merged.
const MIN_SHARING: u32 = 2;

impl Engine {
    /// Sets how many places are mapped to one merged page at most. `EINVAL` for fewer than two, `EBUSY`
    /// while pages are merged. May sleep.
    pub(super) fn set_max_page_sharing(&self, most: u32) -> Result {
        if most < MIN_SHARING {
            return Err(EINVAL);
        }
        let sharing = most as usize;
        let mut state = self.lock_without_nodes(|core| core.max_sharing != sharing)?;
        state.core.max_sharing = sharing;
        self.max_page_sharing.store(most, Relaxed);
        Ok(())
    }

    /// Sets whether pages on different memory nodes are merged. `EBUSY` while pages are merged. May sleep.
    pub(super) fn set_merge_across_nodes(&self, across: bool) -> Result {
        let mut state = self.lock_without_nodes(|core| core.per_nid == across)?;
        if state.core.per_nid != across {
            return Ok(());
        }
        // The next step takes it up again with the samples that count then. Pages whose samples are other
        // ones now are taken for changed when they are looked at.
        let hasher = self.hasher(&state.core);
        state.use_zero_page(hasher, false);
        state.core.per_nid = !across;
        self.merge_across_nodes.store(across.into(), Relaxed);
        Ok(())
    }
}

/// How often, and after how long each time, to try again to free nodes whose pages are locked.
const RELEASE_ATTEMPTS: u32 = 50;
const RELEASE_MS: i64 = 2;

impl Engine {
    /// Locks `state`, and frees all nodes if something `differs`. `EBUSY` if a page is merged: known to be, or
    /// mapped by a process that is not registered. May sleep.
    fn lock_without_nodes(
        &self,
        differs: impl Fn(&Core) -> bool,
    ) -> Result<Guard<'_, State, MutexBackend>> {
        for _ in 0..RELEASE_ATTEMPTS {
            let mut state = self.lock_idle()?;
            if !differs(&state.core) {
                return Ok(state);
            }
            if state.core.index.stable_len() != 0 {
                return Err(EBUSY);
            }
            if state.core.release_unused() {
                return Ok(state);
            }
            drop(state);
            fsleep(Delta::from_millis(RELEASE_MS));
        }
        Err(EBUSY)
    }
}
