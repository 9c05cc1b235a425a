// SPDX-License-Identifier: GPL-2.0
//! Compare, case by case, the results of the kernel's own selftests with in-tree KSM and with rksm.

use crate::text::{
    find_skip, ktap_result, lines, number, split_digits, strip_cr, trim_end, trim_start, words,
};
use anyhow::{Context, Result};
use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// The result of a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It passed.
    Pass,
    /// It failed.
    Fail,
    /// It was skipped.
    Skip,
    /// The program died, or took too long.
    Crash,
    /// There is no such case.
    Missing,
}

impl Outcome {
    fn as_str(self) -> &'static str {
        match self {
            Outcome::Pass => "pass",
            Outcome::Fail => "fail",
            Outcome::Skip => "skip",
            Outcome::Crash => "crash",
            Outcome::Missing => "missing",
        }
    }
}

/// One case of one test, with one engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Case {
    /// The program, as the plan names it.
    pub test: Vec<u8>,
    /// The case within it.
    pub name: Vec<u8>,
    /// Its result.
    pub outcome: Outcome,
}

/// The name of the case for a program's exit.
const END: &[u8] = b"exit status";

/// Statuses from here on mean that `timeout` or a signal ended the program.
const STATUS_ENDED: u64 = 124;
/// The exit status of the kernel's selftests when they cannot run.
const STATUS_SKIP: u64 = 4;

/// The cases of one program, in the order of its output.
#[derive(Default)]
struct Cases {
    names: Vec<Vec<u8>>,
    times: HashMap<Vec<u8>, u32>,
    outcomes: HashMap<Vec<u8>, Outcome>,
}

impl Cases {
    /// Add a case. A repeated name is another case.
    fn put(&mut self, name: &[u8], outcome: Outcome) {
        let tab_to_space = |byte: &u8| if *byte == b'\t' { b' ' } else { *byte };
        let mut name: Vec<u8> = name.iter().map(tab_to_space).collect();
        let times = self.times.entry(name.clone()).or_default();
        *times = times.saturating_add(1);
        if *times > 1 {
            name.extend_from_slice(format!(" ({times})").as_bytes());
        }
        self.names.push(name.clone());
        self.outcomes.insert(name, outcome);
    }

    fn has_failed(&self) -> bool {
        self.outcomes.values().any(|o| *o == Outcome::Fail)
    }
}

/// Return the cases of one test. `status` is its program's exit status, as text, and `output` its output, if
/// there is a file of it.
///
/// A program that prints TAP has a case for each result line, and one for its exit; any other program is one
/// case. The kernel's own harness names its cases, other programs announce each with `[RUN]`.
pub fn cases(test: &[u8], status: Option<&[u8]>, output: Option<&[u8]>) -> Vec<Case> {
    let case = |name: &[u8], outcome| Case {
        test: test.to_vec(),
        name: name.to_vec(),
        outcome,
    };
    let Some(output) = output else {
        return vec![case(END, Outcome::Missing)];
    };
    let mut cases = Cases::default();
    let mut run = Vec::new();
    let mut bailed = false;
    let mut planned = 0;
    let mut seen = 0_u64;
    for line in lines(output).map(strip_cr) {
        if let Some(name) = line.strip_prefix(b"# [RUN] ") {
            run = [trim_end(name, b" "), b": "].concat();
        } else if let Some(why) = line.strip_prefix(b"Bail out!") {
            // Programs with a failed case end with that line as well.
            bailed |= !is_count_of_failures(why);
        } else if let Some(count) = line.strip_prefix(b"1..") {
            if count.first().is_some_and(u8::is_ascii_digit) {
                planned = number(count);
            }
        } else if let Some((ok, text)) = ktap_result(line) {
            seen += 1;
            let skip = find_skip(text);
            let text = skip.and_then(|at| text.get(..at)).unwrap_or(text);
            let outcome = match (skip, ok) {
                (Some(_), _) => Outcome::Skip,
                (None, true) => Outcome::Pass,
                (None, false) => Outcome::Fail,
            };
            let name = without_addresses(text);
            let name = trim_end(trim_start(&name, b" -"), b" #");
            cases.put(&[&run, name].concat(), outcome);
        }
    }
    let is_short = planned != 0 && seen != planned;
    cases.put(END, end(&cases, status, bailed || is_short));
    let outcome = |name: &[u8]| cases.outcomes.get(name).copied();
    cases
        .names
        .iter()
        .map(|name| case(name, outcome(name).unwrap_or(Outcome::Missing)))
        .collect()
}

