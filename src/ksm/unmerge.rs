// SPDX-License-Identifier: GPL-2.0

//! Unmerging all pages of all processes: run=2.

use super::{
    cursor::Cursor,
    entry::{PageEntry, PageState},
    forget::Forget,
    index::Released,
    mms::MmId,
    stable_tree::ORPHANS_SWEEP,
    state::Core,
    use_mm, Engine,
};
use crate::{
    intree,
    mm::{
        memcg,
        mmap_lock::{MmapLock, NotLocked},
        unshare::Unmerged,
        vma::{has_no_other_users, MergeableVma, Next, Which, HOLD_VMAS},
    },
};
use kernel::{
    mm::Mm,
    prelude::*,
    sync::atomic::Relaxed,
    time::{delay::fsleep, Delta},
};

/// How often to retry what another task has locked: pages of nodes that are left at the end, and `mmap_lock`.
const SETTLE_ATTEMPTS: u32 = 100;
/// The time between two attempts, in milliseconds.
const SETTLE_MS: i64 = 10;

impl Engine {
    /// Unshares all merged pages in all registered processes, and forgets all pages.
    ///
    /// A failure in one process does not stop the others from being unmerged: the first error is returned at
    /// the end. Pages that stay merged stay listed and counted.
    ///
    /// The caller holds no lock and has set `unmerging`, which keeps the scan and other writers away. Waits for
    /// `mmap_lock`, and for memory for the copies.
    ///
    /// Memory that goes offline meanwhile does not stop this. Merged pages of children that no pass has visited
    /// are found by the rmap items of their parent. If the parent was unmerged already, the kernel could not
    /// migrate these pages for as long as this function waited for it.
    ///
    /// # Errors
    ///
    /// * `EBUSY`: a page cannot be unshared, because of a userfaultfd monitor.
    /// * `ENOMEM`: there was no memory for a copy, or to register an address space.
    /// * `ERESTARTSYS`: a signal arrived. This one ends the function at once.
    pub(super) fn unmerge_all(&self) -> Result {
        // From here on, a swap-in maps copies of merged pages instead of the pages themselves.
        let _copying = intree::UnmergeMode::new();
        // A process that could not be registered is not unmerged, so no node may be taken off its pages below.
        let entered = self.enter_registered();
        let mut result = entered.and(self.unmerge_each(Which::Mergeable));
        if self.release_idle(false) && result.is_ok() {
            // Merged pages without an rmap item are left. They are in VMAs that lost VM_MERGEABLE, or a task
            // swapped them in that had locked the page before `UnmergeMode` began. Such a task is done when the
            // page has been unlocked once.
            let unlocked = self.see_all_unlocked();
            let again = self.unmerge_each(Which::MayBeMerged);
            result = entered.and(again);
            let complete = result.is_ok() && unlocked && !self.registry.lock().has_missed();
            if complete {
                let mut state = self.state.lock();
                state.unmerged_to = self.registry.lock().newest();
                drop(state);
            }
            self.release_idle(complete);
        }
        if self.registry.lock().has_missed() {
            result = result.and(Err(ENOMEM));
        }
        let mut state = self.state.lock();
        state.core.unpin_if_empty();
        self.has_new_work.store(self.has_leftovers(&state), Relaxed);
        // The scan starts again, and so does `full_scans` after everything was unmerged, as in-tree.
        state.batched.clear();
        state.cursor = Cursor::new();
        if result.is_ok() {
            self.stats.reset_full_scans();
        } else {
            // Pages may be left that no entry leads to.
            state.core.found_strays = true;
        }
        self.update_stats(&state);
        result
    }

    /// Unmerges the pages of all registered processes in VMAs of this kind. Returns the first error, see
    /// [`Self::unmerge_all`].
    fn unmerge_each(&self, which: Which) -> Result {
        let mut result = Ok(());
        let mut mm_id = 0;
        loop {
            // Children that are forked meanwhile get higher numbers, so none is missed.
            let next = self.registry.lock().next(mm_id);
            let Some((id, registered)) = next else {
                return result;
            };
            mm_id = id;
            let unmerged = self.unmerge_mm(id, &registered.mm, which);
            self.state.lock().report(id);
            if unmerged == Err(ERESTARTSYS) {
                return unmerged;
            }
            result = result.and(unmerged);
        }
    }

