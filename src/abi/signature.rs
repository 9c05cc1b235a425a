// SPDX-License-Identifier: GPL-2.0
//! Signatures of kernel interfaces, and the check of a running kernel against them.
//!
//! A signature is a 64-bit FNV-1a hash of a canonical text, which describes a structure, a function or
//! an enumeration as BTF does. The host tool `rksm-tools layout` makes the table of expected signatures
//! from the kernel that the module is built for. [`check`] compares it with the BTF of the kernel that
//! loads the module. Both use the code in this file.
//!
//! The text contains:
//!
//! * structure or union: its size, and each member's name, offset, width, size and type
//! * function: type and size of the result and of each parameter
//! * enumeration: its size, and each enumerator's name and value
//!
//! Types are given by name. The text does not describe the target of a pointer, nor the members of a
//! named inner structure. So a structure whose layout matters must be in the table itself. The
//! enumerators of an enumeration without a name are interfaces of their own.
//!
//! Like [`super::btf`], this is pure logic: it uses only `core`, allocates nothing and does not panic.

use core::fmt::{self, Write};

use super::btf::{Btf, Budget, Enumerator, Error, Kind, Result, Type};

/// The depth to which types may nest in one description: pointers, qualifiers, prototypes, nameless members.
const DEPTH_MAX: u32 = 12;
/// The number of members and types that one description may have.
const STEPS_MAX: u32 = 20_000;

/// FNV-1a, 64 bits.
pub struct Fnv1a(u64);

impl Fnv1a {
    const OFFSET_BASIS: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0000_0100_0000_01b3;

    /// Return the hash of an empty text.
    pub fn new() -> Self {
        Fnv1a(Self::OFFSET_BASIS)
    }

    /// Return the hash of all that was written.
    pub fn finish(&self) -> u64 {
        self.0
    }
}

impl Default for Fnv1a {
    fn default() -> Self {
        Self::new()
    }
}

impl Write for Fnv1a {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        for byte in s.bytes() {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(Self::PRIME);
        }
        Ok(())
    }
}

/// A writer of descriptions.
struct Text<'a, 'b> {
    btf: &'a Btf<'b>,
    out: &'a mut dyn Write,
}

impl Text<'_, '_> {
    fn put(&mut self, args: fmt::Arguments<'_>) -> Result<()> {
        self.out.write_fmt(args).map_err(|_| Error::Sink)
    }

    fn members(&mut self, ty: &Type<'_>, budget: &mut Budget) -> Result<()> {
        let btf = self.btf;
        btf.for_each_member(ty, budget, &mut |budget, member| {
            self.put(format_args!(
                "\n {} @{}:{} ",
                btf.text(member.name_off)?,
                member.bit_offset,
                member.bitfield_size
            ))?;
            self.sized_type(member.type_id, budget)
        })
    }

    fn enumerators(&mut self, ty: &Type<'_>, budget: &mut Budget) -> Result<()> {
        for i in 0..ty.len() {
            budget.spend()?;
            let Enumerator { name_off, value } = ty.enumerator(i)?;
            self.put(format_args!("\n {} = {value}", self.btf.text(name_off)?))?;
        }
        Ok(())
    }

    fn prototype(&mut self, ty: &Type<'_>, name: &str, budget: &mut Budget) -> Result<()> {
        self.sized_type(ty.target(), budget)?;
        self.put(format_args!(" {name}("))?;
        for i in 0..ty.len() {
            // A parameter of type void stands for "...".
            self.sized_type(ty.param(i)?.type_id, budget)?;
            self.put(format_args!(", "))?;
        }
        self.put(format_args!(")"))
    }

    fn sized_type(&mut self, id: u32, budget: &mut Budget) -> Result<()> {
        self.put(format_args!("[{}] ", self.btf.size_of(id)?))?;
        self.type_name(id, budget)
    }

