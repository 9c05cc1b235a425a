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
//!
//! In-tree KSM has no such check. A page that it merges is then a KSM page in unregistered processes as well. No
//! rmap walk finds it there once the item of the registered one is gone.
//!
//! # Locks
//!
//! * The folio lock is held by the caller. Under it no task swaps the page in or migrates it.
//! * The walk takes the lock of an anon_vma for reading. It keeps VMAs and their address spaces from being freed.
//! * `page_vma_mapped_walk()` takes a page-table lock for each VMA in turn.
//! * The `mmap_lock` of another process nests outside all of these. So it is only tried, and not even kept: that
//!   it was free says that no fork of that process is going on.

use super::{
    ffi,
    folio::LockedPage,
    mappers::{Mapper, MapperCheck, Refusal},
    vma::MergeableVma,
};
use core::ptr;
use kernel::{
    bindings,
    error::to_result,
    ffi::{c_int, c_void},
    prelude::*,
};

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Lasting => EMLINK,
            Refusal::Passing => EBUSY,
        }
    }
}

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
    ///   swap entry for it exists; or it has more than [`MAX_FORK_VMAS`](super::mappers::MAX_FORK_VMAS) VMAs to
    ///   look at.
    /// * `EBUSY`: a fork is going on, the page is being written to swap, or the walk did not find all
    ///   mappings. This may be over in a moment.
    pub(super) fn check_fork_sharing(&self, vma: &MergeableVma<'_>, addr: usize) -> Result<bool> {
        if self.is_large() {
            if self.is_swapcache() {
                self.leave_swap()?;
            }
            // SAFETY: By the type invariants the folio is locked and kept.
            if !unsafe { ffi::rksm_folio_maybe_mapped_shared(self.folio()) } {
                return Ok(false);
            }
        } else {
            // SAFETY: By the type invariants the page is valid, and its folio locked.
            if unsafe { ffi::rksm_page_anon_exclusive(self.as_ptr()) } {
                return Ok(false);
            }
            // Without swap entries, a copy in the swap cache is a spare: free it.
            self.leave_swap()?;
            if self.mapcount() == 1 {
                return Ok(false);
            }
        }
        // SAFETY: The anon_vma of the folio is one of those of `vma`, which mapped this anonymous folio under this
        // hold of `mmap_lock`. That lock keeps them.
        unsafe { MapperWalk::check(self, vma, addr) }?;
        Ok(true)
    }

    /// Whether a mapping of this KSM page may be in a VMA that is not mergeable any more.
    ///
    /// `vma` maps the page at `addr`. A process can opt out between [`Self::check_fork_sharing`] and the moment
    /// in which the page becomes a KSM page. `MADV_UNMERGEABLE` does not see a KSM page then.
    ///
    /// Takes the kernel's anon_vma lock, and page-table locks under it.
    pub(super) fn may_have_strays(&self, vma: &MergeableVma<'_>, addr: usize) -> bool {
        // SAFETY: The caller made the folio the page of a stable node. The walk reads the items of that node
        // under the folio lock, which is held by the type invariants, and each item keeps its anon_vma.
        unsafe { MapperWalk::check(self, vma, addr) }.is_err()
    }

    /// Takes the folio off the swap cache, if it is there.
    ///
    /// # Errors
    ///
    /// `EMLINK` if a swap entry for it exists, `EBUSY` if it is being written to swap.
    fn leave_swap(&self) -> Result {
        // SAFETY: By the type invariants the folio is locked and kept.
        to_result(unsafe { ffi::rksm_folio_leave_swap(self.folio()) })
    }

    /// Returns how many page-table entries map the folio.
    fn mapcount(&self) -> c_int {
        // SAFETY: By the type invariants the folio is valid.
        unsafe { ffi::rksm_folio_mapcount(self.folio()) }
    }
}

/// The mapping that a check is for.
#[derive(Clone, Copy)]
struct Mapping<'a> {
    page: &'a LockedPage,
    /// The process that maps the page. It is only compared.
    mm: *mut bindings::mm_struct,
    addr: usize,
}

/// A walk of all VMAs that may map the folio of a page.
struct MapperWalk<'a> {
    mapping: Mapping<'a>,
    check: MapperCheck,
}

