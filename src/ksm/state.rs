// SPDX-License-Identifier: GPL-2.0

//! What the engine knows: the address spaces, and what is remembered of their pages.
//!
//! [`State`] is what the engine's mutex protects, and [`Core`] the part of it that concerns all pages together.
//! They are apart so that an entry of a page, which is in an address space, can be changed together with the
//! trees and counters. Other files add functions: `page` the states of a page, `stable_tree` the life of a
//! stable node, `merge` the merge.

use super::{
    cursor::Cursor,
    entry::PageEntry,
    filter::Filter,
    forget::Forget,
    index::{Index, Released},
    mms::{MmId, PageAddr},
    page_map::PageMap,
    probation::Clock,
    settings::Settings,
    unlisted::Unlisted,
    unstable_tree::UnstableTree,
};
use crate::{
    hash::Zeroes,
    mm::{folio::NodeId, rmap_item::ItemBox, stable_key::StableKey, stable_node::NodeBox},
    sys::module_pin,
};
use core::cell::Cell;
use kernel::{
    alloc::{flags, Flags},
    mm::Mm,
    prelude::*,
    rbtree::RBTree,
    sync::{aref::ARef, Arc},
    time::{Instant, Monotonic},
};

/// Flags for allocations of the scanning thread. They may fail, as the next pass tries again. So they neither
/// enter direct reclaim nor warn.
pub(super) const GFP_SCAN: Flags = flags::GFP_NOWAIT;

/// The filter may be sized for this many times the tracked pages, if as many pages are mapped.
const FILTER_AHEAD: usize = 16;

/// How many leaves [`State::count_some`] counts under one hold of `state`.
const COUNT_LEAVES: usize = 64;
/// How many merged pages are unshared after one step of the scan, at most.
const BREAK_PAGES: usize = 128;
/// How many pages that per-CPU LRU batches may hold are retried at the end of a pass, at most.
const BATCHED_PAGES: usize = 512;

/// An address space, and what is remembered of its pages.
pub(crate) struct MmState {
    pub(super) mm: ARef<Mm>,
    pub(super) pages: PageMap<PageEntry>,
    /// The size of `pages` when [`State::report`] was called last, in bytes.
    pub(super) reported: usize,
    /// `Some` once the address space has exited: pages below this address are forgotten, the others still have
    /// to be.
    pub(super) forgotten_to: Option<usize>,
}

/// What the mutex of [`Engine`](super::Engine) protects.
pub(crate) struct State {
    pub(super) mms: RBTree<MmId, MmState>,
    pub(super) core: Core,
    pub(super) cursor: Cursor,
    /// The number of anonymous pages of all registered processes when the pass began.
    pub(super) mapped_pages: usize,
    /// The size of the page maps of all address spaces, in bytes, as last reported for each.
    pub(super) map_bytes: usize,
    /// How many of [`Self::mms`] have exited.
    pub(super) dying: usize,
    /// Merged pages to unshare when `state` is unlocked, see
    /// [`Engine::break_cow_pending`](super::Engine::break_cow_pending).
    ///
    /// With a node: the page became its KSM page, but no other page could be merged into it. The node is given
    /// by its identity, as its key may change. Without a node: the page has none.
    pub(super) to_break: KVec<(PageAddr, Option<NodeId>)>,
    /// Pages that this pass could not merge because a per-CPU LRU batch may hold a reference.
    pub(super) batched: KVec<PageAddr>,
    /// The newest address space at the time of the last complete run=2.
    pub(super) unmerged_to: MmId,
}

