// SPDX-License-Identifier: GPL-2.0
//! Memory really runs out while pages are unmerged.
//!
//! The groups are called "oom" and "oom-all": `rksm-tools log-check` accepts the kernel's reports about
//! these.

use std::fs;
use std::time::Duration;

use anyhow::{ensure, Context, Result};

use super::tests;
use crate::background::Background;
use crate::cgroup::Group;
use crate::engine;
use crate::harness::{skip, Module, Outcome, Suite, PASS};
use crate::region::{Region, PAGE};
use crate::scan;
use crate::sys::Ended;
use crate::worker::{verify_all, Worker};
use crate::{module, proc};

pub const SUITE: Suite = Suite {
    name: "memless",
    about: "memory runs out while everything is unmerged: refused as in-tree, nothing lost",
    module: Module::Loaded,
    tests: tests![
        ("group-full-and-nobody-to-kill", 120, nobody_to_kill),
        ("group-full-and-the-writer-in-it", 120, writer_in_it),
        ("group-full-and-a-tenant-is-killed", 120, tenant_killed),
        ("signal-during-run-2", 120, signalled),
        ("what-is-left-is-freed-later", 60, freed_later),
        ("no-memory-at-all", 180, whole_guest),
    ],
};

const N: usize = 2048;
const NO_GROUPS: &str = "no memory cgroups";
const SPARED: &str = "-1000";

/// Protect a process from the OOM killer, or make it an ordinary victim (`0`).
fn adjust(pid: u32, score: &str) -> Result<()> {
    fs::write(format!("/proc/{pid}/oom_score_adj"), score).context("oom_score_adj")
}

/// Start two processes with the same pages in a group, and merge them.
fn tenants(group: &Group, pages: usize, score: &str) -> Result<Vec<Worker>> {
    let mut workers = Vec::new();
    for _ in 0..2 {
        let worker = Worker::mergeable_in(group, pages, 100)?;
        adjust(worker.pid(), score)?;
        workers.push(worker);
    }
    scan::until_merged(pages as u64, pages as u64)?;
    scan::stop()?;
    Ok(workers)
}

/// Limit the group to `pages` more than its present charge.
fn limit(group: &Group, pages: usize) -> Result<()> {
    let max = group.current()? + (pages * PAGE) as u64;
    group.set("memory.max", &max.to_string())
}

/// Write 2 to `run` in a process of its own, which holds `pages` pages.
fn unmerge_apart(group: Option<&Group>, score: &str, pages: usize) -> Result<Background> {
    let group = group.map(Group::again);
    let score = score.to_string();
    Background::once(move || {
        let me = std::process::id();
        if let Some(group) = group {
            group.enter(me)?;
        }
        adjust(me, &score)?;
        let own = Region::new(pages.max(1))?;
        own.advise(0, pages, libc::MADV_POPULATE_WRITE)?;
        engine::write("run", 2)
    })
}

/// Start a process in the group that holds `pages` pages and does nothing.
fn bystander(group: &Group, pages: usize) -> Result<Background> {
    let (before, group_again) = (group.current()?, group.again());
    let one = Background::once(move || {
        let me = std::process::id();
        group_again.enter(me)?;
        adjust(me, "0")?;
        let own = Region::new(pages)?;
        own.advise(0, pages, libc::MADV_POPULATE_WRITE)?;
        loop {
            std::thread::sleep(Duration::from_secs(1));
        }
    })?;
    engine::wait_for("a bystander", Duration::from_secs(10), || {
        Ok(group.current()? >= before + (pages * PAGE) as u64)
    })?;
    Ok(one)
}

/// Check the state after `run=2` failed: the thread stopped, and the counters are right.
fn check_stopped(workers: &mut [Worker]) -> Result<usize> {
    let run = engine::read("run")?;
    ensure!(run == 0, "run reads {run} after a failure");
    let c = engine::counters()?;
    let merged: usize = workers.iter().map(|w| w.merged()).sum::<Result<_>>()?;
    println!("{merged} pages still merged; {c:?}");
    verify_all(workers)?;
    let counted = (c.shared + c.sharing) as usize;
    // The in-tree engine notices only in the next scan which pages of a process were unmerged.
    ensure!(
        counted == merged || (engine::is_in_tree() && counted > merged),
        "{merged} pages are merged, {counted} are counted"
    );
    Ok(merged)
}

