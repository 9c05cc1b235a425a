// SPDX-License-Identifier: GPL-2.0
//! The trace events of the group `ksm`.

use anyhow::ensure;

use super::tests;
use crate::engine;
use crate::harness::{skip, Module, Outcome, Suite, PASS};
use crate::scan;
use crate::tracefs::{Recorder, NO_EVENTS};
use crate::worker::Worker;

pub const SUITE: Suite = Suite {
    name: "trace",
    about: "the events of the group ksm show the engine's work",
    module: Module::Loaded,
    tests: tests![
        ("merging-and-unmerging-is-seen", 90, merging),
        ("processes-that-are-gone-are-seen", 90, gone),
        ("nothing-is-seen-when-off", 60, off),
    ],
};

const N: usize = 8;

fn merging() -> Outcome {
    let Some(recorder) = Recorder::start()? else {
        return skip(NO_EVENTS);
    };
    let workers = [
        Worker::mergeable(N, 100)?,
        Worker::mergeable(N, 100)?,
        Worker::mergeable(N, 100)?,
    ];
    scan::until_merged(N as u64, 2 * N as u64)?;
    scan::stop()?;
    let entered = recorder.lines("ksm_enter")?.len();
    ensure!(entered >= 3, "{entered} processes entered");
    // Pages that became KSM pages, and pages that merged with one.
    let merged = "ksm_merge_with_ksm_page";
    let ok = |what: &str| what.ends_with(" error 0");
    let published = recorder.count(merged, |what| ok(what) && what.starts_with("pfn "))?;
    let joined = recorder.count(merged, |what| ok(what) && what.starts_with("ksm pfn "))?;
    ensure!(published == N, "{published} pages were made merged ones");
    ensure!(joined == 2 * N, "{joined} pages were merged into these");
    let started = recorder.count("ksm_start_scan", |what| what.starts_with("seq "))?;
    let size = format!(" rmap size {}", 3 * N);
    let stopped = recorder.count("ksm_stop_scan", |what| what.contains(" rmap size "))?;
    ensure!(
        started > 1 && stopped > 1,
        "{started} began, {stopped} ended"
    );
    let full = recorder.count("ksm_stop_scan", |what| what.ends_with(&size))?;
    ensure!(full > 0, "no pass ended with {} pages", 3 * N);
    // The writer of `run` removes them.
    engine::write("run", 2)?;
    let removed = recorder.lines("ksm_remove_ksm_page")?.len();
    ensure!(removed == N, "{removed} merged pages were removed");
    drop(workers);
    PASS
}

fn gone() -> Outcome {
    let Some(recorder) = Recorder::start()? else {
        return skip(NO_EVENTS);
    };
    let workers = [Worker::mergeable(N, 100)?, Worker::mergeable(N, 100)?];
    scan::until_merged(N as u64, N as u64)?;
    for worker in workers {
        worker.exit()?;
    }
    scan::until_merged(0, 0)?;
    scan::passes(2)?;
    let gone = recorder.lines("ksm_exit")?.len();
    ensure!(gone >= 2, "{gone} processes left");
    let pages = recorder.lines("ksm_remove_ksm_page")?.len();
    ensure!(pages == N, "{pages} merged pages were removed");
    PASS
}

fn off() -> Outcome {
    let Some(recorder) = Recorder::start()? else {
        return skip(NO_EVENTS);
    };
    recorder.write("events/ksm/enable", "0")?;
    recorder.write("trace", "")?;
    let _workers = [Worker::mergeable(N, 100)?, Worker::mergeable(N, 100)?];
    scan::until_merged(N as u64, N as u64)?;
    for event in ["ksm_start_scan", "ksm_merge_with_ksm_page", "ksm_enter"] {
        let lines = recorder.lines(event)?.len();
        ensure!(lines == 0, "{lines} of {event}");
    }
    PASS
}
