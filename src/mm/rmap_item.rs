// SPDX-License-Identifier: GPL-2.0

//! Rmap items, in the layout that the core kernel walks: see [`super::stable_node`].

use super::stable_node::{NodeId, NodePage, StableNode, WORD};
use crate::{
    abi::layout::*,
    hash::Sample,
    ksm::{
        index::StableKey,
        probation::{Strikes, BEAT_BITS},
    },
};
use core::{
    cell::UnsafeCell,
    mem::{size_of, ManuallyDrop},
    ptr::{self, NonNull},
};
use kernel::{alloc::Flags, bindings, prelude::*};

const ITEM_WORDS: usize = KSM_RMAP_ITEM_SIZE.div_ceil(WORD);

// The generated offsets must make sense for the types that are accessed through them.
const _: () = {
    assert!(KSM_RMAP_ITEM_HLIST + size_of::<bindings::hlist_node>() <= KSM_RMAP_ITEM_SIZE);
    assert!(KSM_RMAP_ITEM_ADDRESS + size_of::<usize>() <= KSM_RMAP_ITEM_SIZE);
    assert!(KSM_RMAP_ITEM_LINEAR_PAGE_INDEX + size_of::<usize>() <= KSM_RMAP_ITEM_SIZE);
    assert!(KSM_RMAP_ITEM_ANON_VMA + size_of::<usize>() <= KSM_RMAP_ITEM_SIZE);
    assert!(KSM_RMAP_ITEM_MM + size_of::<usize>() <= KSM_RMAP_ITEM_SIZE);
    assert!(KSM_RMAP_ITEM_HLIST % WORD == 0 && KSM_RMAP_ITEM_ADDRESS % WORD == 0);
};

/// A place that maps a merged page: `struct ksm_rmap_item`, of which only `hlist`, `address`,
/// `linear_page_index`, `anon_vma` and `mm` are used by the core kernel. What only the engine knows
/// stands in the place of two pointers that in-tree KSM has for itself.
#[repr(C, align(8))]
pub(super) struct RmapItem {
    abi: UnsafeCell<[u64; ITEM_WORDS]>,
}

const _: () = {
    // The two places are words of their own.
    let used = [
        KSM_RMAP_ITEM_HLIST,
        KSM_RMAP_ITEM_HLIST + WORD,
        KSM_RMAP_ITEM_ADDRESS,
        KSM_RMAP_ITEM_LINEAR_PAGE_INDEX,
        KSM_RMAP_ITEM_ANON_VMA,
        KSM_RMAP_ITEM_MM,
    ];
    let mut nth = 0;
    while nth < used.len() {
        assert!(used[nth] % WORD == 0);
        assert!(used[nth] != KSM_RMAP_ITEM_HEAD && used[nth] != KSM_RMAP_ITEM_RMAP_LIST);
        nth += 1;
    }
    assert!(KSM_RMAP_ITEM_HEAD % WORD == 0 && KSM_RMAP_ITEM_RMAP_LIST % WORD == 0);
    assert!(KSM_RMAP_ITEM_HEAD != KSM_RMAP_ITEM_RMAP_LIST);
    assert!(size_of::<bindings::hlist_node>() == 2 * WORD);
};

impl RmapItem {
    /// A pointer to the member at `offset` of the part that the core kernel knows.
    pub(super) fn member<T>(&self, offset: usize) -> *mut T {
        self.abi.get().cast::<u8>().wrapping_add(offset).cast()
    }

    /// The node on whose list this item is. The node is not freed before it took the item off.
    pub(super) fn node(&self) -> Option<NonNull<StableNode>> {
        // SAFETY: a word of its own (checked above) that is null or was written by `set_node`, under
        // the engine's mutex.
        NonNull::new(unsafe { self.member::<*mut StableNode>(KSM_RMAP_ITEM_HEAD).read() })
    }

    pub(super) fn set_node(&self, node: Option<NonNull<StableNode>>) {
        let node = node.map_or(ptr::null_mut(), NonNull::as_ptr);
        // SAFETY: as in `node`.
        unsafe {
            self.member::<*mut StableNode>(KSM_RMAP_ITEM_HEAD)
                .write(node)
        };
    }

