// SPDX-License-Identifier: GPL-2.0
//! Finding the mappings of merged pages among very many VMAs.

use std::time::{Duration, Instant};

use anyhow::ensure;

use super::tests;
use crate::harness::{skip, Module, Outcome, Suite, PASS};
use crate::numa;
use crate::pageflags::Span;
use crate::region::Region;
use crate::scan;
use crate::worker::Worker;

pub const SUITE: Suite = Suite {
    name: "rmap",
    about: "merged pages are found and moved among 20,480 VMAs of one anon_vma",
    module: Module::Loaded,
    tests: tests![("many-areas-of-one-anon-vma", 240, many_areas)],
};

/// The number of VMAs.
const AREAS: usize = 20_480;
const MERGED: usize = 512;
const EVERY: usize = AREAS / MERGED;

/// A walk that visited each VMA of the anon_vma for each page, as an earlier one did, would take seconds
/// here.
fn many_areas() -> Outcome {
    let Some((a, b)) = numa::two_nodes()? else {
        return skip("one node");
    };
    let mut twin = Worker::mergeable(MERGED, 100)?;
    let mut region = Region::new(AREAS)?;
    region.advise(0, AREAS, libc::MADV_NOHUGEPAGE)?;
    for nth in 0..MERGED {
        // The VMA gets its anon_vma before it is split.
        region.fill(nth * EVERY, 1, 100 + nth as u64, 1);
    }
    region.advise(0, AREAS, libc::MADV_MERGEABLE)?;
    for i in (1..AREAS).step_by(2) {
        region.protect(i, 1, libc::PROT_READ)?;
    }
    let areas = std::fs::read_to_string("/proc/self/maps")?.lines().count();
    ensure!(areas > AREAS, "{areas} areas only");
    scan::until("merge", 12, || Ok(twin.merged()? == MERGED))?;
    scan::stop()?;
    // They may be on the first node already.
    for to in [a, b, a] {
        let mut times = Vec::new();
        let mut moved = 0;
        for nth in 0..MERGED {
            let page = Span {
                pid: std::process::id(),
                addr: region.at(nth * EVERY),
                pages: 1,
            };
            let began = Instant::now();
            let status = numa::move_to(page, to)?;
            times.push(began.elapsed());
            // A transient reference may have blocked the move.
            if status[0] == to as i32 || numa::move_all_to(page, to).is_ok() {
                moved += 1;
            }
        }
        times.sort();
        let at = |percent: usize| -> Duration { times[(MERGED * percent / 100).min(MERGED - 1)] };
        println!(
            "to node {to}: {moved} of {MERGED} pages moved; one takes {:?} (median), {:?} (p99), {:?} at most",
            at(50),
            at(99),
            at(100)
        );
        ensure!(moved == MERGED, "{moved} of {MERGED} pages could be moved");
        ensure!(twin.merged()? == MERGED, "pages were split");
    }
    region.verify()?;
    twin.verify()?;
    PASS
}