/// The rest must work with enough memory.
fn finish(workers: &mut [Worker]) -> Result<()> {
    let pages = workers[0].span().pages as u64;
    engine::write("run", 2)?;
    ensure!(engine::read("run")? == 2);
    let c = engine::counters()?;
    ensure!((c.shared, c.sharing) == (0, 0), "{c:?}");
    verify_all(workers)?;
    for worker in workers.iter() {
        ensure!(worker.merged()? == 0, "merged after run=2");
    }
    // All can merge again.
    scan::until_merged(pages, pages)?;
    verify_all(workers)
}

fn nobody_to_kill() -> Outcome {
    let Some(group) = Group::new("oom")? else {
        return skip(NO_GROUPS);
    };
    let mut workers = tenants(&group, N, SPARED)?;
    for room in [0, N / 2] {
        limit(&group, room)?;
        let errno = engine::refused("run", "2")?;
        // Without room in its group, a process cannot even answer.
        group.set("memory.max", "max")?;
        ensure!(errno == Some(libc::ENOMEM), "run=2 gives {errno:?}");
        let merged = check_stopped(&mut workers)?;
        ensure!(merged != 0, "there was memory for all");
        // Merging continues: unmerged pages merge again.
        scan::until_merged(N as u64, N as u64)?;
        scan::stop()?;
        verify_all(&mut workers)?;
    }
    limit(&group, 0)?;
    let errno = engine::refused("run", "2")?;
    group.set("memory.max", "max")?;
    ensure!(errno == Some(libc::ENOMEM), "run=2 gives {errno:?}");
    finish(&mut workers)?;
    PASS
}

fn writer_in_it() -> Outcome {
    let Some(group) = Group::new("oom")? else {
        return skip(NO_GROUPS);
    };
    let mut workers = tenants(&group, N, SPARED)?;
    let writer = {
        limit(&group, N / 4)?;
        unmerge_apart(Some(&group), "0", 0)?
    };
    let how = writer.join(Duration::from_secs(40))?;
    group.set("memory.max", "max")?;
    ensure!(
        how == Ended::Signal(libc::SIGKILL),
        "the writer ended by {how:?}"
    );
    ensure!(check_stopped(&mut workers)? != 0);
    finish(&mut workers)?;
    PASS
}

fn tenant_killed() -> Outcome {
    let Some(group) = Group::new("oom")? else {
        return skip(NO_GROUPS);
    };
    let mut workers = tenants(&group, N, "0")?;
    limit(&group, N / 4)?;
    // One process is killed, which leaves memory for the other, unless it is freed too late. If the killed
    // process is the one being unmerged, its fault fails, and so does unmerging.
    engine::wait_for("run=2", Duration::from_secs(10), || {
        std::thread::sleep(Duration::from_millis(100));
        match engine::refused("run", "2")? {
            None => Ok(true),
            Some(libc::ENOMEM) => Ok(false),
            other => anyhow::bail!("run=2 gives {other:?}"),
        }
    })?;
    let c = engine::counters()?;
    ensure!((c.shared, c.sharing) == (0, 0), "{c:?}");
    group.set("memory.max", "max")?;
    let is_alive = |worker: &Worker| Ok(!"ZX".contains(proc::stat(worker.pid())?.state));
    // A killed process may not have ended yet, and both may have been killed.
    let killed = group.event("oom_kill")?;
    ensure!(killed > 0, "no process was killed");
    engine::wait_for(
        "end of the killed processes",
        Duration::from_secs(10),
        || {
            let alive = workers.iter().map(is_alive).collect::<Result<Vec<_>>>()?;
            Ok(alive.iter().filter(|&&alive| !alive).count() as u64 == killed)
        },
    )?;
    for worker in &mut workers {
        if is_alive(worker)? {
            worker.verify()?;
        }
    }
    PASS
}

