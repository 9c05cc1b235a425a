// SPDX-License-Identifier: GPL-2.0

//! Rmap items, in the layout that the core kernel walks: see [`super::stable_node`].
//!
//! An rmap item stands for one mapping of a KSM page, and is on the list of that page's stable node. The engine's
//! entry of the page owns it, and has its address in place of a sample ([`ItemBox::into_word`]).

use super::folio::NodeId;
use crate::{
    abi::layout::*,
    hash::Sample,
    ksm::probation::{Strikes, BEAT_BITS},
};
use core::{
    cell::UnsafeCell,
    ffi::c_void,
    mem::{size_of, ManuallyDrop},
    ptr::NonNull,
};
use kernel::{alloc::Flags, bindings, prelude::*};

/// The size of a word of the two structures, in bytes.
pub(super) const WORD: usize = size_of::<u64>();
/// The size of `struct ksm_rmap_item`, in words.
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

/// A mapping of a KSM page: `struct ksm_rmap_item`.
///
/// The core kernel uses `hlist`, `address`, `linear_page_index`, `anon_vma` and `mm` of it. The engine's own part
/// stands in the place of two pointers that in-tree KSM has for itself:
///
/// | member | here |
/// | --- | --- |
/// | `head` | the stable node on whose list the item is, or null |
/// | `rmap_list` | 64 bits: beat and strikes in the high half, sample in the low half |
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
    /// Returns a pointer to the member at `offset` of the part that the core kernel knows.
    pub(super) fn member<T>(&self, offset: usize) -> *mut T {
        self.abi.get().cast::<u8>().wrapping_add(offset).cast()
    }

    /// Returns the identity of the node on whose list this item is. The node is not freed before it took the item
    /// off.
    pub(super) fn node_id(&self) -> Option<NodeId> {
        // SAFETY: The member is a word of its own (checked above), which is null or was written by `set_node`.
        // Both run under the engine's mutex.
        NodeId::new(unsafe { self.member::<*const c_void>(KSM_RMAP_ITEM_HEAD).read() } as usize)
    }

    /// Notes the node on whose list the item was put, or null if it was taken off.
    pub(super) fn set_node(&self, node: *const c_void) {
        // SAFETY: The member is a word of its own (checked above), which is only used under the engine's mutex.
        unsafe { self.member::<*const c_void>(KSM_RMAP_ITEM_HEAD).write(node) };
    }

    /// What `set_merge_info` was given: beat, strikes and sample, from the highest bit down.
    fn merge_info(&self) -> u64 {
        // SAFETY: The member is a word of its own (checked above), which `ItemBox::new` initialises.
        unsafe { self.member::<u64>(KSM_RMAP_ITEM_RMAP_LIST).read() }
    }

    pub(super) fn set_merge_info(&self, beat: u32, strikes: Strikes, sample: Sample) {
        const { assert!(BEAT_BITS + Strikes::BITS + u32::BITS == u64::BITS) };
        let merge_info = u64::from(beat) << (u32::BITS + Strikes::BITS)
            | strikes.get() << u32::BITS
            | u64::from(sample.get());
        // SAFETY: The member is a word of its own (checked above), which is only used under the engine's mutex.
        unsafe {
            self.member::<u64>(KSM_RMAP_ITEM_RMAP_LIST)
                .write(merge_info)
        };
    }

    /// Returns the sample of the page, which outlives the node.
    pub(super) fn sample(&self) -> Sample {
        Sample::from_raw(self.merge_info() as u32)
    }

    /// Returns the strikes that the page had when it was merged.
    pub(super) fn strikes(&self) -> Strikes {
        Strikes::from_raw(self.merge_info() >> u32::BITS)
    }

    /// Returns the beat in which the page was merged.
    pub(super) fn beat(&self) -> u32 {
        (self.merge_info() >> (u32::BITS + Strikes::BITS)) as u32
    }

    /// Returns the link in the list of the node.
    pub(super) fn hlist(&self) -> *mut bindings::hlist_node {
        self.member(KSM_RMAP_ITEM_HLIST)
    }

    /// Returns the anon_vma whose tree has the VMA of the mapping. The item has a reference while it is listed.
    pub(super) fn anon_vma(&self) -> *mut bindings::anon_vma {
        // SAFETY: The member lies within `abi` (checked above), and only `StableNode::link` writes it.
        unsafe {
            self.member::<*mut bindings::anon_vma>(KSM_RMAP_ITEM_ANON_VMA)
                .read()
        }
    }

    /// Returns the address space of the mapping. Its registration keeps it, not the item.
    pub(super) fn mm(&self) -> *mut bindings::mm_struct {
        // SAFETY: The member lies within `abi` (checked above), and only `StableNode::link` writes it.
        unsafe {
            self.member::<*mut bindings::mm_struct>(KSM_RMAP_ITEM_MM)
                .read()
        }
    }
}

