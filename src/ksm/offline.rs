// SPDX-License-Identifier: GPL-2.0

//! Memory hotplug: what the engine does when memory goes offline.
//!
//! From "going offline" until "offline" or "stays online", nothing is scanned or merged, and no run=2 begins.
//! Faults, and all else that the kernel does with merged pages, are not affected. It would be safe to look at
//! nodes, see [`crate::sys::memory_notifier`]. But each look takes a reference on a page, or its lock. Either
//! makes the page's migration fail, and offlining starts over as long as pages are left.
//!
//! The mutex is not held for all that time, as the kernel has to go on. The flag `offlining` stands for it. The
//! kernel does not wait for a run=2 that is under way, either. That one holds the mutex only at times, and
//! continues to its end. Pages that it has touched are migrated in the next attempt.

use super::{index::Released, state::State, Engine};
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
    /// Whether memory is going offline. The answer holds only while `state` is locked.
    pub(super) fn is_offlining(&self) -> bool {
        self.offlining.load(Relaxed)
    }

    /// Locks `state` when neither memory is going offline nor pages are being unmerged. For writers to sysfs
    /// that look at nodes or pages. May sleep.
    ///
    /// `ERESTARTSYS` if a signal arrives first.
    pub(super) fn lock_idle(&self) -> Result<Guard<'_, State, MutexBackend>> {
        let mut state = self.state.lock();
        while self.is_offlining() || self.unmerging.load(Relaxed) {
            if self.settled.wait_interruptible(&mut state) {
                return Err(ERESTARTSYS);
            }
        }
        Ok(state)
    }

    /// Ends the state "going offline": lets waiting writers continue, and wakes the scan.
    fn go_on(&self, state: Guard<'_, State, MutexBackend>) {
        self.offlining.store(false, Relaxed);
        drop(state);
        self.settled.notify_all();
        self.wake();
    }
}

impl Listener for Engine {
    fn going_offline(&self, _pfns: Range<usize>) {
        // Wait for the end of the current step. The next one sees the flag.
        let _state = self.state.lock();
        self.offlining.store(true, Relaxed);
    }

    fn offline(&self, _pfns: Range<usize>) {
        // With the lock held, no look at a page frame in this range is under way any more. Nodes that still
        // refer to one are stale, and are freed soon.
        let mut state = self.state.lock();
        state.core.releasing = Some(Released::nothing());
        self.has_new_work.store(true, Relaxed);
        self.go_on(state);
    }

    fn stays_online(&self, _pfns: Range<usize>) {
        self.go_on(self.state.lock());
    }
}
