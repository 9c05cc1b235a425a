// SPDX-License-Identifier: GPL-2.0

//! Stable nodes and rmap items, in the layout that the core kernel walks.
//!
//! A merged page is a KSM folio whose `mapping` points at a [`NodeBox`]'s memory. The node's `hlist` holds one
//! [`ItemBox`] for each mapping of the page that the engine knows. `rmap_walk_ksm()`, `collect_procs_ksm()` and
//! `folio_migrate_ksm()` read both, under the folio lock. So:
//!
//! * The `hlist` of a node changes only under the lock of its folio, or when no folio points at the node.
//! * A node is freed only when no folio points at it.
//! * A node holds no reference on its folio, or the folio could never be freed. It is stale once the folio at
//!   `kpfn` no longer points back at it. Migration updates `kpfn` under the folio lock.
//!
//! The life of a node:
//!
//! ```text
//! NodeBox::new()                 no folio points at it
//!   make_ksm_page()              a folio points at it; one item
//!     replace_page()             one more item for each further mapping
//!     ItemBox::detach()          one item less, under the folio lock
//!   the last mapping goes        the kernel frees the folio: the node is stale
//! NodeBox::release()             takes off the items that are left, and frees it
//! ```
//!
//! All nodes and items of an engine are used under that engine's mutex only. Neither type is
//! `Sync`, which keeps them there.
//!
//! # Counterparts in mm/ksm.c
//!
//! | here | there | difference |
//! | --- | --- | --- |
//! | [`NodeBox::page`] | `ksm_get_folio()` | a stale node stays, and the caller releases it |
//! | [`NodeBox::locked_page`] | the same, `KSM_GET_FOLIO_TRYLOCK` | as above; no function waits for the lock |
//! | `NodeBox::set_page` | `stable_tree_insert()` | it makes the folio a KSM folio, and lists the first item |
//! | [`NodeBox::add_rmap_item`] | `stable_tree_append()` | the caller checks the limit of mappings |
//! | [`ItemBox::detach`] | `remove_rmap_item_from_tree()` | it does nothing if the folio is locked |
//! | [`NodeBox::clear_stable_node`] | `remove_stable_node()` | the node is not freed yet |
//! | [`NodeBox::release`] | `remove_node_from_stable_tree()` | it refuses a node that is not stale |
//!
//! The engine finds nodes by their keys ([`StableKey`]), so a node has no tree links. There are no chains either:
//! several nodes may have the same content, and their keys differ in the serial number.

use super::{
    ffi,
    folio::{node_id_of, LockedPage, NodeId, PageRef},
    rmap_item::{ItemBox, RmapItem, WORD},
    stable_key::StableKey,
    trace,
    vma::MergeableVma,
};
use crate::{abi::layout::*, hash::Sample};
use core::{
    cell::{Cell, UnsafeCell},
    mem::{align_of, size_of, ManuallyDrop},
    ptr::{self, NonNull},
    sync::atomic::{fence, Ordering},
};
use kernel::{alloc::Flags, bindings, prelude::*};

/// The size of `struct ksm_stable_node`, in words.
const NODE_WORDS: usize = KSM_STABLE_NODE_SIZE.div_ceil(WORD);

// The generated offsets must make sense for the types that are accessed through them. The low bits of a node's
// address must be free for the flags in `folio->mapping`.
const _: () = {
    assert!(KSM_STABLE_NODE_HLIST + size_of::<bindings::hlist_head>() <= KSM_STABLE_NODE_SIZE);
    assert!(KSM_STABLE_NODE_KPFN + size_of::<usize>() <= KSM_STABLE_NODE_SIZE);
    assert!(KSM_STABLE_NODE_HLIST % WORD == 0 && KSM_STABLE_NODE_KPFN % WORD == 0);
    assert!(align_of::<StableNode>() >= 8);
};

/// A stable node: `struct ksm_stable_node`.
///
/// The core kernel uses only `hlist` and `kpfn` of it. The part that only the engine knows stands where in-tree
/// KSM has its tree links. The offsets of the members come from the BTF of the kernel.
///
/// # Invariants
///
/// The memory begins with the part that only the engine knows. `hlist` is a list of [`ItemBox`]es.
#[repr(C, align(8))]
pub(super) struct StableNode {
    abi: UnsafeCell<[u64; NODE_WORDS]>,
}

