// SPDX-License-Identifier: GPL-2.0

//! What the engine remembers of one page, in one machine word.

use super::stable::{ItemBox, NodeId};
use crate::engine::checksum::{Checksum, Sample, FULL_BITS};
use core::ptr::NonNull;

/// The low bits that tell the kinds of words apart. Items are aligned to 8 bytes.
const TAG_MASK: u64 = 7;
const TAG_SEEN: u64 = 1;
const TAG_STEADY: u64 = 2;
const TAG_WAITING: u64 = 3;
const TAG_MERGED: u64 = 4;

const SUM_SHIFT: u32 = 3;
const SAMPLE_SHIFT: u32 = SUM_SHIFT + FULL_BITS;

/// In a word that says "seen": the page is not to be merged at first sight.
const CAUTION: u64 = 1 << SUM_SHIFT;

/// A page that was seen, and what is known of it. Owns the rmap item of a merged page.
///
/// # Invariants
///
/// When the low bits are [`TAG_MERGED`], the rest is an item's word (see [`ItemBox::into_word`]) that
/// is given back once. Otherwise the rest is a checksum, of which all but the sample may be missing.
pub(crate) struct PageWord(u64);

/// What a [`PageWord`] says.
pub(crate) enum PageState {
    /// Seen once with this sample.
    Seen(Sample),
    /// Seen twice or more with this sample.
    Steady(Sample),
    /// In the unstable tree under this checksum.
    Waiting(Checksum),
    /// Merged into the node with this identity; `None` when the node was released since.
    Merged(Option<NodeId>),
}

impl PageWord {
    fn of_sample(sample: Sample, tag: u64) -> Self {
        Self(u64::from(sample.get()) << SAMPLE_SHIFT | tag)
    }

    /// A page seen once with this sample.
    #[inline]
    pub(crate) fn seen(sample: Sample) -> Self {
        Self::of_sample(sample, TAG_SEEN)
    }

    /// A page seen once with this sample, which is not to be merged at first sight if `caution`.
    pub(crate) fn seen_with(sample: Sample, caution: bool) -> Self {
        let caution = if caution { CAUTION } else { 0 };
        Self::of_sample(sample, TAG_SEEN | caution)
    }

    /// Whether the page was seen once and is not to be merged at first sight.
    pub(crate) fn has_caution(&self) -> bool {
        self.0 & (TAG_MASK | CAUTION) == TAG_SEEN | CAUTION
    }

    /// In which pass a merged page was merged.
    pub(crate) fn merged_in(&self) -> Option<u32> {
        let word = self.item_word()?;
        // SAFETY: by the type invariant the item was not given back yet.
        Some(unsafe { ItemBox::pass_in(word) })
    }

    /// A page seen twice or more with this sample.
    #[inline]
    pub(crate) fn steady(sample: Sample) -> Self {
        Self::of_sample(sample, TAG_STEADY)
    }

    /// A page in the unstable tree under this checksum.
    pub(crate) fn waiting(sum: Checksum) -> Self {
        Self(sum.get() << SUM_SHIFT | TAG_WAITING)
    }

    /// A merged page.
    pub(crate) fn merged(item: ItemBox) -> Self {
        // INVARIANT: given back by `take_item` or `drop`, both of which change or end this word.
        Self(item.into_word().as_ptr() as u64 | TAG_MERGED)
    }

    #[inline]
    fn item_word(&self) -> Option<NonNull<u8>> {
        if self.0 & TAG_MASK == TAG_MERGED {
            NonNull::new((self.0 & !TAG_MASK) as *mut u8)
        } else {
            None
        }
    }

    /// Whether this says "steady", with the sample that is the high half of `what`; the low half of
    /// which is 1.
    #[inline(always)]
    pub(super) fn is_steady_with(&self, what: u64) -> bool {
        const { assert!(SAMPLE_SHIFT == 32) };
        self.0 ^ what == TAG_STEADY ^ 1
    }

    /// Whether this says "merged", into the node at the address `what`.
    #[inline(always)]
    pub(super) fn is_listed_with(&self, what: u64) -> bool {
        self.item_word().is_some_and(|word| {
            // SAFETY: by the type invariant the item was not given back yet.
            unsafe { ItemBox::node_id_in(word) }.is_some_and(|node| node.get() as u64 == what)
        })
    }

    /// Whether the page is merged.
    #[inline]
    pub(crate) fn is_merged(&self) -> bool {
        self.0 & TAG_MASK == TAG_MERGED
    }

    /// What is known of the page.
    #[inline]
    pub(crate) fn state(&self) -> PageState {
        let sample = Sample::from_raw((self.0 >> SAMPLE_SHIFT) as u32);
        match self.0 & TAG_MASK {
            TAG_STEADY => PageState::Steady(sample),
            TAG_WAITING => PageState::Waiting(Checksum::from_raw(self.0 >> SUM_SHIFT)),
            TAG_MERGED => PageState::Merged(self.item_word().and_then(|word| {
                // SAFETY: by the type invariant the item was not given back yet.
                unsafe { ItemBox::node_id_in(word) }
            })),
            _ => PageState::Seen(sample),
        }
    }

    /// The sample that the page had when it was seen last, or when it was merged.
    pub(crate) fn sample(&self) -> Sample {
        match self.item_word() {
            // SAFETY: by the type invariant the item was not given back yet.
            Some(word) => unsafe { ItemBox::sample_in(word) },
            None => Sample::from_raw((self.0 >> SAMPLE_SHIFT) as u32),
        }
    }

    /// Takes the rmap item out of the word of a merged page, which says "seen" with the same sample
    /// afterwards.
    pub(crate) fn take_item(&mut self) -> Option<ItemBox> {
        let word = self.item_word()?;
        // Not by assignment, which would drop the item.
        self.0 = u64::from(self.sample().get()) << SAMPLE_SHIFT | TAG_SEEN;
        // SAFETY: by the type invariant the item was not given back yet; the word no longer has it.
        Some(unsafe { ItemBox::from_word(word) })
    }
}

impl Drop for PageWord {
    fn drop(&mut self) {
        drop(self.take_item());
    }
}
