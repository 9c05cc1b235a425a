// SPDX-License-Identifier: GPL-2.0

//! Merged pages that were migrated to another NUMA node.
//!
//! With `merge_across_nodes` 0, a sample depends on the NUMA node of the page. So the key of such a page's node
//! is outdated, and equal pages on its new NUMA node do not find it.

use super::{stable_tree::ORPHANS_SWEEP, state::Core};
use crate::{
    hash::Hasher,
    mm::{stable_key::StableKey, stable_node::NodeBox},
};

impl Core {
    /// Gives new keys to stable nodes whose pages were migrated to another NUMA node.
    ///
    /// Checks up to [`ORPHANS_SWEEP`] nodes in one call. Returns whether it has checked all of them.
    pub(super) fn rekey_migrated_nodes(&mut self, hasher: &Hasher) -> bool {
        for _ in 0..ORPHANS_SWEEP {
            let (full, after) = self.rekeyed_to;
            let next = match full {
                true => self.index.next_full(after),
                false => self.index.next_node(after),
            };
            let Some(key) = next else {
                self.rekeyed_to = (!full, None);
                if full {
                    return true;
                }
                continue;
            };
            self.rekeyed_to = (full, Some(key));
            if self.index.node(key).is_some_and(NodeBox::take_nid_changed) {
                self.rekey_migrated_node(hasher, key);
            }
            crate::mm::cond_resched();
        }
        false
    }

    /// Gives a stable node the key for the NUMA node that its page is on now.
    fn rekey_migrated_node(&mut self, hasher: &Hasher, key: StableKey) {
        let Some(node) = self.index.node(key) else {
            return;
        };
        // The page is write-protected everywhere, so its sample can differ from that of the key only by the
        // NUMA node.
        let Some(page) = node.page() else {
            return self.release(key);
        };
        if page.is_poisoned() {
            return;
        }
        let sample = page.sample(hasher);
        drop(page);
        if sample == key.sum.sample() {
            return;
        }
        if self.rekey(key, key.sum.with_sample(sample)).is_err() {
            // There is no memory. The next pass tries again.
            if let Some(node) = self.index.node(key) {
                node.set_nid_changed();
            }
        }
    }
}
