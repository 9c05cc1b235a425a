// SPDX-License-Identifier: GPL-2.0
//! `smart_scan`: pages that did not merge for some passes are skipped.

use std::time::Duration;

use anyhow::{ensure, Result};

use super::tests;
use crate::cgroup::Group;
use crate::engine::{self, wait_for};
use crate::harness::{skip, Module, Outcome, Suite, PASS};
use crate::numa;
use crate::pageflags::{merged, swapped, Span};
use crate::proc;
use crate::region::{Region, HUGE, PAGE};
use crate::scan::{self, Stepper};
use crate::swap::Zram;
use crate::sys;
use crate::worker::{verify_all, Worker};

pub const SUITE: Suite = Suite {
    name: "smart",
    about:
        "smart_scan: what does not merge is looked at less often, and nothing is missed for that",
    module: Module::Loaded,
    tests: tests![
        ("old-pages-are-skipped", 90, skipped),
        ("nothing-is-skipped-when-off", 90, off),
        ("new-equals-of-skipped-pages-merge", 120, new_equals),
        ("skipped-pages-that-go-are-forgotten", 120, forgotten),
        ("skipped-pages-may-change", 120, changed),
        ("new-pages-behind-skipped-ones", 120, behind),
        ("merged-through-a-relative", 120, relatives),
        ("swapped-in-as-merged-pages", 150, swapped_in),
        ("three-scans-of-one-page", 60, one_page),
    ],
};

/// A few page tables full.
const MANY: usize = 1200;
/// More passes than in-tree KSM or rksm skips in a row, twice.
const MANY_PASSES: u64 = 20;
const IN_TREE_MISSES: &str =
    "in-tree KSM merges two unmerged pages only if one pass looks at both, which may not come to be for long";

/// A process with pages that have no equal, after so many passes that they are old.
fn old() -> Result<Worker> {
    engine::write("smart_scan", 1)?;
    let mut worker = Worker::mergeable(MANY, 0)?;
    worker.fill(0, MANY, 1000, 1)?;
    scan::passes(2 * MANY_PASSES)?;
    Ok(worker)
}

fn skipped() -> Outcome {
    let before = engine::read("pages_skipped")?;
    let mut worker = old()?;
    scan::stop()?;
    let skipped = engine::read("pages_skipped")? - before;
    ensure!(skipped >= 10 * MANY as u64, "{skipped} skipped");
    // Most passes do not look at them.
    let (scanned, skipped) = (
        engine::read("pages_scanned")?,
        engine::read("pages_skipped")?,
    );
    let scans = engine::read("full_scans")?;
    scan::passes(MANY_PASSES)?;
    scan::stop()?;
    let scans = engine::read("full_scans")? - scans;
    let scanned = engine::read("pages_scanned")? - scanned;
    let skipped = engine::read("pages_skipped")? - skipped;
    println!("{scanned} scanned, {skipped} skipped in {scans} passes");
    // The pass under way may have begun before.
    let all = (scans - 1) * MANY as u64;
    ensure!(scanned + skipped >= all, "{scanned} + {skipped} < {all}");
    ensure!(
        3 * scanned < skipped,
        "{scanned} scanned, {skipped} skipped"
    );
    worker.verify()?;
    PASS
}

fn off() -> Outcome {
    let mut worker = old()?;
    engine::write("smart_scan", 0)?;
    scan::passes(1)?;
    let skipped = engine::read("pages_skipped")?;
    scan::passes(5)?;
    ensure!(engine::read("pages_skipped")? == skipped, "more skipped");
    ensure!(engine::read("smart_scan")? == 0);
    worker.verify()?;
    PASS
}

/// A tool that registers one page, has it scanned without a pause, and waits for three full scans, sees that most
/// of what was to be scanned was skipped.
fn one_page() -> Outcome {
    for round in 0..8 {
        engine::write("run", 0)?;
        engine::write("run", 2)?;
        let mut page = Region::new(1)?;
        page.fill(0, 1, round, 0);
        page.advise(0, 1, libc::MADV_MERGEABLE)?;
        if !engine::is_in_tree() {
            engine::write("pass_millisecs", 1000)?;
        }
        engine::write("pages_to_scan", 100)?;
        engine::write("sleep_millisecs", 0)?;
        engine::write("run", 1)?;
        let read = || -> Result<_> {
            let scans = engine::read("full_scans")?;
            Ok((scans, engine::read("pages_skipped")?))
        };
        let before = read()?;
        // Such tools look once a second, and not in the few milliseconds in which those passes follow each other.
        let mut after = before;
        wait_for("three scans", Duration::from_secs(30), || {
            std::thread::sleep(Duration::from_millis(100));
            let last = std::mem::replace(&mut after, read()?);
            Ok(after.0 >= before.0 + 3 && after.0 == last.0)
        })?;
        let (scans, skipped) = (after.0 - before.0, after.1 - before.1);
        println!("round {round}: {scans} scans of one page, skipped in {skipped} of them");
        ensure!(2 * skipped >= scans, "skipped in {skipped} of {scans}");
        page.verify()?;
        page.unmap()?;
    }
    PASS
}

