// SPDX-License-Identifier: GPL-2.0
//! Past defects of KSM: failed allocations, swap, memory that goes offline, huge pages and zero pages.

use std::fs;

use anyhow::{ensure, Context, Result};

use super::tests;
use crate::background::Background;
use crate::cgroup::Group;
use crate::engine;
use crate::harness::{skip, Module, Outcome, Suite, PASS};
use crate::hugepage::{huge_kib, huge_region, huge_region_by, NO_HUGE_PAGE, PARTS};
use crate::inject::{Injection, NO_INJECTION};
use crate::memblock::{Plugged, NO_DIMM};
use crate::pageflags::{frames, merged, swapped, zeroes, Span};
use crate::proc;
use crate::region::{Region, PAGE};
use crate::scan;
use crate::swap::Zram;
use crate::worker::{verify_all, Worker};

pub const SUITE: Suite = Suite {
    name: "regress-memory",
    about: "defects of KSM's past: swap, hot-remove, huge pages, zero pages, failed allocations",
    module: Module::Loaded,
    tests: tests![
        (
            "stable-node-used-after-failed-chain-allocation",
            180,
            failed_chain
        ),
        ("refault-from-swap-cache-during-run-2", 180, refault),
        ("memory-hot-remove-with-stale-nodes", 120, hot_remove),
        ("swap-in-copy-without-memcg-charge", 120, swap_in_charge),
        ("two-parts-of-one-huge-page", 120, two_parts),
        ("zero-page-counters-go-negative", 90, zero_counters),
        ("huge-page-of-zeroes-merges", 120, huge_zero),
    ],
};

const N: usize = 64;
const NO_SWAP: &str = "no zram or no memory cgroups";

/// When there was no memory for the head of a new chain, the lookup continued with the node that should have
/// become its first member. Needs nodes that become full while allocations of the thread fail; seen as an
/// oops, or as a page with more mappings than allowed.
fn failed_chain() -> Outcome {
    const KNOB: &str = "max_page_sharing";
    if !engine::path(engine::dir(), KNOB).exists() {
        return skip("no max_page_sharing");
    }
    let Some(mut injection) = Injection::new()? else {
        return skip(NO_INJECTION);
    };
    engine::write(KNOB, 2)?;
    let mut worker = Worker::with_pages(N)?;
    worker.advise(0, N, libc::MADV_MERGEABLE)?;
    scan::passes(1)?;
    let thread = proc::kernel_thread(engine::thread_name())?.context("no scanning thread")?;
    for round in 0..10 {
        injection.random(thread, 33)?;
        for k in 0..4 {
            worker.fill(k * N / 4, N / 4, 100 + round * 4 + k as u64, 0)?;
        }
        scan::passes(4)?;
        worker.verify()?;
        injection.end_random()?;
        // The files are read one after the other, so nothing may change meanwhile.
        scan::stop()?;
        let c = engine::counters()?;
        ensure!(c.sharing <= c.shared, "two places a page at most: {c:?}");
        worker.poke(0, N, 3, round as u8)?;
        worker.verify()?;
    }
    worker.fill(0, N, 900, 0)?;
    scan::until_merged(N as u64 / 2, N as u64 / 2)?;
    worker.verify()?;
    engine::write("run", 2)?;
    engine::write(KNOB, 256)?;
    PASS
}

/// Start workers with the same pages in a group of their own.
fn in_group(group: &Group, pages: usize) -> Result<Vec<Worker>> {
    (0..2)
        .map(|_| Worker::mergeable_in(group, pages, 100))
        .collect()
}

/// Reclaim from the group until most pages of all workers are swapped out.
fn swap_out(group: &Group, workers: &[Worker]) -> Result<()> {
    let mut counts = Vec::new();
    for _ in 0..20 {
        group.reclaim(8 * workers[0].span().pages * PAGE)?;
        counts = workers
            .iter()
            .map(|w| swapped(w.span()))
            .collect::<Result<Vec<_>>>()?;
        if counts.iter().all(|&n| n > workers[0].span().pages / 2) {
            return Ok(());
        }
    }
    anyhow::bail!("only {counts:?} pages are swapped out");
}

