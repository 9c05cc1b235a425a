// SPDX-License-Identifier: GPL-2.0
//! The directory of rksm, compared with that of the in-tree engine, file by file.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{ensure, Context, Result};

use super::tests;
use crate::engine::{write_to, IN_TREE, RKSM};
use crate::harness::{skip, Module, Outcome, Suite, PASS};
use crate::{engine, module};

pub const SUITE: Suite = Suite {
    name: "parity",
    about: "both directories have the same files: names, modes, content, and what they refuse",
    // The in-tree files are read while rksm is not loaded.
    module: Module::Unloaded,
    tests: tests![
        ("same-names-and-modes", 60, names),
        ("same-content-after-loading", 60, contents),
        ("same-answers-to-every-value", 120, answers),
    ],
};

/// Files that only rksm has.
const OWN: [&str; 2] = ["merge_eagerly", "pass_millisecs"];

/// In-tree files that rksm does not have yet. A file that exists must not be listed here.
const NOT_YET: [&str; 0] = [];

/// Values to write to every file of both engines, in this order.
const VALUES: [&str; 74] = [
    "",
    "\n",
    " ",
    "\0",
    "0",
    "1",
    "2",
    "3",
    "0\n",
    "1\n",
    "2\n",
    "00",
    "01",
    "010",
    "+0",
    "+1",
    "-0",
    "-1",
    "-2",
    " 1",
    "1 ",
    "1\n\n",
    "1\n1",
    "1 2",
    "1x",
    "x1",
    "0x10",
    "1.5",
    "1,000",
    "1e3",
    "5",
    "9",
    "10",
    "70",
    "100",
    "101",
    "256",
    "500",
    "1000",
    "30000",
    "65536",
    "2147483647",
    "2147483648",
    "-2147483648",
    "-2147483649",
    "4294967295",
    "4294967296",
    "4294967366",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
    "99999999999999999999999999",
    "y",
    "Y",
    "n",
    "N",
    "yes",
    "no",
    "on",
    "off",
    "of",
    "o",
    "t",
    "true",
    "false",
    "none",
    "none\n",
    "none\n\n",
    "None",
    "scan-time",
    "scan-time\n",
    "scan_time",
    "[none]",
];

/// Return the files of a directory, with their modes and owners.
fn files(dir: &str) -> Result<BTreeMap<String, (u32, u32, u32)>> {
    let list = fs::read_dir(dir).with_context(|| dir.to_owned())?;
    list.map(|entry| {
        let entry = entry?;
        let meta = entry.metadata()?;
        let name = entry.file_name().to_string_lossy().into_owned();
        Ok((name, (meta.mode(), meta.uid(), meta.gid())))
    })
    .collect()
}

fn content(dir: &str, name: &str) -> Result<String> {
    fs::read_to_string(Path::new(dir).join(name)).with_context(|| format!("{dir}/{name}"))
}

/// Return the files that both directories have.
fn common() -> Result<Vec<String>> {
    let names = files(IN_TREE)?.into_keys();
    Ok(names.filter(|name| !NOT_YET.contains(&&**name)).collect())
}

fn names() -> Outcome {
    if engine::is_in_tree() {
        return skip("compares rksm with the in-tree engine");
    }
    module::load()?;
    let (ours, theirs) = (files(RKSM)?, files(IN_TREE)?);
    for (name, theirs) in &theirs {
        match (ours.get(name), NOT_YET.contains(&&**name)) {
            (Some(ours), false) => {
                ensure!(ours == theirs, "{name}: {ours:?}, in-tree {theirs:?}")
            }
            (None, true) => println!("{name} is not there yet"),
            (None, false) => anyhow::bail!("{name} is missing"),
            (Some(_), true) => anyhow::bail!("{name} is there: take it out of NOT_YET"),
        }
    }
    for name in ours.keys().filter(|name| !theirs.contains_key(*name)) {
        ensure!(OWN.contains(&&**name), "in-tree has no {name}");
    }
    module::unload_clean()?;
    PASS
}

fn contents() -> Outcome {
    if engine::is_in_tree() {
        return skip("compares rksm with the in-tree engine");
    }
    // rksm was not loaded yet, so this is the state after boot unless an earlier test wrote to the files.
    let names = common()?;
    let theirs: Result<Vec<_>> = names.iter().map(|name| content(IN_TREE, name)).collect();
    module::load()?;
    for (name, theirs) in names.iter().zip(theirs?) {
        let ours = content(RKSM, name)?;
        ensure!(ours == theirs, "{name} reads {ours:?}, in-tree {theirs:?}");
    }
    module::unload_clean()?;
    PASS
}

/// The answer of one file to each value, and the content of all writable ones after it, as some change
/// others.
type Answers = Vec<(Result<(), i32>, Vec<String>)>;

/// Write all values to every writable file, and restore it afterwards.
fn ask(dir: &str, names: &[String]) -> Result<BTreeMap<String, Answers>> {
    let modes = files(dir)?;
    let is_writable = |name: &&String| modes.get(*name).is_some_and(|(mode, ..)| mode & 0o222 != 0);
    let writable: Vec<_> = names.iter().filter(is_writable).collect();
    let read_all =
        || -> Result<Vec<_>> { writable.iter().map(|name| content(dir, name)).collect() };
    // With the advisor on, `pages_to_scan` refuses everything.
    let mut rounds: Vec<(String, &str)> = Vec::new();
    for mode in ["none", "scan-time"] {
        rounds.extend(writable.iter().map(|name| ((*name).clone(), mode)));
    }
    let mut all = BTreeMap::new();
    for (name, mode) in rounds {
        write_to(Path::new(dir), "advisor_mode", mode.as_bytes())?;
        let before = content(dir, &name)?;
        let mut answers = Answers::new();
        for value in VALUES {
            let answer = write_to(Path::new(dir), &name, value.as_bytes());
            let errno = answer.map_err(|err| err.raw_os_error().unwrap_or(-1));
            answers.push((errno, read_all()?));
        }
        let keep = match &*name {
            "advisor_mode" => "none",
            _ => before.trim_end(),
        };
        write_to(Path::new(dir), "advisor_mode", b"none")?;
        if name != "pages_to_scan" || mode == "none" {
            write_to(Path::new(dir), &name, keep.as_bytes())?;
        }
        all.insert(format!("{name} with advisor_mode {mode}"), answers);
    }
    Ok(all)
}

fn answers() -> Outcome {
    if engine::is_in_tree() {
        return skip("compares rksm with the in-tree engine");
    }
    // No process is registered, so `run` accepts any value, too.
    let names = common()?;
    let theirs = ask(IN_TREE, &names)?;
    module::load()?;
    let ours = ask(RKSM, &names)?;
    ensure!(ours.len() == theirs.len() && !ours.is_empty());
    let mut refused = 0;
    for (what, theirs) in &theirs {
        let ours = ours.get(what).context("no answers")?;
        for ((value, ours), theirs) in VALUES.iter().zip(ours).zip(theirs) {
            ensure!(
                ours == theirs,
                "{what}: {value:?} gave {ours:?}, in-tree {theirs:?}"
            );
            refused += usize::from(ours.0.is_err());
        }
    }
    println!("{} files and modes, {refused} values refused", ours.len());
    module::unload_clean()?;
    PASS
}
