// SPDX-License-Identifier: GPL-2.0

//! The scan: one pass after the other over all mergeable pages, some pages at a time.

use super::{
    checksum::Checksum,
    index::{Place, SlotId},
    run, Engine, State,
};
use crate::mm::{
    kthread::Current,
    stable::{ItemBox, NodeId},
    vma::MergeableVma,
    walk::{self, Batch, Seen, SeenPage, BATCH_PAGES},
    word::{PageState, PageWord},
};
use kernel::{
    mm::{Mm, MmWithUser, MmWithUserAsync},
    page::PAGE_SIZE,
    sync::{aref::ARef, atomic::Relaxed},
};

/// How far the current pass has come.
pub(super) struct Cursor {
    /// The address space that is being scanned, or that was scanned last when it is gone.
    slot: SlotId,
    /// The next address in it.
    addr: usize,
    /// The last address space that belongs to this pass; `None` between passes. Who comes later
    /// waits for the next pass, so that new areas settle down a little.
    last: Option<SlotId>,
}

impl Cursor {
    pub(super) fn new() -> Self {
        Self {
            slot: 0,
            addr: 0,
            last: None,
        }
    }
}

/// What one step of a scan came to.
enum Step {
    /// So many pages were looked at.
    Looked(usize),
    /// The pass is complete.
    PassDone,
}

/// A page that is worth trying to merge.
#[derive(Clone, Copy)]
pub(super) struct Candidate {
    pub(super) addr: usize,
    pub(super) kind: CandidateKind,
}

#[derive(Clone, Copy)]
pub(super) enum CandidateKind {
    /// An anonymous page whose checksum held between two looks.
    Steady(Checksum),
    /// A KSM page of this node that is not listed with it: mapped by a child since a fork.
    Unlisted(NodeId),
}

/// The candidates of one batch.
struct Candidates {
    list: [Option<Candidate>; BATCH_PAGES],
    len: usize,
}

impl Candidates {
    fn push(&mut self, candidate: Candidate) {
        if let Some(place) = self.list.get_mut(self.len) {
            *place = Some(candidate);
            self.len += 1;
        }
    }
}

/// Takes a user reference on an address space, unless it is exiting. Dropping the reference never
/// tears the address space down in this context, where locks are held.
pub(super) fn use_mm(mm: &Mm) -> Option<ARef<MmWithUserAsync>> {
    mm.mmget_not_zero().map(MmWithUser::into_mmput_async)
}

impl Engine {
    /// Scans `pages_to_scan` pages, or to the end of the pass.
    pub(super) fn scan(&self, current: &Current) {
        let mut budget = self.pages_to_scan.load(Relaxed) as usize;
        while budget > 0 && !current.should_stop() && !current.is_freezing() {
            current.cond_resched();
            let mut state = self.state.lock();
            // Whoever writes to `run` holds the lock too.
            if self.run() != run::MERGE {
                break;
            }
            let step = self.step(&mut state, budget);
            self.publish_stats(&state);
            match step {
                Step::Looked(pages) => {
                    self.stats.add_scanned(pages);
                    budget = budget.saturating_sub(pages);
                }
                Step::PassDone => break,
            }
        }
    }

    /// Looks at the next few pages, `budget` at most, and merges what it can.
    fn step(&self, state: &mut State, budget: usize) -> Step {
        let last = match state.cursor.last {
            Some(last) => last,
            None => self.start_pass(state),
        };
        // The current address space first, then the one behind it.
        let from = state.cursor.slot;
        let next = self.registry.lock().next(from.saturating_sub(1));
        let Some((slot, mm)) = next.filter(|(slot, _)| *slot <= last) else {
            return self.end_pass(state);
        };
        if slot != from {
            state.cursor.slot = slot;
            state.cursor.addr = 0;
        }
        let looked = match use_mm(&mm) {
            Some(user) => self.step_mm(state, slot, &user, budget),
            // Exiting: it will be reported dead any moment.
            None => None,
        };
        match looked {
            Some(pages) => Step::Looked(pages),
            None => {
                if let Some(known) = state.mms.get(&slot) {
                    crate::mm::report_metadata(&mm, known.bytes());
                }
                state.cursor.slot = slot.wrapping_add(1);
                state.cursor.addr = 0;
                Step::Looked(0)
            }
        }
    }

    fn start_pass(&self, state: &mut State) -> SlotId {
        // References held by per-CPU LRU batches would keep pages from being merged.
        crate::mm::lru_add_drain_all();
        let last = self.registry.lock().last_id();
        state.cursor = Cursor {
            slot: 1,
            addr: 0,
            last: Some(last),
        };
        last
    }

