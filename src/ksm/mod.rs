// SPDX-License-Identifier: GPL-2.0

//! The engine: who is scanned, what is remembered, what is merged.
//!
//! Safe code only; everything that touches memory of others goes through [`crate::mm`].

mod advisor;
mod candidate;
mod cursor;
pub(crate) mod deferred;
mod filter;
pub(crate) mod index;
mod limits;
mod merge;
mod metadata;
mod mms;
mod numa;
mod offline;
mod page;
mod page_map;
pub(crate) mod probation;
mod scan;
mod stable_tree;
mod stats;
mod sysfs;
mod thread;
mod unlisted;
mod unmerge;

use crate::{
    hash::{Hasher, Zeroes},
    intree,
    mm::{
        entry::PageEntry, folio::NodeId, rmap_item::ItemBox, stable_key::StableKey,
        stable_node::NodeBox,
    },
    sys::module_pin,
};
use advisor::Advisor;
use core::cell::Cell;
use filter::Filter;
use index::{Index, MmId, PageAddr};
use kernel::{
    alloc::{flags, Flags},
    mm::{Mm, MmWithUser, MmWithUserAsync},
    new_condvar, new_mutex, new_spinlock,
    prelude::*,
    rbtree::RBTree,
    sync::{
        aref::ARef,
        atomic::{Atomic, Relaxed},
        Arc, CondVar, Mutex, SetOnce, SpinLock,
    },
    task::Task,
    time::{Instant, Monotonic},
};
use mms::{Registry, Reservation};
use page::Forget;
use page_map::PageMap;
use probation::Clock;
use stable_tree::Released;
use stats::Stats;
use unlisted::Unlisted;

/// Allocations of the scanning thread: there is always a next pass, so rather fail than make the
/// system reclaim hard or say anything.
const GFP_SCAN: Flags = flags::GFP_NOWAIT;

/// `run`: what the thread is to do.
pub(crate) mod run {
    /// Nothing; what is merged stays merged.
    pub(crate) const STOP: u32 = 0;
    /// Scan and merge.
    pub(crate) const MERGE: u32 = 1;
    /// Nothing; everything was unmerged when this was written.
    pub(crate) const UNMERGE: u32 = 2;
}

/// One loaded engine.
///
/// # Lock order
///
/// This is the only list of it. A lock is taken after those above it:
///
/// 1. the kernel's CPU and memory hotplug locks, held around an [`offline`] notification
/// 2. `ksm_thread_mutex` of mm/ksm.c, for a moment: at load, and at both ends of run=2
/// 3. `state`: the trees, and all that is known of pages
/// 4. `module_mutex`, to pin and unpin the module; nothing is taken under it
/// 5. `mmap_lock` of one registered mm, or of two, for reading
///    ([`MergeableVma`](crate::mm::vma::MergeableVma))
/// 6. the folio lock of a merged page, then that of the page to be merged into it
///    ([`LockedPage`](crate::mm::folio::LockedPage))
/// 7. the kernel's anon_vma lock: the split of a huge page, and the check of who shares a page over a fork
/// 8. an MMU notifier section, then a page-table lock
/// 9. `ksm_mmlist_lock` of mm/ksm.c, around `registry`
/// 10. `registry`. Tracepoint probes take it under whatever lock the kernel holds there, so nothing is taken, freed or
///     waited for under it
///
/// `advisor` is taken alone or under `state`, and nothing is taken under it.
///
/// Under `state`, `mmap_lock` and folio locks are only tried, never waited for: a process may hold them for as long as it
/// likes. run=2 waits for `mmap_lock`, and for memory for the copies that it makes, without any lock of the engine.
#[pin_data]
pub(crate) struct Engine {
    #[pin]
    state: Mutex<State>,
    #[pin]
    registry: SpinLock<Registry>,
    /// Decides on `pages_to_scan`, which is only written with this locked.
    #[pin]
    advisor: Mutex<Advisor>,
    /// Memory is going offline: keep away from pages and nodes. Written with `state` locked.
    offlining: Atomic<bool>,
    /// All pages are being unmerged. Written with `state` locked.
    unmerging: Atomic<bool>,
    /// Told when either is over.
    #[pin]
    settled: CondVar,
    /// Somebody else than the thread left it deferred_work. Written with `state` locked.
    left_chores: Atomic<bool>,
    run: Atomic<u32>,
    pages_to_scan: Atomic<u32>,
    sleep_millisecs: Atomic<u32>,
    /// Whether to skip areas in which looking came to nothing for some passes.
    smart_scan: Atomic<u32>,
    /// Whether to merge pages at first sight.
    merge_eagerly: Atomic<u32>,
    /// The shortest time from the beginning of one pass to that of the next.
    pass_millisecs: Atomic<u32>,
    /// Whether pages of zeroes are merged with the kernel's zero page.
    use_zero_pages: Atomic<u32>,
    /// The most places that are mapped to one merged page, as [`Core::max_sharing`].
    max_page_sharing: Atomic<u32>,
    /// How often to look for merged pages that are gone, in milliseconds.
    stable_node_chains_prune_millisecs: Atomic<u32>,
    stats: Stats,
    waker: SetOnce<ARef<Task>>,
    /// For all memory nodes together, and for each of them by itself.
    hashers: [Hasher; 2],
    /// Whether pages on different memory nodes are merged, as [`Core::per_nid`].
    merge_across_nodes: Atomic<u32>,
}

