// SPDX-License-Identifier: GPL-2.0
//! Count the results that a command prints: those of KTAP and of cargo test.

use crate::text::{
    contains, find_skip, for_each_line, ktap_result, lines, number, strip_cr, trim_start, words,
};
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::OpenOptions;
use std::io::{self, BufReader, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};

/// The number of tests by result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Passed.
    pub passed: u64,
    /// Failed.
    pub failed: u64,
    /// Skipped.
    pub skipped: u64,
}

impl Counts {
    /// Count a command as one failure if it shows none, but has a non-zero `status` or no result at all.
    /// Return the message about that.
    pub fn judge(&mut self, status: i32) -> Option<String> {
        if *self == Counts::default() {
            self.failed = 1;
            Some(format!("no test was run (exit status {status})"))
        } else if status != 0 && self.failed == 0 {
            self.failed = 1;
            Some(format!("exit status {status} although no test failed"))
        } else {
            None
        }
    }
}

/// Results at one indentation that no line has summed up so far.
#[derive(Default)]
struct Block {
    results: u64,
    failed: u64,
}

/// A counter that works line by line.
#[derive(Default)]
pub struct Counter {
    counts: Counts,
    blocks: BTreeMap<usize, Block>,
}

impl Counter {
    /// Take the next line into account.
    pub fn line(&mut self, line: &[u8]) {
        let line = strip_cr(line);
        let text = trim_start(line, b" ");
        if let Some((ok, rest)) = ktap_result(text) {
            self.result(line.len() - text.len(), ok, find_skip(rest).is_some());
        } else if let Some(text) = line.strip_prefix(b"test ") {
            if text.ends_with(b" ... ok") {
                self.result(0, true, false);
            }
            if text.ends_with(b" ... FAILED") {
                self.result(0, false, false);
            }
            if contains(text, b" ... ignored") {
                self.result(0, true, true);
            }
        }
    }

    fn result(&mut self, depth: usize, ok: bool, skip: bool) {
        let inner = self.blocks.split_off(&depth.saturating_add(1));
        let block = self.blocks.entry(depth).or_default();
        block.results += 1;
        block.failed += u64::from(!ok);
        if !inner.is_empty() {
            // This is a sum. It only counts if it fails and no inner result shows a failure.
            if !ok && inner.values().all(|block| block.failed == 0) {
                self.counts.failed += 1;
            }
        } else if skip {
            self.counts.skipped += 1;
        } else if ok {
            self.counts.passed += 1;
        } else {
            self.counts.failed += 1;
        }
    }

    /// Return the total of all lines so far.
    pub fn counts(&self) -> Counts {
        self.counts
    }
}

/// Run a command, pass its output on to `out` line by line, count the results in it, and append "STAGE passed
/// failed skipped" to the file `tally`. Return whether nothing failed.
pub fn run(
    stage: &OsStr,
    tally: &Path,
    command: &[OsString],
    out: &mut impl Write,
) -> Result<bool> {
    // Use the shell, as Rust 1.85 cannot make one pipe of two outputs. It is gone when the command runs.
    let mut child = Command::new("/bin/sh")
        .args(["-c", "exec \"$@\" 2>&1", "ktap-sum"])
        .args(command)
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run /bin/sh")?;
    let mut counter = Counter::default();
    let shown = match child.stdout.take() {
        Some(pipe) => show(BufReader::new(pipe), &mut counter, out),
        None => Ok(()),
    };
    // The pipe is closed by now, which ends a command that still writes to it.
    let status = child.wait().context("cannot wait for the command")?;
    shown.context("cannot pass the output on")?;

    let mut counts = counter.counts();
    if let Some(why) = counts.judge(shell_status(status)) {
        let said = [b"# ", stage.as_bytes(), b": ", why.as_bytes(), b"\n"].concat();
        out.write_all(&said)?;
        out.flush()?;
    }
    let Counts {
        passed,
        failed,
        skipped,
    } = counts;
    let sum = format!(" {passed} {failed} {skipped}\n");
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(tally)
        .and_then(|mut file| file.write_all(&[stage.as_bytes(), sum.as_bytes()].concat()))
        .with_context(|| format!("cannot write {}", tally.display()))?;
    Ok(failed == 0)
}

fn show(
    output: BufReader<impl io::Read>,
    counter: &mut Counter,
    out: &mut impl Write,
) -> io::Result<()> {
    for_each_line(output, |line| {
        out.write_all(line)?;
        out.write_all(b"\n")?;
        out.flush()?;
        counter.line(line);
        Ok(())
    })
}

