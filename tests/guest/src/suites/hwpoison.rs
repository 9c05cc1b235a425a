// SPDX-License-Identifier: GPL-2.0
//! Merged pages in memory that fails, or is about to fail.

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{ensure, Context, Result};

use super::tests;
use crate::background::Background;
use crate::engine::{self, wait_for};
use crate::harness::{skip, Module, Outcome, Suite, PASS};
use crate::pageflags::{frames, merged_frames, Span};
use crate::region::{Region, PAGE};
use crate::scan;
use crate::sys::{self, Ended};
use crate::worker::{verify_all, Worker};

pub const SUITE: Suite = Suite {
    name: "hwpoison",
    about: "merged pages in broken memory: soft-offlined, poisoned, and their processes killed",
    module: Module::Loaded,
    tests: tests![
        ("soft-offline", 90, soft_offline),
        ("soft-offline-while-merging", 120, soft_offline_scanning),
        ("poisoned-page-kills-who-touches-it", 90, poison),
        ("poisoned-page-kills-early-if-asked", 90, kill_early),
        ("who-has-it-no-more-lives", 90, relatives),
        ("poisoned-by-a-sharer", 90, madvise),
        ("poisoned-then-unmerged", 90, unmerged),
        ("poisoned-page-takes-no-other", 90, no_target),
        ("poisoned-while-scanning", 90, scanned),
    ],
};

const N: usize = 24;
const NO_POISON: &str = "the kernel cannot inject memory failures (hwpoison_inject)";
const INJECT: &str = "/sys/kernel/debug/hwpoison";
const SOFT_OFFLINE: &str = "/sys/devices/system/memory/soft_offline_page";
const EARLY_KILL: &str = "/proc/sys/vm/memory_failure_early_kill";

/// Injects memory failures, in software only, and undoes them when dropped.
struct Injector {
    broken: BTreeSet<u64>,
}

impl Injector {
    fn new() -> Result<Option<Self>> {
        let _ = Command::new("modprobe")
            .arg("hwpoison-inject")
            .stderr(Stdio::null())
            .status();
        // Also in processes that are started from now on.
        sys::default_action(libc::SIGBUS).context("SIGBUS")?;
        Ok(Path::new(INJECT).exists().then_some(Self {
            broken: BTreeSet::new(),
        }))
    }

    fn poison(&mut self, pfn: u64) -> Result<()> {
        self.broken.insert(pfn);
        fs::write(format!("{INJECT}/corrupt-pfn"), pfn.to_string()).context("corrupt-pfn")
    }

    /// Soft-offline the page frame `pfn`.
    fn soft_offline(&mut self, pfn: u64) -> std::io::Result<()> {
        let result = fs::write(SOFT_OFFLINE, format!("{:#x}", pfn * 4096));
        if result.is_ok() {
            self.broken.insert(pfn);
        }
        result
    }
}

impl Drop for Injector {
    fn drop(&mut self) {
        let _ = fs::write(EARLY_KILL, "0");
        for pfn in &self.broken {
            // A frame that the kernel has freed already need not be unpoisoned.
            let _ = fs::write(format!("{INJECT}/unpoison-pfn"), pfn.to_string());
        }
    }
}

fn pair() -> Result<[Worker; 2]> {
    let workers = [Worker::mergeable(N, 100)?, Worker::mergeable(N, 100)?];
    scan::until_merged(N as u64, N as u64)?;
    Ok(workers)
}

/// Return the frame of page `i` of a worker, which must be merged.
fn frame(worker: &Worker, i: usize) -> Result<u64> {
    merged_frames(worker.span())?[i].with_context(|| format!("page {i} is not merged"))
}

fn soft_offline() -> Outcome {
    let Some(mut injector) = Injector::new()? else {
        return skip(NO_POISON);
    };
    let mut workers = pair()?;
    scan::stop()?;
    let counters = engine::counters()?;
    for i in [0, 3, N - 1] {
        let before = frame(&workers[0], i)?;
        injector.soft_offline(before).context("soft_offline_page")?;
        let after = frame(&workers[0], i)?;
        ensure!(after != before, "page {i} did not move");
        ensure!(frame(&workers[1], i)? == after, "page {i} is in two frames");
        verify_all(&mut workers)?;
    }
    ensure!(engine::counters()? == counters);
    // A process that maps the page soft-offlines it by madvise.
    let before = frame(&workers[0], 5)?;
    injector.broken.insert(before);
    workers[0].advise(5, 1, libc::MADV_SOFT_OFFLINE)?;
    ensure!(frame(&workers[0], 5)? != before && frame(&workers[1], 5)? == frame(&workers[0], 5)?);
    verify_all(&mut workers)?;
    scan::passes(2)?;
    scan::until_merged(N as u64, N as u64)?;
    workers[0].poke(0, N, 3, 3)?;
    verify_all(&mut workers)?;
    PASS
}