/// Return the result of a program's exit: failed if it shows more than the cases do.
fn end(cases: &Cases, status: Option<&[u8]>, is_incomplete: bool) -> Outcome {
    let number = status.and_then(|text| {
        let text = text.trim_ascii();
        matches!(split_digits(text), ([_, ..], [])).then(|| number(text))
    });
    match (status, number) {
        (_, Some(STATUS_ENDED..)) => Outcome::Crash,
        _ if is_incomplete => Outcome::Fail,
        (_, Some(0)) => Outcome::Pass,
        (_, Some(STATUS_SKIP)) if cases.names.is_empty() => Outcome::Skip,
        (_, Some(STATUS_SKIP)) => Outcome::Pass,
        // Status 1 shows no more than a failed case did.
        (_, Some(1)) if cases.has_failed() => Outcome::Pass,
        (None, _) => Outcome::Missing,
        _ => Outcome::Fail,
    }
}

/// Return whether the text is ` 1 out of 2 tests failed`.
fn is_count_of_failures(why: &[u8]) -> bool {
    let counted = || {
        let (failed, text) = split_digits(why.strip_prefix(b" ")?);
        let (all, text) = split_digits(text.strip_prefix(b" out of ")?);
        let text = text.strip_prefix(b" tests failed");
        Some(!failed.is_empty() && !all.is_empty() && text.is_some())
    };
    counted() == Some(true)
}

/// Return the text with `N` for each hexadecimal number, as these vary from run to run.
fn without_addresses(mut text: &[u8]) -> Vec<u8> {
    let mut name = Vec::with_capacity(text.len());
    while let [first, rest @ ..] = text {
        let digits = text.strip_prefix(b"0x").unwrap_or_default();
        let after = trim_start(digits, b"0123456789abcdef");
        if after.len() < digits.len() {
            name.push(b'N');
            text = after;
        } else {
            name.push(*first);
            text = rest;
        }
    }
    name
}

/// The comparison of both engines' cases.
pub struct Comparison {
    /// A result line for each case, as KTAP.
    pub ktap: Vec<u8>,
    /// A line for each test, as Markdown.
    pub table: Vec<u8>,
    /// Whether rksm passes all that in-tree KSM passes.
    pub passed: bool,
}

/// A case with both engines.
struct Pair {
    ksm: Outcome,
    rksm: Outcome,
}

/// The verdict on a pair.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Passed,
    SkippedByBoth,
    SkippedByOne,
    FailsWithBoth,
    FailsWithRksm,
}

impl Pair {
    fn verdict(&self) -> Verdict {
        use Outcome::{Fail, Missing, Pass, Skip};
        match (self.ksm, self.rksm) {
            (_, Pass) => Verdict::Passed,
            (Skip, Skip) => Verdict::SkippedByBoth,
            // A program names a skipped case by the reason, so the other engine's name for it counts.
            (Skip, Missing) | (Missing, Skip) => Verdict::SkippedByOne,
            (Fail, Fail) => Verdict::FailsWithBoth,
            _ => Verdict::FailsWithRksm,
        }
    }
}

/// The line of the table for one test.
#[derive(Default)]
struct Sums {
    passed_ksm: u64,
    passed_rksm: u64,
    skipped: u64,
    fails_with_both: u64,
    fails_with_rksm: u64,
}

impl Sums {
    fn add(&mut self, pair: &Pair) {
        self.passed_ksm += u64::from(pair.ksm == Outcome::Pass);
        self.passed_rksm += u64::from(pair.rksm == Outcome::Pass);
        match pair.verdict() {
            Verdict::Passed => (),
            Verdict::SkippedByBoth | Verdict::SkippedByOne => self.skipped += 1,
            Verdict::FailsWithBoth => self.fails_with_both += 1,
            Verdict::FailsWithRksm => self.fails_with_rksm += 1,
        }
    }
}

const HEAD: &str = "\
| test | passed with in-tree KSM | passed with rksm | skipped by both | fails with both | fails with rksm only |
| --- | ---: | ---: | ---: | ---: | ---: |
";

