// SPDX-License-Identifier: GPL-2.0
//! Failing allocations: in the thread, in writers of its files, in registered processes, and in loading and
//! unloading.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{bail, ensure, Context, Result};

use super::tests;
use crate::background::Background;
use crate::engine::{self, wait_for, IN_TREE};
use crate::harness::{skip, Module, Outcome, Suite, PASS};
use crate::inject::{Below, Injection, Nth, NO_INJECTION};
use crate::kprobe::Calls;
use crate::worker::{verify_all, Worker};
use crate::{module, proc, scan, sys};

pub const SUITE: Suite = Suite {
    name: "faults",
    about: "allocations fail, one after the other and at random, and nothing is lost",
    module: Module::Loaded,
    tests: tests![
        ("thread-every-allocation", 300, thread_each),
        ("thread-at-random", 120, thread_random),
        ("run-2-every-allocation", 300, run_2_each),
        ("run-2-at-random", 120, run_2_random),
        ("each-file-every-allocation", 120, files_each),
        ("processes-every-allocation", 300, processes_each),
        ("exec-with-failing-allocations", 120, exec),
        ("registered-without-memory-for-it", 60, missed),
        ("load-every-allocation", 300, load_each),
        ("unload-every-allocation", 300, unload_each),
        ("load-and-unload-at-random", 120, reload_random),
    ],
};

/// No operation here needs so many allocations. More means that counting does not end.
const MANY: u32 = 3000;
/// A test in which fewer allocations failed shows nothing.
const FEW: u32 = 4;

/// Check that the counters agree with the pages that are merged.
fn check_counters(workers: &[Worker]) -> Result<()> {
    let merged: usize = workers.iter().map(Worker::merged).sum::<Result<_>>()?;
    let c = engine::counters()?;
    ensure!(
        c.shared + c.sharing == merged as u64,
        "{merged} pages are merged; {c:?}"
    );
    Ok(())
}

fn thread() -> Result<u32> {
    proc::kernel_thread(engine::thread_name())?.context("no scanning thread")
}

/// Let all pages settle with no injection: all equal pages merge.
fn settles(workers: &mut [Worker], shared: usize, sharing: usize) -> Result<()> {
    scan::until_merged(shared as u64, sharing as u64)?;
    scan::stop()?;
    check_counters(workers)?;
    verify_all(workers)
}

fn thread_each() -> Outcome {
    const PAGES: usize = 4;
    let Some(_injection) = Injection::new()? else {
        return skip(NO_INJECTION);
    };
    let nth = Nth::of(thread()?)?;
    // So that the engine needs a second merged page with the same content.
    engine::write("max_page_sharing", 2)?;
    scan::passes(1)?;
    for n in 1..MANY {
        scan::stop()?;
        let mut workers = (0..4)
            .map(|_| Worker::mergeable(PAGES, u64::from(n) * 100))
            .collect::<Result<Vec<_>>>()?;
        nth.set(n)?;
        scan::passes(4)?;
        scan::stop()?;
        let injected = nth.end()?;
        verify_all(&mut workers).with_context(|| format!("allocation {n}"))?;
        check_counters(&workers).with_context(|| format!("allocation {n}"))?;
        settles(&mut workers, 2 * PAGES, 2 * PAGES).with_context(|| format!("allocation {n}"))?;
        workers.into_iter().try_for_each(Worker::exit)?;
        scan::until_merged(0, 0)?;
        if !injected {
            println!("{} allocations failed, one by one", n - 1);
            ensure!(n > FEW, "the thread hardly allocates");
            return PASS;
        }
    }
    bail!("no end of allocations")
}