    fn end_pass(&self, state: &mut State) -> Step {
        state.cursor = Cursor::new();
        self.stats.add_full_scan();
        Step::PassDone
    }

    /// Looks at the next few pages of one address space. `None`: there are no more.
    fn step_mm(
        &self,
        state: &mut State,
        slot: SlotId,
        mm: &MmWithUser,
        budget: usize,
    ) -> Option<usize> {
        let mut batch = Batch::new();
        let mut candidates = Candidates {
            list: [None; BATCH_PAGES],
            len: 0,
        };
        {
            let guard = mm.mmap_read_lock();
            let from = state.cursor.addr;
            let Some(vma) = MergeableVma::next(mm, &guard, from) else {
                drop(guard);
                state.forget_range(slot, from, usize::MAX);
                return None;
            };
            let start = from.max(vma.start());
            let next = walk::fill(&vma, start, budget, self.seed, &mut batch);
            let mut seen_to = from;
            for page in batch.pages() {
                // Whatever is remembered of addresses without a page is outdated.
                state.forget_range(slot, seen_to, page.addr);
                seen_to = page.addr.saturating_add(PAGE_SIZE);
                if let Some(kind) = state.look(mm, slot, page) {
                    candidates.push(Candidate {
                        addr: page.addr,
                        kind,
                    });
                }
            }
            state.forget_range(slot, seen_to, next);
            state.cursor.addr = next;
        }
        // Merging takes the mmap_lock of two address spaces, one after the other.
        for candidate in candidates.list.iter().flatten() {
            let place = Place {
                slot,
                addr: candidate.addr,
            };
            match candidate.kind {
                CandidateKind::Steady(sum) => state.merge_steady(self.seed, mm, place, sum),
                CandidateKind::Unlisted(node) => state.list(mm, place, node),
            }
        }
        Some(batch.len())
    }
}

impl super::MmState {
    /// What is kept for the address space, in bytes.
    fn bytes(&self) -> usize {
        let items = crate::mm::merging_pages(&self.mm).saturating_mul(ItemBox::SIZE);
        self.pages.bytes().saturating_add(items)
    }
}

impl State {
    /// Compares what a page is with what is remembered of it, and says whether it is worth trying
    /// to merge.
    fn look(&mut self, mm: &Mm, slot: SlotId, page: SeenPage) -> Option<CandidateKind> {
        let place = Place {
            slot,
            addr: page.addr,
        };
        match (self.recall(place), page.seen) {
            (None, Seen::Anon(sum)) => {
                self.remember_new(mm, place, sum);
                None
            }
            (Some(PageState::Seen(old)), Seen::Anon(sum)) => {
                if old == sum {
                    return Some(CandidateKind::Steady(sum));
                }
                self.reword(place, PageWord::seen(sum));
                None
            }
            (Some(PageState::Unstable(old)), Seen::Anon(sum)) => {
                if old != sum {
                    self.index.stop_waiting(old, place);
                    self.reword(place, PageWord::seen(sum));
                    return None;
                }
                // It waits for an equal to come by; but one may have been merged without it, when
                // this page was pinned or locked.
                self.index
                    .next_stable(sum, None)
                    .map(|_| CandidateKind::Steady(sum))
            }
            (Some(PageState::Merged(_)), Seen::Anon(sum)) => {
                // Somebody wrote to it.
                self.forget(place);
                self.remember_new(mm, place, sum);
                None
            }
            (Some(PageState::Merged(Some(old))), Seen::Ksm(Some(new))) if old == new => None,
            (_, Seen::Ksm(Some(node))) => Some(CandidateKind::Unlisted(node)),
            (_, Seen::Ksm(None)) => {
                // Of no node: nobody can find its other mappings, so it is left alone until it is
                // written to.
                self.forget(place);
                None
            }
        }
    }

    pub(super) fn remember_new(&mut self, mm: &Mm, place: Place, sum: Checksum) {
        if self.mms.get(&place.slot).is_none() {
            let known = super::MmState {
                mm: mm.into(),
                pages: super::PageMap::new(),
            };
            if self
                .mms
                .try_create_and_insert(place.slot, known, super::GFP_SCAN)
                .is_err()
            {
                // The next pass tries again.
                return;
            }
        }
        // Likewise.
        let _ = self.remember(place, PageWord::seen(sum));
    }
}
