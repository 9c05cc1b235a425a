// SPDX-License-Identifier: GPL-2.0
//! Memory that is taken away under merged pages.
//!
//! The memory is a plugged-in DIMM that is offline at first (see tests/run).
//! A test brings it online as movable, binds its processes to its node, so
//! that their pages are in it, and takes it offline again.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};

use super::tests;
use crate::background::Background;
use crate::engine::{self, wait_for};
use crate::harness::{skip, Module, Outcome, Theme, PASS};
use crate::numa;
use crate::pageflags::{frames, merged_frames, Span};
use crate::region::{Region, PAGE};
use crate::scan;
use crate::sys;
use crate::worker::{verify_all, Worker};

pub const THEME: Theme = Theme {
    name: "hotplug",
    about: "memory goes offline, and is unplugged, under merged pages and stale nodes",
    module: Module::Loaded,
    tests: tests![
        ("merged-pages-move-away", 90, merged_pages),
        ("stale-nodes-go-with-their-memory", 90, stale_nodes),
        ("offline-while-scanning", 180, while_scanning),
        ("offline-while-run-changes", 180, while_run_changes),
        ("offline-that-is-given-up", 120, given_up),
        ("unplug", 120, unplug),
    ],
};

const N: usize = 64;
const MEMORY: &str = "/sys/devices/system/memory";

/// A memory block: what goes online and offline as a whole.
#[derive(Clone, Debug)]
struct Block {
    dir: PathBuf,
    first: u64,
    frames: u64,
    node: u32,
}

impl Block {
    fn all() -> Result<Vec<Self>> {
        let size = fs::read_to_string(format!("{MEMORY}/block_size_bytes"))?;
        let frames = u64::from_str_radix(size.trim(), 16).context("block size")? / PAGE as u64;
        let mut all = Vec::new();
        for entry in fs::read_dir(MEMORY).context(MEMORY)? {
            let dir = entry?.path();
            let Some(number) = number_in(&dir, "memory") else {
                continue;
            };
            let node = fs::read_dir(&dir)?
                .filter_map(|e| number_in(&e.ok()?.path(), "node"))
                .next();
            all.push(Self {
                first: number * frames,
                frames,
                node: node.context("a memory block of no node")? as u32,
                dir,
            });
        }
        all.sort_by_key(|block| block.first);
        Ok(all)
    }

    fn state(&self) -> Result<String> {
        let state = fs::read_to_string(self.dir.join("state")).context("state")?;
        Ok(state.trim_end().to_string())
    }

    fn set(&self, state: &str) -> Result<()> {
        fs::write(self.dir.join("state"), state)
            .with_context(|| format!("{}: {state}", self.dir.display()))
    }

    /// Whether frame `pfn` is in it.
    fn holds(&self, pfn: u64) -> bool {
        (self.first..self.first + self.frames).contains(&pfn)
    }
}

fn number_in(path: &Path, prefix: &str) -> Option<u64> {
    path.file_name()?
        .to_str()?
        .strip_prefix(prefix)?
        .parse()
        .ok()
}

/// The memory that tests take away: online and movable until dropped.
struct Plugged {
    blocks: Vec<Block>,
}

impl Plugged {
    /// `None` if there is none.
    fn new() -> Result<Option<Self>> {
        let mut blocks = Vec::new();
        for block in Block::all()? {
            if block.state()? == "offline" {
                blocks.push(block);
            }
        }
        let Some(node) = blocks.first().map(|block| block.node) else {
            return Ok(None);
        };
        blocks.retain(|block| block.node == node);
        let this = Self { blocks };
        this.online()?;
        numa::bind(Some(node))?;
        Ok(Some(this))
    }

    fn online(&self) -> Result<()> {
        self.blocks
            .iter()
            .try_for_each(|b| match b.state()?.as_str() {
                "offline" => b.set("online_movable"),
                _ => Ok(()),
            })
    }

    fn offline(&self) -> Result<()> {
        self.blocks.iter().try_for_each(|b| b.set("offline"))
    }

    fn holds(&self, pfn: u64) -> bool {
        self.blocks.iter().any(|block| block.holds(pfn))
    }

    /// How many of the pages of `spans` are in it.
    fn pages_of(&self, spans: &[Span]) -> Result<usize> {
        let mut count = 0;
        for &span in spans {
            let there = frames(span)?;
            count += there
                .into_iter()
                .flatten()
                .filter(|&f| self.holds(f))
                .count();
        }
        Ok(count)
    }
}

impl Drop for Plugged {
    fn drop(&mut self) {
        for block in &self.blocks {
            if block.state().is_ok_and(|state| state != "offline") {
                if let Err(e) = block.set("offline") {
                    println!("{e:#}");
                }
            }
        }
    }
}

const NO_DIMM: &str = "no memory that is plugged in and offline";

