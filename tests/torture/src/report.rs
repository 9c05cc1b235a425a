// SPDX-License-Identifier: GPL-2.0
//! The results of a run, as KTAP.

use crate::arena::{Arena, ERRNOS};
use crate::plan::{Allowed, Op};
use crate::raw;

/// Results, one line each.
pub struct Ktap {
    number: usize,
    failed: usize,
}

impl Ktap {
    pub fn begin(plan: usize) -> Self {
        raw::say(&format!("KTAP version 1\n1..{plan}\n"));
        Self {
            number: 0,
            failed: 0,
        }
    }

    pub fn result(&mut self, name: &str, outcome: &Result<(), String>) {
        self.number += 1;
        let n = self.number;
        raw::say(&match outcome {
            Ok(()) => format!("ok {n} {name}\n"),
            Err(why) => {
                self.failed += 1;
                format!("# {name}: {why}\nnot ok {n} {name}\n")
            }
        });
    }

    pub fn skip(&mut self, name: &str, why: &str) {
        self.number += 1;
        raw::say(&format!("ok {} {name} # SKIP {why}\n", self.number));
    }

    pub fn all_well(&self) -> bool {
        self.failed == 0
    }
}

/// Return the counts of each operation: done, and refused with which errno.
pub fn table(arena: &Arena) -> String {
    let mut text = format!(
        "# {:16} {:>10} {:>10}  refused with\n",
        "operation", "done", "refused"
    );
    let mut total = 0;
    for &op in Op::ALL {
        let sum = arena.tried(op) - arena.done(op);
        total += arena.tried(op);
        text += &format!(
            "# {:16} {:>10} {sum:>10}  {}\n",
            op.name(),
            arena.done(op),
            refusals(arena, op)
        );
    }
    text + &format!("# {total} operations, {} pages verified\n", verified(arena))
}

pub fn verified(arena: &Arena) -> u64 {
    arena.verified.load(std::sync::atomic::Ordering::Relaxed)
}

fn errno_name(errno: usize) -> String {
    let name = match errno as i32 {
        libc::EPERM => "EPERM",
        libc::ENOENT => "ENOENT",
        libc::ESRCH => "ESRCH",
        libc::EINTR => "EINTR",
        libc::EIO => "EIO",
        libc::EAGAIN => "EAGAIN",
        libc::ENOMEM => "ENOMEM",
        libc::EACCES => "EACCES",
        libc::EFAULT => "EFAULT",
        libc::EBUSY => "EBUSY",
        libc::ENODEV => "ENODEV",
        libc::EINVAL => "EINVAL",
        libc::ERANGE => "ERANGE",
        _ => return format!("errno {errno}"),
    };
    name.to_string()
}

/// How often an operation must be expected before its absence is a failure.
const EXPECTED: f64 = 10.0;
/// At least one in this many forked children execs. More of them exit or are killed.
const EXEC_OF_FORKS: f64 = 8.0;

/// After this many steps of workers, each operation must have been done. An idle machine takes more in a
/// minute.
const STEPS: u64 = 5_000;

/// Return the steps of all workers and children.
fn steps(arena: &Arena) -> u64 {
    let of_workers = Op::ALL.iter().filter(|op| op.weight() > 0);
    of_workers.map(|&op| arena.tried(op)).sum()
}

/// Return whether the run was too short, or the kernel too slow, for each operation to be done.
pub fn hurried(arena: &Arena) -> bool {
    steps(arena) < STEPS
}

/// Return how often a worker's operation is expected in a run with this number of steps. Control tasks go by
/// the clock.
fn expected(arena: &Arena, op: Op) -> Option<f64> {
    match op {
        Op::ChildExit | Op::ChildExec | Op::ChildKilled => {
            Some(arena.done(Op::Fork) as f64 / EXEC_OF_FORKS)
        }
        op if op.weight() > 0 => {
            let weights: u32 = Op::ALL.iter().map(|op| op.weight()).sum();
            Some(steps(arena) as f64 * f64::from(op.weight()) / f64::from(weights))
        }
        _ => None,
    }
}

/// Return how often an operation was refused, and with which errno; empty if never.
fn refusals(arena: &Arena, op: Op) -> String {
    let told: Vec<String> = (1..ERRNOS)
        .map(|errno| (errno, arena.counted(op, errno)))
        .filter(|&(_, n)| n > 0)
        .map(|(errno, n)| format!("{}: {n}", errno_name(errno)))
        .collect();
    told.join(", ")
}

/// Report one line for each operation: it was really done. In a [`hurried`] run, rare operations of control
/// tasks, and those that are mostly refused, may be absent.
pub fn operations(ktap: &mut Ktap, arena: &Arena, allowed: Allowed, absent: &[(Op, &str)]) {
    let hurried = hurried(arena);
    for &op in Op::ALL {
        let name = format!("done-{}", op.name());
        let why = absent.iter().find(|(o, _)| *o == op);
        if !allowed.has(op) {
            ktap.skip(&name, "left out by OPS= or NOT=");
        } else if let Some((_, why)) = why {
            ktap.skip(&name, why);
        } else if arena.done(op) > 0 {
            ktap.result(&name, &Ok(()));
        } else if let Some(times) = expected(arena, op).filter(|&times| times < EXPECTED) {
            // A slow kernel does not get that far.
            ktap.skip(&name, &format!("expected {times:.1} times only"));
        } else if hurried && op.weight() == 0 {
            ktap.skip(&name, "never done in so short a run on so slow a kernel");
        } else {
            let refused = refusals(arena, op);
            if hurried && !refused.is_empty() {
                ktap.skip(&name, &format!("only refused in so short a run: {refused}"));
            } else {
                ktap.result(&name, &Err(format!("never done; refused: {refused}")));
            }
        }
    }
}
