// SPDX-License-Identifier: GPL-2.0

//! What the engine remembers of one page, in one word of 64 bits.
//!
//! A host has hundreds of millions of pages, so every byte of this counts. The low three bits are the tag:
//!
//! | tag | state | other bits, from the highest down |
//! | --- | --- | --- |
//! | 1 | seen | sample (32), probation (29) |
//! | 2 | steady | sample (32), probation (29) |
//! | 3 | unstable | checksum (57), strikes (4) |
//! | 4 | merged | the address of the rmap item (61) |

use super::{folio::NodeId, rmap_item::ItemBox, stable_key::StableKey};
use crate::hash::{Checksum, Sample, SUM_BITS};
use crate::ksm::probation::{Probation, Strikes};
use core::ptr::NonNull;

/// The low bits that tell the states apart. Rmap items are aligned to 8 bytes, so they leave these free.
const TAG_MASK: u64 = 7;
const TAG_SEEN: u64 = 1;
const TAG_STEADY: u64 = 2;
const TAG_UNSTABLE: u64 = 3;
const TAG_MERGED: u64 = 4;

/// The position of the strikes in an entry that is not merged. In one that is seen or steady, they are the first
/// part of its [`Probation`].
const STRIKES_SHIFT: u32 = 3;
const SUM_SHIFT: u32 = STRIKES_SHIFT + Strikes::BITS;
const SAMPLE_SHIFT: u32 = STRIKES_SHIFT + Probation::BITS;
const _: () = assert!(SAMPLE_SHIFT == u32::BITS && SUM_SHIFT + SUM_BITS == u64::BITS);

/// What the engine remembers of one page. It owns the rmap item of a merged page.
///
/// A page goes from seen to steady to unstable to merged, and back to seen when its content changes. The engine
/// decides that; this type only packs it.
///
/// # Invariants
///
/// When the low bits are [`TAG_MERGED`], the rest is an item's word (see [`ItemBox::into_word`]) that
/// is given back once. Otherwise the rest is a checksum, of which all but the sample may be missing.
pub(crate) struct PageEntry(u64);

/// The state of a page, as a [`PageEntry`] has it.
pub(crate) enum PageState {
    /// Seen once with this sample.
    Seen(Sample),
    /// Seen twice or more with this sample.
    Steady(Sample),
    /// Waiting in the unstable tree under this checksum for an equal page.
    Unstable(Checksum),
    /// Merged into the stable node with this identity; `None` if the node was released since.
    Merged(Option<NodeId>),
}

impl PageEntry {
    /// An entry with this sample and this tag, without probation.
    fn of_sample(sample: Sample, tag: u64) -> Self {
        Self(u64::from(sample.get()) << SAMPLE_SHIFT | tag)
    }

    /// An entry with this sample and this tag, on probation.
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