fn signalled() -> Outcome {
    // Many pages, so that the signal arrives in the middle.
    const MANY: usize = 4 * N;
    let mut workers = [Worker::mergeable(MANY, 100)?, Worker::mergeable(MANY, 100)?];
    for worker in &mut workers {
        // Nothing else may replace merged pages.
        worker.advise(0, MANY, libc::MADV_NOHUGEPAGE)?;
    }
    let mut early = 0;
    for round in 0..6u64 {
        scan::until_merged(MANY as u64, MANY as u64)?;
        scan::stop()?;
        let writer = unmerge_apart(None, "0", 0)?;
        let pid = writer.pid() as libc::pid_t;
        engine::wait_for("beginning", Duration::from_secs(20), || {
            Ok(engine::read("run")? == 2)
        })?;
        std::thread::sleep(Duration::from_millis(5 * round));
        let _ = crate::sys::kill(pid, libc::SIGTERM);
        match writer.join(Duration::from_secs(40))? {
            Ended::Signal(libc::SIGTERM) => {}
            Ended::Exit(0) => continue,
            how => anyhow::bail!("the writer ended by {how:?}"),
        }
        if engine::read("run")? == 2 {
            // The signal arrived when all was done.
            verify_all(&mut workers)?;
            continue;
        }
        if check_stopped(&mut workers)? != 0 {
            early += 1;
        }
        engine::write("run", 2)?;
        let c = engine::counters()?;
        ensure!((c.shared, c.sharing) == (0, 0), "{c:?}");
    }
    println!("{early} of 6 were ended in the middle");
    ensure!(early > 0, "no signal came in time");
    verify_all(&mut workers)?;
    PASS
}

/// `run=2` cannot unmerge the pages of a child that was not scanned yet, and no other process has them. Their
/// metadata goes when the child frees them, without a scan.
fn freed_later() -> Outcome {
    const FEW: usize = 64;
    let Some(group) = Group::new("oom")? else {
        return skip(NO_GROUPS);
    };
    // Fork before there is anything to inherit.
    let mut other = Worker::mergeable(FEW, 100)?;
    let mut region = Region::new(FEW)?;
    region.fill(0, FEW, 100, 1);
    region.advise(0, FEW, libc::MADV_MERGEABLE)?;
    scan::until_merged(FEW as u64, FEW as u64)?;
    scan::stop()?;
    let mut child = Worker::inheriting(&mut region)?;
    child.verify()?;
    group.enter(child.pid())?;
    adjust(child.pid(), SPARED)?;
    limit(&group, 0)?;
    let errno = engine::refused("run", "2")?;
    group.set("memory.max", "max")?;
    ensure!(errno == Some(libc::ENOMEM), "run=2 gives {errno:?}");
    let merged = child.merged()?;
    ensure!(merged != 0, "there was memory for all");
    if engine::is_in_tree() {
        child.poke(0, FEW, 1, 1)?;
    } else {
        let refused = module::unload();
        ensure!(refused.is_err(), "{merged} pages are not known");
        child.poke(0, FEW, 1, 1)?;
        engine::wait_for("unload", Duration::from_secs(10), || {
            Ok(module::unload().is_ok())
        })?;
        module::load()?;
    }
    child.verify()?;
    region.verify()?;
    other.verify()?;
    PASS
}

/// Return how many KiB allocations can still get: down to the lowest watermark, with what reclaim would free.
/// MemAvailable stops at the highest watermark.
fn obtainable() -> Result<i64> {
    let mut sum = proc::free_kib()?;
    for key in ["Active(file)", "Inactive(file)", "SReclaimable"] {
        sum += proc::meminfo(key)?;
    }
    let reserve = fs::read_to_string("/proc/sys/vm/min_free_kbytes").context("min_free_kbytes")?;
    Ok(sum - reserve.trim().parse::<i64>().context("min_free_kbytes")?)
}

/// Makes processes outside a group the last choice of the OOM killer, until dropped. The killer waits one
/// second for a victim to exit before it looks for another, which is short on a busy machine.
struct Sheltered(Vec<(u32, String)>);

