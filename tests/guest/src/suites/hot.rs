// SPDX-License-Identifier: GPL-2.0
//! Pages that are written again and again, where the sample of their words does not show it.

use std::os::fd::OwnedFd;
use std::time::Duration;

use anyhow::{ensure, Result};

use super::tests;
use crate::background::Background;
use crate::engine::{self, wait_for};
use crate::harness::{skip, Module, Outcome, Suite, PASS};
use crate::proc;
use crate::region::{Region, PAGE};
use crate::scan::{self, Stepper};
use crate::sys;
use crate::worker::{verify_all, Worker};

pub const SUITE: Suite = Suite {
    name: "hot",
    about: "pages that are written soon after they merged are left alone, and merge once they stay unchanged",
    module: Module::Loaded,
    tests: tests![
        ("changed-in-every-pass", 120, every_pass),
        ("changed-in-two-of-three-passes", 120, two_of_three),
        ("changed-in-every-other-pass", 120, every_other),
        ("merged-in-vain-three-times", 90, in_vain),
        ("changed-by-the-clock", 150, by_the_clock),
        ("merge-when-they-hold-still", 120, hold_still),
        ("replaced-a-few-times", 90, replaced),
        ("still-pages-among-them", 90, still),
        ("held-by-somebody-for-long", 90, held),
    ],
};

const N: usize = 256;
const PROCESSES: usize = 4;
const ALL: u32 = 1_000_000;
const NO_STRIKES: &str =
    "in-tree KSM compares checksums of whole pages, and forgets earlier merges";

fn start_workers() -> Result<Vec<Worker>> {
    (0..PROCESSES)
        .map(|_| {
            let mut worker = Worker::with_pages(N)?;
            worker.advise(0, N, libc::MADV_NOHUGEPAGE)?;
            worker.fill(0, N, 100, 1)?;
            worker.advise(0, N, libc::MADV_MERGEABLE)?;
            Ok(worker)
        })
        .collect()
}

/// Whether the pages change before pass `n`.
type Rhythm = fn(u8) -> bool;

/// Processes with equal pages, and the thread that scans them.
struct Hot {
    workers: Vec<Worker>,
    stepper: Stepper,
    passes: u8,
}

impl Hot {
    fn new() -> Result<Self> {
        Ok(Self {
            workers: start_workers()?,
            stepper: Stepper::new(ALL)?,
            passes: 0,
        })
    }

    /// Run `passes` passes. Return how many merged pages were copied because of a write.
    ///
    /// Each page changes in one word, at an offset that differs from page to page and is the same in all
    /// processes. The sample contains that word in six of seven hundred pages.
    fn run(&mut self, passes: usize, rhythm: Rhythm) -> Result<i64> {
        let before = proc::vmstat("cow_ksm")?;
        for _ in 0..passes {
            if rhythm(self.passes) {
                // No page ever has an earlier content again.
                for worker in &mut self.workers {
                    worker.poke_scattered(self.passes)?;
                }
            }
            self.passes += 1;
            step_pass(&mut self.stepper)?;
        }
        Ok(proc::vmstat("cow_ksm")? - before)
    }
}

/// Run one whole pass.
fn step_pass(stepper: &mut Stepper) -> Result<engine::Counters> {
    let before = engine::read("full_scans")?;
    loop {
        let c = stepper.step()?;
        if c.full_scans != before {
            return Ok(c);
        }
    }
}

/// A few merges fail to last until all pages are known to be volatile. After that none merges.
fn left_alone(rhythm: Rhythm) -> Result<engine::Counters> {
    let mut hot = Hot::new()?;
    let first = hot.run(24, rhythm)?;
    let then = hot.run(24, rhythm)?;
    let c = engine::counters()?;
    println!("{first} copies in the first 24 passes, {then} in the next 24; {c:?}");
    let most = (PROCESSES * N) as i64 * 24 / 100;
    ensure!(then < most, "{then} copies in 24 passes, of {most}");
    verify_all(&mut hot.workers)?;
    Ok(c)
}

fn every_pass() -> Outcome {
    let c = left_alone(|_| true)?;
    ensure!(c.volatile >= (PROCESSES * N) as u64 * 98 / 100, "{c:?}");
    PASS
}

fn two_of_three() -> Outcome {
    if engine::is_in_tree() {
        return skip(NO_STRIKES);
    }
    left_alone(|pass| pass % 3 != 0)?;
    PASS
}

fn every_other() -> Outcome {
    if engine::is_in_tree() {
        return skip(NO_STRIKES);
    }
    left_alone(|pass| pass % 2 == 0)?;
    PASS
}

/// Leave time to merge between the changes, so that each merge is in vain. After three of them, a page must
/// stay unchanged for seconds, which it never does.
fn in_vain() -> Outcome {
    if engine::is_in_tree() {
        return skip(NO_STRIKES);
    }
    let mut hot = Hot::new()?;
    let copies = hot.run(24, |pass| pass % 3 == 0)?;
    let each = copies as f64 / (PROCESSES * N) as f64;
    println!("{copies} copies, {each:.2} of each page");
    // Where the sample shows the change, as in one page of a hundred, there are five copies.
    ensure!((1.0..3.1).contains(&each), "{copies} copies");
    verify_all(&mut hot.workers)?;
    PASS
}