/// Two workers whose pages are all in `memory`, and merged.
fn pair_in(memory: &Plugged) -> Result<[Worker; 2]> {
    let workers = [Worker::mergeable(N, 100)?, Worker::mergeable(N, 100)?];
    let spans = [workers[0].span(), workers[1].span()];
    let there = memory.pages_of(&spans)?;
    ensure!(there == 2 * N, "only {there} of {} pages are there", 2 * N);
    scan::until_merged(N as u64, N as u64)?;
    let there = memory.pages_of(&spans)?;
    ensure!(there == 2 * N, "only {there} of {} pages are there", 2 * N);
    Ok(workers)
}

fn merged_of(worker: &Worker) -> Result<BTreeSet<u64>> {
    Ok(merged_frames(worker.span())?
        .into_iter()
        .flatten()
        .collect())
}

fn merged_pages() -> Outcome {
    let Some(memory) = Plugged::new()? else {
        return skip(NO_DIMM);
    };
    let mut workers = Vec::from(pair_in(&memory)?);
    scan::stop()?;
    let before = engine::counters()?;
    memory.offline()?;
    ensure!(
        engine::counters()? == before,
        "{before:?}, then {:?}",
        engine::counters()?
    );
    let moved = merged_of(&workers[0])?;
    ensure!(
        moved.len() == N && moved == merged_of(&workers[1])?,
        "{} merged",
        moved.len()
    );
    ensure!(
        !moved.iter().any(|&f| memory.holds(f)),
        "pages that did not move"
    );
    verify_all(&mut workers)?;
    // The nodes went with them: another page finds its equal, and a write is seen by one only.
    workers.push(Worker::mergeable(N, 100)?);
    scan::until_merged(N as u64, 2 * N as u64)?;
    ensure!(merged_of(&workers[2])? == moved);
    workers[0].poke(0, N, 5, 5)?;
    verify_all(&mut workers)?;
    scan::until_merged(N as u64, N as u64)?;
    verify_all(&mut workers)?;
    PASS
}

fn stale_nodes() -> Outcome {
    let Some(memory) = Plugged::new()? else {
        return skip(NO_DIMM);
    };
    let mut workers = pair_in(&memory)?;
    scan::stop()?;
    // Everybody leaves the merged pages, which are free then; with the scan stopped the engine does
    // not get to know.
    for worker in &mut workers {
        worker.poke(0, N, 7, worker.pid() as u8)?;
    }
    let before = engine::counters()?;
    ensure!(
        (before.shared, before.sharing) == (N as u64, N as u64),
        "{before:?}"
    );
    memory.offline()?;
    let after = engine::counters()?;
    ensure!(
        (after.shared, after.sharing) == (0, 0),
        "left of the stale nodes: {after:?}"
    );
    verify_all(&mut workers)?;
    scan::passes(3)?;
    for worker in &mut workers {
        worker.fill(0, N, 300, 1)?;
    }
    scan::until_merged(N as u64, N as u64)?;
    verify_all(&mut workers)?;
    PASS
}

/// Takes `memory` offline and back, for ever. It may be busy for a moment.
fn shake(memory: &Plugged) -> Result<Background> {
    let blocks = memory.blocks.clone();
    let memory = std::mem::ManuallyDrop::new(Plugged { blocks });
    Background::repeat(move || {
        let result = memory.offline();
        memory.online()?;
        match result {
            Err(e) if !is_busy(&e) => Err(e),
            _ => Ok(()),
        }
    })
}

fn is_busy(e: &anyhow::Error) -> bool {
    e.downcast_ref::<std::io::Error>()
        .is_some_and(|e| e.raw_os_error() == Some(libc::EBUSY))
}

/// How many pages were migrated since boot.
fn migrated() -> Result<u64> {
    let text = fs::read_to_string("/proc/vmstat").context("vmstat")?;
    let line = text
        .lines()
        .find_map(|l| l.strip_prefix("pgmigrate_success "));
    line.context("pgmigrate_success")?.parse().context("vmstat")
}

fn while_scanning() -> Outcome {
    let Some(memory) = Plugged::new()? else {
        return skip(NO_DIMM);
    };
    let mut workers = pair_in(&memory)?;
    let before = migrated()?;
    let shaking = shake(&memory)?;
    for round in 0..12u64 {
        for (i, worker) in workers.iter_mut().enumerate() {
            worker.fill(0, N / 2, 1000 + round, 1)?;
            worker.poke(N / 2, N / 2, 9, (round as u8).wrapping_mul(2) + i as u8)?;
        }
        scan::passes(2)?;
        verify_all(&mut workers)?;
    }
    shaking.stop()?;
    let moved = migrated()? - before;
    println!("{moved} pages moved meanwhile");
    ensure!(moved > 0, "no page moved");
    for worker in &mut workers {
        worker.fill(0, N, 500, 1)?;
    }
    scan::until_merged(N as u64, N as u64)?;
    verify_all(&mut workers)?;
    PASS
}

fn while_run_changes() -> Outcome {
    let Some(memory) = Plugged::new()? else {
        return skip(NO_DIMM);
    };
    let mut workers = pair_in(&memory)?;
    let shaking = shake(&memory)?;
    for _ in 0..8 {
        engine::write("run", 2)?;
        let c = engine::counters()?;
        ensure!((c.shared, c.sharing) == (0, 0), "{c:?}");
        ensure!(workers[0].merged()? == 0 && workers[1].merged()? == 0);
        verify_all(&mut workers)?;
        scan::until_merged(N as u64, N as u64)?;
        verify_all(&mut workers)?;
    }
    shaking.stop()?;
    PASS
}

