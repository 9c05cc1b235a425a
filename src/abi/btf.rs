// SPDX-License-Identifier: GPL-2.0
//! Reader for the kernel's BTF type information.
//!
//! The kernel module and the host tool share this code. It is pure logic: it uses only `core`, allocates
//! nothing and does not panic. For any input, each access is bounds-checked, each sum is checked for
//! overflow, and each walk is bounded.
//!
//! BTF records vary in size, so the lookup of a type by its id needs an index of offsets. The caller
//! provides the memory:
//!
//! 1. [`Blob::parse`] checks the header.
//! 2. [`Blob::count_types`] returns the number of `u32` slots that the index needs.
//! 3. [`Blob::fill_index`] fills the index.
//! 4. [`Btf::new`] combines both.
//!
//! The format is that of the kernel's `include/uapi/linux/btf.h`. Bits 24 to 30 of the info word are the
//! kind, and bits 0 to 23 are vlen. Older kernels used fewer bits of the same word. Fields are in little
//! endian.

use core::fmt;

const MAGIC: u16 = 0xeb9f;
const VERSION: u8 = 1;
const HEADER_MIN: u32 = 24;
const RECORD_LEN: u32 = 12;
const MEMBER_LEN: u32 = 12;
const PARAM_LEN: u32 = 8;
const ENUMERATOR_LEN: u32 = 8;
const ENUMERATOR64_LEN: u32 = 12;
const POINTER_SIZE: u64 = 8;

/// The number of modifiers, typedefs and array dimensions that are followed in a row.
const CHAIN_MAX: u32 = 64;

/// An error in BTF, or in the use of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// The header is too short, or its magic or version is unknown.
    BadHeader,
    /// A section or a record extends beyond the end of the data.
    Truncated,
    /// A record has an unknown kind, or one that is not allowed in its place.
    BadKind,
    /// A string is outside the string section, is not terminated, or is not UTF-8.
    BadString,
    /// A type id is larger than the number of types.
    BadTypeId,
    /// The index does not have exactly one slot for each type.
    BadIndex,
    /// Types nest more deeply than this code follows.
    TooDeep,
    /// A description has more members and types than its budget allows.
    TooLong,
    /// The writer of a description returned an error.
    Sink,
}

impl Error {
    /// Return the error as text, for the kernel's print macros, which do not accept [`fmt::Display`].
    pub fn as_str(self) -> &'static str {
        match self {
            Error::BadHeader => "not BTF, or of an unknown version",
            Error::Truncated => "truncated BTF",
            Error::BadKind => "unknown or unexpected BTF kind",
            Error::BadString => "bad string in BTF",
            Error::BadTypeId => "bad type id in BTF",
            Error::BadIndex => "index does not fit the BTF",
            Error::TooDeep => "BTF types nest too deeply",
            Error::TooLong => "BTF type is too long",
            Error::Sink => "description was not accepted",
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The result of reading BTF.
pub type Result<T> = core::result::Result<T, Error>;

/// The kind of a BTF record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Type id 0, which has no record.
    Void,
    /// Integer.
    Int,
    /// Pointer.
    Ptr,
    /// Array.
    Array,
    /// Structure.
    Struct,
    /// Union.
    Union,
    /// Enumeration of up to 32 bits.
    Enum,
    /// Forward declaration of a structure or union.
    Fwd,
    /// Typedef.
    Typedef,
    /// `volatile`.
    Volatile,
    /// `const`.
    Const,
    /// `restrict`.
    Restrict,
    /// Function.
    Func,
    /// Function prototype.
    FuncProto,
    /// Variable.
    Var,
    /// Section of variables.
    Datasec,
    /// Floating point number.
    Float,
    /// Tag on a declaration.
    DeclTag,
    /// Tag on a type.
    TypeTag,
    /// Enumeration of 64 bits.
    Enum64,
}

impl Kind {
    fn from_info(info: u32) -> Result<Self> {
        Ok(match (info >> 24) & 0x7f {
            1 => Kind::Int,
            2 => Kind::Ptr,
            3 => Kind::Array,
            4 => Kind::Struct,
            5 => Kind::Union,
            6 => Kind::Enum,
            7 => Kind::Fwd,
            8 => Kind::Typedef,
            9 => Kind::Volatile,
            10 => Kind::Const,
            11 => Kind::Restrict,
            12 => Kind::Func,
            13 => Kind::FuncProto,
            14 => Kind::Var,
            15 => Kind::Datasec,
            16 => Kind::Float,
            17 => Kind::DeclTag,
            18 => Kind::TypeTag,
            19 => Kind::Enum64,
            _ => return Err(Error::BadKind),
        })
    }

