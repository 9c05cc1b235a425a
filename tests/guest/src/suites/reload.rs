// SPDX-License-Identifier: GPL-2.0
//! Repeated loading and unloading with everything in use, and a thread that no signal kills.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};

use super::tests;
use crate::background::Background;
use crate::cgroup::Group;
use crate::engine::{self, wait_for, IN_TREE};
use crate::harness::{skip, Module, Outcome, Suite, PASS};
use crate::region::Region;
use crate::worker::{verify_all, Worker};
use crate::{module, proc, scan, sys};

pub const SUITE: Suite = Suite {
    name: "reload",
    about: "loading and unloading under load, many times; a thread that no signal kills",
    module: Module::Unloaded,
    tests: tests![
        ("nothing-kills-the-thread", 60, nothing_kills),
        (
            "files-in-use-while-loading-and-unloading",
            180,
            files_in_use
        ),
        ("cycles-under-load", 2400, cycles),
    ],
};

/// How often to load and unload, unless `RKSM_CYCLES` is set.
const CYCLES: usize = 60;
const PAGES: usize = 16;

fn nothing_kills() -> Outcome {
    if engine::is_in_tree() {
        return skip("the in-tree engine is not a module");
    }
    module::load()?;
    let mut workers = [
        Worker::mergeable(PAGES, 100)?,
        Worker::mergeable(PAGES, 100)?,
    ];
    scan::until_merged(PAGES as u64, PAGES as u64)?;
    let thread = proc::kernel_thread("rksmd")?.context("no thread")?;
    let group = Group::new("thread")?;
    for signal in 1..=64 {
        // The two signals reserved for the C library count as well.
        sys::kill(thread as libc::pid_t, signal).with_context(|| format!("signal {signal}"))?;
        if [libc::SIGKILL, libc::SIGSTOP, libc::SIGTERM].contains(&signal) {
            scan::passes(2)?;
        }
    }
    // Whatever the kernel answers, the thread must survive.
    let _ = fs::write(format!("/proc/{thread}/oom_score_adj"), "1000");
    if let Some(group) = &group {
        let moved = group.enter(thread).is_ok();
        let killed = group.set("cgroup.kill", "1").is_ok();
        let frozen = group.set("cgroup.freeze", "1").is_ok();
        println!("into a group: {moved}, group killed: {killed}, frozen: {frozen}");
        scan::passes(2)?;
        group.set("cgroup.freeze", "0")?;
        if moved {
            fs::write("/sys/fs/cgroup/cgroup.procs", thread.to_string()).context("out again")?;
        }
    }
    scan::passes(2)?;
    let now = proc::kernel_thread("rksmd")?;
    ensure!(
        now == Some(thread),
        "the thread was {thread} and is {now:?}"
    );
    ensure!(proc::stat(thread)?.state != 'T', "stopped by a signal");
    for worker in &mut workers {
        worker.fill(0, PAGES, 500, 1)?;
    }
    scan::until_merged(PAGES as u64, PAGES as u64)?;
    verify_all(&mut workers)?;
    module::unload_clean()?;
    ensure!(
        proc::kernel_thread("rksmd")?.is_none(),
        "it outlived the module"
    );
    PASS
}

/// Read every file of the engine, and write the value back to writable ones, until there are no files.
fn use_files() -> Result<()> {
    let Ok(files) = fs::read_dir(engine::RKSM) else {
        std::thread::sleep(Duration::from_millis(1));
        return Ok(());
    };
    for entry in files {
        let Ok(entry) = entry else {
            return Ok(());
        };
        let Ok(mut file) = File::open(entry.path()) else {
            continue;
        };
        let mut text = String::new();
        // The module went while the file was open: `ENODEV`.
        match file.read_to_string(&mut text) {
            Ok(_) => ensure!(text.ends_with('\n'), "{:?} reads {text:?}", entry.path()),
            Err(e) => ensure!(
                e.raw_os_error() == Some(libc::ENODEV),
                "{:?}: {e}",
                entry.path()
            ),
        }
        if entry.file_name() != "run" {
            let _ = fs::write(entry.path(), text.trim_end());
        }
    }
    Ok(())
}

