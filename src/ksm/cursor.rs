// SPDX-License-Identifier: GPL-2.0

//! The position of a pass: an address space, and an address in it.

use super::{deferred::Deferred, mms::MmId};
use kernel::time::{Instant, Monotonic};

/// The position of a pass. It goes through the address spaces in the order of their registration.
pub(crate) struct Position {
    /// The current address space. It may have exited. Numbers begin at 1.
    mm_id: MmId,
    /// The address in it to continue at.
    addr: usize,
    /// The last address space of this pass; `None` between passes.
    ///
    /// Address spaces that are registered later wait for the next pass, so that new processes can settle down a
    /// little.
    last: Option<MmId>,
    /// Whether the pass has visited all address spaces, and only comes back to this one.
    only_this: bool,
}

impl Position {
    /// Creates a position between passes.
    pub(crate) fn new() -> Self {
        Self {
            mm_id: 1,
            addr: 0,
            last: None,
            only_this: false,
        }
    }

    /// Whether no pass is under way.
    pub(crate) fn is_between_passes(&self) -> bool {
        self.last.is_none()
    }

    /// Begins a pass over the address spaces up to `last`.
    pub(crate) fn begin(&mut self, last: MmId) {
        *self = Self {
            last: Some(last),
            ..Self::new()
        };
    }

    /// Moves back to the first address space of this pass.
    pub(crate) fn rewind(&mut self) {
        self.go_to(1);
        self.only_this = false;
    }

    /// Moves back to an address space that was left before its end, at `addr`, and to no other one.
    pub(crate) fn come_back_to(&mut self, mm_id: MmId, addr: usize) {
        self.mm_id = mm_id;
        self.addr = addr;
        self.only_this = true;
    }

    /// Returns the current address space, and the address to continue at.
    pub(crate) fn here(&self) -> (MmId, usize) {
        (self.mm_id, self.addr)
    }

    /// Finds the current address space: the same one as long as it is registered, else the next one.
    ///
    /// `next` returns the first registered address space with a number above its argument. `None`: there is
    /// none left in this pass.
    pub(crate) fn current_mm<T>(
        &mut self,
        next: impl FnOnce(MmId) -> Option<(MmId, T)>,
    ) -> Option<(MmId, T)> {
        let last = self.last?;
        let found = next(self.mm_id.saturating_sub(1))?;
        if found.0 > last || self.only_this && found.0 != self.mm_id {
            return None;
        }
        if found.0 != self.mm_id {
            self.go_to(found.0);
        }
        Some(found)
    }

    /// Returns the address to continue at in the current address space. 0: at its start.
    pub(crate) fn addr(&self) -> usize {
        self.addr
    }

    /// Continues at `addr` in the current address space.
    pub(crate) fn move_to(&mut self, addr: usize) {
        self.addr = addr;
    }

    /// Leaves the current address space. The pass is done with it for now.
    pub(crate) fn leave(&mut self) {
        let next = match self.last {
            Some(last) if self.only_this => last,
            _ => self.mm_id,
        };
        self.go_to(next.saturating_add(1));
    }

    /// Moves to the start of an address space.
    fn go_to(&mut self, mm_id: MmId) {
        self.mm_id = mm_id;
        self.addr = 0;
    }
}

/// The progress of the current pass.
pub(crate) struct Cursor {
    /// Where the pass is.
    pub(crate) at: Position,
    /// The address spaces to come back to, because they were locked.
    pub(crate) deferred: Deferred<(MmId, usize)>,
    /// Whether the pass is coming back to these.
    pub(crate) coming_back: bool,
    /// Whether to retry steady pages: since the previous pass began, something has happened that may have given
    /// one of them an equal. See [`Core::bump_retry_seq`](super::state::Core::bump_retry_seq).
    pub(crate) retry_steady: bool,
    /// The value of [`Core::retry_seq`](super::state::Core::retry_seq) when this pass began.
    pub(crate) retry_seq: u64,
    /// Whether this pass skips leaves in which nothing has changed for some passes (`smart_scan`).
    pub(crate) skipping: bool,
    /// Whether all pages were scanned, and the eager phase is under way: pages that were seen once and have an
    /// equal merge.
    pub(crate) gathering: bool,
    /// Whether only pages that a per-CPU LRU batch may have held are left to retry.
    pub(crate) retrying: bool,
    /// When the pass began; `None` between passes.
    pub(crate) began: Option<Instant<Monotonic>>,
    /// How many pages the pass has scanned or skipped.
    pub(crate) pages: usize,
}

impl Cursor {
    /// Creates a cursor between passes.
    pub(crate) fn new() -> Self {
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