/// Puts page `i` of `region` into a pipe: it cannot be migrated meanwhile.
fn into_pipe(region: &Region, i: usize, pipe: &impl AsRawFd) -> Result<()> {
    let page = libc::iovec {
        iov_base: region.at(i) as *mut libc::c_void,
        iov_len: PAGE,
    };
    // SAFETY: one vector of memory that is ours; the page is only lent to the pipe.
    let n = unsafe { libc::vmsplice(pipe.as_raw_fd(), &raw const page, 1, 0) };
    ensure!(
        n == PAGE as isize,
        "vmsplice: {}",
        std::io::Error::last_os_error()
    );
    Ok(())
}

fn given_up() -> Outcome {
    let Some(memory) = Plugged::new()? else {
        return skip(NO_DIMM);
    };
    let mut workers = pair_in(&memory)?;
    let mut region = Region::new(1)?;
    region.fill(0, 1, 900, 0);
    let pfn = frames(Span {
        pid: std::process::id(),
        addr: region.addr(),
        pages: 1,
    })?[0];
    let pfn = pfn.context("a page that is there")?;
    let block = memory
        .blocks
        .iter()
        .find(|b| b.holds(pfn))
        .context("its block")?;
    let (output, input) = sys::pipe()?;
    into_pipe(&region, 0, &input)?;

    // As long as the page is in the pipe, this tries again and again.
    let asking = block.clone();
    let mut offlining = Background::once(move || asking.set("offline"))?;
    // The page may have been in the way too early: then it is refused.
    wait_for("going-offline", Duration::from_secs(20), || {
        Ok(block.state()? == "going-offline" || offlining.ended()?.is_some())
    })?;
    ensure!(offlining.ended()?.is_none(), "offlining ended early");
    // Meanwhile nothing is scanned, and nobody hangs who does not ask for it.
    let begin = Instant::now();
    let mut last = engine::read("full_scans")?;
    loop {
        std::thread::sleep(Duration::from_millis(200));
        let now = engine::read("full_scans")?;
        if now == last {
            break;
        }
        ensure!(
            begin.elapsed() < Duration::from_secs(20),
            "scanning goes on"
        );
        last = now;
    }
    verify_all(&mut workers)?;
    // Unmerging has to wait until it is known whether the memory goes.
    let unmerging = Background::once(|| engine::write("run", 2))?;
    std::thread::sleep(Duration::from_millis(300));
    ensure!(block.state()? == "going-offline", "{}", block.state()?);
    let c = engine::counters()?;
    ensure!(c.sharing == N as u64, "unmerged meanwhile: {c:?}");
    offlining.stop()?;
    let how = unmerging.join(Duration::from_secs(30))?;
    ensure!(how == sys::Ended::Exit(0), "unmerging ended by {how:?}");
    ensure!(block.state()? == "online", "{}", block.state()?);
    let c = engine::counters()?;
    ensure!((c.shared, c.sharing) == (0, 0), "{c:?}");
    verify_all(&mut workers)?;
    scan::until_merged(N as u64, N as u64)?;
    drop((output, input));
    memory.offline()?;
    verify_all(&mut workers)?;
    region.verify()?;
    PASS
}

/// The ACPI device of `memory`.
fn acpi_device() -> Result<Option<PathBuf>> {
    for entry in fs::read_dir("/sys/bus/acpi/devices").context("acpi")? {
        let path = entry?.path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or("");
        if name.starts_with("PNP0C80:") && path.join("eject").exists() {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

fn unplug() -> Outcome {
    let Some(memory) = Plugged::new()? else {
        return skip(NO_DIMM);
    };
    let Some(device) = acpi_device()? else {
        return skip("no memory device to eject");
    };
    // Half of the merged pages become stale.
    let mut workers = pair_in(&memory)?;
    scan::stop()?;
    for worker in &mut workers {
        worker.poke(0, N / 2, 7, worker.pid() as u8)?;
    }
    let eject = File::options().write(true).open(device.join("eject"))?;
    std::io::Write::write_all(&mut &eject, b"1").context("eject")?;
    wait_for("unplugging", Duration::from_secs(30), || {
        Ok(memory.blocks.iter().all(|block| !block.dir.exists()))
    })?;
    let c = engine::counters()?;
    ensure!(
        (c.shared, c.sharing) == (N as u64 / 2, N as u64 / 2),
        "{c:?}"
    );
    verify_all(&mut workers)?;
    scan::passes(4)?;
    for worker in &mut workers {
        worker.fill(0, N / 2, 300, 1)?;
    }
    scan::until_merged(N as u64, N as u64)?;
    verify_all(&mut workers)?;
    if memory.blocks.iter().any(|block| block.dir.exists()) {
        bail!("memory came back");
    }
    PASS
}