/// The part of a node that only the engine knows. It is used under the engine's mutex.
pub(super) struct NodePrivate {
    pub(super) key: Cell<StableKey>,
    /// How many rmap items are on `hlist`.
    pub(super) items: Cell<usize>,
    /// Whether a folio may point at this node. If not, `kpfn` means nothing.
    published: Cell<bool>,
    /// Whether a page with the same sample had other content, so that the sample alone says nothing.
    ambiguous: Cell<bool>,
    /// Whether the page is known to be on another NUMA node than the key says.
    nid_changed: Cell<bool>,
    /// The NUMA node that the page was on when it was looked at last.
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
        // SAFETY: By the type invariant it stands at the start, where there is room for it before the members
        // that the core kernel uses (checked above). It is changed through cells only.
        unsafe { &*self.abi.get().cast() }
    }
}

impl StableNode {
    /// Returns a pointer to the member at `offset` of the part that the core kernel knows.
    fn member<T>(&self, offset: usize) -> *mut T {
        self.abi.get().cast::<u8>().wrapping_add(offset).cast()
    }

    /// Returns the head of the list of items. The lock of the folio protects it, see the module's documentation.
    fn hlist(&self) -> *mut bindings::hlist_head {
        self.member(KSM_STABLE_NODE_HLIST)
    }

    /// Reads the page frame number of the node's folio, which migration may change at any time.
    fn kpfn(&self) -> usize {
        // SAFETY: The member lies within `abi` (checked above). `folio_migrate_ksm()` may write it at the same
        // time, as one word.
        unsafe { self.member::<usize>(KSM_STABLE_NODE_KPFN).read_volatile() }
    }

    /// Sets the page frame number, before a folio points at the node.
    fn set_kpfn(&self, pfn: usize) {
        // SAFETY: The member lies within `abi` (checked above), and is one aligned word.
        unsafe {
            self.member::<usize>(KSM_STABLE_NODE_KPFN)
                .write_volatile(pfn)
        }
    }

    /// Returns the address of the node, which is its identity.
    fn as_addr(&self) -> usize {
        ptr::from_ref(self) as usize
    }

    /// Whether `folio` points at this node. The answer holds while the folio is locked.
    ///
    /// # Safety
    ///
    /// `folio` is in the memory map. It need not be referenced.
    unsafe fn is_node_of(&self, folio: *mut bindings::folio) -> bool {
        // SAFETY: The memory map can be read without a reference. The answer may be outdated.
        unsafe { node_id_of(folio) }.is_some_and(|id| id.get() == self.as_addr())
    }

