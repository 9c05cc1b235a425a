// SPDX-License-Identifier: GPL-2.0
//! What memory control groups are charged for merged pages.

use anyhow::{ensure, Context, Result};

use super::tests;
use crate::cgroup::Group;
use crate::harness::{skip, Module, Outcome, Theme, PASS};
use crate::region::PAGE;
use crate::scan;
use crate::swap::Zram;
use crate::worker::{verify_all, Worker};

pub const THEME: Theme = Theme {
    name: "memcg",
    about: "memory cgroups are charged for each page once, whoever shares it",
    module: Module::Loaded,
    tests: tests![
        ("merge-write-and-exit", 120, life),
        ("unmerged-by-run-2", 120, unmerged),
        ("swapped-in-copies-are-charged", 120, swapped_in),
    ],
};

const N: usize = 2048;
const ALL: i64 = N as i64;
/// Pages by which the figures may be off: each CPU keeps some charges for
/// itself, and a process has a few pages besides its region.
const SLACK: i64 = 400;
const NO_GROUPS: &str = "no memory cgroups";

/// A process in a group of its own. Dropped in this order.
struct Tenant {
    worker: Worker,
    group: Group,
    /// What the group was charged before the region was filled.
    base: i64,
}

fn to_pages(bytes: u64) -> i64 {
    (bytes / PAGE as u64) as i64
}

impl Tenant {
    fn new(name: &str) -> Result<Option<Self>> {
        let Some(group) = Group::new(name)? else {
            return Ok(None);
        };
        let mut worker = Worker::new()?;
        group.enter(worker.pid())?;
        worker.map(N)?;
        worker.advise(0, N, libc::MADV_NOHUGEPAGE)?;
        let base = to_pages(group.stat("anon")?);
        worker.fill(0, N, 100, 1)?;
        worker.advise(0, N, libc::MADV_MERGEABLE)?;
        Ok(Some(Self {
            worker,
            group,
            base,
        }))
    }

    /// Anonymous pages that the group is charged for, besides the process's own.
    fn pages(&self) -> Result<i64> {
        Ok(to_pages(self.group.stat("anon")?) - self.base)
    }
}

fn about(what: &str, pages: i64, want: i64) -> Result<()> {
    println!("{what}: {pages} pages, {want} expected");
    ensure!(
        (pages - want).abs() <= SLACK,
        "{what}: charged for {pages} pages instead of {want}"
    );
    Ok(())
}

fn pair() -> Result<Option<[Tenant; 2]>> {
    let (Some(a), Some(b)) = (Tenant::new("a")?, Tenant::new("b")?) else {
        return Ok(None);
    };
    about("a alone", a.pages()?, ALL)?;
    about("b alone", b.pages()?, ALL)?;
    scan::until_merged(N as u64, N as u64)?;
    Ok(Some([a, b]))
}

fn sum(pair: &[Tenant; 2]) -> Result<i64> {
    Ok(pair[0].pages()? + pair[1].pages()?)
}

fn verify(pair: &mut [Tenant; 2]) -> Result<()> {
    pair.iter_mut()
        .try_for_each(|tenant| tenant.worker.verify())
}

/// Ends the process, and checks that its group is charged for `left` pages then.
fn end(tenant: Tenant, left: i64) -> Result<Group> {
    let Tenant { worker, group, .. } = tenant;
    worker.exit()?;
    about("after the exit", to_pages(group.stat("anon")?), left)?;
    Ok(group)
}

fn life() -> Outcome {
    let Some(mut pair) = pair()? else {
        return skip(NO_GROUPS);
    };
    scan::stop()?;
    about("merged", sum(&pair)?, ALL)?;
    // Whoever writes pays for the copy.
    let shares = [pair[0].pages()?, pair[1].pages()?];
    pair[0].worker.poke(0, N / 2, 1, 1)?;
    about("half written by a", pair[0].pages()?, shares[0] + ALL / 2)?;
    about("and nothing by b", pair[1].pages()?, shares[1])?;
    verify(&mut pair)?;
    // The other half of the pages stays with whoever was charged, though he may be gone.
    let [a, b] = pair;
    let (share_a, mut survivor) = (shares[0], b);
    let group_a = end(a, share_a)?;
    survivor.worker.verify()?;
    let current = to_pages(group_a.current()?);
    ensure!(
        current + SLACK >= share_a,
        "memory.current is {current} pages"
    );
    survivor.worker.fill(0, N, 7, 1)?;
    about("all given up by b", to_pages(group_a.stat("anon")?), 0)?;
    about("b has its own", survivor.pages()?, ALL)?;
    survivor.worker.verify()?;
    let group_b = end(survivor, 0)?;
    scan::until_merged(0, 0)?;
    for group in [&group_a, &group_b] {
        about("in the end", to_pages(group.stat("anon")?), 0)?;
    }
    group_a.remove()?;
    group_b.remove()?;
    PASS
}

fn unmerged() -> Outcome {
    let Some(mut pair) = pair()? else {
        return skip(NO_GROUPS);
    };
    about("merged", sum(&pair)?, ALL)?;
    crate::engine::write("run", 2)?;
    // Copies are charged to the process that they are for, not to whoever wrote to `run`.
    about("a's own again", pair[0].pages()?, ALL)?;
    about("b's own again", pair[1].pages()?, ALL)?;
    verify(&mut pair)?;
    PASS
}

fn swapped_in() -> Outcome {
    let (Some(_zram), Some(group)) = (Zram::new(64)?, Group::new("swapped")?) else {
        return skip("no zram or no memory cgroups");
    };
    let mut workers = (0..2)
        .map(|_| Worker::mergeable_in(&group, N, 100))
        .collect::<Result<Vec<_>>>()?;
    scan::until_merged(N as u64, N as u64)?;
    scan::stop()?;
    let before = to_pages(group.stat("anon")?);
    // Some pages may be busy, and it never gets as much as it is asked for: several times.
    let mut out = before;
    for _ in 0..20 {
        let _ = group.reclaim(4 * N * PAGE)?;
        out = to_pages(group.stat("anon")?);
        if out < before - ALL / 2 {
            break;
        }
    }
    println!("{before} pages before, {out} while swapped out");
    ensure!(out < before - ALL / 2, "only {} pages went", before - out);
    for worker in &mut workers {
        worker.poke(0, N, 1, worker.pid() as u8)?;
    }
    verify_all(&mut workers)?;
    // Each has all pages for itself now, and every one of them is charged.
    let now = to_pages(group.stat("anon")?);
    about("written to by both", now, before + ALL)?;
    let worker = workers.pop().context("two workers")?;
    worker.exit()?;
    about("one is gone", to_pages(group.stat("anon")?), before)?;
    PASS
}
