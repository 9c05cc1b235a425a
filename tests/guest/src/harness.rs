// SPDX-License-Identifier: GPL-2.0
//! Run tests, each in a process of its own, and report in KTAP.
//!
//! A test that panics, is killed, or outlives its deadline is `not ok`. It cannot end the run, and none of
//! its processes is left over.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::sys::{self, Ended, Forked};
use crate::timeout::scaled;
use crate::{engine, kmemleak, module};

const STATUS_FAILED: i32 = 1;
const STATUS_SKIPPED: i32 = 4;
const SKIP_MARK: &str = "SKIP: ";
/// How long it may take to undo what a test did.
const RESET_LIMIT: Duration = Duration::from_secs(30);

/// The result of a test that did not fail.
#[derive(Debug)]
pub enum Verdict {
    Pass,
    Skip(String),
}

pub type Outcome = Result<Verdict>;

/// The result of a test that passed.
pub const PASS: Outcome = Ok(Verdict::Pass);

/// End a test as not applicable.
pub fn skip(why: impl Into<String>) -> Outcome {
    Ok(Verdict::Skip(why.into()))
}

/// A test. `limit` is the time that it may take on a slow emulated CPU.
pub struct Test {
    pub name: &'static str,
    pub limit: Duration,
    pub run: fn() -> Outcome,
}

/// The state of the module at the start of each test of a suite.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Module {
    Loaded,
    /// Unloaded: the tests load and unload the module themselves.
    Unloaded,
}

/// A group of tests that can be run alone.
pub struct Suite {
    pub name: &'static str,
    pub about: &'static str,
    pub module: Module,
    pub tests: &'static [Test],
}

/// The tests of one suite that are to be run.
pub struct Selection {
    suite: &'static Suite,
    tests: &'static [Test],
}

impl Selection {
    /// Select all tests.
    pub fn all(suite: &'static Suite) -> Self {
        let tests = suite.tests;
        Self { suite, tests }
    }

    /// Select the test `name`; `None` if there is no such test.
    pub fn one(suite: &'static Suite, name: &str) -> Option<Self> {
        let test = suite.tests.iter().find(|test| test.name == name)?;
        let tests = std::slice::from_ref(test);
        Some(Self { suite, tests })
    }
}

/// The result of a guarded piece of work.
enum Report {
    Passed,
    Skipped(String),
    Failed(String),
}

/// The results of the tests that ran so far.
#[derive(Default)]
pub struct Tally {
    number: usize,
    pub failed: usize,
}

impl Tally {
    /// Run a check of the runner itself as a test.
    fn guard(&mut self, name: &str, check: fn() -> Outcome) {
        let begin = Instant::now();
        let report = guarded(RESET_LIMIT, check);
        self.report(name, &report, begin.elapsed());
    }

    fn report(&mut self, name: &str, report: &Report, took: Duration) {
        self.number += 1;
        let n = self.number;
        match report {
            Report::Passed => println!("ok {n} {name}"),
            Report::Skipped(why) => println!("ok {n} {name} # SKIP {why}"),
            Report::Failed(why) => {
                self.failed += 1;
                println!("# {name}: {why}");
                println!("not ok {n} {name}");
            }
        }
        println!("# {name} took {:.1} s", took.as_secs_f64());
        let _ = std::io::stdout().flush();
    }
}

/// Run the `selected` tests. Return whether all of them passed.
pub fn run(selected: &[Selection]) -> Result<bool> {
    sys::become_subreaper().context("subreaper")?;
    // Each suite ends with one more test, about the in-tree engine. The run ends with two: one about
    // unloading, one about leaks.
    let plan: usize = selected.iter().map(|s| s.tests.len() + 1).sum::<usize>()
        + 1
        + usize::from(kmemleak::present());
    println!("KTAP version 1");
    println!("1..{plan}");
    let mut tally = Tally::default();
    for Selection { suite, tests } in selected {
        println!("# {}: {}", suite.name, suite.about);
        run_suite(suite, tests, &mut tally);
    }
    tally.guard("unloads-after-all-tests", unloads);
    if kmemleak::present() {
        tally.guard("nothing-leaked", nothing_leaked);
    }
    Ok(tally.failed == 0)
}