    fn type_name(&mut self, id: u32, budget: &mut Budget) -> Result<()> {
        budget.spend()?;
        budget.deeper(|budget| self.type_name_within(&self.btf.get(id)?, budget))
    }

    fn type_name_within(&mut self, ty: &Type<'_>, budget: &mut Budget) -> Result<()> {
        match ty.kind() {
            Kind::Void => self.put(format_args!("void")),
            Kind::Int | Kind::Float | Kind::Typedef => {
                let name = self.btf.name_text(ty)?;
                self.put(format_args!("{name}"))
            }
            Kind::Ptr => {
                self.type_name(ty.target(), budget)?;
                self.put(format_args!(" *"))
            }
            Kind::Array => {
                let (element, count) = ty.array()?;
                self.type_name(element, budget)?;
                self.put(format_args!("[{count}]"))
            }
            Kind::Struct => self.tagged("struct", ty, budget),
            Kind::Union => self.tagged("union", ty, budget),
            Kind::Fwd if ty.is_union_fwd() => self.tagged("union", ty, budget),
            Kind::Fwd => self.tagged("struct", ty, budget),
            Kind::Enum | Kind::Enum64 => self.tagged("enum", ty, budget),
            Kind::Const => self.qualified("const ", ty, budget),
            Kind::Volatile => self.qualified("volatile ", ty, budget),
            // Neither changes what is passed or stored, and some compilers do not record them.
            Kind::Restrict | Kind::TypeTag => self.qualified("", ty, budget),
            Kind::FuncProto => self.prototype(ty, "", budget),
            Kind::Func | Kind::Var | Kind::Datasec | Kind::DeclTag => Err(Error::BadKind),
        }
    }

    fn tagged(&mut self, keyword: &str, ty: &Type<'_>, budget: &mut Budget) -> Result<()> {
        let name = self.btf.name_text(ty)?;
        if !name.is_empty() || !ty.kind().is_aggregate() {
            return self.put(format_args!("{keyword} {name}"));
        }
        // Only the members distinguish types without a name.
        self.put(format_args!("{keyword} {{"))?;
        self.members(ty, budget)?;
        self.put(format_args!("}}"))
    }

    fn qualified(&mut self, word: &str, ty: &Type<'_>, budget: &mut Budget) -> Result<()> {
        self.put(format_args!("{word}"))?;
        self.type_name(ty.target(), budget)
    }
}

/// The part of a type that an interface consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The whole type.
    Whole,
    /// The enumerator with this index.
    Enumerator(u32),
}

/// Write the canonical text of a structure, union, function or enumeration, or of an enumerator.
pub fn describe(btf: &Btf<'_>, ty: &Type<'_>, part: Part, out: &mut dyn Write) -> Result<()> {
    let name = btf.name_text(ty)?;
    let mut budget = Budget::new(STEPS_MAX, DEPTH_MAX);
    let mut text = Text { btf, out };
    if let Part::Enumerator(i) = part {
        let Enumerator { name_off, value } = ty.enumerator(i)?;
        let (name, size) = (btf.text(name_off)?, ty.own_size());
        return text.put(format_args!("constant {name} [{size}] = {value}"));
    }
    match ty.kind() {
        Kind::Struct | Kind::Union => {
            let keyword = if ty.kind() == Kind::Union {
                "union"
            } else {
                "struct"
            };
            text.put(format_args!("{keyword} {name} [{}]", ty.own_size()))?;
            text.members(ty, &mut budget)
        }
        Kind::Func => {
            let proto = btf.get(ty.target())?;
            if proto.kind() != Kind::FuncProto {
                return Err(Error::BadKind);
            }
            text.prototype(&proto, name, &mut budget)
        }
        Kind::Enum | Kind::Enum64 => {
            text.put(format_args!("enum {name} [{}]", ty.own_size()))?;
            text.enumerators(ty, &mut budget)
        }
        _ => Err(Error::BadKind),
    }
}

