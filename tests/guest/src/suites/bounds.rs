// SPDX-License-Identifier: GPL-2.0
//! Bounds on the work under one hold of `mmap_lock`, or for one page, whatever a process does. Trace events
//! count it, not a clock.

use std::fs;
use std::path::PathBuf;

use anyhow::{ensure, Context, Result};
use io_uring::IoUring;

use super::tests;
use crate::harness::{skip, Module, Outcome, Suite, PASS};
use crate::region::{Region, PAGE};
use crate::scan::{self, Stepper};
use crate::worker::Worker;
use crate::{engine, proc, tracefs};

pub const SUITE: Suite = Suite {
    name: "bounds",
    about: "no process can make the engine hold mmap_lock, or work on one page, for long",
    module: Module::Loaded,
    tests: tests![
        ("areas-that-are-not-mergeable", 120, areas),
        ("four-tib-of-empty-page-tables", 180, page_tables),
        ("empty-area-of-64-tib", 120, empty),
        ("unmerging-lets-others-in", 120, unmerging),
        ("locked-and-pinned-pages", 120, pinned),
        ("pages-that-are-always-rewritten", 120, rewritten),
    ],
};

const OURS: &str = "the in-tree engine has no such bound";
const NO_EVENT: &str = "the kernel has no trace event mmap_lock_released";

/// A counter of how often one task releases the `mmap_lock` of any process.
struct Holds(PathBuf);

impl Holds {
    const EVENT: &str = "events/mmap_lock/mmap_lock_released";

    fn of(pid: u32) -> Result<Option<Self>> {
        let dir = tracefs::mounted()?;
        if !dir.join(Self::EVENT).exists() {
            return Ok(None);
        }
        let holds = Self(dir);
        holds.write("set_event_pid", &pid.to_string())?;
        holds.write("buffer_size_kb", "8192")?;
        holds.write("trace", "")?;
        holds.write(&format!("{}/enable", Self::EVENT), "1")?;
        Ok(Some(holds))
    }

    fn of_engine() -> Result<Option<Self>> {
        let name = engine::thread_name();
        Self::of(proc::kernel_thread(name)?.with_context(|| format!("no {name}"))?)
    }

    fn write(&self, file: &str, what: &str) -> Result<()> {
        fs::write(self.0.join(file), what).with_context(|| format!("{file} in tracefs"))
    }

    fn count(&self) -> Result<usize> {
        let text = fs::read_to_string(self.0.join("trace"))?;
        Ok(text.matches(": mmap_lock_released: ").count())
    }
}

impl Drop for Holds {
    fn drop(&mut self) {
        let _ = self.write(&format!("{}/enable", Self::EVENT), "0");
        let _ = self.write("set_event_pid", "");
    }
}

/// Return an upper bound of the holds per pass: those of `passes` whole passes and the partial ones around
/// them, divided by `passes`.
fn holds_per_pass(holds: &Holds) -> Result<usize> {
    scan::stop()?;
    holds.write("trace", "")?;
    let before = engine::read("full_scans")?;
    scan::passes(2)?;
    scan::stop()?;
    let passes = (engine::read("full_scans")? - before - 1) as usize;
    let count = holds.count()?;
    println!("{count} holds of mmap_lock in {passes} passes or more");
    Ok(count / passes)
}

fn areas() -> Outcome {
    const AREAS: usize = 20_000;
    if engine::is_in_tree() {
        return skip(OURS);
    }
    let mut region = Region::new(AREAS + 2)?;
    region.fill(AREAS, 2, 100, 0);
    for i in (1..AREAS).step_by(2) {
        region.protect(i, 1, libc::PROT_READ)?;
    }
    region.advise(AREAS, 2, libc::MADV_MERGEABLE)?;
    scan::until_merged(1, 1)?;
    let Some(holds) = Holds::of_engine()? else {
        return skip(NO_EVENT);
    };
    let count = holds_per_pass(&holds)?;
    ensure!(count >= AREAS / 512, "{count} holds for {AREAS} areas");
    region.verify_range(AREAS, 2)?;
    PASS
}

/// Reserve address space that is mergeable and has no huge pages.
fn reserve(bytes: usize) -> Result<usize> {
    // SAFETY: This is a new mapping at an address that the kernel chooses.
    let at = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    ensure!(at != libc::MAP_FAILED, "no room for {bytes} bytes");
    for advice in [libc::MADV_NOHUGEPAGE, libc::MADV_MERGEABLE] {
        // SAFETY: The advice changes no content.
        let ret = unsafe { libc::madvise(at, bytes, advice) };
        ensure!(ret == 0, "madvise: {}", std::io::Error::last_os_error());
    }
    Ok(at as usize)
}

fn page_tables() -> Outcome {
    const GIB: usize = 1 << 30;
    const COUNT: usize = 4096;
    if engine::is_in_tree() {
        return skip(OURS);
    }
    let at = reserve(COUNT * GIB)?;
    for nth in 0..COUNT {
        let page = (at + nth * GIB) as *mut u8;
        // SAFETY: The page lies in the mapping above, and no reference into it exists.
        let ret = unsafe {
            page.write_volatile(1);
            libc::madvise(page.cast(), PAGE, libc::MADV_DONTNEED)
        };
        ensure!(ret == 0, "madvise: {}", std::io::Error::last_os_error());
    }
    let Some(holds) = Holds::of_engine()? else {
        return skip(NO_EVENT);
    };
    let count = holds_per_pass(&holds)?;
    ensure!(count >= COUNT / 16, "{count} holds for {COUNT} GiB");
    PASS
}

