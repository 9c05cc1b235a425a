// SPDX-License-Identifier: GPL-2.0

//! Pages that are worth trying to merge, and what came of it.

use super::{probation::Probation, Core};
use crate::{
    hash::{Checksum, Sample},
    mm::{
        folio::NodeId,
        walk::{Batch, Seen, BATCH_PAGES},
    },
};
use kernel::prelude::*;

/// A page that is worth trying to merge.
#[derive(Clone, Copy)]
pub(super) struct Candidate {
    pub(super) addr: usize,
    pub(super) kind: CandidateKind,
}

#[derive(Clone, Copy)]
pub(super) enum CandidateKind {
    /// An anonymous page whose sample held between two looks, and that another page seems to have;
    /// and what came of looking for a merged page for it.
    Steady(Sample, Outcome),
    /// A KSM page of this node that is not listed with it: mapped by a child since a fork.
    Unlisted(NodeId),
    /// An anonymous page that waits, and that may be all zeroes.
    Zero,
    /// A KSM page of no node: unshared by this process only when it is written to, and found by no rmap walk.
    Ownerless,
}

/// What came of looking for a merged page to join.
#[derive(Clone, Copy)]
pub(super) enum Outcome {
    /// Not looked for yet.
    Unknown,
    /// Not looked for yet; the page is on probation, so its full checksum must have held.
    OnProbation,
    /// Not looked for yet; the page waits under this checksum, which may not be its own any more.
    Waiting(Checksum),
    /// The page is merged.
    Yes,
    /// There is none. This is the page's checksum (perhaps [`Checksum::unknown`]).
    NoMatch(Checksum),
    /// Nothing can be done with the page now.
    Skip,
    /// The page is not to be merged yet, or is not what it was. It is looked at again anyway.
    NotYet,
    /// The page is part of a huge page that is to stay whole for a while. It is looked at again afterwards.
    LeftWhole,
}

impl Outcome {
    /// What came of it when merging failed for another reason than the content.
    pub(super) fn failed(err: Error) -> Self {
        match err {
            err if err == E2BIG => Self::LeftWhole,
            _ => Self::Skip,
        }
    }
}

/// What one step works on. Too large for the stack.
pub(super) struct ScanBuffer {
    pub(super) batch: Batch,
    pub(super) candidates: [Option<Candidate>; BATCH_PAGES],
    pub(super) len: usize,
}

impl ScanBuffer {
    /// Initialises it in place.
    pub(super) fn init() -> impl Init<Self> {
        init!(Self {
            batch <- Batch::init(),
            candidates <- pin_init::init_array_from_fn(|_| None),
            len: 0,
        })
    }

    pub(super) fn push(&mut self, candidate: Candidate) {
        if let Some(place) = self.candidates.get_mut(self.len) {
            *place = Some(candidate);
            self.len = self.len.saturating_add(1);
        }
    }

    /// Whether the page at `addr` is a candidate.
    pub(super) fn has(&self, addr: usize) -> bool {
        let candidates = self.candidates.iter().take(self.len).flatten();
        candidates.into_iter().any(|known| known.addr == addr)
    }

    /// Adds the KSM pages among `count` pages from number `first` of the batch on. None of the pages is remembered.
    pub(super) fn push_unlisted(&mut self, first: usize, count: usize) {
        for nth in first..first.saturating_add(count) {
            let Some(&page) = self.batch.pages().get(nth) else {
                break;
            };
            if let Seen::Ksm(Some(node)) = page.seen() {
                self.push(Candidate {
                    addr: page.addr(),
                    kind: CandidateKind::Unlisted(node),
                });
            }
        }
    }
}

impl Core {
    #[inline]
    pub(super) fn candidate(&self, sample: Sample) -> Option<CandidateKind> {
        self.filter
            .has_two(sample)
            .then_some(CandidateKind::Steady(sample, Outcome::Unknown))
    }

    /// Does so for a page that may be on probation.
    #[inline]
    pub(super) fn candidate_on(
        &self,
        probation: Option<Probation>,
        sample: Sample,
    ) -> Option<CandidateKind> {
        self.filter.has_two(sample).then_some(match probation {
            None => CandidateKind::Steady(sample, Outcome::Unknown),
            Some(_) => CandidateKind::Steady(sample, Outcome::OnProbation),
        })
    }
}