/// Return the hash of the text that [`describe`] writes.
pub fn signature(btf: &Btf<'_>, ty: &Type<'_>, part: Part) -> Result<u64> {
    let mut hash = Fnv1a::new();
    describe(btf, ty, part, &mut hash)?;
    Ok(hash.finish())
}

/// [`Entry::kind`] of a structure or union.
pub const KIND_STRUCT: u8 = 1;
/// [`Entry::kind`] of a function.
pub const KIND_FUNC: u8 = 2;
/// [`Entry::kind`] of an enumeration.
pub const KIND_ENUM: u8 = 3;
/// [`Entry::kind`] of an enumerator of an enumeration without a name.
pub const KIND_CONSTANT: u8 = 4;
/// The longest name that fits into an [`Entry`].
pub const NAME_MAX: usize = 62;
/// The largest number of entries in a table.
pub const ENTRIES_MAX: usize = WORDS * 64;
/// The number of words in [`Bits`].
const WORDS: usize = 8;

/// Call `f` with the kind, name and part of each interface in a type.
///
/// A nameless enumeration has one for each enumerator, and other types have at most one.
pub fn for_each_interface<'a>(
    btf: &Btf<'a>,
    ty: &Type<'a>,
    f: &mut dyn FnMut(u8, &'a [u8], Part) -> Result<()>,
) -> Result<()> {
    let name = btf.name(ty)?;
    match ty.kind() {
        Kind::Struct | Kind::Union => f(KIND_STRUCT, name, Part::Whole),
        Kind::Func => f(KIND_FUNC, name, Part::Whole),
        // An enumeration without enumerators is only a forward declaration.
        Kind::Enum | Kind::Enum64 if !name.is_empty() && !ty.is_empty() => {
            f(KIND_ENUM, name, Part::Whole)
        }
        Kind::Enum | Kind::Enum64 => {
            for i in 0..ty.len() {
                let name = btf.string(ty.enumerator(i)?.name_off)?;
                f(KIND_CONSTANT, name, Part::Enumerator(i))?;
            }
            Ok(())
        }
        _ => Ok(()),
    }
}

/// The expected signature of one interface.
///
/// An entry is plain bytes without pointers, so that a test can find it by name in `rksm.ko` and flip a
/// bit of the signature.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Entry {
    /// The expected signature.
    pub signature: u64,
    /// [`KIND_STRUCT`], [`KIND_FUNC`], [`KIND_ENUM`] or [`KIND_CONSTANT`].
    pub kind: u8,
    name_len: u8,
    name: [u8; NAME_MAX],
}

impl Entry {
    /// Make an entry. A name longer than [`NAME_MAX`] is cut, and then matches nothing.
    pub const fn new(kind: u8, name: &str, signature: u64) -> Self {
        let from = name.as_bytes();
        let mut entry = Entry {
            signature,
            kind,
            name_len: 0,
            name: [0; NAME_MAX],
        };
        let mut i = 0;
        // Const context: no iterators. Both indices are bounded by the condition.
        while i < from.len() && i < NAME_MAX {
            entry.name[i] = from[i];
            i += 1;
        }
        entry.name_len = i as u8;
        entry
    }

    /// Return the name of the interface.
    pub fn name(&self) -> &[u8] {
        self.name.get(..usize::from(self.name_len)).unwrap_or(&[])
    }

    /// Return the name of the interface as text.
    pub fn name_text(&self) -> &str {
        core::str::from_utf8(self.name()).unwrap_or("?")
    }

    /// Return the word that comes before the name in a message.
    pub fn keyword(&self) -> &'static str {
        match self.kind {
            KIND_STRUCT => "struct",
            KIND_FUNC => "function",
            KIND_ENUM => "enum",
            KIND_CONSTANT => "constant",
            _ => "interface",
        }
    }

    fn key(&self) -> (u8, &[u8]) {
        (self.kind, self.name())
    }
}