    /// Return the number of bytes that follow the first 12 of a record: those that each record of the kind has,
    /// and those for each of its `vlen` elements.
    fn extra(self) -> (u32, u32) {
        match self {
            Kind::Int | Kind::Var | Kind::DeclTag => (4, 0),
            Kind::Array => (12, 0),
            Kind::Struct | Kind::Union => (0, MEMBER_LEN),
            Kind::Datasec => (0, 12),
            Kind::Enum64 => (0, ENUMERATOR64_LEN),
            Kind::Enum => (0, ENUMERATOR_LEN),
            Kind::FuncProto => (0, PARAM_LEN),
            _ => (0, 0),
        }
    }

    /// Return whether the kind only qualifies the type that it refers to.
    pub fn is_modifier(self) -> bool {
        matches!(
            self,
            Kind::Volatile | Kind::Const | Kind::Restrict | Kind::TypeTag
        )
    }

    /// Return whether the kind has members.
    pub fn is_aggregate(self) -> bool {
        matches!(self, Kind::Struct | Kind::Union)
    }

    /// Return whether the kind has enumerators.
    pub fn is_enumeration(self) -> bool {
        matches!(self, Kind::Enum | Kind::Enum64)
    }
}

fn bytes(data: &[u8], off: u32, len: u32) -> Result<&[u8]> {
    let end = off.checked_add(len).ok_or(Error::Truncated)?;
    data.get(off as usize..end as usize).ok_or(Error::Truncated)
}

fn read_u32(data: &[u8], off: u32) -> Result<u32> {
    match bytes(data, off, 4)? {
        &[a, b, c, d] => Ok(u32::from_le_bytes([a, b, c, d])),
        _ => Err(Error::Truncated),
    }
}

/// BTF data whose header has been checked.
#[derive(Clone, Copy)]
pub struct Blob<'a> {
    types: &'a [u8],
    strings: &'a [u8],
}

impl<'a> Blob<'a> {
    /// Check the header of `data`, and find the sections of types and strings.
    pub fn parse(data: &'a [u8]) -> Result<Self> {
        let (magic, version) = match bytes(data, 0, 4) {
            Ok(&[a, b, version, _]) => (u16::from_le_bytes([a, b]), version),
            _ => return Err(Error::BadHeader),
        };
        let header_len = read_u32(data, 4).map_err(|_| Error::BadHeader)?;
        if magic != MAGIC || version != VERSION || header_len < HEADER_MIN {
            return Err(Error::BadHeader);
        }
        let section = |field: u32| {
            // Offsets are relative to the end of the header.
            let off = read_u32(data, field)?
                .checked_add(header_len)
                .ok_or(Error::Truncated)?;
            bytes(data, off, read_u32(data, field.saturating_add(4))?)
        };
        Ok(Blob {
            types: section(8)?,
            strings: section(16)?,
        })
    }

