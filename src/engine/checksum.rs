// SPDX-License-Identifier: GPL-2.0

//! The key of both trees.

/// A checksum of a page's content: the 61 high bits of a 64-bit hash that is seeded anew at each
/// load. (Three bits are left to [`PageWord`](crate::mm::word::PageWord) for its tag.)
///
/// Equal content has equal checksums. The reverse is only likely: what decides a merge is the
/// comparison of all bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Checksum(u64);

const DROPPED_BITS: u32 = 3;

impl Checksum {
    /// The checksum of a page with this hash.
    pub(crate) const fn from_hash(hash: u64) -> Self {
        Self(hash >> DROPPED_BITS)
    }

    /// Takes back what [`Self::get`] gave.
    pub(crate) const fn from_raw(raw: u64) -> Self {
        Self(raw & (u64::MAX >> DROPPED_BITS))
    }

    /// The bits, of which the highest three are zero.
    pub(crate) const fn get(self) -> u64 {
        self.0
    }
}
