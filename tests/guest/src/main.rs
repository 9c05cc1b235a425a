// SPDX-License-Identifier: GPL-2.0
//! `rksm-guest-tests run [THEME…]`: run the tests as root in a guest.

use std::process::ExitCode;

use anyhow::{bail, Result};

use rksm_guest_tests::harness::{self, Theme};
use rksm_guest_tests::themes::ALL;
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
        // What a test's worker becomes when it execs itself.
        ["worker", fd] => Ok(worker::serve_inherited(fd.parse()?) as u8),
        _ => bail!("usage: rksm-guest-tests list | run [THEME…]"),
    }
}

fn select(names: &[&str]) -> Result<Vec<&'static Theme>> {
    if let Some(unknown) = names.iter().find(|n| ALL.iter().all(|t| t.name != **n)) {
        bail!("no theme {unknown}; see rksm-guest-tests list");
    }
    Ok(ALL
        .iter()
        .copied()
        .filter(|t| names.is_empty() || names.contains(&t.name))
        .collect())
}