/// Return the status as in the shell's `$?`.
fn shell_status(status: ExitStatus) -> i32 {
    let signal = || status.signal().unwrap_or(0).saturating_add(128);
    status.code().unwrap_or_else(signal)
}

/// Return "N passed, N failed[, N skipped]" for a tally, and whether nothing failed. A tally without a stage
/// is a failure.
pub fn total(tally: &[u8]) -> (String, bool) {
    let mut sum = Counts::default();
    let mut stages = 0_u64;
    for line in lines(tally) {
        let mut fields = words(line).skip(1).map(number);
        for count in [&mut sum.passed, &mut sum.failed, &mut sum.skipped] {
            *count = count.saturating_add(fields.next().unwrap_or(0));
        }
        stages += 1;
    }
    if stages == 0 {
        sum.failed = 1;
    }
    let mut text = format!("{} passed, {} failed", sum.passed, sum.failed);
    if sum.skipped != 0 {
        text.push_str(&format!(", {} skipped", sum.skipped));
    }
    (text, sum.failed == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Return the counts for the output of a command that ended with `status`.
    fn sum(output: &str, status: i32) -> (u64, u64, u64) {
        let mut counter = Counter::default();
        for line in lines(output.as_bytes()) {
            counter.line(line);
        }
        let mut counts = counter.counts();
        counts.judge(status);
        (counts.passed, counts.failed, counts.skipped)
    }

    #[test]
    fn flat_results() {
        let output = "\
KTAP version 1
1..4
ok 1 a
not ok 2 b
ok 3 - c # SKIP no swap
# a comment: ok 9 x
ok 4 d
";
        assert_eq!(sum(output, 1), (2, 1, 1));
        assert_eq!(sum(&output.replace('\n', "\r\n"), 1), (2, 1, 1));
    }

    #[test]
    fn a_line_that_sums_up_a_block_is_not_counted() {
        let output = "\
KTAP version 1
1..2
    KTAP version 1
    1..2
    ok 1 a
    not ok 2 b
not ok 1 first
    1..2
    ok 1 a
    ok 2 b
ok 2 second
";
        assert_eq!(sum(output, 1), (3, 1, 0));
    }

    #[test]
    fn a_block_that_fails_as_a_whole_is_counted() {
        assert_eq!(sum("    ok 1 a\nnot ok 1 block\n", 1), (1, 1, 0));
    }

    #[test]
    fn blocks_in_blocks() {
        let output = "\
        ok 1 a
        not ok 2 b
    not ok 1 inner
    ok 2 c # SKIP
not ok 1 outer
ok 2 d
";
        assert_eq!(sum(output, 1), (2, 1, 1));
    }

    #[test]
    fn results_of_cargo() {
        let output = "\
running 3 tests
test a::b ... ok
test a::c ... FAILED
test a::d ... ignored
test result: FAILED. 1 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out
";
        assert_eq!(sum(output, 101), (1, 1, 1));
        let output = "\
test a - should panic ... ok
test b ... ignored, takes an hour
test ... ok
test c ... okay
 test d ... ok
";
        assert_eq!(sum(output, 0), (1, 0, 1));
    }

    #[test]
    fn a_bad_status_without_a_failure_is_one() {
        assert_eq!(sum("ok 1 a\n", 3), (1, 1, 0));
        assert_eq!(sum("not ok 1 a\n", 3), (0, 1, 0));
        assert_eq!(sum("ok 1 a\n", 0), (1, 0, 0));
    }

    #[test]
    fn a_stage_without_results_failed() {
        assert_eq!(sum("all is well\n", 0), (0, 1, 0));
        assert_eq!(sum("", 0), (0, 1, 0));
    }

    #[test]
    fn a_stage_that_only_skips_passes() {
        assert_eq!(sum("ok 1 a # SKIP\n", 0), (0, 0, 1));
    }

    #[test]
    fn total_without_failures() {
        let expected = ("3 passed, 0 failed".to_string(), true);
        assert_eq!(total(b"a 2 0 0\nb 1 0 0\n"), expected);
    }

    #[test]
    fn total_with_failures() {
        let expected = ("2 passed, 1 failed, 1 skipped".to_string(), false);
        assert_eq!(total(b"a 2 0 1\nb 0 1 0\n"), expected);
    }

    #[test]
    fn nothing_is_a_failure() {
        assert_eq!(total(b""), ("0 passed, 1 failed".to_string(), false));
    }

    #[test]
    fn total_of_a_line_that_is_cut() {
        assert_eq!(
            total(b"a 2 0 1\nb 1"),
            ("3 passed, 0 failed, 1 skipped".to_string(), true)
        );
    }
}
