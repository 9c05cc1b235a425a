// SPDX-License-Identifier: GPL-2.0
//! Past defects of KSM: processes that fork, exec and exit during a scan, and very large address spaces.

use std::time::Duration;

use anyhow::{ensure, Context, Result};

use super::tests;
use crate::engine;
use crate::harness::{Module, Outcome, Suite, PASS};
use crate::pageflags::{merged, Span};
use crate::proc;
use crate::region::{Region, PAGE};
use crate::scan;
use crate::sys::{self, Forked};
use crate::worker::{verify_all, Worker};

pub const SUITE: Suite = Suite {
    name: "regress",
    about:
        "defects of KSM's past: processes that fork, exec and exit, and very large address spaces",
    module: Module::Loaded,
    tests: tests![
        ("sole-mm-exits-during-scan-cve-2011-2183", 120, sole_mm),
        ("mm-freed-before-its-lock-is-released", 120, freed_mm),
        (
            "vma-iteration-after-exit-mmap-cve-2023-53614",
            180,
            vma_iteration
        ),
        (
            "fork-hook-on-incomplete-mm-cve-2024-50263",
            180,
            incomplete_fork
        ),
        ("merging-counters-inherited-by-fork", 60, fork_counters),
        ("fork-racing-run-2-leaves-nothing-merged", 180, fork_run_2),
        ("fork-and-exec-storm-during-scan", 180, storm),
        ("sparse-32-tib-area-with-one-page", 120, sparse),
        ("twenty-thousand-small-vmas", 240, many_vmas),
    ],
};

const N: usize = 32;

/// Start the thread at full pace without registering this process, unlike `scan::start`.
fn start_unanchored() -> Result<()> {
    engine::write("pages_to_scan", 1_000_000)?;
    engine::write("sleep_millisecs", 1)?;
    engine::write("run", 1)
}

/// Check that the thread still merges.
fn still_merges() -> Result<()> {
    let mut pair = [Worker::mergeable(N, 9000)?, Worker::mergeable(N, 9000)?];
    scan::until_merged(N as u64, N as u64)?;
    verify_all(&mut pair)?;
    drop(pair);
    scan::until_merged(0, 0)
}

/// CVE-2011-2183: when the mm under the scan cursor was the only one and
/// exited, the scan went on with the head of the list as if it were an mm.
/// Needs a scan under way, one registered mm, and its exit; seen as an oops of
/// the thread, or as a thread that merges nothing any more.
fn sole_mm() -> Outcome {
    for i in 0..60 {
        let only = Worker::mergeable(128, 100)?;
        start_unanchored()?;
        std::thread::sleep(Duration::from_micros(i * 300));
        if i % 2 == 0 {
            only.kill()?;
        } else {
            only.exit()?;
        }
    }
    still_merges()?;
    PASS
}

/// The scan dropped its last reference to an exiting mm before it released that mm's `mmap_lock`, which is
/// part of the mm. Needs mms whose last user goes while their pages are scanned; seen as a report of lockdep
/// or KASAN, or as memory that changes under its next owner.
fn freed_mm() -> Outcome {
    let mut keeper = Worker::mergeable(N, 100)?;
    scan::start()?;
    for i in 0..25u64 {
        let workers = (0..3)
            .map(|k| Worker::mergeable(96, 100 + k))
            .collect::<Result<Vec<_>>>()?;
        std::thread::sleep(Duration::from_micros(i * 400));
        for worker in &workers {
            sys::kill(worker.pid() as libc::pid_t, libc::SIGKILL)?;
        }
        drop(workers);
        keeper.verify()?;
    }
    drop(keeper);
    still_merges()?;
    PASS
}

/// Split `region` into VMAs of one page each.
fn cut_up(region: &Region) -> Result<()> {
    for i in (1..region.pages()).step_by(2) {
        region.protect(i, 1, libc::PROT_READ)?;
    }
    Ok(())
}

/// CVE-2023-53614: the scan walked the VMAs of an mm whose tree `exit_mmap` had already torn down. Needs an
/// mm of many VMAs that is killed while the walk is between two of them; seen as a use after free (oops,
/// KASAN), or as metadata that is never freed.
fn vma_iteration() -> Outcome {
    const AREAS: usize = 600;
    let mut region = Region::new(AREAS)?;
    region.fill(0, AREAS, 100, 1);
    cut_up(&region)?;
    region.advise(0, AREAS, libc::MADV_MERGEABLE)?;
    scan::start()?;
    for i in 0..30 {
        let child = Worker::inheriting(&mut region)?;
        std::thread::sleep(Duration::from_micros(i * 700));
        child.kill()?;
        region.verify()?;
    }
    PASS
}

