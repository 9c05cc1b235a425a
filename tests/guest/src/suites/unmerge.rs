// SPDX-License-Identifier: GPL-2.0
//! Ways to unmerge pages.

use anyhow::{ensure, Result};

use super::tests;
use crate::engine;
use crate::harness::{Module, Outcome, Suite, PASS};
use crate::scan;
use crate::worker::{verify_all, Worker};

pub const SUITE: Suite = Suite {
    name: "unmerge",
    about: "MADV_UNMERGEABLE, prctl and run=2 give every process its own pages",
    module: Module::Loaded,
    tests: tests![
        ("madv-unmergeable", 60, madv),
        ("madv-unmergeable-of-a-part", 60, madv_part),
        ("prctl-off", 60, prctl_off),
        ("run-2", 60, run_2),
        ("run-2-then-1-merges-again", 60, run_2_then_1),
        ("run-2-with-nothing-merged", 60, run_2_idle),
        ("run-0-keeps-merged-pages", 60, run_0),
        ("run-0-then-2", 60, run_0_then_2),
    ],
};

const N: usize = 24;

fn pair() -> Result<[Worker; 2]> {
    let workers = [Worker::mergeable(N, 100)?, Worker::mergeable(N, 100)?];
    scan::until_merged(N as u64, N as u64)?;
    Ok(workers)
}

fn madv() -> Outcome {
    let mut workers = pair()?;
    scan::stop()?;
    workers[0].advise(0, N, libc::MADV_UNMERGEABLE)?;
    ensure!(workers[0].merged()? == 0 && workers[1].merged()? == N);
    verify_all(&mut workers)?;
    // Neither merges again: one is not registered, the other has no equal.
    scan::passes(3)?;
    ensure!(workers[0].merged()? == 0);
    verify_all(&mut workers)?;
    workers[1].poke(0, N, 5, 5)?;
    verify_all(&mut workers)?;
    scan::until_merged(0, 0)?;
    PASS
}

fn madv_part() -> Outcome {
    let mut workers = pair()?;
    workers[0].advise(N / 3, N / 3, libc::MADV_UNMERGEABLE)?;
    ensure!(workers[0].merged()? == N - N / 3);
    verify_all(&mut workers)?;
    workers[0].advise(N / 3, N / 3, libc::MADV_MERGEABLE)?;
    scan::until_merged(N as u64, N as u64)?;
    verify_all(&mut workers)?;
    PASS
}

fn prctl_off() -> Outcome {
    let mut workers = [Worker::new()?, Worker::new()?];
    for worker in &mut workers {
        worker.set_memory_merge(true)?;
        worker.map(N)?;
        worker.fill(0, N, 100, 1)?;
    }
    scan::until("merged by prctl", 12, || {
        Ok(workers[0].merged()? == N && workers[1].merged()? == N)
    })?;
    workers[0].set_memory_merge(false)?;
    ensure!(!workers[0].memory_merge()?);
    ensure!(workers[0].merged()? == 0 && workers[1].merged()? == N);
    verify_all(&mut workers)?;
    scan::passes(3)?;
    ensure!(workers[0].merged()? == 0, "merged although switched off");
    workers[0].set_memory_merge(true)?;
    scan::until("merged again", 12, || Ok(workers[0].merged()? == N))?;
    verify_all(&mut workers)?;
    PASS
}

/// Check that no page is merged and that all counters agree.
fn check_unmerged(workers: &mut [Worker]) -> Result<()> {
    ensure!(engine::read("run")? == 2);
    let c = engine::counters()?;
    ensure!(
        (c.shared, c.sharing, c.unshared, c.volatile) == (0, 0, 0, 0),
        "{c:?}"
    );
    for worker in workers.iter() {
        ensure!(worker.merged()? == 0);
        ensure!(crate::proc::ksm_stat(worker.pid(), "ksm_merging_pages")? == 0);
    }
    verify_all(workers)
}

fn run_2() -> Outcome {
    let mut workers = pair()?;
    engine::write("run", 2)?;
    check_unmerged(&mut workers)?;
    // The count of passes starts again.
    let full_scans = engine::read("full_scans")?;
    ensure!(full_scans == 0, "full_scans reads {full_scans} after run=2");
    std::thread::sleep(std::time::Duration::from_millis(300));
    check_unmerged(&mut workers)?;
    PASS
}

fn run_2_then_1() -> Outcome {
    let mut workers = pair()?;
    for _ in 0..3 {
        engine::write("run", 2)?;
        check_unmerged(&mut workers)?;
        scan::until_merged(N as u64, N as u64)?;
        verify_all(&mut workers)?;
    }
    PASS
}

fn run_2_idle() -> Outcome {
    engine::write("run", 2)?;
    check_unmerged(&mut [])?;
    // A second write of the same value is accepted and does nothing.
    engine::write("run", 2)?;
    PASS
}

fn run_0() -> Outcome {
    let mut workers = pair()?;
    scan::stop()?;
    ensure!(workers[0].merged()? == N && workers[1].merged()? == N);
    let before = engine::counters()?;
    let mut late = Worker::mergeable(N, 100)?;
    std::thread::sleep(std::time::Duration::from_millis(500));
    ensure!(late.merged()? == 0, "merged while stopped");
    ensure!(engine::counters()? == before, "scanned while stopped");
    verify_all(&mut workers)?;
    late.verify()?;
    PASS
}

fn run_0_then_2() -> Outcome {
    let mut workers = pair()?;
    scan::stop()?;
    engine::write("run", 2)?;
    check_unmerged(&mut workers)?;
    PASS
}
