// SPDX-License-Identifier: GPL-2.0
//! Memory that goes offline under merged pages.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};

use super::tests;
use crate::background::Background;
use crate::engine::{self, wait_for};
use crate::harness::{skip, Module, Outcome, Suite, PASS};
use crate::memblock::{Plugged, NO_DIMM};
use crate::pageflags::{frames, merged_frames};
use crate::proc;
use crate::region::{Region, PAGE};
use crate::scan;
use crate::sys;
use crate::timeout::scaled;
use crate::worker::{verify_all, Worker};

pub const SUITE: Suite = Suite {
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
/// Start two workers whose pages are all in `memory`, and merged.
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
    // The stable nodes moved with them: another page finds its equal, and only its writer sees a write.
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
    // All workers leave the merged pages, which are then free. With the scan stopped, the engine does not
    // notice.
    for worker in &mut workers {
        worker.poke(0, N, 7, worker.pid() as u8)?;
    }
    let before = engine::counters()?;
    ensure!(
        (before.shared, before.sharing) == (N as u64, N as u64),
        "{before:?}"
    );
    memory.offline()?;
    left_soon(0)?;
    verify_all(&mut workers)?;
    scan::passes(3)?;
    for worker in &mut workers {
        worker.fill(0, N, 300, 1)?;
    }
    scan::until_merged(N as u64, N as u64)?;
    verify_all(&mut workers)?;
    PASS
}

/// Wait until the nodes of freed pages are gone as well, without a scan.
fn left_soon(pairs: u64) -> Result<()> {
    wait_for("end of the stale nodes", Duration::from_secs(10), || {
        let c = engine::counters()?;
        Ok((c.shared, c.sharing) == (pairs, pairs))
    })
}

/// Take `memory` offline and back again and again. It may be busy for a moment.
fn shake(memory: &Plugged) -> Result<Background> {
    let memory = memory.again();
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

fn while_scanning() -> Outcome {
    let Some(memory) = Plugged::new()? else {
        return skip(NO_DIMM);
    };
    let mut workers = pair_in(&memory)?;
    let before = proc::vmstat("pgmigrate_success")?;
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
    let moved = proc::vmstat("pgmigrate_success")? - before;
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

/// Splice page `i` of `region` into a pipe. It cannot be migrated meanwhile.
fn into_pipe(region: &Region, i: usize, pipe: &impl AsRawFd) -> Result<()> {
    let page = libc::iovec {
        iov_base: region.at(i) as *mut libc::c_void,
        iov_len: PAGE,
    };
    // SAFETY: The vector describes memory of ours, and the pipe only takes a reference to the page.
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
    let pfn = frames(region.span())?[0];
    let pfn = pfn.context("a page in memory")?;
    let block = memory
        .blocks
        .iter()
        .find(|b| b.holds(pfn))
        .context("its block")?;
    let (output, input) = sys::pipe()?;
    into_pipe(&region, 0, &input)?;

    // Offlining retries as long as the page is in the pipe.
    let asking = block.clone();
    let mut offlining = Background::once(move || asking.set("offline"))?;
    // If the page blocks it too early, offlining fails.
    wait_for("going-offline", Duration::from_secs(20), || {
        Ok(block.state()? == "going-offline" || offlining.ended()?.is_some())
    })?;
    ensure!(offlining.ended()?.is_none(), "offlining ended early");
    // Meanwhile nothing is scanned, and no other process hangs.
    let begin = Instant::now();
    let mut last = engine::read("full_scans")?;
    loop {
        std::thread::sleep(Duration::from_millis(200));
        let now = engine::read("full_scans")?;
        if now == last {
            break;
        }
        ensure!(
            begin.elapsed() < scaled(Duration::from_secs(20)),
            "the scan continues"
        );
        last = now;
    }
    verify_all(&mut workers)?;
    // Unmerging must wait until the offlining is decided.
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

/// Return the ACPI device of `memory`.
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
    left_soon(N as u64 / 2)?;
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
