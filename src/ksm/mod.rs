// SPDX-License-Identifier: GPL-2.0

//! The policy of rksm: which address spaces to scan, what to remember of their pages, and what to merge.
//!
//! [`Engine`] is the whole of it. [`State`] is what its mutex protects, and [`Core`] the part of that which
//! concerns all pages together. Most functions here take `&mut State` or `&mut Core`, so `state` is locked.
//!
//! There is no `unsafe` code. Memory of processes is only reached through [`crate::mm`].
//!
//! | module | contents |
//! | --- | --- |
//! | `thread`, `scan`, `cursor`, [`deferred`] | the main loop of rksmd, passes, batches |
//! | `page`, [`entry`], `forget`, `page_map`, [`probation`], `unlisted` | what is remembered of each page |
//! | `filter`, [`index`], `stable_tree` | how equal pages are found |
//! | `candidate`, `merge`, `numa`, `metadata` | merging |
//! | `unmerge`, `offline`, `limits` | run=2, memory hotplug, settings that need all pages unmerged |
//! | `mms` | registered address spaces |
//! | `sysfs`, `settings`, `stats`, `advisor` | the interface to user space |

mod advisor;
mod candidate;
mod cursor;
pub(crate) mod deferred;
pub(crate) mod entry;
mod filter;
mod forget;
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
mod settings;
mod stable_tree;
mod stats;
mod sysfs;
pub(crate) mod thread;
mod unlisted;
mod unmerge;

use crate::{
    hash::{Hasher, Zeroes},
    intree,
    mm::{folio::NodeId, rmap_item::ItemBox, stable_key::StableKey, stable_node::NodeBox},
    sys::module_pin,
};
use advisor::Advisor;
use core::cell::Cell;
use entry::PageEntry;
use filter::Filter;
use forget::Forget;
use index::{Index, MmId, PageAddr, Released};
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
use page_map::PageMap;
use probation::Clock;
use stats::Stats;
use unlisted::Unlisted;

/// Flags for allocations of the scanning thread. They may fail, as the next pass tries again. So they neither
/// enter direct reclaim nor warn.
const GFP_SCAN: Flags = flags::GFP_NOWAIT;

