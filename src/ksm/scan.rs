// SPDX-License-Identifier: GPL-2.0

//! The scan: passes over all mergeable memory, one batch of pages at a time.
//!
//! A step locks `state`, takes samples of up to [`BATCH_PAGES`] pages of one address space, compares them with
//! their entries, and merges the candidates among them. `mmap_lock` is only tried. A pass comes back at its end
//! to address spaces whose lock was contended.

use super::{
    candidate::{Candidate, CandidateKind, Outcome},
    cursor::{Cursor, Position},
    entry::{PageEntry, PageState},
    forget::Forget,
    merge::MERGE_PAGES,
    metadata::gfp_mapping,
    mms::{MmId, PageAddr, Registered},
    page::LeafPass,
    page_map::{Found, PageMap, Pass},
    run,
    scan_buffer::ScanBuffer,
    state::{known_mm, seconds_since, Core, MmState, State},
    Engine,
};
use crate::{
    hash::Sample,
    mm::{
        lru, memcg,
        mmap_lock::{MmapLock, NotLocked},
        seen::Seen,
        trace,
        vma::{MergeableVma, Next, Which, HOLD_VMAS},
        walk::{self, BATCH_PAGES},
    },
    sys::kthread::KthreadContext,
};
use kernel::{
    mm::Mm,
    page::PAGE_SIZE,
    prelude::*,
    sync::atomic::Relaxed,
    time::{Delta, Instant},
};

/// The result of one step of a scan.
enum Step {
    /// This many pages were scanned.
    Looked(usize),
    /// All address spaces that are left were found locked.
    Locked,
    /// Per-CPU LRU batches may hold pages. Drain them.
    Batched,
    /// The pass is complete, and had this many pages.
    PassDone(usize),
}

/// How long to wait when all address spaces that are left of a pass are locked, in milliseconds.
const LOCKED_MS: u32 = 20;

/// How often a pass walks all VMAs that may have merged pages, if nothing demands it.
///
/// What leads to merged pages in VMAs that are not mergeable can be lost: by a lock that was contended, or while
/// a page was swapped out. Then they are found by the next such pass.
const STRAYS_PASSES: u32 = 16;

/// Decides whether a page that the walk did not visit keeps its entry, and with it its rmap item.
///
/// `MADV_UNMERGEABLE` leaves pages behind that it cannot unshare, and a fork inherits them. They stay mapped in
/// VMAs that are not mergeable, so they stay listed. A page that became a merged page through another process
/// may not be listed yet when that happens. Then the next pass finds it.
struct GapCheck<'a> {
    mm: &'a Mm,
    /// The `mmap_lock`, tried when the first page is to be checked.
    lock: Option<Result<MmapLock<'a>, NotLocked>>,
    /// Whether a page was found to be still merged, in a VMA that is not mergeable.
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

    /// Whether the page at `addr` with this entry is still merged, or may be.
    fn keeps(&mut self, core: &Core, addr: usize, entry: &PageEntry) -> bool {
        let node = match entry.state() {
            PageState::Merged(Some(node)) => Some(node),
            _ if core.unlisted.may_have(PageMap::<PageEntry>::number(addr)) => None,
            _ => return false,
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
        let here = vma.node_at(addr);
        self.found_stray |= here.is_some() && !vma.is_mergeable();
        here.is_some() && here == node
    }
}

