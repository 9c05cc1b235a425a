// SPDX-License-Identifier: GPL-2.0
//! Let allocations of a task fail: failslab and fail_page_alloc.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result};

const DEBUG: &str = "/sys/kernel/debug";
const KINDS: [&str; 2] = ["failslab", "fail_page_alloc"];

/// Why a test that needs failing allocations is skipped.
pub const NO_INJECTION: &str =
    "the kernel cannot make allocations fail (no CONFIG_FAILSLAB, CONFIG_FAIL_PAGE_ALLOC)";

/// Fault injection into all kinds of allocations, switched on while this lives. No task is marked at first.
pub struct Injection {
    /// The switches of the marked tasks. They are opened before any allocation fails, as opening allocates.
    marked: Vec<File>,
}

impl Injection {
    /// Switch on fault injection. `None` if the kernel does not support it.
    pub fn new() -> Result<Option<Self>> {
        if !KINDS.iter().all(|k| Path::new(DEBUG).join(k).exists()) {
            return Ok(None);
        }
        let this = Self { marked: Vec::new() };
        set("probability", "0")?;
        set("task-filter", "Y")?;
        set("ignore-gfp-wait", "N")?;
        set("interval", "1")?;
        set("times", "-1")?;
        for kind in fs::read_dir(DEBUG).context("debugfs")?.flatten() {
            if kind.file_name().to_string_lossy().starts_with("fail") {
                // `Nth` counts every kind of fault. A stack trace in the log for each would be noise.
                let _ = fs::write(kind.path().join("verbose"), "0");
            }
        }
        fs::write(format!("{DEBUG}/fail_page_alloc/min-order"), "0").context("min-order")?;
        fs::write(format!("{DEBUG}/fail_page_alloc/ignore-gfp-highmem"), "N")
            .context("ignore-gfp-highmem")?;
        Ok(Some(this))
    }

    /// Let `percent` of the allocations of a task, and of its future children, fail.
    pub fn random(&mut self, task: u32, percent: u32) -> Result<()> {
        let file = OpenOptions::new()
            .write(true)
            .open(format!("/proc/{task}/make-it-fail"))
            .context("make-it-fail")?;
        self.marked.reserve(1);
        set("probability", &percent.to_string())?;
        file.write_at(b"1", 0).context("make-it-fail")?;
        self.marked.push(file);
        Ok(())
    }

    /// Undo [`Self::random`].
    pub fn end_random(&mut self) -> Result<()> {
        for file in self.marked.drain(..) {
            // The task may be gone. If it is this one, the write itself may fail.
            let _ = (0..100).any(|_| file.write_at(b"0", 0).is_ok());
        }
        set("probability", "0")
    }
}

/// Set one value for all kinds.
fn set(file: &str, value: &str) -> Result<()> {
    for kind in KINDS {
        fs::write(format!("{DEBUG}/{kind}/{file}"), value)
            .with_context(|| format!("{kind}/{file}"))?;
    }
    Ok(())
}

impl Drop for Injection {
    fn drop(&mut self) {
        let _ = self.end_random();
    }
}

/// Restrict failing allocations to those below one function, while this lives.
pub struct Below(());

impl Below {
    /// Restrict them to those below the kernel's `function`; `None` if the kernel cannot tell.
    pub fn new(function: &str) -> Result<Option<Self>> {
        if !Path::new(DEBUG).join("failslab/require-start").exists() {
            return Ok(None);
        }
        let (start, end) = text_range(function)?;
        let this = Self(());
        set("stacktrace-depth", "32")?;
        set("require-start", &format!("{start:#x}"))?;
        set("require-end", &format!("{end:#x}"))?;
        Ok(Some(this))
    }
}

impl Drop for Below {
    fn drop(&mut self) {
        let _ = set("require-start", "0");
        let _ = set("require-end", "0xffffffffffffffff");
        let _ = set("stacktrace-depth", "0");
    }
}

/// Return the address of a kernel function and that of the next symbol.
fn text_range(function: &str) -> Result<(u64, u64)> {
    let symbols = fs::read_to_string("/proc/kallsyms").context("kallsyms")?;
    let mut start = None;
    let mut end = u64::MAX;
    let places: Vec<(u64, &str)> = symbols
        .lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let at = u64::from_str_radix(words.next()?, 16).ok()?;
            Some((at, words.nth(1)?))
        })
        .collect();
    for &(at, name) in &places {
        if name == function {
            start = Some(at);
        }
    }
    let start = start
        .filter(|&at| at != 0)
        .with_context(|| format!("no {function}"))?;
    for &(at, _) in &places {
        if at > start {
            end = end.min(at);
        }
    }
    Ok((start, end))
}

/// The switch that makes one chosen allocation of a task fail.
pub struct Nth(File);

impl Nth {
    /// Open the switch of task `pid`.
    pub fn of(pid: u32) -> Result<Self> {
        Self::open(&format!("/proc/{pid}/fail-nth"))
    }

    /// Open the switch of the calling thread.
    pub fn own() -> Result<Self> {
        Self::open("/proc/thread-self/fail-nth")
    }

    fn open(path: &str) -> Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path);
        Ok(Self(file.context("fail-nth")?))
    }

    /// Let the `n`-th allocation from now on fail, counted from 1.
    pub fn set(&self, n: u32) -> Result<()> {
        self.0
            .write_at(n.to_string().as_bytes(), 0)
            .context("fail-nth")?;
        Ok(())
    }

    /// Switch off. Return whether the allocation has failed.
    pub fn end(&self) -> Result<bool> {
        let mut text = [0u8; 16];
        // This read may be the allocation that fails. In that case none failed before it.
        let look = self.0.read_at(&mut text, 0);
        let own = (0..3).any(|_| self.0.write_at(b"0", 0).is_ok());
        anyhow::ensure!(own, "fail-nth cannot be ended");
        let Ok(len) = look else {
            return Ok(false);
        };
        let text = String::from_utf8_lossy(&text[..len]);
        let left: u32 = text.trim().parse().context("fail-nth")?;
        Ok(left == 0)
    }
}
