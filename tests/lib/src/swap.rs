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
        // Built in, it is there without being loaded.
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

    /// Reads everything back into memory, and swaps no more.
    pub fn off(&self) -> Result<()> {
        swap_off().context("swapoff")
    }

    /// Swaps again.
    pub fn on_again(&self) -> Result<()> {
        self.on()
    }
}

/// A disk that is swapped to. Other than [`Zram`], it leaves what it read in the swap cache.
pub struct SwapDisk {
    _disk: Disk,
}

impl SwapDisk {
    /// `None` if the kernel has no such disk, or cannot swap.
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

/// Swaps to the disk of a [`Zram`] (again).
pub fn swap_on() -> io::Result<()> {
    set_swap(DEVICE, true)
}

/// Swaps to it no more.
pub fn swap_off() -> io::Result<()> {
    set_swap(DEVICE, false)
}

fn set_swap(device: &str, on: bool) -> io::Result<()> {
    let path = CString::new(device)?;
    // SAFETY: the path is a C string that outlives the call.
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