/// An owned rmap item.
///
/// The memory must not be freed while the item is on a list. A drop in that case leaks it, and says so in the
/// kernel log.
///
/// # Invariants
///
/// The item is on the list of `node`, or on none when that is `None`.
pub(crate) struct ItemBox(pub(super) ManuallyDrop<KBox<RmapItem>>);

// SAFETY: An item is used under the engine's mutex only, by the task that holds it. The folio lock protects what
// the core kernel reads of it.
unsafe impl Send for ItemBox {}

impl ItemBox {
    /// The memory that an item takes, in bytes.
    pub(crate) const SIZE: usize = size_of::<RmapItem>();

    /// Makes an item that is on no list, for a page with this sample that is merged in this beat (see
    /// [`Clock`](crate::ksm::probation::Clock)).
    ///
    /// # Errors
    ///
    /// `ENOMEM` if there is no memory, or `flags` charge a memory cgroup that is at its limit.
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

    /// Returns the address of the item, for trace events.
    pub(super) fn as_ptr(&self) -> *const c_void {
        (&raw const **self.0).cast()
    }

    /// Turns the box into one word, which [`ItemBox::from_word`] turns back. Its low three bits are zero.
    pub(super) fn into_word(self) -> NonNull<u8> {
        let mut this = ManuallyDrop::new(self);
        // SAFETY: `this` is neither used nor dropped afterwards.
        let item = KBox::into_raw(unsafe { ManuallyDrop::take(&mut this.0) });
        // SAFETY: The pointer of a box is not null.
        unsafe { NonNull::new_unchecked(item.cast()) }
    }

    /// Turns a word back into the box.
    ///
    /// # Safety
    ///
    /// `word` came from [`ItemBox::into_word`] and is used once.
    pub(super) unsafe fn from_word(word: NonNull<u8>) -> Self {
        // SAFETY: By the caller's promise `into_word` made the pointer of a box, and no other box owns it.
        Self(ManuallyDrop::new(unsafe {
            KBox::from_raw(word.as_ptr().cast())
        }))
    }

    /// Returns the identity of the node that the item in `word` is listed with.
    ///
    /// # Safety
    ///
    /// `word` came from [`ItemBox::into_word`] and was not given back yet.
    pub(super) unsafe fn node_id_in(word: NonNull<u8>) -> Option<NodeId> {
        // SAFETY: By the caller's promise the item is alive.
        let item = unsafe { word.cast::<RmapItem>().as_ref() };
        item.node_id()
    }

    /// Returns the sample of the page of the item in `word`.
    ///
    /// # Safety
    ///
    /// As for [`ItemBox::node_id_in`].
    pub(super) unsafe fn sample_in(word: NonNull<u8>) -> Sample {
        // SAFETY: By the caller's promise the item is alive.
        unsafe { word.cast::<RmapItem>().as_ref() }.sample()
    }

    /// Returns the beat in which the page of the item in `word` was merged.
    ///
    /// # Safety
    ///
    /// As for [`ItemBox::node_id_in`].
    pub(super) unsafe fn beat_in(word: NonNull<u8>) -> u32 {
        // SAFETY: By the caller's promise the item is alive.
        unsafe { word.cast::<RmapItem>().as_ref() }.beat()
    }

    /// Returns the strikes of the page of the item in `word`.
    ///
    /// # Safety
    ///
    /// As for [`ItemBox::node_id_in`].
    pub(super) unsafe fn strikes_in(word: NonNull<u8>) -> Strikes {
        // SAFETY: By the caller's promise the item is alive.
        unsafe { word.cast::<RmapItem>().as_ref() }.strikes()
    }
}

impl Drop for ItemBox {
    fn drop(&mut self) {
        if self.0.node_id().is_some() {
            // The core kernel still finds the item on the list of its node, so leak it.
            pr_err!("an rmap item in use was dropped; its memory is lost\n");
            return;
        }
        // SAFETY: The box is dropped here only, once, and the item is on no list.
        unsafe { ManuallyDrop::drop(&mut self.0) };
    }
}
