// SPDX-License-Identifier: GPL-2.0
//! Merged pages that cannot be unmerged, because a userfaultfd monitor protects them from any access. They
//! stay listed, movable and counted, and `run=2` fails.

use std::fs::File;
use std::io::{Read, Write};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use anyhow::{ensure, Context, Result};

use super::tests;
use crate::background::Background;
use crate::engine;
use crate::harness::{skip, Module, Outcome, Suite, Verdict, PASS};
use crate::module;
use crate::numa;
use crate::pageflags::{merged, Span};
use crate::proc;
use crate::region::Region;
use crate::scan;
use crate::sys;
use crate::uffd::{Mode, Uffd};
use crate::worker::Worker;

pub const SUITE: Suite = Suite {
    name: "unserved",
    about: "merged pages that cannot be unmerged stay listed, and run=2 fails",
    module: Module::Loaded,
    tests: tests![
        ("run-2-on-protected-pages", 90, run_2),
        ("run-2-on-one-protected-page", 90, one),
        ("run-2-while-memory-is-mapped", 90, while_mapping),
        ("run-2-on-protected-zero-pages", 90, zeroes),
        ("pages-that-unmergeable-leaves", 90, unmergeable),
        ("pages-that-unmergeable-leaves-behind-one", 90, behind_one),
        ("children-of-such-pages", 90, children),
        ("pages-that-a-new-child-leaves", 90, new_child),
    ],
};

const N: usize = 48;
const ALL: usize = 2 * N;
const NO_MODE: &str = "the kernel has no UFFDIO_RWPROTECT";
const IN_TREE: &str = "the in-tree engine forgets such pages";

fn part(span: Span, pages: usize) -> Span {
    Span { pages, ..span }
}

/// Map two halves with the same content, merge them, and register all of it with a userfaultfd.
fn two_halves() -> Result<Option<(Region, Span, Uffd)>> {
    two_halves_of(N)
}

fn two_halves_of(n: usize) -> Result<Option<(Region, Span, Uffd)>> {
    let mut region = Region::new(2 * n)?;
    region.advise(0, 2 * n, libc::MADV_NOHUGEPAGE)?;
    region.fill(0, n, 100, 1);
    region.fill(n, n, 100, 1);
    region.advise(0, 2 * n, libc::MADV_MERGEABLE)?;
    scan::until_merged(n as u64, n as u64)?;
    scan::stop()?;
    let span = region.span();
    Ok(Uffd::new(span, Mode::Access)?.map(|uffd| (region, span, uffd)))
}

/// Check that `count` pages are merged and listed, and that rmap finds all of them.
fn ensure_listed(span: Span, count: usize) -> Result<()> {
    ensure!(
        merged(span)? == count,
        "{} of {count} pages are merged",
        merged(span)?
    );
    let listed = proc::ksm_stat(span.pid, "ksm_merging_pages")?;
    ensure!(
        listed == count as i64,
        "{listed} of {count} merged pages are listed"
    );
    if let Some((a, b)) = numa::two_nodes()? {
        for node in [a, b] {
            numa::move_all_to(span, node)?;
        }
    }
    Ok(())
}

/// Scan until `count` pages are merged.
fn until_merged(span: Span, count: usize) -> Result<()> {
    // A pass notices them, the next one unshares them. One may be under way, and one may find a lock contended.
    scan::until("pages left behind to be unshared", 6, || {
        Ok(merged(span)? == count)
    })
}

fn ensure_refused() -> Result<()> {
    let errno = engine::refused("run", "2")?;
    ensure!(errno == Some(libc::EBUSY), "run=2 ended with {errno:?}");
    ensure!(engine::read("run")? == 0);
    Ok(())
}

/// Check that without the protection all pages are unmerged.
fn ensure_served(region: &Region, span: Span) -> Outcome {
    engine::write("run", 2)?;
    ensure!(
        merged(span)? == 0,
        "{} pages are still merged",
        merged(span)?
    );
    engine::check_clean().or_else(|_| {
        ensure!(engine::read("pages_shared")? == 0);
        Ok(())
    })?;
    region.verify()?;
    PASS
}

fn run_2() -> Outcome {
    if engine::is_in_tree() {
        return skip(IN_TREE);
    }
    let Some((region, span, uffd)) = two_halves()? else {
        return skip(NO_MODE);
    };
    uffd.protect(span, true)?;
    ensure_refused()?;
    let c = engine::counters()?;
    ensure!((c.shared, c.sharing) == (N as u64, N as u64), "{c:?}");
    ensure_listed(span, ALL)?;
    let unload = module::unload().err().and_then(|err| err.raw_os_error());
    ensure!(unload == Some(libc::EBUSY), "unloading: {unload:?}");
    uffd.protect(span, false)?;
    region.verify()?;
    ensure_served(&region, span)
}

fn one() -> Outcome {
    if engine::is_in_tree() {
        return skip(IN_TREE);
    }
    let Some((region, span, uffd)) = two_halves()? else {
        return skip(NO_MODE);
    };
    uffd.protect(part(span, 1), true)?;
    ensure_refused()?;
    // All other pages are unmerged, also those behind the protected one.
    ensure_listed(part(span, 1), 1)?;
    ensure!(merged(span)? == 1, "{} pages are merged", merged(span)?);
    uffd.protect(part(span, 1), false)?;
    ensure_served(&region, span)
}

