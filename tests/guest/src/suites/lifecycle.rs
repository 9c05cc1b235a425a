// SPDX-License-Identifier: GPL-2.0
//! Loading and unloading, and when each must be refused.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};

use super::tests;
use crate::background::Background;
use crate::engine::{self, wait_for, write_to, IN_TREE};
use crate::harness::{Module, Outcome, Suite, PASS};
use crate::kmsg::Log;
use crate::region::Region;
use crate::worker::{verify_all, Worker};
use crate::{module, proc, scan};

pub const SUITE: Suite = Suite {
    name: "lifecycle",
    about: "loading and unloading, refused where they must be",
    module: Module::Unloaded,
    tests: tests![
        ("load-and-unload", 60, load_and_unload),
        ("says-its-version", 60, version),
        ("processes-registered-before-loading", 90, before_loading),
        ("refused-while-in-tree-runs", 60, in_tree_runs),
        (
            "refused-while-in-tree-holds-merged-pages",
            60,
            in_tree_holds
        ),
        ("in-tree-cannot-start-while-loaded", 60, in_tree_blocked),
        (
            "in-tree-switched-on-and-off-while-loading",
            120,
            in_tree_flips
        ),
        ("refused-unload-with-merged-pages", 60, refused_unload),
        ("unload-after-the-sharers-are-gone", 60, unload_after_exit),
        ("unload-while-resting", 60, unload_resting),
        ("unload-after-a-scan-that-was-stopped", 120, unload_stopped),
        ("unload-while-scanning", 60, unload_scanning),
        ("unload-with-registered-processes", 60, unload_registered),
        ("100-cycles", 240, cycles),
        ("refused-on-another-build", 60, other_build),
        ("refused-on-another-layout", 60, other_layout),
        ("refused-on-a-missing-symbol", 60, missing_symbol),
        ("refused-where-data-is-read-only", 60, read_only),
        ("refused-where-nothing-can-be-written", 60, nothing_writable),
    ],
};

const N: usize = 16;

fn in_tree() -> &'static Path {
    Path::new(IN_TREE)
}

fn pair() -> Result<[Worker; 2]> {
    Ok([Worker::mergeable(N, 100)?, Worker::mergeable(N, 100)?])
}

/// Check that `result` is the refusal `errno`.
fn expect_errno(what: &str, result: io::Result<()>, errno: i32) -> Result<()> {
    match result {
        Err(e) if e.raw_os_error() == Some(errno) => Ok(()),
        other => bail!(
            "{what}: {other:?}, must be {}",
            io::Error::from_raw_os_error(errno)
        ),
    }
}

/// Check that nothing of the module is left.
fn expect_gone() -> Result<()> {
    ensure!(!module::loaded(), "still loaded");
    ensure!(!Path::new(engine::RKSM).exists(), "its directory is left");
    ensure!(
        proc::kernel_thread("rksmd")?.is_none(),
        "its thread is left"
    );
    let caches = proc::slab_caches("rksm")?;
    ensure!(caches.is_empty(), "slab caches are left: {caches:?}");
    Ok(())
}

fn load_and_unload() -> Outcome {
    expect_gone()?;
    module::load()?;
    ensure!(module::loaded());
    ensure!(proc::kernel_thread("rksmd")?.is_some(), "no thread");
    expect_errno(
        "second load",
        module::load_file(&module::path()),
        libc::EEXIST,
    )?;
    engine::check_clean()?;
    module::unload()?;
    expect_gone()?;
    PASS
}

fn version() -> Outcome {
    module::load()?;
    let version = fs::read_to_string("/sys/module/rksm/version")?;
    ensure!(
        version.trim() == env!("CARGO_PKG_VERSION"),
        "it says {version:?}"
    );
    module::unload()?;
    PASS
}

