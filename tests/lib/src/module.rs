// SPDX-License-Identifier: GPL-2.0
//! Load and unload rksm, with the kernel's error unchanged.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::timeout::scaled;
use crate::{engine, proc, sys};

const NAME: &str = "rksm";

/// The module under test (`RKSM_KO`).
pub fn path() -> PathBuf {
    std::env::var_os("RKSM_KO")
        .unwrap_or_else(|| "build/rksm.ko".into())
        .into()
}

pub fn loaded() -> bool {
    proc::module_loaded(NAME)
}

/// Load the module in `file` with finit_module(2).
pub fn load_file(file: &Path) -> io::Result<()> {
    sys::finit_module(&File::open(file)?, "")
}

pub fn load() -> Result<()> {
    load_file(&path()).with_context(|| format!("loading {}", path().display()))
}

pub fn unload() -> io::Result<()> {
    sys::delete_module(NAME)
}

/// Unmerge everything, then unload.
pub fn unload_clean() -> Result<()> {
    engine::reset()?;
    unload().context("unloading rksm")
}

/// Load or unload the module, as `want` says. Do nothing if that is its state already.
pub fn ensure_loaded(want: bool) -> Result<()> {
    match (loaded(), want) {
        (false, true) => load(),
        (true, false) => unload_clean(),
        _ => Ok(()),
    }
}

/// Unload. Retry until `limit` while a short-lived user holds the module, such as a reader of one of its
/// files.
pub fn unload_soon(limit: Duration) -> Result<()> {
    let end = Instant::now() + scaled(limit);
    loop {
        match unload() {
            Err(e) if e.raw_os_error() == Some(libc::EWOULDBLOCK) && Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(10));
            }
            result => return result.context("unloading rksm"),
        }
    }
}
