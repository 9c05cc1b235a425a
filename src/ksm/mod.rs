// SPDX-License-Identifier: GPL-2.0

//! The policy of rksm: which address spaces to scan, what to remember of their pages, and what to merge.
//!
//! [`Engine`] is the whole of it. `State` is what its mutex protects, and `Core` the part of that which
//! concerns all pages together. Most functions take `&mut State` or `&mut Core`, so the mutex is locked.
//!
//! There is no `unsafe` code. Memory of processes is only reached through [`crate::mm`].
//!
//! | module | contents |
//! | --- | --- |
//! | `thread`, `scan`, `cursor`, [`deferred`] | the main loop of rksmd, passes, batches |
//! | `state`, `page`, [`entry`], `forget`, `page_map`, [`probation`], `unlisted` | what is known of each page |
//! | `filter`, [`index`], `stable_tree`, [`unstable_tree`] | how equal pages are found |
//! | `candidate`, `scan_buffer`, `merge`, `numa`, `metadata` | merging |
//! | `unmerge`, `offline`, `limits` | run=2, memory hotplug, settings of what may be merged |
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
pub(crate) mod mms;
mod numa;
mod offline;
mod page;
mod page_map;
pub(crate) mod probation;
mod scan;
mod scan_buffer;
mod settings;
mod stable_tree;
mod state;
mod stats;
mod sysfs;
pub(crate) mod thread;
mod unlisted;
mod unmerge;
pub(crate) mod unstable_tree;

use crate::{
    hash::{Hasher, Zeroes},
    intree,
};
use advisor::Advisor;
use filter::Filter;
use kernel::{
    alloc::flags,
    mm::{Mm, MmWithUser, MmWithUserAsync},
    new_condvar, new_mutex, new_spinlock,
    prelude::*,
    sync::{
        aref::ARef,
        atomic::{Atomic, Relaxed},
        Arc, CondVar, Mutex, SetOnce, SpinLock,
    },
    task::Task,
};
use mms::{Registry, Reservation};
use settings::Settings;
use state::State;
use stats::Stats;

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
    /// The scan-time advisor.
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
    settings: Arc<Settings>,
    stats: Stats,
    waker: SetOnce<ARef<Task>>,
    /// The hasher for all NUMA nodes together, and the one whose samples depend on the NUMA node.
    hashers: [Hasher; 2],
}

impl Engine {
    /// Creates an engine that is stopped (`run` is 0).
    ///
    /// May sleep. `ENOMEM` if there is no memory.
    pub(crate) fn new(module: &'static ThisModule) -> Result<Arc<Self>> {
        let settings = Settings::new(advisor::DEFAULT_PAGES_TO_SCAN);
        let settings = Arc::new(settings, GFP_KERNEL)?;
        Arc::pin_init(
            try_pin_init!(Self {
                state <- new_mutex!(State::new(module, settings.clone())?, "rksm_state"),
                registry <- new_spinlock!(Registry::new(), "rksm_registry"),
                advisor <- new_mutex!(Advisor::new(), "rksm_advisor"),
                offlining: Atomic::new(false),
                unmerging: Atomic::new(false),
                settled <- new_condvar!("rksm_settled"),
                has_new_work: Atomic::new(false),
                run: Atomic::new(run::STOP),
                settings,
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

    /// Returns the hasher that makes samples and checksums while `merge_across_nodes` is as it is.
    fn hasher(&self) -> &Hasher {
        let [all, per_nid] = &self.hashers;
        if self.settings.per_nid() {
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
        let unshared = core.unstable.len().saturating_add(core.steady);
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

/// How often [`Engine::enter_registered`] tries to register all address spaces, at most.
const ENTER_ATTEMPTS: usize = 8;
/// How many reservations it allocates after the first attempt. It allocates four times as many after each
/// further one.
const ENTER_SPARES: usize = 64;

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
            let now = state.core.changes;
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

/// Takes a user reference (`mm_users`) on an address space, unless it is exiting.
///
/// The reference is dropped by `mmput_async()`, so that dropping the last one does not tear the address space
/// down in the caller's context.
fn use_mm(mm: &Mm) -> Option<ARef<MmWithUserAsync>> {
    mm.mmget_not_zero().map(MmWithUser::into_mmput_async)
}