fn before_loading() -> Outcome {
    let mut by_madvise = Worker::mergeable(N, 100)?;
    let mut by_prctl = Worker::new()?;
    by_prctl.set_memory_merge(true)?;
    by_prctl.map(N)?;
    by_prctl.fill(0, N, 100, 1)?;
    let mut by_exec = Worker::new()?;
    by_exec.set_memory_merge(true)?;
    by_exec.exec()?;
    by_exec.map(N)?;
    by_exec.fill(0, N, 100, 1)?;
    module::load()?;
    let mut after = Worker::mergeable(N, 100)?;
    scan::until("merge of all four", 12, || {
        let all = [&by_madvise, &by_prctl, &by_exec, &after];
        Ok(all.iter().map(|w| w.merged()).sum::<Result<usize>>()? == 4 * N)
    })?;
    for worker in [&mut by_madvise, &mut by_prctl, &mut by_exec, &mut after] {
        worker.verify()?;
    }
    PASS
}

/// Check that loading is refused because of the in-tree engine.
fn expect_load_refused() -> Result<()> {
    let mut log = Log::from_now()?;
    expect_errno("load", module::load_file(&module::path()), libc::EBUSY)?;
    expect_gone()?;
    log.expect(&["rksm", "in-tree"])
}

/// A process switches the in-tree engine on and off. Either loading is refused, or that engine stands still
/// and has no state.
fn in_tree_flips() -> Outcome {
    let mut worker = Worker::mergeable(N, 100)?;
    write_to(in_tree(), "sleep_millisecs", b"0")?;
    write_to(in_tree(), "pages_to_scan", b"1000")?;
    let flipping = Background::repeat(|| {
        for value in ["1", "0", "2", "0"] {
            // The file may be absent for a moment, and refuses writes while the module is loaded.
            let _ = write_to(in_tree(), "run", value.as_bytes());
        }
        Ok(())
    })?;
    let mut loads = 0;
    for attempt in 0..60 {
        match module::load_file(&module::path()) {
            Ok(()) => {}
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => continue,
            Err(e) => bail!("loading: {e}"),
        }
        loads += 1;
        for (file, want) in [("run", 0), ("pages_unshared", 0), ("pages_volatile", 0)] {
            let have = engine::read_from(in_tree(), file)?;
            ensure!(have == want, "attempt {attempt}: in-tree {file} is {have}");
        }
        module::unload_clean()?;
    }
    flipping.stop()?;
    for value in ["0", "2", "0"] {
        write_to(in_tree(), "run", value.as_bytes())?;
    }
    println!("{loads} of 60 loads succeeded");
    ensure!(loads > 0, "never loaded");
    worker.verify()?;
    PASS
}

fn in_tree_runs() -> Outcome {
    write_to(in_tree(), "run", b"1")?;
    let refused = expect_load_refused();
    write_to(in_tree(), "run", b"0")?;
    refused?;
    // Loading works once it is stopped and holds nothing.
    module::load()?;
    PASS
}

/// Let the in-tree engine merge `workers`, then stop it.
fn merge_in_tree() -> Result<()> {
    write_to(in_tree(), "pages_to_scan", b"100000")?;
    write_to(in_tree(), "run", b"1")?;
    let merged = wait_for("in-tree merge", Duration::from_secs(20), || {
        Ok(engine::read_from(in_tree(), "pages_sharing")? >= N as u64)
    });
    write_to(in_tree(), "run", b"0")?;
    write_to(in_tree(), "pages_to_scan", b"100")?;
    merged
}

fn in_tree_holds() -> Outcome {
    let mut workers = pair()?;
    merge_in_tree()?;
    let refused = expect_load_refused();
    write_to(in_tree(), "run", b"2")?;
    write_to(in_tree(), "run", b"0")?;
    refused?;
    verify_all(&mut workers)?;
    module::load()?;
    scan::until_merged(N as u64, N as u64)?;
    verify_all(&mut workers)?;
    PASS
}