fn thread_random() -> Outcome {
    const PAGES: usize = 128;
    let Some(mut injection) = Injection::new()? else {
        return skip(NO_INJECTION);
    };
    for (round, percent) in [5, 30, 60, 100].into_iter().enumerate() {
        let seed = 10_000 * (round as u64 + 1);
        scan::stop()?;
        let mut workers = [
            Worker::mergeable(PAGES, seed)?,
            Worker::mergeable(PAGES, seed)?,
        ];
        injection.random(thread()?, percent)?;
        for k in 0..6 {
            scan::passes(2)?;
            workers[k % 2].poke(k * 10, 10, k, 1)?;
            verify_all(&mut workers)?;
        }
        let late = Worker::mergeable(PAGES, seed + 5000)?;
        workers[0].fork()?;
        scan::passes(2)?;
        let c = engine::counters()?;
        println!("{percent} in 100 fail: {c:?}");
        ensure!(
            percent < 100 || c.shared == 0,
            "merged without memory for it"
        );
        injection.end_random()?;
        late.exit()?;
        for worker in &mut workers {
            worker.fill(0, PAGES, seed + 1000, 1)?;
        }
        workers[0].verify_child()?;
        scan::until("all is merged", 12, || {
            Ok(workers[0].merged()? == PAGES && workers[1].merged()? == PAGES)
        })?;
        verify_all(&mut workers)?;
        workers.into_iter().try_for_each(Worker::exit)?;
        scan::until_merged(0, 0)?;
    }
    PASS
}

/// Open a file of the engine for writing.
fn open(knob: &str) -> Result<File> {
    let file = OpenOptions::new()
        .write(true)
        .open(engine::path(engine::dir(), knob));
    file.with_context(|| format!("opening {knob}"))
}

/// Return whether `error` comes from a failed copy from user space (`EFAULT`) or a failed allocation
/// (`ENOMEM`).
fn is_fault(error: &std::io::Error) -> bool {
    [libc::ENOMEM, libc::EFAULT]
        .map(Some)
        .contains(&error.raw_os_error())
}

/// Check the state after a failed `run=2`, and that `run=2` then succeeds.
fn unmerge_after_failure(workers: &mut [Worker]) -> Result<()> {
    let run = engine::read("run")?;
    ensure!(run == 0 || run == 1, "run reads {run} after a failure");
    check_counters(workers)?;
    verify_all(workers)?;
    engine::write("run", 2)?;
    let c = engine::counters()?;
    ensure!((c.shared, c.sharing) == (0, 0), "{c:?}");
    verify_all(workers)
}

fn run_2_each() -> Outcome {
    const PAGES: usize = 6;
    let Some(_injection) = Injection::new()? else {
        return skip(NO_INJECTION);
    };
    let file = open("run")?;
    let nth = Nth::own()?;
    let mut workers = [
        Worker::mergeable(PAGES, 100)?,
        Worker::mergeable(PAGES, 100)?,
    ];
    let mut failed = 0;
    for n in 1..MANY {
        settles(&mut workers, PAGES, PAGES)?;
        engine::write("run", 1)?;
        nth.set(n)?;
        let result = file.write_at(b"2", 0);
        let injected = nth.end()?;
        match result {
            Ok(_) => ensure!(engine::read("run")? == 2),
            Err(e) => {
                ensure!(is_fault(&e), "allocation {n}: {e}");
                failed += 1;
            }
        }
        unmerge_after_failure_or_success(&mut workers)
            .with_context(|| format!("allocation {n}"))?;
        if !injected {
            println!(
                "{} allocations failed, one by one; run=2 did {failed} times",
                n - 1
            );
            ensure!(n > FEW && failed > FEW, "nothing failed");
            return PASS;
        }
    }
    bail!("no end of allocations")
}

fn unmerge_after_failure_or_success(workers: &mut [Worker]) -> Result<()> {
    if engine::read("run")? == 2 {
        check_counters(workers)?;
        let c = engine::counters()?;
        ensure!((c.shared, c.sharing) == (0, 0), "{c:?}");
        return verify_all(workers);
    }
    unmerge_after_failure(workers)
}

fn run_2_random() -> Outcome {
    const PAGES: usize = 200;
    let Some(mut injection) = Injection::new()? else {
        return skip(NO_INJECTION);
    };
    let mut workers = [
        Worker::mergeable(PAGES, 100)?,
        Worker::mergeable(PAGES, 100)?,
    ];
    let me = std::process::id();
    let mut failed = 0;
    for round in 0..8 {
        settles(&mut workers, PAGES, PAGES)?;
        let file = open("run")?;
        // Exclude allocations that this process needs for itself, such as for a page of its program.
        let Some(below) = Below::new("vfs_write")? else {
            return skip(NO_FILTER);
        };
        injection.random(me, 2 + 3 * (round % 3))?;
        let result = file.write_at(b"2", 0);
        injection.end_random()?;
        drop(below);
        if let Err(e) = result {
            ensure!(is_fault(&e), "{e}");
            failed += 1;
        }
        unmerge_after_failure_or_success(&mut workers)?;
    }
    println!("run=2 failed {failed} times of 8");
    ensure!(failed > 0);
    PASS
}

