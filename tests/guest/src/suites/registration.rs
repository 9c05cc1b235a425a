// SPDX-License-Identifier: GPL-2.0
//! Which processes take part in merging.

use anyhow::{ensure, Result};

use super::tests;
use crate::harness::{Module, Outcome, Suite, PASS};
use crate::region::Region;
use crate::scan;
use crate::worker::{verify_all, Worker};

pub const SUITE: Suite = Suite {
    name: "registration",
    about: "madvise, prctl, fork and exec bring processes in",
    module: Module::Loaded,
    tests: tests![
        ("madvise-before-filling", 60, madvise_before),
        ("madvise-while-scanning", 60, madvise_scanning),
        ("prctl-before-mapping", 60, prctl_before),
        ("prctl-after-filling", 60, prctl_after),
        ("prctl-inherited-over-fork", 60, prctl_fork),
        ("prctl-inherited-over-exec", 60, prctl_exec),
        ("madvise-inherited-over-fork", 60, madvise_fork),
        ("madvise-ends-with-exec", 60, madvise_exec),
        ("prctl-off-in-a-child-leaves-its-parent", 60, child_off),
        ("unregistered-and-registered-again", 60, again),
        ("twenty-processes", 90, twenty),
    ],
};

const N: usize = 16;

/// Start a partner for workers that hold the content of seeds 100 and up.
fn partner() -> Result<Worker> {
    Worker::mergeable(N, 100)
}

/// Check that `worker` and `partner` merge completely.
fn expect_merge(worker: &mut Worker, partner: &mut Worker) -> Result<()> {
    scan::until("both merged", 12, || {
        Ok(worker.merged()? == N && partner.merged()? == N)
    })?;
    worker.verify()?;
    partner.verify()
}

fn madvise_before() -> Outcome {
    let mut worker = Worker::with_pages(N)?;
    worker.advise(0, N, libc::MADV_MERGEABLE)?;
    scan::passes(2)?;
    worker.fill(0, N, 100, 1)?;
    expect_merge(&mut worker, &mut partner()?)?;
    PASS
}

fn madvise_scanning() -> Outcome {
    let mut worker = Worker::with_pages(N)?;
    worker.fill(0, N, 100, 1)?;
    let mut partner = partner()?;
    scan::passes(2)?;
    worker.advise(0, N, libc::MADV_MERGEABLE)?;
    expect_merge(&mut worker, &mut partner)?;
    PASS
}

fn prctl_before() -> Outcome {
    let mut worker = Worker::new()?;
    worker.set_memory_merge(true)?;
    ensure!(worker.memory_merge()?);
    worker.map(N)?;
    worker.fill(0, N, 100, 1)?;
    expect_merge(&mut worker, &mut partner()?)?;
    PASS
}

fn prctl_after() -> Outcome {
    let mut worker = Worker::with_pages(N)?;
    worker.fill(0, N, 100, 1)?;
    worker.set_memory_merge(true)?;
    expect_merge(&mut worker, &mut partner()?)?;
    PASS
}

fn prctl_fork() -> Outcome {
    crate::sys::set_memory_merge(true)?;
    let mut child = Worker::with_pages(N)?;
    ensure!(child.memory_merge()?, "the child did not inherit it");
    child.fill(0, N, 100, 1)?;
    let mut partner = partner()?;
    expect_merge(&mut child, &mut partner)?;
    PASS
}

fn prctl_exec() -> Outcome {
    let mut worker = Worker::new()?;
    worker.set_memory_merge(true)?;
    worker.exec()?;
    ensure!(worker.memory_merge()?, "the new program did not inherit it");
    worker.map(N)?;
    worker.fill(0, N, 100, 1)?;
    expect_merge(&mut worker, &mut partner()?)?;
    // The new program's own memory took part, and the program still works.
    worker.set_memory_merge(false)?;
    worker.exit()?;
    PASS
}

fn madvise_fork() -> Outcome {
    let mut region = Region::new(N)?;
    region.advise(0, N, libc::MADV_MERGEABLE)?;
    let mut child = Worker::inheriting(&mut region)?;
    child.fill(0, N, 100, 1)?;
    expect_merge(&mut child, &mut partner()?)?;
    PASS
}

fn madvise_exec() -> Outcome {
    let mut worker = partner()?;
    let mut partner = partner()?;
    scan::until_merged(N as u64, N as u64)?;
    // The old memory is gone, and the new program is not registered.
    worker.exec()?;
    worker.map(N)?;
    worker.fill(0, N, 100, 1)?;
    scan::passes(4)?;
    ensure!(worker.merged()? == 0);
    partner.verify()?;
    worker.verify()?;
    PASS
}

fn child_off() -> Outcome {
    let mut parent = Region::new(N)?;
    crate::sys::set_memory_merge(true)?;
    parent.fill(0, N, 100, 1);
    let mut partner = partner()?;
    let span = parent.span();
    scan::until("merged", 12, || Ok(crate::pageflags::merged(span)? == N))?;
    let mut child = Worker::inheriting(&mut parent)?;
    child.set_memory_merge(false)?;
    ensure!(child.merged()? == 0);
    ensure!(crate::pageflags::merged(span)? == N);
    ensure!(crate::sys::memory_merge()?);
    child.verify()?;
    parent.verify()?;
    partner.verify()?;
    PASS
}

fn again() -> Outcome {
    let mut workers = [partner()?, partner()?];
    for _ in 0..3 {
        scan::until_merged(N as u64, N as u64)?;
        workers[0].advise(0, N, libc::MADV_UNMERGEABLE)?;
        // Long enough for the engine to notice that the process is gone.
        scan::passes(2)?;
        ensure!(workers[0].merged()? == 0);
        workers[0].advise(0, N, libc::MADV_MERGEABLE)?;
    }
    scan::until_merged(N as u64, N as u64)?;
    verify_all(&mut workers)?;
    PASS
}

fn twenty() -> Outcome {
    let mut workers = (0..20).map(|_| partner()).collect::<Result<Vec<_>>>()?;
    scan::until_merged(N as u64, 19 * N as u64)?;
    verify_all(&mut workers)?;
    // Half of them exit one after the other during the scan.
    for worker in workers.drain(..10) {
        worker.exit()?;
    }
    scan::until_merged(N as u64, 9 * N as u64)?;
    verify_all(&mut workers)?;
    PASS
}
