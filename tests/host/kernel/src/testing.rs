// SPDX-License-Identifier: GPL-2.0

//! What tests can observe of the kernel, and how to make it fail. All state is per thread, and so per test.

use crate::{
    alloc::{AllocError, Flags},
    bindings::mm_struct,
    mm::Mm,
};
use std::{
    cell::Cell,
    mem::ManuallyDrop,
    sync::atomic::{AtomicIsize, Ordering},
};

/// Which allocations fail.
#[derive(Clone, Copy, Debug)]
pub enum Plan {
    /// None.
    Never,
    /// All.
    Always,
    /// Only the one after this number of others.
    Nth(usize),
    /// All after this number.
    After(usize),
    /// A percentage, by chance.
    Percent {
        /// The probability.
        percent: u64,
        /// The seed of the random choice.
        seed: u64,
    },
}

/// What happened on this thread since it started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Events {
    /// Allocations that succeeded.
    pub allocs: usize,
    /// Allocations that were allowed to sleep, successful or not.
    pub sleeping: usize,
    /// Allocations that were to be charged to a memory cgroup, successful or not.
    pub accounted: usize,
    /// Allocations that failed.
    pub failed: usize,
    /// Allocations that were freed.
    pub frees: usize,
    /// References taken on address spaces.
    pub mm_gets: usize,
    /// References on address spaces dropped.
    pub mm_drops: usize,
}

/// What is allocated on this thread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Live {
    /// The number of allocations.
    pub allocations: usize,
    /// Their total size.
    pub bytes: usize,
}

thread_local! {
    static PLAN: Cell<Plan> = const { Cell::new(Plan::Never) };
    static EVENTS: Cell<Events> = const { Cell::new(Events {
        allocs: 0, sleeping: 0, accounted: 0, failed: 0, frees: 0, mm_gets: 0, mm_drops: 0,
    }) };
    static LIVE: Cell<Live> = const { Cell::new(Live { allocations: 0, bytes: 0 }) };
}

thread_local! {
    static ERRORS: Cell<usize> = const { Cell::new(0) };
}

/// Return how many errors were logged on this thread.
pub fn errors() -> usize {
    ERRORS.get()
}

/// Note an error that was logged.
pub fn note_error(text: &str) {
    eprint!("rksm: {text}");
    ERRORS.set(ERRORS.get() + 1);
}

/// Return what is allocated now.
pub fn live() -> Live {
    LIVE.get()
}

/// Run `f`. Return its result and what happened meanwhile.
pub fn watch<R>(f: impl FnOnce() -> R) -> (R, Events) {
    let before = EVENTS.get();
    let result = f();
    let after = EVENTS.get();
    let events = Events {
        allocs: after.allocs - before.allocs,
        sleeping: after.sleeping - before.sleeping,
        accounted: after.accounted - before.accounted,
        failed: after.failed - before.failed,
        frees: after.frees - before.frees,
        mm_gets: after.mm_gets - before.mm_gets,
        mm_drops: after.mm_drops - before.mm_drops,
    };
    (result, events)
}

/// Run `f` while allocations fail by `plan`. That ends with `f`, even if it panics.
pub fn failing<R>(plan: Plan, f: impl FnOnce() -> R) -> R {
    struct Restore(Plan);
    impl Drop for Restore {
        fn drop(&mut self) {
            PLAN.set(self.0);
        }
    }

    let _restore = Restore(PLAN.replace(plan));
    f()
}

impl Plan {
    /// Return whether the next allocation fails, and the plan for the one after it.
    fn step(self) -> (bool, Self) {
        match self {
            Plan::Never => (false, self),
            Plan::Always => (true, self),
            Plan::Nth(0) => (true, Plan::Never),
            Plan::Nth(n) => (false, Plan::Nth(n - 1)),
            Plan::After(0) => (true, self),
            Plan::After(n) => (false, Plan::After(n - 1)),
            Plan::Percent { percent, seed } => {
                let mut random = Random::new(seed);
                let fails = random.below(100) < percent;
                (
                    fails,
                    Plan::Percent {
                        percent,
                        seed: random.state,
                    },
                )
            }
        }
    }
}

fn note(change: impl FnOnce(&mut Events)) {
    let mut events = EVENTS.get();
    change(&mut events);
    EVENTS.set(events);
}

pub(crate) fn note_mm_get() {
    note(|events| events.mm_gets += 1);
}

pub(crate) fn note_mm_drop() {
    note(|events| events.mm_drops += 1);
}

pub(crate) fn allocate(old: usize, new: usize, max: usize, flags: Flags) -> Result<(), AllocError> {
    if new == 0 {
        free(old);
        return Ok(());
    }
    let (fails, plan) = PLAN.get().step();
    PLAN.set(plan);
    note(|events| {
        events.sleeping += usize::from(flags.may_sleep());
        events.accounted += usize::from(flags.is_accounted());
    });
    if fails || new > max {
        note(|events| events.failed += 1);
        return Err(AllocError);
    }
    note(|events| events.allocs += 1);
    let live = LIVE.get();
    LIVE.set(Live {
        allocations: live.allocations + 1,
        bytes: live.bytes + new,
    });
    free(old);
    Ok(())
}

pub(crate) fn free(bytes: usize) {
    if bytes == 0 {
        return;
    }
    note(|events| events.frees += 1);
    let live = LIVE.get();
    must(
        live.allocations > 0 && live.bytes >= bytes,
        "more freed than was allocated, or on another thread",
    );
    LIVE.set(Live {
        allocations: live.allocations.saturating_sub(1),
        bytes: live.bytes.saturating_sub(bytes),
    });
}

/// Fail the test unless `cond` holds, also in a destructor, but not while the test already fails.
pub(crate) fn must(cond: bool, what: &str) {
    if !std::thread::panicking() {
        assert!(cond, "{what}");
    }
}

/// Random numbers, the same for the same seed.
#[derive(Clone, Debug)]
pub struct Random {
    state: u64,
}

impl Random {
    /// Start from `seed`.
    pub fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    /// Return any number.
    pub fn draw(&mut self) -> u64 {
        // The SplitMix64 generator.
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Return a number below `limit`, which is not 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.draw() % limit
    }
}

/// An address space that a test made and has one reference on.
///
/// Dropping it fails the test if other references are left.
pub struct TestMm {
    mm: ManuallyDrop<std::boxed::Box<mm_struct>>,
}

impl TestMm {
    /// Create an address space with one reference.
    #[allow(clippy::new_without_default)]
    pub fn new() -> Self {
        let mm = mm_struct {
            mm_count: AtomicIsize::new(1),
        };
        Self {
            mm: ManuallyDrop::new(std::boxed::Box::new(mm)),
        }
    }

    /// The address space as the kernel's code sees it.
    pub fn mm(&self) -> &Mm {
        // SAFETY: The object is not freed while `self` is borrowed.
        unsafe { Mm::from_raw(&**self.mm) }
    }

    /// The number of other references.
    pub fn references(&self) -> isize {
        self.mm.mm_count.load(Ordering::Relaxed) - 1
    }
}

impl Drop for TestMm {
    fn drop(&mut self) {
        // Other references may still be used, so leave the memory alone.
        must(self.references() == 0, "references on an mm were leaked");
        if self.references() == 0 {
            // SAFETY: The object is not used any more, neither here nor, without references, elsewhere.
            unsafe { ManuallyDrop::drop(&mut self.mm) }
        }
    }
}