    /// What `set_merge_info` was given: beat, strikes and sample, from the highest bit down.
    fn merge_info(&self) -> u64 {
        // SAFETY: a word of its own (checked above), written by `ItemBox::new` first.
        unsafe { self.member::<u64>(KSM_RMAP_ITEM_RMAP_LIST).read() }
    }

    pub(super) fn set_merge_info(&self, beat: u32, strikes: Strikes, sample: Sample) {
        const { assert!(BEAT_BITS + Strikes::BITS + u32::BITS == u64::BITS) };
        let merge_info = u64::from(beat) << (u32::BITS + Strikes::BITS)
            | strikes.get() << u32::BITS
            | u64::from(sample.get());
        // SAFETY: a word of its own (checked above), which nobody else reads at the same time: the engine
        // is used under its mutex.
        unsafe {
            self.member::<u64>(KSM_RMAP_ITEM_RMAP_LIST)
                .write(merge_info)
        };
    }

    /// The sample of the page, which outlives the node.
    pub(super) fn sample(&self) -> Sample {
        Sample::from_raw(self.merge_info() as u32)
    }

    /// The strikes that the page had when it was merged.
    pub(super) fn strikes(&self) -> Strikes {
        Strikes::from_raw(self.merge_info() >> u32::BITS)
    }

    /// The beat in which the page was merged.
    pub(super) fn beat(&self) -> u32 {
        (self.merge_info() >> (u32::BITS + Strikes::BITS)) as u32
    }

    pub(super) fn hlist(&self) -> *mut bindings::hlist_node {
        self.member(KSM_RMAP_ITEM_HLIST)
    }

    pub(super) fn anon_vma(&self) -> *mut bindings::anon_vma {
        // SAFETY: the member lies within `abi`, and is written by `StableNode::link` only.
        unsafe {
            self.member::<*mut bindings::anon_vma>(KSM_RMAP_ITEM_ANON_VMA)
                .read()
        }
    }

    pub(super) fn mm(&self) -> *mut bindings::mm_struct {
        // SAFETY: the member lies within `abi`, and is written by `StableNode::link` only.
        unsafe {
            self.member::<*mut bindings::mm_struct>(KSM_RMAP_ITEM_MM)
                .read()
        }
    }
}

/// What became of an item that was to be taken off its node.
pub(crate) enum Unlinked {
    /// It was on no list.
    NotLinked,
    /// It was taken off the node with this key, which has so many items left.
    Done(StableKey, usize),
    /// Nothing was done: the node with this key is stale and must be released, which takes off all
    /// its items.
    StaleNode(StableKey),
    /// Nothing was done: another task has the page locked.
    Busy,
}

/// An owned rmap item.
///
/// # Invariants
///
/// The item is on the list of `node`, or on none when that is `None`.
pub(crate) struct ItemBox(pub(super) ManuallyDrop<KBox<RmapItem>>);

// SAFETY: items are used under the engine's mutex only, by whichever task holds it. What the core
// kernel reads of them is protected by the folio lock.
unsafe impl Send for ItemBox {}

impl ItemBox {
    /// What one item takes, in bytes.
    pub(crate) const SIZE: usize = size_of::<RmapItem>();

    /// An item that is on no list, for a page with this sample that is merged in this beat (see
    /// [`Clock`](crate::ksm::probation::Clock)).
    pub(crate) fn new(sample: Sample, beat: u32, flags: Flags) -> Result<Self> {
        let item = RmapItem {
            abi: UnsafeCell::new([0; ITEM_WORDS]),
        };
        item.set_merge_info(beat, Strikes::NONE, sample);
        Ok(Self(ManuallyDrop::new(KBox::new(item, flags)?)))
    }

    /// Notes the strikes of the page.
    pub(crate) fn set_strikes(&self, strikes: Strikes) {
        self.0
            .set_merge_info(self.0.beat(), strikes, self.0.sample());
    }

    /// How many places are known to map the page of the item's node.
    pub(crate) fn mappings(&self) -> usize {
        let Some(node) = self.0.node() else {
            return 0;
        };
        // SAFETY: by the type invariant the item is on the node's list, and a node is not freed
        // before it took off all its items.
        unsafe { node.as_ref() }.items.get()
    }