fn in_tree_blocked() -> Outcome {
    let mut workers = pair()?;
    module::load()?;
    for value in ["1", "2"] {
        let result = write_to(in_tree(), "run", value.as_bytes());
        expect_errno(&format!("in-tree run={value}"), result, libc::EBUSY)?;
        ensure!(engine::read_from(in_tree(), "run")? == 0);
    }
    // Stopping a stopped engine does no harm, whatever the answer.
    let _ = write_to(in_tree(), "run", b"0");
    ensure!(engine::read_from(in_tree(), "run")? == 0);
    scan::until_merged(N as u64, N as u64)?;
    ensure!(write_to(in_tree(), "run", b"1").is_err());
    ensure!(engine::read_from(in_tree(), "run")? == 0);
    module::unload_clean()?;
    verify_all(&mut workers)?;
    // Without rksm the in-tree engine works as always.
    merge_in_tree()?;
    verify_all(&mut workers)?;
    write_to(in_tree(), "run", b"2")?;
    write_to(in_tree(), "run", b"0")?;
    verify_all(&mut workers)?;
    PASS
}

fn refused_unload() -> Outcome {
    let mut workers = pair()?;
    let mut log = Log::from_now()?;
    module::load()?;
    scan::until_merged(N as u64, N as u64)?;
    for running in [true, false] {
        engine::write("run", u8::from(running))?;
        expect_errno("unload", module::unload(), libc::EBUSY)?;
        ensure!(module::loaded());
        ensure!(workers[0].merged()? == N && workers[1].merged()? == N);
        verify_all(&mut workers)?;
    }
    log.expect(&["rksm", "writing 2", "/sys/kernel/mm/rksm/run"])?;
    // It keeps working after the refusal.
    let mut late = Worker::mergeable(N, 100)?;
    scan::until_merged(N as u64, 2 * N as u64)?;
    engine::write("run", 2)?;
    module::unload()?;
    expect_gone()?;
    verify_all(&mut workers)?;
    late.verify()?;
    PASS
}

fn unload_after_exit() -> Outcome {
    let mut log = Log::from_now()?;
    module::load()?;
    for end in [Worker::exit, Worker::kill] {
        let workers = pair()?;
        scan::until_merged(N as u64, N as u64)?;
        scan::stop()?;
        workers.into_iter().try_for_each(end)?;
        // No merged page is left, so no write to `run` is needed.
        wait_for("unload", Duration::from_secs(5), || {
            Ok(module::unload().is_ok())
        })?;
        expect_gone()?;
        module::load()?;
    }
    log.expect(&["rksm", "loaded"])?;
    PASS
}

/// The sharers exit while the thread sleeps for minutes between two batches, or passes. Another process stays
/// registered, so the sleep continues.
fn unload_resting() -> Outcome {
    for knob in ["sleep_millisecs", "pass_millisecs"] {
        module::load()?;
        let mut other = Worker::mergeable(N, 5000)?;
        // The memory below the merged pages is unmapped first. That takes longer than the thread needs to
        // forget the pages.
        let sharer = || {
            Background::once(|| {
                let mut region = Region::new(N)?;
                region.fill(0, N, 100, 1);
                region.advise(0, N, libc::MADV_MERGEABLE)?;
                let ballast = std::hint::black_box(vec![1u8; 256 << 20]);
                ensure!(ballast.as_ptr().addr() < region.addr());
                loop {
                    std::thread::sleep(Duration::from_secs(1));
                }
            })
        };
        let sharers = [sharer()?, sharer()?];
        scan::until_merged(N as u64, N as u64)?;
        std::thread::sleep(crate::timeout::scaled(Duration::from_secs(1)));
        // The batch, or pass, that starts now ends in a long sleep.
        engine::write(knob, 600_000)?;
        std::thread::sleep(Duration::from_secs(2));
        let passes = engine::read("full_scans")?;
        sharers.into_iter().try_for_each(Background::stop)?;
        wait_for(
            &format!("unload in spite of {knob}"),
            Duration::from_secs(10),
            || {
                let now = engine::read("full_scans")?;
                ensure!(now == passes, "{} passes instead of a sleep", now - passes);
                Ok(module::unload().is_ok())
            },
        )?;
        expect_gone()?;
        other.verify()?;
    }
    PASS
}

