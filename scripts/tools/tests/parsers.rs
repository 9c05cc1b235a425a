// SPDX-License-Identifier: GPL-2.0
//! Tests of the parsers of test output and kernel logs: the program as the scripts call it, and any bytes as
//! input. The parsers' own files test their results.

use proptest::prelude::*;
use rksm_tools::{conformance, ktap, log_check, text};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

/// A directory of its own, removed when dropped.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let next = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("rksm-parsers-{}-{next}", std::process::id());
        let dir = std::env::temp_dir().join(name);
        fs::create_dir_all(&dir).unwrap();
        Scratch(dir)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_rksm-tools"));
        command.args(args).current_dir(&self.0).stdin(Stdio::null());
        command
    }

    /// Run the program. Return its status and standard output.
    fn run(&self, args: &[&str]) -> (i32, Vec<u8>) {
        let Output { status, stdout, .. } = self.command(args).output().unwrap();
        (status.code().unwrap(), stdout)
    }

    fn write(&self, file: &str, text: &[u8]) {
        let path = self.0.join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn read(&self, file: &str) -> String {
        fs::read_to_string(self.0.join(file)).unwrap()
    }

    /// Count the results of a script. Return the status, the output, and the tally.
    fn sum(&self, script: &str) -> (i32, Vec<u8>, String) {
        let _ = fs::remove_file(self.0.join("tally"));
        let (status, out) = self.run(&["ktap-sum", "stage", "tally", "sh", "-c", script]);
        (status, out, self.read("tally"))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn both_outputs_are_shown_as_they_are() {
    let script = r"printf 'ok 1 \377\000\r\n'; printf 'not ok 2 b' >&2; exit 1";
    let (status, out, tally) = Scratch::new().sum(script);
    assert_eq!(
        String::from_utf8_lossy(&out),
        "ok 1 \u{fffd}\0\r\nnot ok 2 b\n"
    );
    assert_eq!((status, tally.as_str()), (1, "stage 1 1 0\n"));
}

#[test]
fn lines_are_shown_as_they_come() {
    let scratch = Scratch::new();
    // Each line is printed only after the one before has arrived here.
    let script = "for i in 1 2 3; do echo ok $i a; read -r line; done";
    let mut child = scratch
        .command(&["ktap-sum", "stage", "tally", "sh", "-c", script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    for i in 1..=3 {
        assert_eq!(lines.next().unwrap().unwrap(), format!("ok {i} a"));
        input.write_all(b"seen\n").unwrap();
    }
    assert!(lines.next().is_none());
    assert!(child.wait().unwrap().success());
    assert_eq!(scratch.read("tally"), "stage 3 0 0\n");
}

#[test]
fn statuses_of_the_command() {
    let scratch = Scratch::new();
    let outcome = |script: &str| {
        let (status, out, tally) = scratch.sum(script);
        (status, String::from_utf8(out).unwrap(), tally)
    };
    let expected = |status, out: &str, tally: &str| (status, out.to_string(), tally.to_string());
    assert_eq!(
        outcome("echo ok 1 a"),
        expected(0, "ok 1 a\n", "stage 1 0 0\n")
    );
    assert_eq!(
        outcome("echo ok 1 a; exit 3"),
        expected(
            1,
            "ok 1 a\n# stage: exit status 3 although no test failed\n",
            "stage 1 1 0\n"
        )
    );
    assert_eq!(
        outcome("echo ok 1 a; kill -KILL $$"),
        expected(
            1,
            "ok 1 a\n# stage: exit status 137 although no test failed\n",
            "stage 1 1 0\n"
        )
    );
    assert_eq!(
        outcome("echo all is well"),
        expected(
            1,
            "all is well\n# stage: no test was run (exit status 0)\n",
            "stage 0 1 0\n"
        )
    );
}

#[test]
fn a_command_that_is_not_there_failed() {
    let scratch = Scratch::new();
    let (status, out) = scratch.run(&["ktap-sum", "stage", "tally", "./absent"]);
    let out = String::from_utf8(out).unwrap();
    assert_eq!(status, 1);
    assert!(
        out.ends_with("# stage: no test was run (exit status 127)\n"),
        "{out}"
    );
}

#[test]
fn stages_add_up() {
    let scratch = Scratch::new();
    // The options belong to the command.
    for (stage, line) in [("one", "ok 1 --help"), ("two", "ok 1 # SKIP -h")] {
        let (status, out) = scratch.run(&["ktap-sum", stage, "tally", "echo", line]);
        assert_eq!(
            (status, out),
            (0, format!("{line}\n").into_bytes()),
            "{stage}"
        );
    }
    assert_eq!(scratch.read("tally"), "one 1 0 0\ntwo 0 0 1\n");
    let (status, out) = scratch.run(&["ktap-sum", "--total", "tally"]);
    assert_eq!(
        (status, &out[..]),
        (0, &b"1 passed, 0 failed, 1 skipped\n"[..])
    );
    scratch.write("tally", b"");
    let (status, out) = scratch.run(&["ktap-sum", "--total", "tally"]);
    assert_eq!((status, &out[..]), (1, &b"0 passed, 1 failed\n"[..]));
}

#[test]
fn a_command_ends_when_nobody_takes_its_output() {
    let scratch = Scratch::new();
    let mut child = scratch
        .command(&["ktap-sum", "stage", "tally", "yes", "ok 1"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    out.read_line(&mut line).unwrap();
    drop(out);
    assert_eq!(child.wait().unwrap().code(), Some(2));
}

#[test]
fn wrong_calls_are_no_verdict() {
    let scratch = Scratch::new();
    scratch.write("log", b"");
    for args in [
        &["ktap-sum"][..],
        &["ktap-sum", "stage", "tally"],
        &["ktap-sum", "--total"],
        &["ktap-sum", "--total", "absent"],
        &["ktap-sum", "--total", "log", "log"],
        &["ktap-sum", "stage", "absent/tally", "echo", "ok 1 a"],
        &["log-check"],
        &["log-check", "absent"],
        &["log-check", "."],
        &["log-check", "log", "log"],
        &["conformance"],
        &["conformance", "absent"],
    ] {
        assert_eq!(scratch.run(args).0, 2, "{args:?}");
    }
}

#[test]
fn logs() {
    let scratch = Scratch::new();
    scratch.write("log", b"[    1.0] all is \xff\n[    2.0] well");
    assert_eq!(scratch.run(&["log-check", "log"]), (0, vec![]));
    scratch.write(
        "log",
        b"[    1.0] \xff\0\r\n[    2.0] BUG: Bad page \xff\r\n[    3.0] cut",
    );
    let (status, out) = scratch.run(&["log-check", "log"]);
    let expected =
        b"kernel log of the guest:\n  ---\n  [    1.0] \xff\0\n  [    2.0] BUG: Bad page \xff\n  [    3.0] cut\n";
    assert_eq!((status, &out[..]), (1, &expected[..]));
}

#[test]
fn engines() {
    let scratch = Scratch::new();
    scratch.write("plan", b"a 9 1 ./a\n b 9 1 ./b -x\n");
    for engine in ["ksm", "rksm"] {
        scratch.write(
            &format!("{engine}/a.last"),
            b"ok 1 \xff\nnot ok 2 two\nok 3 # SKIP",
        );
        scratch.write(&format!("{engine}/a.status"), b"1\n");
        scratch.write(&format!("{engine}/b.last"), b"OK\n");
        scratch.write(&format!("{engine}/b.status"), b"0\n");
    }
    let table = "\
| test | passed with in-tree KSM | passed with rksm | skipped by both | fails with both | fails with rksm only |
| --- | ---: | ---: | ---: | ---: | ---: |
| `a` | 2 | 2 | 1 | 1 | 0 |
| `b` | 1 | 1 | 0 | 0 | 0 |
";
    let shown = table.replace("| test", "# | test").replace("\n|", "\n# |");
    let (status, out) = scratch.run(&["conformance", "."]);
    assert_eq!(
        String::from_utf8_lossy(&out),
        format!(
            "KTAP version 1\n1..5\nok 1 a: \u{fffd}\n\
             ok 2 a: two # SKIP fails with in-tree KSM, too\n\
             ok 3 a:  # SKIP with both engines\nok 4 a: exit status\nok 5 b: exit status\n\n{shown}"
        )
    );
    assert_eq!(status, 0);
    assert_eq!(scratch.read("table.md"), table);
    let cases = fs::read(scratch.0.join("rksm.cases")).unwrap();
    assert_eq!(
        String::from_utf8_lossy(&cases),
        "a\t\u{fffd}\tpass\na\ttwo\tfail\na\t\tskip\na\texit status\tpass\nb\texit status\tpass\n"
    );
    assert!(scratch.0.join("ksm.cases").exists());

    for file in ["status", "last"] {
        fs::remove_file(scratch.0.join(format!("rksm/b.{file}"))).unwrap();
        let (status, out) = scratch.run(&["conformance", "."]);
        let out = String::from_utf8_lossy(&out);
        assert_eq!(status, 1);
        let said = "not ok 5 b: exit status\n# in-tree pass, rksm missing\n";
        assert!(out.contains(said), "{out}");
    }
}

/// The strings that the parsers search for, in pieces.
const PIECES: &[&str] = &[
    "\n",
    "\r\n",
    " ",
    "    ",
    "\t",
    "0",
    "1",
    "4",
    "139",
    "999999999999999999999",
    "0x",
    "f",
    "ok ",
    "not ok ",
    "ok 1 a",
    "# SKIP",
    "#",
    "- ",
    "1..",
    "test ",
    " ... ok",
    " ... FAILED",
    " ... ignored",
    "# [RUN] ",
    "Bail out!",
    " out of ",
    " tests failed",
    "[",
    "]",
    "<",
    ">",
    "[    1.0] ",
    "WARNING: ",
    "BUG: ",
    "Call Trace:",
    "rcu",
    "detected",
    " stall",
    "blocked for more than ",
    " seconds",
    "invoked oom-killer: ",
    "Memory cgroup stats for ",
    "/rksm-oom:",
    "oom-kill:constraint=",
    "constraint=CONSTRAINT_MEMCG,",
    "oom_memcg=/rksm-oom,",
    "Out of memory and no killable processes",
    "vmalloc error: ",
    " vm_struct allocation failed",
    "Failed to disarm kprobe-ftrace at __x64_sys_delete_module",
    " (error -12)",
    "at disarm_kprobe_ftrace",
];

/// Any bytes, and strings that are similar to what the parsers search for.
fn input() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        6 => prop::sample::select(PIECES).prop_map(|piece| piece.as_bytes().to_vec()),
        1 => prop::collection::vec(any::<u8>(), 0..4),
    ];
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..300),
        prop::collection::vec(piece, 0..80).prop_map(|pieces| pieces.concat()),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_results_are_counted(input in input(), status in any::<i32>()) {
        let mut counter = ktap::Counter::default();
        let mut lines = 0;
        for line in text::lines(&input) {
            counter.line(line);
            lines += 1;
        }
        let mut counts = counter.counts();
        // A line of cargo may count for all three results.
        prop_assert!(counts.passed + counts.failed + counts.skipped <= 3 * lines);
        let said = counts.judge(status);
        prop_assert!(counts != ktap::Counts::default());
        prop_assert!(status == 0 || counts.failed > 0);
        prop_assert!(said.is_none() || counts.failed == 1);
    }

    #[test]
    fn any_tally_is_summed(input in input()) {
        let (sum, good) = ktap::total(&input);
        prop_assert_eq!(good, sum.contains(" passed, 0 failed"));
    }

    #[test]
    fn any_log_is_checked(input in input()) {
        let mut out = Vec::new();
        let clean = log_check::is_clean(&input[..], &mut out).unwrap();
        prop_assert_eq!(clean, out.is_empty());
        // At most a header, twenty separators, and each line once.
        prop_assert!(text::lines(&out).count() <= 21 + text::lines(&input).count());
    }

    #[test]
    fn any_outputs_are_compared(
        outputs in prop::collection::vec(prop::option::of(input()), 2),
        statuses in prop::collection::vec(prop::option::of(input()), 2),
    ) {
        let of = |engine: usize| conformance::cases(b"a", statuses[engine].as_deref(), outputs[engine].as_deref());
        let (ksm, rksm) = (of(0), of(1));
        prop_assert!(!ksm.is_empty() && !rksm.is_empty());
        let same = conformance::compare(&ksm, &ksm);
        let crashed = |case: &conformance::Case| {
            matches!(case.outcome, conformance::Outcome::Crash | conformance::Outcome::Missing)
        };
        prop_assert_eq!(same.passed, !ksm.iter().any(crashed));
        let compared = conformance::compare(&ksm, &rksm);
        let fails = text::lines(&compared.ktap)
            .filter(|line| matches!(text::ktap_result(line), Some((false, _))))
            .count();
        prop_assert_eq!(compared.passed, fails == 0);
        prop_assert_eq!(text::lines(&compared.table).count(), 3);
    }
}
