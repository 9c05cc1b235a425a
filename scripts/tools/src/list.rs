// SPDX-License-Identifier: GPL-2.0
//! The list files: `src/abi/symbols.klp` and `src/abi/structs.list`.
//!
//! There is one name per line; `#` starts a comment; blank lines do not count.

use anyhow::{bail, ensure, Context, Result};
use std::collections::HashSet;

/// An unexported symbol of the kernel that the module uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Symbol {
    /// The name in kallsyms.
    pub name: String,
    /// The number of the symbol among several of that name, from 1. With 0, the name must be unique.
    pub sympos: u32,
    /// Whether the module uses it only with some kernels' headers.
    pub optional: bool,
}

/// Parse a list of symbols: `name[,sympos][?]` per line. With `?`, the module need not use it.
pub fn parse_symbols(text: &str) -> Result<Vec<Symbol>> {
    parse(text, |item| {
        let (item, optional) = optional(item);
        let (name, sympos) = match item.split_once(',') {
            None => (item, 0),
            Some((name, sympos)) => {
                let sympos = sympos
                    .trim()
                    .parse()
                    .context("the position is not a number")?;
                (name.trim(), sympos)
            }
        };
        let name = identifier(name)?;
        let symbol = Symbol {
            name: name.clone(),
            sympos,
            optional,
        };
        Ok((name, symbol))
    })
}

/// A part of the kernel's interface whose signature is checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// The kind of interface.
    pub sort: Sort,
    /// Its name.
    pub name: String,
    /// Whether only some configurations of the kernel have it.
    pub optional: bool,
}

/// The kinds of interfaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sort {
    /// Structure or union.
    Struct,
    /// Function that is not only used through a listed symbol.
    Func,
    /// Enumeration.
    Enum,
    /// Enumerator of an enumeration without a name.
    Constant,
}

impl Sort {
    /// Return the keyword before its name in C, or something similar.
    pub fn keyword(self) -> &'static str {
        match self {
            Sort::Struct => "struct",
            Sort::Func => "function",
            Sort::Enum => "enum",
            Sort::Constant => "constant",
        }
    }
}

/// Parse a list of interfaces. Each line is `name[?]` of a structure, or a keyword (`func`, `enum`,
/// `constant`) and a name. With `?`, not every kernel has it.
pub fn parse_interfaces(text: &str) -> Result<Vec<Interface>> {
    parse(text, |item| {
        let (item, optional) = optional(item);
        let keyword = item.split_once(char::is_whitespace);
        let (sort, name) = match keyword {
            Some(("func", name)) => (Sort::Func, name.trim()),
            Some(("enum", name)) => (Sort::Enum, name.trim()),
            Some(("constant", name)) => (Sort::Constant, name.trim()),
            _ => (Sort::Struct, item),
        };
        let interface = Interface {
            sort,
            name: identifier(name)?,
            optional,
        };
        Ok((format!("{sort:?} {name}"), interface))
    })
}

/// Return whether the item ends in `?`, and the part before that.
fn optional(item: &str) -> (&str, bool) {
    match item.strip_suffix('?') {
        Some(item) => (item.trim(), true),
        None => (item, false),
    }
}

fn identifier(name: &str) -> Result<String> {
    let valid = |c: char| c.is_ascii_alphanumeric() || "_.$".contains(c);
    ensure!(
        !name.is_empty() && name.chars().all(valid),
        "'{name}' is not a name"
    );
    Ok(name.to_string())
}

fn parse<T>(text: &str, mut item: impl FnMut(&str) -> Result<(String, T)>) -> Result<Vec<T>> {
    let mut seen = HashSet::new();
    let mut items = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.split('#').next().unwrap_or_default().trim();
        if line.is_empty() {
            continue;
        }
        let (name, value) = item(line).with_context(|| format!("line {number}"))?;
        if !seen.insert(name.clone()) {
            bail!("line {number}: '{line}' is listed twice");
        }
        items.push(value);
    }
    Ok(items)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn symbols_with_position_and_comments() {
        let list =
            parse_symbols("# head\n\n mm_find_pmd  # why\nfoo.isra.0 , 2\nbar,0#x\nbaz? #\n")
                .unwrap();
        let expected = [
            ("mm_find_pmd", 0, false),
            ("foo.isra.0", 2, false),
            ("bar", 0, false),
            ("baz", 0, true),
        ];
        let expected: Vec<_> = expected
            .iter()
            .map(|&(name, sympos, optional)| Symbol {
                name: name.into(),
                sympos,
                optional,
            })
            .collect();
        assert_eq!(list, expected);
    }

    #[test]
    fn interfaces() {
        let text = "page # why\nfunc  walk\nfunc\nfunc page\nenum page\nconstant PAGE ? #\npv?\n";
        let list = parse_interfaces(text).unwrap();
        let expected = [
            (Sort::Struct, "page", false),
            (Sort::Func, "walk", false),
            (Sort::Struct, "func", false),
            (Sort::Func, "page", false),
            (Sort::Enum, "page", false),
            (Sort::Constant, "PAGE", true),
            (Sort::Struct, "pv", true),
        ];
        let expected: Vec<_> = expected
            .iter()
            .map(|&(sort, name, optional)| Interface {
                sort,
                name: name.into(),
                optional,
            })
            .collect();
        assert_eq!(list, expected);
        for (text, says) in [
            ("struct page\n", "line 1: 'struct page' is not a name"),
            ("func a b\n", "line 1: 'a b' is not a name"),
            ("func a\nfunc a\n", "line 2: 'func a' is listed twice"),
        ] {
            let error = format!("{:#}", parse_interfaces(text).unwrap_err());
            assert!(error.starts_with(says), "{error}");
        }
    }

    #[test]
    fn errors_name_the_line() {
        for (text, says) in [
            ("a\n\nb c\n", "line 3: 'b c' is not a name"),
            ("a,x\n", "line 1: the position is not a number"),
            ("a\n# x\na,1\n", "line 3: 'a,1' is listed twice"),
            (",1\n", "line 1: '' is not a name"),
        ] {
            let error = format!("{:#}", parse_symbols(text).unwrap_err());
            assert!(error.starts_with(says), "{error}");
        }
    }
}
