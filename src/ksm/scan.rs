// SPDX-License-Identifier: GPL-2.0

//! The scan: one pass after the other over all mergeable pages, some pages at a time.

use super::{
    candidate::{Candidate, CandidateKind, Outcome, ScanBuffer},
    cursor::Position,
    deferred::Deferred,
    index::{MmId, PageAddr},
    metadata::gfp_mapping,
    page::Forget,
    page_map::{Found, PageMap, Pass},
    run, Core, Engine, MmState, State, GFP_SCAN,
};
use crate::{
    hash::Sample,
    mm::{
        entry::{PageEntry, PageState},
        lru, memcg,
        mmap_lock::{MmapLock, NotLocked},
        trace,
        vma::{MergeableVma, Next, Which, HOLD_VMAS},
        walk::{self, Seen, BATCH_PAGES},
    },
    sys::kthread::KthreadContext,
};
use kernel::{
    mm::Mm,
    page::PAGE_SIZE,
    prelude::*,
    rbtree::RBTree,
    sync::atomic::Relaxed,
    time::{Delta, Instant, Monotonic},
};

/// How far the current pass has come.
pub(super) struct Cursor {
    /// Where it is.
    pub(super) at: Position,
    /// To which address spaces it comes back, because they were locked.
    deferred: Deferred<(MmId, usize)>,
    /// Whether it does so now.
    coming_back: bool,
    /// Whether anything happened since the pass before this one began that a page which was steady
    /// and has not changed since may profit from (see [`Core::bump_retry_seq`]).
    retry_steady: bool,
    /// [`Core::retry_seq`] when this pass began.
    retry_seq: u64,
    /// Whether this pass skips leaves that are not worth looking at.
    skipping: bool,
    /// Whether all pages were looked at, and those that have an equal are merged now, at first sight.
    gathering: bool,
    /// Whether all is done but to try again what per-CPU LRU batches may have held.
    retrying: bool,
    /// When the pass began; `None` between passes.
    began: Option<Instant<Monotonic>>,
    /// How many pages it has looked at or skipped.
    pages: usize,
}

impl Cursor {
    pub(super) fn new() -> Self {
        Self {
            at: Position::new(),
            deferred: Deferred::new(),
            coming_back: false,
            retry_steady: true,
            retry_seq: 0,
            skipping: false,
            gathering: false,
            retrying: false,
            began: None,
            pages: 0,
        }
    }
}

/// What one step of a scan came to.
enum Step {
    /// So many pages were looked at.
    Looked(usize),
    /// All address spaces that are left are locked by others.
    Locked,
    /// Per-CPU LRU batches are in the way.
    Batched,
    /// The pass is complete, and had so many pages.
    PassDone(usize),
}

/// How long to wait, in milliseconds, when all address spaces that are left of a pass are locked by others.
const LOCKED_MS: u32 = 20;

/// How many pages are merged under one hold of `mmap_lock`.
const JOIN_PAGES: usize = 16;

/// Tells merged pages that are there to stay from those that are gone, where the walk did not come by them.
struct GapCheck<'a> {
    mm: &'a Mm,
    /// Taken when there is something to look at.
    lock: Option<Result<MmapLock<'a>, NotLocked>>,
    /// A page is still merged, in a VMA that is not mergeable.
    found_stray: bool,
}

impl<'a> GapCheck<'a> {
    fn new(mm: &'a Mm) -> Self {
        Self {
            mm,
            lock: None,
            found_stray: false,
        }
    }

    /// Whether the page at `addr`, of which `entry` is remembered, is still merged, or may be.
    fn keeps(&mut self, addr: usize, entry: &PageEntry) -> bool {
        let PageState::Merged(Some(node)) = entry.state() else {
            return false;
        };
        let mm = self.mm;
        let lock = match self.lock.get_or_insert_with(|| MmapLock::try_new(mm)) {
            Ok(lock) => lock,
            Err(NotLocked::Contended) => return true,
            Err(NotLocked::Exiting) => return false,
        };
        let Some(vma) = MergeableVma::find(lock, addr, Which::MayBeMerged) else {
            return false;
        };
        let keeps = vma.maps(addr, node);
        self.found_stray |= keeps && !vma.is_mergeable();
        keeps
    }
}