/// Compare the cases of both engines. Of two cases with the same name, the later one counts.
pub fn compare(ksm: &[Case], rksm: &[Case]) -> Comparison {
    let mut order: Vec<(&[u8], &[u8])> = Vec::new();
    let mut pairs: HashMap<(&[u8], &[u8]), Pair> = HashMap::new();
    let both = ksm.iter().map(|case| (case, false));
    for (case, is_rksm) in both.chain(rksm.iter().map(|case| (case, true))) {
        let key = (case.test.as_slice(), case.name.as_slice());
        let pair = pairs.entry(key).or_insert_with(|| {
            order.push(key);
            Pair {
                ksm: Outcome::Missing,
                rksm: Outcome::Missing,
            }
        });
        match is_rksm {
            false => pair.ksm = case.outcome,
            true => pair.rksm = case.outcome,
        }
    }

    let mut ktap = format!("KTAP version 1\n1..{}\n", order.len()).into_bytes();
    let mut passed = true;
    let mut tests: Vec<(&[u8], Sums)> = Vec::new();
    let with_pairs = order.iter().filter_map(|key| Some((key, pairs.get(key)?)));
    for (i, ((test, name), pair)) in with_pairs.enumerate() {
        if !tests.iter().any(|(known, _)| known == test) {
            tests.push((test, Sums::default()));
        }
        if let Some((_, sums)) = tests.iter_mut().find(|(known, _)| known == test) {
            sums.add(pair);
        }
        let (result, directive) = match pair.verdict() {
            Verdict::Passed => ("ok", ""),
            Verdict::SkippedByBoth => ("ok", " # SKIP with both engines"),
            Verdict::SkippedByOne => ("ok", " # SKIP with one engine"),
            Verdict::FailsWithBoth => ("ok", " # SKIP fails with in-tree KSM, too"),
            Verdict::FailsWithRksm => ("not ok", ""),
        };
        // A directive within the name would count as ours.
        let mut name = [*test, b": ", *name].concat();
        name.retain(|byte| *byte != b'#');
        ktap.extend_from_slice(format!("{result} {} ", i.saturating_add(1)).as_bytes());
        ktap.extend_from_slice(&name);
        ktap.extend_from_slice(format!("{directive}\n").as_bytes());
        if pair.verdict() == Verdict::FailsWithRksm {
            passed = false;
            let (ksm, rksm) = (pair.ksm.as_str(), pair.rksm.as_str());
            ktap.extend_from_slice(format!("# in-tree {ksm}, rksm {rksm}\n").as_bytes());
        }
    }

    let mut table = HEAD.as_bytes().to_vec();
    for (test, sums) in tests {
        let Sums {
            passed_ksm,
            passed_rksm,
            skipped,
            fails_with_both,
            fails_with_rksm,
        } = sums;
        let columns = format!(
            "` | {passed_ksm} | {passed_rksm} | {skipped} | {fails_with_both} | {fails_with_rksm} |\n"
        );
        table.extend_from_slice(&[b"| `", test, columns.as_bytes()].concat());
    }
    Comparison {
        ktap,
        table,
        passed,
    }
}

/// Read the cases of all tests of the plan for one engine from `dir`, and write them down there.
fn read_cases(dir: &Path, engine: &str, plan: &[u8]) -> Result<Vec<Case>> {
    let left = |test: &[u8], what: &[u8]| {
        let file = [test, what].concat();
        fs::read(dir.join(engine).join(OsStr::from_bytes(&file))).ok()
    };
    let tests = lines(plan).filter_map(|line| words(line).next());
    let found: Vec<Case> = tests
        .flat_map(|test| {
            let (status, output) = (left(test, b".status"), left(test, b".last"));
            cases(test, status.as_deref(), output.as_deref())
        })
        .collect();
    let mut text = Vec::new();
    for case in &found {
        let outcome = case.outcome.as_str().as_bytes();
        text.extend_from_slice(&[&case.test, &case.name, outcome].join(&b'\t'));
        text.push(b'\n');
    }
    write(&dir.join(format!("{engine}.cases")), &text)?;
    Ok(found)
}

/// Compare the results of scripts/conformance-guest in `dir`, print the comparison, and write `table.md`
/// there. Return whether rksm passes all that in-tree KSM passes.
pub fn run(dir: &Path, out: &mut impl Write) -> Result<bool> {
    let plan = dir.join("plan");
    let plan = fs::read(&plan).with_context(|| format!("cannot read {}", plan.display()))?;
    let ksm = read_cases(dir, "ksm", &plan)?;
    let rksm = read_cases(dir, "rksm", &plan)?;
    let compared = compare(&ksm, &rksm);
    write(&dir.join("table.md"), &compared.table)?;
    out.write_all(&compared.ktap)?;
    out.write_all(b"\n")?;
    for line in lines(&compared.table) {
        out.write_all(&[b"# ", line, b"\n"].concat())?;
    }
    out.flush()?;
    Ok(compared.passed)
}

