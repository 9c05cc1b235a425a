// SPDX-License-Identifier: GPL-2.0

//! Processes that share a page over a fork.

use super::{ffi, folio::LockedPage, vma::MergeableVma};
use kernel::{error::to_result, prelude::*};

/// How many VMAs are looked at for those that share a page by fork, before it is left alone. As many
/// again are walked whenever the kernel moves or reclaims such a page; but it does not do so for each of a
/// scan.
const MAX_RELATIVES: core::ffi::c_int = 1024;

impl LockedPage {
    /// Checks that nobody shares the page, which `vma` maps at `addr`, over a fork by whom it could not
    /// be found once it is merged. Of a page that is not one of its own yet, a process that maps any part of
    /// the folio counts: it would lose its huge page. Takes the kernel's anon_vma lock, and page-table locks.
    ///
    /// Returns whether relatives share it. If not, and `vma` still maps the page, nobody else does, nor will as
    /// long as the mmap lock is held: who gave the page up cannot get it back.
    ///
    /// Returns `EMLINK` if it is mapped, or may be swapped in, where nobody is looking for pages to merge,
    /// or at another address; `EBUSY` if that, or the fork itself, may be over in a moment.
    pub(super) fn check_fork_sharing(&self, vma: &MergeableVma<'_>, addr: usize) -> Result<bool> {
        let (folio, mm) = (self.folio(), vma.mm().as_raw());
        // SAFETY: the folio is an anonymous one, locked and kept, by the type invariants and our caller. `vma`
        // mapped it under this hold of the mmap lock, so that its anon_vma, one of those of `vma`, stays.
        unsafe {
            if self.is_large() {
                if self.is_swapcache() {
                    to_result(ffi::rksm_folio_leave_swap(folio))?;
                }
                if !ffi::rksm_folio_maybe_mapped_shared(folio) {
                    return Ok(false);
                }
            } else {
                if ffi::rksm_page_anon_exclusive(self.as_ptr()) {
                    return Ok(false);
                }
                // What nobody will swap in any more is there as a spare only.
                to_result(ffi::rksm_folio_leave_swap(folio))?;
                if ffi::rksm_folio_mapcount(folio) == 1 {
                    return Ok(false);
                }
            }
            to_result(ffi::rksm_page_mapped_by_strangers(
                self.as_ptr(),
                mm,
                addr,
                MAX_RELATIVES,
            ))?;
        }
        Ok(true)
    }

    /// Whether this KSM page, which `vma` maps at `addr`, is mapped by processes of which not all are certain to
    /// have it in a mergeable VMA. Takes the kernel's anon_vma lock, and page-table locks.
    pub(super) fn may_have_strays(&self, vma: &MergeableVma<'_>, addr: usize) -> bool {
        let (page, mm) = (self.as_ptr(), vma.mm().as_raw());
        // SAFETY: The folio is locked, kept, and one of a stable node, by the type invariants and our caller.
        // The mmap lock of `mm` is held by the type of `vma`.
        unsafe { ffi::rksm_page_mapped_by_strangers(page, mm, addr, MAX_RELATIVES) != 0 }
    }
}
