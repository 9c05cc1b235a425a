// SPDX-License-Identifier: GPL-2.0
//! All tests, by theme.

use crate::harness::Theme;

mod advisor;
mod bounds;
mod chains;
mod counters;
mod cow;
mod dirty;
mod eager;
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

/// A table of tests: name, seconds it may take, function.
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

/// The order in which they run: the simple before what builds on it.
pub const ALL: &[&Theme] = &[
    // First, as it compares with the in-tree files as they are after boot.
    &parity::THEME,
    &knobs::THEME,
    &merge::THEME,
    &cow::THEME,
    &unmerge::THEME,
    &registration::THEME,
    &exit::THEME,
    &unserved::THEME,
    &stall::THEME,
    &vmops::THEME,
    &huge::THEME,
    &thp::THEME,
    &zero::THEME,
    &softdirty::THEME,
    &chains::THEME,
    &numa::THEME,
    &pin::THEME,
    &scanning::THEME,
    &eager::THEME,
    &smart::THEME,
    &hot::THEME,
    &counters::THEME,
    &vmstat::THEME,
    &advisor::THEME,
    &trace::THEME,
    &secrets::THEME,
    &mounts::THEME,
    &bounds::THEME,
    &regress::THEME,
    &regress_pages::THEME,
    &regress_memory::THEME,
    &regress_cve::THEME,
    &migrate::THEME,
    &rmap::THEME,
    &swap::THEME,
    &dirty::THEME,
    &memcg::THEME,
    &hwpoison::THEME,
    &uprobe::THEME,
    &freezer::THEME,
    // Unplugs the memory that others take offline.
    &hotplug::THEME,
    &soak::THEME,
    &memless::THEME,
    &faults::THEME,
    &lifecycle::THEME,
    &reload::THEME,
];

/// Every order of three things.
const ORDERS: [[usize; 3]; 6] = [
    [0, 1, 2],
    [0, 2, 1],
    [1, 0, 2],
    [1, 2, 0],
    [2, 0, 1],
    [2, 1, 0],
];