/// After `run=2` had passed an address, a fault mapped a merged page from the swap cache there, still marked
/// as merged. Needs faults from swap all through the unmerging; seen as a page that is merged afterwards.
fn refault() -> Outcome {
    let (Some(_zram), Some(group)) = (Zram::new(64)?, Group::new("regress")?) else {
        return skip(NO_SWAP);
    };
    let mut workers = in_group(&group, 2 * N)?;
    for round in 0..8 {
        scan::until_merged(2 * N as u64, 2 * N as u64)?;
        scan::stop()?;
        swap_out(&group, &workers)?;
        let unmerging = Background::once(|| engine::write("run", 2))?;
        verify_all(&mut workers)?;
        let how = unmerging.join(std::time::Duration::from_secs(40))?;
        ensure!(how == crate::sys::Ended::Exit(0), "run=2: {how:?}");
        for worker in &workers {
            let left = worker.merged()?;
            ensure!(left == 0, "round {round}: {left} pages came back merged");
        }
        let c = engine::counters()?;
        ensure!((c.shared, c.sharing) == (0, 0), "{c:?}");
        verify_all(&mut workers)?;
    }
    PASS
}

/// Memory was removed while nodes still named frames of it, as their pages were free and no scan had noticed.
/// The next lookup read `struct page`s that no longer existed. Needs such nodes and memory that goes offline;
/// seen as an oops or in the counters.
fn hot_remove() -> Outcome {
    let Some(memory) = Plugged::new()? else {
        return skip(NO_DIMM);
    };
    let mut workers = [Worker::mergeable(N, 100)?, Worker::mergeable(N, 100)?];
    scan::until_merged(N as u64, N as u64)?;
    let spans = [workers[0].span(), workers[1].span()];
    ensure!(memory.pages_of(&spans)? == 2 * N, "pages elsewhere");
    scan::stop()?;
    for worker in &mut workers {
        worker.poke(0, N, 7, worker.pid() as u8)?;
    }
    memory.offline()?;
    let c = engine::counters()?;
    ensure!((c.shared, c.sharing) == (0, 0), "stale nodes left: {c:?}");
    for worker in &mut workers {
        worker.fill(0, N, 100, 1)?;
    }
    scan::until_merged(N as u64, N as u64)?;
    verify_all(&mut workers)?;
    PASS
}

/// The copy of a merged page that a fault from swap makes was not charged to any memory cgroup. Needs a
/// merged page with two mappings, both written after it was swapped out; seen in the group's `anon`.
fn swap_in_charge() -> Outcome {
    const PAGES: usize = 2048;
    const SLACK: usize = 400;
    let (Some(_zram), Some(group)) = (Zram::new(64)?, Group::new("regress")?) else {
        return skip(NO_SWAP);
    };
    let anon = || -> Result<usize> { Ok(group.stat("anon")? as usize / PAGE) };
    let mut workers = in_group(&group, PAGES)?;
    scan::until_merged(PAGES as u64, PAGES as u64)?;
    scan::stop()?;
    let before = anon()?;
    swap_out(&group, &workers)?;
    for worker in &mut workers {
        worker.poke(0, PAGES, 1, worker.pid() as u8)?;
    }
    verify_all(&mut workers)?;
    let now = anon()?;
    println!("{before} pages merged, {now} after both wrote all");
    ensure!(
        now + SLACK >= before + PAGES && now <= before + PAGES + SLACK,
        "charged for {now} pages instead of {}",
        before + PAGES
    );
    PASS
}

fn own(region: &Region, first: usize, pages: usize) -> Span {
    Span {
        pid: std::process::id(),
        addr: region.at(first),
        pages,
    }
}

