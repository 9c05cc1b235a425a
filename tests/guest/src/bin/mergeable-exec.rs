// SPDX-License-Identifier: GPL-2.0
//! `mergeable-exec COMMAND [ARG…]`: run an unmodified program with all its
//! anonymous memory open to merging.
//!
//! `PR_SET_MEMORY_MERGE` is inherited over `exec`, so the program itself needs no change.

use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use rksm_guest_tests::sys;

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    let Some(program) = args.next() else {
        eprintln!("usage: mergeable-exec COMMAND [ARG…]");
        return ExitCode::from(2);
    };
    if let Err(e) = sys::set_memory_merge(true) {
        eprintln!("mergeable-exec: prctl(PR_SET_MEMORY_MERGE): {e}");
        return ExitCode::from(126);
    }
    let error = Command::new(&program).args(args).exec();
    eprintln!("mergeable-exec: {}: {error}", program.to_string_lossy());
    ExitCode::from(127)
}