impl Engine {
    /// Scans `pages_to_scan` pages, or up to the end of the pass. At the end, returns how many pages the pass
    /// had.
    ///
    /// The caller holds no lock. Takes `state` for one step at a time, and may sleep.
    ///
    /// [`Self::step`] is compiled into this function, and this one stands alone. Otherwise registers are spilled
    /// for each page: three in a hundred instructions of a first pass.
    #[inline(never)]
    pub(super) fn scan(&self, current: &KthreadContext, buffer: &mut ScanBuffer) -> Option<usize> {
        let mut budget = self.settings.pages_to_scan.load(Relaxed) as usize;
        let mut mapped = None;
        while budget > 0 && !current.should_stop() && !current.is_freezing() {
            current.cond_resched();
            let mut state = self.state.lock();
            // `run` is written, and `offlining` set, with `state` locked. So check them under the lock.
            if self.run() != run::MERGE || self.is_offlining() {
                break;
            }
            // Slow operations run without the lock.
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
            let step = self.step(&mut state, buffer, budget, current);
            self.update_stats(&state);
            let has_pending = !state.to_break.is_empty();
            drop(state);
            if has_pending {
                self.break_cow_pending();
            }
            match step {
                Step::Looked(pages) => {
                    self.stats.add_scanned(pages);
                    // A step without pages takes time, too. Charge it, so that sparse address spaces do not
                    // keep the thread from sleeping.
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

    /// Scans the next batch, `budget` pages at most, and merges what it can. `state` is locked.
    #[inline(always)]
    fn step(
        &self,
        state: &mut State,
        buffer: &mut ScanBuffer,
        budget: usize,
        current: &KthreadContext,
    ) -> Step {
        let hasher = self.hasher();
        if state.cursor.at.is_between_passes() {
            if state.core.settings.per_nid() && !state.core.rekey_migrated_nodes(hasher) {
                return Step::Looked(0);
            }
            self.start_pass(state, current);
        }
        let current_mm = state
            .cursor
            .at
            .current_mm(|after| self.registry.lock().next(after));
        let Some((mm_id, Registered { mm, is_new })) = current_mm else {
            if let Some((mm_id, addr)) = state.cursor.deferred.pop() {
                state.cursor.at.come_back_to(mm_id, addr);
                state.cursor.coming_back = true;
                return Step::Looked(0);
            }
            return self.end_pass(state, buffer, current);
        };
        state.core.starved.set(false);
        let looked = if state.cursor.gathering {
            memcg::charge(&mm, || self.gather_mm(state, mm_id, &mm, buffer))
        } else {
            match MmapLock::try_new(&mm) {
                Ok(lock) => {
                    state.cursor.deferred.note_locked();
                    let which = match state.core.has_strays || is_new {
                        true => Which::MayBeMerged,
                        false => Which::Mergeable,
                    };
                    let scan = || self.step_mm(state, mm_id, lock, which, budget, buffer);
                    let looked = memcg::charge(&mm, scan);
                    if looked.is_none() && is_new {
                        self.registry.lock().note_walked(mm_id);
                    }
                    looked
                }
                // Come back to its pages later in the pass, but do not wait with `state` locked.
                Err(NotLocked::Contended) => return state.cursor.defer(),
                // `ksm_exit()` is about to report it.
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

    /// Begins a pass over the address spaces that are registered now.
    fn start_pass(&self, state: &mut State, current: &KthreadContext) {
        let last = self.registry.lock().last_id();
        let core = &mut state.core;
        core.has_strays = core::mem::take(&mut core.found_strays) || core.pass % STRAYS_PASSES == 0;
        let before = state.cursor.retry_seq;
        let mut at = Position::new();
        at.begin(last);
        state.batched.clear();
        state.cursor = Cursor {
            at,
            retry_steady: state.core.retry_seq != before,
            retry_seq: state.core.retry_seq,
            skipping: self.settings.smart_scan.load(Relaxed) != 0,
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

    /// Returns how many anonymous pages all registered processes have. Takes `registry` for a moment at a time.
    fn mapped_pages(&self) -> usize {
        let mut sum = 0usize;
        let mut mm_id = 0;
        loop {
            let next = self.registry.lock().next(mm_id);
            let Some((id, registered)) = next else {
                return sum;
            };
            mm_id = id;
            sum = sum.saturating_add(crate::mm::anon_pages(&registered.mm));
            crate::mm::cond_resched();
        }
    }

    /// Ends the walk of a pass: first comes the eager phase, then the retry of pages in LRU batches, then the
    /// pass is complete.
    fn end_pass(
        &self,
        state: &mut State,
        buffer: &mut ScanBuffer,
        current: &KthreadContext,
    ) -> Step {
        if self.settings.merge_eagerly.load(Relaxed) != 0 && !state.cursor.gathering {
            state.cursor.at.rewind();
            state.cursor.coming_back = false;
            state.cursor.gathering = true;
            return Step::Looked(0);
        }
        if !state.batched.is_empty() {
            if !core::mem::replace(&mut state.cursor.retrying, true) {
                return Step::Batched;
            }
            self.retry_batched(state, buffer);
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

    /// Retries up to [`MERGE_PAGES`] pages of one address space that a per-CPU LRU batch may have held.
    fn retry_batched(&self, state: &mut State, buffer: &mut ScanBuffer) {
        let State {
            mms,
            core,
            batched,
            cursor,
            ..
        } = state;
        let Some(&PageAddr { mm_id, .. }) = batched.last() else {
            return;
        };
        buffer.candidates.clear();
        let mut known = mms.get_mut(&mm_id);
        for _ in 0..MERGE_PAGES {
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
            let (Some(entry), false) = (entry, buffer.candidates.has(place.addr)) else {
                continue;
            };
            let gathering = cursor.gathering && entry.strikes().is_none();
            let kind = match entry.state() {
                PageState::Steady(sample) => core.candidate_on(entry.probation(), sample),
                PageState::Seen(sample) if gathering => core.candidate(sample),
                _ => None,
            };
            if let Some(kind) = kind {
                buffer.candidates.push(Candidate {
                    addr: place.addr,
                    kind,
                });
            }
        }
        if let Some(mm) = known.map(|known| known.mm.clone()) {
            core.starved.set(false);
            memcg::charge(&mm, || self.merge_candidates(state, mm_id, &mm, buffer));
        }
    }

    /// Has the advisor set `pages_to_scan`, after a pass that took `took`.
    fn advise(&self, took: Delta, current: &KthreadContext) {
        let mut advisor = self.advisor.lock();
        let millis = u64::try_from(took.as_millis()).unwrap_or(0);
        let pages = self.settings.pages_to_scan.load(Relaxed);
        if let Some(advice) = advisor.end_pass(millis, current.cpu_nanos(), pages) {
            self.settings.pages_to_scan.store(advice.pages, Relaxed);
            drop(advisor);
            trace::advisor(advice.secs, advice.pages, advice.cpu_percent);
        }
    }

    /// Scans and merges the next batch of one address space. `None`: there are no more pages.
    fn step_mm(
        &self,
        state: &mut State,
        mm_id: MmId,
        lock: MmapLock<'_>,
        which: Which,
        budget: usize,
        buffer: &mut ScanBuffer,
    ) -> Option<usize> {
        let mm = lock.mm();
        let has_more = self.scan_batch(state, mm_id, lock, which, budget, buffer);
        self.merge_candidates(state, mm_id, mm, buffer);
        let looked = buffer.batch.pages().len();
        has_more.then_some(looked)
    }

    /// Merges pages of the next leaf of one address space that this pass saw for the first time, for the eager
    /// phase.
    ///
    /// Reads entries only, and does not walk page tables. `None`: there are no more leaves.
    fn gather_mm(
        &self,
        state: &mut State,
        mm_id: MmId,
        mm: &Mm,
        buffer: &mut ScanBuffer,
    ) -> Option<usize> {
        buffer.candidates.clear();
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
                        buffer.candidates.push(Candidate { addr, kind });
                    }
                })
        });
        self.merge_candidates(state, mm_id, mm, buffer);
        let count = buffer.candidates.len();
        let next = end.and_then(|end| end.checked_add(1))?;
        state.cursor.at.move_to(next);
        Some(count)
    }

    /// Merges the candidates of one address space that can be merged now.
    fn merge_candidates(&self, state: &mut State, mm_id: MmId, mm: &Mm, buffer: &mut ScanBuffer) {
        let hasher = self.hasher();
        for chunk in buffer.candidates.as_slice().chunks(MERGE_PAGES) {
            let outcomes = state.stable_tree_search_all(hasher, mm, mm_id, chunk);
            // The others need the `mmap_lock` of two address spaces, so they are merged one by one.
            for (candidate, outcome) in chunk.iter().flatten().zip(outcomes) {
                let is_starved = state.core.starved.get();
                let place = PageAddr {
                    mm_id,
                    addr: candidate.addr,
                };
                match (candidate.kind, outcome) {
                    (CandidateKind::Steady(..), Outcome::NoMatch(_)) if is_starved => {
                        state.retry(place)
                    }
                    (CandidateKind::Steady(..), Outcome::NoMatch(sum)) => {
                        state.merge_or_queue(hasher, mm, place, sum)
                    }
                    (CandidateKind::Steady(..), _) => {}
                    (CandidateKind::Unlisted(node), _) => state.stable_tree_append(mm, place, node),
                    (CandidateKind::Zero, _) => state.merge_zero(mm, place),
                    (CandidateKind::Ownerless, _) => state.break_cow_later(place, None),
                }
                if lru::was_in_the_way() {
                    state.note_batched(place);
                }
            }
        }
    }

    /// Walks the next pages of one address space, classifies them, and puts the candidates into `buffer`.
    ///
    /// Drops `lock` after the walk. Returns whether the address space may have more pages.
    fn scan_batch(
        &self,
        state: &mut State,
        mm_id: MmId,
        lock: MmapLock<'_>,
        which: Which,
        budget: usize,
        buffer: &mut ScanBuffer,
    ) -> bool {
        buffer.candidates.clear();
        buffer.batch.clear();
        let hasher = self.hasher();
        let mm = lock.mm();
        let from = state.cursor.at.addr();
        let mut next = from;
        let mut vmas = HOLD_VMAS;
        // The first and the last address of the range to skip from here on, if any.
        let mut skipped = None;
        let mut newly_skipped = 0;
        while !buffer.batch.is_full(budget) {
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
                    // Finish what is before the skipped leaves first, then continue behind them.
                    if next == from {
                        skipped = Some((start.min(first.max(from)), last));
                    }
                    break;
                }
                Ok((first, _)) => first,
                Err(before) => before,
            };
            let batch = &mut buffer.batch;
            let before = batch.pages().len();
            next = walk::fill(&vma, start, limit, budget, hasher, batch);
            let strays = match vma.is_mergeable() {
                true => &[],
                false => batch.pages().get(before..).unwrap_or(&[]),
            };
            state.core.found_strays |= !strays.is_empty();
            // mremap() does not unshare pages in such a VMA, but moves them. If one of them is being migrated, its
            // migration entry is moved away from where the end of the migration looks for it. So such pages must
            // go. Those that cannot be unshared now stay listed, and the next pass tries again.
            for stray in strays {
                let addr = stray.addr();
                state.break_cow_later(PageAddr { mm_id, addr }, None);
            }
        }
        // The samples may be outdated from here on. The merge compares the pages themselves.
        drop(lock);
        self.stats.add_skipped(newly_skipped);
        let looked = buffer.batch.pages().len();
        state.cursor.pages = state
            .cursor
            .pages
            .saturating_add(newly_skipped)
            .saturating_add(looked);
        let mut left = Forget::new();
        if next != from {
            next = state.update_tracked(mm, mm_id, from, next, &mut left, buffer);
            state.cursor.at.move_to(next);
            return true;
        }
        let (gap_end, last) = skipped.unwrap_or((usize::MAX, usize::MAX));
        if let Some(addr) = state.forget_gap(mm, mm_id, from, gap_end, &mut left) {
            // The budget for this step is used up.
            state.cursor.at.move_to(addr);
            return true;
        }
        state.cursor.at.move_to(last.saturating_add(1));
        last != usize::MAX
    }
}

impl Cursor {
    /// Leaves the current address space, which is locked by another task, to come back later.
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
    /// Updates the leaf that `addr` is in after its pages were classified, with what was `found`.
    fn note(&mut self, addr: usize, found: &LeafPass) {
        if found.changed {
            self.pages.note_change(addr);
        }
        if found.quick_cow_breaks != 0 {
            self.pages.note_thrash(addr, found.quick_cow_breaks);
        }
    }
}

impl State {
    /// Notes that a page could not be merged because a per-CPU LRU batch may hold it, so that it is retried at
    /// the end of the pass.
    ///
    /// If there is no room, or if the retry fails as well, the page waits for the next pass.
    pub(super) fn note_batched(&mut self, place: PageAddr) {
        if !self.cursor.retrying {
            let _ = self.batched.push_within_capacity(place);
        }
    }

    /// Finds the next leaves of an address space that this pass skips, see [`PageMap::next_skipped`].
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

    /// Forgets the pages in `from..to`, where the walk found none, except those that [`GapCheck`] keeps.
    ///
    /// Goes through as many leaves as `budget` allows. Returns the address to continue at, if there are more.
    fn forget_gap(
        &mut self,
        mm: &Mm,
        mm_id: MmId,
        from: usize,
        to: usize,
        budget: &mut Forget,
    ) -> Option<usize> {
        let mut check = GapCheck::new(mm);
        let next = self.forget_range(mm_id, from, to, budget, |core, addr, entry| {
            check.keeps(core, addr, entry)
        });
        self.core.found_strays |= check.found_stray;
        next
    }

    /// Updates the tracked pages in `from..to` with the batch, which covers that range.
    ///
    /// Pages of the batch are classified. Tracked pages that the batch does not have are forgotten, as many as
    /// `budget` allows. Returns the address up to which this was done.
    fn update_tracked(
        &mut self,
        mm: &Mm,
        mm_id: MmId,
        from: usize,
        to: usize,
        budget: &mut Forget,
        buffer: &mut ScanBuffer,
    ) -> usize {
        let mut covered = from;
        let mut done = 0;
        while let Some(first) = buffer.batch.pages().get(done) {
            let addr = first.addr();
            let leaf_end = PageMap::<PageEntry>::leaf_end(addr);
            // First the gap before the page, then the page together with the others of its leaf.
            if covered < addr {
                if let Some(left) = self.forget_gap(mm, mm_id, covered, addr, budget) {
                    return left;
                }
            }
            let left = buffer.batch.pages().get(done..).unwrap_or(&[]);
            let count = left.partition_point(|page| page.addr() <= leaf_end).max(1);
            self.update_leaf(mm, mm_id, done, count, buffer);
            done = done.saturating_add(count);
            covered = match buffer.batch.pages().get(done.wrapping_sub(1)) {
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
            for &addr in buffer.batch.away() {
                known.pages.note_away(addr);
            }
        }
        to
    }

    /// Classifies `count` pages of the batch from index `first` on, all in one leaf. Adds candidates to
    /// `buffer`.
    ///
    /// Starts to track those that are new. Forgets tracked pages between them.
    fn update_leaf(
        &mut self,
        mm: &Mm,
        mm_id: MmId,
        first: usize,
        count: usize,
        buffer: &mut ScanBuffer,
    ) {
        let ScanBuffer { batch, candidates } = buffer;
        let end = first.saturating_add(count);
        let pages = batch.pages().get(first..end).unwrap_or(&[]);
        let (Some(addr), Some(last)) = (
            pages.first().map(|page| page.addr()),
            pages.last().map(|page| page.addr()),
        ) else {
            return;
        };
        // Without memory to track the pages, the next pass tries again.
        let Some(known) = known_mm(&mut self.mms, mm, mm_id) else {
            return;
        };
        let core = &mut self.core;
        if core.starved.get() && !known.pages.has_leaf(addr) {
            return candidates.push_unlisted(pages);
        }
        if let Ok(mut leaf) = known.pages.leaf_from(addr, core.pass, gfp_mapping()) {
            let refreshing = leaf.is_refreshing();
            if self.cursor.skipping {
                leaf.decide_skips(PageEntry::any_is_watched);
            }
            let waited = leaf.end_wait(|| seconds_since(core.born));
            let retry_steady =
                self.cursor.retry_steady || leaf.missed_retry() || refreshing || waited;
            let mut found = LeafPass::new(retry_steady, refreshing);
            // If the pages have no holes between them, usually all are tracked, or all are new.
            let dense = last.wrapping_sub(addr) / PAGE_SIZE + 1 == count;
            if dense {
                if let Some(entries) = leaf.known_run(count) {
                    core.classify_range(mm_id, entries, pages, &mut found, candidates);
                    return known.note(addr, &found);
                }
                if leaf.is_empty_from_here() && pages.iter().all(|page| page.sample().is_some()) {
                    let filled = leaf.fill_run(count, gfp_mapping(), |i| {
                        // All have one, see above.
                        let sample = pages
                            .get(i)
                            .map_or(Sample::from_raw(0), |page| page.sample_bits());
                        core.count(sample);
                        PageEntry::seen(sample)
                    });
                    if filled {
                        core.pages = core.pages.saturating_add(count);
                        core.changes = core.changes.wrapping_add(1);
                        found.changed = true;
                        return known.note(addr, &found);
                    }
                }
            }
            let new = count.saturating_sub(leaf.len());
            let mut check = GapCheck::new(mm);
            for &page in pages {
                let addr = page.addr();
                let entry = loop {
                    match leaf.seek(addr) {
                        Found::Passed(addr, entry) => {
                            let place = PageAddr { mm_id, addr };
                            if check.keeps(core, addr, entry) || !core.untrack_page(place, entry) {
                                leaf.keep_passed();
                            } else {
                                found.changed = true;
                                drop(leaf.remove_passed());
                            }
                        }
                        other => break other,
                    }
                };
                let kind = match (entry, page.seen()) {
                    (Found::Entry(entry), seen) => {
                        core.classify_page(PageAddr { mm_id, addr }, entry, seen, &mut found)
                    }
                    (_, Seen::Anon(_)) if core.starved.get() => None,
                    (_, Seen::Anon(sample)) => {
                        let entry = PageEntry::seen(sample);
                        match leaf.insert(entry, new, gfp_mapping()) {
                            Ok(()) => {
                                found.changed = true;
                                core.track_page(sample);
                            }
                            Err(_) => core.starved.set(true),
                        }
                        None
                    }
                    (_, Seen::Ksm(Some(node))) => Some(CandidateKind::Unlisted(node)),
                    (_, Seen::Ksm(None)) => Some(CandidateKind::Ownerless),
                };
                if let Some(kind) = kind {
                    candidates.push(Candidate { addr, kind });
                }
            }
            core.found_strays |= check.found_stray;
            // It may hold `mmap_lock`.
            drop(check);
            known.pages.prune(addr, Some(core.clock.secs()));
            known.note(addr, &found);
        } else {
            core.starved.set(true);
            candidates.push_unlisted(pages);
            known.pages.prune(addr, Some(core.clock.secs()));
        }
    }
}
