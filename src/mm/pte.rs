// SPDX-License-Identifier: GPL-2.0

//! One page-table entry under its lock, and the MMU notifier around changes to it.

use super::{
    ffi,
    folio::{node_id_of, PageRef},
    stable_node::NodeId,
    vma::MergeableVma,
    walk::PMD_SIZE,
};
use core::{
    marker::PhantomData,
    mem::MaybeUninit,
    ptr::{self, NonNull},
};
use kernel::{
    bindings,
    mm::Mm,
    page::PAGE_SIZE,
    prelude::*,
    types::{NotThreadSafe, Opaque},
};

/// An open MMU notifier section over one page: secondary MMUs (KVM) have dropped the page and do
/// not look it up again before this is dropped. May sleep; opened before the page-table lock is
/// taken.
pub(super) struct NotifierRange<'a> {
    range: Opaque<ffi::mmu_notifier_range>,
    _mm: PhantomData<&'a Mm>,
    _nts: NotThreadSafe,
}

impl<'a> NotifierRange<'a> {
    pub(super) fn start(mm: &'a Mm, addr: usize) -> Self {
        // The kernel fills in the range and keeps no pointer to it, so it may move afterwards.
        let mut range = MaybeUninit::<ffi::mmu_notifier_range>::uninit();
        // SAFETY: Writes all of `range`. The mm, and with it its list of notifiers, is kept by the reference;
        // without users the notifiers may have been released, which leaves none to call, as for the OOM
        // reaper.
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
        // SAFETY: `mmap_lock` is held by the type invariant of `vma`, so the tables above page tables are
        // not freed. Of the page table itself the callee makes sure, as the kernel frees empty ones under
        // the same kind of lock (CONFIG_PT_RECLAIM).
        let pte = unsafe { ffi::rksm_pte_lock_addr(vma.mm().as_raw(), addr, &mut ptl) };
        if pte.is_null() {
            // Never make a `Self` here: dropping it would unlock what is not locked.
            return None;
        }
        // INVARIANT: mapped and locked, as it is not null.
        Some(Self {
            vma,
            addr,
            pte,
            ptl,
            _nts: NotThreadSafe,
        })
    }

    fn get(&self) -> bindings::pte_t {
        // SAFETY: the entry is mapped by the type invariant.
        unsafe { ffi::rksm_ptep_get(self.pte) }
    }

    /// The page that `entry` maps, if it is one that the kernel accounts for.
    fn normal_page(&self, entry: bindings::pte_t) -> *mut bindings::page {
        // SAFETY: looks at a value, then at the VMA, which is stable by its type.
        unsafe {
            if ffi::rksm_pte_present(entry) {
                ffi::rksm_normal_page(self.vma.as_ptr(), self.addr, entry)
            } else {
                ptr::null_mut()
            }
        }
    }

    /// The anonymous page that is mapped, with a reference.
    pub(super) fn anon_page(&self) -> Option<PageRef> {
        let page = NonNull::new(self.normal_page(self.get()))?;
        // SAFETY: the page is kept by its mapping while the lock is held, so its folio's count is
        // not zero.
        unsafe {
            let folio = ffi::rksm_page_folio(page.as_ptr());
            // Broken memory must not be read, and that of KSM pages is not.
            if !ffi::rksm_folio_test_ksm(folio)
                && (!ffi::rksm_folio_test_plain_anon(folio)
                    || ffi::rksm_page_test_hwpoison(page.as_ptr()))
            {
                return None;
            }
            ffi::rksm_folio_get(folio);
            Some(PageRef::from_raw(page))
        }
    }

    /// The node of the KSM page that is mapped, or that was and is being migrated.
    pub(super) fn node_id(&self) -> Option<NodeId> {
        let entry = self.get();
        // SAFETY: Looks at a value. The page is kept by its mapping, under the lock; the folio of a migration
        // entry is locked by the task that migrates it, and kept until the entry is replaced under the lock
        // that is held here.
        unsafe {
            let folio = if ffi::rksm_pte_present(entry) {
                let page = NonNull::new(self.normal_page(entry))?;
                ffi::rksm_page_folio(page.as_ptr())
            } else if ffi::rksm_pte_none(entry) {
                return None;
            } else {
                ffi::rksm_migration_folio(entry)
            };
            if folio.is_null() {
                return None;
            }
            node_id_of(folio)
        }
    }

    /// Marks the copy that an unshare fault left here as worth keeping.
    ///
    /// The fault leaves copy and entry clean. Once such a page is shared over a fork, one process
    /// can give it up (MADV_FREE), and reclaim takes it from both: whether another process has it is only
    /// looked at for dirty pages.
    pub(super) fn keep_copy(&mut self) {
        if let Some(page) = self.anon_page().filter(PageRef::is_plain_anon) {
            // SAFETY: The folio is kept by the reference. Of an anonymous folio this sets bits only, for
            // which its lock is not needed while it is mapped, as it is under the page-table lock.
            unsafe { ffi::rksm_folio_keep_dirty(page.folio()) };
        }
    }