fn soft_offline_scanning() -> Outcome {
    let Some(mut injector) = Injector::new()? else {
        return skip(NO_POISON);
    };
    let mut workers = pair()?;
    let mut gone = 0;
    for round in 0..10u64 {
        for worker in &mut workers {
            worker.fill(0, N / 2, 1000 + 100 * round, 1)?;
        }
        scan::start()?;
        for i in 0..4 {
            let there = frames(workers[i % 2].span())?;
            let Some(pfn) = there[(round as usize * 5 + i * 7) % N] else {
                continue;
            };
            // The kernel refuses busy pages, which is fine.
            gone += usize::from(injector.soft_offline(pfn).is_ok());
        }
        scan::passes(2)?;
        verify_all(&mut workers)?;
    }
    println!("{gone} pages soft-offlined");
    ensure!(gone > 0, "no page was soft-offlined");
    scan::until_merged(N as u64, N as u64)?;
    verify_all(&mut workers)?;
    PASS
}

/// Check that a process that reads page `i` of `region` is killed.
fn dies_reading(region: &Region, i: usize) -> Result<()> {
    let reader = Background::once(|| region.verify_range(i, 1))?;
    let how = reader.join(Duration::from_secs(20))?;
    ensure!(
        how == Ended::Signal(libc::SIGBUS),
        "reading page {i}: {how:?}"
    );
    Ok(())
}

/// Check all pages of `region` except those in `broken`.
fn verify_but(region: &Region, broken: &[usize]) -> Result<()> {
    (0..region.pages())
        .filter(|i| !broken.contains(i))
        .try_for_each(|i| region.verify_range(i, 1))
}

/// Map and merge two equal halves of this process's own memory.
fn halves() -> Result<Region> {
    let mut region = Region::new(2 * N)?;
    region.fill(0, N, 100, 1);
    region.fill(N, N, 100, 1);
    region.advise(0, 2 * N, libc::MADV_MERGEABLE)?;
    scan::until_merged(N as u64, N as u64)?;
    Ok(region)
}

fn frame_here(region: &Region, i: usize) -> Result<u64> {
    let here = region.span();
    merged_frames(here)?[i].with_context(|| format!("page {i} is not merged"))
}

fn poison() -> Outcome {
    let Some(mut injector) = Injector::new()? else {
        return skip(NO_POISON);
    };
    // Start this first, so that it does not inherit the region.
    let mut late = Worker::with_pages(N)?;
    let mut region = halves()?;
    let broken = [3, N + 3];
    injector.poison(frame_here(&region, 3)?)?;
    verify_but(&region, &broken)?;
    dies_reading(&region, 3)?;
    dies_reading(&region, N + 3)?;
    scan::passes(4)?;
    verify_but(&region, &broken)?;
    scan::until_merged(N as u64 - 1, N as u64 - 1)?;
    // The same with the scan stopped. Equal pages that appear later must not merge with the broken one.
    scan::stop()?;
    injector.poison(frame_here(&region, 7)?)?;
    late.fill(0, N, 100, 1)?;
    late.advise(0, N, libc::MADV_MERGEABLE)?;
    scan::passes(4)?;
    late.verify()?;
    dies_reading(&region, 7)?;
    region.dontneed(3, 1)?;
    region.dontneed(N + 3, 1)?;
    verify_but(&region, &[7, N + 7])?;
    scan::until_merged(N as u64 - 2, 2 * (N as u64 - 2))?;
    late.verify()?;
    PASS
}

/// The kernel finds all processes that map the page, by its stable node.
fn kill_early() -> Outcome {
    let Some(mut injector) = Injector::new()? else {
        return skip(NO_POISON);
    };
    let mut workers = Vec::from(pair()?);
    let mut other = Worker::mergeable(N, 500)?;
    fs::write(EARLY_KILL, "1").context("early kill")?;
    injector.poison(frame(&workers[0], 3)?)?;
    for worker in workers.drain(..) {
        let how = worker.end()?;
        ensure!(
            how == Ended::Signal(libc::SIGBUS),
            "a sharer ended by {how:?}"
        );
    }
    other.verify()?;
    scan::until_merged(0, 0)?;
    PASS
}

/// A process that passed pages on by a fork and has its own since is not killed when the inherited ones fail.
fn relatives() -> Outcome {
    let Some(mut injector) = Injector::new()? else {
        return skip(NO_POISON);
    };
    let mut regions = [Region::new(N)?, Region::new(N)?];
    for region in &mut regions {
        region.fill(0, N, 100, 1);
        region.advise(0, N, libc::MADV_DONTFORK)?;
    }
    let mut heirs = Vec::new();
    for region in &mut regions {
        region.advise(0, N, libc::MADV_DOFORK)?;
        heirs.push(Worker::inheriting(region)?);
        region.advise(0, N, libc::MADV_DONTFORK)?;
        (0..N).for_each(|i| region.poke(i, 1, 7));
    }
    for heir in &mut heirs {
        heir.advise(0, N, libc::MADV_MERGEABLE)?;
    }
    scan::until_merged(N as u64, N as u64)?;
    scan::stop()?;
    fs::write(EARLY_KILL, "1").context("early kill")?;
    injector.poison(frame(&heirs[0], 3)?)?;
    // This process would be killed as well.
    for heir in heirs {
        let how = heir.end()?;
        ensure!(
            how == Ended::Signal(libc::SIGBUS),
            "a sharer ended by {how:?}"
        );
    }
    regions.iter().try_for_each(Region::verify)?;
    PASS
}

