// SPDX-License-Identifier: GPL-2.0
//! The types that an object was compiled with, from its debug information.

use crate::shape::{Member, Shape};
use anyhow::{bail, ensure, Context, Result};
use gimli::{constants as dw, AttributeValue, EndianSlice, LittleEndian, Reader as _, UnitOffset};
use object::{Object, ObjectSection};
use std::collections::HashMap;

/// The resolved relocations of the debug sections of an object that is not linked yet.
#[derive(Debug, Default)]
struct Relocations(object::read::RelocationMap);

impl gimli::read::Relocate for &Relocations {
    fn relocate_address(&self, offset: usize, value: u64) -> gimli::Result<u64> {
        Ok(self.0.relocate(offset as u64, value))
    }

    fn relocate_offset(&self, offset: usize, value: usize) -> gimli::Result<usize> {
        let value = self.0.relocate(offset as u64, value as u64);
        usize::try_from(value).map_err(|_| gimli::Error::UnsupportedOffset)
    }
}

type Slice<'a> = gimli::RelocateReader<EndianSlice<'a, LittleEndian>, &'a Relocations>;
type Unit<'a> = gimli::Unit<Slice<'a>>;
type Entry<'a> = gimli::DebuggingInformationEntry<'a, 'a, Slice<'a>>;

/// The largest nesting depth of types.
const NEST_MAX: u32 = 32;

/// The language that a type was compiled from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Language {
    /// C.
    C,
    /// Rust: bindgen's rendering of C types.
    Rust,
}

/// One type that was compiled in.
#[derive(Debug)]
pub struct Known {
    /// What it was compiled from.
    pub language: Language,
    /// Its name in C; empty for an enumeration without one.
    pub name: String,
    /// Its layout.
    pub shape: Shape,
}

/// All structures, unions and enumerations that an object has from the kernel's headers.
pub fn types(object: &[u8]) -> Result<Vec<Known>> {
    let file = object::read::elf::ElfFile64::<object::Endianness>::parse(object)
        .context("not a 64-bit ELF file")?;
    ensure!(
        file.section_by_name(".debug_info").is_some(),
        "no debug information: was the kernel tree configured with CONFIG_DEBUG_INFO, as an image with BTF is?"
    );
    let mut sections = HashMap::new();
    for section in file.sections() {
        let name = section.name()?;
        if !name.starts_with(".debug_") {
            continue;
        }
        let data = section
            .uncompressed_data()
            .with_context(|| format!("{name} (objcopy --decompress-debug-sections helps)"))?;
        let mut relocations = Relocations::default();
        for (offset, relocation) in section.relocations() {
            // Code may be relocated in more ways, of which types have none.
            if let Err(error) = relocations.0.add(&file, offset, relocation) {
                if name == ".debug_info" || name.starts_with(".debug_str") {
                    return Err(error).with_context(|| format!("{name}+{offset:#x}"));
                }
            }
        }
        sections.insert(name.to_string(), (data, relocations));
    }
    let none = (std::borrow::Cow::Borrowed(&[][..]), Relocations::default());
    let dwarf = gimli::Dwarf::load(|id| {
        let (data, relocations) = sections.get(id.name()).unwrap_or(&none);
        let data = EndianSlice::new(data, LittleEndian);
        Ok::<_, gimli::Error>(gimli::RelocateReader::new(data, relocations))
    })?;

    let mut known = Vec::new();
    let mut units = dwarf.units();
    while let Some(header) = units.next()? {
        let unit = dwarf.unit(header)?;
        let mut tree = unit.entries_tree(None)?;
        let root = tree.root()?;
        let language = match root.entry().attr_value(dw::DW_AT_language)? {
            Some(AttributeValue::Language(dw::DW_LANG_Rust)) => Language::Rust,
            Some(AttributeValue::Language(
                dw::DW_LANG_C89 | dw::DW_LANG_C | dw::DW_LANG_C99 | dw::DW_LANG_C11,
            )) => Language::C,
            _ => continue,
        };
        let reader = UnitReader {
            dwarf: &dwarf,
            unit: &unit,
            language,
        };
        reader.collect(root, &mut Vec::new(), &mut known)?;
    }
    Ok(known)
}