/// Two equal parts of one huge page share one page lock, and after the split the merge had lost one of its
/// two pages. Needs only such a huge page, again and again at full speed; seen as a hang, or as parts that do
/// not merge with each other.
fn two_parts() -> Outcome {
    for round in 0..6usize {
        let Some(mut region) = huge_region(1000)? else {
            return skip(NO_HUGE_PAGE);
        };
        let (a, b) = (round * 7, PARTS - 1 - round * 11);
        region.fill(b, 1, 1000 + a as u64, 0);
        ensure!(huge_kib(&region)? != 0);
        region.advise(0, PARTS, libc::MADV_MERGEABLE)?;
        scan::until_merged(1, 1)?;
        let pair = [frames(own(&region, a, 1))?, frames(own(&region, b, 1))?];
        ensure!(pair[0] == pair[1], "two frames: {pair:?}");
        ensure!(merged(own(&region, 0, PARTS))? == 2);
        region.verify()?;
        region.poke(a, 1, 1);
        region.verify()?;
        region.advise(0, PARTS, libc::MADV_UNMERGEABLE)?;
    }
    PASS
}

/// Unmapping a zero page decremented the counter even if KSM had not placed it. Needs both kinds side by
/// side, dropped, written, and left by an exit; seen in `ksm_zero_pages`, which must not wrap and must match
/// the number of placed ones.
fn zero_counters() -> Outcome {
    const KNOB: &str = "use_zero_pages";
    if !engine::path(engine::dir(), KNOB).exists() {
        return skip("no use_zero_pages");
    }
    engine::write(KNOB, 1)?;
    let mut worker = Worker::with_pages(2 * N)?;
    // Reading maps the zero page in the second half, without the engine.
    worker.fill(0, N, 0, 0)?;
    worker.verify()?;
    worker.advise(0, 2 * N, libc::MADV_MERGEABLE)?;
    let expect = |worker: &Worker, want: usize| -> Result<()> {
        let all = fs::read_to_string(engine::path(engine::dir(), "ksm_zero_pages"))?;
        let own = proc::ksm_stat(worker.pid(), "ksm_zero_pages")?;
        ensure!(
            all.trim() == want.to_string() && own == want as i64,
            "{all:?} zero pages in all, {own} of its own, {want} placed"
        );
        Ok(())
    };
    scan::until("zero pages", 12, || {
        Ok(engine::read("ksm_zero_pages")? == N as u64)
    })?;
    expect(&worker, N)?;
    // The engine did not place these, so dropping or writing them counts nothing.
    scan::stop()?;
    worker.dontneed(N, N / 2)?;
    worker.poke(N + N / 2, N / 2, 1, 1)?;
    expect(&worker, N)?;
    worker.dontneed(0, N / 2)?;
    expect(&worker, N / 2)?;
    // A read maps the plain zero page where a placed one was.
    worker.verify()?;
    worker.dontneed(0, N / 2)?;
    expect(&worker, N / 2)?;
    worker.poke(N / 2, N / 2, 1, 1)?;
    expect(&worker, 0)?;
    worker.verify()?;
    worker.exit()?;
    let all = fs::read_to_string(engine::path(engine::dir(), "ksm_zero_pages"))?;
    ensure!(all.trim() == "0", "{all:?} after the exit");
    engine::write(KNOB, 0)?;
    PASS
}

/// A huge page of zeroes: all its parts are equal, and the split itself may map the zero page for them. No
/// part may keep memory of its own.
fn huge_zero() -> Outcome {
    let Some(mut region) = huge_region_by(0, 0)? else {
        return skip(NO_HUGE_PAGE);
    };
    region.advise(0, PARTS, libc::MADV_MERGEABLE)?;
    let all = own(&region, 0, PARTS);
    scan::until("no memory of its own", 12, || {
        Ok(merged(all)? + zeroes(all)? == PARTS)
    })?;
    ensure!(huge_kib(&region)? == 0, "still a huge page");
    region.verify()?;
    region.poke(77, 1, 1);
    region.verify()?;
    PASS
}