/// The values of the sysfs file `run`.
pub(crate) mod run {
    /// Do not scan. Merged pages stay merged.
    pub(crate) const STOP: u32 = 0;
    /// Scan and merge.
    pub(crate) const MERGE: u32 = 1;
    /// Do not scan. The write of this value unmerged all pages.
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
/// 3. `state`: the trees, and all that is remembered of pages
/// 4. `module_mutex`, to pin and unpin the module; nothing is taken under it
/// 5. `mmap_lock` of one registered mm, or of two, for reading ([`MergeableVma`](crate::mm::vma::MergeableVma))
/// 6. the folio lock of a merged page, then that of the page to be replaced by it
///    ([`LockedPage`](crate::mm::folio::LockedPage))
/// 7. the kernel's anon_vma lock: to split a huge page, and to check which processes share a page over a fork
/// 8. an MMU notifier section, then a page-table lock
/// 9. `ksm_mmlist_lock` of mm/ksm.c, around `registry`
/// 10. `registry`. Tracepoint probes take it under any lock that the kernel holds there, so nothing is taken,
///     freed or waited for under it
///
/// `advisor` is taken alone or under `state`, and nothing is taken under it.
///
/// Under `state`, `mmap_lock` and folio locks are only tried, never waited for: a process may hold them for as
/// long as it likes. run=2 waits for `mmap_lock`, and for memory for its copies, without any lock of the
/// engine.
#[pin_data]
pub(crate) struct Engine {
    #[pin]
    state: Mutex<State>,
    #[pin]
    registry: SpinLock<Registry>,
    /// The scan-time advisor. `pages_to_scan` is only written with this locked.
    #[pin]
    advisor: Mutex<Advisor>,
    /// Whether memory is going offline. If so, do not touch pages or nodes. Written with `state` locked.
    offlining: Atomic<bool>,
    /// Whether a run=2 is unmerging all pages. Written with `state` locked.
    unmerging: Atomic<bool>,
    /// Notified when `offlining` or `unmerging` becomes false.
    #[pin]
    settled: CondVar,
    /// Set when there is new deferred work for the scanning thread. Written with `state` locked.
    has_new_work: Atomic<bool>,
    run: Atomic<u32>,
    pages_to_scan: Atomic<u32>,
    sleep_millisecs: Atomic<u32>,
    /// Whether to skip leaves in which nothing has changed for some passes.
    smart_scan: Atomic<u32>,
    /// Whether to merge pages in the first pass that sees them.
    merge_eagerly: Atomic<u32>,
    /// The shortest time from the beginning of one pass to that of the next, in milliseconds.
    pass_millisecs: Atomic<u32>,
    /// The time between two searches of the full tree for stale nodes, in milliseconds.
    stable_node_chains_prune_millisecs: Atomic<u32>,
    stats: Stats,
    waker: SetOnce<ARef<Task>>,
    /// The hasher for all NUMA nodes together, and the one whose samples depend on the NUMA node.
    hashers: [Hasher; 2],
}

/// An address space, and what is remembered of its pages.
pub(crate) struct MmState {
    mm: ARef<Mm>,
    pages: PageMap<PageEntry>,
    /// The size of `pages` when [`State::report`] was called last, in bytes.
    reported: usize,
    /// `Some` once the address space has exited: pages below this address are forgotten, the others still have
    /// to be.
    forgotten_to: Option<usize>,
}

/// What the mutex of [`Engine`] protects.
pub(crate) struct State {
    mms: RBTree<MmId, MmState>,
    core: Core,
    cursor: cursor::Cursor,
    /// The number of anonymous pages of all registered processes when the pass began.
    mapped_pages: usize,
    /// The size of the page maps of all address spaces, in bytes, as last reported for each.
    map_bytes: usize,
    /// How many of [`Self::mms`] have exited.
    dying: usize,
    /// Merged pages to unshare when `state` is unlocked, see [`Engine::break_cow_pending`].
    ///
    /// With a node: the page became its KSM page, but no other page could be merged into it. The node is given
    /// by its identity, as its key may change. Without a node: the page has none.
    to_break: KVec<(PageAddr, Option<NodeId>)>,
    /// Pages that this pass could not merge because a per-CPU LRU batch may hold a reference.
    batched: KVec<PageAddr>,
    /// The newest address space at the time of the last complete run=2.
    unmerged_to: MmId,
}

/// What is known of all pages together.
struct Core {
    index: Index<NodeBox>,
    /// Counts the sample of each tracked page.
    filter: Filter,
    /// The last pass in which there was no memory for another filter.
    filter_failed: Option<u32>,
    /// The samples of pages of zeroes while `use_zero_pages` is on; `None` while these are merged like any
    /// other page.
    ///
    /// If `Some`, the filter counts each of them twice more, so that a single such page is a candidate.
    zeroes: Option<Zeroes>,
    /// Whether only pages on the same NUMA node are merged: `merge_across_nodes` is 0. It does not change while
    /// there are nodes.
    per_nid: bool,
    /// `max_page_sharing`: the most mappings that one merged page may have. It does not change while there are
    /// nodes.
    max_sharing: usize,
    /// The number of listed mappings of merged pages: rmap items on stable nodes.
    items: usize,
    /// The number of tracked pages, merged ones included.
    pages: usize,
    /// The number of steady pages. Queued pages are not among them.
    steady: usize,
    /// Incremented whenever a page is tracked, untracked, or changes its state, see
    /// [`Engine::rebuild_filter`].
    changes: u64,
    /// Incremented by [`Core::bump_retry_seq`]. It starts at 1, so it differs from that of a new
    /// [`cursor::Cursor`].
    retry_seq: u64,
    /// The number of the current pass.
    pass: u32,
    /// When the pass began, for pages on probation.
    clock: Clock,
    /// When the engine was created.
    born: Instant<Monotonic>,
    /// The [bits](crate::hash::Sample::bit) of samples for which a page was merged, or was found to differ from
    /// another page with it, since the last search of the stable tree.
    lately: u64,
    /// Whether VMAs that are not mergeable may map merged pages. If so, passes walk them as well.
    has_strays: bool,
    /// Whether this pass has found such a mapping.
    found_strays: bool,
    /// The last node that [`Core::rekey_migrated_nodes`] has checked, and whether it is in the full tree.
    rekeyed_to: (bool, Option<StableKey>),
    /// How far the search of all nodes for stale ones has come; `None` if there is none to do.
    releasing: Option<Released>,
    /// Whether this step has run out of memory for entries or rmap items. If so, it allocates no more of them.
    starved: Cell<bool>,
    /// Leaves in which pages may be mapped that became merged pages through another process.
    unlisted: Unlisted,
    /// The last orphan that [`Core::sweep_orphans`] has checked; `None`: begin with the first.
    swept: Option<StableKey>,
    /// The last node that [`Core::prune`] has checked; `None`: begin with the first.
    pruned: Option<StableKey>,
    /// When [`Core::prune`] last began with the first node; `None` before the first time.
    prune_began: Option<Instant<Monotonic>>,
    pin: module_pin::Pin,
}

impl Engine {
    /// Creates an engine that is stopped (`run` is 0).
    ///
    /// May sleep. `ENOMEM` if there is no memory.
    pub(crate) fn new(module: &'static ThisModule) -> Result<Arc<Self>> {
        Arc::pin_init(
            try_pin_init!(Self {
                state <- new_mutex!(State::new(module)?, "rksm_state"),
                registry <- new_spinlock!(Registry::new(), "rksm_registry"),
                advisor <- new_mutex!(Advisor::new(), "rksm_advisor"),
                offlining: Atomic::new(false),
                unmerging: Atomic::new(false),
                settled <- new_condvar!("rksm_settled"),
                has_new_work: Atomic::new(false),
                run: Atomic::new(run::STOP),
                pages_to_scan: Atomic::new(advisor::DEFAULT_PAGES_TO_SCAN),
                sleep_millisecs: Atomic::new(settings::DEFAULT_SLEEP_MILLISECS),
                smart_scan: Atomic::new(1),
                merge_eagerly: Atomic::new(0),
                pass_millisecs: Atomic::new(settings::DEFAULT_PASS_MILLISECS),
                stable_node_chains_prune_millisecs: Atomic::new(settings::DEFAULT_PRUNE_MILLISECS),
                stats: Stats::new(),
                waker: SetOnce::new(),
                hashers: {
                    let hasher = Hasher::new(crate::mm::random_words());
                    let per_nid = hasher.per_nid(crate::mm::memory_nodes());
                    [hasher, per_nid]
                },
            }),
            GFP_KERNEL,
        )
    }

