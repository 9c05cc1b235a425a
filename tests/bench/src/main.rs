// SPDX-License-Identifier: GPL-2.0
//! `rksm-bench exact`: measures, in the guest.
//! `rksm-bench join`: puts together what the guest and the plugin found.
//! `rksm-bench table`: shows results on the terminal.
//! `rksm-bench profile`: shows where instructions go.
//! `rksm-bench worker`: a process of a workload, started by the former.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{bail, Context, Result};
use lexopt::prelude::*;

use rksm_bench::engine::Engine;
use rksm_bench::{exact, phase, profile, results, table, trace, worker, workload};

const USAGE: &str = "usage: rksm-bench exact [--engine ksm|rksm|both] [--out DIR] [WORKLOAD…]
       rksm-bench join DIR
       rksm-bench table FILE
       rksm-bench profile DIR
       rksm-bench worker WORKLOAD INDEX SEED
The workloads are all that the generator makes when none is named.";

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
    let Some((command, rest)) = args.split_first() else {
        bail!("{USAGE}");
    };
    match (command.as_str(), rest) {
        ("exact", rest) => measure(rest),
        ("table", [file]) => {
            print!("{}", table::plain(&results::load(Path::new(file))?));
            Ok(())
        }
        ("join", [dir]) => trace::join(Path::new(dir)),
        ("profile", [dir]) => {
            print!("{}", profile::report(Path::new(dir))?);
            Ok(())
        }
        ("worker", [name, index, seed]) => worker::run(name, index.parse()?, seed.parse()?),
        _ => bail!("{USAGE}"),
    }
}

fn measure(args: &[String]) -> Result<()> {
    let mut engines = vec![Engine::Ksm, Engine::Rksm];
    let mut out = PathBuf::from(".");
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
            Long("out") => out = PathBuf::from(parser.value()?),
            Value(name) => names.push(name.string()?),
            _ => bail!("{USAGE}"),
        }
    }
    if names.is_empty() {
        names = workload::GENERATED.map(String::from).to_vec();
    }
    prepare_guest()?;
    let mut records = Vec::new();
    for engine in engines {
        records.extend(exact::run_all(engine, &names, &out)?);
        results::save(&out.join("exact.json"), &records)?;
        results::save(&out.join("phases.json"), &phase::all())?;
    }
    Ok(())
}

/// Huge pages only where a workload asks for them, and none made later.
fn prepare_guest() -> Result<()> {
    let huge = Path::new("/sys/kernel/mm/transparent_hugepage");
    fs::write(huge.join("enabled"), "madvise").context("huge pages")?;
    fs::write(huge.join("khugepaged/scan_sleep_millisecs"), "100000000").context("khugepaged")?;
    Ok(())
}
