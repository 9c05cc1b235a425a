// SPDX-License-Identifier: GPL-2.0
//! `merge_across_nodes`: pages on different memory nodes.

use anyhow::{ensure, Result};

use super::tests;
use crate::engine::{self, refused};
use crate::harness::{skip, Module, Outcome, Suite, PASS};
use crate::numa::{ensure_on, move_all_to, two_nodes};
use crate::scan;
use crate::worker::{verify_all, Worker};

pub const SUITE: Suite = Suite {
    name: "numa",
    about: "pages on different memory nodes merge only if they may",
    module: Module::Loaded,
    tests: tests![
        ("across-nodes", 60, across),
        ("not-across-nodes", 60, not_across),
        ("values-and-errors", 60, values),
        ("switched-to-and-fro", 90, switched),
        ("stale-nodes-when-switched", 60, stale_when_switched),
        ("merged-pages-that-migrate", 120, migrated),
        ("migrated-and-back", 120, migrated_and_back),
        ("zero-pages-of-all-nodes", 60, zero_pages),
    ],
};

const N: usize = 16;
const ONE: &str = "the machine has one memory node";

/// Start a worker with `N` different pages on `node`, of the contents from `seed` on.
fn on_node(node: u32, seed: u64) -> Result<Worker> {
    let mut worker = Worker::with_pages(N)?;
    worker.fill(0, N, seed, 1)?;
    move_all_to(worker.span(), node)?;
    worker.advise(0, N, libc::MADV_MERGEABLE)?;
    Ok(worker)
}

fn across() -> Outcome {
    if two_nodes()?.is_none() {
        return skip(ONE);
    }
    ensure!(engine::read("merge_across_nodes")? == 1);
    let mut workers = [on_node(0, 100)?, on_node(1, 100)?, on_node(1, 100)?];
    scan::until_merged(N as u64, 2 * N as u64)?;
    verify_all(&mut workers)?;
    PASS
}

fn not_across() -> Outcome {
    if two_nodes()?.is_none() {
        return skip(ONE);
    }
    engine::write("merge_across_nodes", 0)?;
    let mut workers = vec![on_node(0, 100)?, on_node(1, 100)?, on_node(1, 100)?];
    scan::until_merged(N as u64, N as u64)?;
    scan::passes(3)?;
    let c = engine::counters()?;
    ensure!((c.shared, c.sharing) == (N as u64, N as u64), "{c:?}");
    ensure!(workers[0].merged()? == 0, "merged with pages of node 1");
    ensure_on(workers[0].span(), 0)?;
    ensure_on(workers[1].span(), 1)?;
    ensure_on(workers[2].span(), 1)?;
    // Only an equal page on its own node was missing.
    workers.push(on_node(0, 100)?);
    scan::until_merged(2 * N as u64, 2 * N as u64)?;
    for (worker, node) in workers.iter().zip([0, 1, 1, 0]) {
        ensure_on(worker.span(), node)?;
    }
    verify_all(&mut workers)?;
    PASS
}

fn values() -> Outcome {
    for bad in ["2", "-1", "x", "\n", "18446744073709551615"] {
        let errno = refused("merge_across_nodes", bad)?;
        ensure!(errno == Some(libc::EINVAL), "{bad:?}: {errno:?}");
    }
    let errno = refused("merge_across_nodes", "18446744073709551616")?;
    ensure!(errno == Some(libc::ERANGE), "{errno:?}");
    let mut workers = [Worker::mergeable(N, 100)?, Worker::mergeable(N, 100)?];
    scan::until_merged(N as u64, N as u64)?;
    ensure!(refused("merge_across_nodes", "0")? == Some(libc::EBUSY));
    ensure!(engine::read("merge_across_nodes")? == 1);
    // This is its value already.
    engine::write("merge_across_nodes", 1)?;
    verify_all(&mut workers)?;
    engine::write("run", 2)?;
    for to in [0, 1, 0] {
        engine::write("merge_across_nodes", to)?;
        ensure!(engine::read("merge_across_nodes")? == to);
    }
    verify_all(&mut workers)?;
    PASS
}

fn switched() -> Outcome {
    if two_nodes()?.is_none() {
        return skip(ONE);
    }
    let mut workers = [on_node(0, 100)?, on_node(1, 100)?];
    for round in 0..3 {
        engine::write("merge_across_nodes", 0)?;
        scan::passes(4)?;
        let c = engine::counters()?;
        ensure!(c.shared + c.sharing == 0, "round {round}: {c:?}");
        engine::write("merge_across_nodes", 1)?;
        scan::until_merged(N as u64, N as u64)?;
        verify_all(&mut workers)?;
        engine::write("run", 2)?;
        // The kernel makes copies wherever there is room.
        for (worker, node) in workers.iter().zip([0, 1]) {
            move_all_to(worker.span(), node)?;
        }
    }
    PASS
}