    /// Unmerges the pages of one process in VMAs of this kind, and forgets its pages except those that stay
    /// merged.
    ///
    /// `mmap_lock` is waited for without any lock of the engine, and released after each step. Nothing is
    /// missed thereby: rksmd merges nothing meanwhile, and the kernel unmerges pages that `mremap()` moves.
    fn unmerge_mm(&self, mm_id: MmId, mm: &Mm, which: Which) -> Result {
        let mut result = Ok(());
        let mut addr = 0;
        let mut attempts = SETTLE_ATTEMPTS;
        loop {
            // Hold the user reference for one step only: dropping the last one tears the address space down.
            let Some(user) = use_mm(mm).filter(|user| !has_no_other_users(user)) else {
                break;
            };
            let lock = MmapLock::killable(&user)?;
            let mut left = HOLD_VMAS;
            let (step, end) = match MergeableVma::next(&lock, addr, which, &mut left) {
                Next::Vma(vma) => (vma.unmerge(&user, addr, vma.end()), false),
                Next::GoOn(next) => (Unmerged::nothing(next), false),
                Next::None => (Unmerged::nothing(usize::MAX), true),
            };
            drop(lock);
            drop(user);
            self.forget_unmerged(mm_id, mm, addr, &step, &mut attempts);
            step.result?;
            if !step.unserved().is_empty() {
                result = Err(EBUSY);
            }
            if end {
                break;
            }
            addr = step.reached;
        }
        result
    }

    /// Forgets the pages from `addr` on that `step` has unmerged.
    ///
    /// If a lock is contended, retries after a while, as long as there are `attempts` left.
    fn forget_unmerged(
        &self,
        mm_id: MmId,
        mm: &Mm,
        addr: usize,
        step: &Unmerged,
        attempts: &mut u32,
    ) {
        let unserved = step.unserved();
        let mut from = addr;
        loop {
            let mut state = self.state.lock();
            let mut budget = Forget::new();
            let mut contended = false;
            let keep = |_: &Core, addr, entry: &PageEntry| {
                if addr >= step.from {
                    return unserved.binary_search(&addr).is_ok();
                }
                // `step` has not visited the VMA of this page. If it is still merged, keep it for the second
                // round.
                is_merged(mm, addr, entry).unwrap_or_else(|| {
                    contended = true;
                    true
                })
            };
            let next = memcg::charge(mm, || {
                state.forget_range(mm_id, from, step.reached, &mut budget, keep)
            });
            self.update_stats(&state);
            drop(state);
            // A writer that waited for our `mmap_lock` may still hold it, to change the address space.
            if (budget.was_busy() || contended) && *attempts != 0 {
                *attempts = attempts.saturating_sub(1);
                fsleep(Delta::from_millis(SETTLE_MS));
                continue;
            }
            match next {
                Some(next) => from = next,
                None => return,
            }
            crate::mm::cond_resched();
        }
    }

    /// Forgets address spaces that have exited, and frees all stale nodes. Returns whether nodes are left.
    ///
    /// With `force`, frees orphans whose pages are in the swap cache or mapped as well. The latter are mapped
    /// by unregistered processes, the other half of a fork.
    fn release_idle(&self, force: bool) -> bool {
        let mut stale = Some(Released::nothing());
        let mut attempts = SETTLE_ATTEMPTS;
        loop {
            let mut state = self.state.lock();
            self.reap(&mut state);
            let mut has_more = state.forget_dying();
            let core = &mut state.core;
            stale = stale.and_then(|at| core.release_some_stale(at));
            has_more |= stale.is_some();
            core.sweep_orphans(ORPHANS_SWEEP, force);
            has_more |= core.swept.is_some();
            let left = !core.index.has_no_nodes();
            self.update_stats(&state);
            drop(state);
            if has_more {
                crate::mm::cond_resched();
                continue;
            }
            // Nodes that are left may have a page that is locked. That does not last long.
            attempts = attempts.saturating_sub(1);
            if !left || !force || attempts == 0 {
                return left;
            }
            fsleep(Delta::from_millis(SETTLE_MS));
        }
    }

    /// Waits until the page of each orphan has been unlocked at least once. Returns `false` after
    /// [`SETTLE_ATTEMPTS`] attempts.
    fn see_all_unlocked(&self) -> bool {
        let mut after = None;
        for _ in 0..SETTLE_ATTEMPTS {
            loop {
                let state = self.state.lock();
                match state.core.see_unlocked(after) {
                    Ok(None) => return true,
                    Ok(some) => after = some,
                    Err(before) => {
                        after = before;
                        break;
                    }
                }
            }
            fsleep(Delta::from_millis(SETTLE_MS));
        }
        false
    }
}

/// Whether the page at `addr` with this entry is still merged; `None` if `mmap_lock` is contended, so that it
/// cannot be known now.
fn is_merged(mm: &Mm, addr: usize, entry: &PageEntry) -> Option<bool> {
    let PageState::Merged(Some(node)) = entry.state() else {
        return Some(false);
    };
    match MmapLock::try_new(mm) {
        Ok(lock) => {
            let vma = MergeableVma::find(&lock, addr, Which::MayBeMerged);
            Some(vma.is_some_and(|vma| vma.node_at(addr) == Some(node)))
        }
        Err(NotLocked::Contended) => None,
        Err(NotLocked::Exiting) => Some(false),
    }
}
