// SPDX-License-Identifier: GPL-2.0
//! Generate `ksm_layout.rs` from the BTF of the kernel that the module is built for.

use crate::abi::btf::{self, Blob, Btf, Budget, Kind, Type};
use crate::abi::buildid;
use crate::abi::signature::{
    self, Part, ENTRIES_MAX, KIND_CONSTANT, KIND_ENUM, KIND_FUNC, KIND_STRUCT, NAME_MAX,
};
use crate::list::{Interface, Sort, Symbol};
use anyhow::{anyhow, bail, ensure, Context, Result};
use object::read::elf::{FileHeader, SectionHeader};
use object::{elf, Endianness};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

/// Structures whose layout the module must share, with the members that the rest of the kernel accesses.
const SHARED: [(&str, &[&str]); 3] = [
    ("ksm_stable_node", &["hlist", "kpfn"]),
    (
        "ksm_rmap_item",
        &["hlist", "address", "linear_page_index", "anon_vma", "mm"],
    ),
    ("ksm_mm_slot", &["slot"]),
];

/// BTF has no alignment. No member of these structures needs more than a word.
const WORD: u64 = 8;
const NEST_MAX: u32 = 16;

impl std::error::Error for btf::Error {}

/// Return the BTF in an ELF file, or the file itself if it is raw BTF.
pub fn find_btf(data: &[u8]) -> Result<&[u8]> {
    if !data.starts_with(&elf::ELFMAG) {
        return Ok(data);
    }
    let header = elf::FileHeader64::<Endianness>::parse(data).context("not a 64-bit ELF file")?;
    let endian = header.endian()?;
    let (_, section) = header
        .sections(endian, data)?
        .section_by_name(endian, b".BTF")
        .context("no .BTF section: was this kernel built with CONFIG_DEBUG_INFO_BTF?")?;
    Ok(section.data(endian, data)?)
}

/// Return the build id of an ELF image, if it has one.
pub fn find_build_id(image: &[u8]) -> Result<Option<&[u8]>> {
    ensure!(
        image.starts_with(&elf::ELFMAG),
        "raw BTF does not say which image it is from: give the image itself"
    );
    let header = elf::FileHeader64::<Endianness>::parse(image).context("not a 64-bit ELF file")?;
    let endian = header.endian()?;
    // The kernel keeps this section in memory. Its linker script collects all notes there.
    let sections = header.sections(endian, image)?;
    let Some((_, section)) = sections.section_by_name(endian, b".notes") else {
        return Ok(None);
    };
    let id = buildid::find(section.data(endian, image)?);
    if let Some(id) = id {
        ensure!(
            id.len() <= buildid::ID_MAX,
            "the build id has {} bytes, more than {}",
            id.len(),
            buildid::ID_MAX
        );
    }
    Ok(id)
}

/// Format a build id in the usual way.
pub fn hex(id: &[u8]) -> String {
    let mut text = String::new();
    for byte in id {
        // Writing to a string never fails.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// BTF and its index.
pub struct Types<'a> {
    blob: Blob<'a>,
    index: Vec<u32>,
}

impl<'a> Types<'a> {
    /// Read the BTF.
    pub fn parse(data: &'a [u8]) -> btf::Result<Self> {
        let blob = Blob::parse(data)?;
        let mut index = vec![0; blob.count_types()? as usize];
        blob.fill_index(&mut index)?;
        Ok(Types { blob, index })
    }

    /// Return the index for looking up types.
    pub fn btf(&self) -> Btf<'_> {
        Btf::new(self.blob, &self.index)
    }
}

/// The result of the generator.
pub struct Generated {
    /// Text of the Rust file.
    pub text: String,
    /// Number of signatures in it.
    pub signatures: usize,
    /// Notes for the user, one line each.
    pub notes: Vec<String>,
}