fn files_each() -> Outcome {
    let Some(_injection) = Injection::new()? else {
        return skip(NO_INJECTION);
    };
    let nth = Nth::own()?;
    let mut changes = 0;
    for (knob, values) in [
        ("run", ["1", "0"]),
        ("pages_to_scan", ["17", "100"]),
        ("sleep_millisecs", ["18", "20"]),
        ("smart_scan", ["1", "0"]),
        ("use_zero_pages", ["1", "0"]),
        ("max_page_sharing", ["19", "256"]),
        ("stable_node_chains_prune_millisecs", ["21", "2000"]),
        ("merge_across_nodes", ["0", "1"]),
        ("advisor_max_cpu", ["22", "70"]),
        ("advisor_min_pages_to_scan", ["23", "500"]),
        ("advisor_max_pages_to_scan", ["24", "30000"]),
        ("advisor_target_scan_time", ["25", "200"]),
        ("merge_eagerly", ["1", "0"]),
        ("pass_millisecs", ["26", "0"]),
    ] {
        if !engine::path(engine::dir(), knob).exists() {
            continue;
        }
        let file = open(knob)?;
        'value: for value in values {
            for n in 1..MANY {
                let before = engine::read(knob)?;
                nth.set(n)?;
                let result = file.write_at(value.as_bytes(), 0);
                let injected = nth.end()?;
                let now = engine::read(knob)?;
                match result {
                    Ok(_) => ensure!(now == value.parse()?, "{knob} reads {now} after {value}"),
                    Err(e) => {
                        ensure!(is_fault(&e), "{knob}: {e}");
                        ensure!(now == before, "{knob} reads {now} after a failure");
                        changes += 1;
                    }
                }
                if !injected {
                    continue 'value;
                }
            }
            bail!("{knob}: no end of allocations");
        }
    }
    println!("{changes} writes failed");
    ensure!(changes > FEW);
    // A read fails or returns the value.
    for entry in std::fs::read_dir(engine::dir())? {
        let path = entry?.path();
        let want = std::fs::read(&path)?;
        for n in 1..=8 {
            let file = File::open(&path)?;
            let mut got = [0u8; 64];
            nth.set(n)?;
            let result = file.read_at(&mut got, 0);
            nth.end()?;
            match result {
                Ok(len) => ensure!(got[..len] == want[..], "{} reads otherwise", path.display()),
                Err(e) => ensure!(is_fault(&e), "{}: {e}", path.display()),
            }
        }
    }
    PASS
}

/// Register a process by `command`, with each of its allocations failing in turn. Check that it takes part if
/// the call succeeded, and can take part later if it failed.
fn registered_by(command: &str) -> Result<u32> {
    const PAGES: usize = 4;
    for n in 1..MANY {
        let seed = u64::from(n) * 100;
        let mut partner = Worker::mergeable(PAGES, seed)?;
        let mut worker = Worker::with_pages(PAGES)?;
        worker.fill(0, PAGES, seed, 1)?;
        let (injected, outcome) = worker.failing(n, command)?;
        if let Err(e) = outcome {
            println!("{command}, allocation {n}: {e:#}");
            worker.failing(MANY, command)?.1?;
        }
        scan::until("both merged", 12, || {
            Ok(worker.merged()? == PAGES && partner.merged()? == PAGES)
        })
        .with_context(|| format!("{command}, allocation {n}"))?;
        worker.verify()?;
        partner.verify()?;
        worker.exit()?;
        partner.exit()?;
        scan::until_merged(0, 0)?;
        if !injected {
            return Ok(n - 1);
        }
    }
    bail!("no end of allocations")
}

