// SPDX-License-Identifier: GPL-2.0

//! Stable nodes and rmap items, in the layout that the core kernel walks.
//!
//! A merged page is a KSM folio whose `mapping` points at a [`NodeBox`]'s memory; the node's
//! `hlist` holds one [`ItemBox`] for each place that is known to map the page. `rmap_walk_ksm()`,
//! `collect_procs_ksm()` and `folio_migrate_ksm()` read both, under the folio lock. So:
//!
//! * a node's `hlist` changes only under the lock of its folio, or when no folio points at the
//!   node any more;
//! * a node is freed only when no folio points at it any more;
//! * the node holds no reference on its folio ("keyhole"): it is stale once the folio at `kpfn` no
//!   longer points back at it. Migration updates `kpfn` under the folio lock.
//!
//! All nodes and items of an engine are used under that engine's mutex only. Neither type is
//! `Sync`, which keeps them there.

use super::{
    ffi,
    folio::{LockedPage, PageRef, MAPPING_FLAGS},
    rmap_item::{ItemBox, RmapItem},
    trace,
    vma::MergeableVma,
};
use crate::{abi::layout::*, hash::Sample, ksm::index::StableKey};
use core::{
    cell::{Cell, UnsafeCell},
    mem::{align_of, size_of, ManuallyDrop},
    num::NonZeroUsize,
    ptr::{self, NonNull},
    sync::atomic::{fence, Ordering},
};
use kernel::{alloc::Flags, bindings, prelude::*};

/// Which stable node a KSM page belongs to. Only good for comparing: a node may be gone by the time
/// its identity is looked at.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct NodeId(NonZeroUsize);

impl NodeId {
    /// The identity of the node at `addr`, if there is one.
    pub(super) fn new(addr: usize) -> Option<Self> {
        NonZeroUsize::new(addr).map(Self)
    }

    /// The identity that the `mapping` of a KSM folio shows.
    pub(super) fn of_mapping(mapping: usize) -> Option<Self> {
        Self::new(mapping & !MAPPING_FLAGS)
    }

    /// The identity as a number that is not zero, and even.
    pub(super) fn get(self) -> usize {
        self.0.get()
    }

    /// The key of the node.
    ///
    /// # Safety
    ///
    /// A folio points at the node, and cannot leave it while this runs: its lock is held. The node
    /// is one of this module: no in-tree node exists while the module is loaded, see `intree`.
    pub(super) unsafe fn key(self) -> StableKey {
        // SAFETY: By the caller's promise this is the address of a node of ours, which is not freed.
        let node = unsafe { &*(self.0.get() as *const StableNode) };
        node.key.get()
    }
}

pub(super) const WORD: usize = size_of::<u64>();
const NODE_WORDS: usize = KSM_STABLE_NODE_SIZE.div_ceil(WORD);

// The generated offsets must make sense for the types that are accessed through them, and the low
// bits of a node's address must be free for the flags in `folio->mapping`.
const _: () = {
    assert!(KSM_STABLE_NODE_HLIST + size_of::<bindings::hlist_head>() <= KSM_STABLE_NODE_SIZE);
    assert!(KSM_STABLE_NODE_KPFN + size_of::<usize>() <= KSM_STABLE_NODE_SIZE);
    assert!(KSM_STABLE_NODE_HLIST % WORD == 0 && KSM_STABLE_NODE_KPFN % WORD == 0);
    assert!(align_of::<StableNode>() >= 8);
};

/// A stable node: `struct ksm_stable_node`, of which only `hlist` and `kpfn` are used by the core kernel.
/// What only the engine knows stands where in-tree KSM has its tree links.
#[repr(C, align(8))]
pub(super) struct StableNode {
    abi: UnsafeCell<[u64; NODE_WORDS]>,
}

/// What only the engine knows of a node.
pub(super) struct NodePrivate {
    pub(super) key: Cell<StableKey>,
    /// How many items are on `hlist`.
    pub(super) items: Cell<usize>,
    /// Whether a folio may point at this node.
    published: Cell<bool>,
    /// Whether a page with the same sample had other content.
    ambiguous: Cell<bool>,
    /// Whether the page is known to be on another memory node than the key says.
    nid_changed: Cell<bool>,
    /// The memory node that the page was on when it was looked at last.
    nid: Cell<u32>,
}

