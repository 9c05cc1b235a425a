// SPDX-License-Identifier: GPL-2.0
//! `max_page_sharing`: one content on several merged pages.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{ensure, Context, Result};

use super::tests;
use crate::engine::{self, refused, wait_for};
use crate::harness::{skip, Module, Outcome, Suite, PASS};
use crate::pageflags::merged_frames;
use crate::scan::{self, Stepper};
use crate::worker::{verify_all, Worker};

pub const SUITE: Suite = Suite {
    name: "chains",
    about: "no merged page is mapped more often than it may be, and free room is used again",
    module: Module::Loaded,
    tests: tests![
        ("limit-is-kept", 60, limit),
        ("smallest-limit", 60, smallest),
        ("default-limit", 60, default_limit),
        ("values-and-errors", 60, values),
        ("room-is-used-again", 90, room),
        ("who-waits-gets-room", 90, waits_for_room),
        ("many-full-pages", 120, many_full),
        ("comes-and-goes", 240, churn),
        ("chains-are-counted", 90, counted),
        ("gone-pages-are-pruned", 90, pruned),
    ],
};

/// Return where each merged page of a worker is mapped, by frame.
fn uses(worker: &Worker) -> Result<BTreeMap<u64, Vec<usize>>> {
    let mut uses: BTreeMap<u64, Vec<usize>> = BTreeMap::new();
    for (page, frame) in merged_frames(worker.span())?.into_iter().enumerate() {
        if let Some(frame) = frame {
            uses.entry(frame).or_default().push(page);
        }
    }
    Ok(uses)
}

/// Check that there are `frames` merged pages, none with more than `most` mappings.
fn ensure_uses(worker: &Worker, most: usize, frames: usize) -> Result<()> {
    let uses = uses(worker)?;
    let sizes: Vec<usize> = uses.values().map(Vec::len).collect();
    ensure!(
        sizes.iter().all(|&n| n <= most),
        "more than {most}: {sizes:?}"
    );
    ensure!(sizes.len() == frames, "not {frames}: {sizes:?}");
    Ok(())
}

/// Start a worker with `n` equal pages.
fn equal(n: usize) -> Result<Worker> {
    let mut worker = Worker::with_pages(n)?;
    worker.fill(0, n, 100, 0)?;
    worker.advise(0, n, libc::MADV_MERGEABLE)?;
    Ok(worker)
}

fn limit() -> Outcome {
    engine::write("max_page_sharing", 4)?;
    let mut worker = equal(16)?;
    scan::until_merged(4, 12)?;
    ensure_uses(&worker, 4, 4)?;
    worker.verify()?;
    worker.poke(0, 16, 0, 0xee)?;
    worker.verify()?;
    PASS
}

fn smallest() -> Outcome {
    engine::write("max_page_sharing", 2)?;
    let mut worker = equal(20)?;
    scan::until_merged(10, 10)?;
    ensure_uses(&worker, 2, 10)?;
    worker.verify()?;
    PASS
}

fn default_limit() -> Outcome {
    ensure!(engine::read("max_page_sharing")? == 256);
    let mut worker = equal(512)?;
    scan::until_merged(2, 510)?;
    ensure_uses(&worker, 256, 2)?;
    worker.verify()?;
    PASS
}

fn values() -> Outcome {
    for bad in ["0", "1", "-1", "-2147483648", "x", "\n", "2x"] {
        let errno = refused("max_page_sharing", bad)?;
        ensure!(errno == Some(libc::EINVAL), "{bad:?}: {errno:?}");
    }
    for bad in ["2147483648", "-2147483649", "99999999999999999999"] {
        let errno = refused("max_page_sharing", bad)?;
        ensure!(errno == Some(libc::ERANGE), "{bad:?}: {errno:?}");
    }
    for good in [2, 2_147_483_647, 1000, 256] {
        engine::write("max_page_sharing", good)?;
        ensure!(engine::read("max_page_sharing")? == good);
    }
    let mut worker = equal(4)?;
    scan::until_merged(1, 3)?;
    ensure!(refused("max_page_sharing", "255")? == Some(libc::EBUSY));
    ensure!(refused("max_page_sharing", "1")? == Some(libc::EINVAL));
    ensure!(engine::read("max_page_sharing")? == 256);
    // This is its value already.
    engine::write("max_page_sharing", 256)?;
    engine::write("run", 2)?;
    engine::write("max_page_sharing", 3)?;
    scan::until_merged(1, 2)?;
    worker.verify()?;
    for good in [0, 1, 4_294_967_295, 2000] {
        engine::write("stable_node_chains_prune_millisecs", good)?;
        ensure!(engine::read("stable_node_chains_prune_millisecs")? == good);
    }
    for bad in ["-1", "4294967296", "x"] {
        let errno = refused("stable_node_chains_prune_millisecs", bad)?;
        ensure!(errno == Some(libc::EINVAL), "{bad:?}: {errno:?}");
    }
    PASS
}

/// Write to one page of each merged page of `worker`, so that each has room for one more.
fn make_room(worker: &mut Worker) -> Result<()> {
    let pages: Vec<usize> = uses(worker)?
        .values()
        .map(|pages| pages.first().copied().context("no page"))
        .collect::<Result<_>>()?;
    for page in pages {
        worker.fill(page, 1, 1000 + page as u64, 0)?;
    }
    Ok(())
}

