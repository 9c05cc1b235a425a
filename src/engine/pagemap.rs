// SPDX-License-Identifier: GPL-2.0

//! What is remembered of each page of one address space.

use core::mem::size_of;
use kernel::{alloc::Flags, page::PAGE_SHIFT, prelude::*, rbtree::RBTree};

/// Pages per leaf: those of one page table on x86-64, though nothing depends on that.
const LEAF_PAGES: usize = 512;
const LEAF_SHIFT: usize = 9;
const BITS: usize = u64::BITS as usize;

/// A sparse map from page-aligned addresses to words of type `W`.
///
/// Addresses are grouped by 512 pages; a leaf holds one bit per page, and the words of the pages
/// that have one, packed in the order of their addresses. So a page costs `size_of::<W>()` and its
/// share of a leaf, wherever pages lie close together.
///
/// # Invariants
///
/// No leaf is empty.
pub(crate) struct PageMap<W> {
    leaves: RBTree<usize, Leaf<W>>,
    len: usize,
}

struct Leaf<W> {
    present: [u64; LEAF_PAGES / BITS],
    words: KVec<W>,
}

/// Where a page is: which leaf, and which page of it.
#[derive(Clone, Copy)]
struct Slot {
    leaf: usize,
    page: usize,
}

impl Slot {
    fn of(addr: usize) -> Self {
        let page = addr >> PAGE_SHIFT;
        Self {
            leaf: page >> LEAF_SHIFT,
            page: page % LEAF_PAGES,
        }
    }

    fn addr(self) -> usize {
        (self.leaf << LEAF_SHIFT | self.page) << PAGE_SHIFT
    }

    fn bit(self) -> (usize, u64) {
        (self.page / BITS, 1 << (self.page % BITS))
    }
}

impl<W> Leaf<W> {
    fn new() -> Self {
        Self {
            present: [0; LEAF_PAGES / BITS],
            words: KVec::new(),
        }
    }

    fn has(&self, slot: Slot) -> bool {
        let (word, bit) = slot.bit();
        self.present.get(word).is_some_and(|bits| bits & bit != 0)
    }

    /// How many pages before `slot` have a word, which is where the word of `slot` is.
    fn rank(&self, slot: Slot) -> usize {
        let (word, bit) = slot.bit();
        let before: u32 = self
            .present
            .iter()
            .take(word)
            .map(|bits| bits.count_ones())
            .sum();
        let within = self
            .present
            .get(word)
            .map_or(0, |bits| (bits & (bit - 1)).count_ones());
        (before + within) as usize
    }

    fn set_bit(&mut self, slot: Slot, on: bool) {
        let (word, bit) = slot.bit();
        if let Some(bits) = self.present.get_mut(word) {
            *bits = if on { *bits | bit } else { *bits & !bit };
        }
    }

    /// The first page at or after `page` that has a word.
    fn next(&self, page: usize) -> Option<usize> {
        let mut mask = u64::MAX << (page % BITS);
        for (nth, bits) in self.present.iter().enumerate().skip(page / BITS) {
            let left = bits & mask;
            if left != 0 {
                return Some(nth * BITS + left.trailing_zeros() as usize);
            }
            mask = u64::MAX;
        }
        None
    }

    fn remove(&mut self, slot: Slot) -> Option<W> {
        if !self.has(slot) {
            return None;
        }
        let rank = self.rank(slot);
        let word = self.words.remove(rank).ok()?;
        self.set_bit(slot, false);
        Some(word)
    }
}

impl<W> PageMap<W> {
    /// An empty map.
    pub(crate) fn new() -> Self {
        Self {
            leaves: RBTree::new(),
            len: 0,
        }
    }

    /// The word of the page at `addr`.
    pub(crate) fn get(&self, addr: usize) -> Option<&W> {
        let slot = Slot::of(addr);
        let leaf = self.leaves.get(&slot.leaf)?;
        if leaf.has(slot) {
            leaf.words.get(leaf.rank(slot))
        } else {
            None
        }
    }

    /// The word of the page at `addr`, to be changed.
    pub(crate) fn get_mut(&mut self, addr: usize) -> Option<&mut W> {
        let slot = Slot::of(addr);
        let leaf = self.leaves.get_mut(&slot.leaf)?;
        if leaf.has(slot) {
            let rank = leaf.rank(slot);
            leaf.words.get_mut(rank)
        } else {
            None
        }
    }

    /// Sets the word of the page at `addr` and returns the one it had.
    ///
    /// `ENOMEM` can only come for a page that had none; the map is then unchanged.
    pub(crate) fn insert(&mut self, addr: usize, word: W, flags: Flags) -> Result<Option<W>> {
        let slot = Slot::of(addr);
        if self.leaves.get(&slot.leaf).is_none() {
            self.leaves
                .try_create_and_insert(slot.leaf, Leaf::new(), flags)?;
        }
        let leaf = self.leaves.get_mut(&slot.leaf).ok_or(ENOMEM)?;
        let rank = leaf.rank(slot);
        if leaf.has(slot) {
            let old = leaf.words.get_mut(rank).ok_or(EINVAL)?;
            return Ok(Some(core::mem::replace(old, word)));
        }
        if let Err(err) = leaf.words.reserve(1, flags) {
            self.prune(slot.leaf);
            return Err(err.into());
        }
        leaf.words
            .insert_within_capacity(rank, word)
            .map_err(|_| ENOMEM)?;
        leaf.set_bit(slot, true);
        self.len = self.len.saturating_add(1);
        Ok(None)
    }

    /// Takes the word of the page at `addr` out of the map.
    pub(crate) fn remove(&mut self, addr: usize) -> Option<W> {
        let slot = Slot::of(addr);
        let word = self.leaves.get_mut(&slot.leaf)?.remove(slot)?;
        self.len = self.len.saturating_sub(1);
        self.prune(slot.leaf);
        Some(word)
    }

    /// The address of the first page in `from..to` that has a word.
    pub(crate) fn next(&self, from: usize, to: usize) -> Option<usize> {
        if from >= to {
            return None;
        }
        let start = Slot::of(from);
        let cursor = self.leaves.cursor_lower_bound(&start.leaf)?;
        let (&leaf, content) = cursor.current();
        let first = if leaf == start.leaf { start.page } else { 0 };
        // No leaf is empty: if this one has nothing from there on, the one behind it has.
        let (leaf, page) = match content.next(first) {
            Some(page) => (leaf, page),
            None => {
                let (&leaf, content) = cursor.peek_next()?;
                (leaf, content.next(0)?)
            }
        };
        let addr = Slot { leaf, page }.addr();
        (addr < to).then_some(addr)
    }

    /// The memory that the map takes, in bytes, without the allocator's own overhead.
    pub(crate) fn bytes(&self) -> usize {
        // Three words of `struct rb_node`, then key and value.
        let node = 4 * size_of::<usize>() + size_of::<Leaf<W>>();
        self.leaves.iter().fold(0usize, |sum, (_, leaf)| {
            let words = leaf.words.capacity().saturating_mul(size_of::<W>());
            sum.saturating_add(node).saturating_add(words)
        })
    }

    fn prune(&mut self, leaf: usize) {
        if self
            .leaves
            .get(&leaf)
            .is_some_and(|content| content.words.is_empty())
        {
            self.leaves.remove(&leaf);
        }
    }
}
