// SPDX-License-Identifier: GPL-2.0

//! The settings, and their defaults as they ship.

use kernel::sync::atomic::{Atomic, Relaxed};

/// The default of `sleep_millisecs`: milliseconds between batches.
const DEFAULT_SLEEP_MILLISECS: u32 = 20;
/// The default of `pass_millisecs`: the least number of milliseconds from the beginning of one pass to that of
/// the next.
///
/// In-tree KSM never scans a page again so soon, because it is slower. Memory that changes within a second is
/// not worth merging.
const DEFAULT_PASS_MILLISECS: u32 = 1000;
/// The default of `max_page_sharing`: the most mappings of one merged page. With more, an rmap walk, which
/// holds a lock, takes too long.
const DEFAULT_MAX_PAGE_SHARING: u32 = 256;
/// The default of `stable_node_chains_prune_millisecs`: milliseconds between two searches for stale nodes.
const DEFAULT_PRUNE_MILLISECS: u32 = 2000;

/// The settings that are numbers, by the names of their files in sysfs.
///
/// This is the only copy of each. Any process may read the files, so readers take no lock: a mutex may be handed
/// to a reader that gets no CPU.
pub(crate) struct Settings {
    /// Only written with the lock of the advisor.
    pub(crate) pages_to_scan: Atomic<u32>,
    pub(crate) sleep_millisecs: Atomic<u32>,
    /// Whether to skip leaves in which nothing has changed for some passes.
    pub(crate) smart_scan: Atomic<u32>,
    /// Whether to merge pages in the first pass that sees them.
    pub(crate) merge_eagerly: Atomic<u32>,
    /// The shortest time from the beginning of one pass to that of the next, in milliseconds.
    pub(crate) pass_millisecs: Atomic<u32>,
    /// Whether pages of zeroes are merged with the kernel's zero page. Only written with `state` locked.
    pub(crate) use_zero_pages: Atomic<u32>,
    /// The most mappings that one merged page may have. Only written with `state` locked, while there are no
    /// nodes.
    pub(crate) max_page_sharing: Atomic<u32>,
    /// Whether pages on different NUMA nodes are merged. Only written with `state` locked, while there are no
    /// nodes.
    pub(crate) merge_across_nodes: Atomic<u32>,
    /// The time between two searches of the full tree for stale nodes, in milliseconds.
    pub(crate) stable_node_chains_prune_millisecs: Atomic<u32>,
}

impl Settings {
    /// Returns the defaults. `pages_to_scan` is up to the advisor.
    pub(crate) fn new(pages_to_scan: u32) -> Self {
        Self {
            pages_to_scan: Atomic::new(pages_to_scan),
            sleep_millisecs: Atomic::new(DEFAULT_SLEEP_MILLISECS),
            smart_scan: Atomic::new(1),
            merge_eagerly: Atomic::new(0),
            pass_millisecs: Atomic::new(DEFAULT_PASS_MILLISECS),
            use_zero_pages: Atomic::new(0),
            max_page_sharing: Atomic::new(DEFAULT_MAX_PAGE_SHARING),
            merge_across_nodes: Atomic::new(1),
            stable_node_chains_prune_millisecs: Atomic::new(DEFAULT_PRUNE_MILLISECS),
        }
    }

    /// Returns the most mappings that one merged page may have.
    pub(crate) fn max_sharing(&self) -> usize {
        self.max_page_sharing.load(Relaxed) as usize
    }

    /// Whether only pages on the same NUMA node are merged.
    pub(crate) fn per_nid(&self) -> bool {
        self.merge_across_nodes.load(Relaxed) == 0
    }
}
