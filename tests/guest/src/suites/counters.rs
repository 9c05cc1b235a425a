// SPDX-License-Identifier: GPL-2.0
//! The counters, compared with the kernel's own view of the pages.

use std::fs;
use std::time::Duration;

use anyhow::{ensure, Result};

use super::tests;
use crate::background::Background;
use crate::engine;
use crate::harness::{Module, Outcome, Suite, PASS};
use crate::pageflags::Census;
use crate::prng::Prng;
use crate::proc;
use crate::region::{Region, PAGE};
use crate::scan;
use crate::worker::{verify_all, Worker};

pub const SUITE: Suite = Suite {
    name: "counters",
    about: "counters agree with /proc/kpageflags and /proc/<pid>/ksm_stat",
    module: Module::Loaded,
    tests: tests![
        ("agree-with-kpageflags", 90, kpageflags),
        ("follow-writes-and-exits", 90, follow),
        ("unshared-pages", 60, unshared),
        ("nothing-is-left-of-pages-that-changed", 90, changed),
        ("scanned-and-full-scans-advance", 60, advance),
        ("run-0-keeps-them", 60, kept),
        ("profit-of-a-process", 60, profit),
        ("general-profit", 90, general_profit),
        ("merging-frees-memory", 90, frees_memory),
        ("splitting-and-exit-free-all-memory", 120, leaks_nothing),
    ],
};

const N: usize = 24;

/// Check the counters against a census of all registered memory.
fn agree(workers: &[Worker]) -> Result<()> {
    let spans: Vec<_> = workers.iter().map(Worker::span).collect();
    let census = Census::take(&spans)?;
    let c = engine::counters()?;
    let frames = census.frames.len() as u64;
    ensure!(c.shared == frames, "{frames} merged frames, {c:?}");
    let mappings = census.total_mappings();
    ensure!(
        c.shared + c.sharing == mappings,
        "{mappings} mappings, {c:?}"
    );
    for (&pid, &count) in &census.mappings {
        let stat = proc::ksm_stat(pid, "ksm_merging_pages")?;
        ensure!(
            stat == count as i64,
            "pid {pid}: {count} mappings, ksm_stat {stat}"
        );
    }
    Ok(())
}

/// Scan until the counters agree with the census.
fn settle(workers: &[Worker]) -> Result<()> {
    let mut last = Ok(());
    let settled = scan::until("agreement", 8, || {
        last = agree(workers);
        Ok(last.is_ok())
    });
    last.and(settled)
}

/// Start workers with pages that are shared by two, three and four of them, within one, and not at all.
fn mixture() -> Result<Vec<Worker>> {
    let mut workers = Vec::new();
    for i in 0..4u64 {
        let mut worker = Worker::with_pages(5 * N)?;
        worker.fill(0, N, 1000, 1)?;
        worker.fill(N, N, if i < 3 { 2000 } else { 2500 }, 1)?;
        worker.fill(2 * N, N, 3000 + 100 * (i / 2), 1)?;
        worker.fill(3 * N, N, 4000 + i, 0)?;
        worker.fill(4 * N, N, 5000 + 100 * i, 1)?;
        worker.advise(0, 5 * N, libc::MADV_MERGEABLE)?;
        workers.push(worker);
    }
    let n = N as u64;
    let shared = n + n + 2 * n + 4;
    let mappings = 4 * n + 3 * n + 4 * n + 4 * n;
    scan::until_merged(shared, mappings - shared)?;
    Ok(workers)
}

fn kpageflags() -> Outcome {
    let mut workers = mixture()?;
    settle(&workers)?;
    verify_all(&mut workers)?;
    PASS
}

fn follow() -> Outcome {
    let mut workers = mixture()?;
    workers[0].poke(0, 3 * N, 1, 0xee)?;
    workers[1].advise(N, N, libc::MADV_UNMERGEABLE)?;
    settle(&workers)?;
    verify_all(&mut workers)?;
    workers[2].truncate(2 * N)?;
    workers[3].dontneed(0, N / 2)?;
    settle(&workers)?;
    verify_all(&mut workers)?;
    workers.pop().expect("four workers").kill()?;
    settle(&workers)?;
    workers.remove(0).exit()?;
    settle(&workers)?;
    verify_all(&mut workers)?;
    PASS
}

