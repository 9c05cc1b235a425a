// SPDX-License-Identifier: GPL-2.0
//! `smart_scan`: pages that did not merge for some passes are skipped.

use anyhow::{ensure, Result};

use super::tests;
use crate::engine;
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
