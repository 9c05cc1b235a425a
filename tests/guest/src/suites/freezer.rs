// SPDX-License-Identifier: GPL-2.0
//! Freezing all tasks, and suspending to idle, in the middle of the engine's work.

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};

use super::tests;
use crate::background::Background;
use crate::engine;
use crate::harness::{skip, Module, Outcome, Suite, PASS};
use crate::scan;
use crate::sys::Ended;
use crate::worker::{verify_all, Worker};

pub const SUITE: Suite = Suite {
    name: "freezer",
    about: "all tasks are frozen, and the machine sleeps, while pages are merged and unmerged",
    module: Module::Loaded,
    tests: tests![
        ("freeze-while-scanning", 120, freeze_scanning),
        ("freeze-while-unmerging", 120, freeze_unmerging),
        ("freeze-while-idle", 60, freeze_idle),
        ("suspend-while-scanning", 120, suspend_scanning),
        ("suspend-while-unmerging", 120, suspend_unmerging),
        ("suspend-while-idle", 120, suspend_idle),
    ],
};

const N: usize = 1024;
const TEST: &str = "/sys/power/pm_test";
const STATE: &str = "/sys/power/state";
const SUCCESSES: &str = "/sys/power/suspend_stats/success";

/// A way to let the machine sleep; undone when dropped.
enum Sleep {
    /// A suspend freezes all tasks but this one for a second, and thaws them.
    FreezeOnly,
    /// The machine suspends to idle; the host presses the power button every few seconds (`scripts/vm
    /// --wake`).
    ToIdle,
    /// The reason why it cannot sleep.
    Never(&'static str),
}

impl Sleep {
    fn freezing() -> Result<Self> {
        if !fs::read_to_string(TEST).is_ok_and(|t| t.contains("freezer")) {
            return Ok(Self::Never(
                "the kernel cannot freeze tasks for a test (CONFIG_PM_DEBUG)",
            ));
        }
        fs::write(TEST, "freezer").context(TEST)?;
        let this = Self::FreezeOnly;
        fs::write("/sys/module/suspend/parameters/pm_test_delay", "1").context("pm_test_delay")?;
        Ok(this)
    }

    fn suspending() -> Result<Self> {
        if std::env::var("RKSM_WAKE").unwrap_or_default().is_empty() {
            return Ok(Self::Never(
                "nothing wakes this guest (scripts/vm --wake, RKSM_WAKE)",
            ));
        }
        if !fs::read_to_string(STATE).is_ok_and(|s| s.contains("freeze")) {
            return Ok(Self::Never("the kernel cannot suspend to idle"));
        }
        // A built-in driver is there without being loaded.
        let _ = Command::new("modprobe")
            .arg("button")
            .stderr(Stdio::null())
            .status();
        ensure!(
            fs::metadata("/sys/bus/platform/drivers/acpi-button").is_ok(),
            "no driver for the power button, which wakes the machine"
        );
        Ok(Self::ToIdle)
    }

    /// Sleep. Return after the machine woke up.
    fn sleep(&self) -> Result<()> {
        if matches!(self, Self::FreezeOnly) {
            return fs::write(STATE, "freeze").context("freezing");
        }
        let successes = || -> Result<u64> {
            let text = fs::read_to_string(SUCCESSES).context(SUCCESSES)?;
            text.trim().parse().context(SUCCESSES)
        };
        let before = successes()?;
        // A button that is pressed just before the machine sleeps keeps it awake.
        for _ in 0..5 {
            let begin = Instant::now();
            match fs::write(STATE, "freeze") {
                Ok(()) => {
                    ensure!(successes()? > before, "it did not sleep");
                    println!("slept {:.1} s", begin.elapsed().as_secs_f64());
                    return Ok(());
                }
                Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {}
                Err(e) => return Err(e).context("suspending to idle"),
            }
        }
        bail!("something keeps the machine awake")
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if matches!(self, Self::FreezeOnly) {
            let _ = fs::write(TEST, "none");
        }
    }
}

fn unmerged_pair() -> Result<[Worker; 2]> {
    Ok([Worker::mergeable(N, 100)?, Worker::mergeable(N, 100)?])
}

fn merged(workers: &mut [Worker]) -> Result<()> {
    scan::until_merged(N as u64, N as u64)?;
    verify_all(workers)
}

fn freeze_scanning() -> Outcome {
    scanning(&Sleep::freezing()?)
}

fn suspend_scanning() -> Outcome {
    scanning(&Sleep::suspending()?)
}

fn scanning(sleep: &Sleep) -> Outcome {
    if let Sleep::Never(why) = sleep {
        return skip(*why);
    }
    let mut workers = unmerged_pair()?;
    for round in 0..3u64 {
        scan::stop()?;
        for worker in &mut workers {
            worker.fill(0, N, 5000 * (round + 1), 1)?;
        }
        let before = engine::read("pages_scanned")?;
        scan::start()?;
        // The scan has begun, but had too little time to merge all.
        engine::wait_for("scanning", Duration::from_secs(20), || {
            Ok(engine::read("pages_scanned")? > before)
        })?;
        sleep.sleep()?;
        merged(&mut workers)?;
    }
    PASS
}

fn freeze_unmerging() -> Outcome {
    unmerging(&Sleep::freezing()?)
}

fn suspend_unmerging() -> Outcome {
    unmerging(&Sleep::suspending()?)
}

fn unmerging(sleep: &Sleep) -> Outcome {
    if let Sleep::Never(why) = sleep {
        return skip(*why);
    }
    let mut workers = unmerged_pair()?;
    for _ in 0..3 {
        merged(&mut workers)?;
        let unmerging = Background::once(|| engine::write("run", 2))?;
        sleep.sleep()?;
        let how = unmerging.join(Duration::from_secs(40))?;
        ensure!(how == Ended::Exit(0), "unmerging ended by {how:?}");
        let c = engine::counters()?;
        ensure!((c.shared, c.sharing) == (0, 0), "{c:?}");
        verify_all(&mut workers)?;
    }
    merged(&mut workers)?;
    PASS
}

fn freeze_idle() -> Outcome {
    idle(&Sleep::freezing()?)
}

fn suspend_idle() -> Outcome {
    idle(&Sleep::suspending()?)
}

fn idle(sleep: &Sleep) -> Outcome {
    if let Sleep::Never(why) = sleep {
        return skip(*why);
    }
    let mut workers = unmerged_pair()?;
    merged(&mut workers)?;
    scan::stop()?;
    sleep.sleep()?;
    // A long sleep between batches must not keep the system from freezing.
    engine::write("sleep_millisecs", 60_000)?;
    engine::write("run", 1)?;
    sleep.sleep()?;
    verify_all(&mut workers)?;
    engine::write("sleep_millisecs", 1)?;
    scan::passes(2)?;
    PASS
}