/// Fork a process whose pages are merged, with each of its allocations failing in turn.
fn forked() -> Result<u32> {
    const PAGES: usize = 4;
    let mut partner = Worker::mergeable(PAGES, 100)?;
    for n in (1..MANY).step_by(3) {
        let mut worker = Worker::mergeable(PAGES, 100)?;
        scan::until_merged(PAGES as u64, PAGES as u64)?;
        let (injected, outcome) = worker.failing(n, "fork")?;
        if outcome.is_ok() {
            let all = scan::until_merged(PAGES as u64, 2 * PAGES as u64);
            if injected && all.is_err() {
                // ksm_fork() ignores a failed registration: the child keeps its pages, but the engine does
                // not list them.
                println!("fork, allocation {n}: the child is not registered");
                let c = engine::counters()?;
                ensure!(
                    (c.shared, c.sharing) == (PAGES as u64, PAGES as u64),
                    "{c:?}"
                );
            } else {
                all.with_context(|| format!("fork, allocation {n}"))?;
            }
            worker.poke(0, PAGES, 1, 1)?;
            worker.verify_child()?;
        }
        worker.verify()?;
        partner.verify()?;
        drop(worker);
        // The pages of the partner stay merged, with one mapping each.
        scan::until_merged(PAGES as u64, 0)?;
        if !injected {
            return Ok(n / 3);
        }
    }
    bail!("no end of allocations")
}

fn processes_each() -> Outcome {
    let Some(_injection) = Injection::new()? else {
        return skip(NO_INJECTION);
    };
    let advise = format!("advise 0 4 {}", libc::MADV_MERGEABLE);
    for command in [advise.as_str(), "prctl 1"] {
        println!(
            "{command}: {} allocations failed, one by one",
            registered_by(command)?
        );
    }
    println!("fork: {} allocations failed, one by one", forked()?);
    PASS
}

fn exec() -> Outcome {
    let Some(_injection) = Injection::new()? else {
        return skip(NO_INJECTION);
    };
    let mut workers = [Worker::mergeable(8, 100)?, Worker::mergeable(8, 100)?];
    scan::until_merged(8, 8)?;
    for n in (1..150).step_by(4) {
        let child = Background::once(move || {
            use std::os::unix::process::CommandExt;
            sys::set_memory_merge(true)?;
            let mut program = std::process::Command::new("/proc/self/exe");
            program.arg("list").stdout(std::process::Stdio::null());
            Nth::own()?.set(n)?;
            Err(program.exec()).context("exec")
        })?;
        // The process may be refused, killed for lack of memory, or succeed, but it must end.
        child.join(std::time::Duration::from_secs(20))?;
    }
    scan::passes(2)?;
    settles(&mut workers, 8, 8)?;
    PASS
}

/// The engine finds the only registered process even if it had no memory to note the registration.
fn missed() -> Outcome {
    let Some(_injection) = Injection::new()? else {
        return skip(NO_INJECTION);
    };
    let Some(below) = Below::new("__ksm_enter")? else {
        return skip(NO_FILTER);
    };
    engine::write("sleep_millisecs", 1)?;
    engine::write("run", 1)?;
    let mut registered = 0;
    for n in 1..8 {
        // No other process is registered, so the thread sleeps.
        wait_for("thread asleep", Duration::from_secs(20), || {
            Ok(proc::stat(thread()?)?.state == 'S')
        })?;
        let mut worker = Worker::with_pages(8)?;
        worker.fill(0, 8, 100, 0)?;
        let advise = format!("advise 0 8 {}", libc::MADV_MERGEABLE);
        let (injected, outcome) = worker.failing(n, &advise)?;
        if outcome.is_ok() {
            registered += usize::from(injected);
            wait_for("merging", Duration::from_secs(20), || {
                Ok(worker.merged()? == 8)
            })
            .with_context(|| format!("allocation {n}"))?;
        }
        worker.verify()?;
        worker.exit()?;
        wait_for("unregistration", Duration::from_secs(20), || {
            let c = engine::counters()?;
            Ok(c.shared + c.unshared + c.volatile == 0)
        })?;
    }
    drop(below);
    println!("registered {registered} times although an allocation failed");
    ensure!(registered > 0, "nothing failed");
    PASS
}

const IN_INIT: &str = "do_one_initcall";
const UNLOAD: &str = "__x64_sys_delete_module";
const NO_FILTER: &str = "the kernel cannot restrict failing allocations to one function";

