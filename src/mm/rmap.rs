// SPDX-License-Identifier: GPL-2.0

//! Processes that share a page over a fork.
//!
//! A page that becomes a KSM page stays mapped in every process that has it by a fork. At first only the
//! process that the scan is at gets an rmap item. `rmap_walk_ksm()` goes through all VMAs of the item's `anon_vma`
//! and looks at the item's address. So it finds the mappings of fork-shared mappers as well, as long as these
//! have the page at the same address.
//!
//! Each of them has to be registered, in a mergeable VMA: then the scan comes by there, lists the mapping,
//! and `MADV_UNMERGEABLE` finds it. A page with any other mapper is not merged.

use super::{ffi, folio::LockedPage, vma::MergeableVma};
use kernel::{error::to_result, prelude::*};

/// The most VMAs that a check of fork sharing looks at. A page with more is left alone.
///
/// The kernel walks as many whenever it moves or reclaims such a page, but a scan does so for every page.
const MAX_FORK_VMAS: core::ffi::c_int = 1024;

impl LockedPage {
    /// Checks that all mappings of the page can be found after it became a KSM page.
    ///
    /// `vma` maps the page at `addr`. Returns whether other processes share it over a fork. If not, and `vma`
    /// still maps it, no other process maps it as long as `mmap_lock` is held. A process that gave the page up
    /// cannot get it back.
    ///
    /// If the page is part of a large folio, processes that map any part of that count: a split would take
    /// their huge page away.
    ///
    /// Takes the kernel's anon_vma lock, and page-table locks under it. Only tries the `mmap_lock` of the
    /// other processes.
    ///
    /// # Errors
    ///
    /// * `EMLINK`: the page is mapped at another address or in a process or VMA that is not registered, or a
    ///   swap entry for it exists; or it has more than [`MAX_FORK_VMAS`] VMAs to look at.
    /// * `EBUSY`: a fork is going on, the page is being written to swap, or the walk did not find all
    ///   mappings. This may be over in a moment.
    pub(super) fn check_fork_sharing(&self, vma: &MergeableVma<'_>, addr: usize) -> Result<bool> {
        let (folio, mm) = (self.folio(), vma.mm().as_raw());
        // SAFETY: By the type invariants the folio is locked and kept, which is all that the tests and
        // `rksm_folio_leave_swap` need. The walk needs its anon_vma, too. That is one of those of `vma`, which
        // mapped this anonymous folio under this hold of `mmap_lock`, and the lock keeps them.
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
                // Without swap entries, a copy in the swap cache is a spare: free it.
                to_result(ffi::rksm_folio_leave_swap(folio))?;
                if ffi::rksm_folio_mapcount(folio) == 1 {
                    return Ok(false);
                }
            }
            to_result(ffi::rksm_page_mapped_by_unregistered(
                self.as_ptr(),
                mm,
                addr,
                MAX_FORK_VMAS,
            ))?;
        }
        Ok(true)
    }

    /// Whether a mapping of this KSM page may be in a VMA that is not mergeable any more.
    ///
    /// `vma` maps the page at `addr`. A process can opt out between [`Self::check_fork_sharing`] and the moment
    /// in which the page becomes a KSM page. `MADV_UNMERGEABLE` does not see a KSM page then.
    ///
    /// Takes the kernel's anon_vma lock, and page-table locks under it.
    pub(super) fn may_have_strays(&self, vma: &MergeableVma<'_>, addr: usize) -> bool {
        let (page, mm) = (self.as_ptr(), vma.mm().as_raw());
        // SAFETY: By the type invariants the folio is locked and kept. The caller made it the page of a stable
        // node, whose items the walk reads under that lock. By its type, `vma` holds the `mmap_lock` of `mm`.
        unsafe { ffi::rksm_page_mapped_by_unregistered(page, mm, addr, MAX_FORK_VMAS) != 0 }
    }
}