impl Engine {
    /// Scans `pages_to_scan` pages, or to the end of the pass. If that was reached, returns how many pages the pass
    /// had.
    pub(super) fn scan(&self, current: &KthreadContext) -> Option<usize> {
        let mut budget = self.pages_to_scan.load(Relaxed) as usize;
        let mut mapped = None;
        while budget > 0 && !current.should_stop() && !current.is_freezing() {
            current.cond_resched();
            let mut state = self.state.lock();
            // Whoever writes to `run`, or takes memory offline, holds the lock too.
            if self.run() != run::MERGE || self.is_offlining() {
                break;
            }
            // What takes longer is done without the lock.
            if state.cursor.at.is_between_passes() && mapped.is_none() {
                drop(state);
                mapped = Some(self.mapped_pages());
                continue;
            }
            state.mapped_pages = mapped.unwrap_or(state.mapped_pages);
            if let Some(rooms) = state.wanted_filter(BATCH_PAGES) {
                drop(state);
                self.rebuild_filter(rooms);
                state = self.state.lock();
                if self.run() != run::MERGE || self.is_offlining() {
                    break;
                }
            }
            let step = self.step(&mut state, budget, current);
            self.update_stats(&state);
            let undo = !state.to_break.is_empty();
            drop(state);
            if undo {
                self.break_cow_pending();
            }
            match step {
                Step::Looked(pages) => {
                    self.stats.add_scanned(pages);
                    // To find nothing costs time, too: nobody is to keep us from sleeping with memory
                    // that is not there.
                    budget = budget.saturating_sub(pages.max(1));
                }
                Step::Locked => current.sleep(Some(LOCKED_MS), || {
                    self.run() != run::MERGE || self.has_deferred() || self.is_offlining()
                }),
                Step::Batched => lru::drain(),
                Step::PassDone(pages) => return Some(pages),
            }
        }
        None
    }

    /// Looks at the next few pages, `budget` at most, and merges what it can.
    fn step(&self, state: &mut State, budget: usize, current: &KthreadContext) -> Step {
        let hasher = self.hasher(&state.core);
        state.use_zero_page(hasher, self.use_zero_pages.load(Relaxed) != 0);
        if state.cursor.at.is_between_passes() {
            if state.core.per_nid && !state.core.rekey_migrated_nodes(hasher) {
                return Step::Looked(0);
            }
            self.start_pass(state, current);
        }
        let turn = state
            .cursor
            .at
            .turn(|after| self.registry.lock().next(after));
        let Some((mm_id, mm)) = turn else {
            if let Some((mm_id, addr)) = state.cursor.deferred.pop() {
                state.cursor.at.come_back_to(mm_id, addr);
                state.cursor.coming_back = true;
                return Step::Looked(0);
            }
            return self.end_pass(state, current);
        };
        state.core.starved.set(false);
        let looked = if state.cursor.gathering {
            memcg::charge(&mm, || self.gather_mm(state, mm_id, &mm))
        } else {
            match MmapLock::try_new(&mm) {
                Ok(lock) => {
                    state.cursor.deferred.note_locked();
                    memcg::charge(&mm, || self.step_mm(state, mm_id, lock, budget))
                }
                // Its pages are worth waiting for, but not now and not with `state` locked.
                Err(NotLocked::Contended) => return state.cursor.defer(),
                // It will be reported dead any moment.
                Err(NotLocked::Exiting) => None,
            }
        };
        match looked {
            Some(pages) => Step::Looked(pages),
            None => {
                state.report(mm_id);
                state.cursor.at.leave();
                Step::Looked(0)
            }
        }
    }

    fn start_pass(&self, state: &mut State, current: &KthreadContext) {
        let last = self.registry.lock().last_id();
        let core = &mut state.core;
        core.has_strays = core::mem::take(&mut core.found_strays);
        let before = state.cursor.retry_seq;
        let mut at = Position::new();
        at.begin(last);
        state.batched.clear();
        state.cursor = Cursor {
            at,
            retry_steady: state.core.retry_seq != before,
            retry_seq: state.core.retry_seq,
            skipping: self.smart_scan.load(Relaxed) != 0,
            began: Some(Instant::now()),
            ..Cursor::new()
        };
        self.advisor.lock().start_pass(current.cpu_nanos());
        state.core.pass = state.core.pass.wrapping_add(1);
        let secs = state.core.born.elapsed().as_millis() / 1000;
        state.core.clock.begin_pass(secs as u32);
        state.core.unlisted.begin_pass();
        trace::start_scan(self.stats.full_scans.load(Relaxed), state.core.pages);
    }

