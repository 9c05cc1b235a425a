// SPDX-License-Identifier: GPL-2.0
//! Pages that migrate while they are merged, or during the merge.

use std::collections::BTreeSet;

use anyhow::{ensure, Context, Result};

use super::tests;
use crate::background::Background;
use crate::engine;
use crate::harness::{skip, Module, Outcome, Suite, PASS};
use crate::memblock::{Plugged, NO_DIMM};
use crate::numa;
use crate::pageflags::{merged_frames, Span};
use crate::proc;
use crate::region::{Region, PAGE};
use crate::scan::{self, Stepper};
use crate::worker::{verify_all, Worker};

pub const SUITE: Suite = Suite {
    name: "migrate",
    about: "merged pages move to another node or are compacted, with all their mappings",
    module: Module::Loaded,
    tests: tests![
        ("move-pages", 60, move_pages),
        ("migrate-pages", 60, migrate_pages),
        ("child-of-a-fork-moves-too", 60, fork),
        ("mremap-then-fork-then-move", 60, mremap_fork),
        ("parent-of-who-was-merged-first", 90, child_first),
        ("move-while-merging", 120, while_merging),
        ("move-while-unmerging", 120, while_unmerging),
        ("move-what-nobody-maps-any-more", 90, stale),
        ("compaction", 120, compaction),
        ("compaction-while-merging", 120, compaction_while_merging),
    ],
};

const N: usize = 48;
const ONE_NODE: &str = "only one node has memory";

fn pages() -> u64 {
    N as u64
}

fn pair() -> Result<[Worker; 2]> {
    let workers = [Worker::mergeable(N, 100)?, Worker::mergeable(N, 100)?];
    scan::until_merged(pages(), pages())?;
    Ok(workers)
}

fn merged_of(span: Span) -> Result<BTreeSet<u64>> {
    Ok(merged_frames(span)?.into_iter().flatten().collect())
}

/// Return the one of `a` and `b` that no page of `span` is on. First move all pages to the node that has the
/// most of them.
fn other_node(span: Span, (a, b): (u32, u32)) -> Result<u32> {
    let on_a = numa::nodes_of(span)?
        .into_iter()
        .filter(|&n| n == a as i32)
        .count();
    let (most, other) = if on_a * 2 > span.pages {
        (a, b)
    } else {
        (b, a)
    };
    numa::move_all_to(span, most)?;
    Ok(other)
}

/// Check that pages are still merged, each in one frame for all of `spans`, and none in a frame of `before`.
fn moved_together(spans: &[Span], before: &BTreeSet<u64>) -> Result<()> {
    let first = merged_frames(spans[0])?;
    for (i, frame) in first.iter().enumerate() {
        let frame = frame.with_context(|| format!("page {i} is not merged any more"))?;
        ensure!(!before.contains(&frame), "page {i} did not move");
    }
    for &span in &spans[1..] {
        ensure!(
            merged_frames(span)? == first,
            "pid {} maps other frames",
            span.pid
        );
    }
    Ok(())
}

fn move_pages() -> Outcome {
    let Some(nodes) = numa::two_nodes()? else {
        return skip(ONE_NODE);
    };
    let mut workers = Vec::from(pair()?);
    scan::stop()?;
    let counters = engine::counters()?;
    let span = workers[0].span();
    // All of them must move, so they begin on one node.
    numa::move_all_to(span, nodes.0)?;
    for _ in 0..3 {
        let to = other_node(span, nodes)?;
        let before = merged_of(span)?;
        numa::move_all_to(span, to)?;
        moved_together(&[span, workers[1].span()], &before)?;
        verify_all(&mut workers)?;
    }
    ensure!(engine::counters()? == counters);
    // The stable node knows its page's new frame: a page of a third process merges with it.
    workers.push(Worker::mergeable(N, 100)?);
    scan::until_merged(pages(), 2 * pages())?;
    ensure!(merged_of(workers[2].span())? == merged_of(workers[0].span())?);
    workers[0].poke(0, N, 5, 5)?;
    verify_all(&mut workers)?;
    engine::write("run", 2)?;
    ensure!(workers[1].merged()? == 0 && workers[2].merged()? == 0);
    verify_all(&mut workers)?;
    PASS
}