    /// Returns the node's page with a reference, or `None` if the node is stale.
    ///
    /// The node has no reference of its own, so the folio may be freed, and used for something else, at any time
    /// until this takes one. The order of the checks is that of `ksm_get_folio()` in mm/ksm.c, and so are the
    /// reasons. Does not sleep.
    ///
    /// Spins while migration has the count of a folio in the swap cache frozen.
    fn page(&self) -> Option<PageRef> {
        if !self.published.get() {
            return None;
        }
        loop {
            let kpfn = self.kpfn();
            // SAFETY: The call returns null for a pfn that is not in an online section. The lock of memory
            // hotplug is not needed to keep the section: before the kernel takes one away, it calls
            // `crate::sys::memory_notifier`. That waits for the engine to free the nodes there, under the mutex
            // that our caller holds.
            let folio = unsafe { ffi::rksm_pfn_folio(kpfn) };
            if let Some(folio) = NonNull::new(folio) {
                // SAFETY: The folio of an online pfn is in the memory map, and stays there as said above.
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

    /// Takes a reference on `folio`, if it is the one of this node.
    ///
    /// # Safety
    ///
    /// `folio` is in the memory map.
    unsafe fn try_get(&self, folio: *mut bindings::folio) -> Option<PageRef> {
        // SAFETY: By the caller's promise `folio` is in the memory map.
        if !unsafe { self.is_node_of(folio) } {
            return None;
        }
        // SAFETY: By the caller's promise `folio` is in the memory map. If it is free, this fails.
        while !unsafe { ffi::rksm_folio_try_get(folio) } {
            // The count is zero: free or about to be, or frozen for a moment by migration, which
            // only happens to a folio in the swap cache.
            // SAFETY: By the caller's promise `folio` is in the memory map.
            if !unsafe { ffi::rksm_folio_test_swapcache(folio) } {
                return None;
            }
            core::hint::spin_loop();
        }
        // SAFETY: A KSM folio is small, so the folio is its only page, and it is not null. `from_raw` takes over
        // the reference that was taken above.
        let page = unsafe { PageRef::from_raw(NonNull::new_unchecked(folio.cast())) };
        // SAFETY: `page` keeps the folio, so it is in the memory map.
        unsafe { self.is_node_of(folio) }.then_some(page)
    }

    /// Returns the node's page, locked. Under that lock the folio cannot leave the node.
    ///
    /// Only tries the lock, and does not sleep.
    pub(super) fn locked_page(&self) -> NodePage {
        loop {
            let Some(page) = self.page() else {
                return NodePage::Gone;
            };
            let Ok(page) = page.try_lock() else {
                return NodePage::Busy;
            };
            if page.node_id().is_some_and(|id| id.get() == self.as_addr()) {
                return NodePage::Locked(page);
            }
            // The folio was migrated before it was locked, or it is gone: look again.
        }
    }

    /// Takes `item` off the node's list, and drops its reference on the anon_vma.
    ///
    /// # Safety
    ///
    /// The caller holds the lock of this node's folio, or no folio points at the node any more.
    /// `item` is on this node's list.
    pub(super) unsafe fn unlink(&self, item: &RmapItem) {
        // SAFETY: By the caller's promise the item is on our list, and no rmap walk looks at that.
        unsafe { ffi::rksm_hlist_del(item.hlist()) };
        // SAFETY: `link` stored the anon_vma together with a reference, which is dropped here, once. The
        // registration keeps the mm until all its items are dropped, and only the engine writes the counter.
        unsafe {
            ffi::rksm_put_anon_vma(item.anon_vma());
            ffi::rksm_mm_add_merging(item.mm(), -1);
        }
        item.set_node(ptr::null());
        self.items.set(self.items.get().saturating_sub(1));
    }

    /// Puts `item` on the node's list, as the mapping of the page at `addr` in `vma`.
    ///
    /// Writes all that an rmap walk reads of the item before the item is on the list. The page index is that of
    /// `addr` now. It stays right, since the kernel unmerges pages before `mremap()` moves them.
    ///
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
        // SAFETY: The members lie within the item (checked in its module), and no rmap walk reads them before
        // the item is on the list. By its type, `vma` is stable and its mm is kept. The item is on no list, and
        // the caller's lock protects this one. Only the engine writes the counter of the mm.
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
        item.set_node(ptr::from_ref(self).cast());
        self.items.set(self.items.get().saturating_add(1));
    }
}

impl LockedPage {
    /// Returns the key of the stable node that this page belongs to.
    ///
    /// This needs the folio lock: without it, the node could be freed before it is read.
    pub(crate) fn node_key(&self) -> Option<StableKey> {
        let id = self.node_id()?;
        // SAFETY: The folio is locked and points at the node, so the node is not freed. It is one of this module:
        // no in-tree node exists while the module is loaded, see [`crate::intree`].
        let node = unsafe { &*(id.get() as *const StableNode) };
        Some(node.key.get())
    }
}

impl RmapItem {
    /// Returns the key of `node`, and how many mappings are listed with it, if the item is one of them.
    pub(crate) fn listed_with(&self, node: NodeId) -> Option<(StableKey, usize)> {
        let node = self.node().filter(|_| self.node_id() == Some(node))?;
        Some((node.key.get(), node.items.get()))
    }

    /// Returns the node that the item is listed with.
    fn node(&self) -> Option<&StableNode> {
        let id = self.node_id()?;
        // SAFETY: `link` and `unlink` note the node while the item is on its list, and a node is not freed before
        // it took off all its items.
        Some(unsafe { &*(id.get() as *const StableNode) })
    }
}

/// The result of [`ItemBox::detach`].
pub(crate) enum Unlinked {
    /// The item was on no list.
    NotLinked,
    /// The item was taken off the list of the node with this key, which has this many items left.
    Done(StableKey, usize),
    /// Nothing was done: the node with this key is stale. Release it, which takes off all its items.
    StaleNode(StableKey),
    /// Nothing was done: another task has the page locked. Try again later.
    Busy,
}

impl ItemBox {
    /// Returns how many mappings of the page are listed with the item's node; 0 if it is on no list.
    pub(crate) fn mappings(&self) -> usize {
        self.0.node().map_or(0, |node| node.items.get())
    }

    /// Takes the item off the list of its node.
    ///
    /// That needs the lock of the node's folio, which this only tries. Does not sleep.
    pub(crate) fn detach(&mut self) -> Unlinked {
        let Some(node) = self.0.node() else {
            return Unlinked::NotLinked;
        };
        let key = node.key.get();
        match node.locked_page() {
            NodePage::Gone => Unlinked::StaleNode(key),
            NodePage::Busy => Unlinked::Busy,
            NodePage::Locked(_page) => {
                // SAFETY: `_page` is the node's page, and locked until the end of this block. By the type
                // invariant the item is on the node's list.
                unsafe { node.unlink(&self.0) };
                Unlinked::Done(key, node.items.get())
            }
        }
    }
}

/// The page of a node, if it can be locked.
pub(crate) enum NodePage {
    /// No page belongs to the node any more: it is stale.
    Gone,
    /// Another task has the page locked. Try again later.
    Busy,
    /// The page is locked, and so stays the page of the node.
    Locked(LockedPage),
}

/// An owned stable node.
///
/// The memory must not be freed while a folio points at it. So [`Self::release`] is the way to free a node: it
/// fails if the folio is still there. A drop in that case leaks the memory, and says so in the kernel log.
///
/// # Invariants
///
/// A folio points at the node only while the node is `published`.
pub(crate) struct NodeBox(ManuallyDrop<KBox<StableNode>>);

// SAFETY: A node is used under the engine's mutex only, by the task that holds it. The folio lock protects what
// the core kernel reads of it.
unsafe impl Send for NodeBox {}

impl NodeBox {
    /// The memory that a node takes, in bytes.
    pub(crate) const SIZE: usize = size_of::<StableNode>();

    /// Makes a node that no page belongs to yet.
    ///
    /// # Errors
    ///
    /// `ENOMEM` if there is no memory.
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
        // SAFETY: There is room for it at the start of `abi`, which is aligned for it (checked above).
        unsafe { node.abi.get().cast::<NodePrivate>().write(own) };
        Ok(Self(ManuallyDrop::new(KBox::new(node, flags)?)))
    }

    /// Returns the identity that the node's page shows.
    pub(crate) fn id(&self) -> Option<NodeId> {
        NodeId::new(self.0.as_addr())
    }

    /// Sets the key under which the node is in the index. The caller keeps both the same.
    pub(crate) fn set_key(&self, key: StableKey) {
        self.0.key.set(key);
    }

    /// Whether other content is known that has the same sample as the page.
    pub(crate) fn is_ambiguous(&self) -> bool {
        self.0.ambiguous.get()
    }

    /// Notes that there is other content with the same sample.
    pub(crate) fn set_ambiguous(&self) {
        self.0.ambiguous.set(true);
    }

    /// Notes that the page is on another NUMA node than the key says.
    pub(crate) fn set_nid_changed(&self) {
        self.0.nid_changed.set(true);
    }

    /// Whether the page was migrated to another NUMA node since the last call, or since
    /// [`Self::set_nid_changed`].
    pub(crate) fn take_nid_changed(&self) -> bool {
        // SAFETY: The call returns -1 for a pfn that is not in an online section.
        let node = unsafe { ffi::rksm_pfn_nid(self.0.kpfn()) };
        let nid_changed = self.0.nid_changed.take();
        match u32::try_from(node) {
            Ok(node) => self.0.nid.replace(node) != node || nid_changed,
            Err(_) => nid_changed,
        }
    }

    /// Sets the sample in each of the node's items, and calls `changed` with each former one that differs.
    ///
    /// An item keeps the sample of its page, as it outlives the node. The filter counts samples, so the caller
    /// has to count them anew.
    pub(crate) fn set_samples(&self, sample: Sample, mut changed: impl FnMut(Sample)) {
        // SAFETY: The member lies within the node (checked above). Only the engine changes the list, under the
        // mutex that the caller holds; the core kernel only reads it.
        let mut next = unsafe { (*self.0.hlist()).first };
        while !next.is_null() {
            let item = next
                .cast::<u8>()
                .wrapping_sub(KSM_RMAP_ITEM_HLIST)
                .cast::<RmapItem>();
            // SAFETY: Only `link` puts entries on the list, and they are items. An item on a list is not freed
            // (see `ItemBox::drop`).
            let item = unsafe { &*item };
            if item.sample() != sample {
                changed(item.sample());
                item.set_sample(sample);
            }
            // SAFETY: `next` is the list entry of an item on the list, which is not freed.
            next = unsafe { (*next).next };
        }
    }

    /// Returns how many mappings of the page are listed.
    pub(crate) fn items(&self) -> usize {
        self.0.items.get()
    }

    /// Returns the node's page, with a reference, or `None` if the node is stale. Does not sleep.
    pub(crate) fn page(&self) -> Option<PageRef> {
        self.0.page()
    }

    /// Returns the node's page, locked, if no other task has it locked. Does not sleep.
    pub(crate) fn locked_page(&self) -> NodePage {
        self.0.locked_page()
    }

    /// Makes `page` the KSM page of this node, and `item` its first listed mapping.
    ///
    /// `shared` says whether other processes may map the page by a fork. The item is listed before the folio
    /// points at the node, so an rmap walk never finds an empty list.
    ///
    /// # Safety
    ///
    /// `page` is a small anonymous folio, mapped at `addr` in `vma`, and no page table maps it
    /// writable. No folio points at this node, and `item` is on no list.
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
        // SAFETY: The folio is locked, mapped and anonymous, and `vma` maps it. So its anon_vma is among those of
        // `vma`, which `mmap_lock` keeps, and a reference can be taken on either. No folio points at the node
        // yet, so no rmap walk looks at its list, and the lock of the folio that will is held.
        unsafe {
            // A page that is shared over a fork needs its own anon_vma, whose tree has the VMAs of all its
            // mappers. Until these are listed, rmap finds them by this item. Otherwise take the anon_vma of the
            // VMA, whose tree has fewer VMAs.
            let anon_vma = if shared {
                ffi::rksm_folio_get_anon_vma(page.folio())
            } else {
                ffi::rksm_vma_get_anon_vma(vma.as_ptr())
            };
            self.0.link(&item.0, anon_vma, vma, addr);
        }
        // INVARIANT: The flag is set before the folio points here.
        self.0.published.set(true);
        // SAFETY: The folio is locked and kept. By the caller's promise it is small, anonymous, and mapped
        // writable nowhere, so it can become a KSM folio. The node stays where it is until no folio points
        // at it.
        unsafe {
            ffi::rksm_folio_set_ksm_node(page.folio(), (&raw const **self.0).cast_mut().cast());
            ffi::rksm_folio_keep_dirty(page.folio());
        }
    }

