// SPDX-License-Identifier: GPL-2.0

//! What the engine remembers of one page, in one machine word.

use super::{rmap_item::ItemBox, stable_node::NodeId};
use crate::hash::{Checksum, Sample, SUM_BITS};
use crate::ksm::{
    index::StableKey,
    probation::{Probation, Strikes},
};
use core::ptr::NonNull;

/// The low bits that tell the kinds of words apart. Items are aligned to 8 bytes.
const TAG_MASK: u64 = 7;
const TAG_SEEN: u64 = 1;
const TAG_STEADY: u64 = 2;
const TAG_UNSTABLE: u64 = 3;
const TAG_MERGED: u64 = 4;

/// Where a page's strikes are in a word that does not say "merged". In one that says "seen" or "steady" they
/// are the first part of its [`Probation`].
const STRIKES_SHIFT: u32 = 3;
const SUM_SHIFT: u32 = STRIKES_SHIFT + Strikes::BITS;
const SAMPLE_SHIFT: u32 = STRIKES_SHIFT + Probation::BITS;
const _: () = assert!(SAMPLE_SHIFT == u32::BITS && SUM_SHIFT + SUM_BITS == u64::BITS);

/// A page that was seen, and what is known of it. Owns the rmap item of a merged page.
///
/// # Invariants
///
/// When the low bits are [`TAG_MERGED`], the rest is an item's word (see [`ItemBox::into_word`]) that
/// is given back once. Otherwise the rest is a checksum, of which all but the sample may be missing.
pub(crate) struct PageEntry(u64);

/// What a [`PageEntry`] says.
pub(crate) enum PageState {
    /// Seen once with this sample.
    Seen(Sample),
    /// Seen twice or more with this sample.
    Steady(Sample),
    /// In the unstable tree under this checksum.
    Unstable(Checksum),
    /// Merged into the node with this identity; `None` when the node was released since.
    Merged(Option<NodeId>),
}

impl PageEntry {
    fn of_sample(sample: Sample, tag: u64) -> Self {
        Self(u64::from(sample.get()) << SAMPLE_SHIFT | tag)
    }

    fn on_probation(sample: Sample, probation: Probation, tag: u64) -> Self {
        let bits = u64::from(probation.get()) << STRIKES_SHIFT;
        Self(u64::from(sample.get()) << SAMPLE_SHIFT | bits | tag)
    }

    /// A page seen once with this sample.
    #[inline]
    pub(crate) fn seen(sample: Sample) -> Self {
        Self::of_sample(sample, TAG_SEEN)
    }

    /// A page seen once with this sample, which may be on probation.
    pub(crate) fn seen_on(sample: Sample, probation: Probation) -> Self {
        Self::on_probation(sample, probation, TAG_SEEN)
    }

    /// In which beat a merged page was merged.
    pub(crate) fn merged_in(&self) -> Option<u32> {
        let word = self.item_word()?;
        // SAFETY: by the type invariant the item was not given back yet.
        Some(unsafe { ItemBox::beat_in(word) })
    }

    /// A page seen twice or more with this sample.
    #[inline]
    pub(crate) fn steady(sample: Sample) -> Self {
        Self::of_sample(sample, TAG_STEADY)
    }

    /// A page seen twice or more with this sample, which may be on probation.
    pub(crate) fn steady_on(sample: Sample, probation: Probation) -> Self {
        Self::on_probation(sample, probation, TAG_STEADY)
    }

    /// A page in the unstable tree under this checksum.
    pub(crate) fn unstable(sum: Checksum, strikes: Strikes) -> Self {
        Self(sum.get() << SUM_SHIFT | strikes.get() << STRIKES_SHIFT | TAG_UNSTABLE)
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

    /// The strikes of the page.
    pub(crate) fn strikes(&self) -> Strikes {
        match self.item_word() {
            // SAFETY: by the type invariant the item was not given back yet.
            Some(word) => unsafe { ItemBox::strikes_in(word) },
            None => Strikes::from_raw(self.0 >> STRIKES_SHIFT),
        }
    }

    /// The probation of a page that was seen or is steady, if it is on one.
    #[inline]
    pub(crate) fn probation(&self) -> Option<Probation> {
        let tag = self.0 & TAG_MASK;
        let bits = (self.0 as u32) >> STRIKES_SHIFT;
        (bits != 0 && matches!(tag, TAG_SEEN | TAG_STEADY)).then(|| Probation::from_raw(bits))
    }

    /// Changes the probation of a page that was seen or is steady.
    pub(crate) fn set_probation(&mut self, probation: Probation) {
        let tag = self.0 & TAG_MASK;
        if matches!(tag, TAG_SEEN | TAG_STEADY) {
            let bits = u64::from(probation.get()) << STRIKES_SHIFT;
            // No item that would have to be dropped first.
            self.0 = self.0 >> SAMPLE_SHIFT << SAMPLE_SHIFT | bits | tag;
        }
    }

    /// Whether looking at any of some pages must not be put off, see [`Self::is_watched`]. Most areas that are asked
    /// about have no such page, so a bit that it never has is looked for in several words at once.
    pub(crate) fn any_is_watched(words: &[Self]) -> bool {
        const NEVER: u64 = TAG_STEADY & TAG_UNSTABLE;
        const { assert!(NEVER & (TAG_SEEN | TAG_MERGED) == 0) };
        words.chunks(16).any(|few| {
            let common = few.iter().fold(NEVER, |bits, word| bits & word.0);
            common == 0 && few.iter().any(Self::is_watched)
        })
    }

    /// Whether looking at the page must not be put off: it is merged, and would show as that long after it was
    /// written to, or its time on probation goes by.
    #[inline]
    fn is_watched(&self) -> bool {
        match self.0 & TAG_MASK {
            TAG_MERGED => true,
            TAG_SEEN => self.0 as u32 != TAG_SEEN as u32,
            _ => false,
        }
    }

    /// What is known of the page.
    #[inline]
    pub(crate) fn state(&self) -> PageState {
        let sample = Sample::from_raw((self.0 >> SAMPLE_SHIFT) as u32);
        match self.0 & TAG_MASK {
            TAG_STEADY => PageState::Steady(sample),
            TAG_UNSTABLE => PageState::Unstable(Checksum::from_raw(self.0 >> SUM_SHIFT)),
            TAG_MERGED => PageState::Merged(self.item_word().and_then(|word| {
                // SAFETY: by the type invariant the item was not given back yet.
                unsafe { ItemBox::node_id_in(word) }
            })),
            _ => PageState::Seen(sample),
        }
    }

    /// The key of this node, and how many places are known to map its page, if this page is listed with it.
    pub(crate) fn listed_with(&self, node: NodeId) -> Option<(StableKey, usize)> {
        let word = self.item_word()?;
        if !self.is_listed_with(node.get() as u64) {
            return None;
        }
        // SAFETY: by the type invariant the item was not given back yet.
        unsafe { ItemBox::node_in(word) }
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

impl Drop for PageEntry {
    fn drop(&mut self) {
        drop(self.take_item());
    }
}
