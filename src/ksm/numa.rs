// SPDX-License-Identifier: GPL-2.0

//! Merged pages that were moved to another memory node.

use super::{stable_tree::ORPHANS_SWEEP, Core};
use crate::{
    hash::Hasher,
    mm::{stable_key::StableKey, stable_node::NodeBox},
};

impl Core {
    /// Finds merged pages that were moved to another memory node, and gives them keys under which pages of
    /// that one come by them. Looks at some each time. Returns whether it has come to the end.
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
            if self.index.node(key).is_some_and(NodeBox::take_strayed) {
                self.rekey_migrated_node(hasher, key);
            }
            crate::mm::cond_resched();
        }
        false
    }

    fn rekey_migrated_node(&mut self, hasher: &Hasher, key: StableKey) {
        let Some(node) = self.index.node(key) else {
            return;
        };
        // Write-protected wherever it is mapped, so its sample differs from the key's by the memory node
        // only.
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
            // Without memory the next pass tries again.
            if let Some(node) = self.index.node(key) {
                node.set_nid_changed();
            }
        }
    }
}
