// SPDX-License-Identifier: GPL-2.0
//! Check that the module was compiled with the types of the image that it is for.
//!
//! The headers that C and Rust are compiled with come from a kernel tree, but layouts and signatures come
//! from an image. A tree with another configuration than the image passes every other check: the signatures
//! are those of the image, and so is the kernel that they are compared with at load. So compare the compiled
//! types, which the module's debug information describes, with the image's BTF.

use crate::abi::btf::{Btf, Kind, Type};
use crate::dwarf::{Known, Language};
use crate::list::{Interface, Sort};
use crate::shape::Shape;
use anyhow::{ensure, Context, Result};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt;

/// The largest number of differences to report.
const TOLD_MAX: usize = 20;

/// The result of a comparison.
#[derive(Debug)]
pub struct Compared {
    /// Number of types from C that the image has as well.
    pub c: usize,
    /// Number of types from Rust that the image has as well.
    pub rust: usize,
    /// Listed interfaces that the module's debug information does not describe.
    pub unknown: Vec<String>,
}

/// Every type that differs.
#[derive(Debug)]
pub struct Differs(pub Vec<String>);

impl fmt::Display for Differs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the module was compiled with other types than the image has ({} differ): \
             the kernel tree is not of that image, or was configured otherwise",
            self.0.len()
        )?;
        for difference in self.0.iter().take(TOLD_MAX) {
            write!(f, "\n{difference}")?;
        }
        match self.0.len().saturating_sub(TOLD_MAX) {
            0 => Ok(()),
            more => write!(f, "\nand {more} more"),
        }
    }
}

impl std::error::Error for Differs {}

/// Types of an image by their name.
struct Image<'a> {
    aggregates: HashMap<&'a str, Vec<Type<'a>>>,
    enumerations: HashMap<&'a str, Vec<Type<'a>>>,
    /// Typedefs of structures and unions without a name.
    aliases: HashMap<&'a str, Vec<Type<'a>>>,
    /// Enumerators of enumerations without a name.
    constants: HashMap<&'a str, HashSet<i64>>,
}

impl<'a> Image<'a> {
    fn read(btf: &Btf<'a>) -> Result<Self> {
        let mut image = Image {
            aggregates: HashMap::new(),
            enumerations: HashMap::new(),
            aliases: HashMap::new(),
            constants: HashMap::new(),
        };
        for id in 1..=btf.last_id() {
            let ty = btf.get(id)?;
            let name = btf.name_text(&ty)?;
            match ty.kind() {
                kind if kind.is_aggregate() && !name.is_empty() => {
                    image.aggregates.entry(name).or_default().push(ty);
                }
                kind if kind.is_enumeration() && name.is_empty() => {
                    for i in 0..ty.len() {
                        let enumerator = ty.enumerator(i)?;
                        let name = btf.text(enumerator.name_off)?;
                        let values = image.constants.entry(name).or_default();
                        values.insert(enumerator.value);
                    }
                }
                kind if kind.is_enumeration() && !ty.is_empty() => {
                    image.enumerations.entry(name).or_default().push(ty);
                }
                Kind::Typedef => {
                    let behind = btf.strip(ty.target(), true)?;
                    if behind.kind().is_aggregate() && btf.name(&behind)?.is_empty() {
                        image.aliases.entry(name).or_default().push(behind);
                    }
                }
                _ => {}
            }
        }
        Ok(image)
    }
}

/// Compare the types of a module's debug information to those of the image. Differences of listed types are
/// reported first.
pub fn compare(btf: &Btf<'_>, known: &[Known], listed: &[Interface]) -> Result<Compared> {
    let image = Image::read(btf)?;
    let mut compared: BTreeSet<(Language, bool, &str)> = BTreeSet::new();
    let mut differences: BTreeMap<(bool, String), String> = BTreeMap::new();
    let is_listed = |name: &str| listed.iter().any(|interface| interface.name == name);
    let mut constants: HashSet<&str> = HashSet::new();

    for Known {
        language,
        name,
        shape,
    } in known
    {
        let enumeration = matches!(shape, Shape::Enumeration { .. });
        if let (Shape::Enumeration { values, .. }, "") = (shape, name.as_str()) {
            for (name, value) in values {
                let Some(theirs) = image.constants.get(name.as_str()) else {
                    continue;
                };
                constants.insert(name);
                if !theirs.contains(value) {
                    let mut theirs: Vec<_> = theirs.iter().map(i64::to_string).collect();
                    theirs.sort();
                    differences.insert(
                        (!is_listed(name), format!("constant {name}")),
                        format!("is {value}, in the image {}", theirs.join(" or ")),
                    );
                }
            }
            continue;
        }
        let candidates = match (enumeration, language) {
            (true, _) => image.enumerations.get(name.as_str()),
            (false, Language::C) => image.aggregates.get(name.as_str()),
            (false, Language::Rust) => image
                .aggregates
                .get(name.as_str())
                .or_else(|| image.aliases.get(name.as_str())),
        };
        let Some(candidates) = candidates else {
            continue;
        };
        compared.insert((*language, enumeration, name));
        let mut first = None;
        let mut same = false;
        for candidate in candidates {
            let theirs = Shape::of_btf(btf, candidate)
                .map_err(|error| anyhow::anyhow!("{name}: {error}"))?
                .context(name.clone())?;
            match shape.difference(&theirs, *language == Language::Rust) {
                Some(difference) => _ = first.get_or_insert(difference),
                None => same = true,
            }
        }
        if let Some(difference) = first.filter(|_| !same) {
            let keyword = if enumeration { "enum" } else { "struct" };
            let of = match language {
                Language::C => "in C",
                Language::Rust => "in Rust",
            };
            differences.insert(
                (!is_listed(name), format!("{keyword} {name}, {of}")),
                difference,
            );
        }
    }
    let count = |wanted| compared.iter().filter(|(of, ..)| *of == wanted).count();
    let (c, rust) = (count(Language::C), count(Language::Rust));
    if !differences.is_empty() {
        let lines = differences.into_iter();
        return Err(Differs(
            lines
                .map(|((_, what), how)| format!("{what}: {how}"))
                .collect(),
        )
        .into());
    }
    ensure!(
        c != 0 && rust != 0,
        "the module's debug information describes {c} types from C and {rust} from Rust that the image \
         has: nothing can be said of the others"
    );
    let unknown = listed
        .iter()
        .filter(|interface| {
            let name = interface.name.as_str();
            let described = |enumeration| {
                [Language::C, Language::Rust]
                    .iter()
                    .any(|&language| compared.contains(&(language, enumeration, name)))
            };
            match interface.sort {
                Sort::Struct => !described(false),
                Sort::Enum => !described(true),
                Sort::Constant => !constants.contains(name),
                Sort::Func => false,
            }
        })
        .map(|interface| interface.name.clone())
        .collect();
    Ok(Compared { c, rust, unknown })
}
