// SPDX-License-Identifier: GPL-2.0
//! Find stuck processes, and count what the engine does.

use std::fs;
use std::path::Path;
use std::sync::atomic::Ordering;

use rksm_test_lib::engine::{read_from, RKSM};

use crate::arena::Arena;
use crate::plan::Op;
use crate::raw;

/// After how many looks a step counts as stuck on a kernel that is not slow: five minutes at least. Looks
/// count rather than seconds, as they become rarer on a busy machine.
const LOOKS: u32 = 12_000;

/// Finds processes that stay in one step for too long.
pub struct Watch(Vec<(u64, u32)>);

impl Watch {
    pub fn new(arena: &Arena) -> Self {
        Self(vec![(0, 0); arena.blocks.len()])
    }

    /// Look once. Return the stuck processes, with their kernel stacks.
    pub fn look(&mut self, arena: &Arena, slow: u64) -> Vec<String> {
        let mut stuck = Vec::new();
        for (i, (block, (last, looks))) in arena.blocks.iter().zip(&mut self.0).enumerate() {
            let since = block.since.load(Ordering::Relaxed);
            let pid = block.pid.load(Ordering::Relaxed);
            // It has not begun yet, or waits for its parent.
            let Some(op) = block.current().filter(|_| block.in_use() && pid != 0) else {
                *looks = 0;
                continue;
            };
            if since != *last {
                (*last, *looks) = (since, 0);
            }
            *looks += 1;
            if u64::from(*looks) > u64::from(LOOKS) * slow {
                stuck.push(format!(
                    "owner {i} (pid {pid}) is in {} for {} ms\n{}# its last steps: {}",
                    op.name(),
                    raw::now().saturating_sub(since),
                    whereabouts(pid),
                    block.last_steps(8)
                ));
            }
        }
        stuck
    }
}

/// Return where in the kernel a task is.
pub fn whereabouts(pid: u32) -> String {
    let mut text = String::new();
    for file in ["comm", "wchan", "syscall", "stack"] {
        let told =
            fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_else(|e| format!("({e})"));
        for line in told.lines() {
            text += &format!("#   {file}: {line}\n");
        }
    }
    text
}

/// The total increments of the engine's counters, which start again with the module.
#[derive(Default)]
pub struct Sums {
    last: [u64; 4],
    pub sharing: u64,
    pub zero: u64,
    pub passes: u64,
    pub scanned: u64,
    pub most: u64,
}

impl Sums {
    pub fn sample(&mut self) {
        let files = [
            "pages_sharing",
            "ksm_zero_pages",
            "full_scans",
            "pages_scanned",
        ];
        let now = files.map(|f| read_from(Path::new(RKSM), f).unwrap_or(0));
        let sums = [
            &mut self.sharing,
            &mut self.zero,
            &mut self.passes,
            &mut self.scanned,
        ];
        for ((sum, now), last) in sums.into_iter().zip(now).zip(self.last) {
            // The counter may have decreased, or have been reset.
            *sum += now.saturating_sub(last);
        }
        // These two only increase, so after a reset all of the present value is new.
        for (sum, at) in [(&mut self.passes, 2), (&mut self.scanned, 3)] {
            if now[at] < self.last[at] {
                *sum += now[at];
            }
        }
        self.most = self.most.max(now[0]);
        self.last = now;
    }

    pub fn line(&self, arena: &Arena, split: i64) -> String {
        format!(
            "# merged at least {} times (and {} pages of zeroes), at most {} pages sharing at once; \
             {split} merged pages split by writes; {} passes, {} pages scanned; {} reloads\n",
            self.sharing,
            self.zero,
            self.most,
            self.passes,
            self.scanned,
            arena.done(Op::Load)
        )
    }
}
