// SPDX-License-Identifier: GPL-2.0
//! The memory layout of a type, from any description of it.

use crate::abi::btf::{self, Btf, Kind, Type};
use std::collections::{BTreeMap, BTreeSet, HashSet};

/// A placeholder for the members of a structure that bindgen could not render.
pub const OPAQUE: &str = "(opaque)";

/// The largest nesting depth of types.
const NEST_MAX: u32 = 32;

/// A member of a structure or union. The members of an inner type without a name follow it. If the inner type
/// is a named member, their names begin with that name and a dot; otherwise they stand in its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its name.
    pub path: String,
    /// Its position in the outermost structure.
    pub bit_offset: u64,
    /// Its length.
    pub bits: u64,
    /// Whether it is a bitfield.
    pub bitfield: bool,
}

/// The layout of a type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Shape {
    /// A structure or union.
    Aggregate {
        /// Bytes.
        size: u64,
        /// The members in the order of their declaration.
        members: Vec<Member>,
    },
    /// An enumeration.
    Enumeration {
        /// Bytes.
        size: u64,
        /// The name and value of each enumerator.
        values: Vec<(String, i64)>,
    },
}

impl Shape {
    /// Read the layout from BTF. `None` for a type that is neither.
    pub fn of_btf(btf: &Btf<'_>, ty: &Type<'_>) -> btf::Result<Option<Self>> {
        let size = u64::from(ty.own_size());
        if ty.kind().is_enumeration() {
            let mut values = Vec::new();
            for i in 0..ty.len() {
                let btf::Enumerator { name_off, value } = ty.enumerator(i)?;
                values.push((btf.text(name_off)?.to_string(), value));
            }
            return Ok(Some(Shape::Enumeration { size, values }));
        }
        if !ty.kind().is_aggregate() {
            return Ok(None);
        }
        let mut members = Vec::new();
        btf_members(btf, ty, "", 0, &mut members, NEST_MAX)?;
        Ok(Some(Shape::Aggregate { size, members }))
    }

    /// Describe how this layout, which is compiled into the module, differs from that of the `image`.
    ///
    /// With `partly`, it is from Rust: bindgen has no members for bitfields, and renders some types without a
    /// name in other ways.
    pub fn difference(&self, image: &Shape, partly: bool) -> Option<String> {
        match (self, image) {
            (
                Shape::Aggregate { size, members },
                Shape::Aggregate {
                    size: image_size,
                    members: image_members,
                },
            ) => both(
                sizes(*size, *image_size),
                missing_or_moved(members, image_members).or_else(|| match partly {
                    true => unknown_to_rust(members, image_members),
                    false => missing_here(members, image_members),
                }),
            ),
            (
                Shape::Enumeration { size, values },
                Shape::Enumeration {
                    size: image_size,
                    values: image_values,
                },
            ) => both(
                sizes(*size, *image_size),
                other_value(*size, values, image_values),
            ),
            _ => Some("is a structure or an enumeration, in the image the other".to_string()),
        }
    }
}

/// Return the first enumerator, by name, that has another value. The values take `size` bytes.
fn other_value(size: u64, ours: &[(String, i64)], image: &[(String, i64)]) -> Option<String> {
    let by_name = |values: &[(String, i64)]| -> BTreeMap<String, i64> {
        let bits = |value: i64| match size {
            8.. => value,
            // The two descriptions treat signedness differently, so ignore it.
            _ => value & ((1 << (size * 8)) - 1),
        };
        let values = values.iter();
        values.map(|(name, v)| (name.clone(), bits(*v))).collect()
    };
    let (ours, image) = (by_name(ours), by_name(image));
    let text = |value: Option<&i64>| value.map_or("missing".to_string(), i64::to_string);
    let names: BTreeSet<_> = ours.keys().chain(image.keys()).collect();
    for name in names {
        let (ours, image) = (ours.get(name), image.get(name));
        if ours != image {
            let (ours, image) = (text(ours), text(image));
            return Some(format!("{name} is {ours}, in the image {image}"));
        }
    }
    None
}