/// Return whether bindgen made up the name of a type that has none in C, from that of the outer type and a
/// number.
fn is_made_up(name: &str) -> bool {
    name.rsplit_once("__bindgen_ty_")
        .is_some_and(|(_, number)| number.bytes().all(|byte| byte.is_ascii_digit()))
}

struct UnitReader<'a> {
    dwarf: &'a gimli::Dwarf<Slice<'a>>,
    unit: &'a Unit<'a>,
    language: Language,
}

impl<'a> UnitReader<'a> {
    /// Add the types that are declared in `node`, which is in the namespaces `path`.
    fn collect(
        &self,
        node: gimli::EntriesTreeNode<'_, '_, '_, Slice<'a>>,
        path: &mut Vec<String>,
        known: &mut Vec<Known>,
    ) -> Result<()> {
        let mut children = node.children();
        while let Some(child) = children.next()? {
            let entry = child.entry();
            let offset = entry.offset();
            match entry.tag() {
                dw::DW_TAG_namespace => {
                    path.push(self.name(offset)?);
                    self.collect(child, path, known)?;
                    path.pop();
                }
                dw::DW_TAG_structure_type | dw::DW_TAG_union_type | dw::DW_TAG_enumeration_type => {
                    if let Some(shape) = self.shape(offset, path)? {
                        known.push(Known {
                            language: self.language,
                            name: self.name(offset)?,
                            shape,
                        });
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Return the layout of a type, if it is a complete one of the kernel's headers.
    fn shape(&self, offset: UnitOffset, path: &[String]) -> Result<Option<Shape>> {
        let entry = self.entry(offset)?;
        let name = self.name(offset)?;
        if entry.attr(dw::DW_AT_declaration)?.is_some() {
            return Ok(None);
        }
        if self.language == Language::Rust {
            // bindgen turns enumerations into constants, which leave no trace. Other types than its
            // structures are Rust's own. Those have no parameters, and those without a name in C are seen as
            // members.
            let bindings = path.iter().any(|part| part == "bindings" || part == "ffi");
            let of_c = !name.contains(['<', '{']) && !is_made_up(&name);
            let enumeration = entry.tag() == dw::DW_TAG_enumeration_type;
            if enumeration || !bindings || !of_c || name.starts_with("__Bindgen") {
                return Ok(None);
            }
        }
        if entry.tag() == dw::DW_TAG_enumeration_type {
            return self.enumeration(offset).map(Some);
        }
        if name.is_empty() {
            return Ok(None);
        }
        if self.language == Language::Rust && self.is_forward(offset)? {
            return Ok(None);
        }
        let mut members = Vec::new();
        self.members(offset, "", 0, &mut members, NEST_MAX)
            .with_context(|| name.clone())?;
        Ok(Some(Shape::Aggregate {
            size: self.size(offset, NEST_MAX)?,
            members,
        }))
    }

    fn enumeration(&self, offset: UnitOffset) -> Result<Shape> {
        let mut values = Vec::new();
        for child in self.children(offset, dw::DW_TAG_enumerator)? {
            let entry = self.entry(child)?;
            let value = match entry.attr_value(dw::DW_AT_const_value)? {
                Some(AttributeValue::Sdata(value)) => value,
                Some(value) => value.udata_value().context("an enumerator without value")? as i64,
                None => bail!("an enumerator without value"),
            };
            values.push((self.name(child)?, value));
        }
        Ok(Shape::Enumeration {
            size: self.size(offset, NEST_MAX)?,
            values,
        })
    }

    /// Add the members of a structure or union at bit `base` of the outermost one. Their names begin with
    /// `prefix`.
    fn members(
        &self,
        offset: UnitOffset,
        prefix: &str,
        base: u64,
        members: &mut Vec<Member>,
        nest: u32,
    ) -> Result<()> {
        let nest = nest.checked_sub(1).context("types nest too deeply")?;
        for child in self.children(offset, dw::DW_TAG_member)? {
            let mut name = self.name(child)?;
            let target = self.target(child)?.context("a member without type")?;
            let target = self.within_union_field(target)?.unwrap_or(target);
            let (at, width) = self.place(child, target)?;
            let at = base + at;
            let inner = self.nameless(target)?;
            if self.language == Language::Rust {
                if name.starts_with("_bitfield_")
                    || name.starts_with("__bindgen_padding_")
                    || name == "_address"
                    || name == "bindgen_union_field"
                {
                    continue;
                }
                if name.starts_with("_bindgen_opaque_blob") {
                    name = crate::shape::OPAQUE.to_string();
                } else if name.starts_with("__bindgen_anon_") {
                    name.clear();
                }
            }
            let path = format!("{prefix}{name}");
            if !name.is_empty() {
                members.push(Member {
                    path: path.clone(),
                    bit_offset: at,
                    bits: match width {
                        Some(width) => width,
                        None => self.size(target, NEST_MAX)? * 8,
                    },
                    bitfield: width.is_some(),
                });
            }
            if let Some(inner) = inner {
                let prefix = match name.is_empty() {
                    true => prefix.to_string(),
                    false => format!("{path}."),
                };
                self.members(inner, &prefix, at, members, nest)?;
            }
        }
        Ok(())
    }

    /// Return the first bit of a member, and its width if it is a bitfield.
    fn place(&self, member: UnitOffset, target: UnitOffset) -> Result<(u64, Option<u64>)> {
        let entry = self.entry(member)?;
        let number = |name| -> Result<Option<u64>> {
            match entry.attr_value(name)? {
                None => Ok(None),
                Some(value) => Ok(Some(value.udata_value().context("a place is computed")?)),
            }
        };
        let byte = number(dw::DW_AT_data_member_location)?.unwrap_or(0);
        let width = number(dw::DW_AT_bit_size)?;
        let at = match (number(dw::DW_AT_data_bit_offset)?, width) {
            (Some(bit), _) => bit,
            (None, Some(width)) => match number(dw::DW_AT_bit_offset)? {
                // Up to DWARF 3, the offset counts from the upper end of the storage unit.
                Some(from_top) => {
                    let storage = match number(dw::DW_AT_byte_size)? {
                        Some(size) => size,
                        None => self.size(target, NEST_MAX)?,
                    };
                    (byte * 8 + storage * 8)
                        .checked_sub(from_top + width)
                        .context("a bitfield begins before its structure")?
                }
                None => byte * 8,
            },
            (None, None) => byte * 8,
        };
        Ok((at, width))
    }

    /// Return the structure or union without a name that a type is, or is an array of.
    fn nameless(&self, offset: UnitOffset) -> Result<Option<UnitOffset>> {
        let mut offset = offset;
        for _ in 0..NEST_MAX {
            let entry = self.entry(offset)?;
            match entry.tag() {
                dw::DW_TAG_structure_type | dw::DW_TAG_union_type => {
                    let name = self.name(offset)?;
                    let nameless = match self.language {
                        Language::C => name.is_empty(),
                        Language::Rust => is_made_up(&name),
                    };
                    return Ok(nameless.then_some(offset));
                }
                dw::DW_TAG_array_type
                | dw::DW_TAG_typedef
                | dw::DW_TAG_const_type
                | dw::DW_TAG_volatile_type
                | dw::DW_TAG_restrict_type
                | dw::DW_TAG_atomic_type => match self.target(offset)? {
                    Some(target) => offset = target,
                    None => return Ok(None),
                },
                _ => return Ok(None),
            }
        }
        bail!("types nest too deeply")
    }

    /// Return whether this is bindgen's rendering of a structure that is only declared.
    fn is_forward(&self, offset: UnitOffset) -> Result<bool> {
        match self.children(offset, dw::DW_TAG_member)?[..] {
            [only] => Ok(matches!(self.name(only)?.as_str(), "_unused" | "_address")),
            _ => Ok(false),
        }
    }

    /// Return the type behind `__BindgenUnionField<T>`, which has no size: a member of a union that bindgen
    /// rendered as a structure.
    fn within_union_field(&self, offset: UnitOffset) -> Result<Option<UnitOffset>> {
        if self.language != Language::Rust
            || !self.name(offset)?.starts_with("__BindgenUnionField<")
        {
            return Ok(None);
        }
        match self.children(offset, dw::DW_TAG_template_type_parameter)?[..] {
            [only] => self.target(only),
            _ => Ok(None),
        }
    }

    /// Size of a type in bytes; 0 if it has none.
    fn size(&self, offset: UnitOffset, nest: u32) -> Result<u64> {
        let nest = nest.checked_sub(1).context("types nest too deeply")?;
        let entry = self.entry(offset)?;
        if let Some(size) = entry.attr_value(dw::DW_AT_byte_size)? {
            return size.udata_value().context("a size is computed");
        }
        match entry.tag() {
            dw::DW_TAG_pointer_type => Ok(u64::from(self.unit.encoding().address_size)),
            dw::DW_TAG_array_type => {
                let element = self.target(offset)?.context("an array of nothing")?;
                let mut size = self.size(element, nest)?;
                for range in self.children(offset, dw::DW_TAG_subrange_type)? {
                    size = size
                        .checked_mul(self.elements(range)?)
                        .context("an array is too large")?;
                }
                Ok(size)
            }
            _ => match self.target(offset)? {
                Some(target) => self.size(target, nest),
                None => Ok(0),
            },
        }
    }

    /// Number of elements of one dimension of an array; 0 for a flexible one.
    fn elements(&self, range: UnitOffset) -> Result<u64> {
        let entry = self.entry(range)?;
        if let Some(count) = entry.attr_value(dw::DW_AT_count)? {
            return Ok(count.udata_value().unwrap_or(0));
        }
        Ok(match entry.attr_value(dw::DW_AT_upper_bound)? {
            Some(AttributeValue::Sdata(last)) => u64::try_from(last + 1).unwrap_or(0),
            Some(last) => last.udata_value().map_or(0, |last| last.wrapping_add(1)),
            None => 0,
        })
    }

    fn entry(&self, offset: UnitOffset) -> Result<Entry<'_>> {
        Ok(self.unit.entry(offset)?)
    }

    /// Return the children of one kind, in their order.
    fn children(&self, offset: UnitOffset, tag: gimli::DwTag) -> Result<Vec<UnitOffset>> {
        let mut tree = self.unit.entries_tree(Some(offset))?;
        let mut children = tree.root()?.children();
        let mut found = Vec::new();
        while let Some(child) = children.next()? {
            if child.entry().tag() == tag {
                found.push(child.entry().offset());
            }
        }
        Ok(found)
    }

    /// The type that an entry refers to.
    fn target(&self, offset: UnitOffset) -> Result<Option<UnitOffset>> {
        match self.entry(offset)?.attr_value(dw::DW_AT_type)? {
            None => Ok(None),
            Some(AttributeValue::UnitRef(target)) => Ok(Some(target)),
            Some(_) => bail!("a type is described in another unit: compiled with LTO?"),
        }
    }

    /// The name of an entry; empty if it has none.
    fn name(&self, offset: UnitOffset) -> Result<String> {
        match self.entry(offset)?.attr_value(dw::DW_AT_name)? {
            None => Ok(String::new()),
            Some(name) => Ok(self
                .dwarf
                .attr_string(self.unit, name)?
                .to_string()?
                .into_owned()),
        }
    }
}