    fn record(&self, off: u32) -> Result<Type<'a>> {
        let info = read_u32(self.types, off.checked_add(4).ok_or(Error::Truncated)?)?;
        let kind = Kind::from_info(info)?;
        let vlen = info & 0x00ff_ffff;
        let (fixed, each) = kind.extra();
        let extra_len = each
            .checked_mul(vlen)
            .and_then(|len| len.checked_add(fixed))
            .ok_or(Error::Truncated)?;
        let extra_off = off.checked_add(RECORD_LEN).ok_or(Error::Truncated)?;
        Ok(Type {
            kind,
            flag: info >> 31 != 0,
            vlen,
            name_off: read_u32(self.types, off)?,
            size_or_type: read_u32(self.types, off.checked_add(8).ok_or(Error::Truncated)?)?,
            extra: bytes(self.types, extra_off, extra_len)?,
        })
    }

    /// Call `f` with the offset of every record, in the order of type ids, which start at 1.
    fn for_each_offset(&self, mut f: impl FnMut(u32) -> Result<()>) -> Result<()> {
        let mut off: u32 = 0;
        while (off as usize) < self.types.len() {
            let extra_len = self.record(off)?.extra.len() as u32;
            f(off)?;
            off = RECORD_LEN
                .checked_add(extra_len)
                .and_then(|len| off.checked_add(len))
                .ok_or(Error::Truncated)?;
        }
        Ok(())
    }

    /// Return the number of types, which is also the number of slots in the index. Reads all records.
    pub fn count_types(&self) -> Result<u32> {
        let mut count: u32 = 0;
        self.for_each_offset(|_| {
            count = count.checked_add(1).ok_or(Error::TooLong)?;
            Ok(())
        })?;
        Ok(count)
    }

    /// Fill `index`, which must have exactly [`Blob::count_types`] slots.
    pub fn fill_index(&self, index: &mut [u32]) -> Result<()> {
        let mut slots = index.iter_mut();
        self.for_each_offset(|off| {
            *slots.next().ok_or(Error::BadIndex)? = off;
            Ok(())
        })?;
        match slots.next() {
            None => Ok(()),
            Some(_) => Err(Error::BadIndex),
        }
    }
}

/// One BTF record.
#[derive(Clone, Copy)]
pub struct Type<'a> {
    kind: Kind,
    flag: bool,
    vlen: u32,
    name_off: u32,
    size_or_type: u32,
    extra: &'a [u8],
}

/// A member of a structure or union.
#[derive(Clone, Copy, Debug)]
pub struct Member {
    /// Offset of its name in the string section.
    pub name_off: u32,
    /// Its type.
    pub type_id: u32,
    /// Offset in bits from the start of the structure; of the outermost one in [`Btf::for_each_member`].
    pub bit_offset: u32,
    /// Width in bits of a bitfield, 0 for any other member.
    pub bitfield_size: u32,
}

/// A parameter of a function prototype.
#[derive(Clone, Copy, Debug)]
pub struct Param {
    /// Offset of its name in the string section.
    pub name_off: u32,
    /// Its type; 0 in the last parameter stands for `...`.
    pub type_id: u32,
}

/// A named constant of an enumeration.
#[derive(Clone, Copy, Debug)]
pub struct Enumerator {
    /// Offset of its name in the string section.
    pub name_off: u32,
    /// Its value. A value of an unsigned 64-bit enumeration is reinterpreted as signed.
    pub value: i64,
}

