// SPDX-License-Identifier: GPL-2.0

//! The tables that say which function of the module a step of a model stands for name functions that exist.

#[path = "../build.rs"]
#[allow(dead_code)]
mod build;

use std::fs;
use std::path::Path;

/// `fn name` of each `Type::name` in the last column of a table row in a module's documentation.
fn named(text: &str) -> Vec<String> {
    let rows = text.lines().filter(|line| line.starts_with("//! | `"));
    let cells = rows.filter_map(|row| row.split('|').nth(2));
    let code = cells.flat_map(|cell| cell.split('`').skip(1).step_by(2));
    code.filter_map(|code| code.rsplit_once("::"))
        .map(|(_, name)| format!("fn {name}"))
        .collect()
}

fn missing(table: &str, source: &str) -> Vec<String> {
    let defined = |name: &String| {
        source.contains(&format!("{name}(")) || source.contains(&format!("{name}<"))
    };
    named(table)
        .into_iter()
        .filter(|name| !defined(name))
        .collect()
}

#[test]
fn steps_stand_for_functions_of_the_module() {
    let host = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    build::add_files(&host.join("../../src"), &mut files).unwrap();
    let source: String = files
        .iter()
        .map(|file| fs::read_to_string(file).unwrap())
        .collect();
    for table in ["src/model/mod.rs", "src/model/life/mod.rs"] {
        let text = fs::read_to_string(host.join(table)).unwrap();
        assert!(named(&text).len() > 4, "no table in {table}");
        assert_eq!(missing(&text, &source), [""; 0], "{table}");
    }
}

#[test]
fn finds_a_name_that_is_gone() {
    let table = "//! | step | in the module |\n\
                 //! | `Scan::Get` | `Node::page`, `Node::gone` (src/mm/node.rs) |\n";
    assert_eq!(named(table), ["fn page", "fn gone"]);
    assert_eq!(missing(table, "pub(super) fn page(&self) {}"), ["fn gone"]);
}
