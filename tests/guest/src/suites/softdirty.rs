// SPDX-License-Identifier: GPL-2.0
//! The reports of write tracking about pages that merge are exact.

use std::fs;

use anyhow::{ensure, Context, Result};

use super::tests;
use crate::cgroup::Group;
use crate::engine;
use crate::harness::{skip, Module, Outcome, Suite, PASS};
use crate::hugepage::{huge_region, NO_HUGE_PAGE, PARTS};
use crate::numa;
use crate::pageflags::{merged, soft_dirty, swapped, zeroes, Span};
use crate::region::{Region, PAGE};
use crate::scan;
use crate::swap::Zram;
use crate::worker::Worker;

pub const SUITE: Suite = Suite {
    name: "softdirty",
    about: "a page is soft-dirty if it was written, whatever happened to it since",
    module: Module::Loaded,
    tests: tests![
        ("zero-pages", 90, zero_pages),
        ("merged-and-unmerged", 90, merged_and_unmerged),
        ("merged-and-moved", 90, merged_and_moved),
        ("zero-pages-and-merged-swapped", 120, swapped_out),
        ("huge-page", 90, huge),
    ],
};

const N: usize = 64;
const IN_TREE: &str =
    "the in-tree engine reports pages that were not written, and misses written ones";

/// Begin to track: no page of this process counts as written.
fn clear(region: &Region) -> Result<()> {
    fs::write("/proc/self/clear_refs", "4").context("clear_refs")?;
    let left = soft_dirty(region.span())?;
    ensure!(left.iter().all(|&dirty| !dirty), "cleared: {left:?}");
    Ok(())
}

/// Return whether page `i` is written: every fourth is, with its old content.
fn is_written(i: usize) -> bool {
    i % 4 == 1
}

fn write_some(region: &Region) {
    for i in (0..region.pages()).filter(|&i| is_written(i)) {
        let byte = region.at(i) as *mut u8;
        // SAFETY: The byte lies in our own mapping, and no reference into it exists.
        unsafe { byte.write_volatile(byte.read_volatile()) };
    }
}

/// Check that the written pages are reported, and no others.
fn ensure_exact(what: &str, region: &Region) -> Result<()> {
    let have = soft_dirty(region.span())?;
    let missed = (0..N).filter(|&i| is_written(i) && !have[i]).count();
    let invented = (0..N).filter(|&i| !is_written(i) && have[i]).count();
    println!("{what}: {missed} missed, {invented} invented, of {N}");
    ensure!(
        missed == 0,
        "{what}: {missed} written pages are not reported"
    );
    ensure!(
        invented == 0,
        "{what}: {invented} pages are reported that were not written"
    );
    Ok(())
}

/// Map `N` pages, open to merging. Page `k` holds the content of `seed + k * step`.
fn mergeable(seed: u64, step: u64) -> Result<Region> {
    let mut region = Region::new(N)?;
    region.advise(0, N, libc::MADV_NOHUGEPAGE)?;
    region.fill(0, N, seed, step);
    region.advise(0, N, libc::MADV_MERGEABLE)?;
    Ok(region)
}

/// Pages of zeroes become the kernel's zero page, and then get memory of their own again.
fn zero_pages() -> Outcome {
    if engine::is_in_tree() {
        return skip(IN_TREE);
    }
    engine::write("use_zero_pages", 1)?;
    let mut region = mergeable(0, 0)?;
    clear(&region)?;
    write_some(&region);
    ensure_exact("before", &region)?;
    let until_all = || {
        scan::until("zero pages", 12, || {
            Ok(engine::read("ksm_zero_pages")? == N as u64 && zeroes(region.span())? == N)
        })
    };
    until_all()?;
    scan::stop()?;
    ensure_exact("zero page", &region)?;
    region.verify()?;
    // Tracking works over zero pages: the mark of a zero page that the engine placed does not count as a
    // write.
    clear(&region)?;
    ensure!(engine::read("ksm_zero_pages")? == N as u64);
    write_some(&region);
    ensure_exact("zero page that is written to", &region)?;
    until_all()?;
    ensure_exact("zero page again", &region)?;
    engine::write("run", 2)?;
    ensure!(zeroes(region.span())? == 0);
    ensure_exact("unmerged", &region)?;
    region.poke(0, 0, 1);
    region.verify()?;
    PASS
}

fn until_merged_all(region: &Region) -> Result<()> {
    scan::until("merge of all", 12, || Ok(merged(region.span())? == N))
}

