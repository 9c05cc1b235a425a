// SPDX-License-Identifier: GPL-2.0

//! One page-table entry under its lock, and the MMU notifier around changes to it.

use super::{ffi, folio::PageRef, vma::MergeableVma};
use core::{marker::PhantomData, mem::MaybeUninit, ptr};
use kernel::{
    bindings,
    mm::MmWithUser,
    page::PAGE_SIZE,
    types::{NotThreadSafe, Opaque},
};

/// An open MMU notifier section over one page: secondary MMUs (KVM) have dropped the page and do
/// not look it up again before this is dropped. May sleep; opened before the page-table lock is
/// taken.
pub(super) struct NotifierRange<'a> {
    range: Opaque<ffi::mmu_notifier_range>,
    _mm: PhantomData<&'a MmWithUser>,
    _nts: NotThreadSafe,
}

impl<'a> NotifierRange<'a> {
    pub(super) fn start(mm: &'a MmWithUser, addr: usize) -> Self {
        // The kernel fills in the range and keeps no pointer to it, so it may move afterwards.
        let mut range = MaybeUninit::<ffi::mmu_notifier_range>::uninit();
        // SAFETY: writes all of `range`; the mm has users by its type.
        let range = unsafe {
            ffi::rksm_notify_start(
                range.as_mut_ptr(),
                mm.as_raw(),
                addr,
                addr.saturating_add(PAGE_SIZE),
            );
            range.assume_init()
        };
        Self {
            range: Opaque::new(range),
            _mm: PhantomData,
            _nts: NotThreadSafe,
        }
    }
}

impl Drop for NotifierRange<'_> {
    fn drop(&mut self) {
        // SAFETY: started in `start`, ended here once.
        unsafe { ffi::rksm_notify_end(self.range.get()) };
    }
}

/// The page-table entry of an address, with the page-table lock held.
///
/// # Invariants
///
/// `pte` is mapped and `ptl` is its lock, held by this object.
pub(super) struct PteLock<'a> {
    vma: &'a MergeableVma<'a>,
    addr: usize,
    pte: *mut bindings::pte_t,
    ptl: *mut bindings::spinlock_t,
    _nts: NotThreadSafe,
}

impl<'a> PteLock<'a> {
    /// Locks the entry of `addr`, unless there is no page table for it or a huge page is mapped.
    pub(super) fn new(vma: &'a MergeableVma<'a>, addr: usize) -> Option<Self> {
        let mut ptl = ptr::null_mut();
        // SAFETY: `mmap_lock` is held by the type invariant of `vma`, so page tables are not freed.
        let pte = unsafe { ffi::rksm_pte_lock_addr(vma.mm().as_raw(), addr, &mut ptl) };
        // INVARIANT: mapped and locked when not null.
        (!pte.is_null()).then_some(Self {
            vma,
            addr,
            pte,
            ptl,
            _nts: NotThreadSafe,
        })
    }

    pub(super) fn get(&self) -> bindings::pte_t {
        // SAFETY: the entry is mapped by the type invariant.
        unsafe { ffi::rksm_ptep_get(self.pte) }
    }

    /// Whether `entry` maps `page`.
    pub(super) fn maps(&self, entry: bindings::pte_t, page: &PageRef) -> bool {
        // SAFETY: looks at a value, then at the VMA, which is stable by its type.
        unsafe {
            ffi::rksm_pte_present(entry)
                && ffi::rksm_normal_page(self.vma.as_ptr(), self.addr, entry) == page.as_ptr()
        }
    }

    pub(super) fn is_dirty(&self, entry: bindings::pte_t) -> bool {
        // SAFETY: looks at a value only.
        unsafe { ffi::rksm_pte_dirty(entry) }
    }

    /// Clears the entry, flushes it from all TLBs, and returns what it was.
    pub(super) fn clear_flush(&mut self) -> bindings::pte_t {
        // SAFETY: mapped and locked by the type invariant.
        unsafe { ffi::rksm_ptep_clear_flush(self.vma.as_ptr(), self.addr, self.pte) }
    }

    /// Sets the entry, which was cleared before.
    pub(super) fn set(&mut self, entry: bindings::pte_t) {
        // SAFETY: mapped and locked by the type invariant.
        unsafe { ffi::rksm_set_pte(self.vma.mm().as_raw(), self.addr, self.pte, entry) };
    }
}

impl Drop for PteLock<'_> {
    fn drop(&mut self) {
        // SAFETY: mapped and locked by the type invariant.
        unsafe { ffi::rksm_pte_unlock(self.pte, self.ptl) };
    }
}
