// SPDX-License-Identifier: GPL-2.0
//! Finds processes that do not go on, and counts what the engine does.

use std::fs;
use std::path::Path;
use std::sync::atomic::Ordering;

use rksm_test_lib::engine::{read_from, RKSM};

use crate::arena::Arena;
use crate::plan::Op;
use crate::raw;

/// How many looks at it one step may take on a kernel that is not slow: five minutes at least. Looks
/// are counted and not seconds, as they get rarer when the machine is busy with other things.
const LOOKS: u32 = 12_000;

/// Finds those that stay in one step for too long.
pub struct Watch(Vec<(u64, u32)>);

impl Watch {
    pub fn new(arena: &Arena) -> Self {
        Self(vec![(0, 0); arena.blocks.len()])
    }

    /// Has a look; those that are stuck, with where they are.
    pub fn look(&mut self, arena: &Arena, slow: u64) -> Vec<String> {
        let mut stuck = Vec::new();
        for (i, (block, (last, looks))) in arena.blocks.iter().zip(&mut self.0).enumerate() {
            let since = block.since.load(Ordering::Relaxed);
            let pid = block.pid.load(Ordering::Relaxed);
            // Not begun yet, or waiting for its parent.
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

/// Where in the kernel a task is.
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

/// Sums of what the engine's counters, which start anew with the module, went up by.
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
            // Less than before: so many are given up, or it was set back.
            *sum += now.saturating_sub(last);
        }
        // These two only count up, so what there is after they were set back is all new.
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
