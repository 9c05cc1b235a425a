// SPDX-License-Identifier: GPL-2.0

//! The `mmap_lock` of an address space that may be exiting.
//!
//! The scan holds no user reference (`mm_users`). The task that drops the last one tears the address space
//! down, and a process must have given its memory back when `wait()` for it returns.
//!
//! The lock alone is enough:
//!
//! * `exit_mmap()` begins only when there are no users.
//! * It unmaps pages with the lock held for reading, one page-table lock at a time. The OOM reaper and
//!   `process_mrelease()` do the same beside it.
//! * It takes the lock for writing before it frees a page table or a VMA.
//!
//! In-tree KSM relies on the same: it takes the lock and asks `ksm_test_exit()`. But it waits for the lock, with
//! `ksm_thread_mutex` held. [`MmapLock::try_new`] never waits.
//!
//! Only faulting pages in is forbidden beside it. That takes a user reference, so
//! [`MergeableVma::unmerge`](super::vma::MergeableVma::unmerge) asks for one.
//!
//! # Examples
//!
//! ```ignore
//! match MmapLock::try_new(mm) {
//!     Ok(lock) => scan(&lock),
//!     // Another task changes the address space: come back at the end of the pass.
//!     Err(NotLocked::Contended) => postpone(mm),
//!     // Forget the address space.
//!     Err(NotLocked::Exiting) => {}
//! }
//! ```

use super::ffi;
use kernel::{
    bindings,
    mm::{Mm, MmWithUser},
    prelude::*,
    types::NotThreadSafe,
};

/// Why [`MmapLock::try_new`] did not take the lock.
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
/// This object holds the `mmap_lock` of `mm` for reading, and `mm` had users at a moment since it was taken.
/// So neither VMAs nor page tables were freed yet, nor are they while this lives.
pub(crate) struct MmapLock<'a> {
    mm: &'a Mm,
    /// The task that took a read lock has to release it.
    _nts: NotThreadSafe,
}

impl<'a> MmapLock<'a> {
    /// Takes the lock, unless another task has it for writing or waits for that.
    ///
    /// Does not sleep, so it may be called with any other lock held, also with the `mmap_lock` of another
    /// address space (or of this one).
    ///
    /// # Errors
    ///
    /// [`NotLocked::Contended`] is for the moment, [`NotLocked::Exiting`] is for good.
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

    /// Takes the lock, and sleeps for as long as another task has it.
    ///
    /// A process can hold its `mmap_lock` for as long as it likes, so no lock of the module may be held.
    ///
    /// # Errors
    ///
    /// `ERESTARTSYS` if the calling task was killed while it waited.
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

    /// Returns the address space whose lock this is.
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

/// Whether an address space has users, and so is not being torn down.
///
/// The answer may be outdated when it arrives, unless the caller holds `mmap_lock` or is a user.
pub(crate) fn has_users(mm: &Mm) -> bool {
    // SAFETY: The mm is kept by the reference.
    unsafe { ffi::rksm_mm_users(mm.as_raw()) > 0 }
}
