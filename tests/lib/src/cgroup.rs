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

/// A memory cgroup. Dropping it removes the group, provided that it is empty.
pub struct Group(PathBuf);

impl Group {
    /// Create an empty group. `None` if the kernel has no memory controller.
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

    /// Return another handle on the same group.
    pub fn again(&self) -> std::mem::ManuallyDrop<Self> {
        std::mem::ManuallyDrop::new(Self(self.0.clone()))
    }

    /// Move a process into the group. Memory that it already has stays charged to its old group.
    pub fn enter(&self, pid: u32) -> Result<()> {
        fs::write(self.0.join("cgroup.procs"), pid.to_string()).context("cgroup.procs")
    }

    /// Return the pids of the group's processes.
    pub fn members(&self) -> Result<Vec<u32>> {
        let text = fs::read_to_string(self.0.join("cgroup.procs")).context("cgroup.procs")?;
        text.lines().map(|pid| Ok(pid.parse()?)).collect()
    }

    /// Write one of the group's files, such as `memory.max`.
    pub fn set(&self, file: &str, value: &str) -> Result<()> {
        fs::write(self.0.join(file), value).with_context(|| file.to_string())
    }

    /// Bytes charged to the group.
    pub fn current(&self) -> Result<u64> {
        let text = fs::read_to_string(self.0.join("memory.current")).context("memory.current")?;
        text.trim().parse().context("memory.current")
    }

    /// Return a value of `memory.stat`.
    pub fn stat(&self, key: &str) -> Result<u64> {
        // Each CPU counts on its own and adds its sum to the total now and then. Force that now.
        fs::write("/proc/sys/vm/stat_refresh", "1").context("stat_refresh")?;
        self.value("memory.stat", key)
    }

    /// Return how often event `key` of `memory.events` occurred.
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

    /// Reclaim `bytes` of the group's memory. Return false if the kernel reclaimed less.
    pub fn reclaim(&self, bytes: usize) -> Result<bool> {
        match fs::write(self.0.join("memory.reclaim"), bytes.to_string()) {
            Ok(()) => Ok(true),
            Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => Ok(false),
            Err(e) => Err(e).context("memory.reclaim"),
        }
    }

    /// Remove the group. Its last processes may still be exiting.
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
