// SPDX-License-Identifier: GPL-2.0

//! Where merged pages may be mapped without an rmap item.
//!
//! A page that is shared over a fork becomes a merged page in all processes that share it, at the same address,
//! when the scan merges it in one of them. The others are listed when the scan comes by: which it must do in the
//! next pass, as it is by their items that the page is found, once the first process has given it up.

/// How many bits there are for each pass.
const BITS: usize = 1 << 12;
const WORD_BITS: usize = u64::BITS as usize;
type Bits = [u64; BITS / WORD_BITS];

/// A set of leaves, of whatever address space, by their numbers. Each stays in it to the end of the next pass.
///
/// It may take a leaf for one that it has, and all of them when it has many. Those are looked at for nothing.
pub(crate) struct Unlisted {
    now: Bits,
    before: Bits,
    /// Whether there is a bit in either.
    any: bool,
}

fn bit(leaf: usize) -> (usize, u64) {
    // Leaves of one area should not share a word with each other only; the high bits of a product depend on
    // all bits of what is multiplied.
    let hash = (leaf as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
    let nth = hash as usize % BITS;
    (nth / WORD_BITS, 1 << (nth % WORD_BITS))
}

impl Unlisted {
    /// A set of no leaves.
    pub(crate) const fn new() -> Self {
        Self {
            now: [0; BITS / WORD_BITS],
            before: [0; BITS / WORD_BITS],
            any: false,
        }
    }

    /// A pass begins: forgets what was added before the last one began.
    pub(crate) fn begin_pass(&mut self) {
        if self.any {
            self.any = self.now.iter().any(|&bits| bits != 0);
            self.before = core::mem::replace(&mut self.now, [0; BITS / WORD_BITS]);
        }
    }

    /// Adds a leaf.
    pub(crate) fn add(&mut self, leaf: usize) {
        let (word, bit) = bit(leaf);
        if let Some(bits) = self.now.get_mut(word) {
            *bits |= bit;
            self.any = true;
        }
    }

    /// Whether a leaf may be in it.
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
