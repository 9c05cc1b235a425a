// SPDX-License-Identifier: GPL-2.0

//! VMAs that may hold merged pages, and the pages in them.
//!
//! [`MergeableVma`] is the token for `mmap_lock`: every operation on a page of a process takes one. Operations
//! that merge are in [`super::replace`], those that unmerge in [`super::unshare`], walks in [`super::walk`].
//!
//! # Examples
//!
//! Going through the mergeable VMAs of an address space, under one hold of its lock:
//!
//! ```ignore
//! let lock = MmapLock::try_new(mm)?;
//! let (mut addr, mut left) = (0, HOLD_VMAS);
//! loop {
//!     match MergeableVma::next(&lock, addr, Which::Mergeable, &mut left) {
//!         Next::Vma(vma) => {
//!             scan(&vma);
//!             addr = vma.end();
//!         }
//!         // Release the lock, and continue at this address.
//!         Next::GoOn(addr) => break Some(addr),
//!         Next::None => break None,
//!     }
//! }
//! ```

use super::{ffi, mmap_lock::MmapLock};
use core::ptr::NonNull;
use kernel::{
    bindings,
    mm::{virt::VmaRef, Mm, MmWithUser},
};

/// A VMA that may hold merged pages, under `mmap_lock` held for reading.
///
/// It has an `anon_vma`, since a VMA without one has no anonymous pages, and most often `VM_MERGEABLE`, see
/// [`Which`]. The lock keeps its bounds, its flags and its `anon_vma` as they are. Page tables still change:
/// faults, reclaim, migration and the OOM reaper need no more than that lock for reading.
///
/// # Invariants
///
/// The VMA has an `anon_vma`, and the `mmap_lock` of `mm`, to which it belongs, is held for reading for `'a`.
#[derive(Clone, Copy)]
pub(crate) struct MergeableVma<'a> {
    vma: NonNull<bindings::vm_area_struct>,
    mm: &'a Mm,
    is_mergeable: bool,
}

/// The VMAs that a search is for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Which {
    /// VMAs with `VM_MERGEABLE`. Their pages may be merged.
    Mergeable,
    /// All VMAs that may hold KSM pages. `MADV_UNMERGEABLE` takes the flag away even if pages of the VMA
    /// could not be unshared, so a search for pages to unmerge needs these.
    MayBeMerged,
}

/// The most VMAs that are looked at under one hold of `mmap_lock`.
///
/// A process may have tens of thousands of VMAs of which none is mergeable, and writers of the lock wait.
pub(crate) const HOLD_VMAS: usize = 512;

/// The result of [`MergeableVma::next`].
pub(crate) enum Next<'a> {
    /// The first VMA of the kind that was asked for.
    Vma(MergeableVma<'a>),
    /// The budget is used up, and there is no such VMA before this address. Continue there.
    GoOn(usize),
    /// There is no such VMA up to the end of the address space.
    None,
}

/// Whether the caller is the last user of an address space.
///
/// It is torn down as soon as the caller drops its reference. So there is no point in working on it, least of all
/// in allocating memory for it.
pub(crate) fn has_no_other_users(mm: &MmWithUser) -> bool {
    // SAFETY: The reference keeps the mm.
    unsafe { ffi::rksm_mm_users(mm.as_raw()) <= 1 }
}

impl<'a> MergeableVma<'a> {
    /// Takes `vma`, if it is one of `which`.
    ///
    /// # Safety
    ///
    /// `vma` is a VMA of `mm`, whose `mmap_lock` is held for reading for `'a`.
    unsafe fn new(
        vma: NonNull<bindings::vm_area_struct>,
        mm: &'a Mm,
        which: Which,
    ) -> Option<Self> {
        // SAFETY: By the caller's promise `vma` is valid, and its flags are stable.
        let is_mergeable = unsafe { ffi::rksm_vma_mergeable(vma.as_ptr()) };
        let found = is_mergeable
            || which == Which::MayBeMerged
                // SAFETY: By the caller's promise `vma` is valid, and its flags and its anon_vma are stable.
                && unsafe { ffi::rksm_vma_may_be_merged(vma.as_ptr()) };
        // INVARIANT: Both tests include the anon_vma; the rest is the caller's promise.
        found.then_some(Self {
            vma,
            mm,
            is_mergeable,
        })
    }

    /// Returns the VMA that holds `addr`, if it has `VM_MERGEABLE`.
    pub(crate) fn at(lock: &'a MmapLock<'_>, addr: usize) -> Option<Self> {
        Self::find(lock, addr, Which::Mergeable)
    }

    /// Returns the VMA that holds `addr`, if it is one of `which`.
    pub(crate) fn find(lock: &'a MmapLock<'_>, addr: usize, which: Which) -> Option<Self> {
        let mm = lock.mm();
        // SAFETY: By its type, `lock` holds `mmap_lock` for reading, which is what the lookup needs.
        let vma = NonNull::new(unsafe { bindings::vma_lookup(mm.as_raw(), addr) })?;
        // SAFETY: The VMA was found under `lock`, which is held for 'a.
        unsafe { Self::new(vma, mm, which) }
    }

    /// Returns the first VMA of `which` that ends after `addr`.
    ///
    /// `left` is the number of VMAs that may still be looked at under this hold of the lock. It begins at
    /// [`HOLD_VMAS`], and each VMA counts, whether it is one of `which` or not.
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
            // SAFETY: By its type, `lock` holds `mmap_lock` for reading, which is what the lookup needs.
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

    /// Returns the VMA, which is valid as long as `self` is.
    pub(super) fn as_ptr(&self) -> *mut bindings::vm_area_struct {
        self.vma.as_ptr()
    }

    /// Returns the address space that the VMA belongs to.
    pub(crate) fn mm(&self) -> &'a Mm {
        self.mm
    }

    /// Whether the VMA has `VM_MERGEABLE`. If not, no page of it may be merged, but some may be from before.
    #[inline]
    pub(crate) fn is_mergeable(&self) -> bool {
        self.is_mergeable
    }

    /// Returns the first address of the VMA.
    #[inline]
    pub(crate) fn start(&self) -> usize {
        // SAFETY: The VMA is valid, and its lock held, by the type invariants.
        unsafe { VmaRef::from_raw(self.as_ptr()) }.start()
    }

    /// Returns the first address behind the VMA.
    #[inline]
    pub(crate) fn end(&self) -> usize {
        // SAFETY: The VMA is valid, and its lock held, by the type invariants.
        unsafe { VmaRef::from_raw(self.as_ptr()) }.end()
    }
}