/// Passes are a second apart, as by default, and the writers run independently of them.
fn by_the_clock() -> Outcome {
    const PERIOD: Duration = Duration::from_millis(300);
    const WINDOW: u64 = 10;
    if !engine::is_in_tree() {
        engine::write("pass_millisecs", 1000)?;
    }
    let mut hot = Vec::new();
    for _ in 0..PROCESSES {
        hot.push(Background::once(|| {
            let mut region = Region::new(N)?;
            region.advise(0, N, libc::MADV_NOHUGEPAGE)?;
            region.fill(0, N, 100, 1);
            region.advise(0, N, libc::MADV_MERGEABLE)?;
            loop {
                std::thread::sleep(PERIOD);
                region.bump_scattered();
            }
        })?);
    }
    engine::write("pages_to_scan", 20_000)?;
    engine::write("run", 1)?;
    // On a busy machine, the writers may have paused for some seconds.
    let mut windows = Vec::new();
    let quiet = loop {
        let (scans, copies) = (engine::read("full_scans")?, proc::vmstat("cow_ksm")?);
        wait_for("passes", Duration::from_secs(60), || {
            Ok(engine::read("full_scans")? >= scans + WINDOW)
        })?;
        let copies = proc::vmstat("cow_ksm")? - copies;
        windows.push(copies);
        if copies < (PROCESSES * N) as i64 * WINDOW as i64 / 100 {
            break true;
        }
        if windows.len() == 6 {
            break false;
        }
    };
    println!(
        "copies in {WINDOW} passes each: {windows:?}; {:?}",
        engine::counters()?
    );
    ensure!(quiet, "pages merge and break all the time");
    // A writer may get no CPU for some passes, and then its pages stay unchanged.
    wait_for("volatile pages", Duration::from_secs(30), || {
        let volatile = engine::read("pages_volatile")?;
        Ok(volatile >= (PROCESSES * N) as u64 * 98 / 100)
    })?;
    for process in hot {
        process.stop()?;
    }
    PASS
}

fn hold_still() -> Outcome {
    let mut hot = Hot::new()?;
    hot.run(24, |_| true)?;
    let all = (N * (PROCESSES - 1)) as u64;
    wait_for("merging", Duration::from_secs(60), || {
        Ok(hot.stepper.step()?.sharing == all)
    })?;
    ensure!(engine::read("pages_volatile")? == 0);
    verify_all(&mut hot.workers)?;
    PASS
}

/// Like programs that test this: write, wait until the pages merge, write something else.
fn replaced() -> Outcome {
    let mut workers = start_workers()?;
    let mut stepper = Stepper::new(ALL)?;
    let all = (N * (PROCESSES - 1)) as u64;
    for round in 0..5 {
        for worker in &mut workers {
            worker.fill(0, N, 10_000 * round, 1)?;
        }
        // The first pass sees that they changed, the second that they did not.
        step_pass(&mut stepper)?;
        let mut c = step_pass(&mut stepper)?;
        if c.sharing != all {
            // A CPU may put its pages on the LRU lists late, which delays them by a pass.
            c = step_pass(&mut stepper)?;
        }
        ensure!(c.sharing == all && c.volatile == 0, "round {round}: {c:?}");
    }
    verify_all(&mut workers)?;
    PASS
}

/// Unchanged pages merge as soon as they would without such neighbours.
fn still() -> Outcome {
    const STILL: usize = 64;
    let mut workers = start_workers()?;
    for worker in &mut workers {
        worker.dontneed(0, STILL)?;
    }
    let mut stepper = Stepper::new(ALL)?;
    let mut value = 0;
    let mut pass = |workers: &mut [Worker]| -> Result<u64> {
        value += 1;
        for worker in workers {
            worker.poke(STILL, N - STILL, PAGE / 2 + 8, value)?;
        }
        Ok(step_pass(&mut stepper)?.sharing)
    };
    for _ in 0..24 {
        pass(&mut workers)?;
    }
    for worker in &mut workers {
        worker.fill(0, STILL, 50_000, 1)?;
    }
    pass(&mut workers)?;
    let mut sharing = pass(&mut workers)?;
    let most = (STILL * (PROCESSES - 1)) as u64;
    println!("{sharing} sharing after two passes, of {most}");
    if sharing < most {
        // A CPU may put its pages on the LRU lists late, which delays them by a pass.
        sharing = pass(&mut workers)?;
    }
    ensure!(
        sharing >= most,
        "{sharing} sharing after three passes, of {most}"
    );
    verify_all(&mut workers)?;
    PASS
}

/// Splice the first pages of a region into a pipe, which holds them until it is closed.
fn hold(region: &Region, pages: usize) -> Result<(OwnedFd, OwnedFd)> {
    let (output, input) = sys::pipe()?;
    region.splice(pages, &input)?;
    Ok((output, input))
}

/// Pages were written once after they merged, and then cannot merge for many passes. They merge as soon as
/// they can, without another event.
fn held() -> Outcome {
    // The capacity of a pipe.
    const HELD: usize = 16;
    let mut regions = [Region::new(HELD)?, Region::new(HELD)?];
    for region in &mut regions {
        region.fill(0, HELD, 100, 1);
        region.advise(0, HELD, libc::MADV_MERGEABLE)?;
    }
    scan::until_merged(HELD as u64, HELD as u64)?;
    scan::stop()?;
    for region in &mut regions {
        region.fill(0, HELD, 900, 1);
    }
    let pipes = [hold(&regions[0], HELD)?, hold(&regions[1], HELD)?];
    scan::passes(40)?;
    let c = engine::counters()?;
    ensure!(c.sharing == 0, "merged while they are in a pipe: {c:?}");
    drop(pipes);
    let merged = || Ok(engine::read("pages_sharing")? == HELD as u64);
    scan::until("merging", 12, merged)?;
    regions.iter_mut().try_for_each(|region| region.verify())?;
    PASS
}
