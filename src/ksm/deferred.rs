// SPDX-License-Identifier: GPL-2.0

//! The address spaces to which a pass comes back.

/// The most address spaces that are remembered; what is beyond has to wait for the next pass.
const MAX_DEFERRED: usize = 32;

/// How often all of them are tried again in vain before the pass ends without them.
const MAX_ROUNDS: u32 = 16;

/// Address spaces whose `mmap_lock` could not be had, each with where the pass left it.
pub(crate) struct Deferred<T> {
    places: [Option<T>; MAX_DEFERRED],
    len: usize,
    /// How many were tried in vain since one was not.
    in_vain: usize,
    rounds: u32,
}

impl<T: Copy> Deferred<T> {
    /// None.
    pub(crate) const fn new() -> Self {
        Self {
            places: [None; MAX_DEFERRED],
            len: 0,
            in_vain: 0,
            rounds: 0,
        }
    }

    /// Remembers one, behind all others, if there is room.
    pub(crate) fn push(&mut self, place: T) {
        if let Some(last) = self.places.get_mut(self.len) {
            *last = Some(place);
            self.len = self.len.wrapping_add(1);
        }
    }

    /// Takes the first one out.
    pub(crate) fn pop(&mut self) -> Option<T> {
        let left = self.len.checked_sub(1)?;
        let first = self.places.first_mut()?.take();
        self.places.rotate_left(1);
        self.len = left;
        first
    }

    /// Notes that the one taken out last could be locked.
    pub(crate) fn note_locked(&mut self) {
        self.in_vain = 0;
    }

    /// Puts the one taken out last back: it could not be locked this time either. Returns whether all of them
    /// were tried in vain, so that it is time to wait a little. After so many rounds they are forgotten.
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
