// SPDX-License-Identifier: GPL-2.0
//! A disk in memory, by the driver null_blk.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

/// A disk of zeroes that completes each request late. Only one can exist at a time.
pub struct Disk(());

impl Disk {
    pub const PATH: &'static str = "/dev/nullb0";

    /// Create the disk. `None` if the kernel has no such driver.
    pub fn new(seconds: u64) -> Result<Option<Self>> {
        let status = Command::new("modprobe")
            .args(["null_blk", "nr_devices=1", "gb=1", "memory_backed=1"])
            .args(["irqmode=2", "submit_queues=1"])
            .arg(format!("completion_nsec={}", seconds * 1_000_000_000))
            .status();
        let there = status.is_ok_and(|s| s.success()) && Path::new(Self::PATH).exists();
        Ok(there.then_some(Self(())))
    }

    /// Open the disk with O_DIRECT, bypassing the page cache.
    pub fn open(&self) -> Result<File> {
        File::options()
            .read(true)
            .custom_flags(libc::O_DIRECT)
            .open(Self::PATH)
            .context(Self::PATH)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("rmmod").arg("null_blk").status();
    }
}
