// SPDX-License-Identifier: GPL-2.0
//! Control tasks, which run beside the workers. Each task is a process of its own, with a sequence of its
//! own.

pub mod hotplug;
pub mod knobs;
pub mod pressure;

use std::io;
use std::time::Duration;

use anyhow::Result;
use rand::Rng;
use rand_chacha::ChaCha8Rng;

use crate::arena::Arena;
use crate::plan::{Allowed, Op, Who};
use crate::raw;

/// The number of the first task, above those of the workers.
pub const FIRST: u32 = 1000;

/// The context of a task.
pub struct Control {
    pub arena: &'static Arena,
    pub rng: ChaCha8Rng,
    pub allowed: Allowed,
    pub who: Who,
}

impl Control {
    pub fn new(arena: &'static Arena, who: Who, allowed: Allowed) -> Self {
        Self {
            arena,
            rng: who.rng(),
            allowed,
            who,
        }
    }

    pub fn stopping(&self) -> bool {
        self.arena.stopping()
    }

    /// Sleep for a random number of milliseconds in `range`, but not beyond the end. Stand still when all do.
    pub fn pause(&mut self, range: std::ops::Range<u64>) {
        let end = raw::now() + self.rng.random_range(range);
        self.stand_still();
        while raw::now() < end && !self.stopping() {
            std::thread::sleep(Duration::from_millis(5.min(end.saturating_sub(raw::now()))));
            self.stand_still();
        }
    }

    /// Sleep in the middle of an action.
    pub fn pause_briefly(&mut self, range: std::ops::Range<u64>) {
        std::thread::sleep(Duration::from_millis(self.rng.random_range(range)));
    }

    /// Stand still as long as all do.
    pub fn stand_still(&self) {
        let task = (self.who.number - FIRST) as usize;
        while let Some(stand) = self.arena.stand() {
            self.arena.note_task_stand(task, Some(stand));
            std::thread::sleep(Duration::from_millis(2));
        }
        self.arena.note_task_stand(task, None);
    }

    /// Do `work` if it is allowed, and count its result. `None` if it is not allowed.
    pub fn attempt(&mut self, op: Op, work: impl FnOnce() -> io::Result<()>) -> Option<bool> {
        if !self.allowed.has(op) {
            return None;
        }
        let result = work();
        let errno = match &result {
            Ok(()) => 0,
            Err(e) => e.raw_os_error().unwrap_or(libc::EIO),
        };
        self.arena.count(op, errno);
        if op != Op::ReadKnobs {
            self.arena.event(op, errno, raw::now());
        }
        Some(errno == 0)
    }
}

/// A task: its name, the operations that it counts, and its work, which continues until the round stops. The
/// run fails if the work fails.
pub struct Task {
    pub name: &'static str,
    pub ops: &'static [Op],
    pub work: fn(&mut Control) -> Result<()>,
    /// The reason why it is not possible on this machine.
    pub absent: fn() -> Option<&'static str>,
}

pub fn always() -> Option<&'static str> {
    None
}

/// Return why there is no swap. The controller has switched it on if there is any.
fn no_swap() -> Option<&'static str> {
    let swaps = std::fs::read_to_string("/proc/swaps").unwrap_or_default();
    (!swaps.contains("zram")).then_some("no zram to swap to")
}

pub const TASKS: &[Task] = &[
    Task {
        name: "knobs",
        ops: &[Op::Knob, Op::BadKnob, Op::ReadKnobs],
        work: knobs::flip,
        absent: always,
    },
    Task {
        name: "run",
        ops: &[Op::Run0, Op::Run1, Op::Run2],
        work: knobs::run,
        absent: always,
    },
    Task {
        name: "reload",
        ops: &[Op::Unload, Op::Load],
        work: knobs::reload,
        absent: always,
    },
    Task {
        name: "reclaim",
        ops: &[Op::Reclaim],
        work: pressure::reclaim,
        absent: pressure::no_groups,
    },
    Task {
        name: "compact",
        ops: &[Op::Compact],
        work: pressure::compact,
        absent: pressure::no_compaction,
    },
    Task {
        name: "drop-caches",
        ops: &[Op::DropCaches],
        work: pressure::drop_caches,
        absent: always,
    },
    Task {
        name: "swap",
        ops: &[Op::SwapOff, Op::SwapOn],
        work: pressure::swap,
        absent: no_swap,
    },
    Task {
        name: "oom",
        ops: &[Op::Oom],
        work: pressure::oom,
        absent: pressure::no_groups,
    },
    Task {
        name: "cpu",
        ops: &[Op::CpuOff, Op::CpuOn],
        work: hotplug::cpu,
        absent: hotplug::no_cpu,
    },
    Task {
        name: "memory",
        ops: &[Op::MemOff, Op::MemOn],
        work: hotplug::memory,
        absent: hotplug::no_memory,
    },
];
