// SPDX-License-Identifier: GPL-2.0
//! `rksm-demo HOLDER.py`: the guest's half of the demo.
//!
//! Start python processes that hold the same text, let the engine merge their memory, and show the saving.
//! Then prove that no process sees another's writes.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};

use rksm_guest_tests::engine::{self, Counters};
use rksm_guest_tests::region::PAGE;
use rksm_guest_tests::{module, proc};

const PROCESSES: usize = 8;
/// How long merging may take on a slow emulated CPU.
const MERGE_LIMIT: Duration = Duration::from_secs(300);

fn main() -> ExitCode {
    let Some(holder) = std::env::args().nth(1) else {
        eprintln!("usage: rksm-demo HOLDER.py");
        return ExitCode::from(2);
    };
    match demo(&holder) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            println!("demo: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn mib(pages: u64) -> f64 {
    (pages * PAGE as u64) as f64 / f64::from(1 << 20)
}

fn step(number: usize, what: &str) {
    println!("[{number}/6] {what}");
}

/// The result of merging.
struct Merged {
    before_kib: i64,
    after_kib: i64,
    counters: Counters,
    cpu: Duration,
    wall: Duration,
}

fn demo(script: &str) -> Result<()> {
    load_engine()?;
    let mut holders = start_holders(script)?;
    let text_pages = (holders[0].size / PAGE) as u64;
    let merged = merge(text_pages)?;
    print_result(&merged, &holders)?;
    rewrite_and_verify(&mut holders)?;
    unload_engine(&mut holders)?;
    println!(
        "demo: OK saved_mib={:.0} pages_sharing={} verified_processes={}",
        mib(merged.counters.sharing),
        merged.counters.sharing,
        holders.len()
    );
    Ok(())
}

fn load_engine() -> Result<()> {
    if engine::is_in_tree() {
        step(1, "use the in-tree engine");
    } else {
        step(1, &format!("load {}", module::path().display()));
        module::load()?;
    }
    engine::reset()
}

/// One python process and the pipes to it.
struct Holder {
    child: Child,
    commands: ChildStdin,
    replies: BufReader<ChildStdout>,
    size: usize,
    rewritten: bool,
}

impl Holder {
    fn start(script: &str, number: usize) -> Result<Self> {
        let launcher = std::env::current_exe()?.with_file_name("mergeable-exec");
        let mut child = Command::new(launcher)
            .args(["/usr/bin/python3", script, &number.to_string()])
            // The same hash seed in each process, and no files left in the guest's root.
            .env("PYTHONHASHSEED", "0")
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("starting a python process")?;
        Ok(Self {
            commands: child.stdin.take().context("stdin")?,
            replies: BufReader::new(child.stdout.take().context("stdout")?),
            child,
            size: 0,
            rewritten: false,
        })
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }

    fn send(&mut self, command: &str) -> Result<()> {
        writeln!(self.commands, "{command}").with_context(|| format!("telling {}", self.pid()))
    }

    /// Read the next reply, split into words.
    fn reply(&mut self) -> Result<Vec<String>> {
        let mut line = String::new();
        let n = self.replies.read_line(&mut line)?;
        ensure!(n > 0, "python process {} died", self.pid());
        Ok(line.split_whitespace().map(String::from).collect())
    }
}

fn start_holders(script: &str) -> Result<Vec<Holder>> {
    step(
        2,
        &format!("start {PROCESSES} python3 processes, each with the library's sources in memory"),
    );
    let mut holders = (0..PROCESSES)
        .map(|i| Holder::start(script, i))
        .collect::<Result<Vec<_>>>()?;
    for (i, holder) in holders.iter_mut().enumerate() {
        let reply = holder.reply()?;
        let [ready, size, files, modules] = &reply[..] else {
            bail!("a python process says {reply:?}");
        };
        ensure!(ready == "ready", "a python process says {reply:?}");
        holder.size = size.parse()?;
        println!(
            "      {} of {PROCESSES}: pid {}, {modules} modules, {files} files, {:.1} MiB of text",
            i + 1,
            holder.pid(),
            mib((holder.size / PAGE) as u64)
        );
    }
    ensure!(
        holders.iter().all(|h| h.size == holders[0].size),
        "the processes hold different texts"
    );
    Ok(holders)
}

/// Return the least number of pages that must be saved.
///
/// All processes hold the same text, so all copies but one can go. The text starts at the same offset within
/// a page in all of them, as the allocator maps so large a piece by itself. So whole pages are equal, except
/// for those at the two ends. Allow a twentieth for pages that are in use at the moment. Merged memory of the
/// interpreters themselves comes on top.
fn floor(text_pages: u64) -> u64 {
    text_pages * (PROCESSES as u64 - 1) * 19 / 20
}

/// Merge until two passes in a row found next to nothing.
fn merge(text_pages: u64) -> Result<Merged> {
    let floor = floor(text_pages);
    step(
        3,
        &format!(
            "merge; at least {floor} pages must go ({:.0} MiB)",
            mib(floor)
        ),
    );
    let thread = proc::kernel_thread(engine::thread_name())?.context("no scanning thread")?;
    let cpu = proc::cpu_time(thread)?;
    let before_kib = proc::meminfo("MemAvailable")?;
    engine::write("pages_to_scan", 4000)?;
    engine::write("sleep_millisecs", 10)?;
    let start = Instant::now();
    engine::write("run", 1)?;
    let counters = watch_progress(start)?;
    // Freed pages may still sit in per-CPU lists.
    std::thread::sleep(Duration::from_secs(1));
    let merged = Merged {
        before_kib,
        after_kib: proc::meminfo("MemAvailable")?,
        counters,
        cpu: proc::cpu_time(thread)? - cpu,
        wall: start.elapsed(),
    };
    let sharing = counters.sharing;
    ensure!(
        sharing >= floor,
        "only {sharing} pages merged, {floor} must"
    );
    Ok(merged)
}

fn watch_progress(start: Instant) -> Result<Counters> {
    // Sharing at the last pass that still found much, and the number of that pass.
    let (mut level, mut since) = (0, 0);
    let mut shown = Instant::now();
    loop {
        std::thread::sleep(Duration::from_millis(100));
        let c = engine::counters()?;
        if shown.elapsed() >= Duration::from_secs(1) {
            shown = Instant::now();
            println!(
                "      {:4.0} s: pass {}, {} pages scanned, {} shared, {} sharing, {:.1} MiB saved",
                start.elapsed().as_secs_f64(),
                c.full_scans + 1,
                c.scanned,
                c.shared,
                c.sharing,
                mib(c.sharing)
            );
        }
        if c.sharing > level + level / 200 {
            (level, since) = (c.sharing, c.full_scans);
        }
        if level > 0 && c.full_scans >= since + 2 {
            return Ok(c);
        }
        ensure!(start.elapsed() < MERGE_LIMIT, "merging does not end: {c:?}");
    }
}

fn print_result(merged: &Merged, holders: &[Holder]) -> Result<()> {
    let c = &merged.counters;
    let seconds = |d: Duration| d.as_secs_f64();
    step(4, "show the result");
    println!();
    println!(
        "      memory available before   {:9.1} MiB",
        merged.before_kib as f64 / 1024.0
    );
    println!(
        "      memory available after    {:9.1} MiB",
        merged.after_kib as f64 / 1024.0
    );
    println!("      pages shared              {:9}", c.shared);
    println!("      pages sharing             {:9}", c.sharing);
    println!("      saved                     {:9.1} MiB", mib(c.sharing));
    println!("      full scans                {:9}", c.full_scans);
    println!("      pages scanned             {:9}", c.scanned);
    println!(
        "      CPU time of {:<14}{:9.2} s of {:.1} s",
        engine::thread_name(),
        seconds(merged.cpu),
        seconds(merged.wall)
    );
    println!();
    println!("      process   merging pages     profit");
    for holder in holders {
        let pages = proc::ksm_stat(holder.pid(), "ksm_merging_pages")?;
        let profit = proc::ksm_stat(holder.pid(), "ksm_process_profit")?;
        println!(
            "      {:7}   {pages:13} {:6.1} MiB",
            holder.pid(),
            profit as f64 / f64::from(1 << 20)
        );
        ensure!(pages > 0, "process {} merged nothing", holder.pid());
    }
    println!();
    Ok(())
}

/// Let all processes compare digests. Those that did not rewrite must agree; those that did must differ from
/// all others.
fn verify(holders: &mut [Holder]) -> Result<()> {
    holders.iter_mut().try_for_each(|h| h.send("verify"))?;
    let mut digests = Vec::new();
    for holder in holders.iter_mut() {
        let reply = holder.reply()?;
        let [verified, digest] = &reply[..] else {
            bail!("process {} says {reply:?}", holder.pid());
        };
        ensure!(
            verified == "verified",
            "process {}: {reply:?}",
            holder.pid()
        );
        digests.push((holder.rewritten, digest.clone()));
    }
    for (i, (rewritten, digest)) in digests.iter().enumerate() {
        for (other_rewritten, other) in &digests[..i] {
            let must_agree = !rewritten && !other_rewritten;
            ensure!((digest == other) == must_agree, "digests: {digests:?}");
        }
    }
    println!("      {} processes verified all they hold", holders.len());
    Ok(())
}

fn rewrite_and_verify(holders: &mut [Holder]) -> Result<()> {
    step(
        5,
        "half of the processes rewrite what they hold; no process may see another's write",
    );
    verify(holders)?;
    for holder in holders.iter_mut().step_by(2) {
        holder.send("rewrite")?;
    }
    for holder in holders.iter_mut().step_by(2) {
        let reply = holder.reply()?;
        ensure!(
            reply == ["rewritten"],
            "process {}: {reply:?}",
            holder.pid()
        );
        holder.rewritten = true;
    }
    println!(
        "      {} processes rewrote their text",
        holders.iter().filter(|h| h.rewritten).count()
    );
    verify(holders)
}

fn unload_engine(holders: &mut [Holder]) -> Result<()> {
    step(6, "unmerge everything, verify once more, unload");
    engine::write("run", 2)?;
    let c = engine::counters()?;
    ensure!(c.shared == 0 && c.sharing == 0, "left merged: {c:?}");
    verify(holders)?;
    engine::write("run", 0)?;
    if !engine::is_in_tree() {
        module::unload().context("unloading")?;
    }
    for holder in holders.iter_mut() {
        holder.send("quit")?;
        let status = holder.child.wait()?;
        ensure!(status.success(), "process {}: {status}", holder.pid());
    }
    Ok(())
}
