// SPDX-License-Identifier: GPL-2.0
//! Helpers that the parsers of test output and kernel logs share.
//!
//! All of them work on bytes: a test, or a kernel in trouble, may print anything.

use std::io::{self, BufRead};

/// Call `f` with each line as soon as it is there, and with the text after the last newline.
pub fn for_each_line(
    mut input: impl BufRead,
    mut f: impl FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut line = Vec::new();
    while input.read_until(b'\n', &mut line)? != 0 {
        f(line.strip_suffix(b"\n").unwrap_or(&line))?;
        line.clear();
    }
    Ok(())
}

/// Return the lines of `text`, without their ends.
pub fn lines(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.split_inclusive(|&byte| byte == b'\n')
        .map(|line| line.strip_suffix(b"\n").unwrap_or(line))
}

/// Return the words of `line`, as the shell splits it.
pub fn words(line: &[u8]) -> impl Iterator<Item = &[u8]> {
    line.split(|byte| b" \t".contains(byte))
        .filter(|word| !word.is_empty())
}

/// Return a line without the carriage return that a serial console puts before the newline.
pub fn strip_cr(line: &[u8]) -> &[u8] {
    line.strip_suffix(b"\r").unwrap_or(line)
}

/// Return `text` without leading `bytes`.
pub fn trim_start<'a>(mut text: &'a [u8], bytes: &[u8]) -> &'a [u8] {
    while let [first, rest @ ..] = text {
        if !bytes.contains(first) {
            break;
        }
        text = rest;
    }
    text
}

/// Return `text` without trailing `bytes`.
pub fn trim_end<'a>(mut text: &'a [u8], bytes: &[u8]) -> &'a [u8] {
    while let [rest @ .., last] = text {
        if !bytes.contains(last) {
            break;
        }
        text = rest;
    }
    text
}

/// Return the digits at the start of `text`, and the rest.
pub fn split_digits(text: &[u8]) -> (&[u8], &[u8]) {
    let rest = trim_start(text, b"0123456789");
    text.split_at(text.len() - rest.len())
}

/// Return the number at the start of `text`, or 0.
pub fn number(text: &[u8]) -> u64 {
    let (digits, _) = split_digits(text);
    digits.iter().fold(0, |number: u64, digit| {
        let digit = u64::from(digit.saturating_sub(b'0'));
        number.saturating_mul(10).saturating_add(digit)
    })
}

/// Return whether `text` contains `part`.
pub fn contains(text: &[u8], part: &[u8]) -> bool {
    (0..text.len()).any(|at| text.get(at..).is_some_and(|text| text.starts_with(part)))
}

/// For a result line of KTAP, without its indentation, return whether it is ok, and the text after its
/// number.
pub fn ktap_result(text: &[u8]) -> Option<(bool, &[u8])> {
    let (ok, text) = match text.strip_prefix(b"not ") {
        Some(text) => (false, text),
        None => (true, text),
    };
    match split_digits(text.strip_prefix(b"ok ")?) {
        ([], _) => None,
        (_, rest) => Some((ok, rest)),
    }
}

/// Return where the mark of a skipped test begins in the text after the number of a result line.
pub fn find_skip(text: &[u8]) -> Option<usize> {
    let is_mark = |text: &[u8]| {
        text.strip_prefix(b"#").is_some_and(|text| {
            let word = trim_start(text, b" ").get(..4);
            word.is_some_and(|word| word.eq_ignore_ascii_case(b"skip"))
        })
    };
    (0..text.len()).find(|&at| text.get(at..).is_some_and(is_mark))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(text: &[u8]) -> Vec<Vec<u8>> {
        let mut found = Vec::new();
        for_each_line(text, |line| {
            found.push(line.to_vec());
            Ok(())
        })
        .unwrap();
        assert_eq!(found, lines(text).collect::<Vec<_>>());
        found
    }

    #[test]
    fn lines_end_with_a_newline_or_the_text() {
        assert_eq!(split(b""), Vec::<Vec<u8>>::new());
        assert_eq!(split(b"\n\xff\n\nb"), [&b""[..], b"\xff", b"", b"b"]);
        assert_eq!(split(b"a\r\n"), [b"a\r"]);
        assert_eq!(strip_cr(b"a\r\r"), b"a\r");
    }

    #[test]
    fn numbers() {
        assert_eq!(number(b""), 0);
        assert_eq!(number(b"x1"), 0);
        assert_eq!(number(b"12 # SKIP"), 12);
        assert_eq!(number(&[b'9'; 100]), u64::MAX);
    }

    #[test]
    fn results() {
        assert_eq!(ktap_result(b"ok 12 a"), Some((true, &b" a"[..])));
        assert_eq!(ktap_result(b"not ok 1"), Some((false, &b""[..])));
        for not_one in ["", "ok", "ok ", "ok a", "not 1", "notok 1", " ok 1", "Ok 1"] {
            assert_eq!(ktap_result(not_one.as_bytes()), None, "{not_one:?}");
        }
    }

    #[test]
    fn skips() {
        assert_eq!(find_skip(b" a # SKIP no swap"), Some(3));
        assert_eq!(find_skip(b"#skip"), Some(0));
        assert_eq!(find_skip(b" # # #   Skipped # SKIP"), Some(5));
        assert_eq!(find_skip(b" SKIP # SKI"), None);
        assert_eq!(find_skip(b" a #\tSKIP"), None);
    }
}
