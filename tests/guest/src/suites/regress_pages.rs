// SPDX-License-Identifier: GPL-2.0
//! Past defects of KSM: VMA flags and marks under a userfaultfd, rmap of moved pages, sharing limit, nodes.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use anyhow::{ensure, Context, Result};

use super::tests;
use crate::engine;
use crate::harness::{skip, Module, Outcome, Suite, PASS};
use crate::numa;
use crate::pageflags::{merged, merged_frames};
use crate::region::{Region, PAGE};
use crate::scan;
use crate::sys::{self, Forked};
use crate::uffd::{Mode, Uffd};
use crate::worker::{verify_all, Worker};

pub const SUITE: Suite = Suite {
    name: "regress-pages",
    about: "defects of KSM's past: pages that move, userfaultfd, sharing limit, nodes",
    module: Module::Loaded,
    tests: tests![
        (
            "madvise-drops-vma-flags-with-userfaultfd-cve-2025-40040",
            60,
            madvise_flags
        ),
        ("unmerge-under-uffd-write-protect", 60, unmerge_uffd_wp),
        ("mremap-leaves-wrong-rmap-addresses", 90, mremap_rmap),
        ("endless-rmap-walk-without-sharing-limit", 90, sharing_limit),
        (
            "stale-node-page-migrated-during-lookup",
            180,
            stale_migrated
        ),
        (
            "stale-nodes-when-merge-across-nodes-is-switched",
            90,
            switch_nodes
        ),
    ],
};

const N: usize = 32;

const NO_UFFD: &str = "the kernel has no userfaultfd";

/// Return the flags of the VMA that starts at `addr`.
fn vm_flags(addr: usize) -> Result<String> {
    let text = fs::read_to_string("/proc/self/smaps").context("smaps")?;
    let start = format!("{addr:x}-");
    text.lines()
        .skip_while(|l| !l.starts_with(&start))
        .find_map(|l| l.strip_prefix("VmFlags:"))
        .map(|flags| format!("{} ", flags.trim_end()))
        .context("no such VMA")
}

/// CVE-2025-40040: `MADV_UNMERGEABLE` cleared the upper half of the VMA's flags with a mask that was too
/// narrow, and with it the userfaultfd minor mark. Needs such a VMA; seen in `VmFlags`, and as a warning when
/// the userfaultfd is closed.
fn madvise_flags() -> Outcome {
    // SAFETY: The name is a C string.
    let file = unsafe { libc::memfd_create(c"regress".as_ptr(), libc::MFD_CLOEXEC) };
    ensure!(file >= 0, "memfd");
    // SAFETY: The descriptor is ours; this is a new mapping at an address that the kernel chooses.
    let at = unsafe {
        libc::ftruncate(file, (N * PAGE) as i64);
        libc::mmap(
            std::ptr::null_mut(),
            N * PAGE,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE,
            file,
            0,
        )
    };
    ensure!(at != libc::MAP_FAILED, "mmap");
    let region = Region::adopt(at as usize, N);
    let Some(uffd) = Uffd::new(region.span(), Mode::Minor)? else {
        return skip(NO_UFFD);
    };
    region.advise(0, N, libc::MADV_MERGEABLE)?;
    let on = vm_flags(region.addr())?;
    ensure!(on.contains(" mg ") && on.contains(" ui "), "before:{on}");
    region.advise(0, N, libc::MADV_UNMERGEABLE)?;
    let off = vm_flags(region.addr())?;
    ensure!(!off.contains(" mg ") && off.contains(" ui "), "after:{off}");
    drop(uffd);
    PASS
}

/// Unmerging a page by a write fault never ended when a userfaultfd had write-protected it, as the fault went
/// to the userfaultfd. Needs merged pages that are write-protected in this way; seen as a call that does not
/// return, or as pages still merged.
fn unmerge_uffd_wp() -> Outcome {
    for by_run_2 in [false, true] {
        let mut region = Region::new(2 * N)?;
        region.fill(0, N, 100, 1);
        region.fill(N, N, 100, 1);
        region.advise(0, 2 * N, libc::MADV_MERGEABLE)?;
        scan::until_merged(N as u64, N as u64)?;
        scan::stop()?;
        let Some(uffd) = Uffd::new(region.span(), Mode::Write)? else {
            return skip(NO_UFFD);
        };
        uffd.protect(region.span(), true)?;
        if by_run_2 {
            engine::write("run", 2)?;
        } else {
            region.advise(0, 2 * N, libc::MADV_UNMERGEABLE)?;
        }
        let left = merged(region.span())?;
        ensure!(
            left == 0,
            "{left} pages are still merged (run=2: {by_run_2})"
        );
        region.verify()?;
        drop(uffd);
        region.advise(0, 2 * N, libc::MADV_UNMERGEABLE)?;
    }
    PASS
}

