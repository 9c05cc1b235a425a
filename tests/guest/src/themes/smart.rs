// SPDX-License-Identifier: GPL-2.0
//! `smart_scan`: pages that did not merge for some passes are skipped.

use std::time::Duration;

use anyhow::{ensure, Result};

use super::tests;
use crate::engine::{self, wait_for};
use crate::harness::{skip, Module, Outcome, Theme, PASS};
use crate::pageflags::merged;
use crate::scan;
use crate::worker::{verify_all, Worker};

pub const THEME: Theme = Theme {
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
    ],
};

/// A few page tables full.
const MANY: usize = 1200;
/// More passes than in-tree KSM or rksm skips in a row, twice.
const PATIENCE: u64 = 20;
const IN_TREE_MISSES: &str =
    "in-tree KSM merges two unmerged pages only if one pass looks at both, which may not come to be for long";

/// A process with pages that have no equal, after so many passes that they are old.
fn old() -> Result<Worker> {
    engine::write("smart_scan", 1)?;
    let mut worker = Worker::mergeable(MANY, 0)?;
    worker.fill(0, MANY, 1000, 1)?;
    scan::passes(2 * PATIENCE)?;
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
    scan::passes(PATIENCE)?;
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

fn new_equals() -> Outcome {
    if engine::is_in_tree() {
        return skip(IN_TREE_MISSES);
    }
    let worker = old()?;
    let mut other = Worker::mergeable(MANY, 0)?;
    other.fill(0, MANY, 1000, 1)?;
    let mut workers = [worker, other];
    // Enough for the new ones to be tried, and for the old ones to have their turn.
    scan::passes(PATIENCE)?;
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
    scan::passes(PATIENCE)?;
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
    scan::passes(PATIENCE)?;
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
    let mut worker = Worker::with_pages(OLD + NEW)?;
    worker.advise(0, OLD + NEW, libc::MADV_NOHUGEPAGE)?;
    worker.fill(0, OLD, 1000, 1)?;
    worker.advise(0, OLD + NEW, libc::MADV_MERGEABLE)?;
    scan::passes(2 * PATIENCE)?;
    // Each page is a batch.
    engine::write("pages_to_scan", 1)?;
    engine::write("sleep_millisecs", 0)?;
    // Not so fast that passes go by between two looks at the counters, on a busy machine.
    engine::write("pass_millisecs", 1000)?;
    worker.fill(OLD, NEW, 9000, 1)?;
    let until = |what: &str, most: u64, probe: &dyn Fn() -> Result<bool>| -> Result<u64> {
        let begin = engine::read("full_scans")?;
        wait_for(what, Duration::from_secs(60), probe)?;
        let passes = engine::read("full_scans")? - begin;
        ensure!(passes <= most, "{what}: after {passes} passes");
        Ok(passes)
    };
    // The old ones' rest may have to be over first. Seen once, they count as volatile.
    let seen = until("seen", PATIENCE, &|| {
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