fn migrate_pages() -> Outcome {
    let Some(nodes) = numa::two_nodes()? else {
        return skip(ONE_NODE);
    };
    let mut workers = pair()?;
    scan::stop()?;
    for _ in 0..3 {
        let span = workers[1].span();
        let to = other_node(span, nodes)?;
        let from = if to == nodes.0 { nodes.1 } else { nodes.0 };
        // Some may have been there from the beginning, and do not move.
        numa::migrate_process(span.pid, to, from)?;
        let before = merged_of(span)?;
        let left = numa::migrate_process(span.pid, from, to)?;
        let on: Vec<_> = numa::nodes_of(span)?;
        ensure!(
            on.iter().all(|&n| n == to as i32),
            "{left} pages left behind; {on:?}"
        );
        moved_together(&[workers[0].span(), span], &before)?;
        verify_all(&mut workers)?;
    }
    scan::passes(2)?;
    scan::until_merged(pages(), pages())?;
    verify_all(&mut workers)?;
    PASS
}

/// Map and merge two equal halves of a region of this process.
fn halves(advise: bool) -> Result<Region> {
    let mut region = Region::new(2 * N)?;
    region.fill(0, N, 100, 1);
    region.fill(N, N, 100, 1);
    if advise {
        region.advise(0, 2 * N, libc::MADV_MERGEABLE)?;
        scan::until_merged(pages(), pages())?;
    }
    Ok(region)
}

fn span_of(pid: u32, region: &Region) -> Span {
    Span {
        pid,
        addr: region.addr(),
        pages: region.pages(),
    }
}

/// Move the pages of `region`, which children inherited, back and forth.
fn move_with_children(region: &mut Region, nodes: (u32, u32)) -> Outcome {
    // There was no pass since the fork, so the engine lists none of the children's mappings.
    scan::stop()?;
    let mut children = [Worker::inheriting(region)?, Worker::inheriting(region)?];
    let spans = [
        span_of(std::process::id(), region),
        children[0].span(),
        children[1].span(),
    ];
    for _ in 0..2 {
        for span in spans {
            let to = other_node(span, nodes)?;
            let before = merged_of(span)?;
            ensure!(before.len() == N, "{} frames", before.len());
            numa::move_all_to(span, to)?;
            moved_together(&spans, &before)?;
            region.verify()?;
            verify_all(&mut children)?;
        }
        // The same with these mappings listed.
        scan::until_merged(pages(), 5 * pages())?;
        scan::stop()?;
    }
    children[0].poke(0, 2 * N, 3, 3)?;
    region.verify()?;
    verify_all(&mut children)?;
    PASS
}

fn fork() -> Outcome {
    let Some(nodes) = numa::two_nodes()? else {
        return skip(ONE_NODE);
    };
    move_with_children(&mut halves(true)?, nodes)
}

fn mremap_fork() -> Outcome {
    let Some(nodes) = numa::two_nodes()? else {
        return skip(ONE_NODE);
    };
    let mut region = halves(true)?;
    // The kernel unmerges the pages that mremap moves. Then they merge at the new address, with page offsets
    // that do not match it.
    region.relocate()?;
    scan::until_merged(pages(), pages())?;
    ensure!(merged_of(span_of(std::process::id(), &region))?.len() == N);
    region.verify()?;
    move_with_children(&mut region, nodes)
}

/// A child's page merges before its parent, which registered later, is scanned. Migration must find the
/// parent's mapping, which is not listed yet.
fn child_first() -> Outcome {
    let Some(nodes) = numa::two_nodes()? else {
        return skip(ONE_NODE);
    };
    if engine::is_in_tree() {
        return skip("the in-tree engine does not find a mapping that it does not list");
    }
    // The child must be first in each pass.
    engine::write("smart_scan", 0)?;
    let mut region = halves(false)?;
    let mut child = Worker::inheriting(&mut region)?;
    let (here, there) = (span_of(std::process::id(), &region), child.span());
    child.advise(0, 2 * N, libc::MADV_MERGEABLE)?;
    scan::passes(3)?;
    ensure!(engine::counters()?.shared == 0, "merged without the parent");
    let mut stepper = Stepper::new(N as u32)?;
    region.advise(0, 2 * N, libc::MADV_MERGEABLE)?;
    let mut steps = 0;
    while stepper.step()?.shared == 0 {
        steps += 1;
        ensure!(steps < 100, "nothing is merged");
    }
    engine::write("run", 0)?;
    let listed = proc::ksm_stat(here.pid, "ksm_merging_pages")?;
    ensure!(listed == 0, "{listed} pages of the parent are listed");
    let to = other_node(there, nodes)?;
    let before = merged_of(there)?;
    ensure!(merged_of(here)? == before, "the parent maps other pages");
    numa::move_all_to(there, to)?;
    let after = merged_of(there)?;
    ensure!(after.len() == before.len() && after.is_disjoint(&before));
    ensure!(merged_of(here)? == after, "not moved for the parent");
    region.verify()?;
    child.verify()?;
    scan::until_merged(pages(), 3 * pages())?;
    region.verify()?;
    child.verify()?;
    PASS
}

