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
use crate::uffd::{Mode, Uffd};
use crate::worker::{verify_all, Worker};

pub const SUITE: Suite = Suite {
    name: "smart",
    about: "smart_scan: pages that do not merge are scanned less often, and no merge is missed",
    module: Module::Loaded,
    tests: tests![
        ("old-pages-are-skipped", 90, skipped),
        ("nothing-is-skipped-when-off", 90, off),
        ("new-equals-of-skipped-pages-merge", 120, new_equals),
        ("skipped-pages-that-go-are-forgotten", 120, forgotten),
        ("skipped-pages-may-change", 120, changed),
        ("new-pages-behind-skipped-ones", 120, behind),
        ("merged-through-a-relative", 120, child_exits),
        ("left-behind-by-a-relative", 120, left_behind),
        ("swapped-in-as-merged-pages", 150, swapped_in),
        ("opted-out-while-swapped-out", 150, opted_out),
        ("three-scans-of-one-page", 60, one_page),
    ],
};

/// Several page tables of pages.
const MANY: usize = 1200;
/// More than twice as many passes as in-tree KSM or rksm skips in a row.
const MANY_PASSES: u64 = 20;
const IN_TREE_MISSES: &str =
    "in-tree KSM merges two unmerged pages only if one pass looks at both, which may take long";

/// Start a worker with pages that have no equal. Scan until they are old.
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
    // Most passes skip them.
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
    // The pass in progress may have begun before.
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

/// A program registers one page, lets it be scanned without a pause, and waits for three full scans. It finds
/// that most of them skipped the page.
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
        // Such a program reads the counters once a second, and not within the few milliseconds in which those
        // passes follow each other.
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
    // Enough for a look at the new pages and for the turn of the old ones.
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
    // The test itself may have a few more pages.
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
    // Equal to old pages that change while the scan skips them.
    many.fill(MANY - 8, 8, 5000, 1)?;
    few.fill(0, 8, 5000, 1)?;
    scan::passes(MANY_PASSES)?;
    scan::until_merged(8, 8)?;
    verify_all(&mut workers)?;
    PASS
}

/// New pages of a VMA, behind old ones and at the start of a batch, make the whole VMA worth scanning.
fn behind() -> Outcome {
    const OLD: usize = 300;
    const NEW: usize = 100;
    if engine::is_in_tree() {
        return skip(IN_TREE_MISSES);
    }
    engine::write("smart_scan", 1)?;
    // Merged pages are scanned in every pass.
    let mut others = [Worker::mergeable(NEW, 9000)?, Worker::mergeable(NEW, 9000)?];
    scan::until_merged(NEW as u64, NEW as u64)?;
    let mut worker = Worker::with_pages(2 * HUGE / PAGE)?;
    // All in one page table. Those of another would be scanned, and merge, while this one is skipped.
    let old = worker.first_aligned();
    let new = old + OLD;
    worker.advise(old, OLD + NEW, libc::MADV_NOHUGEPAGE)?;
    worker.fill(old, OLD, 1000, 1)?;
    worker.advise(old, OLD + NEW, libc::MADV_MERGEABLE)?;
    scan::passes(2 * MANY_PASSES)?;
    // Each page is a batch.
    engine::write("pages_to_scan", 1)?;
    engine::write("sleep_millisecs", 0)?;
    // Slow enough that no pass is missed between two reads of the counters on a busy machine.
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
    // The skipping of the old pages may have to end first. A page counts as volatile after one look.
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

/// More pages than any test registers, so that a batch is a pass.
const ALL: u32 = 1_000_000;
/// More passes than it takes until the scan skips eight of nine.
const OLD: u32 = 40;

/// Scan until a pass finds `pages` pages so old that it skips them for the next eight passes.
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

/// The pages of [`relatives`].
const FAMILY: usize = 48;

/// Memory of this process that became merged pages through a child, while its range was skipped. So none of its
/// mappings is listed yet.
struct Relatives {
    twin: Worker,
    child: Worker,
    region: Region,
    stepper: Stepper,
}

fn relatives() -> Result<Relatives> {
    const N: usize = FAMILY;
    engine::write("smart_scan", 1)?;
    // Fork before there is anything to inherit.
    let mut twin = Worker::with_pages(N)?;
    let mut region = Region::aligned(N, HUGE)?;
    region.fill(0, N, 7000, 1);
    region.advise(0, N, libc::MADV_MERGEABLE)?;
    let mut stepper = Stepper::new(ALL)?;
    // No page has an equal, so none waits for one.
    grow_old(&mut stepper, N as u64)?;
    // The page that is scanned second becomes the KSM page, and that is the child's.
    twin.fill(0, N, 7000, 1)?;
    twin.advise(0, N, libc::MADV_MERGEABLE)?;
    let mut child = Worker::inheriting(&mut region)?;
    // Let all CPUs put their pages on the LRU lists. Otherwise a page of the twin may be busy, and the other
    // page becomes the KSM page.
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
    // Where the twin's page was busy for a moment, the other page became the KSM page.
    let have = merged(region.span())?;
    ensure!(have > N / 4, "{have} of {N} pages became merged pages");
    Ok(Relatives {
        twin,
        child,
        region,
        stepper,
    })
}

/// A page that a child shares with its parent merges through the child, while the parent's range is skipped.
/// Then the child exits, and with it the rmap item that led to the parent.
fn child_exits() -> Outcome {
    let Some((a, b)) = numa::two_nodes()? else {
        return skip("one node");
    };
    let Relatives {
        mut twin,
        child,
        region,
        mut stepper,
    } = relatives()?;
    child.kill()?;
    let span = region.span();
    stepper.step()?;
    let have = merged(span)?;
    let listed = proc::ksm_stat(span.pid, "ksm_merging_pages")?;
    println!("a pass later {listed} of {have} mappings are listed");
    ensure!(listed == have as i64);
    for node in [a, b] {
        numa::move_all_to(twin.span(), node)?;
    }
    region.verify()?;
    twin.verify()?;
    PASS
}

/// A page that a child shares with its parent merges through the child. Before the scan comes by the parent's
/// page, the parent opts out, and cannot unshare it.
fn left_behind() -> Outcome {
    if engine::is_in_tree() {
        return skip("the in-tree engine forgets such pages");
    }
    let Relatives {
        mut twin,
        mut child,
        region,
        mut stepper,
    } = relatives()?;
    let span = region.span();
    let left = merged(span)?;
    let Some(uffd) = Uffd::new(span, Mode::Access)? else {
        return skip("the kernel has no UFFDIO_RWPROTECT");
    };
    uffd.protect(span, true)?;
    region.advise(0, FAMILY, libc::MADV_UNMERGEABLE)?;
    if merged(span)? != left {
        return skip("the kernel unshares such pages");
    }
    // The first pass notices, the second one lists them.
    for _ in 0..2 {
        stepper.step()?;
    }
    let listed = proc::ksm_stat(span.pid, "ksm_merging_pages")?;
    ensure!(
        listed == left as i64,
        "{listed} of {left} mappings are listed"
    );
    // Without the protection, the scan unshares them.
    drop(uffd);
    stepper.step()?;
    ensure!(merged(span)? == 0, "{} are left", merged(span)?);
    twin.verify()?;
    child.verify()?;
    region.verify()?;
    PASS
}

/// Merged pages that were swapped out come back from the swap cache, in a range that is old by then.
fn swapped_in() -> Outcome {
    // The capacity of a pipe.
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
        // In one page table in any case.
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
    // While they are in a pipe, they stay in the swap cache.
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
        "they did not come back from the swap cache"
    );
    ensure!(late == 0, "not listed after {late} of {N} passes");
    verify_all(&mut workers)?;
    PASS
}