    /// How many anonymous pages all registered processes have.
    fn mapped_pages(&self) -> usize {
        let mut sum = 0usize;
        let mut mm_id = 0;
        loop {
            let next = self.registry.lock().next(mm_id);
            let Some((id, mm)) = next else {
                return sum;
            };
            mm_id = id;
            sum = sum.saturating_add(crate::mm::anon_pages(&mm));
            crate::mm::cond_resched();
        }
    }

    fn end_pass(&self, state: &mut State, current: &KthreadContext) -> Step {
        if self.merge_eagerly.load(Relaxed) != 0 && !state.cursor.gathering {
            state.cursor.at.rewind();
            state.cursor.coming_back = false;
            state.cursor.gathering = true;
            return Step::Looked(0);
        }
        if !state.batched.is_empty() {
            if !core::mem::replace(&mut state.cursor.retrying, true) {
                return Step::Batched;
            }
            self.retry_batched(state);
            return Step::Looked(0);
        }
        if let Some(began) = state.cursor.began {
            self.advise(began.elapsed(), current);
        }
        let pages = state.cursor.pages;
        state.cursor = Cursor {
            retry_seq: state.cursor.retry_seq,
            ..Cursor::new()
        };
        trace::stop_scan(self.stats.full_scans.load(Relaxed), state.core.pages);
        self.stats.add_full_scan();
        Step::PassDone(pages)
    }

    /// Tries once more to merge some of the pages that per-CPU LRU batches may have held, of one address space.
    fn retry_batched(&self, state: &mut State) {
        let State {
            mms,
            core,
            batched,
            scratch,
            cursor,
            ..
        } = state;
        let (Some(&PageAddr { mm_id, .. }), Some(mut taken)) = (batched.last(), scratch.take())
        else {
            batched.clear();
            return;
        };
        taken.len = 0;
        let mut known = mms.get_mut(&mm_id);
        for _ in 0..JOIN_PAGES {
            let Some(place) = batched.pop() else {
                break;
            };
            if place.mm_id != mm_id {
                let _ = batched.push_within_capacity(place);
                break;
            }
            let entry = known
                .as_mut()
                .and_then(|known| known.pages.get_mut(place.addr));
            let (Some(entry), false) = (entry, taken.has(place.addr)) else {
                continue;
            };
            let gathering = cursor.gathering && entry.strikes().is_none();
            let kind = match entry.state() {
                PageState::Steady(sample) => core.candidate_on(entry.probation(), sample),
                PageState::Seen(sample) if gathering => core.candidate(sample),
                _ => None,
            };
            if let Some(kind) = kind {
                taken.push(Candidate {
                    addr: place.addr,
                    kind,
                });
            }
        }
        if let Some(mm) = known.map(|known| known.mm.clone()) {
            core.starved.set(false);
            memcg::charge(&mm, || self.merge_candidates(state, mm_id, &mm, &mut taken));
        }
        state.scratch = Some(taken);
    }

    /// Has the advisor decide how many pages to look at before sleeping, after a pass that took so long.
    fn advise(&self, took: Delta, current: &KthreadContext) {
        let mut advisor = self.advisor.lock();
        let millis = u64::try_from(took.as_millis()).unwrap_or(0);
        let pages = self.pages_to_scan.load(Relaxed);
        if let Some(advice) = advisor.end_pass(millis, current.cpu_nanos(), pages) {
            self.pages_to_scan.store(advice.pages, Relaxed);
            drop(advisor);
            trace::advisor(advice.secs, advice.pages, advice.cpu_percent);
        }
    }

    /// Looks at the next few pages of one address space. `None`: there are no more.
    fn step_mm(
        &self,
        state: &mut State,
        mm_id: MmId,
        lock: MmapLock<'_>,
        budget: usize,
    ) -> Option<usize> {
        let mm = lock.mm();
        let mut scratch = state.scratch.take()?;
        let more = self.scan_batch(state, mm_id, lock, budget, &mut scratch);
        self.merge_candidates(state, mm_id, mm, &mut scratch);
        let looked = scratch.batch.pages().len();
        state.scratch = Some(scratch);
        more.then_some(looked)
    }