    /// Takes the item off its node, unless another task has the page locked.
    pub(crate) fn detach(&mut self) -> Unlinked {
        let Some(node) = self.0.node() else {
            return Unlinked::NotLinked;
        };
        // SAFETY: by the type invariant the item is on the node's list, and a node is not freed
        // before it took off all its items.
        let node = unsafe { node.as_ref() };
        let key = node.key.get();
        match node.locked_page() {
            NodePage::Gone => Unlinked::StaleNode(key),
            NodePage::Busy => Unlinked::Busy,
            NodePage::Locked(_page) => {
                // SAFETY: `_page` is the node's page and locked.
                unsafe { node.unlink(&self.0) };
                Unlinked::Done(key, node.items.get())
            }
        }
    }

    /// Where it is. Only good for showing.
    pub(super) fn as_ptr(&self) -> *const core::ffi::c_void {
        (&raw const **self.0).cast()
    }

    /// Moves the box's memory into one word, to be given back to [`ItemBox::from_word`].
    pub(super) fn into_word(self) -> NonNull<u8> {
        let mut this = ManuallyDrop::new(self);
        // SAFETY: `this` is not used or dropped afterwards.
        let item = KBox::into_raw(unsafe { ManuallyDrop::take(&mut this.0) });
        // SAFETY: a box is not null.
        unsafe { NonNull::new_unchecked(item.cast()) }
    }

    /// # Safety
    ///
    /// `word` came from [`ItemBox::into_word`] and is used once.
    pub(super) unsafe fn from_word(word: NonNull<u8>) -> Self {
        // SAFETY: `into_word` gave up the box that this pointer is.
        Self(ManuallyDrop::new(unsafe {
            KBox::from_raw(word.as_ptr().cast())
        }))
    }

    /// The identity of the node that the item in `word` is listed with.
    ///
    /// # Safety
    ///
    /// `word` came from [`ItemBox::into_word`] and was not given back yet.
    pub(super) unsafe fn node_id_in(word: NonNull<u8>) -> Option<NodeId> {
        // SAFETY: the item is alive by the caller's promise.
        let item = unsafe { word.cast::<RmapItem>().as_ref() };
        item.node()
            .and_then(|node| NodeId::new(node.as_ptr() as usize))
    }

    /// The key of the node that the item in `word` is listed with, and how many places are known to map the page of that.
    ///
    /// # Safety
    ///
    /// As for [`ItemBox::node_id_in`].
    pub(super) unsafe fn node_in(word: NonNull<u8>) -> Option<(StableKey, usize)> {
        // SAFETY: the item is alive by the caller's promise.
        let node = unsafe { word.cast::<RmapItem>().as_ref() }.node()?;
        // SAFETY: by the type invariant the item is on the node's list, and a node is not freed
        // before it took off all its items.
        let node = unsafe { node.as_ref() };
        Some((node.key.get(), node.items.get()))
    }

    /// The sample that the item in `word` was made with.
    ///
    /// # Safety
    ///
    /// As for [`ItemBox::node_id_in`].
    pub(super) unsafe fn sample_in(word: NonNull<u8>) -> Sample {
        // SAFETY: the item is alive by the caller's promise.
        unsafe { word.cast::<RmapItem>().as_ref() }.sample()
    }

    /// The beat that the item in `word` was made in.
    ///
    /// # Safety
    ///
    /// As for [`ItemBox::node_id_in`].
    pub(super) unsafe fn beat_in(word: NonNull<u8>) -> u32 {
        // SAFETY: the item is alive by the caller's promise.
        unsafe { word.cast::<RmapItem>().as_ref() }.beat()
    }

    /// The strikes of the page of the item in `word`.
    ///
    /// # Safety
    ///
    /// As for [`ItemBox::node_id_in`].
    pub(super) unsafe fn strikes_in(word: NonNull<u8>) -> Strikes {
        // SAFETY: the item is alive by the caller's promise.
        unsafe { word.cast::<RmapItem>().as_ref() }.strikes()
    }
}

impl Drop for ItemBox {
    fn drop(&mut self) {
        if self.0.node().is_some() {
            // The core kernel still finds the item on its node's list.
            pr_err!("an rmap item in use was dropped; its memory is lost\n");
            return;
        }
        // SAFETY: dropped here only, once, and the item is on no list.
        unsafe { ManuallyDrop::drop(&mut self.0) };
    }
}