    /// Lists `item` as a mapping of the node's page `page`, at `addr` in `vma`.
    ///
    /// There is no limit: a mapping that a child inherited exists, and must be listed in any case. The caller
    /// checks [`Self::items`] before it makes a new mapping. Whether the page is mapped at `addr` is not checked.
    ///
    /// # Errors
    ///
    /// `EINVAL` if `page` is not the page of this node, or `item` is on a list.
    pub(crate) fn add_rmap_item(
        &self,
        page: &LockedPage,
        item: &mut ItemBox,
        vma: &MergeableVma<'_>,
        addr: usize,
    ) -> Result {
        if page.node_id() != self.id() || item.0.node_id().is_some() {
            return Err(EINVAL);
        }
        // SAFETY: By its type, `vma` is stable and has an anon_vma, on which the first call takes a reference
        // that `link` takes over. `page` is the page of this node, and locked. The item is on no list.
        unsafe {
            let anon_vma = ffi::rksm_vma_get_anon_vma(vma.as_ptr());
            self.0.link(&item.0, anon_vma, vma, addr);
        }
        Ok(())
    }

    /// Takes the node off its page, so that the node can be freed.
    ///
    /// The page must be mapped nowhere, as one in the swap cache or about to be freed; with `even_mapped`, it
    /// may be any. Returns whether the node is stale afterwards. If not, the page is mapped, or another task
    /// has it locked.
    ///
    /// The page stays a KSM page, see [`LockedPage::clear_node`]. The next write or swap-in makes a copy.
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

