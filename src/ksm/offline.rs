// SPDX-License-Identifier: GPL-2.0

//! What the engine does when memory is taken offline.
//!
//! From "going offline" until it is known how that ended, nothing is scanned or merged, and `run=2` is not begun.
//! (Faults, and whatever else the kernel does with merged pages, go on.) Looking at nodes would be safe,
//! see [`crate::sys::memory_notifier`]. But each look takes a reference or the lock of a page, either of which makes
//! the page's migration fail, and offlining starts over as long as pages are left.
//!
//! The mutex is not held all that time, since it is the kernel that has to go on; a flag stands for it
//! meanwhile. Nor does the kernel wait for a `run=2` that is under way, which holds the mutex only now and then: that
//! one goes on to its end, and pages that it was looking at are moved at the next attempt.

use super::{stable_tree::Released, Engine, State};
use crate::sys::memory_notifier::Listener;
use core::ops::Range;
use kernel::{
    prelude::*,
    sync::{
        atomic::Relaxed,
        lock::{mutex::MutexBackend, Guard},
    },
};

impl Engine {
    /// Whether memory is going offline. Certain only with `state` locked.
    pub(super) fn is_offlining(&self) -> bool {
        self.offlining.load(Relaxed)
    }

    /// Locks `state` at a time when no memory is going offline, and pages are not being unmerged, for those who look at
    /// nodes or pages because somebody asked for it. `ERESTARTSYS`: a signal came first.
    pub(super) fn lock_idle(&self) -> Result<Guard<'_, State, MutexBackend>> {
        let mut state = self.state.lock();
        while self.is_offlining() || self.unmerging.load(Relaxed) {
            if self.settled.wait_interruptible(&mut state) {
                return Err(ERESTARTSYS);
            }
        }
        Ok(state)
    }

    /// Goes on.
    fn go_on(&self, state: Guard<'_, State, MutexBackend>) {
        self.offlining.store(false, Relaxed);
        drop(state);
        self.settled.notify_all();
        self.wake();
    }
}

impl Listener for Engine {
    fn going_offline(&self, _pfns: Range<usize>) {
        // Waits for the end of whatever is being done.
        let _state = self.state.lock();
        self.offlining.store(true, Relaxed);
    }

    fn offline(&self, _pfns: Range<usize>) {
        // Whoever looked at a frame of these has done with it when the lock is had. Nodes that were left there
        // are stale, and freed in a while.
        let mut state = self.state.lock();
        state.core.releasing = Some(Released::nothing());
        self.left_chores.store(true, Relaxed);
        self.go_on(state);
    }

    fn stays_online(&self, _pfns: Range<usize>) {
        self.go_on(self.state.lock());
    }
}