/// Fill `frames` merged pages, make room in each, and bring as many new pages.
fn fill_up_again(frames: usize) -> Outcome {
    engine::write("max_page_sharing", 4)?;
    let mut worker = equal(frames * 4)?;
    scan::until_merged(frames as u64, frames as u64 * 3)?;
    make_room(&mut worker)?;
    scan::until_merged(frames as u64, frames as u64 * 2)?;
    let mut other = equal(frames)?;
    scan::until_merged(frames as u64, frames as u64 * 3)?;
    scan::passes(2)?;
    ensure_uses(&worker, 3, frames)?;
    ensure_uses(&other, 1, frames)?;
    worker.verify()?;
    other.verify()?;
    PASS
}

fn room() -> Outcome {
    fill_up_again(3)
}

/// A page that finds all merged pages full merges as soon as one has room, without a new page to trigger it.
fn waits_for_room() -> Outcome {
    const N: usize = 8;
    engine::write("max_page_sharing", 2)?;
    // Three pages of each content.
    let mut workers = Vec::new();
    for _ in 0..3 {
        workers.push(Worker::mergeable(N, 100)?);
    }
    scan::until_merged(N as u64, N as u64)?;
    scan::passes(2)?;
    let merged: Vec<Vec<_>> = workers
        .iter()
        .map(|worker| merged_frames(worker.span()))
        .collect::<Result<_>>()?;
    for page in 0..N {
        let who = (0..3).find(|&who| merged[who][page].is_some());
        let who = who.with_context(|| format!("no worker has page {page} merged"))?;
        workers[who].fill(page, 1, 9000 + page as u64, 0)?;
    }
    scan::until("merge of the page that had to wait", 20, || {
        let mut merged = 0;
        for worker in &workers {
            merged += worker.merged()?;
        }
        Ok(merged == 2 * N)
    })?;
    verify_all(&mut workers)?;
    PASS
}

fn many_full() -> Outcome {
    fill_up_again(40)
}

fn churn() -> Outcome {
    const N: usize = 96;
    engine::write("max_page_sharing", 4)?;
    let mut worker = equal(N)?;
    scan::until_merged(N as u64 / 4, N as u64 * 3 / 4)?;
    for round in 1..6usize {
        // A different third of the pages each time, and equal again afterwards.
        for page in (0..N).filter(|page| (page * 7 + round * 5) % 11 < 4) {
            worker.fill(page, 1, 1000 + (round * N + page) as u64, 0)?;
        }
        scan::passes(2)?;
        worker.fill(0, N, 100, 0)?;
        // Pages that were written soon after they merged must stay unchanged for some seconds.
        scan::passes(2)?;
        wait_for("all but a few merged", Duration::from_secs(70), || {
            Ok(worker.merged()? + 1 >= N)
        })?;
        let sizes: Vec<usize> = uses(&worker)?.values().map(Vec::len).collect();
        ensure!(sizes.iter().all(|&n| n <= 4), "round {round}: {sizes:?}");
        worker.verify()?;
    }
    PASS
}

fn counted() -> Outcome {
    let chains = || -> Result<(u64, u64)> {
        Ok((
            engine::read("stable_node_chains")?,
            engine::read("stable_node_dups")?,
        ))
    };
    ensure!(chains()? == (0, 0));
    engine::write("max_page_sharing", 4)?;
    let mut a = equal(12)?;
    let mut b = Worker::with_pages(8)?;
    b.fill(0, 8, 200, 0)?;
    b.advise(0, 8, libc::MADV_MERGEABLE)?;
    let mut c = Worker::with_pages(4)?;
    c.fill(0, 4, 300, 0)?;
    c.advise(0, 4, libc::MADV_MERGEABLE)?;
    scan::until_merged(6, 18)?;
    // Three merged pages with the first content, two with the second. A single page is no chain.
    let have = chains()?;
    ensure!(have == (2, 5), "{have:?}");
    for worker in [&mut a, &mut b, &mut c] {
        worker.verify()?;
    }
    if !engine::is_in_tree() {
        // In-tree KSM prunes only when it scans an equal page.
        b.exit()?;
        scan::until("one chain left", 12, || Ok(chains()? == (1, 3)))?;
    }
    engine::write("run", 2)?;
    let have = chains()?;
    ensure!(have == (0, 0), "{have:?} after unmerging");
    a.verify()?;
    PASS
}

fn pruned() -> Outcome {
    if engine::is_in_tree() {
        return skip("in-tree KSM prunes only when it scans an equal page");
    }
    engine::write("max_page_sharing", 4)?;
    engine::write("stable_node_chains_prune_millisecs", 0)?;
    // This worker is first in each pass, and takes long at 8 pages a batch.
    let mut first = Worker::mergeable(2000, 5000)?;
    let mut worker = equal(16)?;
    scan::until_merged(4, 12)?;
    scan::stop()?;
    worker.dontneed(0, 16)?;
    let mut stepper = Stepper::new(8)?;
    let passes = engine::read("full_scans")?;
    for _ in 0..4 {
        stepper.step()?;
    }
    let c = engine::counters()?;
    ensure!(c.shared == 0, "{c:?}");
    ensure!(engine::read("stable_node_dups")? == 0);
    println!("passes meanwhile: {}", engine::read("full_scans")? - passes);
    first.verify()?;
    worker.verify()?;
    PASS
}
