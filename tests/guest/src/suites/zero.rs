// SPDX-License-Identifier: GPL-2.0
//! `use_zero_pages`: pages of zeroes and the kernel's zero page.

use std::time::Duration;

use anyhow::{ensure, Result};

use super::tests;
use crate::engine::{self, refused, wait_for};
use crate::harness::{Module, Outcome, Suite, PASS};
use crate::pageflags::{merged, zeroes};
use crate::proc::ksm_stat;
use crate::region::{Region, PAGE};
use crate::scan;
use crate::worker::Worker;

pub const SUITE: Suite = Suite {
    name: "zero",
    about: "pages of zeroes become the kernel's zero page, and are counted",
    module: Module::Loaded,
    tests: tests![
        ("counted-and-gone", 60, counted),
        ("written-to", 60, written),
        ("single-page", 60, single),
        ("off-by-default", 60, off),
        ("switched-on-while-one-waits", 60, switched_on),
        ("switched-off-again", 60, switched_off),
        ("one-byte-is-not-zero", 60, one_byte),
        ("nearly-zero-pages-that-change", 60, nearly_zero),
        ("madv-unmergeable", 60, unmergeable),
        ("run-2", 60, run_2),
        ("inherited-by-fork", 60, forked),
        ("unmapped-and-exited", 60, gone),
        ("read-fault-is-not-counted", 60, read_fault),
        ("values-and-errors", 30, values),
    ],
};

const N: usize = 32;

/// Start a worker with `n` pages of zeroes that were written, so they are its own.
fn with_zeroes(n: usize) -> Result<Worker> {
    let mut worker = Worker::with_pages(n)?;
    worker.fill(0, n, 0, 0)?;
    worker.advise(0, n, libc::MADV_MERGEABLE)?;
    Ok(worker)
}

/// Scan until `n` pages are counted as zero pages.
fn until_zero(n: usize) -> Result<()> {
    scan::until(&format!("{n} zero pages"), 12, || {
        Ok(engine::read("ksm_zero_pages")? == n as u64)
    })
}

/// Check the count of all zero pages, and that of a process.
fn ensure_count(all: usize, worker: &Worker, own: usize) -> Result<()> {
    let have = engine::read("ksm_zero_pages")?;
    ensure!(have == all as u64, "{have} zero pages, not {all}");
    let have = ksm_stat(worker.pid(), "ksm_zero_pages")?;
    ensure!(
        have == own as i64,
        "{have} zero pages of its own, not {own}"
    );
    Ok(())
}

fn counted() -> Outcome {
    engine::write("use_zero_pages", 1)?;
    let mut worker = with_zeroes(N)?;
    ensure!(zeroes(worker.span())? == 0, "not written");
    until_zero(N)?;
    ensure_count(N, &worker, N)?;
    ensure!(zeroes(worker.span())? == N && worker.merged()? == 0);
    // Another pass finds nothing to do there.
    scan::passes(2)?;
    let c = engine::counters()?;
    ensure!(
        (c.shared, c.sharing, c.unshared, c.volatile) == (0, 0, 0, 0),
        "{c:?}"
    );
    ensure!(ksm_stat(worker.pid(), "ksm_merging_pages")? == 0);
    ensure!(ksm_stat(worker.pid(), "ksm_process_profit")? > (N * PAGE / 2) as i64);
    worker.verify()?;
    PASS
}

fn written() -> Outcome {
    engine::write("use_zero_pages", 1)?;
    let mut worker = with_zeroes(N)?;
    until_zero(N)?;
    worker.poke(3, 1, 17, 1)?;
    ensure_count(N - 1, &worker, N - 1)?;
    worker.verify()?;
    // Write the whole page, with zeroes again.
    worker.fill(3, 1, 0, 0)?;
    until_zero(N)?;
    worker.fill(0, N, 100, 1)?;
    ensure_count(0, &worker, 0)?;
    worker.verify()?;
    PASS
}

fn single() -> Outcome {
    engine::write("use_zero_pages", 1)?;
    let mut worker = with_zeroes(1)?;
    until_zero(1)?;
    worker.verify()?;
    PASS
}

fn off() -> Outcome {
    ensure!(engine::read("use_zero_pages")? == 0);
    let mut worker = with_zeroes(N)?;
    scan::until_merged(1, N as u64 - 1)?;
    ensure_count(0, &worker, 0)?;
    // Merged pages stay merged.
    engine::write("use_zero_pages", 1)?;
    scan::passes(3)?;
    ensure_count(0, &worker, 0)?;
    let mut other = with_zeroes(N)?;
    until_zero(N)?;
    ensure_count(N, &other, N)?;
    ensure!(worker.merged()? == N);
    worker.verify()?;
    other.verify()?;
    PASS
}

fn switched_on() -> Outcome {
    let mut worker = with_zeroes(1)?;
    let mut other = Worker::mergeable(N, 100)?;
    scan::passes(4)?;
    ensure_count(0, &worker, 0)?;
    engine::write("use_zero_pages", 1)?;
    until_zero(1)?;
    worker.verify()?;
    other.verify()?;
    PASS
}

fn switched_off() -> Outcome {
    engine::write("use_zero_pages", 1)?;
    let mut worker = with_zeroes(N)?;
    until_zero(N)?;
    engine::write("use_zero_pages", 0)?;
    let mut other = with_zeroes(N)?;
    scan::until_merged(1, N as u64 - 1)?;
    ensure_count(N, &worker, N)?;
    ensure_count(N, &other, 0)?;
    worker.verify()?;
    other.verify()?;
    PASS
}