fn run_suite(suite: &Suite, tests: &[Test], tally: &mut Tally) {
    let name = |test: &str| format!("{}.{test}", suite.name);
    for test in tests {
        let begin = Instant::now();
        let report = run_test(suite, test);
        tally.report(&name(test.name), &report, begin.elapsed());
    }
    tally.guard(&name("in-tree-run-stays-0"), in_tree_stopped);
}

fn run_test(suite: &Suite, test: &Test) -> Report {
    if suite.module == Module::Unloaded && engine::is_in_tree() {
        return Report::Skipped("the in-tree engine is not a module".into());
    }
    let want = suite.module == Module::Loaded;
    if let Report::Failed(why) = guarded(RESET_LIMIT, move || prepare(want)) {
        return Report::Failed(format!("cannot begin: {why}"));
    }
    let report = guarded(test.limit, test.run);
    let after = guarded(RESET_LIMIT, move || prepare(want));
    match (report, after) {
        (Report::Failed(why), _) => Report::Failed(why),
        (_, Report::Failed(why)) => {
            Report::Failed(format!("the engine is not clean after it: {why}"))
        }
        (report, _) => report,
    }
}

/// Bring the engine to the state in which every test begins and ends.
fn prepare(loaded: bool) -> Outcome {
    if engine::is_in_tree() {
        engine::reset()?;
        engine::check_clean()?;
        return PASS;
    }
    module::ensure_loaded(loaded)?;
    if loaded {
        engine::reset()?;
        engine::check_clean()?;
    } else {
        // Tests without the module may have used the in-tree engine.
        for value in ["0", "2", "0"] {
            engine::write_to(Path::new(engine::IN_TREE), "run", value.as_bytes())?;
        }
    }
    PASS
}

fn in_tree_stopped() -> Outcome {
    if engine::is_in_tree() {
        return skip("the in-tree engine itself is under test");
    }
    let run = engine::read_from(Path::new(engine::IN_TREE), "run")?;
    anyhow::ensure!(run == 0, "{}/run reads {run}", engine::IN_TREE);
    PASS
}

fn unloads() -> Outcome {
    if engine::is_in_tree() {
        return skip("the in-tree engine is not a module");
    }
    module::ensure_loaded(false)?;
    PASS
}

fn nothing_leaked() -> Outcome {
    let found = kmemleak::scan()?;
    anyhow::ensure!(found.is_empty(), "kmemleak found:\n{found}");
    PASS
}

/// Run `work` in a child, pass on its output, and end all processes that it started.
fn guarded(limit: Duration, work: impl FnOnce() -> Outcome) -> Report {
    match try_guarded(limit, work) {
        Ok(report) => report,
        Err(e) => Report::Failed(format!("test runner: {e:#}")),
    }
}

fn try_guarded(limit: Duration, work: impl FnOnce() -> Outcome) -> Result<Report> {
    let limit = scaled(limit);
    let _ = std::io::stdout().flush();
    let (output, input) = sys::pipe().context("pipe")?;
    let pid = match sys::fork().context("fork")? {
        Forked::Child => {
            drop(output);
            sys::exit_now(child(limit, &input, work));
        }
        Forked::Parent(pid) => pid,
    };
    drop(input);
    let mut output = Output::new(File::from(output));
    let end = Instant::now() + limit + scaled(Duration::from_secs(5));
    let ended = loop {
        output.pump(Duration::from_millis(20))?;
        if let Some((_, ended)) = sys::try_wait(pid).context("wait")? {
            break Some(ended);
        }
        if Instant::now() > end {
            break None;
        }
    };
    let reaped = end_group(pid, ended.is_none());
    while output.pump(Duration::ZERO)? {}
    output.finish();
    Ok(match ended {
        _ if !reaped => Report::Failed("its processes cannot be killed".into()),
        Some(Ended::Exit(0)) => Report::Passed,
        Some(Ended::Exit(STATUS_SKIPPED)) => Report::Skipped(output.skip_reason),
        Some(Ended::Signal(libc::SIGALRM)) => {
            Report::Failed(format!("not done within {} s", limit.as_secs()))
        }
        Some(other) => Report::Failed(format!("ended by {other:?}")),
        None => Report::Failed("hangs, and its alarm did not end it".into()),
    })
}