/// What is known of the pages of one address space.
pub(crate) struct MmState {
    mm: ARef<Mm>,
    pages: PageMap<PageEntry>,
    /// What [`State::report`] took into account last, in bytes.
    reported: usize,
    /// The address space is gone, and what is known of it before this address is forgotten.
    forgotten_to: Option<usize>,
}

/// What the mutex protects.
pub(crate) struct State {
    mms: RBTree<MmId, MmState>,
    core: Core,
    scratch: Option<KBox<candidate::ScanBuffer>>,
    cursor: scan::Cursor,
    /// Anonymous pages of all registered processes when the pass began.
    mapped_pages: usize,
    /// What the maps of all address spaces take, in bytes, as of the last look at each.
    map_bytes: usize,
    /// How many of [`Self::mms`] are gone.
    dying: usize,
    /// Merged pages that are to be ordinary ones again: because no other page could be merged with them, in
    /// which case this is the node, whose key may change; or because they are of no node.
    to_break: KVec<(PageAddr, Option<NodeId>)>,
    /// Pages that were left alone in this pass because a per-CPU LRU batch may hold them.
    batched: KVec<PageAddr>,
    /// The newest address space when all pages were unmerged last.
    unmerged_to: MmId,
}

/// What is known of all pages together.
struct Core {
    index: Index<NodeBox>,
    /// The samples of all pages that are remembered, each counted once.
    filter: Filter,
    /// The pass in which there was no memory for another one last.
    filter_failed: Option<u32>,
    /// The samples of pages of zeroes, while these are merged with the kernel's zero page and not with each
    /// other as any others. The filter has them twice then, as a single such page is enough.
    zeroes: Option<Zeroes>,
    /// Whether only pages on the same memory node are merged. Does not change while there are nodes.
    per_nid: bool,
    /// The most places that are mapped to one merged page. Does not change while there are nodes.
    max_sharing: usize,
    /// Places that map merged pages: items on nodes.
    items: usize,
    /// Pages that are remembered, merged ones included.
    pages: usize,
    /// Pages that are steady and do not wait.
    steady: usize,
    /// Counts what happened to pages that are remembered.
    changes: u64,
    /// Whether it is this area's turn to have what is known of its pages looked at anew, see
    /// [`LeafCursor::is_refreshing`](page_map::LeafCursor::is_refreshing).
    refreshing: bool,
    /// Counts what [`Core::bump_retry_seq`] is called for. Starts at 1, see [`scan::Cursor`].
    retry_seq: u64,
    /// Numbers the passes.
    pass: u32,
    /// When the pass began, for pages on probation.
    clock: Clock,
    /// When the engine was made.
    born: Instant<Monotonic>,
    /// Pages that were written to soon after they were merged.
    quick_cow_breaks: usize,
    /// The [bits](crate::hash::Sample::bit) of pages that were merged, or found to differ from one with their
    /// sample, since merged pages were last looked for.
    lately: u64,
    /// Whether VMAs that are not mergeable may have merged pages.
    has_strays: bool,
    /// Whether this pass has found such pages.
    found_strays: bool,
    /// How far [`Core::rekey_migrated_nodes`] has come, and whether in the tree of full nodes.
    rekeyed_to: (bool, Option<StableKey>),
    /// Nodes whose pages are gone are being freed, all of them: how far that has come.
    releasing: Option<Released>,
    /// Whether the step has run out of memory for what it is to remember of pages. Do not ask again then.
    starved: Cell<bool>,
    /// Where pages may be mapped that became merged pages in another process.
    unlisted: Unlisted,
    /// How far [`Core::sweep_orphans`] has come.
    swept: Option<StableKey>,
    /// How far [`Core::prune`] has come.
    pruned: Option<StableKey>,
    /// When it began at the beginning last; `None` before the first time.
    prune_began: Option<Instant<Monotonic>>,
    pin: module_pin::Pin,
}