/// Other threads of the process wait for the `mmap_lock` that `run=2` holds, and then for the CPU. Pages that
/// were unmerged are no longer listed all the same.
fn while_mapping() -> Outcome {
    if engine::is_in_tree() {
        return skip(IN_TREE);
    }
    let n = 8 * N;
    let Some((region, span, uffd)) = two_halves_of(n)? else {
        return skip(NO_MODE);
    };
    uffd.protect(part(span, n), true)?;
    sys::run_on(0)?;
    let stop = AtomicBool::new(false);
    let map = || -> Result<()> {
        while !stop.load(Relaxed) {
            Region::new(1)?.unmap()?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let threads = [(); 16].map(|()| scope.spawn(map));
        let refused = ensure_refused();
        stop.store(true, Relaxed);
        for thread in threads {
            thread.join().unwrap_or(Ok(()))?;
        }
        refused
    })?;
    let c = engine::counters()?;
    ensure!((c.shared, c.sharing) == (n as u64, 0), "{c:?}");
    ensure_listed(part(span, n), n)?;
    uffd.protect(part(span, n), false)?;
    ensure_served(&region, span)
}

fn zeroes() -> Outcome {
    if engine::is_in_tree() {
        return skip(IN_TREE);
    }
    engine::write("use_zero_pages", 1)?;
    let mut region = Region::new(N)?;
    region.advise(0, N, libc::MADV_NOHUGEPAGE)?;
    region.fill(0, N, 0, 0);
    region.advise(0, N, libc::MADV_MERGEABLE)?;
    scan::until("zero pages", 12, || {
        Ok(engine::read("ksm_zero_pages")? == N as u64)
    })?;
    scan::stop()?;
    let span = region.span();
    let Some(uffd) = Uffd::new(span, Mode::Access)? else {
        return skip(NO_MODE);
    };
    uffd.protect(part(span, 5), true)?;
    ensure_refused()?;
    let left = engine::read("ksm_zero_pages")?;
    ensure!(left == 5, "{left} zero pages are left");
    uffd.protect(part(span, 5), false)?;
    engine::write("run", 2)?;
    ensure!(engine::read("ksm_zero_pages")? == 0);
    region.verify()?;
    PASS
}

/// In-tree `MADV_UNMERGEABLE` succeeds, but leaves protected pages merged in a VMA that is no longer
/// mergeable.
fn unmergeable() -> Outcome {
    left_behind(ALL, ALL)
}

/// In-tree `MADV_UNMERGEABLE` even stops at the first protected page.
fn behind_one() -> Outcome {
    left_behind(1, ALL)
}

fn left_behind(protected: usize, left: usize) -> Outcome {
    if engine::is_in_tree() {
        return skip(IN_TREE);
    }
    let Some((region, span, uffd)) = two_halves()? else {
        return skip(NO_MODE);
    };
    uffd.protect(part(span, protected), true)?;
    region.advise(0, ALL, libc::MADV_UNMERGEABLE)?;
    if merged(span)? != left {
        return Ok(Verdict::Skip("the kernel unshares such pages".into()));
    }
    // The scan unshares those that it can, and keeps the others listed.
    until_merged(span, protected)?;
    for _ in 0..3 {
        scan::passes(1)?;
        ensure_listed(span, protected)?;
    }
    uffd.protect(part(span, protected), false)?;
    until_merged(span, 0)?;
    scan::passes(2)?;
    ensure_listed(span, 0)?;
    scan::stop()?;
    ensure_served(&region, span)
}

/// A child has them in a VMA that was never mergeable.
fn children() -> Outcome {
    if engine::is_in_tree() {
        return skip(IN_TREE);
    }
    let Some((mut region, span, uffd)) = two_halves()? else {
        return skip(NO_MODE);
    };
    uffd.protect(span, true)?;
    region.advise(0, ALL, libc::MADV_UNMERGEABLE)?;
    scan::passes(2)?;
    ensure_listed(span, ALL)?;
    scan::stop()?;
    // The monitor is not the child's. So its pages can be unshared, and the scan does that.
    uffd.protect(span, false)?;
    let mut child = Worker::inheriting(&mut region)?;
    ensure!(child.merged()? == ALL);
    until_merged(child.span(), 0)?;
    until_merged(span, 0)?;
    scan::passes(2)?;
    ensure_listed(child.span(), 0)?;
    child.verify()?;
    region.verify()?;
    PASS
}

/// A child that was not scanned yet leaves merged pages behind. No entry of any process leads to them.
fn new_child() -> Outcome {
    if engine::is_in_tree() {
        return skip(IN_TREE);
    }
    let Some((region, span, uffd)) = two_halves()? else {
        return skip(NO_MODE);
    };
    drop(uffd);
    let (output, input) = sys::pipe()?;
    let (order, release) = sys::pipe()?;
    let child = Background::once(|| {
        let uffd = Uffd::new(span, Mode::Access)?.context("userfaultfd")?;
        uffd.protect(span, true)?;
        region.advise(0, ALL, libc::MADV_UNMERGEABLE)?;
        File::from(input.try_clone()?).write_all(b"u")?;
        File::from(order.try_clone()?).read_exact(&mut [0])?;
        drop(uffd);
        loop {
            std::thread::sleep(Duration::from_secs(1));
        }
    })?;
    // If the child fails, the pipe ends.
    drop(input);
    let ready = File::from(output).read_exact(&mut [0]);
    ready.context("the child has failed")?;
    let theirs = Span {
        pid: child.pid(),
        ..span
    };
    if merged(theirs)? != ALL {
        return Ok(Verdict::Skip("the kernel unshares such pages".into()));
    }
    scan::passes(2)?;
    ensure_listed(theirs, ALL)?;
    ensure_listed(span, ALL)?;
    File::from(release).write_all(b"r")?;
    until_merged(theirs, 0)?;
    ensure_listed(span, ALL)?;
    region.verify()?;
    PASS
}
