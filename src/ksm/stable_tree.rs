// SPDX-License-Identifier: GPL-2.0

//! The life of a stable node: noticing that it is stale, freeing it, giving it another key.
//!
//! A node holds no reference on its page. It is stale when the page is gone or belongs to another user. Then it
//! can be freed. All functions run with `state` locked.

use super::{
    index::{Released, MAX_COMPARES},
    state::{Core, GFP_SCAN},
};
use crate::{
    hash::{Checksum, Hasher, Sample},
    mm::{stable_key::StableKey, stable_node::NodePage},
};
use kernel::{
    prelude::*,
    time::{Instant, Monotonic},
};

/// How many nodes are checked in one call.
pub(super) const ORPHANS_SWEEP: usize = 1024;

/// How many nodes of the full tree are checked in one call.
const PRUNE_SWEEP: usize = 256;

impl Core {
    /// Frees a stale node, and takes its rmap items off. Entries that say "merged" are corrected by the next
    /// scan.
    ///
    /// Does nothing if a folio still points at the node. May sleep.
    pub(super) fn release(&mut self, key: StableKey) {
        let Some(node) = self.index.remove(key) else {
            return;
        };
        let items = node.items();
        match node.release() {
            Ok(()) => self.items = self.items.saturating_sub(items),
            // The node is not stale after all. Without memory to index it again, it is lost but harmless: the
            // drop leaks it, and logs that.
            Err(node) => {
                if self.index.insert(key, node, GFP_KERNEL).is_ok() && items != 0 {
                    self.index.move_to_stable(key);
                    if items >= self.settings.max_sharing() {
                        self.index.set_full(key);
                    }
                }
            }
        }
    }

    /// Checks up to `max` orphans, and frees those whose page is gone. The next call continues where this one
    /// ends.
    ///
    /// An orphan whose page is still mapped, or in the swap cache, stays. With `force` these go as well. They
    /// may be mapped by unregistered processes, the other half of a fork.
    pub(super) fn sweep_orphans(&mut self, max: usize, force: bool) {
        let mut next = self.index.next_orphan(self.swept);
        for _ in 0..max {
            let Some(key) = next else {
                break;
            };
            self.swept = Some(key);
            next = self.index.next_orphan(self.swept);
            self.try_free_orphan(key, force);
            crate::mm::cond_resched();
        }
        if next.is_none() {
            self.swept = None;
        }
    }

    /// Frees stale nodes of the stable tree and the full tree, at most [`ORPHANS_SWEEP`] of them. Returns where
    /// to continue, if there are more nodes.
    pub(super) fn release_some_stale(&mut self, mut at: Released) -> Option<Released> {
        for _ in 0..ORPHANS_SWEEP {
            let next = match at.full {
                true => self.index.next_full(at.after),
                false => self.index.next_node(at.after),
            };
            match next {
                Some(key) => {
                    at.after = Some(key);
                    self.release_if_stale(key);
                }
                None if at.full => return None,
                None => at = Released::full(),
            }
        }
        Some(at)
    }

    /// Prunes stale nodes from the full tree. Checks up to `max` nodes. The next call continues where this one
    /// ends.
    ///
    /// Lookups never visit this tree, so stale nodes in it are only noticed here or when a former sharer is
    /// scanned.
    fn prune(&mut self, max: usize) {
        let mut next = self.index.next_full(self.pruned);
        for _ in 0..max {
            let Some(key) = next else {
                break;
            };
            self.pruned = Some(key);
            next = self.index.next_full(self.pruned);
            self.release_if_stale(key);
        }
        if next.is_none() {
            self.pruned = None;
        }
    }

    /// Calls [`Self::prune`]. Begins at the start of the tree only if `pause` milliseconds have passed since it
    /// last did.
    pub(super) fn prune_after(&mut self, pause: u32) {
        if self.pruned.is_none() {
            let over = |began: Instant<Monotonic>| began.elapsed().as_millis() >= i64::from(pause);
            if !self.prune_began.is_none_or(over) {
                return;
            }
            self.prune_began = Some(Instant::now());
        }
        self.prune(PRUNE_SWEEP);
    }