const _: () = {
    assert!(size_of::<NodePrivate>() <= KSM_STABLE_NODE_HLIST);
    assert!(size_of::<NodePrivate>() <= KSM_STABLE_NODE_KPFN);
    assert!(align_of::<NodePrivate>() <= align_of::<StableNode>());
};

impl core::ops::Deref for StableNode {
    type Target = NodePrivate;

    #[inline(always)]
    fn deref(&self) -> &NodePrivate {
        // SAFETY: `NodeBox::new` puts it at the start, where there is room for it before the members
        // that the core kernel uses (checked above). It is changed through cells only.
        unsafe { &*self.abi.get().cast() }
    }
}

impl StableNode {
    /// A pointer to the member at `offset` of the part that the core kernel knows.
    fn member<T>(&self, offset: usize) -> *mut T {
        self.abi.get().cast::<u8>().wrapping_add(offset).cast()
    }

    fn hlist(&self) -> *mut bindings::hlist_head {
        self.member(KSM_STABLE_NODE_HLIST)
    }

    fn kpfn(&self) -> usize {
        // SAFETY: the member lies within `abi` (checked above); `folio_migrate_ksm()` may write it
        // at the same time, as one word.
        unsafe { self.member::<usize>(KSM_STABLE_NODE_KPFN).read_volatile() }
    }

    fn set_kpfn(&self, pfn: usize) {
        // SAFETY: as in `kpfn`.
        unsafe {
            self.member::<usize>(KSM_STABLE_NODE_KPFN)
                .write_volatile(pfn)
        }
    }

    fn as_addr(&self) -> usize {
        ptr::from_ref(self) as usize
    }

    /// Whether `folio` points at this node.
    ///
    /// # Safety
    ///
    /// `folio` is in the memory map (it need not be referenced).
    unsafe fn is_node_of(&self, folio: *mut bindings::folio) -> bool {
        // SAFETY: the memory map can be read at any time; the answer may be outdated.
        unsafe { super::folio::node_id_of(folio) }.is_some_and(|id| id.0.get() == self.as_addr())
    }

    /// Peeps through the keyhole: the node's page with a reference, or `None` when it is stale.
    ///
    /// The order of the checks is that of `ksm_get_folio()` in mm/ksm.c, and so are the reasons.
    fn page(&self) -> Option<PageRef> {
        if !self.published.get() {
            return None;
        }
        loop {
            let kpfn = self.kpfn();
            // SAFETY: returns null for a pfn that is not in an online section. That the section stays
            // in the memory map while it is looked at, without the lock of memory hotplug, is what
            // `crate::sys::memory_notifier` is about: the engine frees this node under its mutex, which our caller
            // holds, before the kernel goes on to take away the section of `kpfn`.
            let folio = unsafe { ffi::rksm_pfn_folio(kpfn) };
            if let Some(folio) = NonNull::new(folio) {
                // SAFETY: `folio` is in the memory map.
                if let Some(page) = unsafe { self.try_get(folio.as_ptr()) } {
                    return Some(page);
                }
            }
            // Stale, or just migrated: pairs with smp_wmb() in folio_migrate_ksm(), which writes
            // the new kpfn before the old folio lets go of the node.
            fence(Ordering::Acquire);
            if self.kpfn() == kpfn {
                return None;
            }
        }
    }

    /// # Safety
    ///
    /// `folio` is in the memory map.
    unsafe fn try_get(&self, folio: *mut bindings::folio) -> Option<PageRef> {
        // SAFETY: `folio` is in the memory map.
        if !unsafe { self.is_node_of(folio) } {
            return None;
        }
        // SAFETY: taking a reference on a folio that may be free fails and does no harm.
        while !unsafe { ffi::rksm_folio_try_get(folio) } {
            // The count is zero: free or about to be, or frozen for a moment by migration, which
            // only happens to a folio in the swap cache.
            // SAFETY: `folio` is in the memory map.
            if !unsafe { ffi::rksm_folio_test_swapcache(folio) } {
                return None;
            }
            core::hint::spin_loop();
        }
        // A KSM folio is small: the folio is its only page.
        // SAFETY: not null, and the reference was just taken.
        let page = unsafe { PageRef::from_raw(NonNull::new_unchecked(folio.cast())) };
        // SAFETY: `page` keeps the folio.
        unsafe { self.is_node_of(folio) }.then_some(page)
    }