fn empty() -> Outcome {
    const TIB: usize = 1 << 40;
    if engine::is_in_tree() {
        return skip(OURS);
    }
    let at = reserve(64 * TIB)?;
    // A VMA without a page has no anon_vma, and the engine skips it.
    // SAFETY: The page lies in the mapping above, and no reference into it exists.
    unsafe { (at as *mut u8).write_volatile(1) };
    let Some(holds) = Holds::of_engine()? else {
        return skip(NO_EVENT);
    };
    let count = holds_per_pass(&holds)?;
    // As few as the bound allows: empty ranges cost next to nothing.
    ensure!((8..64).contains(&count), "{count} holds for 64 TiB");
    PASS
}

fn unmerging() -> Outcome {
    const N: usize = 2048;
    if engine::is_in_tree() {
        return skip(OURS);
    }
    let mut region = Region::new(N)?;
    region.fill(0, N, 100, 0);
    region.advise(0, N, libc::MADV_MERGEABLE)?;
    scan::until("merge of all pages", 12, || {
        let c = engine::counters()?;
        Ok(c.shared + c.sharing == N as u64)
    })?;
    scan::stop()?;
    let Some(holds) = Holds::of(std::process::id())? else {
        return skip(NO_EVENT);
    };
    engine::write("run", 2)?;
    let count = holds.count()?;
    drop(holds);
    println!("{count} holds of mmap_lock for {N} pages");
    ensure!(count >= N / 64, "{count} holds for {N} pages");
    engine::check_clean().or_else(|_| engine::write("run", 0))?;
    ensure!(engine::counters()?.shared == 0, "{:?}", engine::counters()?);
    region.verify()?;
    PASS
}

/// Pages that are equal, but pinned, so none of them can merge.
fn pinned() -> Outcome {
    const N: usize = 1024;
    if engine::is_in_tree() {
        return skip(OURS);
    }
    // The test is about the cost of a look, not about how often it occurs.
    engine::write("smart_scan", 0)?;
    let mut region = Region::new(N)?;
    region.advise(0, N, libc::MADV_NOHUGEPAGE)?;
    region.fill(0, N, 100, 0);
    let ring = match IoUring::new(4) {
        Ok(ring) => ring,
        Err(e) => return skip(format!("no io_uring: {e}")),
    };
    region.register(&ring)?;
    // SAFETY: The range is our own mapping; its content does not change.
    let ret = unsafe { libc::mlock(region.addr() as *const libc::c_void, N * PAGE) };
    ensure!(ret == 0, "mlock: {}", std::io::Error::last_os_error());
    region.advise(0, N, libc::MADV_MERGEABLE)?;
    scan::passes(4)?;
    let Some(holds) = Holds::of_engine()? else {
        return skip(NO_EVENT);
    };
    let count = holds_per_pass(&holds)?;
    ensure!(count >= N / 16, "{count} holds for {N} pages");
    // The engine tries each of them a few times, not over and over.
    ensure!(count <= 8 * N, "{count} holds for {N} pages");
    drop(holds);
    let merged = engine::read("pages_sharing")?;
    ensure!(merged == 0, "{merged} merged while held");
    region.verify()?;
    ring.submitter().unregister_buffers()?;
    // The limit of mappings per page makes it more than one merged page.
    scan::until("merge of all pages", 12, || {
        let c = engine::counters()?;
        Ok(c.shared + c.sharing == N as u64)
    })?;
    region.verify()?;
    PASS
}

/// Pages that change in every pass cost one look each, and no more.
fn rewritten() -> Outcome {
    const N: usize = 4096;
    const ROUNDS: u64 = 6;
    if engine::is_in_tree() {
        return skip(OURS);
    }
    let mut worker = Worker::with_pages(N)?;
    worker.advise(0, N, libc::MADV_NOHUGEPAGE)?;
    worker.fill(0, N, 1, 1)?;
    worker.advise(0, N, libc::MADV_MERGEABLE)?;
    let mut stepper = Stepper::new(1_000_000)?;
    stepper.step()?;
    let Some(holds) = Holds::of_engine()? else {
        return skip(NO_EVENT);
    };
    let before = engine::counters()?;
    for round in 1..=ROUNDS {
        // Equal pages, so there would be something to merge.
        worker.fill(0, N, 10_000 * round, 0)?;
        stepper.step()?;
    }
    let count = holds.count()?;
    let c = engine::counters()?;
    println!("{count} holds in {ROUNDS} passes over {N} pages; {c:?}");
    let looks = ROUNDS as usize * N / 512;
    ensure!(
        c.scanned - before.scanned >= ROUNDS * N as u64,
        "{before:?} {c:?}"
    );
    ensure!((looks..4 * looks + 64).contains(&count), "{count} holds");
    ensure!(c.shared == 0, "{c:?}");
    drop(holds);
    worker.verify()?;
    PASS
}
