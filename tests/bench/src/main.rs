// SPDX-License-Identifier: GPL-2.0
//! The benchmark's program, for inside and outside the guest. scripts/bench calls it.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{bail, ensure, Context, Result};
use lexopt::prelude::*;

use rksm_bench::engine::Engine;
use rksm_bench::machine::Machine;
use rksm_bench::qmp::Guest;
use rksm_bench::session::{Mode, Session};
use rksm_bench::workers::REAL;
use rksm_bench::{bystander, profile, report, results, table, trace, worker, workload};

const USAGE: &str = "usage: rksm-bench COMMAND
in the guest:
  measure exact|wall [--engine ksm|rksm|both] [--runs N] [--out DIR] [WORKLOAD…]
  worker WORKLOAD INDEX SEED   a process of a workload
  bystander FAULTS             a process that is disturbed
outside:
  save-guest DIR NUMBER        boot a small guest and save it
  machine DIR KERNEL ACCEL RUNS REVISION
                               describe this machine
  join DIR                     make results.json of the measurements
  report DIR                   make tables and plots of it
  table FILE                   show results on the terminal
  profile DIR                  show where instructions go
All workloads are measured when none is named.";

fn main() -> ExitCode {
    match dispatch() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("rksm-bench: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words[..] {
        ["measure", mode, ..] => measure(mode, &args[2..]),
        ["worker", name, index, seed] => worker::run(name, index.parse()?, seed.parse()?),
        ["bystander", faults] => bystander::run(faults.parse()?),
        ["save-guest", dir, number] => Guest::save(Path::new(dir), number.parse()?),
        ["machine", dir, kernel, accel, runs, revision] => {
            Machine::describe(kernel, accel, runs.parse()?, revision)?
                .save(&Path::new(dir).join("machine.json"))
        }
        ["join", dir] => trace::join(Path::new(dir)),
        ["report", dir] => report::write(Path::new(dir)),
        ["table", file] => {
            print!("{}", table::plain(&results::load(Path::new(file))?));
            Ok(())
        }
        ["profile", dir] => {
            print!("{}", profile::report(Path::new(dir))?);
            Ok(())
        }
        _ => bail!("{USAGE}"),
    }
}

fn measure(mode: &str, args: &[String]) -> Result<()> {
    let mode = match mode {
        "exact" => Mode::Exact,
        "wall" => Mode::Wall,
        _ => bail!("{USAGE}"),
    };
    let mut engines = vec![Engine::Ksm, Engine::Rksm];
    let mut out = PathBuf::from(".");
    let mut runs = 1;
    let mut names: Vec<String> = Vec::new();
    let mut parser = lexopt::Parser::from_args(args);
    while let Some(arg) = parser.next()? {
        match arg {
            Long("engine") => {
                engines = match parser.value()?.string()?.as_str() {
                    "ksm" => vec![Engine::Ksm],
                    "rksm" => vec![Engine::Rksm],
                    "both" => engines,
                    other => bail!("no engine {other:?}"),
                }
            }
            Long("runs") => runs = parser.value()?.parse()?,
            Long("out") => out = PathBuf::from(parser.value()?),
            Value(name) => names.push(name.string()?),
            _ => bail!("{USAGE}"),
        }
    }
    if names.is_empty() {
        names = all_workloads();
    }
    for name in &names {
        let known = all_workloads().contains(name);
        ensure!(known, "there is no workload {name}");
    }
    let session = Session {
        mode,
        workloads: &names,
        runs,
        out: &out,
    };
    session
        .run(&engines)
        .with_context(|| format!("{} mode", mode.name()))
}

fn all_workloads() -> Vec<String> {
    workload::GENERATED
        .iter()
        .chain([&REAL])
        .map(|s| s.to_string())
        .collect()
}
