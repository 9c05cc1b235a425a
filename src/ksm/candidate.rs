// SPDX-License-Identifier: GPL-2.0

//! Pages that may be merged: what classification hands over to the merge, and what came of it.

use crate::{
    hash::{Checksum, Sample},
    mm::{
        folio::NodeId,
        seen::{Seen, SeenPage},
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
    /// sample. With what has to be checked before it merges.
    Steady(Sample, Check),
    /// A KSM page that belongs to this node, but has no rmap item for this mapping: a child inherited it.
    Unlisted(NodeId),
    /// An anonymous page that is queued, and may be all zeroes.
    Zero,
    /// A KSM page without a node. No rmap walk finds its mappings, so it is unshared.
    Ownerless,
}

/// What has to be checked before a steady page merges.
#[derive(Clone, Copy)]
pub(super) enum Check {
    /// Nothing.
    None,
    /// The page is on probation, so its full checksum must have held.
    Probation,
    /// The page is queued under this checksum, which may be outdated.
    Queued(Checksum),
}

/// The outcome of the search of the stable tree for one candidate.
#[derive(Clone, Copy)]
pub(super) enum Outcome {
    /// The candidate is none that is searched for: it is no steady page.
    NotSearched,
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
    /// None of the KSM pages takes this mapping: each has as many as it may, is on another NUMA node or in
    /// poisoned memory, or is gone.
    NoRoom,
    /// The page is part of a huge page that is not to be split yet.
    LeftWhole,
    /// One of the pages is in use or locked, or there is no memory. No other KSM page is tried.
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

/// The candidates among the pages of one batch.
pub(super) struct Candidates {
    pub(super) list: [Option<Candidate>; Self::MAX],
    pub(super) len: usize,
}

impl Candidates {
    /// There is room for all pages of a batch.
    pub(super) const MAX: usize = 512;

    /// Removes all candidates.
    pub(super) fn clear(&mut self) {
        self.len = 0;
    }

    /// Returns the number of candidates.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Adds a candidate. If there is no room, the page is left to a later pass.
    pub(super) fn push(&mut self, candidate: Candidate) {
        if let Some(place) = self.list.get_mut(self.len) {
            *place = Some(candidate);
            self.len = self.len.saturating_add(1);
        }
    }

    /// Returns the candidates, all of which are `Some`.
    pub(super) fn as_slice(&self) -> &[Option<Candidate>] {
        self.list.get(..self.len).unwrap_or(&[])
    }

    /// Whether the page at `addr` is a candidate.
    pub(super) fn has(&self, addr: usize) -> bool {
        let candidates = self.list.iter().take(self.len).flatten();
        candidates.into_iter().any(|known| known.addr == addr)
    }

    /// Adds those of `pages` that are KSM pages. None of them is tracked.
    pub(super) fn push_unlisted(&mut self, pages: &[SeenPage]) {
        for page in pages {
            if let Seen::Ksm(Some(node)) = page.seen() {
                self.push(Candidate {
                    addr: page.addr(),
                    kind: CandidateKind::Unlisted(node),
                });
            }
        }
    }
}