    /// Merges what is remembered of the next few pages of one address space, at first sight. `None`: there
    /// are no more.
    fn gather_mm(&self, state: &mut State, mm_id: MmId, mm: &Mm) -> Option<usize> {
        let mut scratch = state.scratch.take()?;
        scratch.len = 0;
        let State { mms, core, .. } = state;
        let end = mms.get_mut(&mm_id).and_then(|known| {
            known
                .pages
                .visit_leaf(state.cursor.at.addr(), |addr, entry| {
                    let sample = match entry.state() {
                        PageState::Seen(sample) if entry.strikes().is_none() => sample,
                        _ => return,
                    };
                    if let Some(kind) = core.candidate(sample) {
                        scratch.push(Candidate { addr, kind });
                    }
                })
        });
        self.merge_candidates(state, mm_id, mm, &mut scratch);
        let count = scratch.len;
        state.scratch = Some(scratch);
        let next = end.and_then(|end| end.checked_add(1))?;
        state.cursor.at.move_to(next);
        Some(count)
    }

    /// Merges the candidates of one address space, as far as that is possible now.
    fn merge_candidates(&self, state: &mut State, mm_id: MmId, mm: &Mm, scratch: &mut ScanBuffer) {
        let hasher = self.hasher(&state.core);
        let count = scratch.len;
        let candidates = scratch.candidates.get_mut(..count).unwrap_or(&mut []);
        for few in candidates.chunks_mut(JOIN_PAGES) {
            state.join_all(hasher, mm, mm_id, few);
            // The rest takes the mmap_lock of two address spaces, one after the other.
            for candidate in few.iter().flatten() {
                let is_starved = state.core.starved.get();
                let place = PageAddr {
                    mm_id,
                    addr: candidate.addr,
                };
                match candidate.kind {
                    CandidateKind::Steady(_, Outcome::NoMatch(..)) if is_starved => {
                        state.retry(place)
                    }
                    CandidateKind::Steady(_, Outcome::NoMatch(sum)) => {
                        state.merge_or_wait(hasher, mm, place, sum)
                    }
                    CandidateKind::Steady(..) => {}
                    CandidateKind::Unlisted(node) => state.stable_tree_append(mm, place, node),
                    CandidateKind::Zero => state.merge_zero(mm, place),
                    CandidateKind::Ownerless => state.break_cow_later(place, None),
                }
                if lru::was_in_the_way() {
                    state.note_batched(place);
                }
            }
        }
    }

    /// Looks at the next few pages of one address space, and puts those that are worth trying to merge
    /// into `scratch`. Returns whether there were any left to look at.
    fn scan_batch(
        &self,
        state: &mut State,
        mm_id: MmId,
        lock: MmapLock<'_>,
        budget: usize,
        scratch: &mut ScanBuffer,
    ) -> bool {
        scratch.len = 0;
        scratch.batch.clear();
        let hasher = self.hasher(&state.core);
        let mm = lock.mm();
        let which = match state.core.has_strays {
            true => Which::MayBeMerged,
            false => Which::Mergeable,
        };
        let from = state.cursor.at.addr();
        let mut next = from;
        let mut vmas = HOLD_VMAS;
        // What is skipped from here on, if anything is: up to its last address.
        let mut skipped = None;
        let mut newly_skipped = 0;
        while !scratch.batch.is_full(budget) {
            let vma = match MergeableVma::next(&lock, next, which, &mut vmas) {
                Next::Vma(vma) => vma,
                Next::GoOn(addr) => {
                    next = addr;
                    break;
                }
                Next::None => break,
            };
            let start = next.max(vma.start());
            let limit = match state.next_skipped(mm_id, start, &mut newly_skipped) {
                Ok((first, last)) if first <= start => {
                    // What is before it is done with first; then go on behind it.
                    if next == from {
                        skipped = Some((start.min(first.max(from)), last));
                    }
                    break;
                }
                Ok((first, _)) => first,
                Err(before) => before,
            };
            let batch = &mut scratch.batch;
            let before = batch.pages().len();
            next = walk::fill(&vma, start, limit, budget, hasher, batch);
            state.core.found_strays |= !vma.is_mergeable() && batch.pages().len() != before;
        }
        // What was seen is compared later anyway.
        drop(lock);
        self.stats.add_skipped(newly_skipped);
        let looked = scratch.batch.pages().len();
        state.cursor.pages = state
            .cursor
            .pages
            .saturating_add(newly_skipped)
            .saturating_add(looked);
        let mut left = Forget::new();
        if next != from {
            next = state.update_tracked(mm, mm_id, from, next, &mut left, scratch);
            state.cursor.at.move_to(next);
            return true;
        }
        let (gap_end, last) = skipped.unwrap_or((usize::MAX, usize::MAX));
        if let Some(addr) = state.forget_gap(mm, mm_id, from, gap_end, &mut left) {
            // That is enough for once.
            state.cursor.at.move_to(addr);
            return true;
        }
        state.cursor.at.move_to(last.saturating_add(1));
        last != usize::MAX
    }
}

