// SPDX-License-Identifier: GPL-2.0

//! How much is forgotten under one hold of the engine's lock.

/// How many leaves are forgotten under one hold of `state`.
const FORGET_LEAVES: usize = 16;

/// The budget for forgetting pages under one hold of `state`, and whether a page could not be forgotten.
pub(super) struct Forget {
    pub(super) leaves: usize,
    pub(super) busy: bool,
}

impl Forget {
    /// Allows to forget the pages of [`FORGET_LEAVES`] leaves.
    pub(super) fn new() -> Self {
        Self {
            leaves: FORGET_LEAVES,
            busy: false,
        }
    }

    /// Allows to forget any number of pages.
    pub(super) fn everything() -> Self {
        Self {
            leaves: usize::MAX,
            busy: false,
        }
    }

    /// Whether a page could not be forgotten, because another task has its merged page locked.
    pub(super) fn was_busy(&self) -> bool {
        self.busy
    }
}