/// Unload in spite of all activity: write 2 to `run` when pages are merged. Return how often unloading was
/// refused.
fn unload_busy(limit: Duration) -> Result<usize> {
    let end = Instant::now() + crate::timeout::scaled(limit);
    let mut refused = 0;
    loop {
        let Err(e) = module::unload() else {
            return Ok(refused);
        };
        match e.raw_os_error() {
            Some(libc::EBUSY) => {
                refused += 1;
                // Stop first: other processes write and exit meanwhile, and pages that merge since then stay
                // merged.
                engine::write("run", 0)?;
                engine::write("run", 2)?;
            }
            Some(libc::EWOULDBLOCK) => std::thread::sleep(Duration::from_millis(2)),
            _ => bail!("unloading: {e}"),
        }
        ensure!(
            Instant::now() < end,
            "not unloaded after {refused} refusals: {e}"
        );
    }
}

fn files_in_use() -> Outcome {
    let mut users = (0..4)
        .map(|_| Background::repeat(use_files))
        .collect::<Result<Vec<_>>>()?;
    // A file that stays open over loading and unloading.
    module::load()?;
    let mut kept = File::open(engine::path(Path::new(engine::RKSM), "run"))?;
    for _ in 0..30 {
        module::ensure_loaded(true)?;
        std::thread::sleep(Duration::from_millis(5));
        unload_busy(Duration::from_secs(10))?;
    }
    let mut text = String::new();
    let late = kept.read_to_string(&mut text);
    ensure!(
        late.as_ref()
            .is_err_and(|e| e.raw_os_error() == Some(libc::ENODEV)),
        "a file of the unloaded module reads {text:?}, {late:?}"
    );
    for user in &mut users {
        ensure!(user.ended()?.is_none(), "a reader failed");
    }
    users.into_iter().try_for_each(Background::stop)?;
    PASS
}

/// Map mergeable pages, write to them, fork, verify and start again, in an endless loop.
fn load_of(seed: u64) -> Result<()> {
    let mut region = Region::new(PAGES)?;
    region.fill(0, PAGES, seed, 1);
    region.advise(0, PAGES, libc::MADV_MERGEABLE)?;
    for k in 0..8 {
        match sys::fork().context("fork")? {
            sys::Forked::Child => {
                let _ = sys::die_with_parent();
                region.poke(k, 7, 9);
                sys::exit_now(i32::from(region.verify().is_err()));
            }
            sys::Forked::Parent(pid) => {
                region.poke(k + 4, 1, k as u8);
                region.verify()?;
                std::thread::sleep(Duration::from_millis(10));
                let end = Instant::now() + crate::timeout::scaled(Duration::from_secs(30));
                loop {
                    match sys::try_wait(pid).context("wait")? {
                        Some((_, sys::Ended::Exit(0))) => break,
                        Some((_, how)) => bail!("a child ended by {how:?}"),
                        None => std::thread::sleep(Duration::from_millis(1)),
                    }
                    ensure!(Instant::now() < end, "a child does not end");
                }
            }
        }
    }
    region.advise(0, PAGES, libc::MADV_UNMERGEABLE)?;
    region.verify()
}

/// Kernel memory in use, in which a leak would show.
struct Usage {
    free_kib: i64,
    all: proc::Figures,
}

impl Usage {
    fn now() -> Result<Self> {
        // Shrink more than once: the first round only clears the referenced mark of recently used dentries,
        // and the dentry of a removed file holds its sysfs node.
        for _ in 0..4 {
            fs::write("/proc/sys/vm/drop_caches", "3").context("drop_caches")?;
        }
        Ok(Self {
            all: proc::Figures::now()?,
            free_kib: proc::free_kib()?,
        })
    }

    /// Check that nothing grew since `before` with each of `cycles` cycles.
    fn check(&self, before: &Self, cycles: usize) -> Result<()> {
        let lost = before.free_kib - self.free_kib;
        println!("free memory: {} KiB, then {lost} KiB less", before.free_kib);
        for (what, more) in self.all.grown(&before.all) {
            println!("{what}: {more:+}");
        }
        // One object in ten cycles shows in 1,000 cycles. Processes of the kernel and of the test come and
        // go.
        let objects = (cycles / 10).max(16) as i64;
        for (what, most) in [
            ("mm_struct", objects),
            ("task_struct", objects),
            ("kernfs_node_cache", objects),
            ("SUnreclaim", 6 << 10),
            ("VmallocUsed", 1 << 10),
        ] {
            let more = self.all.get(what)? - before.all.get(what)?;
            ensure!(more < most, "{what}: {more} are left over");
        }
        ensure!(lost < 16 << 10, "{lost} KiB are left");
        Ok(())
    }
}

