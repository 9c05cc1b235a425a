// SPDX-License-Identifier: GPL-2.0
//! `rksm-torture`: many processes perform random operations on memory that merges, and verify every byte. See
//! Documentation/testing.md.

mod arena;
mod control;
mod disk;
mod ops;
mod page;
mod plan;
mod raw;
mod report;
mod round;
mod settle;
mod still;
mod watch;
mod worker;

use std::os::fd::AsRawFd;
use std::process::ExitCode;

use anyhow::{bail, ensure, Context, Result};
use rksm_test_lib::sys;

use arena::{Arena, WORKERS_MAX};
use plan::{Allowed, Op};
use report::Ktap;
use round::Config;
use still::Findings;

const USAGE: &str = "usage: rksm-torture [--seconds N] [--seed N] [--workers N] [--ops LIST] \
    [--not LIST] [--slow N] [--list]";

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let result = match args.next().as_deref() {
        Some("exec") => executed(args.collect()),
        _ => torture(),
    };
    match result {
        Ok(status) => ExitCode::from(status as u8),
        Err(e) => {
            raw::say(&format!("# rksm-torture: {e:#}\n"));
            ExitCode::from(2)
        }
    }
}

/// Run the program of a child after an exec: `exec BLOCK NUMBER LIFE CHILD`.
fn executed(args: Vec<String>) -> Result<i32> {
    let numbers: Vec<u32> = args.iter().map(|a| a.parse()).collect::<Result<_, _>>()?;
    let [id, number, life, child] = numbers[..] else {
        bail!("{USAGE}");
    };
    ops::process::executed(id.try_into()?, number, life, child)
}

struct Options {
    config: Config,
    list: bool,
}

fn options() -> Result<Options> {
    use lexopt::prelude::*;
    let mut config = Config {
        seed: raw::now() ^ (u64::from(std::process::id()) << 32),
        seconds: 60,
        workers: 10,
        allowed: Allowed::ALL,
        slow: 1,
        warm: false,
    };
    let (mut only, mut not, mut list) = (String::new(), String::new(), false);
    let mut parser = lexopt::Parser::from_env();
    while let Some(arg) = parser.next()? {
        match arg {
            Long("seconds") => config.seconds = parser.value()?.parse()?,
            Long("seed") => config.seed = parser.value()?.parse()?,
            Long("workers" | "players") => config.workers = parser.value()?.parse()?,
            Long("slow") => config.slow = parser.value()?.parse()?,
            Long("ops") => only = parser.value()?.string()?,
            Long("not") => not = parser.value()?.string()?,
            Long("list") => list = true,
            _ => bail!("{USAGE}"),
        }
    }
    config.allowed = Allowed::new(&only, &not).map_err(anyhow::Error::msg)?;
    let workers = 2..=WORKERS_MAX as u32;
    ensure!(workers.contains(&config.workers), "--workers {workers:?}");
    ensure!(config.slow > 0 && config.seconds > 0, "{USAGE}");
    Ok(Options { config, list })
}

fn torture() -> Result<i32> {
    let Options { config, list } = options()?;
    if list {
        for op in Op::ALL {
            raw::say(&format!("{}\n", op.name()));
        }
        return Ok(0);
    }
    sys::become_subreaper().context("subreaper")?;
    let file = raw::arena_file().context("memfd")?;
    let arena = raw::map_arena(file.as_raw_fd()).context("arena")?;
    sys::dup_onto(file.as_raw_fd(), ops::process::ARENA_FD).context("dup2")?;
    drop(file);
    raw::say(&format!(
        "# rksm-torture: seed {} seconds {} workers {}\n",
        config.seed, config.seconds, config.workers
    ));
    run(config, arena)
}

/// The number of results that are not about single operations.
const RESULTS: usize = 9;

fn run(config: Config, arena: &'static Arena) -> Result<i32> {
    let mut ktap = Ktap::begin(RESULTS + Op::ALL.len());
    let machine = settle::Machine::probe(arena)?;
    for (op, why) in &machine.absent {
        raw::say(&format!("# absent: {}: {why}\n", op.name()));
    }
    // Twice, to find out how much memory a round leaves in caches of all kinds.
    let warm = Config {
        seconds: (config.seconds / 10).clamp(4, 15),
        seed: page::mix(config.seed),
        warm: true,
        ..config
    };
    let (mut before, mut findings) = (Vec::new(), Findings::default());
    let mut forks = 0;
    for _ in 0..2 {
        if !arena.failed() {
            findings = round::run(warm, arena, &machine.tasks, findings)?.findings;
            forks += arena.tried(Op::Fork) + arena.tried(Op::BigExit);
            settle::settle(config.slow)?;
            before.push(settle::Memory::now()?);
        }
    }
    let outcome = if arena.failed() {
        None
    } else {
        let outcome = round::run(config, arena, &machine.tasks, findings)?;
        findings = outcome.findings;
        Some(outcome)
    };
    forks += arena.tried(Op::Fork) + arena.tried(Op::BigExit);
    raw::say(&report::table(arena));
    let fault = arena.failed();
    let content = if fault {
        Err(format!("see above; the seed is {}", config.seed))
    } else {
        Ok(())
    };
    ktap.result("content", &content);
    let (sums, split) = outcome.map_or_else(Default::default, |o| (o.sums, o.split));
    raw::say(&sums.line(arena, split));
    raw::say(&findings.line());
    let happened = |yes: bool, what: &str| yes.then_some(()).ok_or(what.to_string());
    let hurried = report::hurried(arena);
    let few = if hurried { 10 } else { 100 };
    ktap.result("pages-merged", &happened(sums.sharing > few, "hardly any"));
    ktap.result("pages-split", &happened(split > few as i64, "hardly any"));
    // Writing 2 to `run` restarts the pass, and the writer goes by the clock.
    let enough = sums.passes > 2 || (hurried && sums.scanned > 10_000);
    ktap.result("passes", &happened(enough, "hardly any"));
    for (name, outcome) in findings.results() {
        ktap.result(name, &outcome);
    }
    report::operations(&mut ktap, arena, config.allowed, &machine.absent);

    let told = |r: Result<()>| r.map_err(|e| format!("{e:#}"));
    ktap.result(
        "counters-back-to-zero",
        &told(settle::counters(config.slow, forks)),
    );
    ktap.result("module-unloads", &told(settle::settle(config.slow)));
    let memory = match before[..] {
        [first, second] => told(settle::memory_is_back(config.slow, first, second)),
        _ => Err("no warm-up to compare with".to_string()),
    };
    ktap.result("memory-back", &memory);
    raw::say(&format!("# seed {}\n", config.seed));
    Ok(i32::from(!ktap.all_well()))
}
