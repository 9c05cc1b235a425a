// SPDX-License-Identifier: GPL-2.0
//! Swap space in compressed memory.

use std::ffi::CString;
use std::fs;
use std::io;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{ensure, Context, Result};

use crate::engine::wait_for;

const DEVICE: &str = "/dev/zram0";
const SYS: &str = "/sys/block/zram0";

/// A zram disk that is swapped to; taken away when dropped.
pub struct Zram(());

impl Zram {
    /// `None` if the kernel has no zram, or cannot swap.
    pub fn new(mib: usize) -> Result<Option<Self>> {
        // What a test that was killed left behind.
        drop(Self(()));
        let loaded = Command::new("modprobe")
            .args(["zram", "num_devices=1"])
            .stderr(Stdio::null())
            .status();
        if !loaded.is_ok_and(|s| s.success()) || fs::metadata("/proc/swaps").is_err() {
            return Ok(None);
        }
        let this = Self(());
        wait_for("zram disk", Duration::from_secs(10), || {
            Ok(fs::metadata(DEVICE).is_ok())
        })?;
        fs::write(format!("{SYS}/disksize"), (mib << 20).to_string()).context("disksize")?;
        let made = Command::new("mkswap")
            .arg(DEVICE)
            .stdout(Stdio::null())
            .status()
            .context("mkswap")?;
        ensure!(made.success(), "mkswap failed");
        this.on()?;
        Ok(Some(this))
    }

    fn on(&self) -> Result<()> {
        let path = CString::new(DEVICE)?;
        // SAFETY: the path is a C string that outlives the call.
        let ret = unsafe { libc::swapon(path.as_ptr(), 0) };
        ensure!(ret == 0, "swapon: {}", io::Error::last_os_error());
        Ok(())
    }

    /// Reads everything back into memory, and swaps no more.
    pub fn off(&self) -> Result<()> {
        ensure!(swapoff() == 0, "swapoff: {}", io::Error::last_os_error());
        Ok(())
    }

    /// Swaps again.
    pub fn on_again(&self) -> Result<()> {
        self.on()
    }
}

fn swapoff() -> libc::c_int {
    let path = CString::new(DEVICE).unwrap_or_default();
    // SAFETY: the path is a C string that outlives the call.
    unsafe { libc::swapoff(path.as_ptr()) }
}

impl Drop for Zram {
    fn drop(&mut self) {
        swapoff();
        let _ = fs::write(format!("{SYS}/reset"), "1");
        let _ = Command::new("rmmod")
            .arg("zram")
            .stderr(Stdio::null())
            .status();
    }
}