fn madvise() -> Outcome {
    let Some(mut injector) = Injector::new()? else {
        return skip(NO_POISON);
    };
    let mut workers = Vec::from(pair()?);
    injector.broken.insert(frame(&workers[0], 3)?);
    // The process that asks is killed. The other one loses its page, too, but is only killed when it touches
    // it.
    ensure!(workers[0].advise(3, 1, libc::MADV_HWPOISON).is_err());
    let how = workers.remove(0).end()?;
    ensure!(
        how == Ended::Signal(libc::SIGBUS),
        "the process that asked ended by {how:?}"
    );
    scan::passes(3)?;
    workers[0].verify_range(0, 3)?;
    workers[0].verify_range(4, N - 4)?;
    ensure!(workers[0].verify().is_err());
    let how = workers.remove(0).end()?;
    ensure!(
        how == Ended::Signal(libc::SIGBUS),
        "the other process ended by {how:?}"
    );
    scan::until_merged(0, 0)?;
    PASS
}

fn unmerged() -> Outcome {
    let Some(mut injector) = Injector::new()? else {
        return skip(NO_POISON);
    };
    let region = halves()?;
    scan::stop()?;
    injector.poison(frame_here(&region, 3)?)?;
    engine::write("run", 2)?;
    wait_for("unmerging", Duration::from_secs(10), || {
        let c = engine::counters()?;
        Ok((c.shared, c.sharing) == (0, 0))
    })?;
    verify_but(&region, &[3, N + 3])?;
    dies_reading(&region, N + 3)?;
    PASS
}

/// A page that is scanned before the processes that had the broken page are scanned again.
fn no_target() -> Outcome {
    let Some(mut injector) = Injector::new()? else {
        return skip(NO_POISON);
    };
    let mut workers = [Worker::with_pages(N)?, Worker::with_pages(N)?];
    // It registers first and so is scanned first. While it is held, it cannot merge.
    let mut late = Region::new(1)?;
    late.fill(0, 1, 100, 1);
    let (output, input) = sys::pipe()?;
    let page = libc::iovec {
        iov_base: late.addr() as *mut libc::c_void,
        iov_len: PAGE,
    };
    // SAFETY: The range is our own mapping; the kernel only takes a reference.
    let n = unsafe { libc::vmsplice(input.as_raw_fd(), &raw const page, 1, 0) };
    ensure!(n == PAGE as isize, "vmsplice gave {n}");
    late.advise(0, 1, libc::MADV_MERGEABLE)?;
    scan::passes(1)?;
    for worker in &mut workers {
        worker.fill(0, N, 100, 1)?;
        worker.advise(0, N, libc::MADV_MERGEABLE)?;
    }
    scan::until_merged(N as u64, N as u64)?;
    scan::passes(2)?;
    scan::stop()?;
    let here = Span {
        pid: std::process::id(),
        addr: late.addr(),
        pages: 1,
    };
    ensure!(merged_frames(here)? == [None], "merged while held");
    let broken = frame(&workers[0], 0)?;
    injector.poison(broken)?;
    drop((output, input));
    for _ in 0..3 {
        scan::passes(1)?;
        ensure!(frames(here)? != [Some(broken)], "mapped to a broken page");
        late.verify()?;
    }
    let rest = N as u64 - 1;
    scan::until_merged(rest, rest)?;
    PASS
}

/// The scan sees merged pages between their marking as broken and their unmapping, for which the kernel must
/// find their mappings.
fn scanned() -> Outcome {
    let Some(mut injector) = Injector::new()? else {
        return skip(NO_POISON);
    };
    const MANY: usize = 300;
    let mut region = Region::new(2 * MANY)?;
    region.fill(0, MANY, 100, 1);
    region.fill(MANY, MANY, 100, 1);
    region.advise(0, 2 * MANY, libc::MADV_MERGEABLE)?;
    scan::until_merged(MANY as u64, MANY as u64)?;
    engine::write("sleep_millisecs", 0)?;
    let broken: Vec<usize> = (0..MANY - 4).collect();
    for &i in &broken {
        injector
            .poison(frame_here(&region, i)?)
            .with_context(|| format!("page {i}"))?;
    }
    let both: Vec<usize> = broken.iter().flat_map(|&i| [i, i + MANY]).collect();
    verify_but(&region, &both)?;
    dies_reading(&region, 3)?;
    scan::until_merged(4, 4)?;
    verify_but(&region, &both)?;
    PASS
}
