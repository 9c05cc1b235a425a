// SPDX-License-Identifier: GPL-2.0

//! One page-table entry under its lock, and the MMU notifier around changes to it.
//!
//! A change of an entry takes these steps, in the order of mm/ksm.c:
//!
//! 1. Open a [`NotifierRange`]. It may sleep, so it comes before any page-table lock.
//! 2. Lock the entry: [`PteLock::new`].
//! 3. Clear the entry and flush it from all TLBs: [`PteLock::clear_mergeable`]. After that, neither a CPU nor
//!    get_user_pages_fast() reaches the page through it.
//! 4. Check that the page has no other user: [`PteLock::clear_unless`].
//! 5. Set the entry, to its new value or to what it was: [`PteLock::set`].
//!
//! Declare the section before the lock. Rust drops them in reverse order, so the lock is released first.
//!
//! # What an entry may stand for
//!
//! | entry | [`PteLock::anon_page`] | [`PteLock::node_id`] |
//! | --- | --- | --- |
//! | anonymous page | the page | none |
//! | anonymous page in broken memory | none | none |
//! | KSM page of a node, also in broken memory | the page | the node |
//! | KSM page without a node | the page | none |
//! | KSM page that is being migrated | none | the node |
//! | swapped-out page, also one that was a KSM page | none | none |
//! | zero page, page of a file, device memory | none | none |
//!
//! # Differences from mm/ksm.c
//!
//! `write_protect_page()` asks `page_address_in_vma()` for the address of a page, and `page_vma_mapped_walk()` for
//! the entry. Here the engine knows the address, and the entry there must map the page.

use super::{
    ffi,
    folio::{node_id_of, NodeId, PageRef},
    vma::MergeableVma,
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

/// The size of what one entry of the second-lowest level of page tables maps, in bytes.
pub(super) const PMD_SIZE: usize = 1 << 21;

/// An open MMU notifier section over one page.
///
/// Secondary MMUs (KVM) have dropped the page, and do not look it up again before this is dropped. Without
/// the section, a guest could write to a page whose entry in the host's page table is already cleared.
///
/// # Invariants
///
/// `range` describes a section that is open, and only [`NotifierRange::drop`] ends it.
pub(super) struct NotifierRange<'a> {
    range: Opaque<ffi::mmu_notifier_range>,
    _mm: PhantomData<&'a Mm>,
    _nts: NotThreadSafe,
}

impl<'a> NotifierRange<'a> {
    /// Opens a section over the page at `addr`, of the kind `MMU_NOTIFY_CLEAR`.
    ///
    /// May sleep, as notifiers may. The folio lock may be held, but no page-table lock.
    pub(super) fn start(mm: &'a Mm, addr: usize) -> Self {
        // The kernel fills in the range and keeps no pointer to it, so it may move afterwards.
        let mut range = MaybeUninit::<ffi::mmu_notifier_range>::uninit();
        // SAFETY: The call writes all of `range`, which is then initialised. The reference keeps the mm, and
        // with it the list of notifiers. Without users the notifiers may have been released, which leaves none
        // to call, as for the OOM reaper.
        let range = unsafe {
            ffi::rksm_notify_start(
                range.as_mut_ptr(),
                mm.as_raw(),
                addr,
                addr.saturating_add(PAGE_SIZE),
            );
            range.assume_init()
        };
        // INVARIANT: The call above opened the section.
        Self {
            range: Opaque::new(range),
            _mm: PhantomData,
            _nts: NotThreadSafe,
        }
    }
}

impl Drop for NotifierRange<'_> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant the section is open, and it is ended here only.
        unsafe { ffi::rksm_notify_end(self.range.get()) };
    }
}

