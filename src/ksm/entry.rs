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

use super::probation::{MergeInfo, Probation, Strikes};
use crate::{
    hash::{Checksum, Sample, SUM_BITS},
    mm::{
        folio::NodeId,
        rmap_item::{ItemBox, ItemWord},
        seen::SeenPage,
        stable_key::StableKey,
    },
};

const TAG_SEEN: u64 = 1;
const TAG_STEADY: u64 = 2;
const TAG_UNSTABLE: u64 = 3;
const TAG_MERGED: u64 = ItemWord::ITEM;

/// The position of the strikes in an entry that is not merged. In one that is seen or steady, they are the first
/// part of its [`Probation`].
const STRIKES_SHIFT: u32 = 3;
const SUM_SHIFT: u32 = STRIKES_SHIFT + Strikes::BITS;
const SAMPLE_SHIFT: u32 = STRIKES_SHIFT + Probation::BITS;
const _: () = assert!(SAMPLE_SHIFT == u32::BITS && SUM_SHIFT + SUM_BITS == u64::BITS);

/// What the engine remembers of one page. It owns the rmap item of a merged page.
///
/// A page goes from seen to steady to unstable to merged, and back to seen when its content changes. The module
/// [`page`](super::page) decides that; this type only packs it.
pub(crate) struct PageEntry(ItemWord);

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
    #[inline]
    fn of_sample<const TAG: u64>(sample: Sample) -> Self {
        Self(ItemWord::new::<TAG>(
            u64::from(sample.get()) << SAMPLE_SHIFT,
        ))
    }

    /// An entry with this sample and this tag, on probation.
    #[inline]
    fn on_probation<const TAG: u64>(sample: Sample, probation: Probation) -> Self {
        let bits = u64::from(probation.get()) << STRIKES_SHIFT;
        Self(ItemWord::new::<TAG>(
            u64::from(sample.get()) << SAMPLE_SHIFT | bits,
        ))
    }

    /// Returns the bits of the tag.
    #[inline]
    fn tag(&self) -> u64 {
        self.0.get() & ItemWord::TAG_MASK
    }

    /// A page seen once with this sample.
    #[inline]
    pub(crate) fn seen(sample: Sample) -> Self {
        Self::of_sample::<TAG_SEEN>(sample)
    }

    /// A page seen once with this sample, which may be on probation.
    pub(crate) fn seen_on(sample: Sample, probation: Probation) -> Self {
        Self::on_probation::<TAG_SEEN>(sample, probation)
    }

    /// Returns the beat in which a merged page was merged; `None` for other pages.
    pub(crate) fn merged_in(&self) -> Option<u32> {
        let item = self.0.item()?;
        Some(MergeInfo::from_raw(item.note()).beat())
    }

    /// A page seen twice or more with this sample.
    #[inline]
    pub(crate) fn steady(sample: Sample) -> Self {
        Self::of_sample::<TAG_STEADY>(sample)
    }

    /// A page seen twice or more with this sample, which may be on probation.
    pub(crate) fn steady_on(sample: Sample, probation: Probation) -> Self {
        Self::on_probation::<TAG_STEADY>(sample, probation)
    }

    /// A page in the unstable tree under this checksum.
    pub(crate) fn unstable(sum: Checksum, strikes: Strikes) -> Self {
        Self(ItemWord::new::<TAG_UNSTABLE>(
            sum.get() << SUM_SHIFT | strikes.get() << STRIKES_SHIFT,
        ))
    }

    /// A merged page, which `item` lists with its stable node.
    pub(crate) fn merged(item: ItemBox) -> Self {
        Self(ItemWord::of_item(item))
    }

    /// Whether the page is as it was remembered when the walk came by.
    ///
    /// An anonymous page is, if it was steady with the same sample and is not on probation. A KSM page is, if it
    /// is listed with the same node. This is the most frequent question of a scan, so it is a single comparison
    /// for an anonymous page.
    #[inline(always)]
    pub(crate) fn matches(&self, page: SeenPage) -> bool {
        const { assert!(SAMPLE_SHIFT == SeenPage::SAMPLE_SHIFT) };
        if page.is_anon() {
            self.0.get() ^ page.packed() == TAG_STEADY ^ SeenPage::ANON
        } else {
            let node = self.0.item().and_then(|item| item.node_id());
            node.is_some() && node == page.node()
        }
    }

    /// Returns the strikes of the page: how often it was written to soon after a merge.
    pub(crate) fn strikes(&self) -> Strikes {
        match self.0.item() {
            Some(item) => MergeInfo::from_raw(item.note()).strikes(),
            None => Strikes::from_raw(self.0.get() >> STRIKES_SHIFT),
        }
    }

    /// Returns the probation of a page that is seen or steady; `None` if it is not on probation.
    #[inline]
    pub(crate) fn probation(&self) -> Option<Probation> {
        let tag = self.tag();
        let bits = (self.0.get() as u32) >> STRIKES_SHIFT;
        (bits != 0 && matches!(tag, TAG_SEEN | TAG_STEADY)).then(|| Probation::from_raw(bits))
    }

    /// Sets the probation of a page that is seen or steady. Other pages stay as they are.
    pub(crate) fn set_probation(&mut self, probation: Probation) {
        let sample = self.sample();
        *self = match self.tag() {
            TAG_SEEN => Self::seen_on(sample, probation),
            TAG_STEADY => Self::steady_on(sample, probation),
            _ => return,
        };
    }

    /// Whether the scan must not skip any of these pages, see [`Self::is_watched`].
    ///
    /// Most leaves have no such page. The entry of one never has the bit `NEVER`, so a chunk in which all entries
    /// have it needs one test only.
    pub(crate) fn any_is_watched(entries: &[Self]) -> bool {
        const NEVER: u64 = TAG_STEADY & TAG_UNSTABLE;
        const { assert!(NEVER & (TAG_SEEN | TAG_MERGED) == 0) };
        entries.chunks(16).any(|few| {
            let common = few.iter().fold(NEVER, |bits, entry| bits & entry.0.get());
            common == 0 && few.iter().any(Self::is_watched)
        })
    }

    /// Whether the scan must not skip the page.
    ///
    /// A merged page has to be looked at, or a write to it goes unnoticed and its rmap item stays. A seen page on
    /// probation has to be looked at, or its time goes by.
    #[inline]
    fn is_watched(&self) -> bool {
        match self.tag() {
            TAG_MERGED => true,
            TAG_SEEN => self.0.get() as u32 != TAG_SEEN as u32,
            _ => false,
        }
    }

    /// Returns the state of the page.
    #[inline]
    pub(crate) fn state(&self) -> PageState {
        let word = self.0.get();
        let sample = Sample::from_raw((word >> SAMPLE_SHIFT) as u32);
        match self.tag() {
            TAG_STEADY => PageState::Steady(sample),
            TAG_UNSTABLE => PageState::Unstable(Checksum::from_raw(word >> SUM_SHIFT)),
            TAG_MERGED => PageState::Merged(self.0.item().and_then(|item| item.node_id())),
            _ => PageState::Seen(sample),
        }
    }

    /// Returns the key of `node`, and how many mappings are listed with it, if this page is one of them.
    pub(crate) fn listed_with(&self, node: NodeId) -> Option<(StableKey, usize)> {
        self.0.item()?.listed_with(node)
    }

    /// Returns the sample that the page had when it was seen last, or when it was merged.
    pub(crate) fn sample(&self) -> Sample {
        match self.0.item() {
            Some(item) => item.sample(),
            None => Sample::from_raw((self.0.get() >> SAMPLE_SHIFT) as u32),
        }
    }

    /// Takes the rmap item of a merged page, which is seen with the same sample afterwards.
    ///
    /// The item may still be on the list of its node: see [`ItemBox::detach`].
    pub(crate) fn take_item(&mut self) -> Option<ItemBox> {
        let sample = self.0.item()?.sample();
        let Self(seen) = Self::seen(sample);
        self.0.replace(seen)
    }
}
