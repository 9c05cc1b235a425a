// SPDX-License-Identifier: GPL-2.0

//! The `mmap_lock` of an address space that may be exiting.
//!
//! The scan holds no user reference (`mm_users`): the last one to drop such a reference tears the address
//! space down, and a process that has been waited for is to have given its memory back by then. The lock
//! alone is enough. `exit_mmap()` begins only without users, unmaps pages with the lock held for reading,
//! one page-table lock at a time, as the OOM reaper and `process_mrelease()` do beside it, and takes the
//! lock for writing before it frees a page table or a VMA. What must not be done beside it is to fault
//! pages in: that takes a user reference, which [`super::vma::MergeableVma::unmerge`] asks for.

use super::ffi;
use kernel::{
    bindings,
    mm::{Mm, MmWithUser},
    prelude::*,
    types::NotThreadSafe,
};

/// Why a lock was not taken.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum NotLocked {
    /// Another task holds it, or waits for it, to change the address space. Come back later.
    Contended,
    /// The address space has no users any more.
    Exiting,
}

/// The `mmap_lock` of an address space, held for reading.
///
/// # Invariants
///
/// This object holds the `mmap_lock` of `mm` for reading, and `mm` had users at a moment since it does. So
/// neither VMAs nor page tables were freed yet, nor are they while this lives.
pub(crate) struct MmapLock<'a> {
    mm: &'a Mm,
    // A read lock is given back by the task that took it.
    _nts: NotThreadSafe,
}

impl<'a> MmapLock<'a> {
    /// Takes the lock, unless another task has it for writing or waits for it.
    ///
    /// Does not sleep, so it may be called with any other lock held, also with the `mmap_lock` of another
    /// address space (or of this one).
    pub(crate) fn try_new(mm: &'a Mm) -> Result<Self, NotLocked> {
        // SAFETY: The mm is kept by the reference.
        if !unsafe { bindings::mmap_read_trylock(mm.as_raw()) } {
            return Err(if has_users(mm) {
                NotLocked::Contended
            } else {
                NotLocked::Exiting
            });
        }
        if !has_users(mm) {
            // SAFETY: Locked above.
            unsafe { bindings::mmap_read_unlock(mm.as_raw()) };
            return Err(NotLocked::Exiting);
        }
        // INVARIANT: Locked above, and it has had users since.
        Ok(Self {
            mm,
            _nts: NotThreadSafe,
        })
    }

    /// Takes the lock. Sleeps for as long as another task has it; `ERESTARTSYS` when the calling task is
    /// killed meanwhile. No lock of the module may be held.
    pub(crate) fn killable(mm: &'a MmWithUser) -> Result<Self> {
        // SAFETY: The mm is kept by the reference.
        if unsafe { ffi::rksm_mmap_read_lock_killable(mm.as_raw()) } != 0 {
            return Err(ERESTARTSYS);
        }
        // INVARIANT: Locked above; the type of `mm` says that it has users.
        Ok(Self {
            mm,
            _nts: NotThreadSafe,
        })
    }

    /// The address space.
    pub(crate) fn mm(&self) -> &'a Mm {
        self.mm
    }
}

impl Drop for MmapLock<'_> {
    fn drop(&mut self) {
        // SAFETY: Held by the type invariant, and given back here only.
        unsafe { bindings::mmap_read_unlock(self.mm.as_raw()) };
    }
}

/// Whether an address space has users: it is not being torn down.
pub(crate) fn has_users(mm: &Mm) -> bool {
    // SAFETY: The mm is kept by the reference.
    unsafe { ffi::rksm_mm_users(mm.as_raw()) > 0 }
}