/// What is known of all pages together.
pub(crate) struct Core {
    pub(super) index: Index<NodeBox>,
    pub(super) unstable: UnstableTree,
    /// Counts the sample of each tracked page.
    pub(super) filter: Filter,
    /// The last pass in which there was no memory for another filter.
    pub(super) filter_failed: Option<u32>,
    /// The samples of pages of zeroes that the filter counts twice more, so that a single such page is a
    /// candidate; `None` while `use_zero_pages` is 0.
    pub(super) zeroes: Option<Zeroes>,
    pub(super) settings: Arc<Settings>,
    /// The number of listed mappings of merged pages: rmap items on stable nodes.
    pub(super) items: usize,
    /// The number of tracked pages, merged ones included.
    pub(super) pages: usize,
    /// The number of steady pages. Queued pages are not among them.
    pub(super) steady: usize,
    /// Incremented whenever a page is tracked, untracked, or changes its state, see
    /// [`Engine::rebuild_filter`](super::Engine::rebuild_filter).
    pub(super) changes: u64,
    /// Incremented by [`Core::bump_retry_seq`]. It starts at 1, so it differs from that of a new
    /// [`Cursor`].
    pub(super) retry_seq: u64,
    /// The number of the current pass.
    pub(super) pass: u32,
    /// When the pass began, for pages on probation.
    pub(super) clock: Clock,
    /// When the engine was created.
    pub(super) born: Instant<Monotonic>,
    /// The [bits](crate::hash::Sample::bit) of samples for which a page was merged, or was found to differ from
    /// another page with it, since the last search of the stable tree.
    pub(super) lately: u64,
    /// Whether VMAs that are not mergeable may map merged pages. If so, passes walk them as well.
    pub(super) has_strays: bool,
    /// Whether this pass has found such a mapping.
    pub(super) found_strays: bool,
    /// The last node that [`Core::rekey_migrated_nodes`] has checked, and whether it is in the full tree.
    pub(super) rekeyed_to: (bool, Option<StableKey>),
    /// How far the search of all nodes for stale ones has come; `None` if there is none to do.
    pub(super) releasing: Option<Released>,
    /// Whether this step has run out of memory for entries or rmap items. If so, it allocates no more of them.
    pub(super) starved: Cell<bool>,
    /// Leaves in which pages may be mapped that became merged pages through another process.
    pub(super) unlisted: Unlisted,
    /// The last orphan that [`Core::sweep_orphans`] has checked; `None`: begin with the first.
    pub(super) swept: Option<StableKey>,
    /// The last node that [`Core::prune`] has checked; `None`: begin with the first.
    pub(super) pruned: Option<StableKey>,
    /// When [`Core::prune`] last began with the first node; `None` before the first time.
    pub(super) prune_began: Option<Instant<Monotonic>>,
    pub(super) pin: module_pin::Pin,
}

impl State {
    pub(super) fn new(module: &'static ThisModule, settings: Arc<Settings>) -> Result<Self> {
        Ok(Self {
            mms: RBTree::new(),
            core: Core {
                index: Index::new(),
                unstable: UnstableTree::new(),
                filter: Filter::new(),
                filter_failed: None,
                zeroes: None,
                settings,
                items: 0,
                pages: 0,
                steady: 0,
                changes: 0,
                retry_seq: 1,
                pass: 0,
                clock: Clock::new(),
                born: Instant::now(),
                lately: 0,
                has_strays: false,
                found_strays: false,
                rekeyed_to: (false, None),
                releasing: None,
                starved: Cell::new(false),
                unlisted: Unlisted::new(),
                swept: None,
                pruned: None,
                prune_began: None,
                pin: module_pin::Pin::new(module),
            },
            cursor: Cursor::new(),
            mapped_pages: 0,
            map_bytes: 0,
            dying: 0,
            to_break: KVec::with_capacity(BREAK_PAGES, GFP_KERNEL)?,
            batched: KVec::with_capacity(BATCHED_PAGES, GFP_KERNEL)?,
            unmerged_to: 0,
        })
    }

    /// Forgets pages of address spaces that have exited, [`Forget::new`] at most. Returns whether there are
    /// more to be forgotten at once.
    ///
    /// A page that cannot be forgotten now keeps its address space for a later call.
    pub(super) fn forget_dying(&mut self) -> bool {
        let mut budget = Forget::new();
        let mut after = 0;
        while self.dying != 0 {
            let next = self.mms.iter().find_map(|(&mm_id, known)| {
                Some((mm_id, known.forgotten_to?)).filter(|at| at.0 > after)
            });
            let Some((mm_id, from)) = next else {
                break;
            };
            let next = self.forget_range(mm_id, from, usize::MAX, &mut budget, |_, _, _| false);
            let Some(known) = self.mms.get_mut(&mm_id) else {
                break;
            };
            // What could not be forgotten is retried from the start, in a later call.
            known.forgotten_to = Some(next.unwrap_or(0));
            if next.is_some() {
                return true;
            }
            after = mm_id;
            if known.pages.is_empty() {
                self.remove_mm(mm_id);
            }
        }
        false
    }

    /// Updates the accounting of an address space's metadata: in its `ksm_stat`, and in [`State::map_bytes`].
    pub(super) fn report(&mut self, mm_id: MmId) {
        let Some(known) = self.mms.get_mut(&mm_id) else {
            return;
        };
        let map = known.pages.bytes();
        let items = crate::mm::merging_pages(&known.mm).saturating_mul(ItemBox::SIZE);
        crate::mm::report_metadata(&known.mm, map.saturating_add(items));
        let before = core::mem::replace(&mut known.reported, map);
        self.map_bytes = self.map_bytes.saturating_sub(before).saturating_add(map);
    }

    /// Forgets an address space of which no page is tracked any more.
    pub(super) fn remove_mm(&mut self, mm_id: MmId) {
        if let Some(mm) = self.mms.remove(&mm_id) {
            crate::mm::report_metadata(&mm.mm, 0);
            self.map_bytes = self.map_bytes.saturating_sub(mm.reported);
            if mm.forgotten_to.is_some() {
                self.dying = self.dying.saturating_sub(1);
            }
        }
    }

