// SPDX-License-Identifier: GPL-2.0
//! `rksm-guest-tests run [SUITE[.TEST]…]`: run the tests as root in a guest.

use std::process::ExitCode;

use anyhow::{bail, Context, Result};

use rksm_guest_tests::harness::{self, Selection};
use rksm_guest_tests::suites::ALL;
use rksm_guest_tests::worker;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match command(&args) {
        Ok(status) => ExitCode::from(status),
        Err(e) => {
            eprintln!("rksm-guest-tests: {e:#}");
            ExitCode::from(2)
        }
    }
}

fn command(args: &[&str]) -> Result<u8> {
    match args {
        ["list"] => {
            ALL.iter()
                .for_each(|t| println!("{:14} {}", t.name, t.about));
            Ok(0)
        }
        ["run", names @ ..] => Ok(u8::from(!harness::run(&select(names)?)?)),
        // The program of a test's worker after it has executed itself.
        ["worker", fd] => Ok(worker::serve_inherited(fd.parse()?) as u8),
        _ => bail!("usage: rksm-guest-tests list | run [SUITE[.TEST]…]"),
    }
}

/// Return the tests to run: whole suites, or `SUITE.TEST` for a single test; all tests if there are no names.
fn select(names: &[&str]) -> Result<Vec<Selection>> {
    if names.is_empty() {
        return Ok(ALL.iter().map(|suite| Selection::all(suite)).collect());
    }
    names.iter().map(|name| select_one(name)).collect()
}

fn select_one(name: &str) -> Result<Selection> {
    let (suite, test) = match name.split_once('.') {
        Some((suite, test)) => (suite, Some(test)),
        None => (name, None),
    };
    let found = ALL.iter().find(|known| known.name == suite);
    let Some(suite) = found else {
        bail!("no suite {suite}; see rksm-guest-tests list");
    };
    match test {
        None => Ok(Selection::all(suite)),
        Some(test) => Selection::one(suite, test)
            .with_context(|| format!("suite {} has no test {test}", suite.name)),
    }
}
