// SPDX-License-Identifier: GPL-2.0

//! The life of a stable node: noticing that its page is gone, freeing it, giving it another key.

/// How far freeing the nodes whose pages are gone has come: in which tree, and behind which node.
use super::{index::MAX_COMPARES, Core, GFP_SCAN};
use crate::{
    hash::{Checksum, Hasher, Sample},
    mm::{stable_key::StableKey, stable_node::NodePage},
};
use kernel::{
    prelude::*,
    time::{Instant, Monotonic},
};

#[derive(Clone, Copy)]
pub(super) struct Released {
    full: bool,
    after: Option<StableKey>,
}

impl Released {
    pub(super) const fn nothing() -> Self {
        Self {
            full: false,
            after: None,
        }
    }

    const fn full() -> Self {
        Self {
            full: true,
            after: None,
        }
    }
}

/// How many nodes to look at in one round.
pub(super) const ORPHANS_SWEEP: usize = 1024;

/// The same for nodes whose pages are mapped as often as they may be.
const PRUNE_SWEEP: usize = 256;

impl Core {
    /// Frees a stale node. Pages that were on it find out when they are looked at.
    pub(super) fn release(&mut self, key: StableKey) {
        let Some(node) = self.index.remove(key) else {
            return;
        };
        let items = node.items();
        match node.release() {
            Ok(()) => self.items = self.items.saturating_sub(items),
            // Not stale after all. Without memory to index it, it is lost but harmless: dropping
            // it says so in the log.
            Err(node) => {
                if self.index.insert(key, node, GFP_KERNEL).is_ok() && items != 0 {
                    self.index.move_to_stable(key);
                    if items >= self.max_sharing {
                        self.index.set_full(key);
                    }
                }
            }
        }
    }

    /// Frees nodes without known mappings whose pages are gone: all of them, or some each time. With
    /// `force`, also those whose pages are left in the swap cache, or mapped by processes that are
    /// not registered (a fork's other half).
    pub(super) fn sweep_orphans(&mut self, most: usize, force: bool) {
        let mut next = self.index.next_orphan(self.swept);
        for _ in 0..most {
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

    /// Frees some of the nodes with known mappings whose pages are gone, and whose items nobody looked at since.
    /// Returns where to go on, if there are more.
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

    /// Frees nodes whose pages are gone, of those that take no other page: nobody comes by these but who
    /// maps them. Looks at some each time.
    fn prune(&mut self, most: usize) {
        let mut next = self.index.next_full(self.pruned);
        for _ in 0..most {
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

    /// Does so, beginning again when `pause` milliseconds are over since that was done last.
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

    /// Whether the pages of all nodes without known mappings have been unlocked at least once, of those behind
    /// `after` at which it looks this time. Returns the last one of these; `Err`: that one is locked.
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

    /// Frees a node without known mappings if its page is gone.
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

    /// Frees nodes without known mappings, some each time. Returns whether none is left.
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

    /// Gives a node with known mappings another checksum. Nothing is changed on failure.
    pub(super) fn rekey(&mut self, key: StableKey, sum: Checksum) -> Result {
        let key = self.index.rekey(key, sum, GFP_SCAN)?;
        if let Some(node) = self.index.node(key) {
            node.set_key(key);
            // Pages that come from now on have an equal in these.
            let filter = &mut self.filter;
            node.set_samples(sum.sample(), |old| {
                filter.remove(old);
                filter.add(sum.sample());
            });
            self.retry_seq = self.retry_seq.wrapping_add(1);
        }
        Ok(())
    }

    /// Computes the checksums of merged pages with this sample that were merged without, so that pages
    /// which are not like them can be told apart. A few at a time, as there may be any number.
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
                // Nobody is to read it or join it any more; so that it does not stand in the way of the
                // others, any checksum will do.
                Checksum::new(sample, 0)
            } else {
                // Write-protected wherever it is mapped, so this is the checksum as long as it is merged.
                page.checksum(hasher)
            };
            drop(page);
            if self.rekey(key, sum).is_err() {
                return self.bump_retry_seq();
            }
        }
    }
}
