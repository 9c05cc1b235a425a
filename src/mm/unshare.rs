// SPDX-License-Identifier: GPL-2.0

//! Unmerging: a process gets back pages of its own in place of KSM pages.
//!
//! The kernel makes the copies. `handle_mm_fault()` with `FAULT_FLAG_UNSHARE` copies a KSM page as a write
//! fault would, but does not make the entry writable. In-tree KSM breaks COW in the same way.
//!
//! A fault allocates memory and may sleep, so no lock of the module is held, and `mmap_lock` is held for
//! [`HOLD_UNMERGES`] faults at most. A fault can fail for good: a userfaultfd monitor may be in the way. Such
//! a page stays merged and listed, and the caller is told its address.
//!
//! [`MergeableVma::unmerge`] repeats these steps:
//!
//! 1. Find the next KSM page or KSM-placed zero page: [`walk::next_ksm_page`].
//! 2. Pass it over if a userfaultfd monitor would have to serve the fault.
//! 3. Have the kernel copy it. Only `mmap_lock` is held for that.
//! 4. Mark the copy as dirty: [`PteLock::keep_copy`].
//! 5. Go on as the result of the fault says:
//!
//! | result | then |
//! | --- | --- |
//! | `VM_FAULT_OOM` | end with `ENOMEM` |
//! | one of [`HOPELESS`] | note the address if the page is still merged, and continue behind it |
//! | any other | search from the same address again, as the fault may have backed out |
//!
//! The rmap item of a copied page stays on the list of its node until the caller forgets the page. It does no
//! harm there: rmap walks look at the page table, and do not find the KSM page.
//!
//! # Differences from mm/ksm.c
//!
//! `break_ksm()` ends at the first `VM_FAULT_SIGBUS` or `VM_FAULT_SIGSEGV`, and returns 0. The rest of its range
//! stays merged then. It repeats a fault with any other result but `VM_FAULT_OOM`, as long as it finds a KSM
//! page.

use super::{
    ffi,
    pte::PteLock,
    vma::{has_no_other_users, MergeableVma},
    walk::{self, Search},
};
use core::ptr;
use kernel::{
    bindings,
    mm::{Mm, MmWithUser},
    page::PAGE_SIZE,
    prelude::*,
};

/// The most pages that are unmerged under one hold of `mmap_lock`.
const HOLD_UNMERGES: usize = 64;

/// The result of [`MergeableVma::unmerge`].
///
/// No page in `from..reached` is merged any more, except those of [`Self::unserved`]. The caller forgets
/// what it remembers of the others, and continues at `reached`.
pub(crate) struct Unmerged {
    /// The address at which the search began.
    pub(crate) from: usize,
    /// The address to continue at.
    pub(crate) reached: usize,
    /// `Ok` if the range or the budget of one hold of `mmap_lock` is used up; the error otherwise.
    pub(crate) result: Result,
    /// The addresses of pages that the fault did not serve, of which `count` are used.
    unserved: [usize; HOLD_UNMERGES],
    count: usize,
}

impl Unmerged {
    /// The result of a search that has only begun.
    fn new(from: usize) -> Self {
        Self {
            from,
            reached: from,
            result: Ok(()),
            unserved: [0; HOLD_UNMERGES],
            count: 0,
        }
    }

    /// The result for a range without pages to unmerge, which ends at `reached`.
    pub(crate) fn nothing(reached: usize) -> Self {
        Self::new(reached)
    }

    /// Notes that the page at `addr` stays merged. There is room for one page a fault.
    fn push_unserved(&mut self, addr: usize) {
        if let Some(slot) = self.unserved.get_mut(self.count) {
            *slot = addr;
            self.count = self.count.saturating_add(1);
        }
    }

    /// Returns the addresses of pages that are still merged, in ascending order.
    pub(crate) fn unserved(&self) -> &[usize] {
        self.unserved.get(..self.count).unwrap_or(&[])
    }
}

/// How often a page is tried again if a fault leaves it merged without an error.
///
/// This happens when the fault had to wait for a migration, and while memory goes offline, one migration
/// follows another. Smaller than [`HOLD_UNMERGES`], or a single page could use up each hold of `mmap_lock`.
const UNSHARE_ATTEMPTS: usize = 48;

