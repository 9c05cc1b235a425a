// SPDX-License-Identifier: GPL-2.0
//! The kernel's search for unreferenced memory (`CONFIG_DEBUG_KMEMLEAK`).

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

const FILE: &str = "/sys/kernel/debug/kmemleak";
/// kmemleak does not report younger objects (`MSECS_MIN_AGE` in mm/kmemleak.c).
const MIN_AGE: Duration = Duration::from_secs(5);

pub fn present() -> bool {
    Path::new(FILE).exists()
}

/// Return the kernel's report of leaks; empty if there are none. Memory that RCU or a work item is about to
/// free may appear once, but not twice.
pub fn scan() -> Result<String> {
    let mut found = String::new();
    for _ in 0..3 {
        std::thread::sleep(MIN_AGE + Duration::from_secs(1));
        std::fs::write(FILE, "scan").context("starting a scan of kmemleak")?;
        found = std::fs::read_to_string(FILE).context("reading kmemleak")?;
        if found.is_empty() {
            break;
        }
    }
    Ok(found)
}