impl Engine {
    /// An engine that is stopped.
    pub(crate) fn new(module: &'static ThisModule) -> Result<Arc<Self>> {
        Arc::pin_init(
            try_pin_init!(Self {
                state <- new_mutex!(State::new(module)?, "rksm_state"),
                registry <- new_spinlock!(Registry::new(), "rksm_registry"),
                advisor <- new_mutex!(Advisor::new(), "rksm_advisor"),
                offlining: Atomic::new(false),
                unmerging: Atomic::new(false),
                settled <- new_condvar!("rksm_settled"),
                left_chores: Atomic::new(false),
                run: Atomic::new(run::STOP),
                pages_to_scan: Atomic::new(advisor::DEFAULT_PAGES_TO_SCAN),
                sleep_millisecs: Atomic::new(sysfs::DEFAULT_SLEEP_MILLISECS),
                smart_scan: Atomic::new(1),
                merge_eagerly: Atomic::new(0),
                pass_millisecs: Atomic::new(sysfs::DEFAULT_PASS_MILLISECS),
                use_zero_pages: Atomic::new(0),
                max_page_sharing: Atomic::new(sysfs::DEFAULT_MAX_PAGE_SHARING),
                stable_node_chains_prune_millisecs: Atomic::new(sysfs::DEFAULT_PRUNE_MILLISECS),
                stats: Stats::new(),
                waker: SetOnce::new(),
                hashers: {
                    let hasher = Hasher::new(crate::mm::random_words());
                    let per_nid = hasher.per_nid(crate::mm::memory_nodes());
                    [hasher, per_nid]
                },
                merge_across_nodes: Atomic::new(1),
            }),
            GFP_KERNEL,
        )
    }

    /// Sets whom to wake when there is something to do.
    pub(crate) fn set_waker(&self, waker: ARef<Task>) {
        self.waker.populate(waker);
    }

    fn wake(&self) {
        if let Some(task) = self.waker.as_ref() {
            task.wake_up();
        }
    }

    /// What makes samples and checksums now.
    fn hasher(&self, core: &Core) -> &Hasher {
        let [all, per_nid] = &self.hashers;
        if core.per_nid {
            per_nid
        } else {
            all
        }
    }

    fn run(&self) -> u32 {
        self.run.load(Relaxed)
    }

    /// Enters all address spaces that in-tree KSM has registered. `ENOMEM`: some were missed.
    ///
    /// Who exits meanwhile is reported through [`intree::Listener::exit`] afterwards, if the
    /// listener was set before. May sleep.
    pub(crate) fn enter_registered(&self) -> Result {
        let mut count = ENTER_SPARES;
        for _ in 0..ENTER_ATTEMPTS {
            self.registry.lock().take_missed();
            // In-tree KSM's lock is held all the time, so nothing is allocated meanwhile.
            intree::for_each_registered(|mm| self.registry.lock().enter_with_spare(mm));
            self.wake();
            if !self.registry.lock().has_missed() {
                return Ok(());
            }
            let mut spares = KVec::with_capacity(count, GFP_KERNEL)?;
            for _ in 0..count {
                spares.push_within_capacity(Reservation::new(GFP_KERNEL)?)?;
            }
            // What was left of the old ones is freed without the lock.
            drop(self.registry.lock().replace_spares(spares));
            count = count.saturating_mul(4);
        }
        Err(ENOMEM)
    }

    /// Enters an address space, unless it is known. Does not sleep.
    fn enter_one(&self, mm: ARef<Mm>) {
        if self.registry.lock().knows(&mm) {
            return;
        }
        let reservation = Reservation::new(flags::GFP_NOWAIT).ok();
        let unused = self.registry.lock().enter(mm, reservation);
        // Not the last reference: the caller's in-tree registration has one.
        drop(unused);
    }

    /// Notes who is gone.
    fn reap(&self, state: &mut State) {
        loop {
            // In a statement of its own: the lock must not be held for the rest.
            let dead = self.registry.lock().take_dead();
            let Some((id, mm)) = dead else {
                break;
            };
            if let Some(known) = state.mms.get_mut(&id) {
                known.forgotten_to = Some(0);
                state.dying = state.dying.saturating_add(1);
            }
            drop(mm);
        }
    }

    fn update_stats(&self, state: &State) {
        self.stats.update(&state.core, state.map_bytes);
    }
}

impl intree::Listener for Engine {
    fn enter(&self, mm: ARef<Mm>) {
        self.enter_one(mm);
        self.wake();
    }

