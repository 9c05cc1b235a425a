// SPDX-License-Identifier: GPL-2.0
//! A lock or reference that a process holds for as long as it likes delays neither the scan nor writers of
//! `run`. The locks of rksm do not keep a process from exiting.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};

use super::tests;
use crate::background::Background;
use crate::engine;
use crate::harness::{skip, Module, Outcome, Suite, PASS};
use crate::proc;
use crate::region::Region;
use crate::scan;
use crate::sys::{self, Ended};
use crate::timeout::scaled;
use crate::worker::{verify_all, Worker};

pub const SUITE: Suite = Suite {
    name: "stall",
    about:
        "neither scan nor run waits for a process's locks and references, nor an exit for the scan",
    module: Module::Loaded,
    tests: tests![
        ("busy-cpu", 120, busy_cpu),
        ("mmap-lock-that-is-held", 200, held_lock),
        ("memory-is-back-after-an-exit", 200, exits),
    ],
};

const N: usize = 64;
const IN_TREE: &str = "the in-tree engine waits";
const SCHED: &str = "/sys/kernel/debug/sched/fair_server";
const DEBUGFS: &str = "/sys/kernel/debug";

/// Restrict this process to one CPU.
fn pin_to(cpu: usize) -> Result<()> {
    // SAFETY: The type is plain data, for which zeroes are a valid value.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: CPU_SET writes a bit of the set.
    unsafe { libc::CPU_SET(cpu, &mut set) };
    // SAFETY: The set outlives the call.
    let ret = unsafe { libc::sched_setaffinity(0, size_of_val(&set), &set) };
    ensure!(
        ret == 0,
        "sched_setaffinity: {}",
        std::io::Error::last_os_error()
    );
    Ok(())
}

/// Give this process a priority above all ordinary tasks.
fn be_first() -> Result<()> {
    let param = libc::sched_param { sched_priority: 50 };
    // SAFETY: The parameter outlives the call.
    let ret = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &param) };
    ensure!(
        ret == 0,
        "sched_setscheduler: {}",
        std::io::Error::last_os_error()
    );
    Ok(())
}

/// A CPU on which a real-time task starves ordinary tasks, until dropped.
struct Unfair {
    knob: String,
    before: String,
}

impl Unfair {
    fn new(cpu: usize) -> Result<Option<Self>> {
        if !std::path::Path::new(SCHED).exists() {
            // SAFETY: All strings outlive the call.
            unsafe {
                libc::mount(
                    c"debugfs".as_ptr(),
                    c"/sys/kernel/debug".as_ptr(),
                    c"debugfs".as_ptr(),
                    0,
                    std::ptr::null(),
                )
            };
        }
        let knob = format!("{SCHED}/cpu{cpu}/runtime");
        let Ok(before) = fs::read_to_string(&knob) else {
            println!("no fair server in {DEBUGFS}");
            return Ok(None);
        };
        fs::write(&knob, "0").context("fair_server")?;
        Ok(Some(Self { knob, before }))
    }
}

impl Drop for Unfair {
    fn drop(&mut self) {
        let _ = fs::write(&self.knob, self.before.trim());
    }
}

/// Occupy CPU 1 for at most `limit`, with new pages in that CPU's batches.
fn spin(limit: Duration) -> Result<Background> {
    Background::once(move || {
        pin_to(1)?;
        be_first()?;
        let mut region = Region::new(8)?;
        let end = Instant::now() + limit;
        while Instant::now() < end {
            region.dontneed(0, 8)?;
            region.fill(0, 8, 1, 1);
        }
        Ok(())
    })
}

/// The longest time that the CPU is busy, so that the kernel does not report a stall.
const SPIN: Duration = Duration::from_secs(12);

fn busy_cpu() -> Outcome {
    if engine::is_in_tree() {
        return skip(IN_TREE);
    }
    pin_to(0)?;
    let Some(_unfair) = Unfair::new(1)? else {
        return skip("the kernel never starves ordinary tasks");
    };
    if let Some(thread) = proc::kernel_thread(engine::thread_name())? {
        // Otherwise the thread could not run at all on that CPU.
        let mask = std::process::Command::new("taskset")
            .args(["-pc", "0", &thread.to_string()])
            .output()?;
        ensure!(mask.status.success());
    }
    let mut workers = [Worker::mergeable(N, 500)?, Worker::mergeable(N, 500)?];
    let mut spinner = spin(SPIN)?;
    std::thread::sleep(Duration::from_millis(100));
    scan::until_merged(N as u64, N as u64)?;
    engine::write("run", 0)?;
    engine::write("run", 1)?;
    scan::passes(2)?;
    engine::write("run", 0)?;
    // All of this happened while the CPU was occupied.
    ensure!(
        spinner.ended()?.is_none(),
        "done only after the CPU was free"
    );
    let ended = spinner.join(SPIN + scaled(Duration::from_secs(5)))?;
    ensure!(ended == Ended::Exit(0), "{ended:?}");
    verify_all(&mut workers)?;
    PASS
}

