// SPDX-License-Identifier: GPL-2.0

//! What a page was when a walk came by.

use super::folio::NodeId;
use crate::hash::Sample;

/// What a page was when the walk came by. It may be something else by now: no lock is held any more.
#[derive(Clone, Copy)]
pub(crate) enum Seen {
    /// An anonymous page with this sample, which is not a KSM page.
    Anon(Sample),
    /// A KSM page of the stable node with this identity; `None` if no node has it, as after a node was freed
    /// by force. The engine unshares such a page, since no rmap walk finds it.
    Ksm(Option<NodeId>),
}

/// One page that a walk came by, in two words.
///
/// What the page was is packed, so that it takes a single comparison to find that the page has not changed. That
/// is so for most pages that a scan comes by.
#[derive(Clone, Copy, Default)]
pub(crate) struct SeenPage {
    addr: usize,
    /// See [`Self::packed`].
    what: u64,
}

impl SeenPage {
    /// The position of the sample in [`Self::packed`].
    pub(crate) const SAMPLE_SHIFT: u32 = 32;
    /// The bit of [`Self::packed`] that is set for an anonymous page, and never for a KSM page.
    pub(crate) const ANON: u64 = 1;

    /// An anonymous page at `addr` with this sample.
    #[inline(always)]
    pub(crate) fn anon(addr: usize, sample: Sample) -> Self {
        Self {
            addr,
            what: u64::from(sample.get()) << Self::SAMPLE_SHIFT | Self::ANON,
        }
    }

    /// A KSM page at `addr` of this node.
    pub(crate) fn ksm(addr: usize, node: Option<NodeId>) -> Self {
        Self {
            addr,
            what: node.map_or(0, NodeId::get) as u64,
        }
    }

    /// Returns the address of the page, page aligned.
    #[inline(always)]
    pub(crate) fn addr(self) -> usize {
        self.addr
    }

    /// Returns what the page was in one word, to compare it at once.
    ///
    /// For an anonymous page, this is its sample from bit [`Self::SAMPLE_SHIFT`] on, and [`Self::ANON`]. For a KSM
    /// page it is the address of the node, or 0.
    #[inline(always)]
    pub(crate) fn packed(self) -> u64 {
        self.what
    }

    /// Whether the page was an anonymous page that is not a KSM page.
    #[inline(always)]
    pub(crate) fn is_anon(self) -> bool {
        self.what & Self::ANON != 0
    }

    /// Returns the sample of the page, if it was an anonymous page.
    #[inline(always)]
    pub(crate) fn sample(self) -> Option<Sample> {
        self.is_anon().then(|| self.sample_bits())
    }

    /// Returns the sample of the page, which was an anonymous page. Anything for another one.
    #[inline(always)]
    pub(crate) fn sample_bits(self) -> Sample {
        Sample::from_raw((self.what >> Self::SAMPLE_SHIFT) as u32)
    }

    /// Returns the node of the page, if it was a KSM page that a node has.
    #[inline(always)]
    pub(crate) fn node(self) -> Option<NodeId> {
        match self.is_anon() {
            true => None,
            false => NodeId::new(self.what as usize),
        }
    }

    /// Returns what the page was.
    #[inline(always)]
    pub(crate) fn seen(self) -> Seen {
        match self.sample() {
            Some(sample) => Seen::Anon(sample),
            None => Seen::Ksm(self.node()),
        }
    }
}
