// SPDX-License-Identifier: GPL-2.0

//! VMAs that may hold merged pages, and the pages in them.

use super::{
    ffi,
    folio::PageRef,
    mmap_lock::MmapLock,
    pte::{self, PteLock},
    stable_node::NodeId,
    walk,
};
use core::ptr::NonNull;
use kernel::{
    bindings,
    mm::{virt::VmaRef, Mm, MmWithUser},
};

/// A VMA that may hold merged pages, under `mmap_lock` held for reading: it has an `anon_vma`, and most
/// often `VM_MERGEABLE`, see [`Which`].
///
/// # Invariants
///
/// The VMA has an `anon_vma`, and the `mmap_lock` of `mm`, to which it belongs, is held for reading for
/// `'a`. (So neither its bounds, its flags nor its `anon_vma` change.)
#[derive(Clone, Copy)]
pub(crate) struct MergeableVma<'a> {
    vma: NonNull<bindings::vm_area_struct>,
    mm: &'a Mm,
    is_mergeable: bool,
}

/// Which VMAs to look at.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Which {
    /// Those with `VM_MERGEABLE`.
    Mergeable,
    /// All that may hold KSM pages. `MADV_UNMERGEABLE` takes the flag away even if pages of the VMA could
    /// not be unshared.
    MayBeMerged,
}

/// The most VMAs that are looked at under one hold of `mmap_lock`, as none of them may be mergeable.
pub(crate) const HOLD_VMAS: usize = 512;

/// What [`MergeableVma::next`] found.
pub(crate) enum Next<'a> {
    /// A mergeable VMA.
    Vma(MergeableVma<'a>),
    /// None up to this address; how it is behind that was not looked at.
    GoOn(usize),
    /// None at all.
    None,
}

/// Whether nothing but the caller's reference keeps an address space. It is about to be torn down, so there
/// is no point in doing anything to it, least of all in allocating memory for it.
pub(crate) fn has_no_other_users(mm: &MmWithUser) -> bool {
    // SAFETY: the mm is kept.
    unsafe { ffi::rksm_mm_users(mm.as_raw()) <= 1 }
}

impl<'a> MergeableVma<'a> {
    /// # Safety
    ///
    /// `vma` is a VMA of `mm`, whose `mmap_lock` is held for reading for `'a`.
    unsafe fn new(
        vma: NonNull<bindings::vm_area_struct>,
        mm: &'a Mm,
        which: Which,
    ) -> Option<Self> {
        // SAFETY: `vma` is valid and its flags are stable, as `mmap_lock` is held.
        let is_mergeable = unsafe { ffi::rksm_vma_mergeable(vma.as_ptr()) };
        let found = is_mergeable
            || which == Which::MayBeMerged
                // SAFETY: As for the flags above: `mmap_lock` is held.
                && unsafe { ffi::rksm_vma_may_be_merged(vma.as_ptr()) };
        // INVARIANT: Both tests include the anon_vma; the rest is the caller's promise.
        found.then_some(Self {
            vma,
            mm,
            is_mergeable,
        })
    }

    /// The mergeable VMA that holds `addr`.
    pub(crate) fn at(lock: &'a MmapLock<'_>, addr: usize) -> Option<Self> {
        Self::find(lock, addr, Which::Mergeable)
    }

    /// The VMA that holds `addr`, if it is one of these.
    pub(crate) fn find(lock: &'a MmapLock<'_>, addr: usize, which: Which) -> Option<Self> {
        let mm = lock.mm();
        // SAFETY: `mmap_lock` is held for reading by the type of `lock`.
        let vma = NonNull::new(unsafe { bindings::vma_lookup(mm.as_raw(), addr) })?;
        // SAFETY: The VMA was found under `lock`, which is held for 'a.
        unsafe { Self::new(vma, mm, which) }
    }

    /// The first of these VMAs that ends after `addr`. `left` is how many VMAs may still be looked at under
    /// this hold of the lock, at first [`HOLD_VMAS`].
    pub(crate) fn next(
        lock: &'a MmapLock<'_>,
        addr: usize,
        which: Which,
        left: &mut usize,
    ) -> Next<'a> {
        let mm = lock.mm();
        let mut from = addr;
        while *left != 0 {
            *left = left.wrapping_sub(1);
            // SAFETY: `mmap_lock` is held for reading by the type of `lock`.
            let Some(vma) = NonNull::new(unsafe { bindings::find_vma(mm.as_raw(), from) }) else {
                return Next::None;
            };
            // SAFETY: The VMA was found under `lock`, which is held for 'a.
            if let Some(found) = unsafe { Self::new(vma, mm, which) } {
                return Next::Vma(found);
            }
            // SAFETY: The VMA is valid while `lock` is held.
            from = unsafe { VmaRef::from_raw(vma.as_ptr()) }.end();
        }
        Next::GoOn(from)
    }

    pub(super) fn as_ptr(&self) -> *mut bindings::vm_area_struct {
        self.vma.as_ptr()
    }

    /// The address space.
    pub(crate) fn mm(&self) -> &'a Mm {
        self.mm
    }

    /// Whether it has `VM_MERGEABLE`. If not, nothing of it may be merged, but it may have merged pages.
    #[inline]
    pub(crate) fn is_mergeable(&self) -> bool {
        self.is_mergeable
    }

    /// The first address.
    #[inline]
    pub(crate) fn start(&self) -> usize {
        // SAFETY: The VMA is valid, and its lock held, by the type invariants.
        unsafe { VmaRef::from_raw(self.as_ptr()) }.start()
    }

    /// The first address behind it.
    #[inline]
    pub(crate) fn end(&self) -> usize {
        // SAFETY: The VMA is valid, and its lock held, by the type invariants.
        unsafe { VmaRef::from_raw(self.as_ptr()) }.end()
    }

    /// Whether the page at `addr` is a KSM page of this node, also while it is being migrated.
    pub(crate) fn maps(&self, addr: usize, node: NodeId) -> bool {
        PteLock::new(self, addr).is_some_and(|pte| pte.node_id() == Some(node))
    }

    /// The anonymous page at `addr`, with a reference.
    pub(crate) fn page_at(&self, addr: usize) -> Option<PageRef> {
        match PteLock::new(self, addr) {
            Some(pte) => pte.anon_page(),
            // No page table: there may be a huge page.
            None => walk::page_at(self, addr),
        }
    }

    /// Whether `page` is mapped at `addr`, without a userfaultfd mark that forbids to merge it.
    ///
    /// A hint, for what is to be known before a step that cannot be undone.
    pub(crate) fn maps_unmarked(&self, addr: usize, page: &PageRef) -> bool {
        pte::maps_unmarked(self, addr, page)
    }
}
