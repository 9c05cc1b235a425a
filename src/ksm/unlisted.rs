// SPDX-License-Identifier: GPL-2.0

//! Leaves in which merged pages may be mapped without an rmap item.
//!
//! If the scan merges a page that is shared over a fork, it becomes a merged page in all processes that share
//! it, at the same address. The other mappings get their rmap items when the scan visits them. That must happen
//! in the next pass: when the first process drops the page, these items are the only way to find it. So these
//! leaves are not skipped.

/// The number of bits for each pass.
const BITS: usize = 1 << 12;
const WORD_BITS: usize = u64::BITS as usize;
type Bits = [u64; BITS / WORD_BITS];

/// A set of leaves of any address spaces, by their numbers. Each leaf stays in it until the end of the next
/// pass.
///
/// It is a Bloom filter with one hash: it may have leaves that were not added, and all of them if many were.
/// These are scanned in vain.
pub(crate) struct Unlisted {
    /// The leaves that were added in this pass.
    now: Bits,
    /// The leaves that were added in the previous pass.
    before: Bits,
    /// Whether a bit is set in either.
    any: bool,
}

/// Returns the index of the word, and the bit in it, for a leaf.
fn bit(leaf: usize) -> (usize, u64) {
    // Neighbouring leaves should spread over the words. The high bits of a product depend on all bits of its
    // factors.
    let hash = (leaf as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
    let idx = hash as usize % BITS;
    (idx / WORD_BITS, 1 << (idx % WORD_BITS))
}

impl Unlisted {
    /// Creates an empty set.
    pub(crate) const fn new() -> Self {
        Self {
            now: [0; BITS / WORD_BITS],
            before: [0; BITS / WORD_BITS],
            any: false,
        }
    }

    /// Begins a pass. Forgets the leaves that were added before the previous one.
    pub(crate) fn begin_pass(&mut self) {
        if self.any {
            self.any = self.now.iter().any(|&bits| bits != 0);
            self.before = core::mem::replace(&mut self.now, [0; BITS / WORD_BITS]);
        }
    }

    /// Adds the leaf with this number.
    pub(crate) fn add(&mut self, leaf: usize) {
        let (word, bit) = bit(leaf);
        if let Some(bits) = self.now.get_mut(word) {
            *bits |= bit;
            self.any = true;
        }
    }

    /// Whether the leaf with this number may have been added in this pass or the previous one.
    #[inline]
    pub(crate) fn may_have(&self, leaf: usize) -> bool {
        if !self.any {
            return false;
        }
        let (word, bit) = bit(leaf);
        let has = |bits: &Bits| bits.get(word).is_some_and(|bits| bits & bit != 0);
        has(&self.now) || has(&self.before)
    }
}
