// SPDX-License-Identifier: GPL-2.0
//! CPUs and memory that come and go.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use rand::Rng;
use rksm_test_lib::engine::write_to;
use rksm_test_lib::memblock::{offline_blocks, NO_DIMM};
use rksm_test_lib::sys;
use rksm_test_lib::timeout::scaled;

use super::Control;
use crate::plan::Op;
use crate::raw;

/// How long to try before memory that does not become empty is left online.
const OFFLINE_LIMIT: Duration = Duration::from_secs(15);

/// Return the switches of the CPUs that can be taken offline.
fn cpus() -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir("/sys/devices/system/cpu") else {
        return Vec::new();
    };
    let mut all: Vec<PathBuf> = entries
        .flatten()
        .map(|e| e.path().join("online"))
        .filter(|p| p.to_string_lossy().contains("/cpu/cpu") && p.exists())
        .collect();
    all.sort();
    all
}

pub fn no_cpu() -> Option<&'static str> {
    cpus().is_empty().then_some("no CPU that can be taken away")
}

pub fn cpu(control: &mut Control) -> Result<()> {
    let all = cpus();
    while !control.stopping() {
        control.pause(1000..5000);
        let cpu = &all[control.rng.random_range(0..all.len())];
        if control.attempt(Op::CpuOff, || fs::write(cpu, "0")) != Some(true) {
            continue;
        }
        control.pause(50..800);
        if control.attempt(Op::CpuOn, || fs::write(cpu, "1")) != Some(true) {
            fs::write(cpu, "1").context("bringing a CPU back")?;
        }
    }
    Ok(())
}

pub fn no_memory() -> Option<&'static str> {
    offline_blocks()
        .map_or(true, |b| b.is_empty())
        .then_some(NO_DIMM)
}

pub fn memory(control: &mut Control) -> Result<()> {
    let blocks = offline_blocks()?;
    raw::interrupt_by(libc::SIGALRM)?;
    let set = |block: usize, state: &str, limit| -> io::Result<()> {
        sys::alarm(limit);
        // `fs::write()` would retry after a signal.
        let result = write_to(&blocks[block].dir, "state", state.as_bytes());
        sys::alarm(Duration::ZERO);
        result
    };
    let mut online = vec![false; blocks.len()];
    while !control.stopping() {
        let block = control.rng.random_range(0..blocks.len());
        if online[block] {
            if control.attempt(Op::MemOff, || set(block, "offline", OFFLINE_LIMIT)) == Some(true) {
                online[block] = false;
            }
        } else if control.attempt(Op::MemOn, || set(block, "online_movable", OFFLINE_LIMIT))
            == Some(true)
        {
            online[block] = true;
        }
        control.pause(300..2500);
    }
    // All other processes are about to end, and the content of this memory with them.
    for block in (0..blocks.len()).filter(|&b| online[b]) {
        let limit = scaled(OFFLINE_LIMIT);
        let end = raw::now() + 10 * limit.as_millis() as u64;
        while let Err(e) = set(block, "offline", limit) {
            anyhow::ensure!(
                raw::now() < end,
                "memory could not be taken offline at the end: {e}"
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    Ok(())
}
