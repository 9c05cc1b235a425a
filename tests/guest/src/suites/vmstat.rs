// SPDX-License-Identifier: GPL-2.0
//! What the core kernel counts of merged pages: rksm's must count like the in-tree engine's.

use std::fs;

use anyhow::{ensure, Context, Result};

use super::tests;
use crate::harness::{Module, Outcome, Suite, PASS};
use crate::worker::{verify_all, Worker};
use crate::{proc, scan};

pub const SUITE: Suite = Suite {
    name: "vmstat",
    about: "vmstat, smaps and ksm_stat count merged pages",
    module: Module::Loaded,
    tests: tests![
        ("cow-ksm", 90, cow),
        ("smaps-ksm", 90, smaps),
        ("ksm-stat", 90, stat),
    ],
};

const N: usize = 32;
const KIB: i64 = 4;

/// Return the sum of `KSM:` over all mappings of a process, in KiB.
fn smaps_ksm(pid: u32) -> Result<i64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps")).context("smaps")?;
    let lines: Vec<_> = text
        .lines()
        .filter_map(|line| line.strip_prefix("KSM:"))
        .collect();
    ensure!(!lines.is_empty(), "no KSM: in smaps");
    lines
        .iter()
        .map(|rest| Ok(rest.trim().trim_end_matches(" kB").parse::<i64>()?))
        .sum()
}

/// Start two processes with the same pages, merge these, and stop the thread.
fn merged() -> Result<[Worker; 2]> {
    let workers = [Worker::mergeable(N, 100)?, Worker::mergeable(N, 100)?];
    scan::until_merged(N as u64, N as u64)?;
    scan::stop()?;
    Ok(workers)
}

fn cow() -> Outcome {
    let mut workers = merged()?;
    let before = proc::vmstat("cow_ksm")?;
    workers[0].poke(0, 5, 0, 0xee)?;
    workers[1].poke(8, 2, 0, 0xdd)?;
    let counted = proc::vmstat("cow_ksm")? - before;
    ensure!(counted == 7, "{counted} counted for 7 pages");
    // Pages that are no longer merged do not count.
    workers[0].poke(0, 5, 8, 0xee)?;
    let counted = proc::vmstat("cow_ksm")? - before;
    ensure!(counted == 7, "{counted} counted after writing again");
    verify_all(&mut workers)?;
    PASS
}

fn smaps() -> Outcome {
    let mut workers = merged()?;
    for worker in &workers {
        let kib = smaps_ksm(worker.pid())?;
        ensure!(kib == N as i64 * KIB, "{kib} KiB merged");
    }
    workers[0].poke(0, 3, 0, 0xee)?;
    let kib = smaps_ksm(workers[0].pid())?;
    ensure!(
        kib == (N as i64 - 3) * KIB,
        "{kib} KiB merged after writing"
    );
    let kib = smaps_ksm(workers[1].pid())?;
    ensure!(kib == N as i64 * KIB, "{kib} KiB merged in the other");
    verify_all(&mut workers)?;
    PASS
}

fn stat() -> Outcome {
    let workers = merged()?;
    for worker in &workers {
        let merging = proc::ksm_stat(worker.pid(), "ksm_merging_pages")?;
        ensure!(merging == N as i64, "{merging} merging pages");
        ensure!(proc::ksm_stat(worker.pid(), "ksm_zero_pages")? == 0);
        ensure!(proc::ksm_stat(worker.pid(), "ksm_rmap_items")? > 0);
        let profit = proc::ksm_stat(worker.pid(), "ksm_process_profit")?;
        let pages = merging * 4096;
        ensure!(profit > 0 && profit < pages, "profit {profit} of {pages}");
    }
    PASS
}
