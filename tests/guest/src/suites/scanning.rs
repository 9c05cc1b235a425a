// SPDX-License-Identifier: GPL-2.0
//! The pace of the scan, and the wait before a page merges.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};

use super::tests;
use crate::background::Background;
use crate::engine::{self, wait_for};
use crate::harness::{skip, Module, Outcome, Suite, PASS};
use crate::proc;
use crate::scan::{self, Stepper};
use crate::sys::{self, Ended};
use crate::worker::{verify_all, Worker};

pub const SUITE: Suite = Suite {
    name: "scanning",
    about: "pace, waiting for pages to stop changing, and a thread that sleeps when idle",
    module: Module::Loaded,
    tests: tests![
        ("first-pass-merges-nothing", 60, first_pass),
        ("changed-since-the-last-look", 60, changed),
        ("volatile-pages-never-merge", 60, volatile),
        ("pages-to-scan-is-respected", 60, pages_to_scan),
        ("sleep-millisecs-is-respected", 60, sleep_millisecs),
        ("exits-do-not-shorten-the-sleep", 60, exits),
        ("passes-keep-their-distance", 60, pass_millisecs),
        ("thread-is-nice-and-sleeps-when-idle", 60, idle),
        ("thread-wakes-for-the-first-process", 60, wakes),
        ("thread-freezes-with-the-system", 90, freezes),
    ],
};

const N: usize = 16;
/// More pages than any test registers, so that a batch is a pass.
const ALL: u32 = 1_000_000;

fn pair() -> Result<[Worker; 2]> {
    Ok([Worker::mergeable(N, 100)?, Worker::mergeable(N, 100)?])
}

/// Step until everything is merged, for at most `max` batches.
fn step_until_merged(stepper: &mut Stepper, max: u32) -> Result<()> {
    for _ in 0..max {
        if stepper.step()?.sharing == N as u64 {
            return Ok(());
        }
    }
    anyhow::bail!("not merged: {:?}", engine::counters()?)
}

fn first_pass() -> Outcome {
    let mut workers = pair()?;
    let before = engine::read("full_scans")?;
    let mut stepper = Stepper::new(ALL)?;
    let c = stepper.step()?;
    ensure!(
        c.full_scans <= before + 1,
        "a batch of {} passes",
        c.full_scans - before
    );
    ensure!(
        c.shared == 0 && c.sharing == 0,
        "merged at first sight: {c:?}"
    );
    ensure!(workers[0].merged()? == 0 && workers[1].merged()? == 0);
    step_until_merged(&mut stepper, 4)?;
    verify_all(&mut workers)?;
    PASS
}

fn changed() -> Outcome {
    let mut workers = pair()?;
    let mut stepper = Stepper::new(ALL)?;
    stepper.step()?;
    // Always equal to each other, but changed since the first look.
    for worker in &mut workers {
        worker.fill(0, N, 500, 1)?;
    }
    let c = stepper.step()?;
    ensure!(c.shared == 0 && c.sharing == 0, "{c:?}");
    step_until_merged(&mut stepper, 4)?;
    verify_all(&mut workers)?;
    PASS
}

fn volatile() -> Outcome {
    let mut workers = pair()?;
    let mut stepper = Stepper::new(ALL)?;
    for round in 0..5 {
        for worker in &mut workers {
            worker.fill(0, N, 1000 * (round + 1), 1)?;
        }
        let c = stepper.step()?;
        ensure!(c.shared == 0 && c.sharing == 0, "round {round}: {c:?}");
        ensure!(c.unshared == 0, "round {round}: {c:?}");
        ensure!(c.volatile == 2 * N as u64, "round {round}: {c:?}");
    }
    // Once they stop changing, they are no longer volatile.
    step_until_merged(&mut stepper, 5)?;
    ensure!(engine::read("pages_volatile")? == 0);
    verify_all(&mut workers)?;
    PASS
}

