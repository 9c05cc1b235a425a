// SPDX-License-Identifier: GPL-2.0

//! Settings that change what may be merged. Most can only change while no page is merged.

use super::{
    state::{Core, State},
    Engine,
};
use kernel::{
    prelude::*,
    sync::lock::{mutex::MutexBackend, Guard},
    time::{delay::fsleep, Delta},
};

/// The smallest `max_page_sharing`: merging begins with two mappings.
const MIN_SHARING: u32 = 2;

impl Engine {
    /// Sets `max_page_sharing`, the most mappings that one merged page may have. May sleep.
    ///
    /// # Errors
    ///
    /// `EINVAL` for fewer than [`MIN_SHARING`], `EBUSY` while pages are merged, `ERESTARTSYS` on a signal.
    pub(super) fn set_max_page_sharing(&self, max: u32) -> Result {
        if max < MIN_SHARING {
            return Err(EINVAL);
        }
        let sharing = max as usize;
        let mut state = self.lock_without_nodes(|core| core.max_sharing != sharing)?;
        state.core.max_sharing = sharing;
        Ok(())
    }

    /// Sets `merge_across_nodes`: whether pages on different NUMA nodes are merged. May sleep.
    ///
    /// # Errors
    ///
    /// `EBUSY` while pages are merged, `ERESTARTSYS` on a signal.
    pub(super) fn set_merge_across_nodes(&self, across: bool) -> Result {
        let mut state = self.lock_without_nodes(|core| core.per_nid == across)?;
        if state.core.per_nid != across {
            return Ok(());
        }
        // The other hasher has other samples for pages of zeroes. Pages whose samples differ with it are
        // classified as changed when they are scanned.
        let on = state.core.zeroes.is_some();
        let hasher = self.hasher(&state.core);
        state.use_zero_page(hasher, false);
        state.core.per_nid = !across;
        let hasher = self.hasher(&state.core);
        state.use_zero_page(hasher, on);
        Ok(())
    }

    /// Sets `use_zero_pages`: whether pages of zeroes are merged with the kernel's zero page. May sleep.
    pub(super) fn set_use_zero_pages(&self, on: bool) {
        let mut state = self.state.lock();
        let hasher = self.hasher(&state.core);
        state.use_zero_page(hasher, on);
    }
}

/// How often to try to free nodes whose pages are locked.
const RELEASE_ATTEMPTS: u32 = 50;
/// The time between two attempts, in milliseconds.
const RELEASE_MS: i64 = 2;

impl Engine {
    /// Locks `state`. If something `differs` from the setting to be written, frees all nodes first. May sleep.
    ///
    /// # Errors
    ///
    /// `EBUSY` if a page is merged, in a registered process or another one. `ERESTARTSYS` on a signal.
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
