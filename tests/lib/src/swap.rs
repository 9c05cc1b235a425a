// SPDX-License-Identifier: GPL-2.0
//! Swap space in compressed memory, and on a disk.

use std::ffi::CString;
use std::fs;
use std::io;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{ensure, Context, Result};

use crate::disk::Disk;
use crate::engine::wait_for;

const DEVICE: &str = "/dev/zram0";
const SYS: &str = "/sys/block/zram0";

/// A zram disk used as swap space; removed when dropped.
pub struct Zram(());

impl Zram {
    /// Create the disk and swap to it. `None` if the kernel has no zram, or cannot swap.
    pub fn new(mib: usize) -> Result<Option<Self>> {
        // Remove what a killed test may have left behind.
        drop(Self(()));
        let loaded = Command::new("modprobe")
            .args(["zram", "num_devices=1"])
            .stderr(Stdio::null())
            .status();
        // A built-in driver is there without being loaded.
        let there = loaded.is_ok_and(|s| s.success()) || fs::metadata(SYS).is_ok();
        if !there || fs::metadata("/proc/swaps").is_err() {
            return Ok(None);
        }
        let this = Self(());
        wait_for("zram disk", Duration::from_secs(10), || {
            Ok(fs::metadata(DEVICE).is_ok())
        })?;
        fs::write(format!("{SYS}/disksize"), (mib << 20).to_string()).context("disksize")?;
        make_swap(DEVICE)?;
        this.on()?;
        Ok(Some(this))
    }

    fn on(&self) -> Result<()> {
        swap_on().context("swapon")
    }

    /// Read everything back into memory, and stop swapping.
    pub fn off(&self) -> Result<()> {
        swap_off().context("swapoff")
    }

    /// Swap to the disk again.
    pub fn on_again(&self) -> Result<()> {
        self.on()
    }
}

/// A disk used as swap space. Unlike [`Zram`], it leaves the pages that it read in the swap cache.
pub struct SwapDisk {
    _disk: Disk,
}

impl SwapDisk {
    /// Create the disk and swap to it. `None` if the kernel has no such disk, or cannot swap.
    pub fn new() -> Result<Option<Self>> {
        if fs::metadata("/proc/swaps").is_err() {
            return Ok(None);
        }
        let Some(disk) = Disk::new(0)? else {
            return Ok(None);
        };
        make_swap(Disk::PATH)?;
        set_swap(Disk::PATH, true).context("swapon")?;
        Ok(Some(Self { _disk: disk }))
    }
}

impl Drop for SwapDisk {
    fn drop(&mut self) {
        let _ = set_swap(Disk::PATH, false);
    }
}

fn make_swap(device: &str) -> Result<()> {
    let made = Command::new("mkswap")
        .arg(device)
        .stdout(Stdio::null())
        .status()
        .context("mkswap")?;
    ensure!(made.success(), "mkswap failed");
    Ok(())
}

/// Swap to the disk of a [`Zram`], also after [`swap_off`].
pub fn swap_on() -> io::Result<()> {
    set_swap(DEVICE, true)
}

/// Stop swapping to the disk of a [`Zram`].
pub fn swap_off() -> io::Result<()> {
    set_swap(DEVICE, false)
}

fn set_swap(device: &str, on: bool) -> io::Result<()> {
    let path = CString::new(device)?;
    // SAFETY: The path is a C string that outlives the call.
    let ret = unsafe {
        match on {
            true => libc::swapon(path.as_ptr(), 0),
            false => libc::swapoff(path.as_ptr()),
        }
    };
    match ret {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

impl Drop for Zram {
    fn drop(&mut self) {
        let _ = swap_off();
        let _ = fs::write(format!("{SYS}/reset"), "1");
        let _ = Command::new("rmmod")
            .arg("zram")
            .stderr(Stdio::null())
            .status();
    }
}
