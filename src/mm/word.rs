// SPDX-License-Identifier: GPL-2.0

//! What the engine remembers of one page, in one machine word.

use super::stable::{ItemBox, NodeId};
use crate::engine::checksum::Checksum;
use core::ptr::NonNull;

/// The low bits that tell the kinds of words apart. Items are aligned to 8 bytes.
const TAG_MASK: u64 = 7;
const TAG_SEEN: u64 = 1;
const TAG_UNSTABLE: u64 = 2;
const TAG_MERGED: u64 = 3;

/// A page that was seen, and what is known of it. Owns the rmap item of a merged page.
///
/// # Invariants
///
/// When the low bits are [`TAG_MERGED`], the rest is an item's word (see [`ItemBox::into_word`]) that
/// is given back once. Otherwise the rest is a checksum, shifted.
pub(crate) struct PageWord(u64);

/// What a [`PageWord`] says.
pub(crate) enum PageState {
    /// Seen once with this checksum.
    Seen(Checksum),
    /// In the unstable tree under this checksum.
    Unstable(Checksum),
    /// Merged into the node with this identity; `None` when the node was released since.
    Merged(Option<NodeId>),
}

const SHIFT: u32 = 3;

impl PageWord {
    /// A page seen once with this checksum.
    pub(crate) fn seen(sum: Checksum) -> Self {
        Self(sum.get() << SHIFT | TAG_SEEN)
    }

    /// A page in the unstable tree under this checksum.
    pub(crate) fn unstable(sum: Checksum) -> Self {
        Self(sum.get() << SHIFT | TAG_UNSTABLE)
    }

    /// A merged page.
    pub(crate) fn merged(item: ItemBox) -> Self {
        // INVARIANT: given back by `take_item` or `drop`, both of which change or end this word.
        Self(item.into_word().as_ptr() as u64 | TAG_MERGED)
    }

    fn item_word(&self) -> Option<NonNull<u8>> {
        if self.0 & TAG_MASK == TAG_MERGED {
            NonNull::new((self.0 & !TAG_MASK) as *mut u8)
        } else {
            None
        }
    }

    /// What is known of the page.
    pub(crate) fn state(&self) -> PageState {
        if let Some(word) = self.item_word() {
            // SAFETY: by the type invariant the item was not given back yet.
            return PageState::Merged(unsafe { ItemBox::node_id_in(word) });
        }
        let sum = Checksum::from_raw(self.0 >> SHIFT);
        if self.0 & TAG_MASK == TAG_UNSTABLE {
            PageState::Unstable(sum)
        } else {
            PageState::Seen(sum)
        }
    }

    /// Takes the rmap item out of the word of a merged page, which says "seen" with a checksum of
    /// nothing afterwards.
    pub(crate) fn take_item(&mut self) -> Option<ItemBox> {
        let word = self.item_word()?;
        self.0 = TAG_SEEN;
        // SAFETY: by the type invariant the item was not given back yet; the word no longer has it.
        Some(unsafe { ItemBox::from_word(word) })
    }
}

impl Drop for PageWord {
    fn drop(&mut self) {
        drop(self.take_item());
    }
}
