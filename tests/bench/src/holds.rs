// SPDX-License-Identifier: GPL-2.0
//! The durations of the engine thread's lock holds, in instructions of its own.

use std::collections::{HashMap, HashSet};

/// The largest size of the kernel's array of `struct page`, in which the page-table locks lie.
const VMEMMAP_SIZE: u64 = 1 << 50;

/// The longest hold of one kind of lock.
#[derive(Clone, Copy, Default)]
pub struct Longest {
    pub count: u64,
    pub max: u64,
    /// The function that took the lock in that hold.
    pub caller: u64,
}

struct Held {
    since: u64,
    caller: u64,
    kind: &'static str,
}

#[derive(Default)]
pub struct Holds {
    /// Instructions of other tasks, and of interrupts, so far.
    others: u64,
    /// When the engine's thread was interrupted or switched out; `None` while it runs.
    stopped: Option<u64>,
    is_engine: bool,
    /// The nesting depth of interrupts of the engine's thread.
    depth: u32,
    mmap_locks: HashSet<u64>,
    held: HashMap<u64, Held>,
    longest: HashMap<&'static str, Longest>,
}

impl Holds {
    pub fn know_mmap_lock(&mut self, lock: u64) {
        self.mmap_locks.insert(lock);
    }

    /// Switch to the engine's thread or to another task at `now`.
    pub fn run(&mut self, now: u64, engine: bool) {
        self.is_engine = engine;
        self.update(now);
    }

    pub fn interrupt(&mut self, now: u64) {
        self.depth += 1;
        self.update(now);
    }

    pub fn interrupt_over(&mut self, now: u64) {
        self.depth = self.depth.saturating_sub(1);
        self.update(now);
    }

    fn update(&mut self, now: u64) {
        let own = self.is_engine && self.depth == 0;
        match (own, self.stopped) {
            (true, Some(since)) => {
                self.others += now - since;
                self.stopped = None;
            }
            (false, None) => self.stopped = Some(now),
            _ => {}
        }
    }

    /// Return the thread's own instructions up to `now`.
    fn own(&self, now: u64) -> u64 {
        self.stopped.unwrap_or(now) - self.others
    }

    fn kind(&self, lock: u64, vmemmap: u64) -> Option<&'static str> {
        if (vmemmap..vmemmap.saturating_add(VMEMMAP_SIZE)).contains(&lock) {
            Some("ptl")
        } else {
            self.mmap_locks.contains(&lock).then_some("mmap_lock")
        }
    }

    pub fn lock(&mut self, now: u64, lock: u64, vmemmap: u64, caller: u64) {
        if self.depth > 0 {
            return;
        }
        if let Some(kind) = self.kind(lock, vmemmap) {
            let since = self.own(now);
            let held = Held {
                since,
                caller,
                kind,
            };
            self.held.insert(lock, held);
        }
    }

    pub fn unlock(&mut self, now: u64, lock: u64) {
        if self.depth > 0 {
            return;
        }
        let Some(held) = self.held.remove(&lock) else {
            return;
        };
        let time = self.own(now) - held.since;
        let longest = self.longest.entry(held.kind).or_default();
        longest.count += 1;
        if time > longest.max {
            longest.max = time;
            longest.caller = held.caller;
        }
    }

    /// Take the results since the last call.
    pub fn take(&mut self) -> HashMap<&'static str, Longest> {
        std::mem::take(&mut self.longest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VMEMMAP: u64 = 0xffea_0000_0000_0000;
    const PTL: u64 = VMEMMAP + 0x1028;
    const MMAP: u64 = 0xff11_0000_0000_0198;

    fn running() -> Holds {
        let mut holds = Holds::default();
        holds.know_mmap_lock(MMAP);
        holds.run(0, false);
        holds.run(100, true);
        holds
    }

    #[test]
    fn the_longest_hold_of_each_kind() {
        let mut holds = running();
        holds.lock(110, MMAP, VMEMMAP, 1);
        for (from, to) in [(120, 130), (140, 190), (200, 205)] {
            holds.lock(from, PTL, VMEMMAP, from);
            holds.unlock(to, PTL);
        }
        holds.unlock(300, MMAP);
        let longest = holds.take();
        let ptl = longest["ptl"];
        assert_eq!((ptl.count, ptl.max, ptl.caller), (3, 50, 140));
        assert_eq!(longest["mmap_lock"].max, 190);
        assert!(holds.take().is_empty());
    }

    #[test]
    fn other_locks_do_not_count() {
        let mut holds = running();
        holds.lock(110, MMAP + 0x1000, VMEMMAP, 1);
        holds.unlock(120, MMAP + 0x1000);
        assert!(holds.take().is_empty());
    }

    #[test]
    fn interrupts_and_other_tasks_do_not_count() {
        let mut holds = running();
        holds.lock(110, MMAP, VMEMMAP, 1);
        holds.interrupt(120);
        // Locks of the interrupt do not count for the thread.
        holds.lock(121, PTL, VMEMMAP, 1);
        holds.unlock(150, PTL);
        // The interrupt ends with a switch to another task, and returns much later.
        holds.run(160, false);
        holds.run(1000, true);
        holds.interrupt_over(1010);
        holds.unlock(1020, MMAP);
        let longest = holds.take();
        assert_eq!(longest["mmap_lock"].max, 20);
        assert!(!longest.contains_key("ptl"));
    }

    #[test]
    fn an_unlock_without_a_lock_is_ignored() {
        let mut holds = running();
        holds.unlock(110, PTL);
        assert!(holds.take().is_empty());
    }
}
