// SPDX-License-Identifier: GPL-2.0

//! The address spaces that a pass retries at its end, because their `mmap_lock` was contended.

/// The most address spaces that are remembered. Any others are left to the next pass.
const MAX_DEFERRED: usize = 32;

/// How many times all of them may turn out to be locked before the pass ends without them.
const MAX_ROUNDS: u32 = 16;

/// Address spaces whose `mmap_lock` was contended, in the order in which they are retried.
///
/// `T` says which one it is, and where the pass left it.
pub(crate) struct Deferred<T> {
    places: [Option<T>; MAX_DEFERRED],
    len: usize,
    /// How many attempts have failed in a row.
    in_vain: usize,
    rounds: u32,
}

impl<T: Copy> Deferred<T> {
    /// Creates an empty queue.
    pub(crate) const fn new() -> Self {
        Self {
            places: [None; MAX_DEFERRED],
            len: 0,
            in_vain: 0,
            rounds: 0,
        }
    }

    /// Appends an address space, if there is room.
    pub(crate) fn push(&mut self, place: T) {
        if let Some(last) = self.places.get_mut(self.len) {
            *last = Some(place);
            self.len = self.len.wrapping_add(1);
        }
    }

    /// Takes the first address space out.
    pub(crate) fn pop(&mut self) -> Option<T> {
        let left = self.len.checked_sub(1)?;
        let first = self.places.first_mut()?.take();
        self.places.rotate_left(1);
        self.len = left;
        first
    }

    /// Notes that the `mmap_lock` of the address space taken out last was free.
    pub(crate) fn note_locked(&mut self) {
        self.in_vain = 0;
    }

    /// Puts the address space that was taken out last back at the end, because it is still locked.
    ///
    /// Returns whether all of them were tried since one was free, so that the caller should wait a little.
    /// After [`MAX_ROUNDS`] such rounds all are dropped.
    pub(crate) fn put_back(&mut self, place: T) -> bool {
        self.push(place);
        self.in_vain = self.in_vain.saturating_add(1);
        if self.in_vain < self.len {
            return false;
        }
        self.in_vain = 0;
        self.rounds = self.rounds.saturating_add(1);
        if self.rounds >= MAX_ROUNDS {
            self.len = 0;
        }
        true
    }
}