fn new_equals() -> Outcome {
    if engine::is_in_tree() {
        return skip(IN_TREE_MISSES);
    }
    let worker = old()?;
    let mut other = Worker::mergeable(MANY, 0)?;
    other.fill(0, MANY, 1000, 1)?;
    let mut workers = [worker, other];
    // Enough for the new ones to be tried, and for the old ones to have their turn.
    scan::passes(MANY_PASSES)?;
    scan::until_merged(MANY as u64, MANY as u64)?;
    for worker in &workers {
        ensure!(merged(worker.span())? == MANY);
    }
    verify_all(&mut workers)?;
    PASS
}

fn forgotten() -> Outcome {
    let mut worker = old()?;
    ensure!(engine::read("pages_unshared")? >= MANY as u64);
    worker.truncate(16)?;
    scan::passes(MANY_PASSES)?;
    let c = engine::counters()?;
    // Besides these there may be the test's own few pages.
    ensure!(c.unshared + c.volatile < 64, "{c:?}");
    worker.verify()?;
    worker.exit()?;
    PASS
}

fn changed() -> Outcome {
    if engine::is_in_tree() {
        return skip(IN_TREE_MISSES);
    }
    let mut workers = [old()?, Worker::mergeable(8, 0)?];
    let [many, few] = &mut workers;
    many.poke(0, MANY, 9, 0x77)?;
    // Equal to old pages that change while nobody looks.
    many.fill(MANY - 8, 8, 5000, 1)?;
    few.fill(0, 8, 5000, 1)?;
    scan::passes(MANY_PASSES)?;
    scan::until_merged(8, 8)?;
    verify_all(&mut workers)?;
    PASS
}

/// New pages of an area, behind old ones and beginning with a batch, make all of it worth looking at.
fn behind() -> Outcome {
    const OLD: usize = 300;
    const NEW: usize = 100;
    if engine::is_in_tree() {
        return skip(IN_TREE_MISSES);
    }
    engine::write("smart_scan", 1)?;
    // What is merged is looked at in every pass.
    let mut others = [Worker::mergeable(NEW, 9000)?, Worker::mergeable(NEW, 9000)?];
    scan::until_merged(NEW as u64, NEW as u64)?;
    let mut worker = Worker::with_pages(2 * HUGE / PAGE)?;
    // All of one area: those of another one would be seen, and merged, while this one is skipped.
    let old = worker.first_aligned();
    let new = old + OLD;
    worker.advise(old, OLD + NEW, libc::MADV_NOHUGEPAGE)?;
    worker.fill(old, OLD, 1000, 1)?;
    worker.advise(old, OLD + NEW, libc::MADV_MERGEABLE)?;
    scan::passes(2 * MANY_PASSES)?;
    // Each page is a batch.
    engine::write("pages_to_scan", 1)?;
    engine::write("sleep_millisecs", 0)?;
    // Not so fast that passes go by between two looks at the counters, on a busy machine.
    engine::write("pass_millisecs", 1000)?;
    worker.fill(new, NEW, 9000, 1)?;
    let until = |what: &str, most: u64, probe: &dyn Fn() -> Result<bool>| -> Result<u64> {
        let begin = engine::read("full_scans")?;
        wait_for(what, Duration::from_secs(60), probe)?;
        let passes = engine::read("full_scans")? - begin;
        ensure!(
            passes <= most,
            "{what}: after {passes} passes; {:?}",
            engine::counters()?
        );
        Ok(passes)
    };
    // The old ones' rest may have to be over first. Seen once, they count as volatile.
    let seen = until("seen", MANY_PASSES, &|| {
        let c = engine::counters()?;
        Ok(c.volatile >= NEW as u64 || c.sharing > NEW as u64)
    })?;
    let merged = until("merged", 4, &|| {
        Ok(engine::read("pages_sharing")? == 2 * NEW as u64)
    })?;
    println!("seen after {seen} passes, merged after {merged} more");
    worker.verify()?;
    verify_all(&mut others)?;
    PASS
}

/// More than any test has registered, so that a batch is a pass.
const ALL: u32 = 1_000_000;
/// More passes than it takes until eight of nine are skipped.
const OLD: u32 = 40;

/// Lets passes go by until one looks at areas with so many pages which are so old that it skips them for the next
/// eight passes.
fn grow_old(stepper: &mut Stepper, pages: u64) -> Result<()> {
    let mut skips = 0;
    for _ in 0..2 * OLD {
        let before = engine::read("pages_skipped")?;
        stepper.step()?;
        if engine::read("pages_skipped")? - before >= pages {
            skips += 1;
        } else if skips >= 8 {
            return Ok(());
        } else {
            skips = 0;
        }
    }
    anyhow::bail!("no eight passes in a row skipped {pages} pages")
}

