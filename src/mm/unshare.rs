// SPDX-License-Identifier: GPL-2.0

//! Giving a process back pages of its own.

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

/// What [`MergeableVma::unmerge`] came to.
pub(crate) struct Unmerged {
    /// From where on it has looked: what it has come by and is not [`Self::unserved`] is not merged any more.
    pub(crate) from: usize,
    /// Where to go on: nothing before this address is left, but the pages that could not be served.
    pub(crate) reached: usize,
    /// Why it stopped there, if it was not for having done enough under one hold of `mmap_lock`: `ENOMEM`
    /// without memory for a copy, `ERESTARTSYS` when the calling task has a signal pending.
    pub(crate) result: Result,
    /// The addresses of pages that are still merged, as the fault did not serve them.
    unserved: [usize; HOLD_UNMERGES],
    count: usize,
}

impl Unmerged {
    fn new(from: usize) -> Self {
        Self {
            from,
            reached: from,
            result: Ok(()),
            unserved: [0; HOLD_UNMERGES],
            count: 0,
        }
    }

    /// Nothing was to be done before `reached`.
    pub(crate) fn nothing(reached: usize) -> Self {
        Self::new(reached)
    }

    fn push_unserved(&mut self, addr: usize) {
        if let Some(slot) = self.unserved.get_mut(self.count) {
            *slot = addr;
            self.count = self.count.saturating_add(1);
        }
    }

    /// The pages that are still merged, in the order of their addresses.
    pub(crate) fn unserved(&self) -> &[usize] {
        self.unserved.get(..self.count).unwrap_or(&[])
    }
}

/// How often to try again, when a fault leaves a page merged without an error: as when it had to wait for a migration,
/// of which there is one after the other while memory goes offline. Fewer than [`HOLD_UNMERGES`].
const UNSHARE_ATTEMPTS: usize = 48;

/// Outcomes of a fault after which trying again is no use.
const HOPELESS: u32 = bindings::vm_fault_reason_VM_FAULT_SIGBUS
    | bindings::vm_fault_reason_VM_FAULT_SIGSEGV
    | bindings::vm_fault_reason_VM_FAULT_HWPOISON
    | bindings::vm_fault_reason_VM_FAULT_HWPOISON_LARGE;

impl MergeableVma<'_> {
    /// Replaces KSM pages in `start..end` by ordinary pages of the process, by the kernel's own unshare
    /// fault: as many as one hold of `mmap_lock` is good for. Sleeps for memory, so no lock of the module may
    /// be held.
    ///
    /// `user` is the address space: pages are faulted in, which must not be done while it is torn down.
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
            // SAFETY: no precondition but being allowed to sleep.
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
            // SAFETY: `mmap_lock` is held by the type invariant and `addr` lies in the VMA; `user` keeps the
            // address space from being torn down. Without FAULT_FLAG_ALLOW_RETRY the fault does not drop the
            // lock.
            let ret = unsafe { ffi::rksm_unshare(self.as_ptr(), addr) } as u32;
            if ret & bindings::vm_fault_reason_VM_FAULT_OOM != 0 {
                done.result = Err(ENOMEM);
                break;
            }
            if let Some(mut pte) = PteLock::new(self, addr) {
                pte.keep_copy();
            }
            if ret & HOPELESS != 0 {
                // The backing file was truncated and its private pages went with it; or the fault was for a
                // userfaultfd monitor, or the memory of the page is broken, and the page is still there.
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

    /// Whether an unshare fault at `addr` is certain not to be served.
    fn is_unservable(&self, addr: usize) -> bool {
        PteLock::new(self, addr).is_some_and(|pte| pte.is_unservable())
    }
}
