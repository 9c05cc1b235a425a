// SPDX-License-Identifier: GPL-2.0

//! The memory that a step of the scan works in.

use super::candidate::Candidates;
use crate::mm::walk::{Batch, BATCH_PAGES};
use kernel::prelude::*;

/// The buffer of one scan step: the batch, and its candidates. It is too large for the stack.
pub(super) struct ScanBuffer {
    pub(super) batch: Batch,
    pub(super) candidates: Candidates,
}

const _: () = assert!(Candidates::MAX == BATCH_PAGES);

impl ScanBuffer {
    /// Returns an initialiser, so that the buffer is never on the stack.
    pub(super) fn init() -> impl Init<Self> {
        init!(Self {
            batch <- Batch::init(),
            candidates <- Candidates::init(),
        })
    }
}

impl Candidates {
    /// Returns an initialiser for no candidates.
    fn init() -> impl Init<Self> {
        init!(Self {
            list <- pin_init::init_array_from_fn(|_| None),
            len: 0,
        })
    }
}
