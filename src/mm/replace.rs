// SPDX-License-Identifier: GPL-2.0

//! Making a page a merged page, and putting a merged page in the place of another one.

use super::{
    ffi,
    folio::{LockedPage, PageRef},
    pte::{NotifierRange, PteLock},
    rmap_item::ItemBox,
    stable_node::NodeBox,
    trace,
    vma::MergeableVma,
};
use core::ptr;
use kernel::prelude::*;

/// What is known of the other mappings of a page that [`MergeableVma::make_ksm_page`] made a merged page.
pub(crate) struct Published {
    /// The page is shared over a fork, and so may be mapped at the same address elsewhere, without an item.
    pub(crate) shared: bool,
    /// A process that shares it may have opted out meanwhile: its mapping stays merged then, in a VMA that is
    /// not mergeable any more.
    pub(crate) strays: bool,
}

/// Decides whether huge pages are split for a part that merges.
pub(crate) trait SplitPolicy {
    /// Whether the huge page may be split. Nothing else is known to be in the way.
    fn may_split(&mut self) -> bool;

    /// Notes that it was.
    fn was_split(&mut self);
}

impl MergeableVma<'_> {
    /// Splits the folio of `page`, which is mapped at `addr`, if it is a large one, after everything that can be
    /// known to keep the page from being merged: `fits` says what else there is, and `splits` has the last
    /// word (`E2BIG`).
    ///
    /// A split cannot be undone, and khugepaged may take long to put the parts together again.
    fn make_small(
        &self,
        addr: usize,
        page: &LockedPage,
        fits: impl FnOnce() -> Result,
        splits: &mut dyn SplitPolicy,
    ) -> Result {
        if !page.is_large() {
            return Ok(());
        }
        if page.is_held_by_others() || !self.maps_unmarked(addr, page) {
            return Err(EBUSY);
        }
        fits()?;
        if !splits.may_split() {
            return Err(E2BIG);
        }
        page.split()?;
        splits.was_split();
        Ok(())
    }

    /// Makes the page at `addr` the page of `node`, with `item` as the first place that maps it.
    ///
    /// The page is split off its huge page if need be, write-protected, and left alone with
    /// `EBUSY` if somebody else holds a reference on it (GUP, O_DIRECT) or has it locked, or if it is
    /// not there any more; with `E2BIG` if it is part of a huge page that `splits` wants whole. Of a page that
    /// is shared over a fork, see [`LockedPage::check_fork_sharing`] for `EMLINK` and `EBUSY`. When nobody can write
    /// to it any more, it has to be what it `is_still` thought to be, or else the result is `EAGAIN`; a part of a
    /// huge page is asked before that is split, too. Takes the folio lock and a page-table lock.
    pub(crate) fn make_ksm_page(
        &self,
        addr: usize,
        page: PageRef,
        node: &NodeBox,
        item: &mut ItemBox,
        is_still: impl Fn(&PageRef) -> bool,
        splits: &mut dyn SplitPolicy,
    ) -> Result<Published> {
        let pfn = page.pfn();
        let result = self.try_make_ksm_page(addr, page, node, item, is_still, splits);
        trace::merge_with_ksm_page(true, pfn, ptr::null_mut(), item, self.mm(), &result);
        result
    }

    fn try_make_ksm_page(
        &self,
        addr: usize,
        page: PageRef,
        node: &NodeBox,
        item: &mut ItemBox,
        is_still: impl Fn(&PageRef) -> bool,
        splits: &mut dyn SplitPolicy,
    ) -> Result<Published> {
        let page = lock_plain(page)?;
        let fits = || match is_still(&page) {
            true => page.check_fork_sharing(self, addr).map(drop),
            false => Err(EAGAIN),
        };
        self.make_small(addr, &page, fits, splits)?;
        // Asked before `write_protect` sees the page mapped here: at any time after that we may give it up, and
        // the only mapping be a relative's.
        let shared = page.check_fork_sharing(self, addr)?;
        self.write_protect(addr, &page)?;
        // Who writes to it from here on gets a copy, as its lock is held. (The caller knew it by what was read
        // some time ago.)
        if !is_still(&page) {
            return Err(EAGAIN);
        }
        // SAFETY: `write_protect` found the page mapped here and left it mapped writable nowhere:
        // it is either mapped here only, or shared by a fork that is over, and so write-protected
        // everywhere, and known to be so by all CPUs.
        unsafe { node.set_page(&page, item, self, addr, shared) };
        // What opts out from here on finds a KSM page, and unshares it.
        let strays = shared && page.may_have_strays(self, addr);
        Ok(Published { shared, strays })
    }

    /// Maps `kpage`, the page of `node`, at `addr` in place of `page`, if both have the same
    /// content, and lists `item` with the node.
    ///
    /// Nobody can reach `page` through this mapping from before the comparison to the end, as the entry
    /// is cleared meanwhile; and `kpage` is write-protected wherever it is mapped. If they differ,
    /// the entry is put back as it was, and the result is `EAGAIN`. Other errors are as in
    /// [`Self::make_ksm_page`]. A part of a huge page is compared before that is split, too.
    pub(crate) fn replace_page(
        &self,
        addr: usize,
        page: PageRef,
        kpage: &LockedPage,
        node: &NodeBox,
        item: &mut ItemBox,
        splits: &mut dyn SplitPolicy,
    ) -> Result {
        let result = self.try_replace_page(addr, page, kpage, node, item, splits);
        trace::merge_with_ksm_page(false, kpage.pfn(), kpage.as_ptr(), item, self.mm(), &result);
        result
    }

    fn try_replace_page(
        &self,
        addr: usize,
        page: PageRef,
        kpage: &LockedPage,
        node: &NodeBox,
        item: &mut ItemBox,
        splits: &mut dyn SplitPolicy,
    ) -> Result {
        if kpage.node_id() != node.id() {
            return Err(EBUSY);
        }
        let page = lock_plain(page)?;
        let fits = || match page.differs_from(kpage) {
            true => Err(EAGAIN),
            false => Ok(()),
        };
        self.make_small(addr, &page, fits, splits)?;
        if page.is_large() {
            return Err(EBUSY);
        }
        {
            let _range = NotifierRange::start(self.mm(), addr);
            let mut pte = PteLock::new(self, addr).ok_or(EBUSY)?;
            let entry = pte.clear_unless(&page, || page.differs_from(kpage))?;
            // SAFETY: both folios are locked and kept by references of ours. The entry mapped
            // `page` until we cleared it under the lock that is held, so the mapping's reference
            // and rmap of `page` are ours to drop; those of `kpage` are taken before the entry
            // shows it.
            unsafe {
                ffi::rksm_folio_get(kpage.folio());
                ffi::rksm_page_add_rmap(kpage.as_ptr(), self.as_ptr(), addr);
                // Its last owner may have given it up (MADV_FREE), and reclaim would free it
                // under us: not now that somebody wants it. From two mappings on it cannot be
                // given up, and until then its lock, which we hold, is needed for that.
                ffi::rksm_folio_keep_dirty(kpage.folio());
                pte.set(ffi::rksm_mk_shared_pte(
                    kpage.as_ptr(),
                    self.as_ptr(),
                    entry,
                ));
                ffi::rksm_page_remove_rmap(page.as_ptr(), self.as_ptr());
                ffi::rksm_folio_drop_swap(page.folio());
                ffi::rksm_folio_put(page.folio());
            }
        }
        node.add_rmap_item(kpage, item, self, addr)
    }

    /// Maps the kernel's zero page at `addr` in place of `page`, if that is all zeroes; with the mark that
    /// tells such a zero page from others. Counts it with the address space and overall.
    ///
    /// Locks and errors are as in [`Self::replace_page`].
    pub(crate) fn replace_with_zero_page(
        &self,
        addr: usize,
        page: PageRef,
        splits: &mut dyn SplitPolicy,
    ) -> Result {
        let result = self.try_replace_with_zero_page(addr, page, splits);
        trace::merge_with_zero_page(self.mm(), &result);
        result
    }

    fn try_replace_with_zero_page(
        &self,
        addr: usize,
        page: PageRef,
        splits: &mut dyn SplitPolicy,
    ) -> Result {
        let page = lock_plain(page)?;
        let fits = || match page.is_zero() {
            true => Ok(()),
            false => Err(EAGAIN),
        };
        self.make_small(addr, &page, fits, splits)?;
        if page.is_large() {
            return Err(EBUSY);
        }
        let _range = NotifierRange::start(self.mm(), addr);
        let mut pte = PteLock::new(self, addr).ok_or(EBUSY)?;
        let entry = pte.clear_unless(&page, || !page.is_zero())?;
        // SAFETY: the folio is locked and kept by a reference of ours. The entry mapped `page` until we
        // cleared it under the lock that is held, so the mapping's reference and rmap of `page` are
        // ours to drop. The zero page is neither counted nor ever freed. That the address space has
        // it is counted before the lock is given up, and so before anybody can unmap it.
        unsafe {
            pte.set(ffi::rksm_mk_zero_pte(self.as_ptr(), addr, entry));
            ffi::rksm_mm_count_zero_page(self.mm().as_raw());
            ffi::rksm_page_remove_rmap(page.as_ptr(), self.as_ptr());
            ffi::rksm_folio_drop_swap(page.folio());
            ffi::rksm_folio_put(page.folio());
        }
        Ok(())
    }

    /// Write-protects the page at `addr`, and checks that nobody can still write to it by another way.
    ///
    /// The order of the checks is that of `write_protect_page()` in mm/ksm.c, and so are the reasons.
    fn write_protect(&self, addr: usize, page: &LockedPage) -> Result {
        if page.is_large() {
            return Err(EBUSY);
        }
        let _range = NotifierRange::start(self.mm(), addr);
        let mut pte = PteLock::new(self, addr).ok_or(EBUSY)?;
        // SAFETY: looks at the page that we keep, and at a counter of the mm.
        let (exclusive, flushing) = unsafe {
            (
                ffi::rksm_page_anon_exclusive(page.as_ptr()),
                ffi::rksm_mm_tlb_flush_pending(self.mm().as_raw()),
            )
        };
        if !exclusive && !flushing && pte.is_protected(page)? {
            return Ok(());
        }
        let entry = pte.clear_mergeable(page)?;
        // SAFETY: the entry is cleared and flushed, as trying to share demands.
        let cannot_share = || unsafe { ffi::rksm_page_try_share(page.as_ptr()) } != 0;
        // Trying to share changes the page, so it comes last.
        let busy = page.is_held_by_others() || (exclusive && cannot_share());
        if busy {
            pte.set(entry);
            return Err(EBUSY);
        }
        if pte.is_dirty(entry) {
            // SAFETY: the folio is locked and kept.
            unsafe { ffi::rksm_folio_set_dirty(page.folio()) };
        }
        // SAFETY: looks at a value only.
        pte.set(unsafe { ffi::rksm_pte_clean_wrprotect(entry) });
        Ok(())
    }
}

/// Locks a page that can be merged.
fn lock_plain(page: PageRef) -> Result<LockedPage> {
    // Do not wait: whoever has the lock is busy with the page, and there are other pages.
    let page = page.try_lock().map_err(|_| EBUSY)?;
    if !page.is_plain_anon() || page.is_poisoned() {
        return Err(EBUSY);
    }
    Ok(page)
}
