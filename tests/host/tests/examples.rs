// SPDX-License-Identifier: GPL-2.0

//! Tests of what `build.rs` makes of the examples in documentation.

#[allow(dead_code)]
#[path = "../build.rs"]
mod build;

use build::tests_of;

/// The lines of the tests that are made of `text`.
fn lines_of(text: &str) -> Vec<String> {
    let tests = tests_of(text).expect("is well formed");
    let tests = tests.expect("has an example");
    tests.lines().map(str::to_string).collect()
}

#[test]
fn code_stays_in_its_line() {
    let text = "\
//! # Examples
//!
//! ```
//! let one = 1;
//!
//! assert_eq!(one, 1);
//! ```
fn f() {}
    /// ```rust
    /// if true {
    ///     g();
    /// }
    /// ```
    fn g() {}
";
    assert_eq!(
        lines_of(text),
        [
            "",
            "",
            "#[test] fn line_3() {",
            "let one = 1;",
            "",
            "assert_eq!(one, 1);",
            "}",
            "",
            "#[test] fn line_9() {",
            "if true {",
            "    g();",
            "}",
            "}",
            "",
        ]
    );
}

#[test]
fn hidden_lines_are_run() {
    let text = "/// ```\n/// # let x = 1;\n/// #\n/// #[allow(unused)]\n/// ##!x\n/// ```\n";
    let lines = lines_of(text);
    assert_eq!(lines[1..5], ["let x = 1;", "", "#[allow(unused)]", "#!x"]);
}

#[test]
fn an_example_may_fail_if_it_says_so() {
    let text = "/// ```\n/// f()?;\n/// # Ok::<(), Error>(())\n///\n/// ```\n";
    let lines = lines_of(text);
    assert_eq!(
        lines[0],
        "#[test] fn line_1() -> Result<(), impl core::fmt::Debug> {"
    );
    assert_eq!(lines[2], "Ok::<(), Error>(())");
}

#[test]
fn other_blocks_are_not_run() {
    assert_eq!(tests_of("/// ```ignore\n/// f();\n/// ```\n"), Ok(None));
    assert_eq!(tests_of("/// ```text\n/// a -> b\n/// ```\n"), Ok(None));
    assert_eq!(tests_of("// ```\n// f();\n// ```\n"), Ok(None));
}

#[test]
fn what_is_not_understood_is_refused() {
    let refused = |text, reason: &str| assert_eq!(tests_of(text), Err(reason.to_string()));
    refused("\n/// ```\n/// f();\n", "line 2: block is not closed");
    refused(
        "/// ```\n/// f();\nfn g() {}\n/// ```\n",
        "line 1: block is not closed",
    );
    refused(
        "/// ```no_run\n/// ```\n",
        "line 1: `no_run` is not supported",
    );
}