/// Move all pages of `spans` from node to node again and again. Busy and absent pages stay.
fn mover(spans: Vec<Span>, nodes: (u32, u32)) -> Result<Background> {
    let mut to = nodes.0;
    Background::repeat(move || {
        to = if to == nodes.0 { nodes.1 } else { nodes.0 };
        for &span in &spans {
            numa::move_to(span, to)?;
        }
        Ok(())
    })
}

/// Check that at least `least` pages migrated since the count was `before`.
fn many_moved(before: i64, least: usize) -> Result<()> {
    let moved = proc::vmstat("pgmigrate_success")? - before;
    println!("{moved} pages moved meanwhile");
    ensure!(moved >= least as i64, "only {moved} pages moved");
    Ok(())
}

/// Let pages merge, break and merge again for some rounds.
fn churn(workers: &mut [Worker]) -> Result<()> {
    for round in 0..10u64 {
        for (i, worker) in workers.iter_mut().enumerate() {
            worker.fill(0, N / 2, 1000 + round, 1)?;
            worker.poke(N / 2, N / 2, 9, (round as u8).wrapping_mul(2) + i as u8)?;
        }
        scan::passes(3)?;
        verify_all(workers)?;
    }
    Ok(())
}

/// Check that all equal pages merge with no disturbance.
fn merge_in_peace(workers: &mut [Worker]) -> Outcome {
    for worker in workers.iter_mut() {
        worker.fill(0, N, 500, 1)?;
    }
    scan::until_merged(pages(), pages() * (workers.len() as u64 - 1))?;
    verify_all(workers)?;
    PASS
}

fn while_merging() -> Outcome {
    let Some(nodes) = numa::two_nodes()? else {
        return skip(ONE_NODE);
    };
    let mut workers = pair()?;
    let before = proc::vmstat("pgmigrate_success")?;
    let moving = mover(vec![workers[0].span(), workers[1].span()], nodes)?;
    churn(&mut workers)?;
    moving.stop()?;
    many_moved(before, 10 * N)?;
    merge_in_peace(&mut workers)
}

fn while_unmerging() -> Outcome {
    let Some(nodes) = numa::two_nodes()? else {
        return skip(ONE_NODE);
    };
    let mut workers = pair()?;
    let before = proc::vmstat("pgmigrate_success")?;
    let moving = mover(vec![workers[0].span(), workers[1].span()], nodes)?;
    for _ in 0..6 {
        engine::write("run", 2)?;
        ensure!(workers[0].merged()? == 0 && workers[1].merged()? == 0);
        verify_all(&mut workers)?;
        // The engine may have to retry pages that are being migrated.
        scan::passes(4)?;
        verify_all(&mut workers)?;
    }
    moving.stop()?;
    many_moved(before, 10 * N)?;
    merge_in_peace(&mut workers)
}

/// Nodes become stale, and are visited, while pages move.
fn stale() -> Outcome {
    let Some(nodes) = numa::two_nodes()? else {
        return skip(ONE_NODE);
    };
    let mut keeper = Worker::mergeable(N, 100)?;
    let before = proc::vmstat("pgmigrate_success")?;
    let moving = mover(vec![keeper.span()], nodes)?;
    for round in 0..12u64 {
        // A partner that exits again, so the merged page is left with one mapping or none each time.
        let mut partner = Worker::mergeable(N, 100)?;
        scan::passes(3)?;
        if round % 3 == 0 {
            partner.poke(0, N, 1, 1)?;
        }
        partner.verify()?;
        partner.kill()?;
        if round % 2 == 0 {
            keeper.fill(0, N, 100, 1)?;
        }
        scan::passes(1)?;
        keeper.verify()?;
    }
    moving.stop()?;
    many_moved(before, 10 * N)?;
    keeper.fill(0, N, 100, 1)?;
    scan::until_merged(0, 0)?;
    keeper.verify()?;
    PASS
}

/// Start two workers with merged pages in the lower half of `memory`, and put memory with holes above them.
/// Compaction fills these holes, but leaves free blocks alone.
fn pair_below_holes(memory: &Plugged) -> Result<(Vec<Worker>, Filler)> {
    // The kernel allocates from the lower end.
    let filler = Filler::new(32 << 20, true)?;
    let mut workers = Vec::new();
    for _ in 0..2 {
        let mut worker = Worker::with_pages(MANY)?;
        worker.advise(0, MANY, libc::MADV_NOHUGEPAGE)?;
        worker.fill(0, MANY, 100, 1)?;
        worker.advise(0, MANY, libc::MADV_MERGEABLE)?;
        workers.push(worker);
    }
    // More than the per-CPU lists may keep when it is freed.
    let holes = Filler::new(64 << 20, false)?;
    holes.pierce()?;
    drop(filler);
    let there = memory.pages_of(&[workers[0].span(), workers[1].span()])?;
    ensure!(
        there == 2 * MANY,
        "only {there} of {} pages are there",
        2 * MANY
    );
    scan::until_merged(MANY as u64, MANY as u64)?;
    Ok((workers, holes))
}