impl Cursor {
    /// Leaves the address space whose turn it is, which is locked by another task, to come back later.
    fn defer(&mut self) -> Step {
        let (mm_id, addr) = self.at.here();
        self.at.leave();
        if !self.coming_back {
            self.deferred.push((mm_id, addr));
        } else if self.deferred.put_back((mm_id, addr)) {
            return Step::Locked;
        }
        Step::Looked(0)
    }
}

impl MmState {
    /// Notes with the area around `addr` whether anything happened to its pages since there were so many
    /// `changes`, and how many of these were written to soon after they were merged.
    fn note(&mut self, addr: usize, changes: u64, core: &mut Core) {
        if core.changes != changes {
            self.pages.note_change(addr);
        }
        let broken = core::mem::take(&mut core.quick_cow_breaks);
        if broken != 0 {
            self.pages.note_thrash(addr, broken);
        }
    }
}

impl State {
    /// Notes that a page was left alone because a per-CPU LRU batch may hold it. Those that are too many, and
    /// those that still cannot be merged at the end of the pass, wait for the next one.
    pub(super) fn note_batched(&mut self, place: PageAddr) {
        if !self.cursor.retrying {
            let _ = self.batched.push_within_capacity(place);
        }
    }

    /// The next leaves of an address space that this pass skips, see [`PageMap::next_skipped`].
    fn next_skipped(
        &mut self,
        mm_id: MmId,
        from: usize,
        skipped: &mut usize,
    ) -> Result<(usize, usize), usize> {
        let pass = Pass {
            number: self.core.pass,
            retry_steady: self.cursor.retry_steady,
            unlisted: &self.core.unlisted,
        };
        match self.mms.get_mut(&mm_id) {
            Some(known) if self.cursor.skipping => known.pages.next_skipped(from, &pass, skipped),
            _ => Err(usize::MAX),
        }
    }

    /// Forgets what is remembered of `from..to`, where no page to be looked at is left. Goes through as
    /// many leaves as `budget` says. Returns where to go on, if there are more.
    fn forget_gap(
        &mut self,
        mm: &Mm,
        mm_id: MmId,
        from: usize,
        to: usize,
        budget: &mut Forget,
    ) -> Option<usize> {
        let mut check = GapCheck::new(mm);
        let more = self.forget_range(mm_id, from, to, budget, |addr, entry| {
            check.keeps(addr, entry)
        });
        self.core.found_strays |= check.found_stray;
        more
    }

    /// Compares the pages of a batch, which covers `from..to`, with what is remembered of them. What is
    /// remembered of addresses without a page is outdated and goes, as much of it as `budget` says. Returns
    /// how far this came.
    fn update_tracked(
        &mut self,
        mm: &Mm,
        mm_id: MmId,
        from: usize,
        to: usize,
        budget: &mut Forget,
        scratch: &mut ScanBuffer,
    ) -> usize {
        let mut covered = from;
        let mut done = 0;
        while let Some(first) = scratch.batch.pages().get(done) {
            let addr = first.addr();
            let leaf_end = PageMap::<PageEntry>::leaf_end(addr);
            // Up to the first page, then from there on together with the pages of its leaf.
            if covered < addr {
                if let Some(left) = self.forget_gap(mm, mm_id, covered, addr, budget) {
                    return left;
                }
            }
            let left = scratch.batch.pages().get(done..).unwrap_or(&[]);
            let count = left.partition_point(|page| page.addr() <= leaf_end).max(1);
            self.update_leaf(mm, mm_id, done, count, scratch);
            done = done.saturating_add(count);
            covered = match scratch.batch.pages().get(done.wrapping_sub(1)) {
                Some(last) => last.addr().saturating_add(PAGE_SIZE),
                None => to,
            };
        }
        if covered < to {
            if let Some(left) = self.forget_gap(mm, mm_id, covered, to, budget) {
                return left;
            }
        }
        if let Some(known) = self.mms.get_mut(&mm_id) {
            for &addr in scratch.batch.away() {
                known.pages.note_away(addr);
            }
        }
        to
    }