fn pages_to_scan() -> Outcome {
    const BATCH: u64 = 10;
    const PAGES: u64 = 64;
    let worker = Worker::mergeable(PAGES as usize, 100)?;
    let start = engine::counters()?;
    let mut stepper = Stepper::new(BATCH as u32)?;
    let mut last = start;
    for batch in 0..20 {
        let now = stepper.step()?;
        let pages = now.scanned - last.scanned;
        ensure!(pages <= BATCH, "batch {batch} scanned {pages} pages");
        if now.scanned - start.scanned < PAGES {
            ensure!(
                now.full_scans == start.full_scans,
                "a full scan counted after {} of {PAGES} pages",
                now.scanned - start.scanned
            );
        }
        last = now;
    }
    let pages = last.scanned - start.scanned;
    ensure!(pages > 2 * PAGES, "20 batches scanned {pages} pages");
    let passes = last.full_scans - start.full_scans;
    ensure!(
        (2..=3).contains(&passes),
        "{passes} passes over {pages} pages"
    );
    worker.exit()?;
    PASS
}

fn pass_millisecs() -> Outcome {
    if engine::is_in_tree() {
        return skip("the in-tree engine has no pass_millisecs");
    }
    // So many pages that passes over them do not follow each other at once.
    const EACH: usize = 64;
    let mut workers = [Worker::mergeable(EACH, 100)?, Worker::mergeable(EACH, 100)?];
    engine::write("pass_millisecs", 600_000)?;
    engine::write("pages_to_scan", ALL)?;
    engine::write("sleep_millisecs", 0)?;
    engine::write("run", 1)?;
    wait_for("first pass", Duration::from_secs(30), || {
        Ok(engine::read("full_scans")? == 1)
    })?;
    // Neither another pace nor a process that comes or goes brings the next pass forward.
    engine::write("sleep_millisecs", 1)?;
    let third = Worker::mergeable(N, 100)?;
    third.exit()?;
    std::thread::sleep(Duration::from_millis(300));
    let c = engine::counters()?;
    ensure!(c.full_scans == 1 && c.sharing == 0, "{c:?}");
    // A shorter interval takes effect at once.
    engine::write("pass_millisecs", 0)?;
    wait_for("merging", Duration::from_secs(30), || {
        Ok(engine::read("pages_sharing")? == EACH as u64)
    })?;
    verify_all(&mut workers)?;
    PASS
}

fn sleep_millisecs() -> Outcome {
    const BATCH: u64 = 5;
    let worker = Worker::mergeable(64, 100)?;
    engine::write("pages_to_scan", BATCH)?;
    engine::write("sleep_millisecs", 1000)?;
    let before = engine::read("pages_scanned")?;
    let start = Instant::now();
    engine::write("run", 1)?;
    std::thread::sleep(Duration::from_millis(3500));
    engine::write("run", 0)?;
    let pages = engine::read("pages_scanned")? - before;
    // One batch at once, and one each second. A busy machine may lose some.
    let took = start.elapsed();
    ensure!(pages >= 2 * BATCH, "only {pages} pages in {took:?}");
    let most = (took.as_secs() + 2) * BATCH;
    ensure!(pages <= most, "{pages} pages in {took:?}");
    worker.exit()?;
    PASS
}

/// Registered processes that exit wake the thread only to free their metadata, and not to scan.
fn exits() -> Outcome {
    const BATCH: u64 = 5;
    const SLEEP: u64 = 500;
    let worker = Worker::mergeable(64, 100)?;
    let exiting = Background::repeat(move || {
        let once = Background::once(|| {
            sys::set_memory_merge(true)?;
            Ok(())
        })?;
        let how = once.join(Duration::from_secs(20))?;
        ensure!(how == Ended::Exit(0), "{how:?}");
        Ok(())
    })?;
    engine::write("pages_to_scan", BATCH)?;
    engine::write("sleep_millisecs", SLEEP)?;
    let forks = || -> Result<u64> {
        let text = fs::read_to_string("/proc/stat").context("/proc/stat")?;
        let line = text.lines().find_map(|l| l.strip_prefix("processes "));
        Ok(line.context("processes")?.trim().parse()?)
    };
    let (before, born, start) = (engine::read("pages_scanned")?, forks()?, Instant::now());
    engine::write("run", 1)?;
    std::thread::sleep(Duration::from_millis(4000));
    wait_for(
        "exits",
        Duration::from_secs(30),
        || Ok(forks()? - born > 40),
    )?;
    engine::write("run", 0)?;
    let (pages, born) = (engine::read("pages_scanned")? - before, forks()? - born);
    exiting.stop()?;
    let took = start.elapsed();
    println!("{pages} pages while {born} processes came and went");
    let most = (took.as_millis() as u64 / SLEEP + 2) * BATCH;
    ensure!(pages <= most, "{pages} pages in {took:?}, not {most}");
    worker.exit()?;
    PASS
}

