// SPDX-License-Identifier: GPL-2.0
//! All tasks are frozen in the middle of things, as a suspend does first.
//!
//! A real suspend to idle is not tried: nothing wakes the guest from it.

use std::fs;
use std::time::Duration;

use anyhow::{ensure, Context, Result};

use super::tests;
use crate::background::Background;
use crate::engine;
use crate::harness::{skip, Module, Outcome, Theme, PASS};
use crate::scan;
use crate::sys::Ended;
use crate::worker::{verify_all, Worker};

pub const THEME: Theme = Theme {
    name: "freezer",
    about: "all tasks are frozen, as for a suspend, while pages are merged and unmerged",
    module: Module::Loaded,
    tests: tests![
        ("freeze-while-scanning", 120, scanning),
        ("freeze-while-unmerging", 120, unmerging),
        ("freeze-while-idle", 60, idle),
    ],
};

const N: usize = 1024;
const TEST: &str = "/sys/power/pm_test";
const STATE: &str = "/sys/power/state";

/// Has a suspend only freeze all tasks, for a second; undone when dropped.
struct FreezeOnly(());

impl FreezeOnly {
    /// `None` if the kernel cannot.
    fn new() -> Result<Option<Self>> {
        if !fs::read_to_string(TEST).is_ok_and(|t| t.contains("freezer")) {
            return Ok(None);
        }
        fs::write(TEST, "freezer").context(TEST)?;
        let this = Self(());
        fs::write("/sys/module/suspend/parameters/pm_test_delay", "1").context("pm_test_delay")?;
        Ok(Some(this))
    }

    /// Freezes all tasks but this one, and thaws them.
    fn freeze(&self) -> Result<()> {
        fs::write(STATE, "freeze").context("freezing")
    }
}

impl Drop for FreezeOnly {
    fn drop(&mut self) {
        let _ = fs::write(TEST, "none");
    }
}

const NO_TEST: &str = "the kernel cannot freeze tasks for a test (CONFIG_PM_DEBUG)";

fn unmerged_pair() -> Result<[Worker; 2]> {
    Ok([Worker::mergeable(N, 100)?, Worker::mergeable(N, 100)?])
}

fn merged(workers: &mut [Worker]) -> Result<()> {
    scan::until_merged(N as u64, N as u64)?;
    verify_all(workers)
}

fn scanning() -> Outcome {
    let Some(freezer) = FreezeOnly::new()? else {
        return skip(NO_TEST);
    };
    let mut workers = unmerged_pair()?;
    for round in 0..3u64 {
        for worker in &mut workers {
            worker.fill(0, N, 5000 * (round + 1), 1)?;
        }
        scan::start()?;
        freezer.freeze()?;
        merged(&mut workers)?;
    }
    PASS
}

fn unmerging() -> Outcome {
    let Some(freezer) = FreezeOnly::new()? else {
        return skip(NO_TEST);
    };
    let mut workers = unmerged_pair()?;
    for _ in 0..3 {
        merged(&mut workers)?;
        let unmerging = Background::once(|| engine::write("run", 2))?;
        freezer.freeze()?;
        let how = unmerging.join(Duration::from_secs(40))?;
        ensure!(how == Ended::Exit(0), "unmerging ended by {how:?}");
        let c = engine::counters()?;
        ensure!((c.shared, c.sharing) == (0, 0), "{c:?}");
        verify_all(&mut workers)?;
    }
    merged(&mut workers)?;
    PASS
}

fn idle() -> Outcome {
    let Some(freezer) = FreezeOnly::new()? else {
        return skip(NO_TEST);
    };
    let mut workers = unmerged_pair()?;
    merged(&mut workers)?;
    scan::stop()?;
    freezer.freeze()?;
    // A long sleep between batches must not keep the system from freezing either.
    engine::write("sleep_millisecs", 60_000)?;
    engine::write("run", 1)?;
    freezer.freeze()?;
    verify_all(&mut workers)?;
    engine::write("sleep_millisecs", 1)?;
    scan::passes(2)?;
    PASS
}