/// Run the child's side. Return its exit status.
fn child(limit: Duration, input: &impl AsRawFd, work: impl FnOnce() -> Outcome) -> i32 {
    let set_up = || -> Result<()> {
        sys::own_group()?;
        sys::die_with_parent()?;
        sys::dup_onto(input.as_raw_fd(), 1)?;
        sys::dup_onto(input.as_raw_fd(), 2)?;
        sys::alarm(limit);
        Ok(())
    };
    if let Err(e) = set_up() {
        eprintln!("{e:#}");
        return STATUS_FAILED;
    }
    // The panic's message goes to standard error, and from there into the report.
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
    match outcome {
        Ok(Ok(Verdict::Pass)) => 0,
        Ok(Ok(Verdict::Skip(why))) => {
            say(&format!("{SKIP_MARK}{why}"));
            STATUS_SKIPPED
        }
        Ok(Err(e)) => {
            say(&format!("{e:#}"));
            STATUS_FAILED
        }
        Err(_) => STATUS_FAILED,
    }
}

/// Print even under cargo test, which catches `println`.
fn say(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
    let _ = std::io::stdout().flush();
}

/// Kill the rest of the process group of `pid` and reap it.
fn end_group(pid: libc::pid_t, leader_runs: bool) -> bool {
    let _ = sys::kill(-pid, libc::SIGKILL);
    if leader_runs {
        let _ = sys::kill(pid, libc::SIGKILL);
    }
    let end = Instant::now() + scaled(Duration::from_secs(20));
    loop {
        match sys::try_wait(-pid) {
            // No process of the group is left.
            Err(_) => return true,
            Ok(Some(_)) => {}
            Ok(None) if Instant::now() > end => return false,
            Ok(None) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

/// The output of a child, passed on as KTAP diagnostics.
struct Output {
    file: File,
    partial: Vec<u8>,
    skip_reason: String,
}

impl Output {
    fn new(file: File) -> Self {
        Self {
            file,
            partial: Vec::new(),
            skip_reason: String::new(),
        }
    }

    /// Pass on the available output. Return false at its end.
    fn pump(&mut self, limit: Duration) -> Result<bool> {
        if !sys::poll_in(self.file.as_raw_fd(), limit)? {
            return Ok(false);
        }
        let mut chunk = [0u8; 4096];
        let n = self.file.read(&mut chunk).context("reading a test")?;
        if n == 0 {
            // The end of the file is always readable, so do not spin on it.
            std::thread::sleep(limit);
            return Ok(false);
        }
        self.partial.extend_from_slice(&chunk[..n]);
        while let Some(at) = self.partial.iter().position(|&b| b == b'\n') {
            let line: Vec<u8> = self.partial.drain(..=at).collect();
            self.line(&String::from_utf8_lossy(&line));
        }
        Ok(true)
    }

    fn line(&mut self, line: &str) {
        let line = line.trim_end();
        match line.strip_prefix(SKIP_MARK) {
            Some(why) => self.skip_reason = why.to_string(),
            None => println!("# {line}"),
        }
    }

    fn finish(&mut self) {
        if !self.partial.is_empty() {
            let rest = std::mem::take(&mut self.partial);
            self.line(&String::from_utf8_lossy(&rest));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(2);

    fn outcome(work: impl FnOnce() -> Outcome) -> Report {
        guarded(LIMIT, work)
    }

    #[test]
    fn every_way_to_end_is_told_apart() {
        assert!(matches!(outcome(|| PASS), Report::Passed));
        assert!(matches!(outcome(|| skip("no such thing")),
            Report::Skipped(why) if why == "no such thing"));
        assert!(matches!(outcome(|| anyhow::bail!("x")), Report::Failed(_)));
        assert!(matches!(outcome(|| panic!("x")), Report::Failed(_)));
        assert!(matches!(outcome(|| sys::exit_now(3)), Report::Failed(_)));
        let hang = outcome(|| loop {
            std::thread::sleep(LIMIT);
        });
        assert!(matches!(hang, Report::Failed(why) if why.contains("within")));
    }
}