/// Return the pid of the scanning thread.
fn thread() -> Result<u32> {
    proc::kernel_thread(engine::thread_name())?.context("no scanning thread")
}

/// Check that the thread sleeps and uses no CPU time.
fn expect_idle(what: &str) -> Result<()> {
    let pid = thread()?;
    // It may have to finish something first.
    wait_for("sleep", Duration::from_secs(5), || {
        Ok(proc::stat(pid)?.state == 'S')
    })?;
    std::thread::sleep(Duration::from_millis(100));
    let before = proc::cpu_time(pid)?;
    std::thread::sleep(Duration::from_millis(1500));
    let used = proc::cpu_time(pid)? - before;
    ensure!(used < Duration::from_millis(5), "{what}: used {used:?}");
    ensure!(proc::stat(pid)?.state == 'S', "{what}: does not sleep");
    Ok(())
}

fn idle() -> Outcome {
    let nice = proc::stat(thread()?)?.nice;
    ensure!(nice == 5, "nice is {nice}");
    engine::write("sleep_millisecs", 1)?;
    engine::write("run", 1)?;
    expect_idle("nothing registered")?;
    let worker = Worker::mergeable(N, 100)?;
    engine::write("run", 0)?;
    expect_idle("stopped")?;
    worker.exit()?;
    PASS
}

fn wakes() -> Outcome {
    engine::write("pages_to_scan", ALL)?;
    engine::write("sleep_millisecs", 1)?;
    engine::write("run", 1)?;
    std::thread::sleep(Duration::from_millis(500));
    let mut workers = pair()?;
    wait_for("merge", Duration::from_secs(20), || {
        Ok(engine::read("pages_sharing")? == N as u64)
    })?;
    verify_all(&mut workers)?;
    PASS
}

/// Freeze all tasks for `seconds`, and thaw them. Return false if the kernel has no test mode for that.
fn freeze(seconds: u64) -> Result<bool> {
    let delay = "/sys/module/suspend/parameters/pm_test_delay";
    let set = fs::write("/sys/power/pm_test", "freezer")
        .and_then(|()| fs::write(delay, seconds.to_string()));
    if set.is_err() {
        return Ok(false);
    }
    let frozen = fs::write("/sys/power/state", "freeze");
    fs::write("/sys/power/pm_test", "none").context("pm_test")?;
    frozen.context("freezing all tasks")?;
    Ok(true)
}

fn freezes() -> Outcome {
    const SECONDS: u64 = 2;
    let mut workers = pair()?;
    scan::passes(3)?;
    // The pages that the thread scans within `limit` if nothing stops it.
    let rate = |limit: Duration| -> Result<u64> {
        let before = engine::read("pages_scanned")?;
        std::thread::sleep(limit);
        Ok(engine::read("pages_scanned")? - before)
    };
    // On a busy machine the thread may have had no CPU while it was not frozen.
    for attempt in 1.. {
        let awake = rate(Duration::from_secs(SECONDS))?;
        let (before, start) = (engine::read("pages_scanned")?, Instant::now());
        if !freeze(SECONDS)? {
            return skip("the kernel has no freezer test");
        }
        let (frozen, took) = (engine::read("pages_scanned")? - before, start.elapsed());
        println!("{awake} pages while awake, {frozen} around a freeze, which took {took:?}");
        ensure!(took >= Duration::from_secs(SECONDS));
        // It runs before and after, while other tasks are frozen and thawed.
        if frozen < awake / 2 {
            break;
        }
        ensure!(attempt < 3, "it scanned while frozen");
    }
    ensure!(rate(Duration::from_secs(1))? > 0, "it did not thaw");
    verify_all(&mut workers)?;
    PASS
}