fn one_byte() -> Outcome {
    engine::write("use_zero_pages", 1)?;
    let offsets = [0, 1, 63, 64, 255, 1023, 2048, 3000, 4031, 4094, 4095];
    let mut worker = Worker::with_pages(offsets.len())?;
    worker.fill(0, offsets.len(), 0, 0)?;
    for (i, offset) in offsets.into_iter().enumerate() {
        worker.poke(i, 1, offset, 1)?;
    }
    worker.advise(0, offsets.len(), libc::MADV_MERGEABLE)?;
    scan::passes(4)?;
    ensure_count(0, &worker, 0)?;
    ensure!(zeroes(worker.span())? == 0);
    worker.verify()?;
    PASS
}

/// Pages differ from zeroes in one byte, mostly outside the sample, and that byte changes.
fn nearly_zero() -> Outcome {
    let mark = |worker: &mut Worker, value: u8| {
        (0..N).try_for_each(|i| worker.poke(i, 1, 16 + 100 * i, value))
    };
    for on in [1, 0] {
        engine::write("use_zero_pages", on)?;
        let mut changing = with_zeroes(N)?;
        mark(&mut changing, 1)?;
        scan::passes(10)?;
        ensure!(changing.merged()? + zeroes(changing.span())? == 0);
        mark(&mut changing, 2)?;
        scan::passes(4)?;
        let mut other = with_zeroes(N)?;
        mark(&mut other, 2)?;
        scan::until(&format!("merging with use_zero_pages {on}"), 24, || {
            Ok(changing.merged()? == N && other.merged()? == N)
        })?;
        changing.verify()?;
        other.verify()?;
    }
    PASS
}

fn unmergeable() -> Outcome {
    engine::write("use_zero_pages", 1)?;
    let mut worker = with_zeroes(N)?;
    until_zero(N)?;
    scan::stop()?;
    worker.advise(0, N / 2, libc::MADV_UNMERGEABLE)?;
    ensure_count(N / 2, &worker, N / 2)?;
    ensure!(
        zeroes(worker.span())? == N / 2,
        "half of it has no pages of its own"
    );
    worker.advise(N / 2, N / 2, libc::MADV_UNMERGEABLE)?;
    ensure_count(0, &worker, 0)?;
    ensure!(zeroes(worker.span())? == 0);
    worker.verify()?;
    PASS
}

fn run_2() -> Outcome {
    engine::write("use_zero_pages", 1)?;
    let mut worker = with_zeroes(N)?;
    until_zero(N)?;
    engine::write("run", 2)?;
    ensure_count(0, &worker, 0)?;
    ensure!(zeroes(worker.span())? == 0);
    worker.verify()?;
    until_zero(N)?;
    worker.verify()?;
    PASS
}

/// Wait until `count` zero pages of an exited process are left. If the thread was scanning its address space,
/// that is torn down a little later.
fn until_count(count: usize) -> Result<()> {
    wait_for("zero pages to go", Duration::from_secs(5), || {
        Ok(engine::read("ksm_zero_pages")? == count as u64)
    })
}

fn forked() -> Outcome {
    engine::write("use_zero_pages", 1)?;
    let mut region = Region::new(N)?;
    region.fill(0, N, 0, 0);
    region.advise(0, N, libc::MADV_MERGEABLE)?;
    until_zero(N)?;
    let mut child = Worker::inheriting(&mut region)?;
    ensure_count(2 * N, &child, N)?;
    child.poke(0, 4, 0, 9)?;
    ensure_count(2 * N - 4, &child, N - 4)?;
    child.verify()?;
    region.verify()?;
    scan::passes(2)?;
    ensure_count(2 * N - 4, &child, N - 4)?;
    child.exit()?;
    until_count(N)?;
    region.verify()?;
    PASS
}

fn gone() -> Outcome {
    engine::write("use_zero_pages", 1)?;
    let mut worker = with_zeroes(N)?;
    until_zero(N)?;
    worker.dontneed(0, 4)?;
    ensure_count(N - 4, &worker, N - 4)?;
    // Moving the VMA unmerges its pages.
    worker.relocate()?;
    until_zero(N - 4)?;
    ensure_count(N - 4, &worker, N - 4)?;
    worker.truncate(8)?;
    ensure_count(4, &worker, 4)?;
    worker.verify()?;
    worker.exit()?;
    until_count(0)?;
    PASS
}

fn read_fault() -> Outcome {
    engine::write("use_zero_pages", 1)?;
    let region = Region::new(N)?;
    region.advise(0, N, libc::MADV_MERGEABLE)?;
    // Reading maps the zero page, without the engine.
    region.verify()?;
    let span = region.span();
    ensure!(zeroes(span)? == N);
    scan::passes(3)?;
    ensure!(engine::read("ksm_zero_pages")? == 0);
    engine::write("run", 2)?;
    ensure!(zeroes(span)? == N && merged(span)? == 0);
    PASS
}

fn values() -> Outcome {
    for (value, reads) in [
        ("1", 1),
        ("0\n", 0),
        ("y", 1),
        ("N", 0),
        ("on", 1),
        ("off", 0),
    ] {
        engine::write("use_zero_pages", value)?;
        let have = engine::read("use_zero_pages")?;
        ensure!(have == reads, "{value:?}: {have}");
    }
    for bad in ["2", "-1", "x", " 1", "\n"] {
        let errno = refused("use_zero_pages", bad)?;
        ensure!(errno == Some(libc::EINVAL), "{bad:?}: {errno:?}");
    }
    PASS
}