    /// Like [`Self::page`], with the folio lock held, under which the folio cannot leave the node.
    pub(super) fn locked_page(&self) -> NodePage {
        loop {
            let Some(page) = self.page() else {
                return NodePage::Gone;
            };
            let Ok(page) = page.try_lock() else {
                return NodePage::Busy;
            };
            if page
                .node_id()
                .is_some_and(|id| id.0.get() == self.as_addr())
            {
                return NodePage::Locked(page);
            }
            // Migrated before we had the lock, or gone: look again.
        }
    }

    /// # Safety
    ///
    /// The caller holds the lock of this node's folio, or no folio points at the node any more.
    /// `item` is on this node's list.
    pub(super) unsafe fn unlink(&self, item: &RmapItem) {
        // SAFETY: the item is on our list, which the caller's lock protects.
        unsafe { ffi::rksm_hlist_del(item.hlist()) };
        // SAFETY: the reference was taken in `link` and the pointer not changed since; `mm` is kept
        // by its registration until all items of it are dropped.
        unsafe {
            ffi::rksm_put_anon_vma(item.anon_vma());
            ffi::rksm_mm_add_merging(item.mm(), -1);
        }
        item.set_node(None);
        self.items.set(self.items.get().saturating_sub(1));
    }

    /// # Safety
    ///
    /// The caller holds the lock of this node's folio, and hands over a reference to `anon_vma`, whose tree
    /// has `vma`. `item` is on no list.
    unsafe fn link(
        &self,
        item: &RmapItem,
        anon_vma: *mut bindings::anon_vma,
        vma: &MergeableVma<'_>,
        addr: usize,
    ) {
        let page_addr = addr & !(kernel::page::PAGE_SIZE - 1);
        // SAFETY: `vma` is stable under the mmap lock its type stands for; the item's members lie within it
        // and nobody else reads them before it is on the list.
        unsafe {
            item.member::<*mut bindings::anon_vma>(KSM_RMAP_ITEM_ANON_VMA)
                .write(anon_vma);
            item.member::<usize>(KSM_RMAP_ITEM_LINEAR_PAGE_INDEX)
                .write(ffi::rksm_vma_page_index(vma.as_ptr(), page_addr));
            item.member::<usize>(KSM_RMAP_ITEM_ADDRESS).write(page_addr);
            item.member::<*mut bindings::mm_struct>(KSM_RMAP_ITEM_MM)
                .write(vma.mm().as_raw());
            ffi::rksm_hlist_add_head(item.hlist(), self.hlist());
            ffi::rksm_mm_add_merging(vma.mm().as_raw(), 1);
        }
        item.set_node(Some(NonNull::from(self)));
        self.items.set(self.items.get().saturating_add(1));
    }
}

/// The page of a node.
pub(crate) enum NodePage {
    /// It belongs to the node no more: the node is stale.
    Gone,
    /// Another task has it locked: try again later.
    Busy,
    /// Locked, so it stays the node's.
    Locked(LockedPage),
}

/// An owned stable node.
///
/// # Invariants
///
/// A folio points at the node only while the node is `published`.
pub(crate) struct NodeBox(ManuallyDrop<KBox<StableNode>>);

// SAFETY: nodes are used under the engine's mutex only, by whichever task holds it. What the core
// kernel reads of them is protected by the folio lock.
unsafe impl Send for NodeBox {}

impl NodeBox {
    /// What one node takes, in bytes.
    pub(crate) const SIZE: usize = size_of::<StableNode>();