fn merged_and_unmerged() -> Outcome {
    if engine::is_in_tree() {
        return skip(IN_TREE);
    }
    let mut other = Worker::mergeable(N, 100)?;
    let region = mergeable(100, 1)?;
    clear(&region)?;
    write_some(&region);
    until_merged_all(&region)?;
    scan::stop()?;
    ensure_exact("merged", &region)?;
    clear(&region)?;
    write_some(&region);
    ensure_exact("written to while merged", &region)?;
    until_merged_all(&region)?;
    scan::stop()?;
    ensure_exact("merged again", &region)?;
    region.advise(0, N / 2, libc::MADV_UNMERGEABLE)?;
    ensure_exact("half unmerged by itself", &region)?;
    engine::write("run", 2)?;
    ensure!(merged(region.span())? == 0);
    ensure_exact("all unmerged", &region)?;
    region.verify()?;
    other.verify()?;
    PASS
}

fn merged_and_moved() -> Outcome {
    if engine::is_in_tree() {
        return skip(IN_TREE);
    }
    let nodes = numa::nodes()?;
    let [a, b, ..] = nodes[..] else {
        return skip("one memory node");
    };
    engine::write("use_zero_pages", 1)?;
    let mut other = Worker::mergeable(N, 100)?;
    let mut region = mergeable(100, 1)?;
    // Some are zeroes, which stay where they are.
    region.fill(0, 8, 0, 0);
    clear(&region)?;
    write_some(&region);
    scan::until("merge of all", 12, || {
        Ok(merged(region.span())? == N - 8 && zeroes(region.span())? == 8)
    })?;
    scan::stop()?;
    for node in [b, a] {
        numa::move_to(region.span(), node)?;
        let there = numa::nodes_of(region.span())?;
        let moved = there.iter().filter(|&&n| n == node as i32).count();
        println!("{moved} pages are on node {node}");
        ensure!(moved >= N / 2, "{there:?}");
        ensure_exact("moved", &region)?;
    }
    region.verify()?;
    other.verify()?;
    PASS
}

fn swapped_out() -> Outcome {
    if engine::is_in_tree() {
        return skip(IN_TREE);
    }
    let (Some(_zram), Some(group)) = (Zram::new(64)?, Group::new("softdirty")?) else {
        return skip("no zram or no memory cgroups");
    };
    engine::write("use_zero_pages", 1)?;
    group.enter(std::process::id())?;
    let mut region = mergeable(100, 1)?;
    let mut twin = mergeable(100, 1)?;
    for region in [&mut region, &mut twin] {
        region.fill(0, 8, 0, 0);
    }
    clear(&region)?;
    write_some(&region);
    write_some(&twin);
    scan::until("merge of all", 12, || {
        Ok(merged(region.span())? == N - 8 && zeroes(region.span())? == 8)
    })?;
    scan::stop()?;
    group.reclaim(N * PAGE * 2)?;
    let out = swapped(region.span())?;
    println!("{out} pages are swapped out");
    ensure_exact("swapped out", &region)?;
    ensure_exact("swapped out", &twin)?;
    region.verify()?;
    twin.verify()?;
    ensure_exact("read back", &region)?;
    ensure_exact("read back", &twin)?;
    PASS
}

/// Parts of a huge page, which has one mark for all of them.
fn huge() -> Outcome {
    if engine::is_in_tree() {
        return skip(IN_TREE);
    }
    let mut other = Worker::mergeable(N, 1000)?;
    let Some(region) = huge_region(1000)? else {
        return skip(NO_HUGE_PAGE);
    };
    region.advise(0, PARTS, libc::MADV_MERGEABLE)?;
    clear(&region)?;
    let first = Span {
        pages: N,
        ..region.span()
    };
    scan::until("merge of some parts", 12, || Ok(merged(first)? == N))?;
    scan::stop()?;
    let dirty = soft_dirty(region.span())?;
    ensure!(
        dirty.iter().all(|&dirty| !dirty),
        "reported, and not written"
    );
    write_some(&region);
    let have = soft_dirty(region.span())?;
    ensure!((0..PARTS).all(|i| have[i] == is_written(i)));
    scan::until("merge of some parts", 12, || Ok(merged(first)? == N))?;
    let have = soft_dirty(region.span())?;
    ensure!((0..PARTS).all(|i| have[i] == is_written(i)));
    region.verify()?;
    other.verify()?;
    PASS
}