impl Type<'_> {
    const VOID: Type<'static> = Type {
        kind: Kind::Void,
        flag: false,
        vlen: 0,
        name_off: 0,
        size_or_type: 0,
        extra: &[],
    };

    /// Return the kind of the record.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Return the id of the type that it refers to. Only for kinds that refer to one.
    pub fn target(&self) -> u32 {
        self.size_or_type
    }

    /// Return the size in bytes that the record gives. Only for kinds that have one.
    pub fn own_size(&self) -> u32 {
        self.size_or_type
    }

    /// Return whether a forward declaration is that of a union.
    pub fn is_union_fwd(&self) -> bool {
        self.flag
    }

    /// Return the number of members, parameters or enumerators.
    pub fn len(&self) -> u32 {
        self.vlen
    }

    /// Return whether there is no member, parameter or enumerator.
    pub fn is_empty(&self) -> bool {
        self.vlen == 0
    }

    /// Return member `i` of a structure or union.
    pub fn member(&self, i: u32) -> Result<Member> {
        if !self.kind.is_aggregate() {
            return Err(Error::BadKind);
        }
        let off = i.checked_mul(MEMBER_LEN).ok_or(Error::Truncated)?;
        let &[a, b, c] = &self.words(off)?;
        // If the flag is set, the upper byte of the offset is the width of a bitfield. If not, only an
        // integer type of odd width could make the member a bitfield. Current compilers do not emit that.
        let (bit_offset, bitfield_size) = if self.flag {
            (c & 0x00ff_ffff, c >> 24)
        } else {
            (c, 0)
        };
        Ok(Member {
            name_off: a,
            type_id: b,
            bit_offset,
            bitfield_size,
        })
    }

    /// Return parameter `i` of a function prototype.
    pub fn param(&self, i: u32) -> Result<Param> {
        if self.kind != Kind::FuncProto {
            return Err(Error::BadKind);
        }
        let off = i.checked_mul(PARAM_LEN).ok_or(Error::Truncated)?;
        let second = off.checked_add(4).ok_or(Error::Truncated)?;
        Ok(Param {
            name_off: read_u32(self.extra, off)?,
            type_id: read_u32(self.extra, second)?,
        })
    }

    /// Return enumerator `i` of an enumeration.
    pub fn enumerator(&self, i: u32) -> Result<Enumerator> {
        let word =
            |off: u32, plus| read_u32(self.extra, off.checked_add(plus).ok_or(Error::Truncated)?);
        match self.kind {
            Kind::Enum => {
                let off = i.checked_mul(ENUMERATOR_LEN).ok_or(Error::Truncated)?;
                let bits = word(off, 4)?;
                // The flag is set if values are signed.
                let value = match self.flag {
                    true => i64::from(bits as i32),
                    false => i64::from(bits),
                };
                Ok(Enumerator {
                    name_off: word(off, 0)?,
                    value,
                })
            }
            Kind::Enum64 => {
                let off = i.checked_mul(ENUMERATOR64_LEN).ok_or(Error::Truncated)?;
                let (low, high) = (u64::from(word(off, 4)?), u64::from(word(off, 8)?));
                Ok(Enumerator {
                    name_off: word(off, 0)?,
                    value: ((high << 32) | low) as i64,
                })
            }
            _ => Err(Error::BadKind),
        }
    }

    /// Return the element type and the number of elements of an array.
    pub fn array(&self) -> Result<(u32, u32)> {
        if self.kind != Kind::Array {
            return Err(Error::BadKind);
        }
        let &[element, _index_type, count] = &self.words(0)?;
        Ok((element, count))
    }

    /// Return the three words at `off` behind the fixed part.
    fn words(&self, off: u32) -> Result<[u32; 3]> {
        let second = off.checked_add(4).ok_or(Error::Truncated)?;
        let third = off.checked_add(8).ok_or(Error::Truncated)?;
        Ok([
            read_u32(self.extra, off)?,
            read_u32(self.extra, second)?,
            read_u32(self.extra, third)?,
        ])
    }
}

/// The number of further types and members that may be read, and the depth of nesting.
///
/// It bounds the time and the stack that malformed BTF can use, such as types that refer to each other in
/// a circle.
pub struct Budget {
    steps: u32,
    depth: u32,
}

impl Budget {
    /// Make a budget of `steps` types and members, which nest to at most `depth` levels.
    pub fn new(steps: u32, depth: u32) -> Self {
        Budget { steps, depth }
    }

    /// Use one step.
    pub fn spend(&mut self) -> Result<()> {
        self.steps = self.steps.checked_sub(1).ok_or(Error::TooLong)?;
        Ok(())
    }

    /// Call `f` one level deeper.
    pub fn deeper<T>(&mut self, f: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        let depth = self.depth;
        self.depth = depth.checked_sub(1).ok_or(Error::TooDeep)?;
        let result = f(self);
        self.depth = depth;
        result
    }
}

/// BTF with an index, for lookups of types by their id.
#[derive(Clone, Copy)]
pub struct Btf<'a> {
    blob: Blob<'a>,
    index: &'a [u32],
}

impl<'a> Btf<'a> {
    /// Combine BTF with the index that [`Blob::fill_index`] made of it.
    pub fn new(blob: Blob<'a>, index: &'a [u32]) -> Self {
        Btf { blob, index }
    }

    /// Return the largest type id.
    pub fn last_id(&self) -> u32 {
        u32::try_from(self.index.len()).unwrap_or(u32::MAX)
    }