/// CVE-2024-50263: a fork that failed half way still registered the child with KSM, although its VMA tree was
/// incomplete. Needs a fatal signal for the parent in the middle of copying many VMAs; seen as an oops, or as
/// an mm that stays registered.
fn incomplete_fork() -> Outcome {
    const AREAS: usize = 1200;
    let mut region = Region::new(AREAS)?;
    region.fill(0, AREAS, 100, 0);
    cut_up(&region)?;
    region.advise(0, AREAS, libc::MADV_MERGEABLE)?;
    scan::start()?;
    for i in 0..40 {
        match sys::fork()? {
            Forked::Child => loop {
                // Each of these forks copies all VMAs again.
                match sys::fork() {
                    Ok(Forked::Child) | Err(_) => sys::exit_now(0),
                    Ok(Forked::Parent(pid)) => {
                        while !matches!(sys::try_wait(pid), Ok(Some(_)) | Err(_)) {}
                    }
                }
            },
            Forked::Parent(pid) => {
                std::thread::sleep(Duration::from_micros(20_000 + i * 777));
                sys::kill(pid, libc::SIGKILL)?;
                reap(pid)?;
            }
        }
    }
    region.verify()?;
    PASS
}

fn reap(pid: libc::pid_t) -> Result<()> {
    while sys::try_wait(pid)?.is_none() {
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// A child inherited its parent's `ksm_merging_pages` and `ksm_rmap_items` with the copy of the mm, though it
/// has no rmap items. Needs a fork of a process with merged pages and no scan; seen in `ksm_stat` of the
/// child.
fn fork_counters() -> Outcome {
    let mut region = Region::new(2 * N)?;
    region.fill(0, N, 100, 1);
    region.fill(N, N, 100, 1);
    region.advise(0, 2 * N, libc::MADV_MERGEABLE)?;
    scan::until_merged(N as u64, N as u64)?;
    scan::stop()?;
    let me = std::process::id();
    let before = proc::ksm_stat(me, "ksm_merging_pages")?;
    ensure!(before == 2 * N as i64, "parent has {before}");
    let mut child = Worker::inheriting(&mut region)?;
    for key in ["ksm_merging_pages", "ksm_rmap_items"] {
        let value = proc::ksm_stat(child.pid(), key)?;
        ensure!(value == 0, "{key} of the child is {value}");
    }
    ensure!(child.merged()? == 2 * N, "the mapping was not inherited");
    ensure!(proc::ksm_stat(me, "ksm_merging_pages")? == before);
    // It is registered like its parent, so a scan finds its pages.
    scan::until_merged(N as u64, 3 * N as u64)?;
    let found = proc::ksm_stat(child.pid(), "ksm_merging_pages")?;
    ensure!(found == 2 * N as i64, "child has {found} after a scan");
    child.verify()?;
    child.exit()?;
    scan::until_merged(N as u64, N as u64)?;
    ensure!(proc::ksm_stat(me, "ksm_merging_pages")? == before);
    region.verify()?;
    PASS
}

/// A child forked while `run=2` is past its parent, or before it, must not
/// keep a merged page. Needs forks all through the unmerging; seen in the
/// flags of the child's pages.
fn fork_run_2() -> Outcome {
    const PAGES: usize = 256;
    let mut region = Region::new(PAGES)?;
    region.fill(0, PAGES, 100, 0);
    region.advise(0, PAGES, libc::MADV_MERGEABLE)?;
    for i in 0..15u64 {
        scan::until(
            "merged pages",
            12,
            || Ok(engine::read("pages_sharing")? > 0),
        )?;
        let writer = match sys::fork()? {
            Forked::Child => {
                std::thread::sleep(Duration::from_micros(i * 500));
                let ok = engine::write("run", 2).is_ok();
                sys::exit_now(i32::from(!ok))
            }
            Forked::Parent(pid) => pid,
        };
        let mut children = (0..4)
            .map(|_| Worker::inheriting(&mut region))
            .collect::<Result<Vec<_>>>()?;
        reap(writer)?;
        ensure!(engine::read("run")? == 2, "run=2 failed");
        let c = engine::counters()?;
        ensure!((c.shared, c.sharing) == (0, 0), "round {i}: {c:?}");
        for child in &mut children {
            let left = child.merged()?;
            ensure!(left == 0, "round {i}: {left} pages of a child are merged");
            child.verify()?;
        }
        let span = Span {
            pid: std::process::id(),
            addr: region.addr(),
            pages: PAGES,
        };
        ensure!(
            merged(span)? == 0,
            "round {i}: pages of the parent are merged"
        );
        region.verify()?;
    }
    PASS
}

/// Forks and execs of registered processes while the scan runs.
fn storm() -> Outcome {
    let mut keeper = Worker::mergeable(N, 100)?;
    let mut region = Region::new(N)?;
    region.fill(0, N, 100, 1);
    region.advise(0, N, libc::MADV_MERGEABLE)?;
    scan::start()?;
    for i in 0..30u8 {
        let mut child = Worker::inheriting(&mut region)?;
        child.set_memory_merge(true)?;
        child.poke(usize::from(i) % N, 1, 3, i)?;
        child.verify()?;
        if i % 2 == 0 {
            child.exec()?;
        }
        if i % 3 == 0 {
            child.kill()?;
        } else {
            child.exit()?;
        }
    }
    keeper.verify()?;
    region.verify()?;
    scan::until_merged(N as u64, N as u64)?;
    keeper.verify()?;
    PASS
}

/// The CPU time of the thread per pass, over `n` passes.
fn cpu_per_pass(n: u64) -> Result<Duration> {
    let thread = proc::kernel_thread(engine::thread_name())?.context("no scanning thread")?;
    let (time, passes) = (proc::cpu_time(thread)?, engine::read("full_scans")?);
    scan::passes(n)?;
    let passes = engine::read("full_scans")? - passes;
    Ok((proc::cpu_time(thread)? - time) / passes as u32)
}

/// A VMA of 32 TiB with one page in it: a pass must skip empty page tables as a whole. A pass that visited
/// each of the 8 G entries, or even each of the 16 M page tables, would exceed the test's time.
fn sparse() -> Outcome {
    const PAGES: usize = (32 << 40) / PAGE;
    const PASSES: u64 = 20;
    let mut other = Worker::mergeable(1, 100)?;
    scan::passes(3)?;
    let alone = cpu_per_pass(PASSES)?;
    // SAFETY: This is a new mapping at an address that the kernel chooses.
    let at = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            PAGES * PAGE,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    ensure!(at != libc::MAP_FAILED, "no room for 32 TiB");
    let middle = at as usize + PAGES / 2 * PAGE;
    // Only the one page becomes a `Region`, which records each of its pages.
    let mut page = Region::adopt(middle, 1);
    page.fill(0, 1, 100, 0);
    // SAFETY: The advice changes no content.
    let ret = unsafe { libc::madvise(at, PAGES * PAGE, libc::MADV_MERGEABLE) };
    ensure!(ret == 0, "madvise: {}", std::io::Error::last_os_error());
    scan::until_merged(1, 1)?;
    // Time that the host does not give the guest counts as used.
    let mut with_area = Duration::MAX;
    for _ in 0..5 {
        let before = engine::read("pages_scanned")?;
        with_area = with_area.min(cpu_per_pass(PASSES)?);
        let looked_at = engine::read("pages_scanned")? - before;
        println!("a pass: {alone:?} without the area, {with_area:?} with it");
        ensure!(looked_at < 10_000, "looked at {looked_at} pages");
        if with_area < 10 * alone + Duration::from_millis(1) {
            break;
        }
    }
    ensure!(
        with_area < 10 * alone + Duration::from_millis(1),
        "a pass takes {with_area:?} with the area, and {alone:?} without"
    );
    page.verify()?;
    other.verify()?;
    PASS
}

/// 20,000 VMAs of one page each in one process.
fn many_vmas() -> Outcome {
    const AREAS: usize = 20_000;
    let maps = || -> Result<usize> {
        Ok(std::fs::read_to_string("/proc/self/maps")
            .context("maps")?
            .lines()
            .count())
    };
    let mut region = Region::new(AREAS)?;
    region.fill(0, AREAS, 100, 0);
    region.advise(0, AREAS, libc::MADV_MERGEABLE)?;
    cut_up(&region)?;
    ensure!(maps()? >= AREAS, "{} areas only", maps()?);
    scan::until("merging of all but a few", 12, || {
        let c = engine::counters()?;
        Ok(c.shared + c.sharing == AREAS as u64)
    })?;
    region.verify()?;
    region.poke(AREAS / 2, 1, 1);
    region.verify()?;
    PASS
}
