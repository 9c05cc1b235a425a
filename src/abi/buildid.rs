// SPDX-License-Identifier: GPL-2.0
//! The build id of a kernel image: a hash of the whole image that the linker computes.
//!
//! It distinguishes images with the same version and the same types that were configured or patched
//! differently. Vermagic and the signatures of interfaces cannot do that. The build id is in the ELF
//! notes of the image, which the kernel keeps in memory and shows as `/sys/kernel/notes`.
//!
//! Like [`super::btf`], this is pure logic: it uses only `core`, allocates nothing and does not panic.

/// The longest id that fits into a [`Record`]. Linkers make 8, 16 or 20 bytes.
pub const ID_MAX: usize = 64;

const NT_GNU_BUILD_ID: u32 = 3;
const OWNER: &[u8] = b"GNU\0";
/// The alignment of the name and the descriptor of a note, in bytes.
const ALIGN: usize = 4;

/// Returns the build id in `notes`, the content of a section of ELF notes in little endian.
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

/// Splits `bytes` after the first word.
fn word(bytes: &[u8]) -> Option<(u32, &[u8])> {
    let (word, tail) = bytes.split_first_chunk()?;
    Some((u32::from_le_bytes(*word), tail))
}

/// Returns the first `len` bytes, and the rest after their padding.
fn padded(bytes: &[u8], len: u32) -> Option<(&[u8], &[u8])> {
    let len = usize::try_from(len).ok()?;
    let (data, _) = bytes.split_at_checked(len)?;
    // The last note may lack its padding.
    let next = len.checked_next_multiple_of(ALIGN)?.min(bytes.len());
    Some((data, bytes.get(next..)?))
}

/// The build id that the module was built for, as stored in the module.
///
/// Like [`super::signature::Table`], the record is plain bytes without pointers, so that a test can find
/// and change it in `rksm.ko`.
#[repr(C)]
pub struct Record {
    magic: [u8; 8],
    len: u64,
    id: [u8; ID_MAX],
}

/// The first bytes of a [`Record`].
pub const RECORD_MAGIC: [u8; 8] = *b"RKSMBID1";

impl Record {
    /// Make a record of `id`, cut to [`ID_MAX`] bytes. An empty `id` stands for an image without one.
    // Inlined, or the code of the module would contain the magic a second time.
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

    /// Return the id, read from memory.
    ///
    /// The compiler cannot fold it into the code, so a record that was changed in the file takes effect.
    pub fn id(&'static self) -> &'static [u8] {
        let this = core::hint::black_box(self);
        usize::try_from(this.len)
            .ok()
            .and_then(|len| this.id.get(..len))
            .unwrap_or(&[])
    }
}