impl<'a> MapperWalk<'a> {
    /// Checks all processes that map the folio of `page`, which `vma` maps at `addr`.
    ///
    /// # Errors
    ///
    /// Says why a mapping may not be found by a walk from the rmap item for `addr`, or by a later scan.
    ///
    /// # Safety
    ///
    /// The folio is anonymous, and what its mapping points to is kept: an anon_vma, or a stable node
    /// with the anon_vma of each of its items.
    unsafe fn check(
        page: &'a LockedPage,
        vma: &MergeableVma<'_>,
        addr: usize,
    ) -> Result<(), Refusal> {
        let mapping = Mapping {
            page,
            mm: vma.mm().as_raw(),
            addr,
        };
        let mut walk = Self {
            mapping,
            check: MapperCheck::new(),
        };
        let arg = ptr::from_mut(&mut walk).cast();
        // SAFETY: `page` has the lock of the folio, and the caller promises the rest. `arg` is what the callback
        // expects, and is borrowed until this returns.
        unsafe { ffi::rksm_rmap_walk(page.folio(), Some(Self::rmap_one), arg) };
        let mapcount = (!page.is_large()).then(|| page.mapcount());
        walk.check.finish(mapcount)
    }

    /// Called by the kernel's rmap walk for each VMA that may map the folio, at `addr`.
    ///
    /// Returns whether to go on. The walk holds an anon_vma lock for reading, so this must not wait for the
    /// `mmap_lock` of a process: its holder may wait for the anon_vma lock.
    ///
    /// # Safety
    ///
    /// `arg` is the [`MapperWalk`] of [`Self::check`]. `vma` is in the tree of an anon_vma whose lock is held,
    /// and `addr` lies in it.
    unsafe extern "C" fn rmap_one(
        _folio: *mut bindings::folio,
        vma: *mut bindings::vm_area_struct,
        addr: usize,
        arg: *mut c_void,
    ) -> bool {
        // SAFETY: By the caller's promise `arg` is the `MapperWalk` that `check` has lent to the walk.
        let walk = unsafe { &mut *arg.cast::<Self>() };
        // INVARIANT: By the caller's promise. The lock is held until this returns.
        let vma = WalkedVma {
            mapping: walk.mapping,
            vma,
            addr,
        };
        walk.check.visit(&vma)
    }
}

/// A VMA that the walk came by.
///
/// # Invariants
///
/// `vma` is in the tree of an anon_vma whose lock is held for reading while this lives. So neither the VMA nor its
/// mm is freed. `addr` lies in the VMA.
struct WalkedVma<'a> {
    mapping: Mapping<'a>,
    vma: *mut bindings::vm_area_struct,
    /// The address at which it may map the folio.
    addr: usize,
}

impl WalkedVma<'_> {
    /// Returns the process that the VMA belongs to.
    fn mm(&self) -> *mut bindings::mm_struct {
        // SAFETY: By the type invariants the VMA is valid. It never moves to another mm.
        unsafe { (*self.vma).vm_mm }
    }
}

impl Mapper for WalkedVma<'_> {
    fn is_own(&self) -> bool {
        self.mm() == self.mapping.mm
    }

    fn maps_folio(&self) -> bool {
        // SAFETY: By the type invariants the VMA has the address, and its anon_vma lock is held. The folio is
        // locked.
        unsafe { ffi::rksm_folio_mapped_at(self.mapping.page.folio(), self.vma, self.addr) }
    }

    /// The page may be part of a large folio, so it has an address of its own.
    fn maps_elsewhere(&self) -> bool {
        let Mapping { page, addr, .. } = self.mapping;
        // SAFETY: By the type invariants the VMA is valid, and the page is.
        let at = unsafe { ffi::rksm_page_address_in_vma(page.as_ptr(), self.vma) };
        let outside = EFAULT.to_errno() as usize;
        at != outside
            && at != addr
            // SAFETY: The VMA has the address, and by the type invariants its anon_vma lock is held. The folio is
            // locked.
            && unsafe { ffi::rksm_page_mapped_at(page.as_ptr(), self.vma, at) }
    }

    /// The flags are read without a lock, and may change at any time.
    fn is_registered(&self) -> bool {
        // SAFETY: By the type invariants the VMA is valid.
        let is_mergeable = unsafe { ffi::rksm_vma_mergeable(self.vma) };
        // SAFETY: By the type invariants the mm is valid.
        is_mergeable && unsafe { ffi::rksm_mm_mergeable(self.mm()) }
    }

    /// `dup_mmap()` unlocks the child before it flushes writable translations from the TLBs of the parent, but
    /// unlocks the parent only afterwards. So a fork is over if the lock of the parent is free.
    fn may_be_forking(&self) -> bool {
        // SAFETY: By the type invariants the mm is valid. The call does not sleep.
        let locked = unsafe { bindings::mmap_read_trylock(self.mm()) };
        if locked {
            // SAFETY: Locked above.
            unsafe { bindings::mmap_read_unlock(self.mm()) };
        }
        !locked
    }
}