/// Pages are unmerged for a scanned process, but still merged for its child, which is not scanned yet. The
/// scan stops in between, so the thread sleeps when they are freed.
fn unload_stopped() -> Outcome {
    // Enough to take some time to scan.
    const MANY: usize = 48 << 10;
    module::load()?;
    // The scan follows the order of registration, and `scan::passes` registers this process.
    let mut other = Worker::mergeable(N, 100)?;
    scan::passes(1)?;
    let big = Worker::mergeable(MANY, 50_000)?;
    let mut region = Region::new(N)?;
    region.advise(0, N, libc::MADV_MERGEABLE)?;
    for attempt in 1.. {
        ensure!(attempt < 10, "the scan was never stopped in time");
        region.fill(0, N, 100, 1);
        other.fill(0, N, 100, 1)?;
        scan::until_merged(N as u64, N as u64)?;
        scan::stop()?;
        let mut child = Worker::inheriting(&mut region)?;
        (0..N).for_each(|i| region.poke(i, 1, 1));
        other.poke(0, N, 1, 1)?;
        engine::write("smart_scan", 0)?;
        engine::write("pages_to_scan", 1_000_000)?;
        let passes = engine::read("full_scans")?;
        engine::write("run", 1)?;
        let limit = Instant::now() + crate::timeout::scaled(Duration::from_secs(20));
        let listed = |pid| proc::ksm_stat(pid, "ksm_merging_pages");
        while listed(other.pid())? != 0 || listed(std::process::id())? != 0 {
            ensure!(Instant::now() < limit, "no mapping is removed");
        }
        engine::write("run", 0)?;
        if engine::read("full_scans")? != passes || child.merged()? != N {
            // Too late. End the child.
            child.exit()?;
            continue;
        }
        expect_errno("unload", module::unload(), libc::EBUSY)?;
        // It has its own pages now, and no process maps the merged ones.
        child.poke(0, N, 2, 2)?;
        wait_for("unload", Duration::from_secs(10), || {
            Ok(module::unload().is_ok())
        })?;
        child.verify()?;
        break;
    }
    expect_gone()?;
    region.verify()?;
    other.verify()?;
    big.exit()?;
    PASS
}

fn unload_scanning() -> Outcome {
    module::load()?;
    let mut worker = Worker::mergeable(N, 100)?;
    for _ in 0..5 {
        scan::passes(2)?;
        // Nothing is merged, so nothing prevents unloading.
        module::unload()?;
        expect_gone()?;
        worker.verify()?;
        module::load()?;
    }
    PASS
}

fn unload_registered() -> Outcome {
    let mut workers = pair()?;
    for _ in 0..3 {
        module::load()?;
        scan::until_merged(N as u64, N as u64)?;
        module::unload_clean()?;
        expect_gone()?;
        for worker in &workers {
            ensure!(worker.merged()? == 0);
        }
        verify_all(&mut workers)?;
    }
    // They may exit, change and unregister without the module.
    workers[0].advise(0, N, libc::MADV_UNMERGEABLE)?;
    workers[0].poke(0, N, 1, 1)?;
    verify_all(&mut workers)?;
    PASS
}

/// Load and unload once. Merge pages in every fourth cycle. A process is always registered when the module is
/// unloaded.
fn cycle(i: usize, keeper: &mut Worker) -> Result<()> {
    module::load()?;
    let passing = Worker::mergeable(2, 100)?;
    if i % 4 == 0 {
        scan::until_merged(2, 2)?;
        engine::write("run", 2)?;
        ensure!(keeper.merged()? == 0);
    }
    if i % 2 == 0 {
        module::unload_soon(Duration::from_secs(5))?;
        passing.exit()
    } else {
        passing.exit()?;
        module::unload_soon(Duration::from_secs(5))
    }
}