impl Sheltered {
    const LAST: &str = "-999";

    fn all_but(group: &Group) -> Result<Self> {
        let members = group.members()?;
        let mut this = Self(Vec::new());
        for entry in fs::read_dir("/proc").context("/proc")?.flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else {
                continue;
            };
            // A process that has exited meanwhile needs no protection.
            let Ok(before) = fs::read_to_string(entry.path().join("oom_score_adj")) else {
                continue;
            };
            let before = before.trim().to_string();
            if !members.contains(&pid) && before != SPARED && adjust(pid, Self::LAST).is_ok() {
                this.0.push((pid, before));
            }
        }
        Ok(this)
    }
}

impl Drop for Sheltered {
    fn drop(&mut self) {
        for (pid, before) in &self.0 {
            let _ = adjust(*pid, before);
        }
    }
}

/// Memory in use that the OOM killer does not find: most of the machine's.
struct Hog(Region);

impl Hog {
    /// Leave about `left` KiB.
    fn new(left: i64) -> Result<Self> {
        let most = (obtainable()? as usize >> 2) + (64 << 8);
        let region = Region::new(most)?;
        // Giving up the memory must free it, whatever was forked meanwhile.
        region.advise(0, most, libc::MADV_DONTFORK)?;
        // When memory is short, the kernel frees zeroes within huge pages.
        region.advise(0, most, libc::MADV_NOHUGEPAGE)?;
        let mut i = 0;
        loop {
            let more = obtainable()? - left;
            if more <= 0 || i == most {
                return Ok(Self(region));
            }
            // Approach the target step by step, as page tables and caches grow and shrink as well.
            let pages = ((more as usize >> 3).max(16)).min(most - i).min(8192);
            region.advise(i, pages, libc::MADV_POPULATE_WRITE)?;
            i += pages;
        }
    }
}

impl Drop for Hog {
    fn drop(&mut self) {
        let given_up = self.0.advise(0, self.0.pages(), libc::MADV_DONTNEED);
        given_up.expect("giving up memory");
    }
}

fn whole_guest() -> Outcome {
    // Unmerging needs 128 MiB, and there is much less.
    const PAGES: usize = 32 << 10;
    // The memory of the writer. Its exit must free enough for all other processes to continue. Between the
    // lowest and the highest watermark, every program is read from the disk again and again.
    const OWN: usize = 32 << 10;
    // The memory of a bystander: enough to be worth killing.
    const SPARE: usize = 4 << 10;
    let Some(group) = Group::new("oom-all")? else {
        return skip(NO_GROUPS);
    };
    adjust(std::process::id(), SPARED)?;
    let mut workers = tenants(&group, PAGES, SPARED)?;
    // The next victims if the writer takes too long to exit.
    let spares = (0..3)
        .map(|_| bystander(&group, SPARE))
        .collect::<Result<Vec<_>>>()?;
    let sheltered = Sheltered::all_but(&group)?;
    fs::write("/proc/sys/vm/drop_caches", "1").context("drop_caches")?;
    let hog = Hog::new(((OWN << 2) + (24 << 10)) as i64)?;
    println!(
        "{} KiB to be had, {} free",
        obtainable()?,
        proc::meminfo("MemFree")?
    );
    let writer = unmerge_apart(Some(&group), "0", OWN)?;
    let how = writer.join(Duration::from_secs(60))?;
    drop(hog);
    drop(sheltered);
    drop(spares);
    // The writer of 2 to `run` is the first victim, even if it was protected, when memory is short again.
    engine::wait_for("memory back", Duration::from_secs(20), || {
        Ok(obtainable()? > 2 * (PAGES << 2) as i64 + (128 << 10))
    })?;
    println!("the writer ended by {how:?}");
    ensure!(
        how == Ended::Signal(libc::SIGKILL),
        "the writer was not killed"
    );
    let merged = check_stopped(&mut workers)?;
    ensure!(merged != 0, "there was memory for all");
    finish(&mut workers)?;
    PASS
}
