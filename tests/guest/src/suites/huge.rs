// SPDX-License-Identifier: GPL-2.0
//! Parts of huge pages.

use std::os::fd::AsRawFd;

use anyhow::{ensure, Context, Result};

use super::tests;
use crate::engine;
use crate::harness::{skip, Module, Outcome, Suite, PASS};
use crate::kprobe::Calls;
use crate::pageflags::{merged, zeroes, Span};
use crate::region::{Region, HUGE, PAGE};
use crate::scan;
use crate::worker::Worker;

pub const SUITE: Suite = Suite {
    name: "huge",
    about: "a huge page is split where a part of it merges",
    module: Module::Loaded,
    tests: tests![
        ("one-equal-part", 90, one_part),
        ("two-equal-parts-of-one-huge-page", 90, two_parts),
        ("equal-huge-pages", 120, equal_huge),
        ("no-equal-part-leaves-it-whole", 90, no_part),
        ("huge-page-of-zeroes", 90, all_zero),
        (
            "huge-page-of-zeroes-and-use-zero-pages",
            90,
            all_zero_to_zero_page
        ),
        ("held-by-somebody", 120, held),
    ],
};

pub(super) const PARTS: usize = HUGE / PAGE;

/// Map one huge page whose part `k` holds the content of `seed + k`. `None` if the kernel provides no huge
/// page.
pub(super) fn huge_region(seed: u64) -> Result<Option<Region>> {
    filled(seed, 1)
}

/// Map one huge page whose part `k` holds the content of `seed + k * step`.
fn filled(seed: u64, step: u64) -> Result<Option<Region>> {
    let mut region = Region::aligned(PARTS, HUGE)?;
    region.advise(0, PARTS, libc::MADV_HUGEPAGE)?;
    region.fill(0, PARTS, seed, step);
    if huge_kib(&region)? == 0 {
        // Memory may be fragmented, so ask the kernel to collapse the range.
        let _ = region.advise(0, PARTS, libc::MADV_COLLAPSE);
    }
    // Keep khugepaged from collapsing the parts again.
    region.advise(0, PARTS, libc::MADV_NOHUGEPAGE)?;
    Ok((huge_kib(&region)? != 0).then_some(region))
}

pub(super) fn huge_kib(region: &Region) -> Result<i64> {
    crate::proc::anon_huge_kib(std::process::id(), region.addr()).context("AnonHugePages")
}

pub(super) fn part(region: &Region, i: usize) -> Span {
    Span {
        pid: std::process::id(),
        addr: region.at(i),
        pages: 1,
    }
}

pub(super) const NONE: &str = "the kernel provides no huge page";

fn one_part() -> Outcome {
    let Some(mut region) = huge_region(1000)? else {
        return skip(NONE);
    };
    let mut small = Worker::mergeable(1, 1000 + 77)?;
    region.advise(0, PARTS, libc::MADV_MERGEABLE)?;
    scan::until_merged(1, 1)?;
    ensure!(huge_kib(&region)? == 0, "merged, and still a huge page");
    ensure!(merged(part(&region, 77))? == 1 && small.merged()? == 1);
    region.verify()?;
    region.poke(77, 1, 1);
    region.verify()?;
    small.verify()?;
    PASS
}

fn two_parts() -> Outcome {
    let Some(mut region) = huge_region(1000)? else {
        return skip(NONE);
    };
    region.fill(300, 1, 1000 + 5, 0);
    ensure!(huge_kib(&region)? != 0);
    region.advise(0, PARTS, libc::MADV_MERGEABLE)?;
    scan::until_merged(1, 1)?;
    ensure!(huge_kib(&region)? == 0, "merged, and still a huge page");
    let pair = [merged(part(&region, 5))?, merged(part(&region, 300))?];
    ensure!(pair == [1, 1], "{pair:?}");
    region.verify()?;
    region.poke(5, 1, 1);
    region.verify()?;
    PASS
}

fn equal_huge() -> Outcome {
    let (Some(mut a), Some(b)) = (huge_region(1000)?, huge_region(1000)?) else {
        return skip(NONE);
    };
    for region in [&a, &b] {
        region.advise(0, PARTS, libc::MADV_MERGEABLE)?;
    }
    scan::until_merged(PARTS as u64, PARTS as u64)?;
    a.verify()?;
    b.verify()?;
    for i in (0..PARTS).step_by(7) {
        a.poke(i, i, 1);
    }
    a.verify()?;
    b.verify()?;
    PASS
}

/// A huge page with an extra reference cannot be split, and the engine does not try all the time.
fn held() -> Outcome {
    let Some(calls) = Calls::of("__split_huge_page_to_list_to_order")? else {
        return skip("the kernel has no kprobe events");
    };
    let mut other = Worker::mergeable(PARTS, 1000)?;
    let mut third = Worker::mergeable(PARTS, 1000)?;
    scan::until_merged(PARTS as u64, PARTS as u64)?;
    let Some(region) = huge_region(1000)? else {
        return skip(NONE);
    };
    let (output, input) = crate::sys::pipe()?;
    let page = libc::iovec {
        iov_base: region.addr() as *mut libc::c_void,
        iov_len: PAGE,
    };
    // SAFETY: The range is our own mapping; the kernel only takes a reference.
    let n = unsafe { libc::vmsplice(input.as_raw_fd(), &raw const page, 1, 0) };
    ensure!(n == PAGE as isize, "vmsplice gave {n}");
    region.advise(0, PARTS, libc::MADV_MERGEABLE)?;
    scan::passes(4)?;
    let (scans, before) = (engine::read("full_scans")?, calls.count()?);
    scan::passes(4)?;
    scan::stop()?;
    let attempts = calls.count()? - before;
    let scans = engine::read("full_scans")? - scans;
    println!("{attempts} attempts to split in {scans} passes over {PARTS} parts");
    ensure!(attempts <= 8, "{attempts} attempts");
    ensure!(huge_kib(&region)? != 0);
    drop((output, input));
    let before = calls.count()?;
    scan::until_merged(PARTS as u64, 2 * PARTS as u64)?;
    ensure!(calls.count()? > before, "calls are not counted");
    region.verify()?;
    other.verify()?;
    third.verify()?;
    PASS
}

fn no_part() -> Outcome {
    let Some(region) = huge_region(1000)? else {
        return skip(NONE);
    };
    region.advise(0, PARTS, libc::MADV_MERGEABLE)?;
    scan::passes(4)?;
    ensure!(huge_kib(&region)? != 0, "split in vain");
    region.verify()?;
    PASS
}

/// Scan until no part of a huge page of zeroes uses memory of its own.
fn expect_no_zeroes_left() -> Outcome {
    let Some(mut region) = filled(0, 0)? else {
        return skip(NONE);
    };
    let all = Span {
        pages: PARTS,
        ..part(&region, 0)
    };
    region.advise(0, PARTS, libc::MADV_MERGEABLE)?;
    // The kernel itself maps its zero page for the zeroes of a huge page that it splits.
    scan::until("no zeroes left", 12, || {
        Ok(merged(all)? + zeroes(all)? == PARTS)
    })?;
    ensure!(huge_kib(&region)? == 0);
    region.verify()?;
    region.poke(77, 1, 1);
    region.verify()?;
    PASS
}

fn all_zero() -> Outcome {
    expect_no_zeroes_left()
}

fn all_zero_to_zero_page() -> Outcome {
    engine::write("use_zero_pages", 1)?;
    expect_no_zeroes_left()
}