/// A page that a child shares with its parent, whose area is skipped, is merged through the child; then the child
/// exits, and what led to the parent is gone.
fn relatives() -> Outcome {
    const N: usize = 48;
    let Some((a, b)) = numa::two_nodes()? else {
        return skip("one node");
    };
    engine::write("smart_scan", 1)?;
    // Forked before there is anything to inherit.
    let mut twin = Worker::with_pages(N)?;
    let mut region = Region::aligned(N, HUGE)?;
    region.fill(0, N, 7000, 1);
    region.advise(0, N, libc::MADV_MERGEABLE)?;
    let mut stepper = Stepper::new(ALL)?;
    // Nobody has an equal, so nobody waits for one.
    grow_old(&mut stepper, N as u64)?;
    // Who comes by second is published, and that is the child.
    twin.fill(0, N, 7000, 1)?;
    twin.advise(0, N, libc::MADV_MERGEABLE)?;
    let mut child = Worker::inheriting(&mut region)?;
    // Has all CPUs put their pages on the LRU lists, so that none of the twin's is held and published in its stead.
    std::fs::write("/proc/sys/vm/drop_caches", "1")?;
    let skipped = engine::read("pages_skipped")?;
    let mut passes = 0;
    while stepper.step()?.shared < N as u64 {
        passes += 1;
        ensure!(passes < 6, "{:?}", engine::counters()?);
    }
    if !engine::is_in_tree() {
        let skipped = engine::read("pages_skipped")? - skipped;
        ensure!(skipped >= N as u64, "only {skipped} pages were skipped");
    }
    child.verify()?;
    child.kill()?;
    let span = region.span();
    // Those of the twin that were held for a moment were published in their stead.
    let have = merged(span)?;
    ensure!(have > N / 4, "{have} of {N} pages became merged pages");
    stepper.step()?;
    let have = merged(span)?;
    let listed = proc::ksm_stat(span.pid, "ksm_merging_pages")?;
    println!("a pass later {listed} of {have} places are listed");
    ensure!(listed == have as i64);
    for node in [a, b] {
        numa::move_all_to(twin.span(), node)?;
    }
    region.verify()?;
    twin.verify()?;
    PASS
}

/// Merged pages that were swapped out come back, out of the swap cache, in an area that is old by then.
fn swapped_in() -> Outcome {
    // As many as a pipe has room for.
    const N: usize = 16;
    const OTHERS: usize = 32;
    const ROUNDS: usize = 10;
    let (Some(_zram), Some(group)) = (Zram::new(64)?, Group::new("smart")?) else {
        return skip("no zram or no memory cgroups");
    };
    engine::write("smart_scan", 1)?;
    let mut stepper = Stepper::new(ALL)?;
    let mut workers = Vec::new();
    let mut first = 0;
    for seed in [20_000, 30_000] {
        let mut worker = Worker::new()?;
        group.enter(worker.pid())?;
        // All of one page table, in any case.
        worker.map(2 * HUGE / PAGE)?;
        first = worker.first_aligned();
        worker.advise(first, N + OTHERS, libc::MADV_NOHUGEPAGE)?;
        worker.fill(first, N, 100, 1)?;
        worker.fill(first + N, OTHERS, seed, 1)?;
        worker.advise(first, N + OTHERS, libc::MADV_MERGEABLE)?;
        workers.push(worker);
    }
    let mut region = Region::new(N)?;
    region.fill(0, N, 100, 1);
    region.advise(0, N, libc::MADV_MERGEABLE)?;
    let mut passes = 0;
    while stepper.step()?.sharing < 2 * N as u64 {
        passes += 1;
        ensure!(passes < 12, "{:?}", engine::counters()?);
    }
    // As long as they are in a pipe they stay in the swap cache.
    let (_output, input) = sys::pipe()?;
    region.splice(N, &input)?;
    region.unmap()?;
    let span = Span {
        addr: workers[0].span().addr + first * PAGE,
        pages: N,
        ..workers[0].span()
    };
    for _ in 0..20 {
        group.reclaim(8 << 20)?;
    }
    let out = swapped(span)?;
    workers[0].verify_range(first + N, OTHERS)?;
    for _ in 0..OLD {
        stepper.step()?;
    }
    println!(
        "{out} of {N} pages are swapped out; {:?}",
        engine::counters()?
    );
    ensure!(out >= ROUNDS);
    ensure!(proc::ksm_stat(span.pid, "ksm_merging_pages")? <= (N - out) as i64);
    let mut late = 0;
    for page in 0..N {
        workers[0].verify_range(first + page, 1)?;
        stepper.step()?;
        let (have, listed) = (
            merged(span)?,
            proc::ksm_stat(span.pid, "ksm_merging_pages")?,
        );
        if have as i64 != listed {
            late += 1;
            println!("page {page} is back: {have} merged pages, of which {listed} are listed");
        }
    }
    ensure!(
        merged(span)? >= ROUNDS,
        "they did not come back out of the swap cache"
    );
    ensure!(late == 0, "not listed after {late} of {N} passes");
    verify_all(&mut workers)?;
    PASS
}