    /// Whether an unshare fault here is certain not to be served: a userfaultfd monitor waits for it.
    pub(super) fn is_unservable(&self) -> bool {
        // SAFETY: Looks at a value, and at the VMA, which is stable by its type.
        unsafe { ffi::rksm_pte_unservable(self.vma.as_ptr(), self.get()) }
    }

    /// The entry, if it maps `page` and may be changed to map another page.
    fn mergeable(&self, page: &PageRef) -> Result<bindings::pte_t> {
        let entry = self.get();
        if self.normal_page(entry) != page.as_ptr() {
            return Err(EBUSY);
        }
        // Merging would lose the mark, and with it somebody's notification.
        // SAFETY: looks at a value only.
        if unsafe { ffi::rksm_pte_uffd(entry) } {
            return Err(EBUSY);
        }
        Ok(entry)
    }

    /// Whether the entry, which maps `page`, is write-protected and clean.
    pub(super) fn is_protected(&self, page: &PageRef) -> Result<bool> {
        let entry = self.mergeable(page)?;
        // SAFETY: looks at a value only.
        Ok(!self.is_dirty(entry) && !unsafe { ffi::rksm_pte_write(entry) })
    }

    /// Clears the entry, which maps `page`, flushes it from all TLBs, and returns what it was.
    ///
    /// `EBUSY` if it does not map the page or has a userfaultfd mark. The caller sets it again before it
    /// gives up the lock.
    pub(super) fn clear_mergeable(&mut self, page: &PageRef) -> Result<bindings::pte_t> {
        self.mergeable(page)?;
        // Clear and flush first, then count: get_user_pages_fast() takes references without any lock,
        // and cannot any more once the entry is gone.
        // SAFETY: mapped and locked by the type invariant.
        Ok(unsafe { ffi::rksm_ptep_clear_flush(self.vma.as_ptr(), self.addr, self.pte) })
    }

    /// Does so if nobody else can write to the page by another way, and it then does not differ from what
    /// is to take its place. If not, the entry is as it was: `EBUSY` when the page is held by others,
    /// `EAGAIN` when it differs.
    pub(super) fn clear_unless(
        &mut self,
        page: &PageRef,
        differs: impl FnOnce() -> bool,
    ) -> Result<bindings::pte_t> {
        let entry = self.clear_mergeable(page)?;
        let err = if page.is_held_by_others() {
            EBUSY
        } else if differs() {
            EAGAIN
        } else {
            return Ok(entry);
        };
        self.set(entry);
        Err(err)
    }

    pub(super) fn is_dirty(&self, entry: bindings::pte_t) -> bool {
        // SAFETY: looks at a value only.
        unsafe { ffi::rksm_pte_dirty(entry) }
    }

    /// Sets the entry, which was cleared before.
    pub(super) fn set(&mut self, entry: bindings::pte_t) {
        // SAFETY: mapped and locked by the type invariant.
        unsafe { ffi::rksm_set_pte(self.vma.mm().as_raw(), self.addr, self.pte, entry) };
    }
}

/// Whether `vma` maps `page` at `addr`, on its own or as part of a huge page, without a userfaultfd mark.
///
/// The answer is a hint, since the page-table lock is given up again.
pub(super) fn maps_unmarked(vma: &MergeableVma<'_>, addr: usize, page: &PageRef) -> bool {
    let mm = vma.mm().as_raw();
    // SAFETY: `mmap_lock` is held by the type invariant of `vma`, so the tables above page tables are not
    // freed.
    let pmd = unsafe { ffi::rksm_find_pmd(mm, addr) };
    if pmd.is_null() {
        return false;
    }
    // SAFETY: the entry can be read at any time, as its table is not freed.
    if !unsafe { ffi::rksm_pmd_leaf(ffi::rksm_pmd_lockless(pmd)) } {
        return PteLock::new(vma, addr).is_some_and(|pte| pte.mergeable(page).is_ok());
    }
    // SAFETY: the mm has users by its type, and the table of `pmd` is not freed.
    let ptl = unsafe { ffi::rksm_pmd_lock(mm, pmd) };
    // SAFETY: the lock of the entry is held, so it maps what it maps until that is given up; `addr` lies in the
    // huge page, so the page sought is part of it.
    let unmarked = unsafe {
        let entry = ffi::rksm_pmd_lockless(pmd);
        // It may have been split or moved before the lock was taken.
        if ffi::rksm_pmd_present(entry) && ffi::rksm_pmd_leaf(entry) {
            let first = ffi::rksm_normal_page_pmd(vma.as_ptr(), addr, entry);
            let nth = (addr & (PMD_SIZE - 1)) / PAGE_SIZE;
            !first.is_null()
                && ffi::rksm_nth_page(first, nth) == page.as_ptr()
                && !ffi::rksm_pmd_uffd(entry)
        } else {
            false
        }
    };
    // SAFETY: locked above.
    unsafe { ffi::rksm_ptl_unlock(ptl) };
    unmarked
}

impl Drop for PteLock<'_> {
    fn drop(&mut self) {
        // SAFETY: mapped and locked by the type invariant.
        unsafe { ffi::rksm_pte_unlock(self.pte, self.ptl) };
    }
}
