// SPDX-License-Identifier: GPL-2.0
//! Huge pages of this process with known content in each part.

use anyhow::{Context, Result};

use crate::pageflags::Span;
use crate::proc;
use crate::region::{Region, HUGE, PAGE};

/// The small pages of which a huge page consists.
pub const PARTS: usize = HUGE / PAGE;

/// Why a test that needs a huge page is skipped.
pub const NO_HUGE_PAGE: &str = "the kernel provides no huge page";

/// Map one huge page whose part `k` holds the content of `seed + k`. `None` if the kernel provides no huge
/// page.
pub fn huge_region(seed: u64) -> Result<Option<Region>> {
    huge_region_by(seed, 1)
}

/// Map one huge page whose part `k` holds the content of `seed + k * step`.
pub fn huge_region_by(seed: u64, step: u64) -> Result<Option<Region>> {
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

/// Return how much of `region` is in huge pages, in KiB.
pub fn huge_kib(region: &Region) -> Result<i64> {
    proc::anon_huge_kib(std::process::id(), region.addr()).context("AnonHugePages")
}

/// The span of part `i`.
pub fn part(region: &Region, i: usize) -> Span {
    Span {
        addr: region.at(i),
        pages: 1,
        ..region.span()
    }
}
