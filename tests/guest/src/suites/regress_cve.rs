// SPDX-License-Identifier: GPL-2.0
//! Past defects of KSM, of 2026: `MADV_FREE`, unstable trees, and swap-in of pages that were merged.
//!
//! Those of mm/ksm.c are tested in rksm. Those of the kernel's swap-in code are tested in the running kernel,
//! as they concern merged pages of either engine.

use std::fs;
use std::path::Path;

use anyhow::{ensure, Context, Result};

use super::tests;
use crate::cgroup::Group;
use crate::engine;
use crate::harness::{skip, Module, Outcome, Suite, PASS};
use crate::numa::{move_all_to, two_nodes};
use crate::pageflags::{frames, in_swap_cache, large, merged, merged_frames, swapped};
use crate::region::Region;
use crate::scan::{self, Stepper};
use crate::swap::Zram;
use crate::sys;
use crate::worker::{verify_all, Worker};

pub const SUITE: Suite = Suite {
    name: "regress-cve",
    about: "defects of 2026: MADV_FREE, unstable trees, and swap-in of pages that were merged",
    module: Module::Loaded,
    tests: tests![
        (
            "madv-free-on-singly-mapped-cve-2026-99656",
            120,
            singly_mapped
        ),
        (
            "unstable-tree-after-merge-across-nodes-cve-2026-99651",
            240,
            unstable_after_switch
        ),
        (
            "large-swap-cache-folio-of-another-cve-2026-99649",
            240,
            large_of_another
        ),
        (
            "freed-anon-vma-at-swap-in-cve-2026-99650",
            240,
            freed_anon_vma
        ),
    ],
};

const N: usize = 512;
const NO_SWAP: &str = "no zram or no memory cgroups";

/// CVE-2026-99656: the only process that maps a merged page gives it up (`MADV_FREE`), which marks the page
/// as one that reclaim may free. Then another process's page merges with it, and that process reads zeroes
/// after the next reclaim. Needs a merged page with one mapping; seen as lost content.
fn singly_mapped() -> Outcome {
    if engine::is_in_tree() {
        return skip("in-tree KSM loses the pages of the process that merges later");
    }
    let (Some(_zram), Some(group)) = (Zram::new(64)?, Group::new("singly")?) else {
        return skip(NO_SWAP);
    };
    let mut workers = vec![
        Worker::mergeable_in(&group, N, 100)?,
        Worker::mergeable_in(&group, N, 100)?,
    ];
    scan::until_merged(N as u64, N as u64)?;
    scan::stop()?;
    // One way to make it the only one: the other process exits.
    workers.remove(1).exit()?;
    ensure!(workers[0].merged()? == N, "given up with the other process");
    workers[0].advise(0, N, libc::MADV_FREE)?;
    workers.push(Worker::mergeable_in(&group, N, 100)?);
    let late = workers[1].span();
    scan::until("merge of the later process", 12, || Ok(merged(late)? == N))?;
    scan::stop()?;
    // Some pages may be busy, so try several times.
    for _ in 0..10 {
        let _ = group.reclaim(32 << 20)?;
        if swapped(late)? == N {
            break;
        }
    }
    println!("{} of {N} pages are swapped out", swapped(late)?);
    workers[1].verify()?;
    // The kernel need not have freed these pages. As they merged again, they must be intact.
    workers[0].verify()?;
    PASS
}

/// CVE-2026-99651: writing to `merge_across_nodes` in the middle of a pass left pages in unstable trees where
/// the new setting does not look for them. Removing one of them corrupted a tree. Needs pages in the trees
/// when the file is written, and that go afterwards; seen as an oops, or as pages that do not merge.
fn unstable_after_switch() -> Outcome {
    if engine::is_in_tree() {
        return skip("in-tree KSM corrupts its trees");
    }
    if two_nodes()?.is_none() {
        return skip("the machine has one memory node");
    }
    const KNOB: &str = "merge_across_nodes";
    const FEW: usize = 64;
    let on_node = |node: u32| -> Result<Worker> {
        let mut worker = Worker::with_pages(FEW)?;
        worker.fill(0, FEW, 100, 1)?;
        move_all_to(worker.span(), node)?;
        worker.advise(0, FEW, libc::MADV_MERGEABLE)?;
        Ok(worker)
    };
    let mut switched = 0;
    for steps in 1..=9 {
        let mut pair = vec![on_node(1)?, on_node(1)?];
        // Small steps, so that some of them end between a page and its equal.
        let mut stepper = Stepper::new(FEW as u32 / 2)?;
        for _ in 0..steps {
            stepper.step()?;
        }
        let to = 1 - engine::read(KNOB)?;
        // The setting is refused once some pages are merged.
        let busy = engine::refused(KNOB, &to.to_string())?;
        ensure!(busy.is_none() || busy == Some(libc::EBUSY), "{busy:?}");
        switched += u32::from(busy.is_none());
        // Take the waiting pages out of the tree: by a write, and by an exit.
        pair[0].poke(0, FEW / 2, 0, 1)?;
        stepper.step()?;
        pair.remove(0).exit()?;
        stepper.step()?;
        pair.push(on_node(1)?);
        scan::until_merged(FEW as u64, FEW as u64)?;
        verify_all(&mut pair)?;
        drop(pair);
        engine::write("run", 2)?;
    }
    println!("switched {switched} times in the middle of a pass");
    ensure!(switched >= 3, "switched {switched} times only");
    PASS
}

/// Lets the kernel swap in anonymous memory four pages at once, until dropped.
struct Quads(String);

const QUADS: &str = "/sys/kernel/mm/transparent_hugepage/hugepages-16kB/enabled";

