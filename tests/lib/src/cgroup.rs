// SPDX-License-Identifier: GPL-2.0
//! Memory control groups (version 2).

use std::fs;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::engine::wait_for;

const ROOT: &str = "/sys/fs/cgroup";

/// Moves a process out of any group.
pub fn enter_root(pid: u32) -> Result<()> {
    fs::write(format!("{ROOT}/cgroup.procs"), pid.to_string()).context("cgroup.procs")
}

/// A group; removed when dropped, if nobody is in it any more.
pub struct Group(PathBuf);

impl Group {
    /// An empty group. `None` if the kernel has no memory controller.
    pub fn new(name: &str) -> Result<Option<Self>> {
        let controllers = fs::read_to_string(format!("{ROOT}/cgroup.controllers"));
        if !controllers.is_ok_and(|c| c.split_whitespace().any(|c| c == "memory")) {
            return Ok(None);
        }
        fs::write(format!("{ROOT}/cgroup.subtree_control"), "+memory").context("+memory")?;
        let path = PathBuf::from(format!("{ROOT}/rksm-{name}"));
        match fs::create_dir(&path) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                fs::remove_dir(&path).context("a group that was left behind")?;
                fs::create_dir(&path).context("cgroup")?;
            }
            result => result.context("cgroup")?,
        }
        Ok(Some(Self(path)))
    }

    /// Another handle on the same group.
    pub fn again(&self) -> std::mem::ManuallyDrop<Self> {
        std::mem::ManuallyDrop::new(Self(self.0.clone()))
    }

    /// Moves a process into the group. What it has in memory stays where it is charged.
    pub fn enter(&self, pid: u32) -> Result<()> {
        fs::write(self.0.join("cgroup.procs"), pid.to_string()).context("cgroup.procs")
    }

    /// Who is in it.
    pub fn members(&self) -> Result<Vec<u32>> {
        let text = fs::read_to_string(self.0.join("cgroup.procs")).context("cgroup.procs")?;
        text.lines().map(|pid| Ok(pid.parse()?)).collect()
    }

    /// Writes one of its files, such as `memory.max`.
    pub fn set(&self, file: &str, value: &str) -> Result<()> {
        fs::write(self.0.join(file), value).with_context(|| file.to_string())
    }

    /// Bytes charged to the group.
    pub fn current(&self) -> Result<u64> {
        let text = fs::read_to_string(self.0.join("memory.current")).context("memory.current")?;
        text.trim().parse().context("memory.current")
    }

    /// A value of `memory.stat`.
    pub fn stat(&self, key: &str) -> Result<u64> {
        // Each CPU counts for itself and hands in its sum now and then: now.
        fs::write("/proc/sys/vm/stat_refresh", "1").context("stat_refresh")?;
        self.value("memory.stat", key)
    }

    /// How often something happened, of what `memory.events` counts.
    pub fn event(&self, key: &str) -> Result<u64> {
        self.value("memory.events", key)
    }

    fn value(&self, file: &str, key: &str) -> Result<u64> {
        let text = fs::read_to_string(self.0.join(file)).with_context(|| file.to_string())?;
        let value = text.lines().find_map(|line| {
            let (name, value) = line.split_once(' ')?;
            (name == key).then(|| value.parse().ok())?
        });
        value.with_context(|| format!("{key} in {file}"))
    }

    /// Asks for `bytes` of the group's memory to be reclaimed; false if less was.
    pub fn reclaim(&self, bytes: usize) -> Result<bool> {
        match fs::write(self.0.join("memory.reclaim"), bytes.to_string()) {
            Ok(()) => Ok(true),
            Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => Ok(false),
            Err(e) => Err(e).context("memory.reclaim"),
        }
    }

    /// Removes the group, from which everybody has gone.
    pub fn remove(self) -> Result<()> {
        wait_for("end of a cgroup", Duration::from_secs(20), || {
            Ok(fs::remove_dir(&self.0).is_ok())
        })
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}
