// SPDX-License-Identifier: GPL-2.0

//! Settings that change what may be merged. Most can only change while no page is merged.

use super::{state::State, Engine};
use kernel::{
    prelude::*,
    sync::{
        atomic::Relaxed,
        lock::{mutex::MutexBackend, Guard},
    },
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
        let setting = &self.settings.max_page_sharing;
        let _state = self.lock_without_nodes(|| setting.load(Relaxed) != max)?;
        setting.store(max, Relaxed);
        Ok(())
    }

    /// Sets `merge_across_nodes`: whether pages on different NUMA nodes are merged. May sleep.
    ///
    /// # Errors
    ///
    /// `EBUSY` while pages are merged, `ERESTARTSYS` on a signal.
    pub(super) fn set_merge_across_nodes(&self, across: bool) -> Result {
        let mut state = self.lock_without_nodes(|| self.settings.per_nid() == across)?;
        if self.settings.per_nid() != across {
            return Ok(());
        }
        self.settings
            .merge_across_nodes
            .store(across.into(), Relaxed);
        // The other hasher has other samples for pages of zeroes. Pages whose samples differ with it are
        // classified as changed when they are scanned.
        if state.core.zeroes.is_some() {
            state.set_zeroes(Some(self.hasher().zeroes()));
        }
        Ok(())
    }

    /// Sets `use_zero_pages`: whether pages of zeroes are merged with the kernel's zero page. May sleep.
    pub(super) fn set_use_zero_pages(&self, on: bool) {
        let mut state = self.state.lock();
        self.settings.use_zero_pages.store(on.into(), Relaxed);
        if on != state.core.zeroes.is_some() {
            state.set_zeroes(on.then(|| self.hasher().zeroes()));
        }
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
        differs: impl Fn() -> bool,
    ) -> Result<Guard<'_, State, MutexBackend>> {
        for _ in 0..RELEASE_ATTEMPTS {
            let mut state = self.lock_idle()?;
            if !differs() {
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
