// SPDX-License-Identifier: GPL-2.0
//! Count the calls of a kernel function.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};

const TRACING: &str = "/sys/kernel/tracing";

/// A probe on the entry of one function; removed when dropped.
pub struct Calls {
    name: String,
}

impl Calls {
    /// Set the probe. `None` if the kernel has no kprobes.
    pub fn of(function: &str) -> Result<Option<Self>> {
        if !Path::new(TRACING).join("kprobe_events").exists() {
            return Ok(None);
        }
        let this = Self {
            name: format!("rksm_{}", std::process::id()),
        };
        command(&format!("p:{} {function}", this.name))
            .with_context(|| format!("probe on {function}"))?;
        this.enable("1")?;
        Ok(Some(this))
    }

    fn enable(&self, on: &str) -> Result<()> {
        let file = format!("{TRACING}/events/kprobes/{}/enable", self.name);
        fs::write(&file, on).context(file)
    }

    /// Return the number of calls so far.
    pub fn count(&self) -> Result<u64> {
        let text = fs::read_to_string(format!("{TRACING}/kprobe_profile"))?;
        let hits = text.lines().find_map(|line| {
            let mut words = line.split_whitespace();
            (words.next() == Some(&self.name)).then(|| words.next()?.parse().ok())?
        });
        hits.with_context(|| format!("{} in kprobe_profile", self.name))
    }
}

fn command(what: &str) -> Result<()> {
    let mut file = OpenOptions::new()
        .append(true)
        .open(format!("{TRACING}/kprobe_events"))?;
    Ok(file.write_all(format!("{what}\n").as_bytes())?)
}

impl Drop for Calls {
    fn drop(&mut self) {
        let _ = self.enable("0");
        let _ = command(&format!("-:{}", self.name));
    }
}
