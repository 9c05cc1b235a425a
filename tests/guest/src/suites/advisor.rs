// SPDX-License-Identifier: GPL-2.0
//! The scan-time advisor.

use std::fs;
use std::time::Duration;

use anyhow::{ensure, Result};

use super::tests;
use crate::engine::{self, wait_for};
use crate::harness::{skip, Module, Outcome, Suite, PASS};
use crate::scan;
use crate::tracefs::{Recorder, NO_EVENTS};
use crate::worker::Worker;

pub const SUITE: Suite = Suite {
    name: "advisor",
    about: "the scan-time advisor decides on pages_to_scan, within its limits",
    module: Module::Loaded,
    tests: tests![
        ("switching", 60, switching),
        ("advice-keeps-to-the-limits", 90, limits),
        ("advice-is-traced", 90, traced),
        ("nothing-changes-without-it", 60, without),
    ],
};

const TIMEOUT: Duration = Duration::from_secs(60);

fn mode() -> Result<String> {
    Ok(fs::read_to_string(engine::path(
        engine::dir(),
        "advisor_mode",
    ))?)
}

/// Wait for `count` passes to end. Unlike `scan::passes`, do not write to `pages_to_scan`.
fn passes(count: u64) -> Result<()> {
    let goal = engine::read("full_scans")? + count;
    wait_for(
        "passes",
        TIMEOUT,
        || Ok(engine::read("full_scans")? >= goal),
    )
}

fn switching() -> Outcome {
    ensure!(mode()? == "[none] scan-time\n");
    engine::write("pages_to_scan", 123)?;
    // This is its value already, so nothing changes.
    engine::write("advisor_mode", "none")?;
    ensure!(engine::read("pages_to_scan")? == 123);
    engine::write("advisor_mode", "scan-time")?;
    ensure!(mode()? == "none [scan-time]\n");
    ensure!(engine::read("pages_to_scan")? == 500);
    let refused = engine::write_to(engine::dir(), "pages_to_scan", b"100");
    let errno = refused.err().and_then(|err| err.raw_os_error());
    ensure!(errno == Some(libc::EINVAL), "pages_to_scan: {errno:?}");
    engine::write("advisor_min_pages_to_scan", 700)?;
    ensure!(engine::read("pages_to_scan")? == 500);
    engine::write("advisor_mode", "scan-time")?;
    ensure!(engine::read("pages_to_scan")? == 500);
    engine::write("advisor_mode", "none")?;
    ensure!(engine::read("pages_to_scan")? == 100);
    engine::write("advisor_mode", "scan-time\n")?;
    ensure!(engine::read("pages_to_scan")? == 700);
    PASS
}

fn limits() -> Outcome {
    let _worker = Worker::mergeable(64, 100)?;
    scan::start()?;
    engine::write("advisor_max_pages_to_scan", 40)?;
    engine::write("advisor_mode", "scan-time")?;
    // The first pass that ends may have begun before.
    passes(3)?;
    let pages = engine::read("pages_to_scan")?;
    ensure!((10..=40).contains(&pages), "{pages} pages");
    // Nothing is to be done and the upper limit is high, so the minimum CPU share decides.
    engine::write("advisor_max_pages_to_scan", 30_000)?;
    wait_for("more pages", TIMEOUT, || {
        Ok(engine::read("pages_to_scan")? > 40)
    })?;
    PASS
}

fn traced() -> Outcome {
    let Some(recorder) = Recorder::start()? else {
        return skip(NO_EVENTS);
    };
    let _worker = Worker::mergeable(64, 100)?;
    scan::start()?;
    passes(2)?;
    let early = recorder.count("ksm_advisor", |_| true)?;
    ensure!(early == 0, "{early} times advice though it is off");
    engine::write("advisor_max_pages_to_scan", 33)?;
    engine::write("advisor_mode", "scan-time")?;
    passes(4)?;
    scan::stop()?;
    let pages = engine::read("pages_to_scan")?;
    let all = recorder.count("ksm_advisor", |_| true)?;
    let says = format!(" pages_to_scan {pages} cpu percent ");
    let good = recorder.count("ksm_advisor", |what| {
        what.starts_with("ksm scan time ") && what.contains(&says)
    })?;
    ensure!(all >= 2 && good >= 1, "{good} of {all} say {pages} pages");
    PASS
}

fn without() -> Outcome {
    let _worker = Worker::mergeable(64, 100)?;
    scan::passes(3)?;
    scan::stop()?;
    ensure!(engine::read("pages_to_scan")? == 1_000_000);
    PASS
}