/// All that can be listed, by kind and name.
type ByName<'a> = BTreeMap<(u8, &'a [u8]), Vec<(Type<'a>, Part)>>;

fn by_name<'a>(btf: &Btf<'a>) -> Result<ByName<'a>> {
    let mut types = ByName::new();
    for id in 1..=btf.last_id() {
        let ty = btf.get(id)?;
        signature::for_each_interface(btf, &ty, &mut |kind, name, part| {
            types.entry((kind, name)).or_default().push((ty, part));
            Ok(())
        })?;
    }
    Ok(types)
}

/// Return the types of this name that differ from each other: each signature with one type.
fn distinct<'a>(
    btf: &Btf<'a>,
    types: &ByName<'a>,
    kind: u8,
    name: &str,
) -> Result<BTreeMap<u64, Type<'a>>> {
    let same_name = types.get(&(kind, name.as_bytes()));
    same_name
        .into_iter()
        .flatten()
        .map(|(ty, part)| {
            let signature = signature::signature(btf, ty, *part).context(name.to_string())?;
            Ok((signature, *ty))
        })
        .collect()
}

/// Make the file from BTF and build id of the image, the listed symbols and the listed interfaces.
pub fn generate(
    btf: &Btf<'_>,
    build_id: Option<&[u8]>,
    symbols: &[Symbol],
    interfaces: &[Interface],
) -> Result<Generated> {
    let types = by_name(btf)?;
    let mut notes = Vec::new();

    let mut text = String::from(
        // With a code for the colon: checkpatch takes it for the tag of this file otherwise.
        "// SPDX-License-Identifier\x3a GPL-2.0\n\
         // Made by rksm-tools layout from the kernel's BTF. Do not edit.\n\n\
         // Layouts, signatures and build id of the kernel that the module was built for.\n\n\
         use super::buildid::Record;\n\
         use super::signature::{\n    \
             Entry, Table, KIND_CONSTANT, KIND_ENUM, KIND_FUNC, KIND_STRUCT, TABLE_MAGIC,\n\
         };\n",
    );
    for (name, needed) in SHARED {
        let found = distinct(btf, &types, KIND_STRUCT, name)?;
        let mut found = found.values();
        match (found.next(), found.next()) {
            (Some(ty), None) => shared_layout(btf, ty, name, needed, &mut text)?,
            (None, _) => bail!("struct {name} is not in the kernel's BTF: CONFIG_KSM is needed"),
            _ => bail!("the kernel's BTF has several different struct {name}"),
        }
    }

    let mut entries: BTreeSet<(u8, &str, u64)> = BTreeSet::new();
    let mut add = |kind, name| -> Result<bool> {
        ensure!(
            str::len(name) <= NAME_MAX,
            "{name}: name is longer than {NAME_MAX}"
        );
        let found = distinct(btf, &types, kind, name)?;
        entries.extend(found.keys().map(|&signature| (kind, name, signature)));
        Ok(!found.is_empty())
    };
    for interface in interfaces {
        let kind = match interface.sort {
            Sort::Struct => KIND_STRUCT,
            Sort::Func => KIND_FUNC,
            Sort::Enum => KIND_ENUM,
            Sort::Constant => KIND_CONSTANT,
        };
        ensure!(
            add(kind, &interface.name)? || interface.optional,
            "{} {} is listed, but not in the kernel's BTF",
            interface.sort.keyword(),
            interface.name
        );
    }
    let mut unchecked = Vec::new();
    for symbol in symbols {
        if !add(KIND_FUNC, &symbol.name)? {
            unchecked.push(symbol.name.as_str());
        }
    }
    if !unchecked.is_empty() {
        notes.push(format!(
            "no function in BTF (a variable, or left out by pahole), so the type is not checked: {}",
            unchecked.join(" ")
        ));
    }
    ensure!(
        entries.len() <= ENTRIES_MAX,
        "{} signatures, but a table holds {ENTRIES_MAX}",
        entries.len()
    );
    table(&mut text, &entries, &unchecked)?;
    let id = build_id.unwrap_or_default();
    let bytes: Vec<_> = id.iter().map(|byte| format!("0x{byte:02x}")).collect();
    write!(
        text,
        "\n/// Build id of the image: {}.\n\
         #[used]\n\
         pub static BUILD_ID: Record = Record::new(&[{}]);\n",
        if id.is_empty() {
            "none".to_string()
        } else {
            hex(id)
        },
        bytes.join(", ")
    )?;
    Ok(Generated {
        text,
        signatures: entries.len(),
        notes,
    })
}