    /// Does so for `count` pages from number `first` on, which are all in one leaf.
    fn update_leaf(
        &mut self,
        mm: &Mm,
        mm_id: MmId,
        first: usize,
        count: usize,
        scratch: &mut ScanBuffer,
    ) {
        let Some(addr) = scratch.batch.pages().get(first).map(|page| page.addr()) else {
            return;
        };
        // Without memory to remember a page, the next pass tries again.
        let Some(known) = known_mm(&mut self.mms, mm, mm_id) else {
            return;
        };
        let core = &mut self.core;
        let changes = core.changes;
        if core.starved.get() && !known.pages.has_leaf(addr) {
            return scratch.push_unlisted(first, count);
        }
        if let Ok(mut leaf) = known.pages.leaf_from(addr, core.pass, gfp_mapping()) {
            core.refreshing = leaf.is_refreshing();
            if self.cursor.skipping {
                leaf.decide_skips(PageEntry::any_is_watched);
            }
            let waited = leaf.end_wait(|| seconds_since(core.born));
            let retry_steady =
                self.cursor.retry_steady || leaf.missed_retry() || core.refreshing || waited;
            let end = first.saturating_add(count);
            // Without holes among the pages, most often all are known, or all are new.
            let dense = scratch
                .batch
                .pages()
                .get(end.wrapping_sub(1))
                .is_some_and(|last| last.addr().wrapping_sub(addr) / PAGE_SIZE + 1 == count);
            if dense {
                if let Some(entries) = leaf.known_run(count) {
                    core.classify_range(mm_id, entries, first, scratch, retry_steady);
                    return known.note(addr, changes, core);
                }
                let pages = scratch.batch.pages().get(first..end).unwrap_or(&[]);
                if leaf.is_empty_from_here() && pages.iter().all(|page| page.sample().is_some()) {
                    let filled = leaf.fill_run(count, gfp_mapping(), |nth| {
                        let sample = pages.get(nth).and_then(|page| page.sample());
                        let sample = sample.unwrap_or(Sample::from_raw(0));
                        core.count(sample);
                        PageEntry::seen(sample)
                    });
                    if filled {
                        core.pages = core.pages.saturating_add(count);
                        core.changes = core.changes.wrapping_add(1);
                        return known.note(addr, changes, core);
                    }
                }
            }
            let new = count.saturating_sub(leaf.len());
            let mut check = GapCheck::new(mm);
            for nth in first..end {
                let Some(&page) = scratch.batch.pages().get(nth) else {
                    break;
                };
                let addr = page.addr();
                let found = loop {
                    match leaf.seek(addr) {
                        Found::Passed(addr, entry) => {
                            let place = PageAddr { mm_id, addr };
                            if check.keeps(addr, entry) || !core.untrack_page(place, entry) {
                                leaf.keep_passed();
                            } else {
                                drop(leaf.remove_passed());
                            }
                        }
                        other => break other,
                    }
                };
                let kind = match (found, page.seen()) {
                    (Found::Entry(entry), seen) => {
                        core.classify_page(PageAddr { mm_id, addr }, entry, seen, retry_steady)
                    }
                    (_, Seen::Anon(_)) if core.starved.get() => None,
                    (_, Seen::Anon(sample)) => {
                        let entry = PageEntry::seen(sample);
                        match leaf.insert(entry, new, gfp_mapping()) {
                            Ok(()) => core.track_page(sample),
                            Err(_) => core.starved.set(true),
                        }
                        None
                    }
                    (_, Seen::Ksm(Some(node))) => Some(CandidateKind::Unlisted(node)),
                    (_, Seen::Ksm(None)) => Some(CandidateKind::Ownerless),
                };
                if let Some(kind) = kind {
                    scratch.push(Candidate { addr, kind });
                }
            }
            core.found_strays |= check.found_stray;
        } else {
            core.starved.set(true);
            scratch.push_unlisted(first, count);
        }
        known.pages.prune(addr, Some(core.clock.secs()));
        known.note(addr, changes, core);
    }
}

/// What is known of the pages of `mm`; nothing yet, if it is new.
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

/// How many seconds are over since `began`.
pub(super) fn seconds_since(began: Instant<Monotonic>) -> u64 {
    u64::try_from(began.elapsed().as_millis() / 1000).unwrap_or(0)
}