impl Quads {
    fn allow() -> Result<Option<Self>> {
        if !Path::new(QUADS).exists() {
            return Ok(None);
        }
        let text = fs::read_to_string(QUADS).context(QUADS)?;
        let before = text.split(['[', ']']).nth(1).context(QUADS)?.to_string();
        fs::write(QUADS, "always").context(QUADS)?;
        Ok(Some(Self(before)))
    }
}

impl Drop for Quads {
    fn drop(&mut self) {
        let _ = fs::write(QUADS, &self.0);
    }
}

/// Swap out all pages of these processes.
fn swap_out(group: &Group, workers: &[Worker]) -> Result<bool> {
    for _ in 0..20 {
        let _ = group.reclaim(32 << 20)?;
        let mut all = true;
        for worker in workers {
            all &= swapped(worker.span())? == worker.span().pages;
        }
        if all {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Start two processes with the same pages at the same addresses, merge these, and swap them out.
fn swapped_pair(region: &mut Region, group: &Group) -> Result<Option<Vec<Worker>>> {
    let mut workers = Vec::new();
    for _ in 0..2 {
        let mut worker = Worker::inheriting(region)?;
        group.enter(worker.pid())?;
        worker.advise(0, N, libc::MADV_NOHUGEPAGE)?;
        worker.fill(0, N, 100, 1)?;
        worker.advise(0, N, libc::MADV_MERGEABLE)?;
        workers.push(worker);
    }
    scan::until_merged(N as u64, N as u64)?;
    scan::stop()?;
    Ok(swap_out(group, &workers)?.then_some(workers))
}

/// Count the pages that two processes map and that are not merged, though neither process inherited them.
fn wrongly_shared(a: &[Option<u64>], b: &Worker) -> Result<usize> {
    let merged = merged_frames(b.span())?;
    Ok(frames(b.span())?
        .iter()
        .zip(a)
        .zip(merged)
        .filter(|((b, a), merged)| merged.is_none() && b.is_some() && b == a)
        .count())
}

/// CVE-2026-99649: merged pages are swapped out, and one process swaps several of them in as one large folio,
/// which then belongs to its address space. The other process, whose entries name the same swap slots, gets
/// that folio without a check of its owner. rmap walks do not find that mapping, so the page can be freed
/// under it. The defect is in the kernel's own code; seen as one frame in both processes that is not merged.
fn large_of_another() -> Outcome {
    let (Some(_zram), Some(group)) = (Zram::new(64)?, Group::new("large")?) else {
        return skip(NO_SWAP);
    };
    let mut found = 0;
    for _ in 0..4 {
        let mut region = Region::aligned(N, 16 << 10)?;
        let Some(mut workers) = swapped_pair(&mut region, &group)? else {
            return skip("not all pages could be swapped out");
        };
        let Some(_quads) = Quads::allow()? else {
            return skip("no large folios of 16 KiB");
        };
        workers[0].advise(0, N, libc::MADV_HUGEPAGE)?;
        workers[0].verify()?;
        let came = large(workers[0].span())?;
        let before = frames(workers[0].span())?;
        workers[1].verify()?;
        let wrong = wrongly_shared(&before, &workers[1])?;
        println!("{came} of {N} pages came in large folios; {wrong} of them are mapped by the other process");
        // Wrong mappings must not stay.
        for worker in workers {
            worker.exit()?;
        }
        if wrong != 0 {
            return skip(format!(
                "the kernel has the defect, merged pages of both engines are exposed: {wrong} of {came} pages"
            ));
        }
        found += came;
        engine::write("run", 2)?;
    }
    if found == 0 {
        return skip("no large folio was swapped in");
    }
    PASS
}

/// CVE-2026-99650: a page that was merged is swapped in by a process that then exits. For the other process
/// it stays in the swap cache, with a pointer to the first one's freed anon_vma, which the next swap-in uses.
/// If the memory belongs to a related anon_vma by then, the page is mapped where rmap walks do not find it.
/// The defect is in the kernel's own code; seen as a page of the exited process that is mapped without a
/// copy.
fn freed_anon_vma() -> Outcome {
    let (Some(_zram), Some(group)) = (Zram::new(64)?, Group::new("freed")?) else {
        return skip(NO_SWAP);
    };
    let mut left = 0;
    // Memory that one process frees is allocated by the next one on the same CPU.
    sys::run_on(0).context("sched_setaffinity")?;
    for _ in 0..8 {
        // The kernel looks at the anon_vma only if the addresses are the same.
        let mut region = Region::new(N)?;
        let Some(mut workers) = swapped_pair(&mut region, &group)? else {
            return skip("not all pages could be swapped out");
        };
        let mut heir = workers.pop().context("two workers")?;
        let mut first = workers.pop().context("two workers")?;
        first.verify()?;
        // The engine keeps the anon_vma as long as it lists the former mapping.
        scan::passes(3)?;
        scan::stop()?;
        left += in_swap_cache(first.span())?;
        let before = frames(first.span())?;
        // A fork creates an anon_vma for each VMA, so make many VMAs.
        for i in (0..N).step_by(8) {
            heir.protect(i, 4, libc::PROT_READ)?;
        }
        first.exit()?;
        heir.fork()?;
        heir.verify()?;
        let wrong = wrongly_shared(&before, &heir)?;
        heir.verify_child()?;
        heir.exit()?;
        if wrong != 0 {
            return skip(format!(
                "the kernel has the defect, merged pages of both engines are exposed: {wrong} of {N} pages"
            ));
        }
        engine::write("run", 2)?;
    }
    println!("{left} pages were left in the swap cache");
    ensure!(left != 0, "nothing was left in the swap cache");
    PASS
}
