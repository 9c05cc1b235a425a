// SPDX-License-Identifier: GPL-2.0
//! The files and counters of the engine under test.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};

use crate::timeout::scaled;

/// The directory of the in-tree engine's files.
pub const IN_TREE: &str = "/sys/kernel/mm/ksm";
/// The directory of rksm's files.
pub const RKSM: &str = "/sys/kernel/mm/rksm";

/// The files that both engines have, writable ones first.
pub const WRITABLE: [&str; 3] = ["run", "pages_to_scan", "sleep_millisecs"];
pub const READ_ONLY: [&str; 6] = [
    "pages_shared",
    "pages_sharing",
    "pages_unshared",
    "pages_volatile",
    "pages_scanned",
    "full_scans",
];

/// Whether the in-tree engine stands in for rksm (`RKSM_ENGINE=ksm`).
pub fn is_in_tree() -> bool {
    std::env::var("RKSM_ENGINE").is_ok_and(|v| v == "ksm")
}

/// The directory of the engine under test.
pub fn dir() -> &'static Path {
    Path::new(if is_in_tree() { IN_TREE } else { RKSM })
}

/// The name of the thread of the engine under test.
pub fn thread_name() -> &'static str {
    if is_in_tree() {
        "ksmd"
    } else {
        "rksmd"
    }
}

/// The path of one file of an engine.
pub fn path(dir: &Path, knob: &str) -> PathBuf {
    dir.join(knob)
}

/// Write `value` with a single write(2), so that the caller gets the kernel's error unchanged.
pub fn write_to(dir: &Path, knob: &str, value: &[u8]) -> io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).open(path(dir, knob))?;
    // `write_all()` skips an empty value, which must reach the kernel as well.
    let n = file.write(value)?;
    if n != value.len() {
        return Err(io::Error::from(io::ErrorKind::WriteZero));
    }
    Ok(())
}

pub fn write(knob: &str, value: impl ToString) -> Result<()> {
    let value = value.to_string();
    write_to(dir(), knob, value.as_bytes()).with_context(|| format!("writing {value} to {knob}"))
}

/// Return the errno with which the kernel refuses `value`; `None` if it accepts it.
pub fn refused(knob: &str, value: &str) -> Result<Option<i32>> {
    match write_to(dir(), knob, value.as_bytes()) {
        Ok(()) => Ok(None),
        Err(e) => match e.raw_os_error() {
            Some(errno) => Ok(Some(errno)),
            None => Err(e).with_context(|| format!("writing {value:?} to {knob}")),
        },
    }
}

pub fn read_from(dir: &Path, knob: &str) -> Result<u64> {
    let text = fs::read_to_string(path(dir, knob)).with_context(|| format!("reading {knob}"))?;
    text.trim_end()
        .parse()
        .with_context(|| format!("{knob} reads {text:?}"))
}

pub fn read(knob: &str) -> Result<u64> {
    read_from(dir(), knob)
}

/// All counters at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counters {
    pub shared: u64,
    pub sharing: u64,
    pub unshared: u64,
    pub volatile: u64,
    pub scanned: u64,
    pub full_scans: u64,
}

pub fn counters() -> Result<Counters> {
    Ok(Counters {
        shared: read("pages_shared")?,
        sharing: read("pages_sharing")?,
        unshared: read("pages_unshared")?,
        volatile: read("pages_volatile")?,
        scanned: read("pages_scanned")?,
        full_scans: read("full_scans")?,
    })
}

/// Reset the engine to its state after loading: nothing merged, stopped, default pace.
pub fn reset() -> Result<()> {
    // Writing the value that `run` already has does nothing, so write both.
    write("run", 0)?;
    write("run", 2)?;
    write("run", 0)?;
    if path(dir(), "advisor_mode").exists() {
        // With an advisor, other writes to `pages_to_scan` fail.
        write("advisor_mode", "none")?;
        write("advisor_max_cpu", 70)?;
        write("advisor_min_pages_to_scan", 500)?;
        write("advisor_max_pages_to_scan", 30_000)?;
        write("advisor_target_scan_time", 200)?;
    }
    write("pages_to_scan", 100)?;
    write("sleep_millisecs", 20)?;
    // The kernel refuses to change the last two while anything is merged.
    for (knob, value) in [
        ("use_zero_pages", 0),
        ("stable_node_chains_prune_millisecs", 2000),
        ("max_page_sharing", 256),
        ("merge_across_nodes", 1),
    ] {
        write(knob, value)?;
    }
    if !is_in_tree() {
        // The only setting that differs from the default. Passes a second apart would take hours, and only
        // the test writes to its memory meanwhile.
        write("pass_millisecs", 0)?;
    }
    if path(dir(), "smart_scan").exists() {
        write("smart_scan", 1)?;
    }
    Ok(())
}

/// Check that nothing is merged and that the engine is stopped.
pub fn check_clean() -> Result<()> {
    let (run, c) = (read("run")?, counters()?);
    if run != 0 || c.shared != 0 || c.sharing != 0 {
        bail!("left behind: run={run}, {c:?}");
    }
    Ok(())
}

/// Repeat `probe` until it returns true. Fail after `limit`.
pub fn wait_for(
    what: &str,
    limit: Duration,
    mut probe: impl FnMut() -> Result<bool>,
) -> Result<()> {
    let limit = scaled(limit);
    let end = Instant::now() + limit;
    while !probe()? {
        if Instant::now() > end {
            bail!("no {what} within {limit:?}; {:?}", counters());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
