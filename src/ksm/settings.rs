// SPDX-License-Identifier: GPL-2.0

//! The defaults of the settings, as they ship.

/// The default of `sleep_millisecs`: milliseconds between batches.
pub(super) const DEFAULT_SLEEP_MILLISECS: u32 = 20;
/// The default of `pass_millisecs`: the least number of milliseconds from the beginning of one pass to that of
/// the next.
///
/// In-tree KSM never scans a page again so soon, because it is slower. Memory that changes within a second is
/// not worth merging.
pub(super) const DEFAULT_PASS_MILLISECS: u32 = 1000;
/// The default of `max_page_sharing`: the most mappings of one merged page. With more, an rmap walk, which
/// holds a lock, takes too long.
pub(super) const DEFAULT_MAX_PAGE_SHARING: u32 = 256;
/// The default of `stable_node_chains_prune_millisecs`: milliseconds between two searches for stale nodes.
pub(super) const DEFAULT_PRUNE_MILLISECS: u32 = 2000;
