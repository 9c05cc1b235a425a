// SPDX-License-Identifier: GPL-2.0
//! The files in sysfs: their content and what they refuse.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{ensure, Context, Result};

use super::tests;
use crate::engine::{self, write_to, IN_TREE, READ_ONLY, WRITABLE};
use crate::harness::{skip, Module, Outcome, Suite, PASS};
use crate::module;
use crate::scan;
use crate::worker::Worker;

pub const SUITE: Suite = Suite {
    name: "knobs",
    about: "files, modes, defaults, formats and errors are those of the in-tree engine",
    module: Module::Loaded,
    tests: tests![
        ("files-and-modes", 30, modes),
        ("defaults-after-loading", 60, defaults),
        ("format-of-every-file", 30, formats),
        ("bad-values", 30, bad_values),
        ("good-values", 30, good_values),
        ("bad-values-of-run", 30, bad_run),
        ("same-answers-as-in-tree", 30, same_answers),
        ("read-only-files", 30, read_only),
        ("run-reads-back", 60, run_reads_back),
    ],
};

/// Numbers that `pages_to_scan` and `sleep_millisecs` accept, and what they then read as.
const GOOD: [(&str, u64); 9] = [
    ("0", 0),
    ("1\n", 1),
    ("100", 100),
    ("+7", 7),
    ("010", 10),
    ("00000000000000000000000000000005", 5),
    ("2147483648", 2_147_483_648),
    ("4294967295\n", 4_294_967_295),
    ("20", 20),
];

/// Values that every writable file refuses with EINVAL.
const BAD: [&str; 17] = [
    "\n",
    " ",
    "x",
    "-1",
    "-0",
    "1x",
    "1 2",
    "1\n\n",
    " 1",
    "1 ",
    "0x10",
    "1.5",
    "1,000",
    "4294967296",
    "18446744073709551616",
    "99999999999999999999999999",
    "on",
];

fn files() -> impl Iterator<Item = &'static str> {
    WRITABLE.into_iter().chain(READ_ONLY)
}

fn modes() -> Outcome {
    for (names, want) in [(&WRITABLE[..], 0o644), (&READ_ONLY[..], 0o444)] {
        for name in names {
            for dir in [engine::dir(), Path::new(IN_TREE)] {
                let meta = fs::metadata(engine::path(dir, name)).with_context(|| *name)?;
                let mode = meta.mode() & 0o7777;
                ensure!(mode == want, "{name} in {}: {mode:o}", dir.display());
                ensure!((meta.uid(), meta.gid()) == (0, 0), "{name}: owner");
            }
        }
    }
    PASS
}

fn defaults() -> Outcome {
    if engine::is_in_tree() {
        return skip("the in-tree engine cannot be loaded anew");
    }
    module::unload_clean()?;
    module::load()?;
    for name in files() {
        let want = match name {
            "pages_to_scan" => 100,
            "sleep_millisecs" => 20,
            _ => 0,
        };
        let have = engine::read(name)?;
        ensure!(
            have == want,
            "{name} reads {have} after loading, not {want}"
        );
    }
    PASS
}

fn formats() -> Outcome {
    for name in files() {
        let text = fs::read_to_string(engine::path(engine::dir(), name))?;
        let digits = text.strip_suffix('\n').context("no newline at the end")?;
        let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
        ensure!(plain, "{name} reads {text:?}");
    }
    PASS
}

/// Write `value`. Return the errno if it is refused.
fn answer(dir: &Path, knob: &str, value: &str) -> Result<(), i32> {
    write_to(dir, knob, value.as_bytes()).map_err(errno)
}

fn errno(e: io::Error) -> i32 {
    e.raw_os_error().unwrap_or(-1)
}

fn bad_values() -> Outcome {
    for knob in WRITABLE {
        let before = engine::read(knob)?;
        for value in BAD {
            let got = answer(engine::dir(), knob, value);
            ensure!(got == Err(libc::EINVAL), "{knob}: {value:?} gave {got:?}");
            ensure!(
                engine::read(knob)? == before,
                "{knob}: {value:?} changed it"
            );
        }
        let got = answer(engine::dir(), knob, "");
        ensure!(got == Ok(()), "{knob}: an empty write gave {got:?}");
        ensure!(
            engine::read(knob)? == before,
            "{knob}: an empty write changed it"
        );
    }
    PASS
}

fn good_values() -> Outcome {
    for knob in ["pages_to_scan", "sleep_millisecs"] {
        for (value, want) in GOOD {
            let got = answer(engine::dir(), knob, value);
            ensure!(got == Ok(()), "{knob}: {value:?} gave {got:?}");
            let have = engine::read(knob)?;
            ensure!(have == want, "{knob}: {value:?} reads back {have}");
        }
    }
    PASS
}

fn bad_run() -> Outcome {
    for value in ["3", "4", "5", "255", "4294967295"] {
        let got = answer(engine::dir(), "run", value);
        ensure!(got == Err(libc::EINVAL), "run: {value} gave {got:?}");
        ensure!(engine::read("run")? == 0, "run: {value} changed it");
    }
    PASS
}

/// Compare the in-tree engine's own answers with those of the engine under test.
fn same_answers() -> Outcome {
    let in_tree = Path::new(IN_TREE);
    for knob in ["pages_to_scan", "sleep_millisecs"] {
        let keep = engine::read_from(in_tree, knob)?;
        for value in BAD.into_iter().chain(GOOD.map(|(value, _)| value)) {
            let (a, b) = (
                answer(engine::dir(), knob, value),
                answer(in_tree, knob, value),
            );
            ensure!(a == b, "{knob}: {value:?} gave {a:?}, in-tree {b:?}");
        }
        let (a, b) = (engine::read(knob)?, engine::read_from(in_tree, knob)?);
        ensure!(a == b, "{knob} ends at {a}, in-tree at {b}");
        write_to(in_tree, knob, keep.to_string().as_bytes())?;
    }
    PASS
}

fn read_only() -> Outcome {
    for knob in READ_ONLY {
        let got = answer(engine::dir(), knob, "0");
        let want = answer(Path::new(IN_TREE), knob, "0");
        ensure!(got.is_err(), "{knob} can be written");
        ensure!(got == want, "{knob}: {got:?}, in-tree {want:?}");
    }
    PASS
}

fn run_reads_back() -> Outcome {
    let worker = Worker::mergeable(4, 100)?;
    for value in [1, 1, 0, 2, 2, 1, 2, 0, 0] {
        engine::write("run", value)?;
        let have = engine::read("run")?;
        ensure!(have == value, "run reads {have} after {value}");
    }
    scan::passes(1)?;
    ensure!(engine::read("run")? == 1);
    worker.exit()?;
    PASS
}