/// Results of a fault that would be the same if it were repeated.
///
/// The backing file was truncated, a userfaultfd monitor would have to serve the fault, or memory is broken.
const HOPELESS: u32 = bindings::vm_fault_reason_VM_FAULT_SIGBUS
    | bindings::vm_fault_reason_VM_FAULT_SIGSEGV
    | bindings::vm_fault_reason_VM_FAULT_HWPOISON
    | bindings::vm_fault_reason_VM_FAULT_HWPOISON_LARGE;

impl MergeableVma<'_> {
    /// Replaces KSM pages in `start..end` by ordinary pages, by the kernel's own unshare fault.
    ///
    /// Handles at most [`HOLD_UNMERGES`] faults, which is enough for one hold of `mmap_lock`. Sleeps for memory,
    /// so no lock of the module may be held. Stops early, without an error, if `user` is the last user of the
    /// address space, as that is then about to be torn down.
    ///
    /// `user` proves that the address space has users. A fault beside `exit_mmap()` could map a page behind it,
    /// and that page would leak.
    ///
    /// # Errors
    ///
    /// In [`Unmerged::result`]:
    ///
    /// * `ENOMEM`: there is no memory for a copy.
    /// * `ERESTARTSYS`: the calling task has a signal pending.
    /// * `EINVAL`: `user` is another address space than that of the VMA.
    pub(crate) fn unmerge(&self, user: &MmWithUser, start: usize, end: usize) -> Unmerged {
        let mut from = start.max(self.start());
        let end = end.min(self.end());
        let mut done = Unmerged::new(from);
        if !ptr::eq::<Mm>(&**user, self.mm()) {
            // Another address space's reference keeps this one from nothing.
            done.result = Err(EINVAL);
            return done;
        }
        let mut attempts = (from, 0);
        for _ in 0..HOLD_UNMERGES {
            // SAFETY: The task may sleep: `mmap_lock` is a sleeping lock, and the caller holds no other.
            unsafe { ffi::rksm_cond_resched() };
            if kernel::current!().signal_pending() {
                done.result = Err(ERESTARTSYS);
                break;
            }
            if from >= end || has_no_other_users(user) {
                break;
            }
            let addr = match walk::next_ksm_page(self, from, end) {
                Search::Found(addr) => addr,
                Search::Nothing(reached) => {
                    from = reached;
                    break;
                }
            };
            from = addr;
            attempts = match attempts {
                (last, count) if last == addr => (addr, count + 1),
                _ => (addr, 0),
            };
            let behind = addr.saturating_add(PAGE_SIZE);
            if attempts.1 >= UNSHARE_ATTEMPTS || self.is_unservable(addr) {
                done.push_unserved(addr);
                from = behind;
                continue;
            }
            // SAFETY: By the type invariant `mmap_lock` is held, and `addr` lies in the VMA. `user` keeps the
            // address space from being torn down. Without FAULT_FLAG_ALLOW_RETRY the fault does not drop the
            // lock, so the invariant still holds afterwards.
            let ret = unsafe { ffi::rksm_unshare(self.as_ptr(), addr) } as u32;
            if ret & bindings::vm_fault_reason_VM_FAULT_OOM != 0 {
                done.result = Err(ENOMEM);
                break;
            }
            if let Some(mut pte) = PteLock::new(self, addr) {
                pte.keep_copy();
            }
            if ret & HOPELESS != 0 {
                // The backing file may have been truncated, and its private pages went with it. Otherwise the
                // page is still there: a userfaultfd monitor is to serve the fault, or its memory is broken.
                if let Search::Found(_) = walk::next_ksm_page(self, addr, behind) {
                    done.push_unserved(addr);
                }
                from = behind;
            }
            // Else again from the same address: the fault may back out, e.g. when another one raced.
        }
        if done.result.is_err() {
            // The page at which it stopped may have been served.
            from = match walk::next_ksm_page(self, from, end) {
                Search::Found(addr) | Search::Nothing(addr) => addr,
            };
        }
        done.reached = from;
        done
    }

    /// Whether an unshare fault at `addr` is certain to fail. Takes the page-table lock for a moment.
    fn is_unservable(&self, addr: usize) -> bool {
        PteLock::new(self, addr).is_some_and(|pte| pte.is_unservable())
    }
}
