// SPDX-License-Identifier: GPL-2.0
//! The trace events of the group `ksm`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{ensure, Context, Result};

use super::tests;
use crate::engine;
use crate::harness::{skip, Module, Outcome, Suite, PASS};
use crate::scan;
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

const TRACEFS: &str = "/sys/kernel/tracing";
const N: usize = 8;

pub(super) fn mounted() -> Result<PathBuf> {
    let dir = Path::new(TRACEFS);
    if !dir.join("trace").exists() {
        // SAFETY: The arguments are C strings that outlive the call, and no data.
        let ret = unsafe {
            libc::mount(
                c"tracefs".as_ptr(),
                c"/sys/kernel/tracing".as_ptr(),
                c"tracefs".as_ptr(),
                0,
                std::ptr::null(),
            )
        };
        ensure!(ret == 0, "no tracefs: {}", io::Error::last_os_error());
    }
    Ok(dir.into())
}

/// The events of the group, recorded until dropped.
pub(super) struct Recorder(PathBuf);

impl Recorder {
    /// Start to record. `None` if the kernel has no such events.
    pub(super) fn start() -> Result<Option<Self>> {
        let dir = mounted()?;
        if !dir.join("events/ksm/enable").exists() {
            return Ok(None);
        }
        let recorder = Self(dir);
        recorder.write("events/ksm/enable", "0")?;
        recorder.write("buffer_size_kb", "1024")?;
        recorder.write("trace", "")?;
        recorder.write("events/ksm/enable", "1")?;
        Ok(Some(recorder))
    }

    fn write(&self, file: &str, what: &str) -> Result<()> {
        fs::write(self.0.join(file), what).with_context(|| format!("{file} in tracefs"))
    }

    /// Return the lines of one event so far: the task and the text.
    fn lines(&self, event: &str) -> Result<Vec<(String, String)>> {
        let text = fs::read_to_string(self.0.join("trace"))?;
        let mark = format!(": {event}: ");
        let split = |line: &str| {
            let (head, tail) = line.split_once(&mark)?;
            let task = head.split_whitespace().next()?;
            Some((task.to_owned(), tail.to_owned()))
        };
        Ok(text.lines().filter_map(split).collect())
    }

    /// Count the lines of an event that are by the engine's thread and whose text satisfies `says`.
    pub(super) fn count(&self, event: &str, says: impl Fn(&str) -> bool) -> Result<usize> {
        let name = format!("{}-", engine::thread_name());
        let lines = self.lines(event)?;
        Ok(lines
            .iter()
            .filter(|(task, what)| task.starts_with(&name) && says(what))
            .count())
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        let _ = self.write("events/ksm/enable", "0");
    }
}

pub(super) const NO_EVENTS: &str = "the kernel has no trace events of the group ksm";

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
