// SPDX-License-Identifier: GPL-2.0

//! Merging: a page becomes a KSM page, or a KSM page takes the place of another page.
//!
//! | operation | what it does | in mm/ksm.c |
//! | --- | --- | --- |
//! | [`make_ksm_page`] | a page becomes the KSM page of a stable node | `try_to_merge_with_ksm_page(…, NULL)` |
//! | [`replace_page`] | the KSM page of a node takes its place | `try_to_merge_with_ksm_page(…, kpage)` |
//! | [`replace_with_zero_page`] | the kernel's zero page takes its place | `try_to_merge_with_zero_page()` |
//!
//! Each of them takes these steps, and the first that fails leaves the page as it was:
//!
//! 1. Lock the folio, or give up.
//! 2. Split a large folio, if nothing is known to be in the way of the merge.
//! 3. Clear the entry, inside an MMU notifier section and under the page-table lock.
//! 4. Check that no other user can write to the page, and compare the content. It cannot change any more.
//! 5. Set the entry, and list the mapping before the lock of the KSM page is released. So each rmap walk
//!    finds every mapping.
//!
//! [`make_ksm_page`] sets the entry write-protected before it looks at the content. The folio lock is held until
//! the end, and a write fault makes a copy of a page that is locked.
//!
//! # Locks
//!
//! The engine has the list of their order. Here is what each of them keeps:
//!
//! | lock | taken by | what does not change under it |
//! | --- | --- | --- |
//! | `mmap_lock`, for reading | the caller, see [`MergeableVma`] | the VMA and its `anon_vma` |
//! | folio lock of the KSM page | the caller of [`replace_page`] | its node, and the node's list of items |
//! | folio lock of the page | each operation, which only tries it | it is no KSM page, and does not migrate |
//! | anon_vma lock | a split, and the check of fork sharing | the VMAs that may map the page |
//! | MMU notifier section | each operation | no secondary MMU maps the page |
//! | page-table lock | each operation | the entry |
//!
//! # Differences from mm/ksm.c
//!
//! * [`replace_page`] compares while the entry is cleared, so one notifier section and one flush are enough. In
//!   mm/ksm.c, `pages_identical()` runs between `write_protect_page()` and `replace_page()`. Both open a section,
//!   and the first may flush as well.
//! * Node and first item are in place before a folio becomes a KSM folio. In-tree KSM first makes a KSM page
//!   without a node. Rmap walks find no mapping of it until `stable_tree_append()`, under a later folio lock.
//! * [`make_ksm_page`] checks the content, as the key of the node depends on it. In-tree KSM takes any content
//!   here, and compares both pages when it merges the second one.
//! * A new entry keeps the soft-dirty bit of the old one, and a userfaultfd mark forbids the merge. `mk_pte()` in
//!   mm/ksm.c makes the entry from page and VMA alone, so both are lost.
//! * A page that an unregistered process shares over a fork does not become a KSM page, see
//!   [`LockedPage::check_fork_sharing`]. In-tree KSM does not look at other mappings.
//! * The split of a huge page comes last. In-tree KSM splits as soon as it has locked the folio.
//! * The error says why the page was left alone. `try_to_merge_one_page()` returns `-EFAULT` in all cases.
//!
//! [`make_ksm_page`]: MergeableVma::make_ksm_page
//! [`replace_page`]: MergeableVma::replace_page
//! [`replace_with_zero_page`]: MergeableVma::replace_with_zero_page

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

/// The result of [`MergeableVma::make_ksm_page`]: what is known of other mappings of the page.
pub(crate) struct Published {
    /// The page is shared over a fork. Other processes may map it at the same address, without an rmap item,
    /// until the scan comes by there.
    ///
    /// The caller has it come by in the next pass. The item of this mapping goes when its process gives the page
    /// up, and no rmap walk finds the others then.
    pub(crate) shared: bool,
    /// A process that shares the page may have opted out meanwhile. Its mapping is then merged in a VMA that
    /// is not mergeable any more.
    ///
    /// The caller looks for it among the VMAs of [`Which::MayBeMerged`](super::vma::Which::MayBeMerged), and
    /// lists it like any other.
    pub(crate) strays: bool,
}

/// Decides whether huge pages are split for a part that merges.
///
/// A merge saves one page, and a split costs a huge page. The engine weighs them by what it remembers of the
/// address range; this module only asks.
///
/// # Context
///
/// Both functions are called with the folio of the huge page locked, and that of the KSM page if there is one.
/// No page-table lock is held.
pub(crate) trait SplitPolicy {
    /// Whether the huge page may be split.
    ///
    /// Asked last, when nothing else is known to be in the way of the merge. `false` ends it with `E2BIG`.
    fn may_split(&mut self) -> bool;

