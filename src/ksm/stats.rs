// SPDX-License-Identifier: GPL-2.0

//! Counters, as they are shown in sysfs. Readers take no lock.

use super::Core;
use kernel::{
    page::PAGE_SIZE,
    sync::atomic::{Atomic, Relaxed},
};

/// All counters. The first seven are states.
pub(crate) struct Stats {
    /// Merged pages that are in use.
    pub(crate) shared: Atomic<u64>,
    /// Further places that map these: what is saved.
    pub(crate) sharing: Atomic<u64>,
    /// Contents that have more than one merged page, and those pages.
    pub(crate) chains: Atomic<u64>,
    pub(crate) dups: Atomic<u64>,
    /// Pages that have no equal but are looked at again and again.
    pub(crate) unshared: Atomic<u64>,
    /// Pages that change too fast to be candidates.
    pub(crate) volatile: Atomic<u64>,
    /// Bytes that all metadata take.
    pub(crate) metadata: Atomic<u64>,
    /// Pages looked at since the module was loaded.
    pub(crate) scanned: Atomic<u64>,
    /// Pages that `smart_scan` saved looking at since the module was loaded.
    pub(crate) skipped: Atomic<u64>,
    /// How often all mergeable areas were looked at since everything was unmerged last.
    pub(crate) full_scans: Atomic<u64>,
}

impl Stats {
    pub(super) fn new() -> Self {
        Self {
            shared: Atomic::new(0),
            sharing: Atomic::new(0),
            chains: Atomic::new(0),
            dups: Atomic::new(0),
            unshared: Atomic::new(0),
            volatile: Atomic::new(0),
            metadata: Atomic::new(0),
            scanned: Atomic::new(0),
            skipped: Atomic::new(0),
            full_scans: Atomic::new(0),
        }
    }

    /// Shows the current core, beside which there are maps of so many bytes.
    pub(super) fn update(&self, core: &Core, map_bytes: usize) {
        let shared = core.index.stable_len();
        let unshared = core.index.unstable_len().saturating_add(core.steady);
        // Released nodes leave entries behind that say "merged" until the scan comes by: volatile.
        let volatile = core
            .pages
            .saturating_sub(core.items)
            .saturating_sub(unshared);
        self.shared.store(shared as u64, Relaxed);
        self.sharing
            .store(core.items.saturating_sub(shared) as u64, Relaxed);
        self.chains.store(core.index.chains() as u64, Relaxed);
        self.dups.store(core.index.dups() as u64, Relaxed);
        self.unshared.store(unshared as u64, Relaxed);
        self.volatile.store(volatile as u64, Relaxed);
        let metadata = core.bytes().saturating_add(map_bytes);
        self.metadata.store(metadata as u64, Relaxed);
    }

    /// Bytes saved by merging, less those that metadata take. Can be negative.
    pub(super) fn profit(&self) -> i64 {
        let zeroes = u64::try_from(crate::mm::zero_pages()).unwrap_or(0);
        let saved = self.sharing.load(Relaxed).saturating_add(zeroes);
        let saved = saved.saturating_mul(PAGE_SIZE as u64);
        let bytes = |count| i64::try_from(count).unwrap_or(i64::MAX);
        bytes(saved).saturating_sub(bytes(self.metadata.load(Relaxed)))
    }

    /// Counts pages that were looked at.
    pub(super) fn add_scanned(&self, pages: usize) {
        self.scanned.add(pages as u64, Relaxed);
    }

    /// Counts pages that were not looked at.
    pub(super) fn add_skipped(&self, pages: usize) {
        self.skipped.add(pages as u64, Relaxed);
    }

    /// Counts a completed pass.
    pub(super) fn add_full_scan(&self) {
        self.full_scans.add(1u64, Relaxed);
    }

    /// Counts passes anew.
    pub(super) fn reset_full_scans(&self) {
        self.full_scans.store(0, Relaxed);
    }
}