    /// Frees a node with listed mappings if it is stale.
    fn release_if_stale(&mut self, key: StableKey) {
        if self
            .index
            .node(key)
            .is_some_and(|node| node.page().is_none())
        {
            self.release(key);
        }
        crate::mm::cond_resched();
    }

    /// Checks that the page of each orphan behind `after` is unlocked. A task that held the lock earlier has
    /// released it by then.
    ///
    /// Checks up to [`ORPHANS_SWEEP`] orphans. Returns the last one, or `None` at the end of the tree; `Err`
    /// with the last one before a page that is locked.
    pub(super) fn see_unlocked(
        &self,
        after: Option<StableKey>,
    ) -> Result<Option<StableKey>, Option<StableKey>> {
        let mut last = after;
        for _ in 0..ORPHANS_SWEEP {
            let Some(key) = self.index.next_orphan(last) else {
                return Ok(None);
            };
            let node = self.index.node(key);
            if node.is_some_and(|node| matches!(node.locked_page(), NodePage::Busy)) {
                return Err(last);
            }
            last = Some(key);
            crate::mm::cond_resched();
        }
        Ok(last)
    }

    /// Frees an orphan, unless its page is mapped or in the swap cache. With `force`, frees it in that case,
    /// too.
    ///
    /// If another task has the page locked, the orphan stays.
    pub(super) fn try_free_orphan(&mut self, key: StableKey, force: bool) {
        let Some(node) = self.index.node(key).filter(|node| node.items() == 0) else {
            return;
        };
        let gone = match node.page() {
            None => true,
            Some(page) if !force && (page.is_mapped() || page.is_swapcache()) => false,
            Some(page) => {
                drop(page);
                node.clear_stable_node(force)
            }
        };
        if gone {
            self.release(key);
        }
    }

    /// Frees orphans whose pages are not mapped, up to [`ORPHANS_SWEEP`] of them. Returns whether no node of
    /// any kind is left.
    pub(super) fn release_unused(&mut self) -> bool {
        let mut next = self.index.next_orphan(None);
        for _ in 0..ORPHANS_SWEEP {
            let Some(key) = next else {
                break;
            };
            next = self.index.next_orphan(Some(key));
            if self
                .index
                .node(key)
                .is_some_and(|node| node.clear_stable_node(false))
            {
                self.release(key);
            }
            crate::mm::cond_resched();
        }
        self.swept = None;
        self.index.has_no_nodes()
    }

    /// Gives a node with listed mappings another checksum. Nothing changes on failure.
    pub(super) fn rekey(&mut self, key: StableKey, sum: Checksum) -> Result {
        let key = self.index.rekey(key, sum, GFP_SCAN)?;
        if let Some(node) = self.index.node(key) {
            node.set_key(key);
            // The items get the sample of the new key, so that the filter finds an equal for pages that have
            // it.
            let filter = &mut self.filter;
            node.set_samples(sum.sample(), |old| {
                filter.remove(old);
                filter.add(sum.sample());
            });
            self.retry_seq = self.retry_seq.wrapping_add(1);
        }
        Ok(())
    }

    /// Computes the missing checksums of KSM pages with this sample, and gives their nodes new keys, so that
    /// other content with this sample can be told apart.
    ///
    /// Does so for [`MAX_COMPARES`] nodes at most, as there may be any number.
    pub(super) fn find_sums(&mut self, hasher: &Hasher, sample: Sample) {
        for _ in 0..MAX_COMPARES {
            let Some(key) = self.index.any_stable(Checksum::unknown(sample)) else {
                break;
            };
            let Some(node) = self.index.node(key) else {
                break;
            };
            let Some(page) = node.page() else {
                self.release(key);
                continue;
            };
            let sum = if page.is_poisoned() {
                // No process may read the page or merge into it any more. Give it any checksum, so that it does
                // not hold up the other nodes.
                Checksum::new(sample, 0)
            } else {
                // The page is write-protected everywhere, so it keeps this checksum as long as it is merged.
                page.checksum(hasher)
            };
            drop(page);
            if self.rekey(key, sum).is_err() {
                return self.bump_retry_seq();
            }
        }
    }
}