fn unshared() -> Outcome {
    let mut worker = Worker::mergeable(N, 100)?;
    scan::until("unshared pages", 8, || {
        let c = engine::counters()?;
        Ok((c.shared, c.sharing, c.unshared, c.volatile) == (0, 0, N as u64, 0))
    })?;
    // The engine no longer counts unmapped pages.
    worker.truncate(N / 2)?;
    scan::until("fewer unshared pages", 8, || {
        Ok(engine::read("pages_unshared")? == N as u64 / 2)
    })?;
    worker.verify()?;
    PASS
}

/// Pages that change at any moment: in the unstable tree, during the comparison with a page in it, and just
/// before.
fn changed() -> Outcome {
    const PAGES: usize = 128;
    let changing = |mut prng: Prng| {
        let mut region: Option<Region> = None;
        Background::repeat(move || {
            let region = match &mut region {
                Some(region) => region,
                none => {
                    let new = Region::new(PAGES)?;
                    new.advise(0, PAGES, libc::MADV_MERGEABLE)?;
                    none.insert(new)
                }
            };
            // Mostly equal to pages of other workers.
            let content = 1000 * (1 + prng.below(2) as u64);
            region.fill(0, PAGES, content, 1);
            std::thread::sleep(Duration::from_millis(prng.below(40) as u64));
            region.verify()
        })
    };
    let (mut most, mut passes) = (0, 0);
    for round in 0..3 {
        scan::start()?;
        let all = (0..3)
            .map(|nth| changing(Prng::new(10 * round + nth)))
            .collect::<Result<Vec<_>>>()?;
        let begin = engine::read("full_scans")?;
        engine::wait_for("passes", Duration::from_secs(30), || {
            most = engine::read("pages_sharing")?.max(most);
            Ok(engine::read("full_scans")? >= begin + 100)
        })?;
        passes += engine::read("full_scans")? - begin;
        all.into_iter().try_for_each(Background::stop)?;
        engine::write("run", 2)?;
        let c = engine::counters()?;
        ensure!(
            (c.shared, c.sharing, c.unshared, c.volatile) == (0, 0, 0, 0),
            "no process is left: {c:?}"
        );
    }
    println!("{passes} passes, {most} pages saved at a time");
    ensure!(most > 0, "nothing merged");
    PASS
}

fn advance() -> Outcome {
    // Each pass has to look at all pages.
    engine::write("smart_scan", 0)?;
    let worker = Worker::mergeable(N, 100)?;
    let mut last = engine::counters()?;
    for _ in 0..3 {
        scan::passes(2)?;
        let now = engine::counters()?;
        ensure!(now.full_scans >= last.full_scans + 2, "{last:?} {now:?}");
        ensure!(
            now.scanned >= last.scanned + 2 * N as u64,
            "{last:?} {now:?}"
        );
        last = now;
    }
    worker.exit()?;
    PASS
}

fn kept() -> Outcome {
    let _workers = mixture()?;
    scan::stop()?;
    let before = engine::counters()?;
    std::thread::sleep(std::time::Duration::from_millis(500));
    ensure!(engine::counters()? == before);
    engine::write("run", 1)?;
    scan::passes(2)?;
    let after = engine::counters()?;
    ensure!((after.shared, after.sharing) == (before.shared, before.sharing));
    PASS
}

fn profit() -> Outcome {
    let mut worker = Worker::with_pages(8 * N)?;
    worker.fill(0, 8 * N, 100, 0)?;
    worker.advise(0, 8 * N, libc::MADV_MERGEABLE)?;
    scan::until_merged(1, 8 * N as u64 - 1)?;
    let profit = proc::ksm_stat(worker.pid(), "ksm_process_profit")?;
    let most = (8 * N * 4096) as i64;
    ensure!(
        (most / 2..=most).contains(&profit),
        "profit {profit} of {most}"
    );
    worker.advise(0, 8 * N, libc::MADV_UNMERGEABLE)?;
    scan::passes(2)?;
    let profit = proc::ksm_stat(worker.pid(), "ksm_process_profit")?;
    ensure!(profit <= 0, "profit {profit} with nothing merged");
    PASS
}

