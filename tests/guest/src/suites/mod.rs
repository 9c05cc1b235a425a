// SPDX-License-Identifier: GPL-2.0
//! All tests, by suite.

use crate::harness::Suite;

mod advisor;
mod bounds;
mod chains;
mod counters;
mod cow;
mod dirty;
mod eager;
mod example;
mod exit;
mod faults;
mod freezer;
mod hot;
mod hotplug;
mod huge;
mod hwpoison;
mod knobs;
mod lifecycle;
mod memcg;
mod memless;
mod merge;
mod migrate;
mod mounts;
mod numa;
mod parity;
mod pin;
mod registration;
mod regress;
mod regress_cve;
mod regress_memory;
mod regress_pages;
mod reload;
mod rmap;
mod scanning;
mod secrets;
mod smart;
mod soak;
mod softdirty;
mod stall;
mod swap;
mod thp;
mod trace;
mod unmerge;
mod unserved;
mod uprobe;
mod vmops;
mod vmstat;
mod zero;

/// A table of tests: name, time limit in seconds, function.
macro_rules! tests {
    ($(($name:literal, $secs:literal, $run:path)),* $(,)?) => {
        &[$($crate::harness::Test {
            name: $name,
            limit: std::time::Duration::from_secs($secs),
            run: $run,
        }),*]
    };
}
use tests;

/// All suites in the order in which they run, the simple ones first.
pub const ALL: &[&Suite] = &[
    // First, as a suite to read and to copy. It does not touch the in-tree files.
    &example::SUITE,
    // Before the others, as it needs the in-tree files as they are after boot.
    &parity::SUITE,
    &knobs::SUITE,
    &merge::SUITE,
    &cow::SUITE,
    &unmerge::SUITE,
    &registration::SUITE,
    &exit::SUITE,
    &unserved::SUITE,
    &stall::SUITE,
    &vmops::SUITE,
    &huge::SUITE,
    &thp::SUITE,
    &zero::SUITE,
    &softdirty::SUITE,
    &chains::SUITE,
    &numa::SUITE,
    &pin::SUITE,
    &scanning::SUITE,
    &eager::SUITE,
    &smart::SUITE,
    &hot::SUITE,
    &counters::SUITE,
    &vmstat::SUITE,
    &advisor::SUITE,
    &trace::SUITE,
    &secrets::SUITE,
    &mounts::SUITE,
    &bounds::SUITE,
    &regress::SUITE,
    &regress_pages::SUITE,
    &regress_memory::SUITE,
    &regress_cve::SUITE,
    &migrate::SUITE,
    &rmap::SUITE,
    &swap::SUITE,
    &dirty::SUITE,
    &memcg::SUITE,
    &hwpoison::SUITE,
    &uprobe::SUITE,
    &freezer::SUITE,
    // After the suites that take memory offline, as it unplugs that memory.
    &hotplug::SUITE,
    &soak::SUITE,
    &memless::SUITE,
    &faults::SUITE,
    &lifecycle::SUITE,
    &reload::SUITE,
];

/// All permutations of three indices.
const ORDERS: [[usize; 3]; 6] = [
    [0, 1, 2],
    [0, 2, 1],
    [1, 0, 2],
    [1, 2, 0],
    [2, 0, 1],
    [2, 1, 0],
];