/// Check that the module is gone and that the in-tree engine is unchanged.
fn expect_gone() -> Result<()> {
    ensure!(!module::loaded() && !Path::new(engine::RKSM).exists());
    ensure!(proc::kernel_thread("rksmd")?.is_none(), "rksmd runs");
    let in_tree = Path::new(IN_TREE);
    for value in ["1", "0"] {
        engine::write_to(in_tree, "run", value.as_bytes()).context("in-tree run")?;
        ensure!(engine::read_from(in_tree, "run")? == value.parse::<u64>()?);
    }
    Ok(())
}

fn load_each() -> Outcome {
    if engine::is_in_tree() {
        return skip("the in-tree engine is not a module");
    }
    let Some(_injection) = Injection::new()? else {
        return skip(NO_INJECTION);
    };
    let Some(_below) = Below::new(IN_INIT)? else {
        return skip(NO_FILTER);
    };
    let mut worker = Worker::mergeable(4, 100)?;
    module::ensure_loaded(false)?;
    let nth = Nth::own()?;
    let mut refused = 0;
    for n in 1..MANY {
        nth.set(n)?;
        let result = module::load_file(&module::path());
        let injected = nth.end()?;
        if let Err(e) = result {
            ensure!(injected, "loading fails: {e}");
            ensure!(is_fault(&e), "allocation {n}: {e}");
            refused += 1;
        } else {
            module::unload_clean()?;
        }
        expect_gone().with_context(|| format!("allocation {n}"))?;
        if !injected {
            println!(
                "{} allocations failed, one by one; loading did {refused} times",
                n - 1
            );
            ensure!(refused > FEW);
            worker.verify()?;
            module::load()?;
            return PASS;
        }
    }
    bail!("no end of allocations")
}

fn unload_each() -> Outcome {
    if engine::is_in_tree() {
        return skip("the in-tree engine is not a module");
    }
    let Some(_injection) = Injection::new()? else {
        return skip(NO_INJECTION);
    };
    let nth = Nth::own()?;
    let mut worker = Worker::mergeable(4, 100)?;
    // The module has a probe of its own. Both share the kernel's resources for probes.
    let calls = Calls::of("__x64_sys_getpgid")?;
    for n in 1..MANY {
        module::ensure_loaded(true)?;
        scan::passes(1)?;
        nth.set(n)?;
        let result = module::unload();
        let injected = nth.end()?;
        match result {
            Ok(()) => expect_gone().with_context(|| format!("allocation {n}"))?,
            Err(e) => {
                ensure!(is_fault(&e), "allocation {n}: {e}");
                ensure!(module::loaded());
            }
        }
        if let Some(calls) = &calls {
            let before = calls.count()?;
            // SAFETY: getpgid takes and returns an integer.
            unsafe { libc::getpgid(0) };
            let more = calls.count()? - before;
            ensure!(more == 1, "allocation {n}: another probe has {more} hits");
        }
        worker.verify()?;
        if !injected {
            println!("{} allocations failed, one by one", n - 1);
            ensure!(n > FEW);
            return PASS;
        }
    }
    bail!("no end of allocations")
}

fn reload_random() -> Outcome {
    if engine::is_in_tree() {
        return skip("the in-tree engine is not a module");
    }
    let Some(mut injection) = Injection::new()? else {
        return skip(NO_INJECTION);
    };
    let mut worker = Worker::mergeable(4, 100)?;
    module::ensure_loaded(false)?;
    let me = std::process::id();
    let mut loads = 0;
    for round in 0..30 {
        // Reading the module's file takes thousands of allocations; do not let these fail.
        let Some(below) = Below::new(IN_INIT)? else {
            return skip(NO_FILTER);
        };
        injection.random(me, 1 + round % 5)?;
        let result = module::load_file(&module::path());
        injection.end_random()?;
        drop(below);
        match result {
            Ok(()) => {
                loads += 1;
                let Some(below) = Below::new(UNLOAD)? else {
                    return skip(NO_FILTER);
                };
                injection.random(me, 20)?;
                let unloaded = module::unload();
                injection.end_random()?;
                drop(below);
                if let Err(e) = unloaded {
                    ensure!(is_fault(&e), "{e}");
                    module::unload_clean()?;
                }
            }
            Err(e) => ensure!(is_fault(&e), "{e}"),
        }
        expect_gone().with_context(|| format!("round {round}"))?;
    }
    println!("{loads} of 30 loads succeeded");
    worker.verify()?;
    module::load()?;
    PASS
}