/// The number of pages in tests that look at the whole machine's memory. 16 MiB is well above the fluctuation
/// in the guest.
const MANY: usize = 4096;
const MANY_KIB: i64 = 4 * MANY as i64;

/// Start a worker with MANY pages in sets of 64 equal ones, and merge them.
fn merge_many() -> Result<Worker> {
    let mut worker = Worker::with_pages(MANY)?;
    for i in (0..MANY).step_by(64) {
        worker.fill(i, 64, 100 + i as u64, 0)?;
    }
    worker.advise(0, MANY, libc::MADV_MERGEABLE)?;
    Ok(worker)
}

fn merged_many() -> Result<()> {
    scan::until_merged(MANY as u64 / 64, MANY as u64 * 63 / 64)
}

/// Return the size of all metadata, as `general_profit` accounts it.
fn metadata() -> Result<i64> {
    let text = fs::read_to_string(engine::path(engine::dir(), "general_profit"))?;
    let profit: i64 = text.trim_end().parse()?;
    Ok(engine::read("pages_sharing")? as i64 * PAGE as i64 - profit)
}

fn general_profit() -> Outcome {
    const MANY: i64 = 1000;
    // Nothing can merge, so the profit is negative: at most in-tree KSM's rmap items, plus a page.
    let mut unique = Worker::mergeable(MANY as usize, 0)?;
    unique.fill(0, MANY as usize, 5000, 1)?;
    scan::passes(3)?;
    let alone = metadata()?;
    ensure!(alone >= 8 * MANY, "{alone} bytes for {MANY} pages");
    ensure!(alone <= 66 * MANY + 8192, "{alone} bytes for {MANY} pages");
    // Each merged page has an rmap item of 64 bytes. In-tree KSM does not account for stable nodes.
    let mut other = Worker::mergeable(MANY as usize, 0)?;
    other.fill(0, MANY as usize, 5000, 1)?;
    let mut workers = [unique, other];
    scan::until_merged(MANY as u64, MANY as u64)?;
    scan::passes(1)?;
    scan::stop()?;
    let both = metadata()?;
    println!("{alone} bytes for one, {both} bytes for both");
    ensure!(both >= 2 * 64 * MANY, "{both} bytes");
    ensure!(both <= 5 * 64 * MANY + 16384, "{both} bytes");
    verify_all(&mut workers)?;
    // All metadata is freed with the last page.
    workers.into_iter().try_for_each(Worker::exit)?;
    if engine::is_in_tree() {
        return PASS;
    }
    engine::wait_for("end of all metadata", Duration::from_secs(20), || {
        Ok(metadata()? == 0)
    })?;
    PASS
}

fn frees_memory() -> Outcome {
    let mut worker = merge_many()?;
    let before = proc::free_kib()?;
    merged_many()?;
    scan::stop()?;
    let gain = proc::free_kib()? - before;
    println!("{gain} KiB freed of {MANY_KIB}");
    ensure!(gain > MANY_KIB * 3 / 4, "{gain} KiB freed of {MANY_KIB}");
    worker.verify()?;
    PASS
}

fn leaks_nothing() -> Outcome {
    const ROUNDS: usize = 4;
    // Run once before measuring: memory that is kept for the next time is no leak.
    merge_many()?.exit()?;
    let before = proc::free_kib()?;
    for round in 0..ROUNDS {
        let mut worker = merge_many()?;
        merged_many()?;
        match round % 3 {
            0 => worker.poke(0, MANY, 1, 1)?,
            1 => worker.advise(0, MANY, libc::MADV_UNMERGEABLE)?,
            _ => {}
        }
        worker.exit()?;
        scan::until_merged(0, 0)?;
    }
    engine::write("run", 2)?;
    let loss = before - proc::free_kib()?;
    println!("{loss} KiB less after {ROUNDS} rounds of {MANY_KIB} KiB");
    ensure!(loss < MANY_KIB / 2, "{loss} KiB lost");
    PASS
}