    /// Frees a node that no folio points at any more, and takes all items off its list.
    ///
    /// May sleep, as the list may be long.
    ///
    /// # Errors
    ///
    /// Returns the node, unchanged, if a folio still points at it.
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

    /// Takes all items off the list of a node that no folio points at.
    fn unlink_all(&self) {
        loop {
            // SAFETY: The member lies within the node (checked above). No folio points at the node, so no rmap
            // walk looks at it.
            let first = unsafe { (*self.0.hlist()).first };
            if first.is_null() {
                break;
            }
            let entry = first
                .cast::<u8>()
                .wrapping_sub(KSM_RMAP_ITEM_HLIST)
                .cast::<RmapItem>();
            // SAFETY: Only `link` puts entries on the list, and they are items. An item on a list is not freed
            // (see `ItemBox::drop`).
            let item = unsafe { &*entry };
            // SAFETY: The event only shows the addresses that it is given. No folio points at the node, and
            // `item` is on its list.
            unsafe {
                ffi::rksm_trace_remove_rmap_item(self.0.kpfn(), entry.cast(), item.mm());
                self.0.unlink(item);
            }
            // SAFETY: The caller holds no spinlock.
            unsafe { ffi::rksm_cond_resched() };
        }
    }
}

impl Drop for NodeBox {
    fn drop(&mut self) {
        if self.0.page().is_some() {
            // A folio still points here. Its next rmap walk would use the memory after it was freed, so leak it.
            pr_err!("a stable node in use was dropped; its memory is lost\n");
            return;
        }
        self.unlink_all();
        // SAFETY: The box is dropped here only, once, and no folio points at the node.
        unsafe { ManuallyDrop::drop(&mut self.0) };
    }
}
