// SPDX-License-Identifier: GPL-2.0
//! The kernel's trace buffer, and the trace events of the group `ksm` in it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{ensure, Context, Result};

use crate::engine;

const TRACEFS: &str = "/sys/kernel/tracing";

/// Why a test that needs the events of the group is skipped.
pub const NO_EVENTS: &str = "the kernel has no trace events of the group ksm";

/// Return the directory of tracefs, mounted if necessary.
pub fn mounted() -> Result<PathBuf> {
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
pub struct Recorder(PathBuf);

impl Recorder {
    /// Start to record. `None` if the kernel has no such events.
    pub fn start() -> Result<Option<Self>> {
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

    /// Write to a file of tracefs.
    pub fn write(&self, file: &str, what: &str) -> Result<()> {
        fs::write(self.0.join(file), what).with_context(|| format!("{file} in tracefs"))
    }

    /// Return the whole trace so far.
    pub fn text(&self) -> Result<String> {
        fs::read_to_string(self.0.join("trace")).context("trace in tracefs")
    }

    /// Return the lines of one event so far: the task and the text.
    pub fn lines(&self, event: &str) -> Result<Vec<(String, String)>> {
        let text = self.text()?;
        let mark = format!(": {event}: ");
        let split = |line: &str| {
            let (head, tail) = line.split_once(&mark)?;
            let task = head.split_whitespace().next()?;
            Some((task.to_owned(), tail.to_owned()))
        };
        Ok(text.lines().filter_map(split).collect())
    }

    /// Count the lines of an event that are by the engine's thread and whose text satisfies `says`.
    pub fn count(&self, event: &str, says: impl Fn(&str) -> bool) -> Result<usize> {
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