    /// Sets the thread that [`Self::wake`] wakes: rksmd.
    pub(crate) fn set_waker(&self, waker: ARef<Task>) {
        self.waker.populate(waker);
    }

    /// Wakes rksmd. Does not sleep.
    fn wake(&self) {
        if let Some(task) = self.waker.as_ref() {
            task.wake_up();
        }
    }

    /// Returns the hasher that makes samples and checksums while `per_nid` is as it is.
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

    /// Registers all address spaces that in-tree KSM knows.
    ///
    /// If one exits meanwhile, the caller's listener hears of it through [`intree::Listener::exit`] afterwards.
    /// So set the listener before. May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM` if some address spaces could not be registered. The registry remembers that some were missed.
    pub(crate) fn enter_registered(&self) -> Result {
        let mut count = ENTER_SPARES;
        for _ in 0..ENTER_ATTEMPTS {
            self.registry.lock().take_missed();
            // In-tree KSM's spinlock is held throughout, so use reservations instead of allocating.
            intree::for_each_registered(|mm| self.registry.lock().enter_with_spare(mm));
            self.wake();
            if !self.registry.lock().has_missed() {
                return Ok(());
            }
            let mut spares = KVec::with_capacity(count, GFP_KERNEL)?;
            for _ in 0..count {
                spares.push_within_capacity(Reservation::new(GFP_KERNEL)?)?;
            }
            // Free the unused old reservations without the lock.
            drop(self.registry.lock().replace_spares(spares));
            count = count.saturating_mul(4);
        }
        Err(ENOMEM)
    }

    /// Registers an address space, unless it is registered already. Does not sleep.
    ///
    /// Without memory, the registry remembers that an address space was missed.
    fn enter_one(&self, mm: ARef<Mm>) {
        if self.registry.lock().knows(&mm) {
            return;
        }
        let reservation = Reservation::new(flags::GFP_NOWAIT).ok();
        let unused = self.registry.lock().enter(mm, reservation);
        // This is not the last reference: in-tree KSM has one while the address space is registered there.
        drop(unused);
    }