fn stale_when_switched() -> Outcome {
    // All sharers are gone, and there was no scan since.
    let workers = [Worker::mergeable(N, 100)?, Worker::mergeable(N, 100)?];
    scan::until_merged(N as u64, N as u64)?;
    scan::stop()?;
    for worker in workers {
        worker.kill()?;
    }
    if engine::is_in_tree() {
        // Without a scan the in-tree engine only notices this way, and its nodes stay behind.
        engine::write("run", 2)?;
    }
    engine::wait_for("the end of what they merged", scan::PASS_LIMIT, || {
        let c = engine::counters()?;
        Ok(c.shared == 0 && refused("merge_across_nodes", "0")?.is_none())
    })?;
    let mut workers = [Worker::mergeable(N, 100)?, Worker::mergeable(N, 100)?];
    for worker in &workers {
        if two_nodes()?.is_some() {
            move_all_to(worker.span(), 0)?;
        }
    }
    scan::until_merged(N as u64, N as u64)?;
    verify_all(&mut workers)?;
    PASS
}

fn migrated() -> Outcome {
    if two_nodes()?.is_none() {
        return skip(ONE);
    }
    engine::write("merge_across_nodes", 0)?;
    let mut workers = vec![on_node(0, 100)?, on_node(0, 100)?];
    scan::until_merged(N as u64, N as u64)?;
    move_all_to(workers[0].span(), 1)?;
    // Both map the same pages.
    ensure_on(workers[1].span(), 1)?;
    verify_all(&mut workers)?;
    // A page on the old node has no equal there; a page on the new node has.
    workers.push(on_node(0, 100)?);
    workers.push(on_node(1, 100)?);
    scan::until_merged(N as u64, 2 * N as u64)?;
    scan::passes(3)?;
    ensure!(workers[2].merged()? == 0 && workers[3].merged()? == N);
    ensure_on(workers[2].span(), 0)?;
    // Two on the old node merge with each other.
    workers.push(on_node(0, 100)?);
    scan::until_merged(2 * N as u64, 3 * N as u64)?;
    for (worker, node) in workers.iter().zip([1, 1, 0, 1, 0]) {
        ensure_on(worker.span(), node)?;
        ensure!(worker.merged()? == N);
    }
    verify_all(&mut workers)?;
    PASS
}

fn migrated_and_back() -> Outcome {
    if two_nodes()?.is_none() {
        return skip(ONE);
    }
    engine::write("merge_across_nodes", 0)?;
    let mut workers = vec![
        on_node(0, 100)?,
        on_node(0, 100)?,
        on_node(1, 100)?,
        on_node(1, 100)?,
    ];
    scan::until_merged(2 * N as u64, 2 * N as u64)?;
    // The same content twice on one node, then on the node that had neither.
    for to in [1, 0] {
        for which in [0, 2] {
            move_all_to(workers[which].span(), to)?;
        }
        scan::passes(2)?;
        for worker in &workers {
            ensure_on(worker.span(), to)?;
        }
        verify_all(&mut workers)?;
    }
    let before = workers.len() as u64 * N as u64;
    workers.push(on_node(0, 100)?);
    scan::until("all merged", 12, || {
        let c = engine::counters()?;
        Ok(c.shared + c.sharing == before + N as u64)
    })?;
    let c = engine::counters()?;
    ensure!(c.shared <= 2 * N as u64, "{c:?}");
    verify_all(&mut workers)?;
    PASS
}

fn zero_pages() -> Outcome {
    if two_nodes()?.is_none() {
        return skip(ONE);
    }
    engine::write("merge_across_nodes", 0)?;
    engine::write("use_zero_pages", 1)?;
    let mut workers = [Worker::with_pages(N)?, Worker::with_pages(N)?];
    for (worker, node) in workers.iter_mut().zip([0, 1]) {
        worker.fill(0, N, 0, 0)?;
        move_all_to(worker.span(), node)?;
        worker.advise(0, N, libc::MADV_MERGEABLE)?;
    }
    scan::until("zero pages of both nodes", 12, || {
        Ok(engine::read("ksm_zero_pages")? == 2 * N as u64)
    })?;
    verify_all(&mut workers)?;
    PASS
}