    /// Has pages with these samples count as pages of zeroes, which are merged with the kernel's zero page.
    ///
    /// Merged pages stay as they are. Queued pages are checked when they are scanned next, see
    /// [`Core::classify_page`].
    pub(super) fn set_zeroes(&mut self, zeroes: Option<Zeroes>) {
        let core = &mut self.core;
        let old = core::mem::replace(&mut core.zeroes, zeroes);
        for zero in old.into_iter().flat_map(Zeroes::iter) {
            core.filter.remove(zero);
            core.filter.remove(zero);
        }
        for zero in zeroes.into_iter().flat_map(Zeroes::iter) {
            core.filter.add(zero);
            core.filter.add(zero);
        }
        core.bump_retry_seq();
    }

    /// Returns for how many pages a new filter should have room, and a smaller number to fall back on if there
    /// is no memory for that. `None`: the current filter will do.
    ///
    /// `extra` pages are about to be tracked. If there is no memory for a new filter, the current one stays
    /// until the next pass, and takes more pages for ones that have an equal than it should.
    pub(super) fn wanted_filter(&self, extra: usize) -> Option<[usize; 2]> {
        let pages = self.core.pages.saturating_add(extra);
        let filter = &self.core.filter;
        if self.cursor.at.is_between_passes() && filter.is_much_too_large_for(pages) {
            return Some([pages.saturating_mul(2); 2]);
        }
        if filter.has_room_for(pages) && !filter.is_saturated()
            || self.core.filter_failed == Some(self.core.pass)
        {
            return None;
        }
        // Make room for all pages that registered processes map, unless that is out of proportion.
        let ahead = pages.saturating_mul(FILTER_AHEAD);
        let double = pages.saturating_mul(2);
        let room = match self.mapped_pages {
            mapped if mapped < pages => double,
            mapped => mapped.min(ahead),
        };
        Some([room, double.min(room)])
    }

    /// Adds the samples of [`COUNT_LEAVES`] leaves from `at` on to `filter`. Returns where to continue; `None`
    /// at the end.
    pub(super) fn count_some(
        &self,
        filter: &mut Filter,
        at: (MmId, usize),
    ) -> Option<(MmId, usize)> {
        let (mut mm_id, mut addr) = at;
        let mut budget = COUNT_LEAVES;
        loop {
            let cursor = self.mms.cursor_lower_bound(&mm_id)?;
            let (&found, known) = cursor.current();
            if found != mm_id {
                (mm_id, addr) = (found, 0);
            }
            let next = known.pages.for_each_from(addr, &mut budget, |entry| {
                filter.add(entry.sample());
            });
            if let Some(addr) = next {
                return Some((mm_id, addr));
            }
            (mm_id, addr) = (mm_id.checked_add(1)?, 0);
        }
    }
}

impl Core {
    /// Returns the size of the metadata that is kept for all pages together, in bytes, without the allocator's
    /// overhead.
    pub(super) fn bytes(&self) -> usize {
        let items = self.items.saturating_mul(ItemBox::SIZE);
        let index = self.index.bytes(NodeBox::SIZE);
        items
            .saturating_add(index)
            .saturating_add(self.unstable.bytes())
            .saturating_add(self.filter.bytes())
    }

    /// Allows the module to be unloaded if no node is left. The caller must not hold an `mmap_lock`.
    pub(super) fn unpin_if_empty(&mut self) {
        if self.index.has_no_nodes() {
            self.pin.unpin();
        }
    }
}

impl Drop for State {
    fn drop(&mut self) {
        // Nothing is merged any more, or the module could not be unloaded. So this frees only entries and
        // queued pages.
        while let Some(mm_id) = self.mms.cursor_front().map(|first| *first.current().0) {
            let mut budget = Forget::everything();
            if let Some(known) = self.mms.get_mut(&mm_id) {
                known.forgotten_to = Some(0);
            }
            self.forget_range(mm_id, 0, usize::MAX, &mut budget, |_, _, _| false);
            self.remove_mm(mm_id);
        }
        self.core.swept = None;
        self.core.sweep_orphans(usize::MAX, true);
    }
}

/// Returns what is remembered of the pages of `mm`. Adds the address space if it is new; `None` without memory
/// for that.
pub(super) fn known_mm<'a>(
    mms: &'a mut RBTree<MmId, MmState>,
    mm: &Mm,
    mm_id: MmId,
) -> Option<&'a mut MmState> {
    if mms.get(&mm_id).is_none() {
        let known = MmState {
            mm: mm.into(),
            pages: PageMap::new(),
            reported: 0,
            forgotten_to: None,
        };
        mms.try_create_and_insert(mm_id, known, GFP_SCAN).ok()?;
    }
    mms.get_mut(&mm_id)
}

/// Returns the number of seconds since `began`.
pub(super) fn seconds_since(began: Instant<Monotonic>) -> u64 {
    u64::try_from(began.elapsed().as_millis() / 1000).unwrap_or(0)
}
