// SPDX-License-Identifier: GPL-2.0

//! What the engine does when memory is taken offline.
//!
//! From "going offline" until it is known how that ended, nothing is scanned, merged or unmerged.
//! (Faults, and whatever else the kernel does with merged pages, go on.) Looking at nodes would be safe:
//! their pages have a `struct page` at least until [`Listener::offline`] returns, and that waits for
//! whoever is at it. But each look takes a reference or the lock of a page, either of which makes the
//! page's migration fail, and offlining starts over as long as pages are left.
//!
//! The mutex is not held all that time, since it is the kernel that has to go on; a flag stands for it
//! meanwhile.

use super::{Core, Engine, State};
use crate::mm::hotplug::Listener;
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

    /// Locks `state` at a time when no memory is going offline, for those who look at nodes or pages
    /// because somebody asked for it. `ERESTARTSYS`: a signal came first.
    pub(super) fn lock_settled(&self) -> Result<Guard<'_, State, MutexBackend>> {
        let mut state = self.state.lock();
        while self.is_offlining() {
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
    fn going_offline(&self, _frames: Range<usize>) {
        // Waits for the end of whatever is being done.
        let _state = self.state.lock();
        self.offlining.store(true, Relaxed);
    }

    fn offline(&self, frames: Range<usize>) {
        let mut state = self.state.lock();
        state.core.release_frames(&frames);
        self.publish_stats(&state);
        self.go_on(state);
    }

    fn stays_online(&self, _frames: Range<usize>) {
        self.go_on(self.state.lock());
    }
}

impl Core {
    /// Frees all nodes whose pages were in `frames`, which are offline. All pages in use were migrated away,
    /// and their nodes with them, so what is left is stale.
    fn release_frames(&mut self, frames: &Range<usize>) {
        let mut next = self.index.next_node(None);
        while let Some(key) = next {
            next = self.index.next_node(Some(key));
            self.release_in(key, frames);
        }
        let mut next = self.index.next_full(None);
        while let Some(key) = next {
            next = self.index.next_full(Some(key));
            self.release_in(key, frames);
        }
        let mut next = self.index.next_limbo(None);
        while let Some(key) = next {
            next = self.index.next_limbo(Some(key));
            self.release_in(key, frames);
        }
    }

    fn release_in(&mut self, key: super::StableKey, frames: &Range<usize>) {
        if self
            .index
            .node(key)
            .is_some_and(|node| frames.contains(&node.frame()))
        {
            self.release(key);
        }
        crate::mm::cond_resched();
    }
}