/// Memory that is in the way until dropped.
struct Filler {
    addr: *mut libc::c_void,
    len: usize,
}

impl Filler {
    /// Map `len` bytes, in huge pages where possible or in small ones.
    fn new(len: usize, huge: bool) -> Result<Self> {
        // SAFETY: This is a new anonymous mapping at an address that the kernel chooses.
        let addr = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        ensure!(
            addr != libc::MAP_FAILED,
            "mmap: {}",
            std::io::Error::last_os_error()
        );
        let this = Self { addr, len };
        if !huge {
            this.advise(0, len, libc::MADV_NOHUGEPAGE)?;
        }
        this.advise(0, len, libc::MADV_POPULATE_WRITE)?;
        Ok(this)
    }

    fn advise(&self, offset: usize, len: usize, advice: libc::c_int) -> Result<()> {
        // SAFETY: The mapping is ours, and its content does not matter.
        let ret = unsafe { libc::madvise(self.addr.byte_add(offset), len, advice) };
        ensure!(ret == 0, "madvise: {}", std::io::Error::last_os_error());
        Ok(())
    }

    /// Free every other page.
    fn pierce(&self) -> Result<()> {
        (0..self.len)
            .step_by(2 * PAGE)
            .try_for_each(|offset| self.advise(offset, PAGE, libc::MADV_DONTNEED))
    }
}

impl Drop for Filler {
    fn drop(&mut self) {
        // SAFETY: The mapping is ours, and no reference into it exists.
        unsafe { libc::munmap(self.addr, self.len) };
    }
}

const MANY: usize = 256;

fn compaction() -> Outcome {
    let Some(memory) = Plugged::new()? else {
        return skip(NO_DIMM);
    };
    let (mut workers, _holes) = pair_below_holes(&memory)?;
    scan::stop()?;
    let before = merged_frames(workers[0].span())?;
    // Pages that a CPU has not put on the LRU lists yet do not move, so try several times.
    for attempt in 1.. {
        let migrated = proc::vmstat("pgmigrate_success")?;
        memory.compact()?;
        let migrated = proc::vmstat("pgmigrate_success")? - migrated;
        let after = merged_frames(workers[0].span())?;
        ensure!(
            merged_frames(workers[1].span())? == after,
            "the mappings of some pages parted"
        );
        let merged = after.iter().flatten().count();
        ensure!(merged == MANY, "{merged} merged pages of {MANY}");
        let moved = (0..MANY).filter(|&i| before[i] != after[i]).count();
        println!("{moved} of {merged} merged pages moved; {migrated} pages in all");
        // In the debug kernel they move there and back, with either engine.
        if moved > 0 || migrated >= 2 * MANY as i64 {
            break;
        }
        ensure!(attempt < 5, "no merged page moved");
    }
    verify_all(&mut workers)?;
    scan::passes(2)?;
    scan::until_merged(MANY as u64, MANY as u64)?;
    verify_all(&mut workers)?;
    PASS
}

fn compaction_while_merging() -> Outcome {
    let Some(memory) = Plugged::new()? else {
        return skip(NO_DIMM);
    };
    let before = proc::vmstat("pgmigrate_success")?;
    let mut moved = 0;
    for round in 0..4u64 {
        let (mut workers, _holes) = pair_below_holes(&memory)?;
        let compacting = memory.compacting()?;
        for worker in &mut workers {
            worker.fill(0, MANY / 2, 9000 * (round + 1), 1)?;
            worker.poke(MANY / 2, MANY / 4, 1, worker.pid() as u8)?;
        }
        scan::passes(3)?;
        verify_all(&mut workers)?;
        compacting.stop()?;
        for worker in &mut workers {
            worker.fill(0, MANY, 70_000, 1)?;
        }
        scan::until_merged(MANY as u64, MANY as u64)?;
        verify_all(&mut workers)?;
        moved = proc::vmstat("pgmigrate_success")? - before;
    }
    println!("{moved} pages moved meanwhile");
    ensure!(moved > 0, "no page moved");
    PASS
}
