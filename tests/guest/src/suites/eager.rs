// SPDX-License-Identifier: GPL-2.0
//! Merging at first sight, which the in-tree engine cannot do.

use anyhow::{ensure, Result};

use super::tests;
use crate::engine;
use crate::harness::{skip, Module, Outcome, Suite, PASS};
use crate::scan::Stepper;
use crate::worker::{verify_all, Worker};

pub const SUITE: Suite = Suite {
    name: "eager",
    about:
        "merge_eagerly: one pass is enough, and pages that are soon written again are left alone",
    module: Module::Loaded,
    tests: tests![
        ("merges-in-one-pass", 60, one_pass),
        ("backs-off-from-pages-soon-broken", 60, backs_off),
        ("off-by-default-and-bad-values", 30, knob),
    ],
};

const NOT_IN_TREE: &str = "the in-tree engine has no merge_eagerly";
const N: usize = 16;
const ALL: u32 = 1_000_000;

/// Switches it off again when the test ends.
struct Eager;

impl Eager {
    fn on() -> Result<Self> {
        engine::write("merge_eagerly", 1)?;
        Ok(Eager)
    }
}

impl Drop for Eager {
    fn drop(&mut self) {
        let _ = engine::write("merge_eagerly", 0);
    }
}

fn one_pass() -> Outcome {
    if engine::is_in_tree() {
        return skip(NOT_IN_TREE);
    }
    let _eager = Eager::on()?;
    let mut workers = [
        Worker::mergeable(N, 100)?,
        Worker::mergeable(N, 100)?,
        Worker::mergeable(N, 100)?,
    ];
    let before = engine::read("full_scans")?;
    let mut stepper = Stepper::new(ALL)?;
    let mut c = stepper.step()?;
    while c.full_scans == before {
        c = stepper.step()?;
    }
    ensure!(c.full_scans == before + 1, "{c:?}");
    ensure!(
        c.shared == N as u64 && c.sharing == 2 * N as u64,
        "after one pass: {c:?}"
    );
    for worker in &mut workers {
        worker.fill(0, 1, 999, 1)?;
    }
    verify_all(&mut workers)?;
    PASS
}

fn backs_off() -> Outcome {
    if engine::is_in_tree() {
        return skip(NOT_IN_TREE);
    }
    let _eager = Eager::on()?;
    let mut workers = [Worker::mergeable(N, 100)?, Worker::mergeable(N, 100)?];
    let mut stepper = Stepper::new(ALL)?;
    while stepper.step()?.sharing != N as u64 {}
    // Write right after the pages merged, and make them equal again at once.
    for worker in &mut workers {
        worker.fill(0, N, 500, 1)?;
    }
    let pass = engine::read("full_scans")?;
    let mut c = stepper.step()?;
    while c.full_scans == pass {
        c = stepper.step()?;
    }
    ensure!(c.sharing == 0, "merged at first sight again: {c:?}");
    // The delay ends: the pages are unchanged over two passes.
    for _ in 0..4 {
        c = stepper.step()?;
    }
    ensure!(c.sharing == N as u64, "{c:?}");
    verify_all(&mut workers)?;
    PASS
}

fn knob() -> Outcome {
    if engine::is_in_tree() {
        return skip(NOT_IN_TREE);
    }
    ensure!(engine::read("merge_eagerly")? == 0);
    for bad in [2u32, 100] {
        ensure!(engine::write("merge_eagerly", bad).is_err(), "took {bad}");
    }
    ensure!(engine::read("merge_eagerly")? == 0);
    PASS
}