fn write(path: &Path, text: &[u8]) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KSM: usize = 0;
    const RKSM: usize = 1;

    /// The results of two tests, a and b, with each engine: status and output.
    #[derive(Clone)]
    struct Left {
        a: [(Option<&'static str>, &'static str); 2],
        b: [(Option<&'static str>, &'static str); 2],
    }

    /// Test a has a case that fails and one that is skipped, with both engines.
    fn left() -> Left {
        let output = "TAP version 13\nok 1 one\nnot ok 2 two\nok 3 three # SKIP here\n";
        Left {
            a: [(Some("1\n"), output); 2],
            b: [(Some("0\n"), "OK\n"); 2],
        }
    }

    /// Test a as given, and test b passed.
    fn with(ksm: (&'static str, &'static str), rksm: (&'static str, &'static str)) -> Left {
        Left {
            a: [(Some(ksm.0), ksm.1), (Some(rksm.0), rksm.1)],
            ..left()
        }
    }

    /// Test a as given with rksm, and as in [`left`] with in-tree KSM.
    fn with_rksm(status: &'static str, output: &'static str) -> Left {
        let mut left = left();
        left.a[RKSM] = (Some(status), output);
        left
    }

    fn cases_of(left: &Left, engine: usize) -> Vec<Case> {
        let of = |test: &str, (status, output): (Option<&str>, &str)| {
            cases(
                test.as_bytes(),
                status.map(str::as_bytes),
                Some(output.as_bytes()),
            )
        };
        [of("a", left.a[engine]), of("b", left.b[engine])].concat()
    }

    /// `+` for each case that is ok, `s` for one that is skipped, `-` for one that is not ok.
    fn results(left: &Left) -> String {
        let compared = compare(&cases_of(left, KSM), &cases_of(left, RKSM));
        let mut results = String::new();
        for line in lines(&compared.ktap) {
            match ktap_result(line) {
                Some((true, rest)) if find_skip(rest).is_some() => results.push('s'),
                Some((true, _)) => results.push('+'),
                Some((false, _)) => results.push('-'),
                None => (),
            }
        }
        assert_eq!(compared.passed, !results.contains('-'));
        results
    }

    #[test]
    fn fails_and_skips_with_both_are_no_failure() {
        assert_eq!(results(&left()), "+ss++");
    }

    #[test]
    fn fails_with_rksm_only() {
        let rksm = with_rksm("1", "not ok 1 one\nok 2 two\nok 3 three\n");
        assert_eq!(results(&rksm), "-++++");
    }

    #[test]
    fn a_case_is_missing_with_rksm() {
        let rksm = with_rksm("0", "ok 1 one\nok 3 three\n");
        assert_eq!(results(&rksm), "+-+++");
    }

    #[test]
    fn a_case_that_both_skip_for_other_reasons() {
        let rksm = with_rksm("1", "ok 1 one\nnot ok 2 two\nok 3 # SKIP no memory\n");
        assert_eq!(results(&rksm), "+ss++s");
    }

    #[test]
    fn a_case_that_only_rksm_skips() {
        let rksm = with_rksm("1", "ok 1 # SKIP no memory\nnot ok 2 two\nok 3 three\n");
        assert_eq!(results(&rksm), "-s+++s");
    }

    #[test]
    fn a_crash_after_all_cases_passed() {
        let rksm = with_rksm("139", "ok 1 one\nok 2 two\nok 3 three\n");
        assert_eq!(results(&rksm), "+++-+");
    }

    #[test]
    fn a_failure_that_no_case_shows() {
        let rksm = with_rksm("1", "ok 1 one\nok 2 two\nok 3 three\n");
        assert_eq!(results(&rksm), "+++-+");
    }

    #[test]
    fn the_usual_end_of_a_program_with_a_failed_case() {
        let output = "1..2\nnot ok 1 one\nok 2 two\nBail out! 1 out of 2 tests failed\n";
        assert_eq!(results(&with(("1", output), ("1", output))), "s+++");
    }

    #[test]
    fn the_program_gave_up_after_all_cases() {
        let ksm = ("0", "ok 1 one\nok 2 two\nok 3 three\n");
        let rksm = ("1", "not ok 1 one\nok 2 two\nok 3 three\nBail out! here\n");
        assert_eq!(results(&with(ksm, rksm)), "-++-+");
    }

    #[test]
    fn fewer_results_than_announced() {
        let ksm = ("0", "ok 1 one\nok 2 two\nok 3 three\n");
        let rksm = ("0", "1..4\nok 1 one\nok 2 two\nok 3 three\n");
        assert_eq!(results(&with(ksm, rksm)), "+++-+");
    }

    #[test]
    fn a_crash_with_both() {
        let crash = ("139", "ok 1 one\n");
        assert_eq!(results(&with(crash, crash)), "+-+");
    }

    #[test]
    fn the_second_of_two_cases_of_one_name_is_missing_with_rksm() {
        let ksm = ("0", "ok 1 one\nok 2 one\n");
        assert_eq!(results(&with(ksm, ("0", "ok 1 one\n"))), "+-++");
    }

    #[test]
    fn the_first_of_two_cases_of_one_name_is_skipped_with_rksm_only() {
        let ksm = ("0", "ok 1 one\nok 2 one\n");
        let rksm = ("0", "ok 1 one # SKIP\nok 2 one\n");
        assert_eq!(results(&with(ksm, rksm)), "-+++");
    }

    #[test]
    fn a_test_is_skipped_with_rksm_only() {
        let passed = ("0", "ok 1 one\nok 2 two\nok 3 three\n");
        let mut left = with(passed, passed);
        left.b[RKSM] = (Some("4\n"), "SKIP\n");
        assert_eq!(results(&left), "++++-");
    }

    #[test]
    fn a_test_was_not_run_with_rksm() {
        let passed = ("0", "ok 1 one\nok 2 two\nok 3 three\n");
        let mut left = with(passed, passed);
        left.b[RKSM] = (None, "SKIP\n");
        assert_eq!(results(&left), "++++-");
    }

    /// A directive between the number and the end of a result line.
    #[test]
    fn names() {
        let output = b"\
# [RUN] Basic COW  \r
ok 1 No leak\r
ok 2 - at 0x7f00a and 0xZ # skip none
not ok 3 -- # of\ttwo ##
ok 4
";
        let found = cases(b"a", Some(b"1"), Some(output));
        let found: Vec<_> = found
            .iter()
            .map(|case| (String::from_utf8_lossy(&case.name), case.outcome.as_str()))
            .map(|(name, outcome)| format!("{name}={outcome}"))
            .collect();
        assert_eq!(
            found,
            [
                "Basic COW: No leak=pass",
                "Basic COW: at N and 0xZ=skip",
                "Basic COW: # of two=fail",
                "Basic COW: =pass",
                "exit status=pass",
            ]
        );
    }

    #[test]
    fn how_a_program_ends() {
        let ended = |status: Option<&str>, output: Option<&str>| {
            let output = output.map(str::as_bytes);
            let found = cases(b"a", status.map(str::as_bytes), output);
            assert_eq!(found.last().unwrap().name, END);
            found.last().unwrap().outcome
        };
        for (status, output, outcome) in [
            (Some("0"), Some(""), Outcome::Pass),
            (Some("0"), None, Outcome::Missing),
            (None, None, Outcome::Missing),
            (None, Some(""), Outcome::Missing),
            (None, Some("Bail out!"), Outcome::Fail),
            (Some(""), Some(""), Outcome::Fail),
            (Some("nonsense"), Some(""), Outcome::Fail),
            (Some("1"), Some("ok 1 a"), Outcome::Fail),
            (Some("1"), Some("not ok 1 a"), Outcome::Pass),
            (Some("2"), Some("not ok 1 a"), Outcome::Fail),
            (Some("4"), Some("SKIP"), Outcome::Skip),
            (Some("4"), Some("ok 1 a # SKIP"), Outcome::Pass),
            (Some("123"), Some(""), Outcome::Fail),
            (Some("124"), Some("Bail out!"), Outcome::Crash),
            (Some("0"), Some("Bail out! 1 out of 2"), Outcome::Fail),
            (Some("0"), Some("1..0 # SKIP"), Outcome::Pass),
            (Some("0"), Some("1..x"), Outcome::Pass),
        ] {
            assert_eq!(ended(status, output), outcome, "{status:?} {output:?}");
        }
    }

    #[test]
    fn table() {
        let compared = compare(&cases_of(&left(), KSM), &cases_of(&left(), RKSM));
        let expected = format!("{HEAD}| `a` | 2 | 2 | 1 | 1 | 0 |\n| `b` | 1 | 1 | 0 | 0 | 0 |\n");
        assert_eq!(String::from_utf8(compared.table).unwrap(), expected);
        assert_eq!(
            String::from_utf8(compared.ktap).unwrap(),
            "KTAP version 1\n1..5\nok 1 a: one\nok 2 a: two # SKIP fails with in-tree KSM, too\n\
             ok 3 a: three # SKIP with both engines\nok 4 a: exit status\nok 5 b: exit status\n"
        );
    }

    #[test]
    fn what_failed_is_said() {
        let left = with(("0", "ok 1 one # two\n"), ("0", ""));
        let compared = compare(&cases_of(&left, KSM), &cases_of(&left, RKSM));
        let text = String::from_utf8(compared.ktap).unwrap();
        let said = "not ok 1 a: one  two\n# in-tree pass, rksm missing\n";
        assert!(text.contains(said), "{text}");
    }
}
