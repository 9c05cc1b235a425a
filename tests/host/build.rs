// SPDX-License-Identifier: GPL-2.0

//! Makes tests of the examples in the module's documentation.
//!
//! rustdoc can only run examples of public items, in a crate that it can link. The kernel makes KUnit
//! tests of its examples (`scripts/rustdoc_test_gen.rs` there); these become host tests.
//!
//! For each file of the module that has examples, a file is written to `OUT_DIR`. It has the code of the
//! examples, each in a function, in the same lines as the module's file. So messages of the compiler and
//! of failed assertions name the file and the line of the module.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
};

/// Makes the tests of a file whose content is `text`. `Ok(None)`: it has no examples.
///
/// As in rustdoc, a block of code without a language is an example, lines that begin with `# ` are code
/// that the documentation does not show, and an example that ends with `(())` may fail. Blocks marked
/// `ignore` or `text` are not run.
pub fn tests_of(text: &str) -> Result<Option<String>, String> {
    /// A block of code: the index of its first line, and whether it is run.
    struct Block {
        start: usize,
        is_run: bool,
    }

    let mut lines = vec![String::new(); text.lines().count()];
    let mut block: Option<Block> = None;
    let mut any = false;
    for (i, line) in text.lines().enumerate() {
        let number = i + 1;
        let line = line.trim_start();
        let doc = line.strip_prefix("///").or(line.strip_prefix("//!"));
        let doc = doc.map(|doc| doc.strip_prefix(' ').unwrap_or(doc));
        let fence = doc.and_then(|doc| doc.trim().strip_prefix("```"));
        match (&block, doc, fence) {
            (None, _, None) => {}
            (None, _, Some(language)) => {
                let is_run = match language {
                    "" | "rust" => true,
                    "ignore" | "text" => false,
                    _ => return Err(format!("line {number}: `{language}` is not supported")),
                };
                block = Some(Block { start: i, is_run });
            }
            (Some(block), None, _) => {
                return Err(format!("line {}: block is not closed", block.start + 1));
            }
            (Some(block), Some(doc), None) => {
                if block.is_run {
                    lines[i] = code_of(doc).to_string();
                }
            }
            (Some(Block { start, is_run }), _, Some(_)) => {
                if *is_run {
                    let code = lines[*start..i].iter().rev();
                    let last = code.map(|line| line.trim()).find(|line| !line.is_empty());
                    let result = match last.is_some_and(|line| line.ends_with("(())")) {
                        true => " -> Result<(), impl core::fmt::Debug>",
                        false => "",
                    };
                    lines[*start] = format!("#[test] fn line_{}(){result} {{", start + 1);
                    lines[i] = "}".to_string();
                    any = true;
                }
                block = None;
            }
        }
    }
    match block {
        Some(block) => Err(format!("line {}: block is not closed", block.start + 1)),
        None => Ok(any.then(|| lines.join("\n") + "\n")),
    }
}

/// The code in a line of an example, whether the documentation shows it or not.
fn code_of(line: &str) -> &str {
    let trimmed = line.trim_start();
    match trimmed.strip_prefix('#') {
        Some("") => "",
        Some(rest) if rest.starts_with(' ') => &rest[1..],
        Some(rest) if rest.starts_with('#') => rest,
        _ => line,
    }
}

/// Adds the Rust files in `dir` and in the directories below it.
pub fn add_files(dir: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            add_files(&path, files)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    Ok(())
}

fn main() -> io::Result<()> {
    let src = Path::new("../../src");
    println!("cargo::rerun-if-changed={}", src.display());
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let mut files = Vec::new();
    add_files(src, &mut files)?;
    files.sort();
    let mut modules = String::new();
    for file in files {
        let name = file.strip_prefix(src).expect("it was found there");
        let text = fs::read_to_string(&file)?;
        let tests = tests_of(&text).map_err(|err| format!("src/{}, {err}", name.display()));
        let Some(tests) = tests.map_err(io::Error::other)? else {
            continue;
        };
        let to = out.join("examples/src").join(name);
        fs::create_dir_all(to.parent().expect("it is in a directory"))?;
        fs::write(&to, tests)?;
        let module = name.display().to_string().replace(['/', '.'], "_");
        modules += &format!("#[path = {to:?}]\nmod {module};\n");
    }
    fs::write(out.join("examples.rs"), modules)
}
