// SPDX-License-Identifier: GPL-2.0
//! rksm's directory bound over that of the in-tree engine, for clients that know no other path.

use std::ffi::CString;
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{ensure, Context, Result};

use super::tests;
use crate::engine::{self, IN_TREE, RKSM};
use crate::harness::{skip, Module, Outcome, Suite, PASS};
use crate::module;
use crate::sys::{self, Ended, Forked};

pub const SUITE: Suite = Suite {
    name: "mounts",
    about: "/sys/kernel/mm/rksm bound over /sys/kernel/mm/ksm, over reloads and namespaces",
    module: Module::Loaded,
    tests: tests![
        ("bound-over-a-reload", 60, reload),
        ("other-namespaces-see-nothing-of-it", 60, namespaces),
    ],
};

fn c_string(text: &str) -> Result<CString> {
    CString::new(text).context("a path")
}

fn mount(from: &str, to: &str, kind: &str, flags: libc::c_ulong) -> Result<()> {
    let (from, to, kind) = (c_string(from)?, c_string(to)?, c_string(kind)?);
    // SAFETY: All arguments are C strings that outlive the call.
    let ret = unsafe {
        libc::mount(
            from.as_ptr(),
            to.as_ptr(),
            kind.as_ptr(),
            flags,
            std::ptr::null(),
        )
    };
    ensure!(ret == 0, "mount: {}", io::Error::last_os_error());
    Ok(())
}

fn unmount(path: &str) -> Result<()> {
    let path = c_string(path)?;
    // SAFETY: The path is a C string that outlives the call.
    let ret = unsafe { libc::umount2(path.as_ptr(), 0) };
    ensure!(ret == 0, "umount: {}", io::Error::last_os_error());
    Ok(())
}

/// Enter a mount namespace of its own. Only this process and its children see later mounts, which end with
/// them.
fn own_namespace() -> Result<()> {
    // SAFETY: unshare takes flags only.
    let ret = unsafe { libc::unshare(libc::CLONE_NEWNS) };
    ensure!(ret == 0, "unshare: {}", io::Error::last_os_error());
    mount("none", "/", "", libc::MS_REC | libc::MS_PRIVATE)
}

fn bind() -> Result<()> {
    mount(RKSM, IN_TREE, "", libc::MS_BIND)
}

/// Return which engine's files are in `dir`; `None` if there are none.
fn engine_in(dir: &str) -> Option<&'static str> {
    let dir = Path::new(dir);
    if !dir.join("run").exists() {
        return None;
    }
    // Only rksm has this file.
    Some(if dir.join("pass_millisecs").exists() {
        "rksm"
    } else {
        "ksm"
    })
}

fn expect(when: &str, want: Option<&str>) -> Result<()> {
    let found = engine_in(IN_TREE);
    println!("{when}: {IN_TREE} has the files of {found:?}");
    ensure!(found == want, "{when}: {found:?} instead of {want:?}");
    Ok(())
}

/// A mount that is left over after `rmmod` hides the in-tree files and is empty, even when rksm is loaded
/// again.
fn reload() -> Outcome {
    if engine::is_in_tree() {
        return skip("there is no directory of rksm to bind");
    }
    own_namespace()?;
    expect("at first", Some("ksm"))?;
    bind()?;
    expect("bound", Some("rksm"))?;
    fs::write(format!("{IN_TREE}/run"), "1").context("run")?;
    ensure!(engine::read("run")? == 1, "written to somewhere else");
    fs::write(format!("{IN_TREE}/run"), "0").context("run")?;
    // The mount does not keep the module from unloading.
    module::unload_clean()?;
    expect("unloaded", None)?;
    let err = fs::read(format!("{IN_TREE}/run")).err();
    println!("reading run: {err:?}");
    ensure!(err.is_some_and(|err| err.raw_os_error() == Some(libc::ENOENT)));
    module::load()?;
    ensure!(engine_in(RKSM) == Some("rksm"), "not loaded");
    expect("loaded again", None)?;
    unmount(IN_TREE)?;
    expect("unmounted", Some("ksm"))?;
    bind()?;
    expect("bound again", Some("rksm"))?;
    // In the right order nothing is left over.
    unmount(IN_TREE)?;
    module::unload_clean()?;
    expect("unmounted, then unloaded", Some("ksm"))?;
    module::load()?;
    bind()?;
    expect("loaded and bound", Some("rksm"))?;
    PASS
}

/// Neither an older mount namespace nor another mount of sysfs sees the bind mount.
fn namespaces() -> Outcome {
    if engine::is_in_tree() {
        return skip("there is no directory of rksm to bind");
    }
    let (mut ours, mut theirs) = UnixStream::pair().context("socketpair")?;
    let container = match sys::fork().context("fork")? {
        Forked::Child => {
            drop(ours);
            let mut run = || -> Result<bool> {
                own_namespace()?;
                theirs.write_all(b"x")?;
                theirs.read_exact(&mut [0])?;
                let before = engine_in(IN_TREE);
                // That namespace needs its own bind mount, and can have one.
                bind()?;
                Ok(before == Some("ksm") && engine_in(IN_TREE) == Some("rksm"))
            };
            sys::exit_now(i32::from(!run().is_ok_and(|right| right)));
        }
        Forked::Parent(pid) => pid,
    };
    drop(theirs);
    ours.read_exact(&mut [0]).context("the other namespace")?;
    own_namespace()?;
    bind()?;
    expect("bound", Some("rksm"))?;
    let dir = format!("/tmp/rksm-sysfs-{}", std::process::id());
    fs::create_dir(&dir).context("a directory")?;
    mount("sysfs", &dir, "sysfs", 0)?;
    let another = engine_in(&format!("{dir}/kernel/mm/ksm"));
    let beside = engine_in(&format!("{dir}/kernel/mm/rksm"));
    unmount(&dir)?;
    fs::remove_dir(&dir).context("a directory")?;
    println!("another mount of sysfs: {another:?}, and beside it {beside:?}");
    ensure!(another == Some("ksm") && beside == Some("rksm"));
    ours.write_all(b"x").context("the other namespace")?;
    loop {
        if let Some((_, ended)) = sys::try_wait(container)? {
            ensure!(ended == Ended::Exit(0), "the other namespace: {ended:?}");
            return PASS;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}
