// SPDX-License-Identifier: GPL-2.0
//! Tasks that write the module's files and `run`, and that unload and load the module.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{bail, Result};
use rand::seq::IndexedRandom;
use rand::Rng;
use rksm_test_lib::engine::{write_to, RKSM};
use rksm_test_lib::module;

use super::Control;
use crate::plan::Op;

const SWITCH: &[&str] = &["0", "1", "y", "off"];
const MANY: &[&str] = &["0", "1", "7", "100", "2000\n", "4294967295"];
const BAD: &[&str] = &[
    "",
    "\n",
    " ",
    "x",
    "-1",
    "1x",
    "1 2",
    "0x10",
    "1.5",
    "on off",
    "99999999999999999999999999",
    "[none]",
];

/// Return values that a file accepts.
fn good(knob: &str) -> &'static [&'static str] {
    match knob {
        // Only on, which is the default.
        "smart_scan" => &["1", "y", "1\n"],
        "use_zero_pages" => SWITCH,
        "merge_across_nodes" | "merge_eagerly" => &["0", "1"],
        "max_page_sharing" => &["2", "3", "16", "256", "2147483647"],
        "sleep_millisecs" => &["0", "1", "20", "300", "4294967295"],
        "pass_millisecs" => &["0", "10", "1000", "4294967295"],
        "advisor_mode" => &["none", "scan-time"],
        "advisor_max_cpu" => &["1", "70", "100"],
        "advisor_target_scan_time" => &["1", "200", "18446744073709551615"],
        _ => MANY,
    }
}

/// Settings with which pages merge soon.
const CALM: &[(&str, &str)] = &[
    ("advisor_mode", "none"),
    ("pages_to_scan", "3000"),
    ("sleep_millisecs", "2"),
    ("pass_millisecs", "20"),
];

fn write(knob: &str, value: &str) -> io::Result<()> {
    write_to(Path::new(RKSM), knob, value.as_bytes())
}

pub fn calm() {
    for (knob, value) in CALM {
        // The module may be unloaded at the moment.
        let _ = write(knob, value);
    }
}

/// Return all files, and the writable ones. There are none while the module is unloaded.
fn files() -> (Vec<String>, Vec<String>) {
    let (mut all, mut writable) = (Vec::new(), Vec::new());
    let Ok(entries) = fs::read_dir(RKSM) else {
        return (all, writable);
    };
    for entry in entries.flatten() {
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        let mode = entry.metadata().map_or(0, |m| m.permissions().mode());
        if mode & 0o200 != 0 && name != "run" {
            writable.push(name.clone());
        }
        all.push(name);
    }
    // The order within a directory must not affect the sequence.
    all.sort();
    writable.sort();
    (all, writable)
}

/// Write random values to all files except `run`, and read all files.
pub fn flip(control: &mut Control) -> Result<()> {
    while !control.stopping() {
        let bad = control.rng.random_range(0..3) == 0;
        let (which, value) = (control.rng.random::<u32>(), control.rng.random::<u32>());
        let (all, writable) = files();
        if !writable.is_empty() {
            let knob = &writable[which as usize % writable.len()];
            let values = if bad { BAD } else { good(knob) };
            let value = values[value as usize % values.len()];
            let op = if bad { Op::BadKnob } else { Op::Knob };
            control.attempt(op, || write(knob, value));
        }
        if which % 4 == 0 {
            for name in &all {
                control.attempt(Op::ReadKnobs, || {
                    fs::read_to_string(Path::new(RKSM).join(name)).map(drop)
                });
            }
        }
        control.pause(1..30);
        if control.rng.random_range(0..3) == 0 {
            calm();
            control.pause(50..200);
        }
    }
    calm();
    Ok(())
}

/// Write to `run`.
pub fn run(control: &mut Control) -> Result<()> {
    while !control.stopping() {
        let op = *[Op::Run0, Op::Run1, Op::Run1, Op::Run2]
            .choose(&mut control.rng)
            .unwrap_or(&Op::Run1);
        let value = match op {
            Op::Run0 => "0",
            Op::Run1 => "1",
            _ => "2",
        };
        control.attempt(op, || write("run", value));
        control.pause(if op == Op::Run1 { 300..1500 } else { 0..120 });
    }
    Ok(())
}

/// Unload the module and load it again.
pub fn reload(control: &mut Control) -> Result<()> {
    while !control.stopping() {
        // Loading takes a while on an emulated CPU, and nothing merges meanwhile.
        control.pause(3000..12_000);
        for _ in 0..10 {
            let unloaded = control.attempt(Op::Unload, || {
                write("run", "2")?;
                module::unload()
            });
            if unloaded != Some(false) {
                break;
            }
            control.pause(0..20);
        }
        if module::loaded() {
            continue;
        }
        control.pause_briefly(0..200);
        // Nothing else loads or unloads the module, so loading must succeed.
        if let Err(e) = module::load_file(&module::path()) {
            bail!("cannot load the module again: {e}");
        }
        control.arena.count(Op::Load, 0);
        calm();
        let _ = write("run", "1");
    }
    Ok(())
}