fn cycles() -> Outcome {
    let mut keeper = Worker::mergeable(2, 100)?;
    // Run once before measuring: the first load fills caches of its own.
    (0..4).try_for_each(|i| cycle(i, &mut keeper))?;
    let memory = proc::meminfo("MemAvailable")?;
    let slab = proc::meminfo("SUnreclaim")?;
    let mms = proc::slab_objects("mm_struct")?;
    for i in 0..100 {
        cycle(i, &mut keeper).with_context(|| format!("cycle {i}"))?;
    }
    expect_gone()?;
    keeper.verify()?;
    let more_mms = proc::slab_objects("mm_struct")? - mms;
    let more_slab = proc::meminfo("SUnreclaim")? - slab;
    let less_memory = memory - proc::meminfo("MemAvailable")?;
    println!(
        "mm_struct {more_mms:+}, slab {more_slab:+} KiB, available {:+} KiB",
        -less_memory
    );
    // One leak per cycle would make 100. Per-CPU caches make these figures rough.
    ensure!(more_mms < 50, "{more_mms} mm_structs more than before");
    ensure!(
        more_slab < 8 << 10,
        "{more_slab} KiB of slab more than before"
    );
    ensure!(less_memory < 32 << 10, "{less_memory} KiB less than before");
    PASS
}

/// A modified copy of the module, removed when dropped.
struct Patched(PathBuf);

impl Patched {
    fn new(change: impl FnOnce(&mut Vec<u8>) -> Result<()>) -> Result<Self> {
        let mut image = fs::read(module::path()).context("the module")?;
        change(&mut image)?;
        let path = PathBuf::from(format!("/tmp/rksm-patched-{}.ko", std::process::id()));
        fs::write(&path, image)?;
        Ok(Self(path))
    }
}

