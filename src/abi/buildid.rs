// SPDX-License-Identifier: GPL-2.0
//! The build id of a kernel image: a hash of all of it that the linker makes.
//!
//! It tells images apart that vermagic and the signatures of interfaces cannot: those that were
//! configured or patched otherwise behind the same version and the same types. It stands in the
//! image's ELF notes, which the kernel keeps in memory (and shows as `/sys/kernel/notes`).
//!
//! Pure logic like [`super::btf`]: only `core`, no allocation, no panic.

/// The longest id that fits into a [`Record`]. Linkers make 8, 16 or 20 bytes.
pub const ID_MAX: usize = 64;

const NT_GNU_BUILD_ID: u32 = 3;
const OWNER: &[u8] = b"GNU\0";
/// Name and descriptor of a note begin at multiples of this.
const ALIGN: usize = 4;

/// The build id among ELF notes: the content of a note section, of this machine's byte order.
pub fn find(notes: &[u8]) -> Option<&[u8]> {
    let mut rest = notes;
    loop {
        let (name_len, tail) = word(rest)?;
        let (id_len, tail) = word(tail)?;
        let (kind, tail) = word(tail)?;
        let (name, tail) = padded(tail, name_len)?;
        let (id, tail) = padded(tail, id_len)?;
        if kind == NT_GNU_BUILD_ID && name == OWNER && !id.is_empty() {
            return Some(id);
        }
        rest = tail;
    }
}

/// The first word, and what follows it.
fn word(bytes: &[u8]) -> Option<(u32, &[u8])> {
    let (word, tail) = bytes.split_first_chunk()?;
    Some((u32::from_le_bytes(*word), tail))
}

/// The first `len` bytes, and what follows them and their padding.
fn padded(bytes: &[u8], len: u32) -> Option<(&[u8], &[u8])> {
    let len = usize::try_from(len).ok()?;
    let (data, _) = bytes.split_at_checked(len)?;
    // The last note need not be padded.
    let next = len.checked_next_multiple_of(ALIGN)?.min(bytes.len());
    Some((data, bytes.get(next..)?))
}

/// The build id that a module was built for, as it stands in the module.
///
/// Plain bytes without pointers, like [`super::signature::Table`]: a test finds the record in
/// `rksm.ko` and changes it.
#[repr(C)]
pub struct Record {
    magic: [u8; 8],
    len: u64,
    id: [u8; ID_MAX],
}

/// What a [`Record`] starts with.
pub const RECORD_MAGIC: [u8; 8] = *b"RKSMBID1";

impl Record {
    /// Record `id`, which is cut to [`ID_MAX`] bytes, and empty when the image has none.
    // Inlined, or the module would also have it as code, with another magic in it.
    #[inline(always)]
    pub const fn new(id: &[u8]) -> Self {
        let mut record = Record {
            magic: RECORD_MAGIC,
            len: 0,
            id: [0; ID_MAX],
        };
        let mut i = 0;
        // Const context: no iterators. Both indices are bounded by the condition.
        while i < id.len() && i < ID_MAX {
            record.id[i] = id[i];
            i += 1;
        }
        record.len = i as u64;
        record
    }

    /// The id, read from memory: the compiler must not fold it into the code, for a changed record
    /// to be noticed.
    pub fn id(&'static self) -> &'static [u8] {
        let this = core::hint::black_box(self);
        usize::try_from(this.len)
            .ok()
            .and_then(|len| this.id.get(..len))
            .unwrap_or(&[])
    }
}
