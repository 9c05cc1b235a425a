// SPDX-License-Identifier: GPL-2.0
//! The disk that tests read with O_DIRECT, which the runner gives the guest.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{ensure, Context, Result};
use rksm_test_lib::engine::wait_for;

use crate::arena::Arena;
use crate::ops::io::on_disk;
use crate::page::{Bodies, PAGE, WORDS};
use crate::raw;
use crate::worker::DISK_ENV;

const SERIAL: &str = "rksm-torture";
const LIMIT: Duration = Duration::from_secs(10);

fn find() -> Option<PathBuf> {
    fs::read_dir("/sys/block")
        .ok()?
        .flatten()
        .find_map(|entry| {
            let serial = fs::read_to_string(entry.path().join("serial")).ok()?;
            let name = entry.file_name().into_string().ok()?;
            (serial.trim() == SERIAL).then(|| PathBuf::from("/dev").join(name))
        })
}

/// Fill the disk with known pages. Return false if there is no disk.
pub fn prepare(arena: &Arena) -> Result<bool> {
    // This fails if the driver is built in or missing. The search for the disk decides.
    let _ = Command::new("modprobe")
        .arg("virtio_blk")
        .stderr(Stdio::null())
        .status();
    let _ = wait_for("disk", LIMIT / 5, || Ok(find().is_some()));
    let Some(path) = find() else {
        return Ok(false);
    };
    wait_for("device of the disk", LIMIT, || Ok(path.exists()))?;
    let size = fs::read_to_string(
        PathBuf::from("/sys/class/block")
            .join(path.file_name().context("the disk's name")?)
            .join("size"),
    )?;
    let pages = size.trim().parse::<usize>()? * 512 / PAGE;
    let file = File::options()
        .write(true)
        .open(&path)
        .context("the disk")?;
    let bodies = Bodies::new();
    let mut page = [0; WORDS];
    for at in 0..pages {
        bodies.render(on_disk(at), &mut page);
        let n = raw::write_page_at(file.as_raw_fd(), &page, at).context("writing to the disk")?;
        ensure!(n == PAGE, "{n} bytes written to the disk");
    }
    file.sync_all().context("writing to the disk")?;
    arena.disk_pages.store(pages as u32, Ordering::Relaxed);
    std::env::set_var(DISK_ENV, &path);
    Ok(true)
}
