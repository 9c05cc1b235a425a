// SPDX-License-Identifier: GPL-2.0

//! Giving every process back pages of its own: `run=2`.

/// How often, and after how long each time, to try again to lock the pages of nodes that are left when
/// everything was unmerged.
use super::{
    index::MmId,
    page::Forget,
    scan::Cursor,
    stable_tree::{Released, ORPHANS_SWEEP},
    use_mm, Engine,
};
use crate::{
    intree,
    mm::{
        entry::{PageEntry, PageState},
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

const SETTLE_ATTEMPTS: u32 = 100;
const SETTLE_MS: i64 = 10;

impl Engine {
    /// Gives every process back pages of its own, and forgets all that is known of pages.
    ///
    /// A process that cannot be served does not keep others from being: the first error is returned when
    /// all were tried. `EBUSY`: a page cannot be unshared, because of a userfaultfd monitor. `ERESTARTSYS` ends
    /// it at once. What stays merged stays known and counted.
    ///
    /// Memory that goes offline meanwhile does not stop it: the merged pages of children that no pass has seen yet are
    /// found by what is listed of their parent, which may have been served already, so that the kernel could
    /// not move them for as long as we waited for it.
    pub(super) fn unmerge_all(&self) -> Result {
        // From here on the swap-in path hands out copies of merged pages, not the pages.
        let _copying = intree::UnmergeMode::new();
        // Who was not entered is not served, so nothing may be taken from its pages.
        let entered = self.enter_registered();
        let mut result = entered.and(self.unmerge_each(Which::Mergeable));
        if self.release_idle(false) && result.is_ok() {
            // Merged pages are left that are not listed: in VMAs that lost VM_MERGEABLE, or swapped in by a task
            // that had locked the page before copies were asked for. That one is over when the page was
            // unlocked once.
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
        self.left_chores.store(self.has_leftovers(&state), Relaxed);
        // The scan starts again; as in-tree, so does counting when all is unmerged.
        state.batched.clear();
        state.cursor = Cursor::new();
        if result.is_ok() {
            self.stats.reset_full_scans();
        }
        self.update_stats(&state);
        result
    }

    /// Gives every process back pages of its own in these VMAs.
    fn unmerge_each(&self, which: Which) -> Result {
        let mut result = Ok(());
        let mut mm_id = 0;
        loop {
            // Children that are forked meanwhile come later, so they are not missed.
            let next = self.registry.lock().next(mm_id);
            let Some((id, mm)) = next else {
                return result;
            };
            mm_id = id;
            let served = self.unmerge_mm(id, &mm, which);
            self.state.lock().report(id);
            if served == Err(ERESTARTSYS) {
                return served;
            }
            result = result.and(served);
        }
    }

    /// Gives one process back pages of its own in these VMAs, and forgets what is known of its pages, but for
    /// those that stay merged.
    ///
    /// `mmap_lock` is given up again and again: rksmd merges nothing meanwhile, and the kernel unmerges what it
    /// moves to another address, so nothing is missed. It is waited for without any lock of the engine.
    fn unmerge_mm(&self, mm_id: MmId, mm: &Mm, which: Which) -> Result {
        let mut result = Ok(());
        let mut addr = 0;
        let mut attempts = SETTLE_ATTEMPTS;
        loop {
            // Held for one step: the last reference to be dropped tears the address space down.
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

    /// Forgets what is known of the pages from `addr` on that were unmerged. What is busy is tried again after a
    /// while, as often as there are `attempts` left.
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
            let keep = |addr, entry: &PageEntry| {
                if addr >= step.from {
                    return unserved.binary_search(&addr).is_ok();
                }
                // What is in a VMA that was not looked at is left for the next round.
                is_merged(mm, addr, entry).unwrap_or_else(|| {
                    contended = true;
                    true
                })
            };
            let more = memcg::charge(mm, || {
                state.forget_range(mm_id, from, step.reached, &mut budget, keep)
            });
            self.update_stats(&state);
            drop(state);
            // Who waited for our hold of `mmap_lock` to end to change the address space may not be done yet.
            if (budget.was_busy() || contended) && *attempts != 0 {
                *attempts = attempts.saturating_sub(1);
                fsleep(Delta::from_millis(SETTLE_MS));
                continue;
            }
            match more {
                Some(next) => from = next,
                None => return,
            }
            crate::mm::cond_resched();
        }
    }

    /// Forgets who is gone, and frees nodes whose pages are gone, all of them; with `force`, also nodes
    /// whose pages are left in the swap cache, or mapped by processes that are not registered (a fork's other
    /// half). Returns whether nodes are left.
    fn release_idle(&self, force: bool) -> bool {
        let mut stale = Some(Released::nothing());
        let mut attempts = SETTLE_ATTEMPTS;
        loop {
            let mut state = self.state.lock();
            self.reap(&mut state);
            let mut more = state.forget_dying();
            let core = &mut state.core;
            stale = stale.and_then(|at| core.release_some_stale(at));
            more |= stale.is_some();
            core.sweep_orphans(ORPHANS_SWEEP, force);
            more |= core.swept.is_some();
            let left = !core.index.has_no_nodes();
            self.update_stats(&state);
            drop(state);
            if more {
                crate::mm::cond_resched();
                continue;
            }
            // Those that are left may be locked, but not for long.
            attempts = attempts.saturating_sub(1);
            if !left || !force || attempts == 0 {
                return left;
            }
            fsleep(Delta::from_millis(SETTLE_MS));
        }
    }

    /// Waits until the pages of all nodes without known mappings have been unlocked at least once. Returns
    /// whether that came about in time.
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

/// Whether the page at `addr`, of which `entry` is remembered, is still merged; `None` if that cannot be known now.
fn is_merged(mm: &Mm, addr: usize, entry: &PageEntry) -> Option<bool> {
    let PageState::Merged(Some(node)) = entry.state() else {
        return Some(false);
    };
    match MmapLock::try_new(mm) {
        Ok(lock) => {
            let vma = MergeableVma::find(&lock, addr, Which::MayBeMerged);
            Some(vma.is_some_and(|vma| vma.maps(addr, node)))
        }
        Err(NotLocked::Contended) => None,
        Err(NotLocked::Exiting) => Some(false),
    }
}
