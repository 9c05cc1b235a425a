// SPDX-License-Identifier: GPL-2.0

//! Where a pass is.

use super::index::MmId;

/// How far a pass has come in the address spaces, which it goes through in the order in which they came.
pub(crate) struct Position {
    /// The address space whose turn it is, or was when it is gone; numbers begin at 1.
    mm_id: MmId,
    /// The next address in it.
    addr: usize,
    /// The last address space that belongs to this pass; `None` between passes. Who comes later
    /// waits for the next pass, so that new areas try_free_orphan down a little.
    last: Option<MmId>,
    /// Whether the pass has been through all of them, and comes back to this one only.
    only_this: bool,
}

impl Position {
    /// Between passes.
    pub(crate) fn new() -> Self {
        Self {
            mm_id: 1,
            addr: 0,
            last: None,
            only_this: false,
        }
    }

    /// Whether no pass has begun.
    pub(crate) fn is_between_passes(&self) -> bool {
        self.last.is_none()
    }

    /// Begins a pass, to which those up to `last` belong.
    pub(crate) fn begin(&mut self, last: MmId) {
        *self = Self {
            last: Some(last),
            ..Self::new()
        };
    }

    /// Goes back to the first of those that belong to this pass.
    pub(crate) fn rewind(&mut self) {
        self.go_to(1);
        self.only_this = false;
    }

    /// Comes back to one that was left before its end, at `addr`, and to that one only.
    pub(crate) fn come_back_to(&mut self, mm_id: MmId, addr: usize) {
        self.mm_id = mm_id;
        self.addr = addr;
        self.only_this = true;
    }

    /// The one whose turn it is, and the next address in it.
    pub(crate) fn here(&self) -> (MmId, usize) {
        (self.mm_id, self.addr)
    }

    /// Finds out whose turn it is: still that of the same one, else that of the next which is there.
    /// `next` tells who is the first behind a number. `None`: all of this pass had theirs.
    pub(crate) fn turn<T>(
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

    /// Where to go on in the one whose turn it is. 0: it has just begun.
    pub(crate) fn addr(&self) -> usize {
        self.addr
    }

    /// Goes on at `addr` in the one whose turn it is.
    pub(crate) fn move_to(&mut self, addr: usize) {
        self.addr = addr;
    }

    /// The one whose turn it is has had it.
    pub(crate) fn leave(&mut self) {
        let next = match self.last {
            Some(last) if self.only_this => last,
            _ => self.mm_id,
        };
        self.go_to(next.saturating_add(1));
    }

    fn go_to(&mut self, mm_id: MmId) {
        self.mm_id = mm_id;
        self.addr = 0;
    }
}
