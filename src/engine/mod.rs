// SPDX-License-Identifier: GPL-2.0

//! The engine: who is scanned, what is remembered, what is merged.
//!
//! Safe code only; everything that touches memory of others goes through [`crate::mm`].

pub(crate) mod checksum;
pub(crate) mod index;
mod knobs;
mod merge;
mod pagemap;
mod registry;
mod scan;
mod stats;

use crate::mm::{
    intree, kthread,
    stable::{Detached, ItemBox, NodeBox},
    unload,
    word::{PageState, PageWord},
};
use index::{Index, Place, SlotId, StableKey};
use kernel::{
    alloc::{flags, Flags},
    mm::Mm,
    new_mutex, new_spinlock,
    prelude::*,
    rbtree::RBTree,
    sync::{
        aref::ARef,
        atomic::{Atomic, Relaxed},
        Arc, Mutex, SetOnce, SpinLock,
    },
    task::Task,
};
use pagemap::PageMap;
use registry::{Registry, Reservation};
use stats::Stats;

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
/// Locks, in the order in which they are taken:
///
/// 1. `state` (the whole index and all that is known of pages),
/// 2. `mmap_lock` of one registered mm, for reading,
/// 3. the folio lock of a merged page, then (only tried) of the page to be merged into it,
/// 4. the kernel's own: anon_vma lock, MMU notifiers, page-table lock.
///
/// `registry` is innermost of all: it is taken from tracepoint probes, which run under whatever lock
/// the kernel holds there, and nothing is taken, freed or waited for under it.
#[pin_data]
pub(crate) struct Engine {
    #[pin]
    state: Mutex<State>,
    #[pin]
    registry: SpinLock<Registry>,
    run: Atomic<u32>,
    pages_to_scan: Atomic<u32>,
    sleep_millisecs: Atomic<u32>,
    stats: Stats,
    waker: SetOnce<ARef<Task>>,
    /// Seeds the checksums, so that nobody can prepare collisions.
    seed: u64,
}

/// What is known of the pages of one address space.
pub(crate) struct MmState {
    mm: ARef<Mm>,
    pages: PageMap<PageWord>,
}

/// What the mutex protects.
pub(crate) struct State {
    mms: RBTree<SlotId, MmState>,
    index: Index<NodeBox>,
    /// Places that map merged pages: items on nodes.
    items: usize,
    /// Pages that are remembered, merged ones included.
    pages: usize,
    cursor: scan::Cursor,
    /// How far [`State::sweep_limbo`] has come.
    swept: Option<StableKey>,
    pin: unload::Pin,
}