impl Drop for Patched {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Return every place of `needle` in `hay`.
fn places(hay: &[u8], needle: &[u8]) -> Vec<usize> {
    (0..hay.len().saturating_sub(needle.len()))
        .filter(|&i| hay[i..].starts_with(needle))
        .collect()
}

/// Return the only place of `magic` in the module.
fn only_place(image: &[u8], magic: &[u8]) -> Result<usize> {
    match places(image, magic)[..] {
        [place] => Ok(place),
        ref places => bail!(
            "{} places of {} in the module",
            places.len(),
            String::from_utf8_lossy(magic)
        ),
    }
}

fn word_at(image: &[u8], at: usize) -> Result<u64> {
    let bytes = image.get(at..at + 8).context("the module ends too soon")?;
    Ok(u64::from_le_bytes(bytes.try_into()?))
}

/// The build ID record consists of magic, length and ID (scripts/tools/README.md).
fn other_build() -> Outcome {
    let hex = |id: &[u8]| {
        let digits = id.iter().map(|byte| format!("{byte:02x}"));
        digits.collect::<Vec<_>>().concat()
    };
    let mut right = Vec::new();
    for (what, len, flip) in [
        ("the first bit differs", None, Some(0)),
        ("the last bit differs", None, Some(usize::MAX)),
        ("shorter", Some(16), None),
        ("none", Some(0), None),
    ] {
        let mut wrong = Vec::new();
        let patched = Patched::new(|image| {
            let at = only_place(image, b"RKSMBID1")?;
            let own_len = usize::try_from(word_at(image, at + 8)?)?;
            ensure!(own_len == 20, "the id has {own_len} bytes");
            right = image[at + 16..][..own_len].to_vec();
            let len = len.unwrap_or(own_len);
            image[at + 8] = len as u8;
            match flip {
                None => {}
                Some(0) => image[at + 16] ^= 0x80,
                Some(_) => image[at + 16 + own_len - 1] ^= 1,
            }
            wrong = image[at + 16..][..len].to_vec();
            Ok(())
        })?;
        let notes = fs::read("/sys/kernel/notes")?;
        ensure!(
            notes.windows(right.len()).any(|id| id == right),
            "the module was not built for this kernel"
        );
        let mut log = Log::from_now()?;
        expect_errno(what, module::load_file(&patched.0), libc::ENOEXEC)?;
        expect_gone()?;
        let named = match wrong.is_empty() {
            true => "build id none,".to_string(),
            false => format!("build id {},", hex(&wrong)),
        };
        let running = format!("build id {} is running", hex(&right));
        log.expect(&["rksm: built for", &named, &running, "build rksm again"])?;
    }
    // The module as built is accepted.
    module::load()?;
    PASS
}

/// The table of expected interfaces consists of magic and number, then entries of signature, kind, length of
/// the name, and name (scripts/tools/README.md). Change one entry of each kind.
fn other_layout() -> Outcome {
    for (kind, keyword) in [(1, "struct"), (2, "function"), (3, "enum"), (4, "constant")] {
        let mut name = String::new();
        let patched = Patched::new(|image| {
            let table = only_place(image, b"RKSMABI1")?;
            let entries = usize::try_from(word_at(image, table + 8)?)?;
            let entry = (0..entries)
                .map(|i| table + 16 + 72 * i)
                .find(|&entry| image[entry + 8] == kind)
                .with_context(|| format!("no {keyword} in the table"))?;
            image[entry] ^= 1;
            let (text, len) = (entry + 10, usize::from(image[entry + 9]));
            name = String::from_utf8_lossy(&image[text..text + len]).into_owned();
            Ok(())
        })?;
        let mut log = Log::from_now()?;
        println!("changing the signature of {keyword} {name}");
        expect_errno(keyword, module::load_file(&patched.0), libc::ENOEXEC)?;
        expect_gone()?;
        log.expect(&["rksm", &format!("{keyword} {name} differs in this kernel")])?;
    }
    // The module as built is accepted.
    module::load()?;
    PASS
}

/// Let the module resolve one kernel symbol to another, whose name must not be longer.
fn other_symbol(symbol: &str, instead: &str) -> Result<Patched> {
    let livepatch = |name: &str| format!(".klp.sym.vmlinux.{name},0\0").into_bytes();
    let (old, mut new) = (livepatch(symbol), livepatch(instead));
    ensure!(new.len() <= old.len(), "{instead} is longer than {symbol}");
    new.resize(old.len(), 0);
    Patched::new(|image| {
        let at = only_place(image, &old)?;
        image[at..at + new.len()].copy_from_slice(&new);
        Ok(())
    })
}

/// Check that loading is refused, that the log has one line with each of `words`, and that the in-tree engine
/// is unchanged.
fn expect_read_only(patched: &Patched, words: &[&str]) -> Result<()> {
    let mut log = Log::from_now()?;
    expect_errno("load", module::load_file(&patched.0), libc::ENOEXEC)?;
    expect_gone()?;
    let lines = log.lines()?;
    for word in words {
        let says = |line: &&String| {
            line.starts_with("rksm: this kernel keeps ")
                && line.contains(word)
                && line.contains("read-only")
        };
        let n = lines.iter().filter(says).count();
        ensure!(n == 1, "{n} lines about {word}: {lines:?}");
    }
    for value in ["2", "0"] {
        write_to(in_tree(), "run", value.as_bytes())?;
    }
    Ok(())
}

/// Give the module a pointer that is read-only since boot for the in-tree engine's `run`, as if this kernel
/// had sealed it. The attempted write faults.
fn read_only() -> Outcome {
    expect_read_only(&other_symbol("ksm_run", "fs_kobj")?, &["ksm_run"])?;
    module::load()?;
    PASS
}

/// Let every write fail, by resolving it to a system call that does not exist.
fn nothing_writable() -> Outcome {
    let patched = other_symbol("copy_to_kernel_nofault", "sys_ni_syscall")?;
    let words = [
        "the handler of /sys/kernel/mm/ksm/run",
        "ksm_run",
        "exit function",
    ];
    expect_read_only(&patched, &words)?;
    module::load()?;
    PASS
}

fn missing_symbol() -> Outcome {
    const PREFIX: &[u8] = b".klp.sym.vmlinux.";
    let mut name = String::new();
    let patched = Patched::new(|image| {
        let first = *places(image, PREFIX).first().context("no such symbols")?;
        let at = first + PREFIX.len();
        // No kernel has a symbol with this prefix.
        image[at..at + 2].copy_from_slice(b"ZQ");
        let end = image[at..]
            .iter()
            .position(|&b| b == b',')
            .context("no comma")?;
        name = String::from_utf8_lossy(&image[at..at + end]).into_owned();
        Ok(())
    })?;
    let mut log = Log::from_now()?;
    let result = module::load_file(&patched.0);
    ensure!(result.is_err(), "loaded without {name}");
    expect_gone()?;
    log.expect(&[&name])?;
    PASS
}
