// SPDX-License-Identifier: GPL-2.0
//! What memory cgroups are charged for merged pages.

use std::time::Duration;

use anyhow::{ensure, Context, Result};

use super::tests;
use crate::cgroup::Group;
use crate::engine::{self, wait_for};
use crate::harness::{skip, Module, Outcome, Suite, PASS};
use crate::kmsg::Log;
use crate::pageflags::swapped;
use crate::proc;
use crate::region::{Region, PAGE};
use crate::scan;
use crate::swap::Zram;
use crate::worker::{verify_all, Worker};

pub const SUITE: Suite = Suite {
    name: "memcg",
    about: "memory cgroups are charged for each page once, and for metadata by mapping",
    module: Module::Loaded,
    tests: tests![
        ("merge-write-and-exit", 120, life),
        ("unmerged-by-run-2", 120, unmerged),
        ("swapped-in-copies-are-charged", 120, swapped_in),
        ("metadata-is-charged", 120, metadata),
        ("metadata-stays-within-the-limit", 120, limit),
        ("full-group-leaves-others-alone", 120, full),
        ("inherited-mappings-are-listed-at-the-limit", 120, inherited),
        ("reclaim-of-the-group-that-pays", 200, evicted),
    ],
};

const N: usize = 2048;
const ALL: i64 = N as i64;
/// How many pages the figures may be off by. Each CPU caches some charges, and a process has a few pages
/// besides its region.
const SLACK: i64 = 400;
const NO_GROUPS: &str = "no memory cgroups";
const UNCHARGED: &str = "the in-tree engine charges its metadata to no cgroup";
/// The least metadata of one mapping of a merged page: an rmap item, and an entry of the page map.
const METADATA: u64 = 64 + 8;

/// A process in a group of its own. The fields are dropped in this order.
struct Tenant {
    worker: Worker,
    group: Group,
    /// The group's charge before the region was filled.
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

    /// Return the anonymous pages charged to the group, without the process's own.
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

/// End the process. Check that its group is then charged for `left` pages.
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
    // The writer pays for the copy.
    let shares = [pair[0].pages()?, pair[1].pages()?];
    pair[0].worker.poke(0, N / 2, 1, 1)?;
    about("half written by a", pair[0].pages()?, shares[0] + ALL / 2)?;
    about("and nothing by b", pair[1].pages()?, shares[1])?;
    verify(&mut pair)?;
    // The other half of the pages stays charged to the same group, though its process may be gone.
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
    // Copies are charged to the process that gets them, not to the writer of `run`.
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
    // Some pages may be busy, and reclaim never frees all that it is asked for, so try several times.
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
    // Each has all pages for itself now, and each page is charged.
    let now = to_pages(group.stat("anon")?);
    about("written to by both", now, before + ALL)?;
    let worker = workers.pop().context("two workers")?;
    worker.exit()?;
    about("one is gone", to_pages(group.stat("anon")?), before)?;
    PASS
}

fn slab(group: &Group) -> Result<u64> {
    group.stat("slab")
}

/// Each of two groups is charged for the metadata of its own mappings, even if the scan of the other group's
/// pages merged them, and is uncharged later.
fn metadata() -> Outcome {
    if engine::is_in_tree() {
        return skip(UNCHARGED);
    }
    const MANY: usize = 8192;
    const NEED: u64 = MANY as u64 * METADATA;
    let (Some(a), Some(b)) = (Group::new("a")?, Group::new("b")?) else {
        return skip(NO_GROUPS);
    };
    let mut workers = vec![
        Worker::mergeable_in(&a, MANY, 100)?,
        Worker::mergeable_in(&b, MANY, 100)?,
    ];
    let before = [slab(&a)?, slab(&b)?];
    scan::until_merged(MANY as u64, MANY as u64)?;
    scan::stop()?;
    let grown = [
        slab(&a)?.saturating_sub(before[0]),
        slab(&b)?.saturating_sub(before[1]),
    ];
    println!("{MANY} merged pages in each: {grown:?} bytes more, {NEED} at least");
    ensure!(
        grown.iter().all(|&bytes| bytes >= NEED),
        "metadata is not charged"
    );
    // Each mapping of the same pages costs the same.
    let [low, high] = [grown[0].min(grown[1]), grown[0].max(grown[1])];
    ensure!(
        high - low < NEED / 2,
        "one group pays for the other's mappings"
    );
    let is_back = |group: &Group, before: u64| {
        wait_for(
            "uncharging of the metadata",
            Duration::from_secs(20),
            || Ok(slab(group)? < before + NEED / 8),
        )
    };
    workers.remove(0).exit()?;
    is_back(&a, before[0])?;
    ensure!(slab(&b)? >= before[1] + NEED, "b's metadata went with a's");
    workers[0].verify()?;
    engine::write("run", 2)?;
    is_back(&b, before[1])?;
    verify_all(&mut workers)?;
    PASS
}

