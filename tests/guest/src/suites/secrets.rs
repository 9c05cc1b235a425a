// SPDX-License-Identifier: GPL-2.0
//! No file that users can read shows a kernel address, nor does the log.

use std::fs;
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{ensure, Context, Result};

use super::tests;
use crate::harness::{skip, Module, Outcome, Suite, PASS};
use crate::kmsg::Log;
use crate::sys::{self, Forked};
use crate::tracefs::{Recorder, NO_EVENTS};
use crate::worker::Worker;
use crate::{engine, scan};

pub const SUITE: Suite = Suite {
    name: "secrets",
    about: "files, log and trace events show no address of the kernel",
    module: Module::Loaded,
    tests: tests![
        ("files-that-users-may-read", 60, files),
        ("kernel-log", 60, log),
        ("trace-events", 90, events),
        ("users-cannot-fill-the-log", 60, flood),
    ],
};

const NOBODY: libc::uid_t = 65534;

/// Return the first word of `text` that is, in base 10 or 16, a number in the upper half of the address
/// space.
fn address_in(text: &str) -> Option<&str> {
    text.split(|c: char| !c.is_ascii_alphanumeric())
        .find(|word| {
            let digits = word.trim_start_matches("0x");
            let high = |number: Result<u64, _>| number.is_ok_and(|n| n >= 0xff00_0000_0000_0000);
            // A value of -1 stands for an unknown number, and is no address.
            let hex = u64::from_str_radix(digits, 16);
            digits.len() == 16 && high(hex) && digits != "ffffffffffffffff" || high(digits.parse())
        })
}

/// Run `work` in a child without any privilege.
fn as_nobody(work: impl FnOnce() -> Result<()>) -> Result<()> {
    match sys::fork()? {
        Forked::Child => {
            // SAFETY: These calls take integers only.
            let ret = unsafe {
                libc::setgroups(0, std::ptr::null()) | libc::setgid(NOBODY) | libc::setuid(NOBODY)
            };
            let result = if ret == 0 {
                work()
            } else {
                Err(io::Error::last_os_error().into())
            };
            if let Err(err) = &result {
                println!("{err:#}");
            }
            sys::exit_now(result.is_err().into());
        }
        Forked::Parent(pid) => {
            let mut status = 0;
            // SAFETY: `status` outlives the call.
            let got = unsafe { libc::waitpid(pid, &mut status, 0) };
            ensure!(got == pid && status == 0, "status {status:#x} of the child");
            Ok(())
        }
    }
}

/// Read every readable file below `dir`, and check it for addresses. Return the number of files.
fn look_into(dir: &Path) -> Result<usize> {
    let mut count = 0;
    for entry in fs::read_dir(dir).with_context(|| format!("{}", dir.display()))? {
        let path = entry?.path();
        let kind = fs::symlink_metadata(&path)?;
        if kind.is_dir() {
            match look_into(&path) {
                Ok(more) => count += more,
                Err(err) => println!("{err:#}"),
            }
        } else if kind.is_file() {
            let Ok(content) = fs::read(&path) else {
                continue;
            };
            count += 1;
            let text = String::from_utf8_lossy(&content);
            if let Some(word) = address_in(&text) {
                anyhow::bail!("{} has {word}", path.display());
            }
        }
    }
    Ok(count)
}

fn merge_some() -> Result<[Worker; 2]> {
    let workers = [Worker::mergeable(8, 100)?, Worker::mergeable(8, 100)?];
    scan::until_merged(8, 8)?;
    scan::stop()?;
    Ok(workers)
}

fn files() -> Outcome {
    ensure!(address_in("x 0xffff888100000000\n").is_some(), "not found");
    ensure!(address_in("18446612682702848000").is_some(), "not found");
    ensure!(address_in("12 345 -7 scan-time").is_none(), "found");
    let _workers = merge_some()?;
    let dir = engine::dir();
    // For root, as general_profit may be negative, but must not be an address.
    ensure!(look_into(dir)? >= 20, "few files in {}", dir.display());
    as_nobody(|| {
        ensure!(look_into(engine::dir())? >= 20, "few files for users");
        for entry in fs::read_dir(engine::dir())? {
            let path = entry?.path();
            let error = fs::OpenOptions::new().write(true).open(&path).err();
            let refused = error.is_some_and(|err| err.kind() == ErrorKind::PermissionDenied);
            ensure!(refused, "{} can be written to by users", path.display());
        }
        if !engine::is_in_tree() {
            look_into(Path::new("/sys/module/rksm"))?;
        }
        Ok(())
    })?;
    PASS
}

fn log() -> Outcome {
    let _workers = merge_some()?;
    let mut file = fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/kmsg")?;
    let mut record = [0u8; 8192];
    let mut lines = 0;
    loop {
        match file.read(&mut record) {
            Ok(0) => break,
            Ok(n) => {
                let text = String::from_utf8_lossy(&record[..n]);
                if text.contains("rksm") || text.contains("ksm") {
                    lines += 1;
                    if let Some(word) = address_in(&text) {
                        anyhow::bail!("the log has {word}: {text}");
                    }
                }
            }
            Err(err) if err.kind() == ErrorKind::WouldBlock => break,
            Err(err) if err.raw_os_error() == Some(libc::EPIPE) => continue,
            Err(err) => return Err(err.into()),
        }
    }
    ensure!(engine::is_in_tree() || lines > 0, "no line in the log");
    println!("{lines} lines");
    PASS
}

fn events() -> Outcome {
    let Some(recorder) = Recorder::start()? else {
        return skip(NO_EVENTS);
    };
    let workers = merge_some()?;
    engine::write("run", 2)?;
    let text = recorder.text()?;
    drop(recorder);
    let merges = text.matches("ksm_merge_with_ksm_page: ").count();
    ensure!(merges >= 16, "{merges} merges only");
    if let Some(word) = address_in(&text) {
        anyhow::bail!("the trace has {word}");
    }
    drop(workers);
    PASS
}

fn flood() -> Outcome {
    if engine::is_in_tree() {
        return skip("the in-tree engine cannot be unloaded");
    }
    let _workers = merge_some()?;
    let mut log = Log::from_now()?;
    as_nobody(|| {
        for _ in 0..20 {
            let error = sys::delete_module("rksm").err();
            let errno = error.as_ref().and_then(io::Error::raw_os_error);
            ensure!(errno == Some(libc::EPERM), "{error:?}");
        }
        Ok(())
    })?;
    let lines = log.lines()?;
    ensure!(!lines.iter().any(|l| l.contains("rksm")), "{lines:?}");
    // Root gets to know the reason.
    let error = sys::delete_module("rksm").err();
    let errno = error.as_ref().and_then(io::Error::raw_os_error);
    ensure!(errno == Some(libc::EBUSY), "{error:?}");
    log.expect(&["rksm", "refused"])?;
    PASS
}
