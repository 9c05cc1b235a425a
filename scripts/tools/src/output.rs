// SPDX-License-Identifier: GPL-2.0
//! Write output files so that they are either complete or absent.

use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};

/// Write a file under another name in the same directory, then rename it.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
    if let Some(dir) = dir {
        fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    }
    let mut partial = PathBuf::from(path).into_os_string();
    partial.push(format!(".partial.{}", std::process::id()));
    let written = fs::write(&partial, bytes).and_then(|()| fs::rename(&partial, path));
    if written.is_err() {
        // A file that cannot be removed was most likely never made. Report the first error.
        let _ = fs::remove_file(&partial);
    }
    written.with_context(|| format!("cannot write {}", path.display()))
}

/// Replace a file unless it has the same content already. Return whether it was written.
pub fn replace_if_changed(path: &Path, bytes: &[u8]) -> Result<bool> {
    if fs::read(path).is_ok_and(|old| old == bytes) {
        return Ok(false);
    }
    replace(path, bytes)?;
    Ok(true)
}