/// Start a worker whose pages all have the content of `seed`. They are charged elsewhere, so the group is
/// only charged for metadata. The worker must not allocate in the group while the limit is reached.
fn guest_of(group: &Group, pages: usize, seed: u64) -> Result<Worker> {
    let mut worker = Worker::with_pages(pages)?;
    worker.advise(0, pages, libc::MADV_NOHUGEPAGE)?;
    worker.fill(0, pages, seed, 0)?;
    worker.advise(0, pages, libc::MADV_MERGEABLE)?;
    group.enter(worker.pid())?;
    Ok(worker)
}

/// Let `group` be charged at most `room` more bytes.
fn limit_to(group: &Group, room: u64) -> Result<()> {
    group.set("memory.max", &(group.current()? + room).to_string())
}

/// Without room in the group, no metadata is allocated: no process is killed, and there are no messages or
/// storms of events.
fn limit() -> Outcome {
    if engine::is_in_tree() {
        return skip(UNCHARGED);
    }
    const MANY: usize = 16_384;
    const ROOM: u64 = 512 << 10;
    const MOST: u64 = ROOM / METADATA;
    /// How many charges may fail in a pass.
    const REFUSED: u64 = 64;
    let Some(group) = Group::new("limited")? else {
        return skip(NO_GROUPS);
    };
    let mut worker = guest_of(&group, MANY, 7)?;
    limit_to(&group, ROOM)?;
    let mut log = Log::from_now()?;
    scan::passes(6)?;
    let (refused, began) = (group.event("max")?, engine::read("full_scans")?);
    scan::passes(6)?;
    scan::stop()?;
    let passes = engine::read("full_scans")? - began;
    let refused = group.event("max")? - refused;
    let merged = worker.merged()?;
    println!(
        "{merged} of {MANY} pages merged, {MOST} at most; in {passes} passes {refused} charges were refused"
    );
    ensure!(merged != 0, "nothing is merged");
    ensure!(merged as u64 <= MOST, "metadata exceeds the limit");
    ensure!(refused != 0, "the limit was never reached");
    ensure!(
        refused <= (passes + 1) * REFUSED,
        "charges are tried again and again"
    );
    for event in ["oom", "oom_kill"] {
        ensure!(group.event(event)? == 0, "{event}: {}", group.event(event)?);
    }
    let said = log.lines()?;
    ensure!(said.is_empty(), "the kernel says {said:?}");
    // With room, a later pass merges the rest.
    group.set("memory.max", "max")?;
    scan::until("the rest merged", 12, || Ok(worker.merged()? == MANY))?;
    worker.verify()?;
    PASS
}

