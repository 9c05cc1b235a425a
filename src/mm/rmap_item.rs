// SPDX-License-Identifier: GPL-2.0

//! Rmap items, in the layout that the core kernel walks: see [`super::stable_node`].
//!
//! An rmap item stands for one mapping of a KSM page, and is on the list of that page's stable node. The engine
//! remembers the page by it, and keeps it in one word ([`ItemWord`]).
//!
//! In-tree KSM has such an item for every page that it scans. Here a page gets one when it is merged. It
//! loses it when the engine finds that it is an ordinary page again.

use super::folio::NodeId;
use crate::{abi::layout::*, hash::Sample};
use core::{
    cell::UnsafeCell,
    ffi::c_void,
    marker::PhantomData,
    mem::{align_of, forget, replace, size_of, ManuallyDrop},
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
/// `rmap_walk_ksm()` reads these members, and `collect_procs_ksm()` those of the first three rows. Both hold the
/// folio lock:
///
/// | member | what a walk does with it |
/// | --- | --- |
/// | `hlist` | goes on to the next item of the node |
/// | `anon_vma`, `linear_page_index` | looks at the VMAs in its tree that have this page index |
/// | `address` | looks for the page there; a VMA without this address is passed over |
/// | `mm` | looks at its VMA in the first round, and at those of other processes (forks) in the second |
///
/// The engine's own part stands in the place of two pointers that in-tree KSM has for itself:
///
/// | member | here |
/// | --- | --- |
/// | `head` | the stable node on whose list the item is, or null |
/// | `rmap_list` | 64 bits: the engine's note in the high half, the sample of the page in the low half |
#[repr(C, align(8))]
pub(crate) struct RmapItem {
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
    let mut i = 0;
    while i < used.len() {
        assert!(used[i] % WORD == 0);
        assert!(used[i] != KSM_RMAP_ITEM_HEAD && used[i] != KSM_RMAP_ITEM_RMAP_LIST);
        i += 1;
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
    #[inline]
    pub(crate) fn node_id(&self) -> Option<NodeId> {
        // SAFETY: The member is a word of its own (checked above), which is null or was written by `set_node`.
        // Both run under the engine's mutex.
        NodeId::new(unsafe { self.member::<*const c_void>(KSM_RMAP_ITEM_HEAD).read() } as usize)
    }

    /// Notes the node on whose list the item was put, or null if it was taken off.
    pub(super) fn set_node(&self, node: *const c_void) {
        // SAFETY: The member is a word of its own (checked above), which is only used under the engine's mutex.
        unsafe { self.member::<*const c_void>(KSM_RMAP_ITEM_HEAD).write(node) };
    }

    /// Returns note and sample, from the highest bit down.
    fn info(&self) -> u64 {
        // SAFETY: The member is a word of its own (checked above), which `ItemBox::new` initialises.
        unsafe { self.member::<u64>(KSM_RMAP_ITEM_RMAP_LIST).read() }
    }

    /// Sets note and sample.
    fn set_info(&self, note: u32, sample: Sample) {
        let info = u64::from(note) << u32::BITS | u64::from(sample.get());
        // SAFETY: The member is a word of its own (checked above), which is only used under the engine's mutex.
        unsafe { self.member::<u64>(KSM_RMAP_ITEM_RMAP_LIST).write(info) };
    }

    /// Returns the sample of the page. It is kept here because the item outlives the node.
    pub(crate) fn sample(&self) -> Sample {
        Sample::from_raw(self.info() as u32)
    }

    /// Sets the sample of the page.
    pub(super) fn set_sample(&self, sample: Sample) {
        self.set_info(self.note(), sample);
    }

    /// Returns what the engine has noted on this mapping. It means nothing here.
    pub(crate) fn note(&self) -> u32 {
        (self.info() >> u32::BITS) as u32
    }

    /// Replaces the note of the engine.
    pub(crate) fn set_note(&self, note: u32) {
        self.set_info(note, self.sample());
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

    /// Makes an item that is on no list, for a page with this sample, with this note of the engine.
    ///
    /// # Errors
    ///
    /// `ENOMEM` if there is no memory, or `flags` charge a memory cgroup that is at its limit.
    pub(crate) fn new(sample: Sample, note: u32, flags: Flags) -> Result<Self> {
        let item = RmapItem {
            abi: UnsafeCell::new([0; ITEM_WORDS]),
        };
        item.set_info(note, sample);
        Ok(Self(ManuallyDrop::new(KBox::new(item, flags)?)))
    }

    /// Returns the address of the item, for trace events.
    pub(super) fn as_ptr(&self) -> *const c_void {
        (&raw const **self.0).cast()
    }
}

impl core::ops::Deref for ItemBox {
    type Target = RmapItem;

    #[inline]
    fn deref(&self) -> &RmapItem {
        &self.0
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

/// One word that either owns an rmap item or has other content.
///
/// The engine has such a word for each page, and hosts have hundreds of millions of them. The low three bits are
/// the tag: [`Self::ITEM`] for an item, whose address is the rest of the word. For other content, the caller
/// chooses the tag and the other bits.
///
/// # Invariants
///
/// If the tag is [`Self::ITEM`], the other bits are an address that `KBox::into_raw` returned, and this word owns
/// that box.
pub(crate) struct ItemWord(u64, PhantomData<ItemBox>);

impl ItemWord {
    /// The bits of the tag. The address of an item has none of them.
    pub(crate) const TAG_MASK: u64 = 7;
    /// The tag of a word that owns an item.
    pub(crate) const ITEM: u64 = 4;

    /// Makes a word without an item, which has this tag. The bits of the tag in `bits` are ignored.
    #[inline(always)]
    pub(crate) const fn new<const TAG: u64>(bits: u64) -> Self {
        const { assert!(TAG <= Self::TAG_MASK && TAG != Self::ITEM) };
        // INVARIANT: The tag is another one.
        Self(bits & !Self::TAG_MASK | TAG, PhantomData)
    }

    /// Makes a word that owns `item`.
    pub(crate) fn of_item(item: ItemBox) -> Self {
        let mut item = ManuallyDrop::new(item);
        // SAFETY: `item` is neither used nor dropped afterwards.
        let item = KBox::into_raw(unsafe { ManuallyDrop::take(&mut item.0) });
        const { assert!(align_of::<RmapItem>() > Self::TAG_MASK as usize) };
        // INVARIANT: The alignment leaves the bits of the tag free. The box was given up above.
        Self(item as u64 | Self::ITEM, PhantomData)
    }

    /// Returns the whole word.
    #[inline(always)]
    pub(crate) const fn get(&self) -> u64 {
        self.0
    }

    /// Returns the address of the item, if there is one.
    #[inline(always)]
    fn address(&self) -> Option<NonNull<RmapItem>> {
        if self.0 & Self::TAG_MASK != Self::ITEM {
            return None;
        }
        NonNull::new((self.0 & !Self::TAG_MASK) as *mut RmapItem)
    }

    /// Returns the item, if there is one.
    #[inline(always)]
    pub(crate) fn item(&self) -> Option<&RmapItem> {
        // SAFETY: By the type invariant this word owns the item, so it lives as long as the word is borrowed.
        self.address().map(|item| unsafe { item.as_ref() })
    }

    /// Replaces the word by `new`, and returns the item that it had.
    ///
    /// The item may still be on the list of its node: see [`ItemBox::detach`].
    pub(crate) fn replace(&mut self, new: Self) -> Option<ItemBox> {
        let old = replace(self, new);
        let item = old.address()?;
        forget(old);
        // SAFETY: By the type invariant the address is that of a box, which `old` owned. `old` is gone without
        // having been dropped.
        let item = unsafe { KBox::from_raw(item.as_ptr()) };
        // INVARIANT: An item knows the node on whose list it is, whoever owns it.
        Some(ItemBox(ManuallyDrop::new(item)))
    }
}

impl Drop for ItemWord {
    fn drop(&mut self) {
        if self.address().is_some() {
            drop(self.replace(Self::new::<0>(0)));
        }
    }
}