    /// Marks the address spaces that have exited, so that their pages are forgotten.
    fn reap(&self, state: &mut State) {
        loop {
            // Use a statement of its own, so that the lock is not held in the body.
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

    /// Publishes the counters of `state` to the readers of sysfs.
    fn update_stats(&self, state: &State) {
        let (core, stats, map_bytes) = (&state.core, &self.stats, state.map_bytes);
        let shared = core.index.stable_len();
        let unshared = core.index.unstable_len().saturating_add(core.steady);
        // If a node was released, the entries of its pages say "merged" until the next scan. They count as
        // volatile.
        let volatile = core
            .pages
            .saturating_sub(core.items)
            .saturating_sub(unshared);
        stats.shared.store(shared as u64, Relaxed);
        stats
            .sharing
            .store(core.items.saturating_sub(shared) as u64, Relaxed);
        stats.chains.store(core.index.chains() as u64, Relaxed);
        stats.dups.store(core.index.dups() as u64, Relaxed);
        stats.unshared.store(unshared as u64, Relaxed);
        stats.volatile.store(volatile as u64, Relaxed);
        let metadata = core.bytes().saturating_add(map_bytes);
        stats.metadata.store(metadata as u64, Relaxed);
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

/// The filter may be sized for this many times the tracked pages, if as many pages are mapped.
const FILTER_AHEAD: usize = 16;

/// How many leaves [`State::count_some`] counts under one hold of `state`.
const COUNT_LEAVES: usize = 64;
/// How many merged pages are unshared after one step of the scan, at most.
const BREAK_PAGES: usize = 128;
/// How many pages that per-CPU LRU batches may hold are retried at the end of a pass, at most.
const BATCHED_PAGES: usize = 512;

/// How often [`Engine::enter_registered`] tries to register all address spaces, at most.
const ENTER_ATTEMPTS: usize = 8;
/// How many reservations it allocates after the first attempt. It allocates four times as many after each
/// further one.
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
                max_sharing: settings::DEFAULT_MAX_PAGE_SHARING as usize,
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
            cursor: cursor::Cursor::new(),
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
            let next = self.forget_range(mm_id, from, usize::MAX, &mut budget, |_, _| false);
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

    /// Forgets an address space of which no page is tracked any more.
    fn remove_mm(&mut self, mm_id: MmId) {
        if let Some(mm) = self.mms.remove(&mm_id) {
            crate::mm::report_metadata(&mm.mm, 0);
            self.map_bytes = self.map_bytes.saturating_sub(mm.reported);
            if mm.forgotten_to.is_some() {
                self.dying = self.dying.saturating_sub(1);
            }
        }
    }

    /// Sets whether pages of zeroes are merged with the kernel's zero page from now on, or like any other page.
    ///
    /// Merged pages stay as they are. Queued pages are checked when they are scanned next, see
    /// [`Core::classify_page`].
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

    /// Returns for how many pages a new filter should have room, and a smaller number to fall back on if there
    /// is no memory for that. `None`: the current filter will do.
    ///
    /// `extra` pages are about to be tracked. If there is no memory for a new filter, the current one stays
    /// until the next pass, and takes more pages for ones that have an equal than it should.
    fn wanted_filter(&self, extra: usize) -> Option<[usize; 2]> {
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
    fn count_some(&self, filter: &mut Filter, at: (MmId, usize)) -> Option<(MmId, usize)> {
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

impl Engine {
    /// Replaces the filter by a new one with room for the first of `rooms` pages for which there is memory, and
    /// counts all samples again.
    ///
    /// The scanning thread calls this without any lock. As only that thread starts to track pages, changes
    /// meanwhile are rare. If there is one nevertheless, the new filter is thrown away. May sleep.
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
            // Free the old filter without the lock, as it may be large.
            return drop(old);
        }
    }
}

impl Core {
    /// Returns the size of the metadata that is kept for all pages together, in bytes, without the allocator's
    /// overhead.
    fn bytes(&self) -> usize {
        let items = self.items.saturating_mul(ItemBox::SIZE);
        let index = self.index.bytes(NodeBox::SIZE);
        items
            .saturating_add(index)
            .saturating_add(self.filter.bytes())
    }

    /// Allows the module to be unloaded if no node is left. The caller must not hold an `mmap_lock`.
    fn unpin_if_empty(&mut self) {
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
            self.forget_range(mm_id, 0, usize::MAX, &mut budget, |_, _| false);
            self.remove_mm(mm_id);
        }
        self.core.swept = None;
        self.core.sweep_orphans(usize::MAX, true);
    }
}

/// Takes a user reference (`mm_users`) on an address space, unless it is exiting.
///
/// The reference is dropped by `mmput_async()`, so that dropping the last one does not tear the address space
/// down in the caller's context.
fn use_mm(mm: &Mm) -> Option<ARef<MmWithUserAsync>> {
    mm.mmget_not_zero().map(MmWithUser::into_mmput_async)
}