/// Pages of a group at its limit do not keep equal pages of other groups from merging with each other.
fn full() -> Outcome {
    if engine::is_in_tree() {
        return skip(UNCHARGED);
    }
    // Pages in the unstable tree are not charged, so the others' pages meet one after the other.
    let Some(group) = Group::new("full")? else {
        return skip(NO_GROUPS);
    };
    let mut poor = Worker::with_pages(N)?;
    poor.advise(0, N, libc::MADV_NOHUGEPAGE)?;
    poor.fill(0, N, 100, 1)?;
    poor.advise(0, N, libc::MADV_MERGEABLE)?;
    // The engine knows its pages before the group reaches its limit.
    scan::passes(3)?;
    scan::stop()?;
    group.enter(poor.pid())?;
    limit_to(&group, 0)?;
    let mut others = (0..2)
        .map(|_| Worker::mergeable(N, 100))
        .collect::<Result<Vec<_>>>()?;
    scan::until("others merged", 12, || {
        let all: usize = others
            .iter()
            .map(|other| other.merged())
            .sum::<Result<usize>>()?;
        Ok(all == 2 * N)
    })?;
    let merged = poor.merged()?;
    println!("{merged} pages of the full group merged");
    // Some bytes may have been left up to the limit.
    ensure!(merged <= N / 8, "the full group is not charged");
    for event in ["oom", "oom_kill"] {
        ensure!(group.event(event)? == 0, "{event}: {}", group.event(event)?);
    }
    group.set("memory.max", "max")?;
    scan::until("all merged", 12, || Ok(poor.merged()? == N))?;
    poor.verify()?;
    verify_all(&mut others)?;
    PASS
}

/// Merged pages that a child inherits are listed even if its group has no room. Otherwise they could not
/// migrate.
fn inherited() -> Outcome {
    let Some(group) = Group::new("heir")? else {
        return skip(NO_GROUPS);
    };
    let mut twin = Worker::mergeable(N, 100)?;
    let mut region = Region::new(N)?;
    region.advise(0, N, libc::MADV_NOHUGEPAGE)?;
    region.fill(0, N, 100, 1);
    region.advise(0, N, libc::MADV_MERGEABLE)?;
    scan::until_merged(N as u64, N as u64)?;
    scan::stop()?;
    let mut child = Worker::inheriting(&mut region)?;
    group.enter(child.pid())?;
    limit_to(&group, 0)?;
    let before = group.current()?;
    scan::until("the child's mappings listed", 12, || {
        Ok(proc::ksm_stat(child.pid(), "ksm_merging_pages")? == ALL)
    })?;
    let more = group.current()? - before;
    println!("{more} bytes beyond the limit");
    if !engine::is_in_tree() {
        ensure!(more >= N as u64 * METADATA, "no cgroup is charged");
    }
    for event in ["oom", "oom_kill"] {
        ensure!(group.event(event)? == 0, "{event}: {}", group.event(event)?);
    }
    group.set("memory.max", "max")?;
    child.verify()?;
    twin.verify()?;
    region.verify()?;
    PASS
}

/// A merged page is charged to one group. Reclaim in that group ignores other users of the page; reclaim in
/// other groups leaves it alone.
fn evicted() -> Outcome {
    let (Some(_zram), Some(a), Some(b)) = (Zram::new(64)?, Group::new("a")?, Group::new("b")?)
    else {
        return skip("no zram or no memory cgroups");
    };
    let groups = [a, b];
    let mut workers = groups
        .iter()
        .map(|group| Worker::mergeable_in(group, N, 100))
        .collect::<Result<Vec<_>>>()?;
    scan::until_merged(N as u64, N as u64)?;
    scan::stop()?;
    let charged = [
        to_pages(groups[0].stat("anon")?),
        to_pages(groups[1].stat("anon")?),
    ];
    let pays = usize::from(charged[1] > charged[0]);
    let user = 1 - pays;
    println!("charged for {charged:?} pages");
    // There is little to reclaim in the group that is not charged.
    workers[user].verify()?;
    let _ = groups[user].reclaim(2 * N * PAGE)?;
    let spared = swapped(workers[pays].span())?;
    println!("reclaim where it is not charged: {spared} of {N} pages swapped out");
    ensure!(spared <= N / 8, "{spared} pages are swapped out");
    for round in 0..3 {
        // The pages are in use here.
        workers[user].verify()?;
        let _ = groups[pays].reclaim(4 * N * PAGE)?;
        println!(
            "round {round}, reclaim where it is charged: {} of {N} pages that the other group has just read \
             are swapped out",
            swapped(workers[user].span())?
        );
    }
    verify_all(&mut workers)?;
    PASS
}