/// Merged pages that were swapped out come back from the swap cache after their process has opted out. No entry
/// leads to them, and their VMA is not mergeable.
fn opted_out() -> Outcome {
    // The capacity of a pipe.
    const N: usize = 16;
    // One pass in sixteen walks such VMAs, and another one may be under way.
    const PASSES: u32 = 17;
    if engine::is_in_tree() {
        return skip("the in-tree engine forgets such pages");
    }
    let (Some(_zram), Some(group)) = (Zram::new(64)?, Group::new("smart")?) else {
        return skip("no zram or no memory cgroups");
    };
    let mut stepper = Stepper::new(ALL)?;
    let mut until_sharing = |pages: usize| -> Result<()> {
        for _ in 0..12 {
            if stepper.step()?.sharing >= pages as u64 {
                return Ok(());
            }
        }
        anyhow::bail!("{:?}", engine::counters()?)
    };
    // These two merge first, so the merged pages are charged to the group, which can swap them out.
    let mut workers = [Worker::new()?, Worker::new()?];
    for worker in &mut workers {
        group.enter(worker.pid())?;
        worker.map(N)?;
        worker.advise(0, N, libc::MADV_NOHUGEPAGE)?;
        worker.fill(0, N, 100, 1)?;
        worker.advise(0, N, libc::MADV_MERGEABLE)?;
    }
    until_sharing(N)?;
    let mut region = Region::new(N)?;
    region.fill(0, N, 100, 1);
    region.advise(0, N, libc::MADV_MERGEABLE)?;
    until_sharing(2 * N)?;
    // While they are in a pipe, they stay in the swap cache.
    let (_output, input) = sys::pipe()?;
    region.splice(N, &input)?;
    region.unmap()?;
    let [mut worker, twin] = workers;
    twin.kill()?;
    for _ in 0..20 {
        group.reclaim(8 << 20)?;
    }
    let span = worker.span();
    let out = swapped(span)?;
    ensure!(out > N / 2, "{out} of {N} pages are swapped out");
    // The scan forgets those that are swapped out, and opting out does not see them.
    stepper.step()?;
    worker.advise(0, N, libc::MADV_UNMERGEABLE)?;
    worker.verify()?;
    let have = merged(span)?;
    ensure!(have > N / 2, "{have} pages came back from the swap cache");
    let listed = || proc::ksm_stat(span.pid, "ksm_merging_pages");
    println!("{} of {have} mappings are listed", listed()?);
    let mut passes = 0;
    while merged(span)? != 0 {
        passes += 1;
        ensure!(passes <= PASSES, "{} are left", merged(span)?);
        stepper.step()?;
    }
    println!("all are unshared after {passes} passes");
    stepper.step()?;
    ensure!(listed()? == 0, "{} are listed", listed()?);
    worker.verify()?;
    PASS
}