/// The table of expected signatures, as stored in the module.
#[repr(C)]
pub struct Table<const N: usize> {
    /// The bytes of [`TABLE_MAGIC`].
    pub magic: [u8; 8],
    /// The number of entries.
    pub count: u64,
    /// The entries, sorted by kind and name.
    pub entries: [Entry; N],
}

/// The first bytes of a [`Table`].
pub const TABLE_MAGIC: [u8; 8] = *b"RKSMABI1";

impl<const N: usize> Table<N> {
    /// Return the entries, read from memory.
    ///
    /// The compiler cannot fold them into the code, so a table that was changed in the file takes effect.
    pub fn entries(&'static self) -> &'static [Entry] {
        &core::hint::black_box(self).entries
    }
}

/// The way in which the running kernel differs from an [`Entry`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mismatch {
    /// The kernel has no interface of this kind and name.
    Missing,
    /// The kernel has such an interface, with another signature.
    Different,
}

impl Mismatch {
    /// Return the words that come after the name in a message.
    pub fn as_str(self) -> &'static str {
        match self {
            Mismatch::Missing => "is not in this kernel",
            Mismatch::Different => "differs in this kernel",
        }
    }
}

/// One bit for each entry of a table.
struct Bits([u64; WORDS]);

impl Bits {
    fn set(&mut self, i: usize) {
        if let Some(word) = self.0.get_mut(i / 64) {
            *word |= 1 << (i % 64);
        }
    }

    fn get(&self, i: usize) -> bool {
        self.0
            .get(i / 64)
            .is_some_and(|word| word & (1 << (i % 64)) != 0)
    }
}

/// Compare the kernel's types with the table of expected signatures.
///
/// Call `report` for each entry without a match, in the order of the table, and return the number of
/// these entries.
///
/// Several types may share a name, such as private structures in different files of the kernel. The
/// table then has an entry for each that differs, and the kernel must have all of them.
///
/// # Errors
///
/// The result says nothing about any entry in these cases:
///
/// * [`Error::TooLong`]: the table has more than [`ENTRIES_MAX`] entries, or a description is too long.
/// * [`Error::BadIndex`]: the table is not sorted.
/// * Any other: the BTF is malformed.
pub fn check(
    btf: &Btf<'_>,
    expected: &[Entry],
    report: &mut dyn FnMut(&Entry, Mismatch),
) -> Result<usize> {
    if expected.len() > ENTRIES_MAX {
        return Err(Error::TooLong);
    }
    if !expected.is_sorted_by(|a, b| a.key() <= b.key()) {
        return Err(Error::BadIndex);
    }

    // There are many more types than entries: go through the types once, and search the table for each.
    let mut found = Bits([0; WORDS]);
    let mut matched = Bits([0; WORDS]);
    for id in 1..=btf.last_id() {
        let ty = btf.get(id)?;
        for_each_interface(btf, &ty, &mut |kind, name, part| {
            let key = (kind, name);
            let first = expected.partition_point(|entry| entry.key() < key);
            let mut actual = None;
            for i in first..expected.len() {
                let Some(entry) = expected.get(i).filter(|entry| entry.key() == key) else {
                    break;
                };
                let actual = match actual {
                    Some(actual) => actual,
                    None => *actual.insert(signature(btf, &ty, part)?),
                };
                found.set(i);
                if entry.signature == actual {
                    matched.set(i);
                }
            }
            Ok(())
        })?;
    }

    let mut mismatches: usize = 0;
    for i in 0..expected.len() {
        let Some(entry) = expected.get(i).filter(|_| !matched.get(i)) else {
            continue;
        };
        let mismatch = match found.get(i) {
            true => Mismatch::Different,
            false => Mismatch::Missing,
        };
        report(entry, mismatch);
        mismatches = mismatches.saturating_add(1);
    }
    Ok(mismatches)
}