/// Return whether a read that needs the `mmap_lock` of `pid` gets no answer.
fn is_locked(pid: u32) -> Result<bool> {
    let mut reader = Background::once(move || {
        fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
        Ok(())
    })?;
    let end = Instant::now() + Duration::from_millis(300);
    while Instant::now() < end {
        if reader.ended()?.is_some() {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(true)
}

/// A process forks all the time, with so many VMAs that it holds its `mmap_lock` for long. It gets no CPU in
/// the middle of that for as long as the CPU is occupied.
fn held_lock() -> Outcome {
    const AREAS: usize = 12_000;
    if engine::is_in_tree() {
        return skip(IN_TREE);
    }
    pin_to(0)?;
    let Some(_unfair) = Unfair::new(1)? else {
        return skip("the kernel never starves ordinary tasks");
    };
    let forker = Background::once(|| {
        pin_to(1)?;
        let mut region = Region::new(AREAS)?;
        region.fill(0, 4, 7000, 1);
        for i in (1..AREAS).step_by(2) {
            region.protect(i, 1, libc::PROT_READ)?;
        }
        region.advise(0, AREAS, libc::MADV_MERGEABLE)?;
        loop {
            if let sys::Forked::Child = sys::fork()? {
                sys::exit_now(0);
            }
            while let Ok(Some(_)) = sys::try_wait(-1) {}
        }
    })?;
    let thread = proc::kernel_thread(engine::thread_name())?.context("no thread")?;
    let status = std::process::Command::new("taskset")
        .args(["-pc", "0", &thread.to_string()])
        .output()?;
    ensure!(status.status.success());
    let mut workers = [Worker::mergeable(N, 500)?, Worker::mergeable(N, 500)?];
    std::thread::sleep(Duration::from_millis(700));
    for attempt in 0..20 {
        let mut spinner = spin(SPIN)?;
        std::thread::sleep(Duration::from_millis(50));
        if !is_locked(forker.pid())? {
            spinner.kill()?;
            std::thread::sleep(Duration::from_millis(37 * (attempt % 7)));
            continue;
        }
        println!("locked at attempt {attempt}");
        scan::until_merged(N as u64, N as u64)?;
        engine::write("run", 0)?;
        ensure!(
            spinner.ended()?.is_none(),
            "done only after the lock was free"
        );
        // Killing the task that occupies the CPU lets all of it end.
        spinner.kill()?;
        verify_all(&mut workers)?;
        drop(forker);
        return PASS;
    }
    skip("the lock was never found held")
}

/// A process with much memory exits during its scan. All memory must be free when the process has been
/// reaped.
fn exits() -> Outcome {
    const BIG: usize = 24_000;
    const ROUNDS: u64 = 10;
    let mut most = 0;
    for round in 0..ROUNDS {
        let mut worker = Worker::with_pages(BIG)?;
        worker.fill(0, BIG, 1 + round * 1_000_000, 1)?;
        worker.advise(0, BIG, libc::MADV_MERGEABLE)?;
        scan::start()?;
        let before = engine::read("pages_scanned")?;
        engine::wait_for("scan", Duration::from_secs(30), || {
            Ok(engine::read("pages_scanned")? > before + BIG as u64 / 4)
        })?;
        worker.kill()?;
        fs::write("/proc/sys/vm/stat_refresh", "1")?;
        let at_once = proc::vmstat("nr_anon_pages")?;
        scan::stop()?;
        std::thread::sleep(Duration::from_millis(700));
        fs::write("/proc/sys/vm/stat_refresh", "1")?;
        let later = proc::vmstat("nr_anon_pages")?;
        most = most.max(at_once - later);
    }
    println!("of {BIG} pages at most {most} came back later");
    ensure!(most < BIG as i64 / 8, "{most} pages came back later");
    PASS
}