fn btf_members(
    btf: &Btf<'_>,
    ty: &Type<'_>,
    prefix: &str,
    base: u64,
    members: &mut Vec<Member>,
    nest: u32,
) -> btf::Result<()> {
    let nest = nest.checked_sub(1).ok_or(btf::Error::TooDeep)?;
    for i in 0..ty.len() {
        let member = ty.member(i)?;
        let name = btf.text(member.name_off)?;
        let at = base + u64::from(member.bit_offset);
        let path = format!("{prefix}{name}");
        if !name.is_empty() {
            members.push(Member {
                path: path.clone(),
                bit_offset: at,
                bits: match member.bitfield_size {
                    0 => btf.size_of(member.type_id)? * 8,
                    width => u64::from(width),
                },
                bitfield: member.bitfield_size != 0,
            });
        }
        let mut inner = btf.strip(member.type_id, true)?;
        for _ in 0..nest {
            if inner.kind() != Kind::Array {
                break;
            }
            inner = btf.strip(inner.array()?.0, true)?;
        }
        if inner.kind().is_aggregate() && btf.name(&inner)?.is_empty() {
            let prefix = match name.is_empty() {
                true => prefix.to_string(),
                false => format!("{path}."),
            };
            btf_members(btf, &inner, &prefix, at, members, nest)?;
        }
    }
    Ok(())
}

fn both(one: Option<String>, other: Option<String>) -> Option<String> {
    match (one, other) {
        (Some(one), Some(other)) => Some(format!("{one}; {other}")),
        (one, other) => one.or(other),
    }
}

fn sizes(ours: u64, image: u64) -> Option<String> {
    (ours != image).then(|| format!("has {ours} bytes, in the image {image}"))
}

/// Format a position in a structure.
fn place(bit: u64) -> String {
    match bit % 8 {
        0 => format!("byte {}", bit / 8),
        rest => format!("bit {rest} of byte {}", bit / 8),
    }
}

/// Return the first of our members that the image has in another place, with another width, or not at all.
fn missing_or_moved(ours: &[Member], image: &[Member]) -> Option<String> {
    ours.iter().find_map(|member| {
        let name = &member.path;
        if name.ends_with(OPAQUE) {
            return None;
        }
        // bindgen appends a `_` to keywords of Rust.
        let plain = name.strip_suffix('_').unwrap_or(name);
        let candidates = || {
            let same = |theirs: &&Member| theirs.path == *name || theirs.path == plain;
            image.iter().filter(same)
        };
        // Inner types without a name may repeat a member's name in their arms.
        let fits =
            |theirs: &Member| (theirs.bit_offset, theirs.bits) == (member.bit_offset, member.bits);
        if candidates().any(fits) {
            return None;
        }
        Some(match candidates().next() {
            None => format!("has a member {name}, in the image it has none"),
            Some(theirs) if theirs.bit_offset != member.bit_offset => format!(
                "{name} is at {}, in the image at {}",
                place(member.bit_offset),
                place(theirs.bit_offset)
            ),
            Some(theirs) => format!(
                "{name} has {} bits, in the image {}",
                member.bits, theirs.bits
            ),
        })
    })
}

/// Return the first of the image's members that we do not have.
fn missing_here(ours: &[Member], image: &[Member]) -> Option<String> {
    let names: HashSet<&str> = ours.iter().map(|member| member.path.as_str()).collect();
    image
        .iter()
        .find(|member| !names.contains(member.path.as_str()))
        .map(|member| format!("has no member {}, in the image it has", member.path))
}

/// Return the first of the image's members that bindgen would have rendered.
fn unknown_to_rust(ours: &[Member], image: &[Member]) -> Option<String> {
    if ours.iter().any(|member| member.path.ends_with(OPAQUE)) {
        return None;
    }
    let names: HashSet<&str> = ours.iter().map(|member| member.path.as_str()).collect();
    let known = |path: &str| names.contains(path) || names.contains(format!("{path}_").as_str());
    image
        .iter()
        .filter(|member| !member.bitfield)
        .find(|member| {
            // It may be a member of a type that bindgen gave the name of its typedef.
            let mut outer = member.path.as_str();
            while !known(outer) {
                match outer.rsplit_once('.') {
                    Some((rest, _)) => outer = rest,
                    None => return true,
                }
            }
            false
        })
        .map(|member| format!("has no member {}, in the image it has", member.path))
}