    /// A node that no page belongs to yet.
    pub(crate) fn new(key: StableKey, flags: Flags) -> Result<Self> {
        let node = StableNode {
            abi: UnsafeCell::new([0; NODE_WORDS]),
        };
        let own = NodePrivate {
            key: Cell::new(key),
            items: Cell::new(0),
            published: Cell::new(false),
            ambiguous: Cell::new(false),
            nid_changed: Cell::new(false),
            nid: Cell::new(0),
        };
        // SAFETY: there is room for it, see `deref`.
        unsafe { node.abi.get().cast::<NodePrivate>().write(own) };
        Ok(Self(ManuallyDrop::new(KBox::new(node, flags)?)))
    }

    /// The identity that the node's page shows.
    pub(crate) fn id(&self) -> Option<NodeId> {
        NodeId::new(self.0.as_addr())
    }

    /// Sets the key under which the node is in the index.
    pub(crate) fn set_key(&self, key: StableKey) {
        self.0.key.set(key);
    }

    /// Whether the sample of the page is known to be that of other content, too.
    pub(crate) fn is_ambiguous(&self) -> bool {
        self.0.ambiguous.get()
    }

    /// Notes that the sample of the page is that of other content, too.
    pub(crate) fn set_ambiguous(&self) {
        self.0.ambiguous.set(true);
    }

    /// Notes that the page is on another memory node than the key says.
    pub(crate) fn set_nid_changed(&self) {
        self.0.nid_changed.set(true);
    }

    /// Whether the page was moved to another memory node since this was asked last, or since
    /// [`Self::set_nid_changed`].
    pub(crate) fn take_strayed(&self) -> bool {
        // SAFETY: says -1 for a pfn that is not in an online section.
        let node = unsafe { ffi::rksm_pfn_nid(self.0.kpfn()) };
        let nid_changed = self.0.nid_changed.take();
        match u32::try_from(node) {
            Ok(node) => self.0.nid.replace(node) != node || nid_changed,
            Err(_) => nid_changed,
        }
    }

    /// Has all places that are known to map the page remember it with this sample, and tells `changed` the
    /// one that each had, where it was another.
    pub(crate) fn set_samples(&self, sample: Sample, mut changed: impl FnMut(Sample)) {
        // SAFETY: the member lies within the node. Only the engine changes the list, under the mutex
        // that this runs under; the core kernel only reads it.
        let mut next = unsafe { (*self.0.hlist()).first };
        while !next.is_null() {
            let item = next
                .cast::<u8>()
                .wrapping_sub(KSM_RMAP_ITEM_HLIST)
                .cast::<RmapItem>();
            // SAFETY: only items are put on the list, by `link`, and an item that is on a list is not
            // freed (see `ItemBox::drop`).
            let item = unsafe { &*item };
            if item.sample() != sample {
                changed(item.sample());
                item.set_merge_info(item.beat(), item.strikes(), sample);
            }
            // SAFETY: as above.
            next = unsafe { (*next).next };
        }
    }

    /// How many places are known to map the page.
    pub(crate) fn items(&self) -> usize {
        self.0.items.get()
    }

    /// The node's page, with a reference; `None` when the node is stale.
    pub(crate) fn page(&self) -> Option<PageRef> {
        self.0.page()
    }

    /// The node's page, locked.
    pub(crate) fn locked_page(&self) -> NodePage {
        self.0.locked_page()
    }

    /// Makes `page`, which is write-protected wherever it is mapped, the page of this node, and
    /// `item` the first place that maps it. `shared`: whether relatives of `vma` may map it, too.
    ///
    /// # Safety
    ///
    /// `page` is a small anonymous folio, mapped at `addr` in `vma`, and no page table maps it
    /// writable.
    pub(super) unsafe fn set_page(
        &self,
        page: &LockedPage,
        item: &mut ItemBox,
        vma: &MergeableVma<'_>,
        addr: usize,
        shared: bool,
    ) {
        self.0.set_kpfn(page.pfn());
        self.0.nid.set(page.nid());
        // SAFETY: no folio points at the node yet, so nobody looks at its list; the lock of the
        // folio that will is held. It is an anonymous one that `vma` maps, so its anon_vma is among those of
        // `vma`, which the mmap lock keeps.
        unsafe {
            // If others have the page by a fork, its own: they are all in that one's tree, and until they
            // are listed, rmap finds them by this item. If nobody has, ours, in whose tree are fewer.
            let anon_vma = if shared {
                ffi::rksm_folio_get_anon_vma(page.folio())
            } else {
                ffi::rksm_vma_get_anon_vma(vma.as_ptr())
            };
            self.0.link(&item.0, anon_vma, vma, addr);
        }
        // INVARIANT: published before the folio can point here.
        self.0.published.set(true);
        // SAFETY: the folio is locked, and write-protected by the caller's promise.
        unsafe {
            ffi::rksm_folio_set_ksm_node(page.folio(), (&raw const **self.0).cast_mut().cast());
            ffi::rksm_folio_keep_dirty(page.folio());
        }
    }