/// The page-table entry of an address, with the page-table lock held.
///
/// The lock is a spinlock: a task must not sleep while it has one of these. Under it only the MMU changes the
/// entry, and only the accessed and the dirty bit. What the entry maps is kept by its mapping.
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
    /// Locks the entry of `addr`.
    ///
    /// Returns `None` if there is no page table for `addr`, which is also the case if a huge page is mapped
    /// there. Does not sleep.
    pub(super) fn new(vma: &'a MergeableVma<'a>, addr: usize) -> Option<Self> {
        let mut ptl = ptr::null_mut();
        // SAFETY: By the type invariant of `vma`, `mmap_lock` is held, so the tables above the page tables are
        // not freed. The kernel frees empty page tables with `mmap_lock` held for reading, too
        // (CONFIG_PT_RECLAIM); the callee checks for that under RCU.
        let pte = unsafe { ffi::rksm_pte_lock_addr(vma.mm().as_raw(), addr, &mut ptl) };
        if pte.is_null() {
            // Never make a `Self` here: dropping it would unlock what is not locked.
            return None;
        }
        // INVARIANT: The entry is mapped and its lock held, as the pointer is not null.
        Some(Self {
            vma,
            addr,
            pte,
            ptl,
            _nts: NotThreadSafe,
        })
    }

    /// Reads the entry.
    fn get(&self) -> bindings::pte_t {
        // SAFETY: By the type invariant the entry is mapped.
        unsafe { ffi::rksm_ptep_get(self.pte) }
    }

    /// Returns the page that `entry` maps.
    ///
    /// Returns null if it maps none, or one that the kernel does not account for, such as the zero page.
    fn normal_page(&self, entry: bindings::pte_t) -> *mut bindings::page {
        // SAFETY: `rksm_pte_present` looks at a value. `rksm_normal_page` looks at the VMA as well, which is
        // stable by its type.
        unsafe {
            if ffi::rksm_pte_present(entry) {
                ffi::rksm_normal_page(self.vma.as_ptr(), self.addr, entry)
            } else {
                ptr::null_mut()
            }
        }
    }

    /// Returns the anonymous page that the entry maps, with a reference.
    ///
    /// Returns `None` for device memory, and for memory that the hardware reported as broken, since the caller
    /// may read the page. A KSM page is returned in any case: the engine does not read it, and must find it
    /// to unlink its rmap item.
    pub(super) fn anon_page(&self) -> Option<PageRef> {
        let page = NonNull::new(self.normal_page(self.get()))?;
        // SAFETY: The mapping keeps the page while the lock is held, so page and folio are valid and the
        // folio's count is not zero. `from_raw` takes over the reference that `rksm_folio_get` takes.
        unsafe {
            let folio = ffi::rksm_page_folio(page.as_ptr());
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

    /// Returns the stable node of the KSM page that the entry maps.
    ///
    /// A page that is being migrated counts as mapped, as it stays a KSM page of the same node.
    pub(super) fn node_id(&self) -> Option<NodeId> {
        let entry = self.get();
        // SAFETY: The tests look at a value. The mapping keeps a page that is present, while the lock is held.
        // The task that migrates a page keeps its folio, locked, until it replaces the migration entry under
        // the lock that is held here.
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

    /// Marks the copy that an unshare fault left here as dirty.
    ///
    /// The fault leaves copy and entry clean. Such a page may then be shared over a fork, and one process may
    /// give it up (MADV_FREE). Reclaim would take it from both, as it looks for other users of dirty pages only.
    pub(super) fn keep_copy(&mut self) {
        if let Some(page) = self.anon_page().filter(PageRef::is_plain_anon) {
            // SAFETY: The reference keeps the folio. Of an anonymous folio this only sets bits, which needs no
            // folio lock while the folio is mapped, as it is under the page-table lock.
            unsafe { ffi::rksm_folio_keep_dirty(page.folio()) };
        }
    }

    /// Whether an unshare fault here is certain to fail.
    ///
    /// The fault would be handed to a userfaultfd monitor, and the kernel would not wait for that.
    pub(super) fn is_unservable(&self) -> bool {
        // SAFETY: The callee looks at a value, and at the VMA, which is stable by its type.
        unsafe { ffi::rksm_pte_unservable(self.vma.as_ptr(), self.get()) }
    }

    /// Returns the entry, if it maps `page` and may be changed to map another page.
    ///
    /// # Errors
    ///
    /// `EBUSY` if it maps something else or has a userfaultfd mark. A merge would lose that mark, and the
    /// monitor would miss a notification.
    fn mergeable(&self, page: &PageRef) -> Result<bindings::pte_t> {
        let entry = self.get();
        if self.normal_page(entry) != page.as_ptr() {
            return Err(EBUSY);
        }
        // SAFETY: The callee looks at a value only.
        if unsafe { ffi::rksm_pte_uffd(entry) } {
            return Err(EBUSY);
        }
        Ok(entry)
    }

    /// Whether the entry, which maps `page`, is write-protected and clean.
    ///
    /// # Errors
    ///
    /// `EBUSY` as for [`Self::clear_mergeable`].
    pub(super) fn is_protected(&self, page: &PageRef) -> Result<bool> {
        let entry = self.mergeable(page)?;
        // SAFETY: The callee looks at a value only.
        Ok(!self.is_dirty(entry) && !unsafe { ffi::rksm_pte_write(entry) })
    }

    /// Clears the entry, which maps `page`, flushes it from all TLBs, and returns what it was.
    ///
    /// The caller sets it again before it gives up the lock, and inside an open [`NotifierRange`].
    ///
    /// # Errors
    ///
    /// `EBUSY` if the entry does not map the page, or has a userfaultfd mark. It is not changed then.
    pub(super) fn clear_mergeable(&mut self, page: &PageRef) -> Result<bindings::pte_t> {
        self.mergeable(page)?;
        // Clear and flush before references are counted: get_user_pages_fast() takes them without any lock,
        // but only through an entry.
        // SAFETY: By the type invariant the entry is mapped and locked.
        Ok(unsafe { ffi::rksm_ptep_clear_flush(self.vma.as_ptr(), self.addr, self.pte) })
    }

    /// Clears the entry as [`Self::clear_mergeable`], and leaves it cleared if the page can be replaced.
    ///
    /// With the entry cleared, only a user that already has a reference can still write to the page. If there
    /// is none, the content cannot change any more, and `differs` compares it with what is to take its place.
    ///
    /// # Errors
    ///
    /// The entry is as it was:
    ///
    /// * `EBUSY`: the page has another user, or [`Self::clear_mergeable`] failed.
    /// * `EAGAIN`: the content differs.
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

    /// Whether `entry` says that the page was written to through it.
    pub(super) fn is_dirty(&self, entry: bindings::pte_t) -> bool {
        // SAFETY: The callee looks at a value only.
        unsafe { ffi::rksm_pte_dirty(entry) }
    }

    /// Sets the entry, which was cleared under this lock.
    ///
    /// No TLB needs a flush, as none has an entry that is not present.
    pub(super) fn set(&mut self, entry: bindings::pte_t) {
        // SAFETY: By the type invariant the entry is mapped and locked.
        unsafe { ffi::rksm_set_pte(self.vma.mm().as_raw(), self.addr, self.pte, entry) };
    }
}

/// Whether `vma` maps `page` at `addr`, on its own or as part of a huge page, without a userfaultfd mark.
///
/// Takes and releases the page-table lock, so the answer is a hint. It is for the decision whether to split a
/// huge page, which cannot be undone; the merge checks again under the lock.
pub(super) fn maps_unmarked(vma: &MergeableVma<'_>, addr: usize, page: &PageRef) -> bool {
    let mm = vma.mm().as_raw();
    // SAFETY: By the type invariant of `vma`, `mmap_lock` is held, so the tables above the page tables are not
    // freed.
    let pmd = unsafe { ffi::rksm_find_pmd(mm, addr) };
    if pmd.is_null() {
        return false;
    }
    // SAFETY: The table of `pmd` is not freed, so the entry can be read without its lock; the test looks at
    // the value.
    if !unsafe { ffi::rksm_pmd_leaf(ffi::rksm_pmd_lockless(pmd)) } {
        return PteLock::new(vma, addr).is_some_and(|pte| pte.mergeable(page).is_ok());
    }
    // SAFETY: The reference keeps the mm, and the table of `pmd`, with its lock, is not freed.
    let ptl = unsafe { ffi::rksm_pmd_lock(mm, pmd) };
    // SAFETY: The lock of the entry is held, so the entry does not change, and its mapping keeps the huge page.
    // `addr` lies in that, so the page with its index is part of it. The tests look at values.
    let unmarked = unsafe {
        let entry = ffi::rksm_pmd_lockless(pmd);
        // It may have been split or moved before the lock was taken.
        if ffi::rksm_pmd_present(entry) && ffi::rksm_pmd_leaf(entry) {
            let first = ffi::rksm_normal_page_pmd(vma.as_ptr(), addr, entry);
            let i = (addr & (PMD_SIZE - 1)) / PAGE_SIZE;
            !first.is_null()
                && ffi::rksm_nth_page(first, i) == page.as_ptr()
                && !ffi::rksm_pmd_uffd(entry)
        } else {
            false
        }
    };
    // SAFETY: Locked above, and released here only.
    unsafe { ffi::rksm_ptl_unlock(ptl) };
    unmarked
}

impl Drop for PteLock<'_> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant the entry is mapped and this object holds its lock.
        unsafe { ffi::rksm_pte_unlock(self.pte, self.ptl) };
    }
}

impl MergeableVma<'_> {
    /// Returns the node of the KSM page at `addr`, also while that is being migrated.
    ///
    /// Takes the page-table lock for a moment, so the answer may be outdated when it arrives.
    pub(crate) fn node_at(&self, addr: usize) -> Option<NodeId> {
        PteLock::new(self, addr)?.node_id()
    }

    /// Whether `page` is mapped at `addr`, without a userfaultfd mark that forbids merging it.
    ///
    /// The answer is a hint, see [`maps_unmarked`].
    pub(crate) fn maps_unmarked(&self, addr: usize, page: &PageRef) -> bool {
        maps_unmarked(self, addr, page)
    }
}