    /// Notes that the huge page was split. The merge may still fail.
    fn was_split(&mut self);
}

impl MergeableVma<'_> {
    /// Splits the folio of `page`, which is mapped at `addr`, if it is a large one.
    ///
    /// A split cannot be undone, and khugepaged may take long to collapse the parts again. So the split comes
    /// after all checks that can tell that the merge would fail. `fits` is the one of the operation.
    ///
    /// # Errors
    ///
    /// Nothing was split:
    ///
    /// * `EBUSY`: the page has another user, is not mapped at `addr`, or has a userfaultfd mark there. Or the
    ///   kernel cannot split the folio.
    /// * `E2BIG`: `splits` wants the huge page whole.
    /// * The error of `fits`.
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

    /// Makes the page at `addr` the KSM page of `node`, with `item` as its first listed mapping.
    ///
    /// Splits the page off its huge page if need be, and write-protects it. `is_still` says whether the content
    /// is what the caller takes it for. It is called when no user can write to the page any more, and for a
    /// part of a huge page also before the split.
    ///
    /// Tries the folio lock, and takes page-table locks and the kernel's anon_vma lock under it. Opens an MMU
    /// notifier section, so it may sleep.
    ///
    /// # Errors
    ///
    /// The page was left as it was, but it may be write-protected and no part of a huge page any more:
    ///
    /// * `EBUSY`: the page is locked, is not mapped at `addr` any more, has a userfaultfd mark, or has another
    ///   user, such as O_DIRECT or any other holder of a GUP reference.
    /// * `EAGAIN`: `is_still` returned false.
    /// * `E2BIG`: it is part of a huge page that `splits` wants whole.
    /// * `EMLINK` or `EBUSY`: it is shared over a fork, see [`LockedPage::check_fork_sharing`].
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
        trace::merge_with_ksm_page(
            true,
            pfn,
            ptr::null_mut(),
            item.as_ptr(),
            self.mm(),
            &result,
        );
        result
    }

    /// Does the work of [`Self::make_ksm_page`], without the trace event.
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
        // Check this before `write_protect` sees the page mapped here. After that, the process may give it up
        // at any time, and the only mapping may be that of another process.
        let shared = page.check_fork_sharing(self, addr)?;
        self.write_protect(addr, &page)?;
        // A write from here on gets a copy, as the folio lock is held. So this comparison is final, unlike the
        // one that the caller has made.
        if !is_still(&page) {
            return Err(EAGAIN);
        }
        // SAFETY: `write_protect` found a small anonymous page mapped here, and left it mapped writable nowhere.
        // Either it is mapped here only, or a fork that is over write-protected it everywhere, and all CPUs
        // have flushed what they knew.
        unsafe { node.set_page(&page, item, self, addr, shared) };
        // A process that opts out from here on finds a KSM page, and unshares it.
        let strays = shared && page.may_have_strays(self, addr);
        Ok(Published { shared, strays })
    }

    /// Maps `kpage`, the KSM page of `node`, at `addr` in place of `page`, and lists `item` with the node.
    ///
    /// All bytes of both pages are compared while the entry is cleared. No CPU reaches `page` through it
    /// meanwhile, and `kpage` is write-protected wherever it is mapped. A part of a huge page is compared
    /// before the split as well.
    ///
    /// The caller holds the lock of `kpage`. Tries the folio lock of `page`, and takes page-table locks under
    /// it. Opens an MMU notifier section, so it may sleep.
    ///
    /// # Errors
    ///
    /// The entry is as it was, but the page may be no part of a huge page any more:
    ///
    /// * `EAGAIN`: the pages differ.
    /// * `EBUSY`: `kpage` is not the page of `node`; or as for [`Self::make_ksm_page`].
    /// * `E2BIG`: it is part of a huge page that `splits` wants whole.
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
        trace::merge_with_ksm_page(
            false,
            kpage.pfn(),
            kpage.as_ptr(),
            item.as_ptr(),
            self.mm(),
            &result,
        );
        result
    }

    /// Does the work of [`Self::replace_page`], without the trace event.
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
            // SAFETY: References of ours keep both folios, and both are locked. One operation at a time:
            // `kpage` gets its reference and its rmap before the entry shows it, under the lock of the entry.
            // The new entry is made of values and of the VMA, which is stable by its type. The entry mapped
            // `page` until it was cleared under the lock that is held, so the rmap and the reference of that
            // mapping are ours to drop. Without the mapping, the swap cache may drop a folio that is locked.
            unsafe {
                ffi::rksm_folio_get(kpage.folio());
                ffi::rksm_page_add_rmap(kpage.as_ptr(), self.as_ptr(), addr);
                // The last process that mapped it may have given it up (MADV_FREE), and reclaim would free
                // it. With two mappings it cannot be given up, and until then that takes the folio lock.
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

    /// Maps the kernel's zero page at `addr` in place of `page`, if that is all zeroes.
    ///
    /// The entry gets the mark of a KSM-placed zero page, and is counted for the address space and for the
    /// system: `ksm_zero_pages`. There is no rmap item, as the zero page is never reclaimed nor migrated.
    ///
    /// Locks and contexts are those of [`Self::replace_page`].
    ///
    /// # Errors
    ///
    /// `EAGAIN` if a byte is not zero; `EBUSY` and `E2BIG` as for [`Self::replace_page`].
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

    /// Does the work of [`Self::replace_with_zero_page`], without the trace event.
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
        // SAFETY: A reference of ours keeps the folio, which is locked. One operation at a time: the zero page
        // has neither rmap nor references to take, and is never freed. The mm is kept, and its counters change
        // before the lock is released, so before another task can unmap the zero page and count it off. The
        // entry mapped `page` until it was cleared under the lock that is held, so the rmap and the reference
        // of that mapping are ours to drop. Without the mapping, the swap cache may drop a folio that is locked.
        unsafe {
            pte.set(ffi::rksm_mk_zero_pte(self.as_ptr(), addr, entry));
            ffi::rksm_mm_count_zero_page(self.mm().as_raw());
            ffi::rksm_page_remove_rmap(page.as_ptr(), self.as_ptr());
            ffi::rksm_folio_drop_swap(page.folio());
            ffi::rksm_folio_put(page.folio());
        }
        Ok(())
    }

    /// Write-protects the page at `addr`, and checks that no other user can still write to it.
    ///
    /// The order of the checks is that of `write_protect_page()` in mm/ksm.c, and so are the reasons. The dirty
    /// bit moves from the entry to the folio, or reclaim would take the page for a clean one.
    ///
    /// An entry that is clean and write-protected stays as it is, and references are not counted, as in mm/ksm.c.
    /// Not so if the page is exclusive to one process, or a TLB flush of the address space is pending.
    ///
    /// # Errors
    ///
    /// `EBUSY` if the page is part of a large folio, is not mapped at `addr`, has a userfaultfd mark or another
    /// user. The entry is as it was.
    fn write_protect(&self, addr: usize, page: &LockedPage) -> Result {
        if page.is_large() {
            return Err(EBUSY);
        }
        let _range = NotifierRange::start(self.mm(), addr);
        let mut pte = PteLock::new(self, addr).ok_or(EBUSY)?;
        // SAFETY: The first call looks at a flag of the page, which we keep. The second one looks at a counter of
        // the mm, which the type of `self` keeps.
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
        // SAFETY: The page is anonymous and exclusive, its folio is locked, and its entry is cleared and
        // flushed, as trying to share demands.
        let cannot_share = || unsafe { ffi::rksm_page_try_share(page.as_ptr()) } != 0;
        // Trying to share changes the page, so it comes last.
        let busy = page.is_held_by_others() || (exclusive && cannot_share());
        if busy {
            pte.set(entry);
            return Err(EBUSY);
        }
        if pte.is_dirty(entry) {
            // SAFETY: The folio is locked and kept.
            unsafe { ffi::rksm_folio_set_dirty(page.folio()) };
        }
        // SAFETY: The callee makes a value of a value.
        pte.set(unsafe { ffi::rksm_pte_clean_wrprotect(entry) });
        Ok(())
    }
}

/// Locks a page that can be merged.
///
/// # Errors
///
/// `EBUSY` if the folio is locked, or if it is not anonymous, already a KSM page, or broken memory.
fn lock_plain(page: PageRef) -> Result<LockedPage> {
    // Do not wait: another task works on the page, and there are other pages to merge.
    let page = page.try_lock().map_err(|_| EBUSY)?;
    if !page.is_plain_anon() || page.is_poisoned() {
        return Err(EBUSY);
    }
    Ok(page)
}