    /// Adds `item` to the places that map the node's page `page`.
    pub(crate) fn add_rmap_item(
        &self,
        page: &LockedPage,
        item: &mut ItemBox,
        vma: &MergeableVma<'_>,
        addr: usize,
    ) -> Result {
        if page.node_id() != self.id() || item.0.node().is_some() {
            return Err(EINVAL);
        }
        // SAFETY: `page` is this node's and its lock is held; the item is on no list. `vma` is stable under
        // the mmap lock its type stands for and has an anon_vma.
        unsafe {
            let anon_vma = ffi::rksm_vma_get_anon_vma(vma.as_ptr());
            self.0.link(&item.0, anon_vma, vma, addr);
        }
        Ok(())
    }

    /// Lets go of a page that keeps the node from being freed: an unmapped one (in the swap cache, or
    /// on its way to be freed) or, with `even_mapped`, any. Returns whether the node is stale
    /// afterwards; if not, the page is mapped, or locked by another task.
    ///
    /// Such a page stays a KSM page, but of no node: the next write or swap-in makes a copy, and until
    /// then it cannot be moved or swapped out, as nobody finds its mappings.
    pub(crate) fn clear_stable_node(&self, even_mapped: bool) -> bool {
        match self.0.locked_page() {
            NodePage::Gone => true,
            NodePage::Busy => false,
            NodePage::Locked(page) if page.is_mapped() && !even_mapped => false,
            NodePage::Locked(page) => {
                page.clear_node();
                true
            }
        }
    }

    /// Frees a node that no folio points at any more, and takes all items off it.
    ///
    /// Returns the node unchanged if a folio still points at it.
    pub(crate) fn release(self) -> Result<(), NodeBox> {
        if self.0.page().is_some() {
            return Err(self);
        }
        self.unlink_all();
        if self.0.published.replace(false) {
            trace::remove_ksm_page(self.0.kpfn());
        }
        Ok(())
    }

    /// Takes all items off a node that no folio points at.
    fn unlink_all(&self) {
        loop {
            // SAFETY: the member lies within the node, and with no folio pointing at it nobody else
            // looks at it.
            let first = unsafe { (*self.0.hlist()).first };
            if first.is_null() {
                break;
            }
            let entry = first
                .cast::<u8>()
                .wrapping_sub(KSM_RMAP_ITEM_HLIST)
                .cast::<RmapItem>();
            // SAFETY: Only `link` puts entries on the list, and they are items. An item that is on a
            // list is not freed (see `ItemBox::drop`).
            let item = unsafe { &*entry };
            // SAFETY: The event only shows what it is given. No folio points at the node, so nobody
            // else uses its list, and `item` is on it.
            unsafe {
                ffi::rksm_trace_remove_rmap_item(self.0.kpfn(), entry.cast(), item.mm());
                self.0.unlink(item);
            }
            // SAFETY: no precondition but being allowed to sleep.
            unsafe { ffi::rksm_cond_resched() };
        }
    }
}

impl Drop for NodeBox {
    fn drop(&mut self) {
        if self.0.page().is_some() {
            // A folio still points here. Freeing would be a use after free at its next rmap walk;
            // losing the memory is not.
            pr_err!("a stable node in use was dropped; its memory is lost\n");
            return;
        }
        self.unlink_all();
        // SAFETY: dropped here only, once, and no folio points at the node.
        unsafe { ManuallyDrop::drop(&mut self.0) };
    }
}
