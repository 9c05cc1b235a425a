// SPDX-License-Identifier: GPL-2.0

//! The counters that sysfs shows. Readers take no lock.

use kernel::{
    page::PAGE_SIZE,
    sync::atomic::{Atomic, Relaxed},
};

/// All counters. The first seven are states, the others count events.
pub(crate) struct Stats {
    /// Merged pages that are in use: `pages_shared`.
    pub(crate) shared: Atomic<u64>,
    /// Mappings of these beyond the first of each, i.e. the pages saved: `pages_sharing`.
    pub(crate) sharing: Atomic<u64>,
    /// Checksums that more than one stable node has: `stable_node_chains`.
    pub(crate) chains: Atomic<u64>,
    /// Stable nodes that have one of these checksums: `stable_node_dups`.
    pub(crate) dups: Atomic<u64>,
    /// Pages that are scanned again and again but have no known equal: `pages_unshared`.
    pub(crate) unshared: Atomic<u64>,
    /// Pages that change too fast to be candidates: `pages_volatile`.
    pub(crate) volatile: Atomic<u64>,
    /// The size of all metadata, in bytes.
    pub(crate) metadata: Atomic<u64>,
    /// Pages scanned since the module was loaded.
    pub(crate) scanned: Atomic<u64>,
    /// Pages that `smart_scan` has skipped since the module was loaded.
    pub(crate) skipped: Atomic<u64>,
    /// Complete passes since everything was unmerged last.
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

    /// Returns the bytes saved by merging, less those that the metadata take. May be negative.
    pub(super) fn profit(&self) -> i64 {
        let zeroes = u64::try_from(crate::mm::zero_pages()).unwrap_or(0);
        let saved = self.sharing.load(Relaxed).saturating_add(zeroes);
        let saved = saved.saturating_mul(PAGE_SIZE as u64);
        let bytes = |count| i64::try_from(count).unwrap_or(i64::MAX);
        bytes(saved).saturating_sub(bytes(self.metadata.load(Relaxed)))
    }

    /// Counts pages that were scanned.
    pub(super) fn add_scanned(&self, pages: usize) {
        self.scanned.add(pages as u64, Relaxed);
    }

    /// Counts pages that were skipped.
    pub(super) fn add_skipped(&self, pages: usize) {
        self.skipped.add(pages as u64, Relaxed);
    }

    /// Counts a complete pass.
    pub(super) fn add_full_scan(&self) {
        self.full_scans.add(1u64, Relaxed);
    }

    /// Resets the count of complete passes.
    pub(super) fn reset_full_scans(&self) {
        self.full_scans.store(0, Relaxed);
    }
}