    /// Returns the beat in which a merged page was merged; `None` for other pages.
    pub(crate) fn merged_in(&self) -> Option<u32> {
        let word = self.item_word()?;
        // SAFETY: By the type invariant the item was not given back yet.
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

    /// A merged page, which `item` lists with its stable node.
    pub(crate) fn merged(item: ItemBox) -> Self {
        // INVARIANT: Only `take_item` gives the item back, and changes the entry when it does. `drop` calls that.
        Self(item.into_word().as_ptr() as u64 | TAG_MERGED)
    }

    /// Returns the word of the rmap item of a merged page.
    #[inline]
    fn item_word(&self) -> Option<NonNull<u8>> {
        if self.0 & TAG_MASK == TAG_MERGED {
            NonNull::new((self.0 & !TAG_MASK) as *mut u8)
        } else {
            None
        }
    }

    /// Whether the page is steady and not on probation, with the sample in the high half of `what`.
    ///
    /// The low half of `what` is 1. This is the most frequent question of a scan, so it is a single comparison.
    #[inline(always)]
    pub(super) fn is_steady_with(&self, what: u64) -> bool {
        const { assert!(SAMPLE_SHIFT == 32) };
        self.0 ^ what == TAG_STEADY ^ 1
    }

    /// Whether the page is merged into the stable node at the address `what`.
    #[inline(always)]
    pub(super) fn is_listed_with(&self, what: u64) -> bool {
        self.item_word().is_some_and(|word| {
            // SAFETY: By the type invariant the item was not given back yet.
            unsafe { ItemBox::node_id_in(word) }.is_some_and(|node| node.get() as u64 == what)
        })
    }

    /// Returns the strikes of the page: how often it was written to soon after a merge.
    pub(crate) fn strikes(&self) -> Strikes {
        match self.item_word() {
            // SAFETY: By the type invariant the item was not given back yet.
            Some(word) => unsafe { ItemBox::strikes_in(word) },
            None => Strikes::from_raw(self.0 >> STRIKES_SHIFT),
        }
    }

    /// Returns the probation of a page that is seen or steady; `None` if it is not on probation.
    #[inline]
    pub(crate) fn probation(&self) -> Option<Probation> {
        let tag = self.0 & TAG_MASK;
        let bits = (self.0 as u32) >> STRIKES_SHIFT;
        (bits != 0 && matches!(tag, TAG_SEEN | TAG_STEADY)).then(|| Probation::from_raw(bits))
    }

    /// Sets the probation of a page that is seen or steady. Other pages stay as they are.
    pub(crate) fn set_probation(&mut self, probation: Probation) {
        let tag = self.0 & TAG_MASK;
        if matches!(tag, TAG_SEEN | TAG_STEADY) {
            let bits = u64::from(probation.get()) << STRIKES_SHIFT;
            // An assignment to the field drops no item, and there is none.
            self.0 = self.0 >> SAMPLE_SHIFT << SAMPLE_SHIFT | bits | tag;
        }
    }

    /// Whether the scan must not skip any of these pages, see [`Self::is_watched`].
    ///
    /// Most leaves have no such page. The entry of one never has the bit `NEVER`, so a chunk in which all entries
    /// have it needs one test only.
    pub(crate) fn any_is_watched(words: &[Self]) -> bool {
        const NEVER: u64 = TAG_STEADY & TAG_UNSTABLE;
        const { assert!(NEVER & (TAG_SEEN | TAG_MERGED) == 0) };
        words.chunks(16).any(|few| {
            let common = few.iter().fold(NEVER, |bits, word| bits & word.0);
            common == 0 && few.iter().any(Self::is_watched)
        })
    }

    /// Whether the scan must not skip the page.
    ///
    /// A merged page has to be looked at, or a write to it goes unnoticed and its rmap item stays. A seen page on
    /// probation has to be looked at, or its time goes by.
    #[inline]
    fn is_watched(&self) -> bool {
        match self.0 & TAG_MASK {
            TAG_MERGED => true,
            TAG_SEEN => self.0 as u32 != TAG_SEEN as u32,
            _ => false,
        }
    }

    /// Returns the state of the page.
    #[inline]
    pub(crate) fn state(&self) -> PageState {
        let sample = Sample::from_raw((self.0 >> SAMPLE_SHIFT) as u32);
        match self.0 & TAG_MASK {
            TAG_STEADY => PageState::Steady(sample),
            TAG_UNSTABLE => PageState::Unstable(Checksum::from_raw(self.0 >> SUM_SHIFT)),
            TAG_MERGED => PageState::Merged(self.item_word().and_then(|word| {
                // SAFETY: By the type invariant the item was not given back yet.
                unsafe { ItemBox::node_id_in(word) }
            })),
            _ => PageState::Seen(sample),
        }
    }

    /// Returns the key of `node`, and how many mappings are listed with it, if this page is one of them.
    pub(crate) fn listed_with(&self, node: NodeId) -> Option<(StableKey, usize)> {
        let word = self.item_word()?;
        if !self.is_listed_with(node.get() as u64) {
            return None;
        }
        // SAFETY: By the type invariant the item was not given back yet.
        unsafe { ItemBox::node_in(word) }
    }

    /// Returns the sample that the page had when it was seen last, or when it was merged.
    pub(crate) fn sample(&self) -> Sample {
        match self.item_word() {
            // SAFETY: By the type invariant the item was not given back yet.
            Some(word) => unsafe { ItemBox::sample_in(word) },
            None => Sample::from_raw((self.0 >> SAMPLE_SHIFT) as u32),
        }
    }

    /// Takes the rmap item of a merged page, which is seen with the same sample afterwards.
    ///
    /// The item may still be on the list of its node: see [`ItemBox::detach`].
    pub(crate) fn take_item(&mut self) -> Option<ItemBox> {
        let word = self.item_word()?;
        // Assign to the field: an assignment to `*self` would drop the item.
        self.0 = u64::from(self.sample().get()) << SAMPLE_SHIFT | TAG_SEEN;
        // SAFETY: By the type invariant the item was not given back yet, and the entry no longer has it.
        Some(unsafe { ItemBox::from_word(word) })
    }
}

impl Drop for PageEntry {
    fn drop(&mut self) {
        drop(self.take_item());
    }
}