/// After mremap, the rmap item of a merged page named the old address, and the rmap walk missed the mapping.
/// Needs merged pages that are moved, forked, and migrated; seen as pages that cannot be unmapped, or as a
/// merged page at the new address.
fn mremap_rmap() -> Outcome {
    let mut other = Worker::mergeable(N, 100)?;
    let mut region = Region::new(N)?;
    region.fill(0, N, 100, 1);
    region.advise(0, N, libc::MADV_MERGEABLE)?;
    scan::until_merged(N as u64, N as u64)?;
    for round in 0..6 {
        region.relocate()?;
        if round % 2 == 0 {
            scan::until("merge in the new place", 12, || {
                Ok(merged(region.span())? == N)
            })?;
        }
        let mut child = Worker::inheriting(&mut region)?;
        compact()?;
        child.verify()?;
        region.verify()?;
        other.verify()?;
        child.poke(0, N, 7, round)?;
        child.verify()?;
        child.exit()?;
    }
    engine::write("run", 2)?;
    ensure!(merged(region.span())? == 0 && other.merged()? == 0);
    region.verify()?;
    PASS
}

fn compact() -> Result<()> {
    fs::write("/proc/sys/vm/compact_memory", "1").context("compact_memory")
}

/// Any number of mappings could share one page, and an rmap walk over them held its locks for minutes. Needs
/// many equal pages; seen in the number of mappings of one frame.
fn sharing_limit() -> Outcome {
    const PAGES: usize = 700;
    let mut region = Region::new(PAGES)?;
    region.fill(0, PAGES, 100, 0);
    region.advise(0, PAGES, libc::MADV_MERGEABLE)?;
    scan::until("merge of all", 12, || Ok(merged(region.span())? == PAGES))?;
    let mut mappings = BTreeMap::<u64, u32>::new();
    for frame in merged_frames(region.span())?.into_iter().flatten() {
        *mappings.entry(frame).or_default() += 1;
    }
    let most = mappings.values().max().copied().unwrap_or(0);
    ensure!(most <= 256, "a page is mapped {most} times");
    ensure!(
        mappings.len() <= 8,
        "{} pages for one content",
        mappings.len()
    );
    region.verify()?;
    PASS
}

/// A lookup took a node for stale and dropped it, because its page was being migrated and its pointer was
/// NULL for a moment. Needs migration (here by compaction) all the time while pages join and leave nodes;
/// seen as a merged page without a node, in the counters or after `run=2`.
fn stale_migrated() -> Outcome {
    let compactor = match sys::fork()? {
        Forked::Child => loop {
            if sys::die_with_parent().is_err() || compact().is_err() {
                sys::exit_now(1);
            }
            // A page that is migrated all the time cannot merge.
            std::thread::sleep(Duration::from_millis(3));
        },
        Forked::Parent(pid) => pid,
    };
    let mut keeper = Worker::mergeable(N, 100)?;
    for round in 0..6 {
        let mut joiners = [Worker::mergeable(N, 100)?, Worker::mergeable(N, 100)?];
        // The keeper's pages are written in each round, and must stay unchanged ever longer.
        let joined = scan::until_still("joined", || {
            Ok(keeper.merged()? > 0 && joiners[0].merged()? > 0)
        });
        let merged = [keeper.merged()?, joiners[0].merged()?, joiners[1].merged()?];
        let nodes = [
            numa::nodes_of(keeper.span())?[0],
            numa::nodes_of(joiners[0].span())?[0],
            numa::nodes_of(joiners[1].span())?[0],
        ];
        joined.with_context(|| format!("round {round}: merged {merged:?} on nodes {nodes:?}"))?;
        keeper.verify()?;
        verify_all(&mut joiners)?;
        keeper.poke(0, N, 5, 1)?;
        drop(joiners);
        keeper.fill(0, N, 100, 1)?;
    }
    sys::kill(compactor, libc::SIGKILL)?;
    while sys::try_wait(compactor)?.is_none() {}
    engine::write("run", 2)?;
    let c = engine::counters()?;
    ensure!((c.shared, c.sharing) == (0, 0), "{c:?}");
    ensure!(
        keeper.merged()? == 0,
        "a merged page without a node is left"
    );
    keeper.verify()?;
    PASS
}

/// Nodes whose pages were gone stayed in the trees when a write to `merge_across_nodes` made the trees wrong
/// for them. Needs the switch right after the last sharer left; seen as an oops, or as pages that do not
/// merge.
fn switch_nodes() -> Outcome {
    const KNOB: &str = "merge_across_nodes";
    if !engine::path(engine::dir(), KNOB).exists() {
        return skip("no merge_across_nodes");
    }
    // All on one node, so that they merge with either setting.
    numa::bind(Some(0))?;
    for value in [0, 1, 0, 1] {
        let pair = [Worker::mergeable(N, 100)?, Worker::mergeable(N, 100)?];
        scan::until_merged(N as u64, N as u64)?;
        scan::stop()?;
        ensure!(
            engine::write(KNOB, value).is_err(),
            "switched with merged pages"
        );
        drop(pair);
        engine::write("run", 2)?;
        engine::write(KNOB, value)?;
        ensure!(engine::read(KNOB)? == value);
    }
    let mut pair = [Worker::mergeable(N, 100)?, Worker::mergeable(N, 100)?];
    scan::until_merged(N as u64, N as u64)?;
    verify_all(&mut pair)?;
    PASS
}