    /// Return the type with this id.
    pub fn get(&self, id: u32) -> Result<Type<'a>> {
        match id.checked_sub(1) {
            None => Ok(Type::VOID),
            Some(slot) => self
                .blob
                .record(*self.index.get(slot as usize).ok_or(Error::BadTypeId)?),
        }
    }

    /// Return the string at this offset, without its terminating NUL.
    pub fn string(&self, off: u32) -> Result<&'a [u8]> {
        let tail = self
            .blob
            .strings
            .get(off as usize..)
            .ok_or(Error::BadString)?;
        let len = tail
            .iter()
            .position(|&byte| byte == 0)
            .ok_or(Error::BadString)?;
        tail.get(..len).ok_or(Error::BadString)
    }

    /// Return the string at this offset as text.
    pub fn text(&self, off: u32) -> Result<&'a str> {
        core::str::from_utf8(self.string(off)?).map_err(|_| Error::BadString)
    }

    /// Return the name of a type, which is empty if it has none.
    pub fn name(&self, ty: &Type<'_>) -> Result<&'a [u8]> {
        self.string(ty.name_off)
    }

    /// Return the name of a type as text, which is empty if it has none.
    pub fn name_text(&self, ty: &Type<'_>) -> Result<&'a str> {
        self.text(ty.name_off)
    }

    /// Return the type behind all qualifiers, and behind typedefs if `typedefs` is set.
    pub fn strip(&self, id: u32, typedefs: bool) -> Result<Type<'a>> {
        let mut ty = self.get(id)?;
        for _ in 0..CHAIN_MAX {
            let behind = ty.kind.is_modifier() || (typedefs && ty.kind == Kind::Typedef);
            if !behind {
                return Ok(ty);
            }
            ty = self.get(ty.target())?;
        }
        Err(Error::TooDeep)
    }

    /// Return the size in bytes of an object of this type, or 0 for a type without objects, such as a function.
    pub fn size_of(&self, id: u32) -> Result<u64> {
        let mut id = id;
        let mut count: u64 = 1;
        for _ in 0..CHAIN_MAX {
            let ty = self.strip(id, true)?;
            let size = match ty.kind {
                Kind::Array => {
                    let (element, elements) = ty.array()?;
                    count = count
                        .checked_mul(u64::from(elements))
                        .ok_or(Error::TooLong)?;
                    id = element;
                    continue;
                }
                Kind::Int
                | Kind::Struct
                | Kind::Union
                | Kind::Enum
                | Kind::Enum64
                | Kind::Float => u64::from(ty.own_size()),
                Kind::Ptr => POINTER_SIZE,
                _ => 0,
            };
            return count.checked_mul(size).ok_or(Error::TooLong);
        }
        Err(Error::TooDeep)
    }

    /// Call `f` with each member of a structure or union.
    ///
    /// The members of a nameless inner structure or union take its place, with their offset in `ty`.
    pub fn for_each_member(
        &self,
        ty: &Type<'_>,
        budget: &mut Budget,
        f: &mut dyn FnMut(&mut Budget, Member) -> Result<()>,
    ) -> Result<()> {
        self.visit_members(ty, 0, budget, f)
    }

    fn visit_members(
        &self,
        ty: &Type<'_>,
        base: u32,
        budget: &mut Budget,
        f: &mut dyn FnMut(&mut Budget, Member) -> Result<()>,
    ) -> Result<()> {
        for i in 0..ty.len() {
            budget.spend()?;
            let mut member = ty.member(i)?;
            member.bit_offset = member.bit_offset.checked_add(base).ok_or(Error::TooLong)?;
            if self.string(member.name_off)?.is_empty() {
                // Look behind typedefs, too: -fms-extensions, with which the kernel is built, allows them here.
                let inner = self.strip(member.type_id, true)?;
                if inner.kind.is_aggregate() {
                    budget.deeper(|budget| {
                        self.visit_members(&inner, member.bit_offset, budget, f)
                    })?;
                    continue;
                }
            }
            f(budget, member)?;
        }
        Ok(())
    }
}