impl Engine {
    /// An engine that is stopped.
    pub(crate) fn new(module: &'static ThisModule) -> Result<Arc<Self>> {
        Arc::pin_init(
            try_pin_init!(Self {
                state <- new_mutex!(State::new(module), "rksm_state"),
                registry <- new_spinlock!(Registry::new(), "rksm_registry"),
                run: Atomic::new(run::STOP),
                pages_to_scan: Atomic::new(knobs::DEFAULT_PAGES_TO_SCAN),
                sleep_millisecs: Atomic::new(knobs::DEFAULT_SLEEP_MILLISECS),
                stats: Stats::new(),
                waker: SetOnce::new(),
                seed: crate::mm::random_seed(),
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

    fn run(&self) -> u32 {
        self.run.load(Relaxed)
    }

    /// Enters all address spaces that in-tree KSM has registered.
    ///
    /// Who exits meanwhile is reported through [`intree::Listener::exit`] afterwards, if the
    /// listener was set before.
    pub(crate) fn enter_registered(&self) {
        intree::for_each_registered(|mm| intree::Listener::enter(self, mm));
    }

    /// Whether there is anything to scan.
    fn should_scan(&self) -> bool {
        self.run() == run::MERGE && !self.registry.lock().is_empty()
    }

    /// Whether something has to be done even when nothing is to be scanned.
    fn has_chores(&self) -> bool {
        let registry = self.registry.lock();
        registry.has_dead() || registry.has_missed()
    }

    /// Forgets who is gone, finds who was missed, frees what can be freed.
    fn do_chores(&self, state: &mut State) {
        if self.registry.lock().take_missed() {
            self.enter_registered();
        }
        loop {
            // In a statement of its own: the lock must not be held for the rest.
            let dead = self.registry.lock().take_dead();
            let Some((id, mm)) = dead else {
                break;
            };
            state.forget_mm(id);
            drop(mm);
        }
        state.sweep_limbo(LIMBO_SWEEP, self.run() != run::MERGE);
        self.publish_stats(state);
    }

    fn publish_stats(&self, state: &State) {
        self.stats.publish(state);
    }
}

impl intree::Listener for Engine {
    fn enter(&self, mm: ARef<Mm>) {
        let reservation = Reservation::new(flags::GFP_NOWAIT).ok();
        let unused = self.registry.lock().enter(mm, reservation);
        // Not the last reference: the caller's in-tree registration has one.
        drop(unused);
        self.wake();
    }

    fn exit(&self, mm: &Mm) {
        let known = self.registry.lock().exit(mm.as_raw());
        if known {
            self.wake();
        }
    }
}

impl kthread::Main for Engine {
    fn main(&self, current: &kthread::Current) {
        let mut backoff = LIMBO_RETRY_MS;
        while !current.should_stop() {
            let limbo = {
                let mut state = self.state.lock();
                self.do_chores(&mut state);
                state.index.limbo_len()
            };
            if self.should_scan() {
                self.scan(current);
            }
            backoff = if limbo == 0 {
                LIMBO_RETRY_MS
            } else {
                backoff.saturating_mul(2).min(LIMBO_RETRY_MAX_MS)
            };
            if self.should_scan() {
                let sleep = self.sleep_millisecs.load(Relaxed);
                current.sleep(Some(sleep), || {
                    self.sleep_millisecs.load(Relaxed) != sleep || self.has_chores()
                });
            } else {
                let limit = (limbo > 0).then_some(backoff);
                current.sleep(limit, || self.should_scan() || self.has_chores());
            }
        }
    }
}

/// How soon to look again at nodes whose pages are about to be freed.
const LIMBO_RETRY_MS: u32 = 20;
const LIMBO_RETRY_MAX_MS: u32 = 1000;
/// How many of them at a time.
const LIMBO_SWEEP: usize = 1024;

impl State {
    fn new(module: &'static ThisModule) -> Self {
        Self {
            mms: RBTree::new(),
            index: Index::new(),
            items: 0,
            pages: 0,
            cursor: scan::Cursor::new(),
            swept: None,
            pin: unload::Pin::new(module),
        }
    }

    /// Remembers `word` for the page at `place`, which is in a known address space.
    fn remember(&mut self, place: Place, word: PageWord) -> Result {
        let mm = self.mms.get_mut(&place.slot).ok_or(ESRCH)?;
        if mm.pages.insert(place.addr, word, GFP_SCAN)?.is_none() {
            self.pages = self.pages.saturating_add(1);
        }
        Ok(())
    }

    /// What is remembered of the page at `place`.
    fn recall(&self, place: Place) -> Option<PageState> {
        let mm = self.mms.get(&place.slot)?;
        mm.pages.get(place.addr).map(PageWord::state)
    }

    /// Changes what is remembered of a page to a word that holds no item.
    fn reword(&mut self, place: Place, word: PageWord) {
        let page = self
            .mms
            .get_mut(&place.slot)
            .and_then(|mm| mm.pages.get_mut(place.addr));
        if let Some(page) = page {
            *page = word;
        }
    }

    /// Forgets the page at `place`.
    fn forget(&mut self, place: Place) {
        let word = self
            .mms
            .get_mut(&place.slot)
            .and_then(|mm| mm.pages.remove(place.addr));
        if let Some(word) = word {
            self.pages = self.pages.saturating_sub(1);
            self.let_go(place, word);
        }
    }

    /// Forgets all pages in `from..to` of an address space.
    fn forget_range(&mut self, slot: SlotId, from: usize, to: usize) {
        loop {
            let next = self.mms.get(&slot).and_then(|mm| mm.pages.next(from, to));
            let Some(addr) = next else {
                break;
            };
            self.forget(Place { slot, addr });
            crate::mm::cond_resched();
        }
    }

    /// Forgets an address space.
    fn forget_mm(&mut self, slot: SlotId) {
        self.forget_range(slot, 0, usize::MAX);
        if let Some(mm) = self.mms.remove(&slot) {
            crate::mm::report_metadata(&mm.mm, 0);
        }
    }

    /// Takes a page out of whichever tree `word` says it is in.
    fn let_go(&mut self, place: Place, mut word: PageWord) {
        if let PageState::Unstable(sum) = word.state() {
            self.index.stop_waiting(sum, place);
        }
        if let Some(item) = word.take_item() {
            self.detach(item);
        }
    }

    /// Takes an item off its node, and frees both where possible.
    fn detach(&mut self, mut item: ItemBox) {
        match item.detach() {
            Detached::Idle => {}
            Detached::Stale(key) => self.release(key),
            Detached::Done(key, left) => {
                self.items = self.items.saturating_sub(1);
                if left == 0 {
                    self.index.to_limbo(key);
                }
            }
        }
    }

    /// Frees a stale node. Pages that were on it find out when they are looked at.
    fn release(&mut self, key: StableKey) {
        let Some(node) = self.index.remove(key) else {
            return;
        };
        let items = node.items();
        match node.release() {
            Ok(()) => self.items = self.items.saturating_sub(items),
            // Not stale after all. Without memory to index it, it is lost but harmless: dropping
            // it says so in the log.
            Err(node) => drop(self.index.insert(key, node, GFP_KERNEL)),
        }
        self.unpin_if_empty();
    }

    /// Frees nodes without known mappings whose pages are gone: all of them, or some each time. With
    /// `force`, also those whose pages are only left in the swap cache.
    fn sweep_limbo(&mut self, most: usize, force: bool) {
        let mut next = self.index.next_limbo(self.swept);
        for _ in 0..most {
            let Some(key) = next else {
                break;
            };
            self.swept = Some(key);
            next = self.index.next_limbo(self.swept);
            self.settle(key, force);
            crate::mm::cond_resched();
        }
        if next.is_none() {
            self.swept = None;
        }
    }

    /// Frees a node without known mappings if its page is gone.
    fn settle(&mut self, key: StableKey, force: bool) {
        let Some(node) = self.index.node(key) else {
            return;
        };
        let gone = match node.page() {
            None => true,
            Some(page) if page.is_mapped() => false,
            Some(page) if page.is_swapcache() && !force => false,
            Some(page) => {
                drop(page);
                node.abandon_unmapped()
            }
        };
        if gone {
            self.release(key);
        }
    }

    fn unpin_if_empty(&mut self) {
        if self.index.has_no_nodes() {
            self.pin.unpin();
        }
    }
}

impl Drop for State {
    fn drop(&mut self) {
        // Nothing is merged any more, or the module could not be unloaded; so this frees words and
        // waiting places only. In the case of a forced unload it at least frees what it can.
        while let Some(slot) = self.mms.cursor_front().map(|first| *first.current().0) {
            self.forget_mm(slot);
        }
        self.swept = None;
        self.sweep_limbo(usize::MAX, true);
    }
}