    fn exit(&self, mm: &Mm) {
        let known = self.registry.lock().exit(mm.as_raw());
        if known {
            self.wake();
        }
    }
}

/// How many times the pages that are remembered the filter may have room for, in view of how many are mapped.
const FILTER_AHEAD: usize = 16;

/// How many leaves of pages are counted anew under one hold of `state`.
const COUNT_LEAVES: usize = 64;
/// How many merged pages are cow_broken after one step of the scan, at most.
const BREAK_PAGES: usize = 128;
/// How many pages that per-CPU LRU batches may hold are tried again at the end of the pass, at most.
const BATCHED_PAGES: usize = 512;

/// How often to try to enter everybody, and how many entries to allocate in between: at first, then four
/// times as many each time.
const ENTER_ATTEMPTS: usize = 8;
const ENTER_SPARES: usize = 64;

impl State {
    fn new(module: &'static ThisModule) -> Result<Self> {
        Ok(Self {
            mms: RBTree::new(),
            core: Core {
                index: Index::new(),
                filter: Filter::new(),
                filter_failed: None,
                zeroes: None,
                per_nid: false,
                max_sharing: sysfs::DEFAULT_MAX_PAGE_SHARING as usize,
                items: 0,
                pages: 0,
                steady: 0,
                changes: 0,
                refreshing: false,
                retry_seq: 1,
                pass: 0,
                clock: Clock::new(),
                born: Instant::now(),
                quick_cow_breaks: 0,
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
            scratch: Some(KBox::init(candidate::ScanBuffer::init(), GFP_KERNEL)?),
            cursor: scan::Cursor::new(),
            mapped_pages: 0,
            map_bytes: 0,
            dying: 0,
            to_break: KVec::with_capacity(BREAK_PAGES, GFP_KERNEL)?,
            batched: KVec::with_capacity(BATCHED_PAGES, GFP_KERNEL)?,
            unmerged_to: 0,
        })
    }

    /// Forgets some of what is known of address spaces that are gone. Returns whether there is more to be
    /// forgotten at once.
    fn forget_dying(&mut self) -> bool {
        let mut budget = Forget::new();
        let mut after = 0;
        while self.dying != 0 {
            let next = self.mms.iter().find_map(|(&mm_id, known)| {
                Some((mm_id, known.forgotten_to?)).filter(|at| at.0 > after)
            });
            let Some((mm_id, from)) = next else {
                break;
            };
            let more = self.forget_range(mm_id, from, usize::MAX, &mut budget, |_, _| false);
            let Some(known) = self.mms.get_mut(&mm_id) else {
                break;
            };
            // At the end, what could not be forgotten is tried again some time.
            known.forgotten_to = Some(more.unwrap_or(0));
            if more.is_some() {
                return true;
            }
            after = mm_id;
            if known.pages.is_empty() {
                self.remove_mm(mm_id);
            }
        }
        false
    }

    /// Accounts the metadata of an address space: to itself, and in all.
    fn report(&mut self, mm_id: MmId) {
        let Some(known) = self.mms.get_mut(&mm_id) else {
            return;
        };
        let map = known.pages.bytes();
        let items = crate::mm::merging_pages(&known.mm).saturating_mul(ItemBox::SIZE);
        crate::mm::report_metadata(&known.mm, map.saturating_add(items));
        let before = core::mem::replace(&mut known.reported, map);
        self.map_bytes = self.map_bytes.saturating_sub(before).saturating_add(map);
    }

    /// Forgets an address space of whose pages nothing is known any more.
    fn remove_mm(&mut self, mm_id: MmId) {
        if let Some(mm) = self.mms.remove(&mm_id) {
            crate::mm::report_metadata(&mm.mm, 0);
            self.map_bytes = self.map_bytes.saturating_sub(mm.reported);
            if mm.forgotten_to.is_some() {
                self.dying = self.dying.saturating_sub(1);
            }
        }
    }

    /// Merges pages of zeroes with the kernel's zero page from now on, or with each other. What is merged
    /// stays as it is; who waits is looked at again (see [`Core::classify_page`]).
    fn use_zero_page(&mut self, hasher: &Hasher, on: bool) {
        if on == self.core.zeroes.is_some() {
            return;
        }
        let zeroes = hasher.zeroes();
        self.core.zeroes = on.then_some(zeroes);
        for zero in zeroes.iter().flat_map(|zero| [zero; 2]) {
            if on {
                self.core.filter.add(zero);
            } else {
                self.core.filter.remove(zero);
            }
        }
        self.core.bump_retry_seq();
    }

    /// For how many pages the filter should have room, and with how many it would have to do without the
    /// memory for these; `None`: it is good as it is. `more` pages are about to be remembered. Without memory it
    /// stays as it is until the next pass, and takes more pages for ones that have an equal than it should.
    fn wanted_filter(&self, more: usize) -> Option<[usize; 2]> {
        let pages = self.core.pages.saturating_add(more);
        let filter = &self.core.filter;
        if self.cursor.at.is_between_passes() && filter.is_much_too_large_for(pages) {
            return Some([pages.saturating_mul(2); 2]);
        }
        if filter.has_room_for(pages) && !filter.is_saturated()
            || self.core.filter_failed == Some(self.core.pass)
        {
            return None;
        }
        // Grow to what is mapped by those who are registered, unless that is out of all proportion.
        let ahead = pages.saturating_mul(FILTER_AHEAD);
        let double = pages.saturating_mul(2);
        let room = match self.mapped_pages {
            mapped if mapped < pages => double,
            mapped => mapped.min(ahead),
        };
        Some([room, double.min(room)])
    }

    /// Counts the samples of some pages from `at` on into `filter`. Returns where to go on.
    fn count_some(&self, filter: &mut Filter, at: (MmId, usize)) -> Option<(MmId, usize)> {
        let (mut mm_id, mut addr) = at;
        let mut budget = COUNT_LEAVES;
        loop {
            let cursor = self.mms.cursor_lower_bound(&mm_id)?;
            let (&found, known) = cursor.current();
            if found != mm_id {
                (mm_id, addr) = (found, 0);
            }
            let more = known.pages.for_each_from(addr, &mut budget, |entry| {
                filter.add(entry.sample());
            });
            if let Some(addr) = more {
                return Some((mm_id, addr));
            }
            (mm_id, addr) = (mm_id.checked_add(1)?, 0);
        }
    }
}

impl Engine {
    /// Gives the filter the room that it should have, and counts all samples anew. Called by the scanning
    /// thread without any lock, as the thread is what remembers pages; if something changes meanwhile all the
    /// same, that was for nothing.
    fn rebuild_filter(&self, rooms: [usize; 2]) {
        let made = rooms
            .into_iter()
            .find_map(|room| Filter::for_pages(room, crate::mm::available_bytes()).ok());
        let Some(mut filter) = made else {
            let mut state = self.state.lock();
            state.core.filter_failed = Some(state.core.pass);
            return;
        };
        let mut at = Some((0, 0));
        let mut began = None;
        while let Some(from) = at {
            crate::mm::cond_resched();
            let state = self.state.lock();
            let now = (state.core.changes, state.core.zeroes.is_some());
            if *began.get_or_insert(now) != now {
                return;
            }
            at = state.count_some(&mut filter, from);
            if at.is_some() {
                continue;
            }
            let mut state = state;
            for zero in state.core.zeroes.into_iter().flat_map(Zeroes::iter) {
                filter.add(zero);
                filter.add(zero);
            }
            let old = core::mem::replace(&mut state.core.filter, filter);
            drop(state);
            // It may be large.
            return drop(old);
        }
    }
}

impl Core {
    /// What is kept for all pages together, in bytes, without the allocator's own overhead.
    fn bytes(&self) -> usize {
        let items = self.items.saturating_mul(ItemBox::SIZE);
        let index = self.index.bytes(NodeBox::SIZE);
        items
            .saturating_add(index)
            .saturating_add(self.filter.bytes())
    }

    /// Allows unloading when there is no node left. Not called with an `mmap_lock` held.
    fn unpin_if_empty(&mut self) {
        if self.index.has_no_nodes() {
            self.pin.unpin();
        }
    }
}

impl Drop for State {
    fn drop(&mut self) {
        // Nothing is merged any more, or the module could not be unloaded; so this frees entries and
        // waiting places only.
        while let Some(mm_id) = self.mms.cursor_front().map(|first| *first.current().0) {
            let mut budget = Forget::everything();
            if let Some(known) = self.mms.get_mut(&mm_id) {
                known.forgotten_to = Some(0);
            }
            self.forget_range(mm_id, 0, usize::MAX, &mut budget, |_, _| false);
            self.remove_mm(mm_id);
        }
        self.core.swept = None;
        self.core.sweep_orphans(usize::MAX, true);
    }
}

/// Takes a user reference on an address space, unless it is exiting. Dropping the reference never
/// tears the address space down in the context of the task that does so.
fn use_mm(mm: &Mm) -> Option<ARef<MmWithUserAsync>> {
    mm.mmget_not_zero().map(MmWithUser::into_mmput_async)
}