/// Load and unload once, beside all other activity. Return how often unloading was refused.
fn cycle(i: usize) -> Result<usize> {
    module::load()?;
    let rksm = |knob, value: &str| {
        engine::write_to(Path::new(engine::RKSM), knob, value.as_bytes())
            .with_context(|| format!("{value} to {knob}"))
    };
    rksm("pass_millisecs", "0")?;
    rksm("sleep_millisecs", "0")?;
    rksm("pages_to_scan", "100000")?;
    rksm("merge_eagerly", if i % 2 == 0 { "1" } else { "0" })?;
    rksm("run", "1")?;
    match i % 8 {
        // Usually wait until something is merged, so that unloading is refused.
        0 => {
            let _ = wait_for("merged pages", Duration::from_secs(2), || {
                Ok(engine::read("pages_shared")? != 0)
            });
        }
        1 | 5 => std::thread::sleep(Duration::from_millis(3)),
        2 => rksm("run", "2")?,
        _ => {}
    }
    unload_busy(Duration::from_secs(20))
}

fn cycles() -> Outcome {
    if engine::is_in_tree() {
        return skip("the in-tree engine is not a module");
    }
    let cycles = std::env::var("RKSM_CYCLES").ok().filter(|c| !c.is_empty());
    let cycles = cycles
        .map_or(Ok(CYCLES), |c| c.parse())
        .context("RKSM_CYCLES")?;
    let mut keepers = [
        Worker::mergeable(PAGES, 100)?,
        Worker::mergeable(PAGES, 100)?,
    ];
    let start = || -> Result<Vec<Background>> {
        let mut all = vec![Background::repeat(use_files)?];
        for _ in 0..2 {
            all.push(Background::repeat(|| load_of(100))?);
        }
        Ok(all)
    };
    let stop = |mut all: Vec<Background>| -> Result<()> {
        for one in &mut all {
            ensure!(one.ended()?.is_none(), "a process of the load failed");
        }
        all.into_iter().try_for_each(Background::stop)?;
        // The children of these processes die with them.
        std::thread::sleep(Duration::from_millis(500));
        Ok(())
    };
    // Run once before measuring, to fill caches.
    let load = start()?;
    (0..20).try_for_each(|i| cycle(i).map(drop))?;
    stop(load)?;
    let before = Usage::now()?;
    let begin = Instant::now();
    let load = start()?;
    let mut refused = 0;
    for i in 0..cycles {
        refused += cycle(i).with_context(|| format!("cycle {i}"))?;
        if i % 100 == 99 {
            verify_all(&mut keepers).with_context(|| format!("cycle {i}"))?;
        }
    }
    println!(
        "{cycles} cycles in {:.1} s, unloading refused {refused} times",
        begin.elapsed().as_secs_f64()
    );
    stop(load)?;
    verify_all(&mut keepers)?;
    ensure!(
        !Path::new(engine::RKSM).exists() && !module::loaded(),
        "left over in sysfs"
    );
    ensure!(refused >= cycles / 20, "pages were hardly ever merged");
    // Memory that was freed last may not be back yet.
    for attempt in 1.. {
        match Usage::now()?.check(&before, cycles) {
            Err(_) if attempt < 5 => std::thread::sleep(Duration::from_secs(1)),
            Err(e) => return Err(e),
            Ok(()) => break,
        }
    }
    in_tree_works(&mut keepers)
}

/// Check that the in-tree engine merges and unmerges as if the module had never been loaded.
fn in_tree_works(workers: &mut [Worker; 2]) -> Outcome {
    let run = |value: &str| {
        engine::write_to(Path::new(IN_TREE), "run", value.as_bytes()).context("in-tree run")
    };
    engine::write_to(Path::new(IN_TREE), "sleep_millisecs", b"1")?;
    engine::write_to(Path::new(IN_TREE), "smart_scan", b"0")?;
    run("1")?;
    wait_for("merging in-tree", Duration::from_secs(40), || {
        Ok(workers[0].merged()? == PAGES && workers[1].merged()? == PAGES)
    })?;
    run("2")?;
    ensure!(workers[0].merged()? == 0 && workers[1].merged()? == 0);
    run("0")?;
    verify_all(workers)?;
    PASS
}
