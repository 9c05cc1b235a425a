// SPDX-License-Identifier: GPL-2.0

//! Pages that may be merged: what classification hands over to the merge, and what came of it.

use crate::{
    hash::{Checksum, Sample},
    mm::{
        folio::NodeId,
        walk::{Batch, Seen, BATCH_PAGES},
    },
};
use kernel::prelude::*;

/// A page of the scanned address space that may be merged.
#[derive(Clone, Copy)]
pub(super) struct Candidate {
    pub(super) addr: usize,
    pub(super) kind: CandidateKind,
}

/// Why a page is a candidate.
#[derive(Clone, Copy)]
pub(super) enum CandidateKind {
    /// An anonymous page whose sample held from one scan of it to the next, and another page seems to have that
    /// sample. With the outcome of the search for an equal merged page.
    Steady(Sample, Outcome),
    /// A KSM page that belongs to this node, but has no rmap item for this mapping: a child inherited it.
    Unlisted(NodeId),
    /// An anonymous page that is queued, and may be all zeroes.
    Zero,
    /// A KSM page without a node. No rmap walk finds its mappings, so it is unshared.
    Ownerless,
}

/// The outcome of the search of the stable tree for one candidate.
#[derive(Clone, Copy)]
pub(super) enum Outcome {
    /// Not searched yet.
    Unknown,
    /// Not searched yet. The page is on probation, so its full checksum must have held.
    OnProbation,
    /// Not searched yet. The page is queued under this checksum, which may be outdated.
    Queued(Checksum),
    /// The page is merged.
    Yes,
    /// No merged page is equal. This is the page's checksum, or [`Checksum::unknown`].
    NoMatch(Checksum),
    /// The page cannot be merged now. Retry it in the next pass.
    Skip,
    /// The page may not be merged yet, or it has changed. No retry is needed: classification comes back to it.
    NotYet,
    /// The page is part of a huge page that is not to be split yet. It is retried when that wait is over.
    LeftWhole,
}

/// The result of an attempt to merge a page with one KSM page, or with one of several.
pub(super) enum Attempt<T = ()> {
    /// The page is merged.
    Merged(T),
    /// The contents differ, or the page has changed.
    Differs,
    /// None of the KSM pages takes another mapping, or all are gone.
    NoRoom,
    /// The page is part of a huge page that is not to be split yet.
    LeftWhole,
    /// The page cannot be merged with any page now: it is in use or locked, or there is no memory.
    Failed,
}

impl<T> Attempt<T> {
    /// Calls `f` with what came of a merge.
    pub(super) fn map<U>(self, f: impl FnOnce(T) -> U) -> Attempt<U> {
        match self {
            Self::Merged(value) => Attempt::Merged(f(value)),
            Self::Differs => Attempt::Differs,
            Self::NoRoom => Attempt::NoRoom,
            Self::LeftWhole => Attempt::LeftWhole,
            Self::Failed => Attempt::Failed,
        }
    }

    /// Returns the outcome of the search, if this ends it: no other KSM page need be tried.
    pub(super) fn outcome(self) -> Option<Outcome> {
        match self {
            Self::Merged(_) => Some(Outcome::Yes),
            Self::LeftWhole => Some(Outcome::LeftWhole),
            Self::Failed => Some(Outcome::Skip),
            Self::Differs | Self::NoRoom => None,
        }
    }
}

impl<T> From<Result<T>> for Attempt<T> {
    /// Takes the result of an operation of [`crate::mm::replace`].
    fn from(result: Result<T>) -> Self {
        match result {
            Ok(value) => Self::Merged(value),
            Err(err) if err == EAGAIN => Self::Differs,
            Err(err) if err == E2BIG => Self::LeftWhole,
            Err(_) => Self::Failed,
        }
    }
}

/// The buffer of one scan step: the batch, and its candidates. It is too large for the stack.
pub(super) struct ScanBuffer {
    pub(super) batch: Batch,
    pub(super) candidates: [Option<Candidate>; BATCH_PAGES],
    pub(super) len: usize,
}

impl ScanBuffer {
    /// Returns an initialiser, so that the buffer is never on the stack.
    pub(super) fn init() -> impl Init<Self> {
        init!(Self {
            batch <- Batch::init(),
            candidates <- pin_init::init_array_from_fn(|_| None),
            len: 0,
        })
    }

    /// Adds a candidate. If there is no room, the page is left to a later pass.
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

    /// Adds those of `count` pages of the batch, from index `first` on, that are KSM pages. None of these pages
    /// is tracked.
    pub(super) fn push_unlisted(&mut self, first: usize, count: usize) {
        for idx in first..first.saturating_add(count) {
            let Some(&page) = self.batch.pages().get(idx) else {
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
