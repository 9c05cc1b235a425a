// SPDX-License-Identifier: GPL-2.0
//! Parts of huge pages.

use std::os::fd::AsRawFd;

use anyhow::ensure;

use super::tests;
use crate::engine;
use crate::harness::{skip, Module, Outcome, Suite, PASS};
use crate::hugepage::{huge_kib, huge_region, huge_region_by, part, NO_HUGE_PAGE, PARTS};
use crate::kprobe::Calls;
use crate::pageflags::{merged, zeroes, Span};
use crate::region::PAGE;
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

fn one_part() -> Outcome {
    let Some(mut region) = huge_region(1000)? else {
        return skip(NO_HUGE_PAGE);
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
        return skip(NO_HUGE_PAGE);
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
        return skip(NO_HUGE_PAGE);
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
        return skip(NO_HUGE_PAGE);
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
        return skip(NO_HUGE_PAGE);
    };
    region.advise(0, PARTS, libc::MADV_MERGEABLE)?;
    scan::passes(4)?;
    ensure!(huge_kib(&region)? != 0, "split in vain");
    region.verify()?;
    PASS
}

/// Scan until no part of a huge page of zeroes uses memory of its own.
fn expect_no_zeroes_left() -> Outcome {
    let Some(mut region) = huge_region_by(0, 0)? else {
        return skip(NO_HUGE_PAGE);
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