/// Constants for size, alignment and member offsets of one structure.
fn shared_layout(
    btf: &Btf<'_>,
    ty: &Type<'_>,
    name: &str,
    needed: &[&str],
    text: &mut String,
) -> Result<()> {
    let prefix = name.to_uppercase();
    let mut members = Vec::new();
    let mut align = 1;
    btf.for_each_member(ty, &mut Budget::new(10_000, NEST_MAX), &mut |_, member| {
        align = align.max(align_of(btf, member.type_id, NEST_MAX)?);
        members.push((btf.text(member.name_off)?, member));
        Ok(())
    })
    .map_err(|error| anyhow!("struct {name}: {error}"))?;

    let missing: Vec<_> = needed
        .iter()
        .filter(|needed| !members.iter().any(|(name, _)| name == *needed))
        .copied()
        .collect();
    ensure!(
        missing.is_empty(),
        "struct {name} of this kernel lacks {}",
        missing.join(", ")
    );

    write!(
        text,
        "\n/// Size of `struct {name}`.\n\
         pub const {prefix}_SIZE: usize = {};\n\
         /// Alignment of `struct {name}`.\n\
         pub const {prefix}_ALIGN: usize = {align};\n",
        ty.own_size()
    )?;
    for (member, at) in members {
        if member.is_empty() {
            continue;
        }
        if at.bitfield_size != 0 || at.bit_offset % 8 != 0 {
            ensure!(
                !needed.contains(&member),
                "struct {name}: {member} is a bitfield"
            );
            writeln!(text, "// {member} is a bitfield.")?;
            continue;
        }
        write!(
            text,
            "/// Offset of `{member}` in `struct {name}`.\n\
             pub const {prefix}_{}: usize = {};\n",
            member.to_uppercase(),
            at.bit_offset / 8
        )?;
    }
    Ok(())
}

/// The natural alignment of a type.
fn align_of(btf: &Btf<'_>, id: u32, nest: u32) -> btf::Result<u64> {
    let nest = nest.checked_sub(1).ok_or(btf::Error::TooDeep)?;
    let ty = btf.strip(id, true)?;
    Ok(match ty.kind() {
        Kind::Array => align_of(btf, ty.array()?.0, nest)?,
        Kind::Struct | Kind::Union => {
            let mut align = 1;
            for i in 0..ty.len() {
                align = align.max(align_of(btf, ty.member(i)?.type_id, nest)?);
            }
            align
        }
        _ => btf.size_of(id)?.clamp(1, WORD),
    })
}

/// The table of signatures.
fn table(text: &mut String, entries: &BTreeSet<(u8, &str, u64)>, unchecked: &[&str]) -> Result<()> {
    let count = entries.len();
    text.push('\n');
    for name in unchecked {
        writeln!(text, "// Not checked, no function in BTF: {name}")?;
    }
    write!(
        text,
        "/// What the kernel's interfaces looked like when the module was built.\n\
         #[used]\n\
         pub static EXPECTED: Table<{count}> = Table {{\n    \
             magic: TABLE_MAGIC,\n    \
             count: {count},\n    \
             entries: [\n"
    )?;
    for (kind, name, signature) in entries {
        let kind = match *kind {
            KIND_FUNC => "KIND_FUNC",
            KIND_ENUM => "KIND_ENUM",
            KIND_CONSTANT => "KIND_CONSTANT",
            _ => "KIND_STRUCT",
        };
        writeln!(
            text,
            "        Entry::new({kind}, \"{name}\", 0x{signature:016x}),"
        )?;
    }
    text.push_str("    ],\n};\n");
    Ok(())
}
