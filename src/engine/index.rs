// SPDX-License-Identifier: GPL-2.0

//! The trees in which equal pages are found.
//!
//! Both are keyed by checksum, recorded when the page was hashed: a page that changes makes its entry
//! useless, but never a tree wrong. Nothing is thrown away between passes.
//!
//! As long as no two pages with the same sample are known to differ, nobody computes the checksum: they
//! are all entered under [`Checksum::unknown`].

use super::checksum::{Checksum, Sample};
use core::mem::size_of;
use kernel::{
    alloc::Flags,
    prelude::*,
    rbtree::{Entry, RBTree, RBTreeNode, RBTreeNodeReservation},
};

/// Numbers a registered address space; never used twice.
pub(crate) type SlotId = u64;

/// The key of a stable node. Nodes with the same checksum (different content, or more sharers than
/// one node takes) differ in `nth`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct StableKey {
    /// The checksum that the page had when it was about to be merged. Only if it changed in that very
    /// moment is it that of other content; then the node is found in vain, or not at all.
    pub(crate) sum: Checksum,
    /// Numbers all nodes ever made, downwards: the newest is found first, as it is the one that most
    /// likely takes another page.
    pub(crate) nth: u64,
}

/// Where a page is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// The address space.
    pub(crate) slot: SlotId,
    /// The address, page aligned.
    pub(crate) addr: usize,
}

/// What [`Index::nodes_like`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NodesLike {
    /// No node.
    None,
    /// Nodes with one checksum, of which this is the first.
    Alike(StableKey),
    /// Nodes with more than one checksum.
    Various,
}

/// The most stable nodes of one checksum that are looked at for a page, so that nobody can craft
/// collisions that keep the thread busy.
pub(crate) const MAX_COMPARES: usize = 8;

/// The most places that are mapped to one merged page. More of them make walking all mappings of the
/// page, which the kernel does under its lock, take too long (the default of in-tree KSM's
/// `max_page_sharing`).
pub(crate) const MAX_SHARING: usize = 256;

/// The index of one set of pages that may be merged with each other.
pub(crate) struct Index<N> {
    /// Nodes with at least one known mapping.
    stable: RBTree<StableKey, N>,
    stable_len: usize,
    /// Nodes without known mappings: stale, or soon to be, or mapped by a child that was forked
    /// since the last pass. No page is merged with these.
    limbo: RBTree<StableKey, N>,
    limbo_len: usize,
    /// Pages that have no equal yet, by checksum; one page for each.
    unstable: RBTree<Checksum, Place>,
    unstable_len: usize,
    next_nth: u64,
}

impl<N> Index<N> {
    /// An index of nothing.
    pub(crate) fn new() -> Self {
        Self {
            stable: RBTree::new(),
            stable_len: 0,
            limbo: RBTree::new(),
            limbo_len: 0,
            unstable: RBTree::new(),
            unstable_len: 0,
            next_nth: u64::MAX,
        }
    }

    /// How many nodes have known mappings.
    pub(crate) fn stable_len(&self) -> usize {
        self.stable_len
    }

    /// How many nodes have none.
    pub(crate) fn limbo_len(&self) -> usize {
        self.limbo_len
    }

    /// How many pages are in the unstable tree.
    pub(crate) fn unstable_len(&self) -> usize {
        self.unstable_len
    }

    /// The memory that it takes, in bytes, without the allocator's own overhead, if each `N` takes `node`
    /// besides its place in a tree.
    pub(crate) fn bytes(&self, node: usize) -> usize {
        // `struct rb_node`, then key and value.
        const LINKS: usize = 3 * size_of::<usize>();
        let node = LINKS + size_of::<StableKey>() + size_of::<N>() + node;
        let place = LINKS + size_of::<Checksum>() + size_of::<Place>();
        let nodes = self.stable_len.saturating_add(self.limbo_len);
        nodes
            .saturating_mul(node)
            .saturating_add(self.unstable_len.saturating_mul(place))
    }

    /// Whether there is no node at all.
    pub(crate) fn has_no_nodes(&self) -> bool {
        self.stable_len == 0 && self.limbo_len == 0
    }

    /// A key that no node has.
    pub(crate) fn new_key(&mut self, sum: Checksum) -> StableKey {
        let nth = self.next_nth;
        self.next_nth = nth.wrapping_sub(1);
        StableKey { sum, nth }
    }

    /// Adds a node without mappings under its key, to limbo. The tree is unchanged on failure.
    pub(crate) fn insert(&mut self, key: StableKey, node: N, flags: Flags) -> Result {
        let node = RBTreeNode::new(key, node, flags)?;
        if self.limbo.insert(node).is_none() {
            self.limbo_len = self.limbo_len.saturating_add(1);
        }
        Ok(())
    }

    /// The key of the first node with checksum `sum` behind `after`.
    pub(crate) fn next_stable(&self, sum: Checksum, after: Option<StableKey>) -> Option<StableKey> {
        let from = match after {
            Some(key) => StableKey {
                sum,
                nth: key.nth.checked_add(1)?,
            },
            None => StableKey { sum, nth: 0 },
        };
        let cursor = self.stable.cursor_lower_bound(&from)?;
        let (key, _) = cursor.current();
        (key.sum == sum).then_some(*key)
    }

    /// Whether there are nodes whose pages have this sample, and if they all have the same checksum, the
    /// key of the first one.
    pub(crate) fn nodes_like(&self, sample: Sample) -> NodesLike {
        let from = StableKey {
            sum: Checksum::unknown(sample),
            nth: 0,
        };
        let is_like = |key: &StableKey| key.sum.sample() == sample;
        let Some(cursor) = self.stable.cursor_lower_bound(&from) else {
            return NodesLike::None;
        };
        let first = *cursor.current().0;
        if !is_like(&first) {
            return NodesLike::None;
        }
        // Most often it is the only one.
        let various = match cursor.peek_next() {
            Some((next, _)) if is_like(next) => first.sum.successor().is_some_and(|sum| {
                self.stable
                    .cursor_lower_bound(&StableKey { sum, nth: 0 })
                    .is_some_and(|other| is_like(other.current().0))
            }),
            _ => false,
        };
        if various {
            NodesLike::Various
        } else {
            NodesLike::Alike(first)
        }
    }

    /// Gives a node with known mappings another checksum. The tree is unchanged on failure.
    pub(crate) fn rekey(
        &mut self,
        key: StableKey,
        sum: Checksum,
        flags: Flags,
    ) -> Result<StableKey> {
        let reservation = RBTreeNodeReservation::new(flags)?;
        let node = self.stable.remove(&key).ok_or(ENOENT)?;
        let key = StableKey { sum, ..key };
        // Numbers are never used twice, so there is no other node with this key.
        self.stable.insert(reservation.into_node(key, node));
        Ok(key)
    }

    /// The node with this key, in whichever tree it is.
    pub(crate) fn node(&self, key: StableKey) -> Option<&N> {
        self.stable.get(&key).or_else(|| self.limbo.get(&key))
    }

    /// Takes a node out of the index.
    pub(crate) fn remove(&mut self, key: StableKey) -> Option<N> {
        if let Some(node) = self.stable.remove(&key) {
            self.stable_len = self.stable_len.saturating_sub(1);
            return Some(node);
        }
        let node = self.limbo.remove(&key)?;
        self.limbo_len = self.limbo_len.saturating_sub(1);
        Some(node)
    }

    /// Marks a node as one without known mappings. Does not allocate.
    pub(crate) fn move_to_limbo(&mut self, key: StableKey) {
        if let Some(node) = self.stable.remove_node(&key) {
            self.stable_len = self.stable_len.saturating_sub(1);
            self.limbo.insert(node);
            self.limbo_len = self.limbo_len.saturating_add(1);
        }
    }

    /// Marks a node as one with known mappings. Does not allocate.
    pub(crate) fn move_to_stable(&mut self, key: StableKey) {
        if self.limbo_len == 0 {
            return;
        }
        if let Some(node) = self.limbo.remove_node(&key) {
            self.limbo_len = self.limbo_len.saturating_sub(1);
            self.stable.insert(node);
            self.stable_len = self.stable_len.saturating_add(1);
        }
    }

    /// The key of the first node without known mappings behind `after`.
    pub(crate) fn next_limbo(&self, after: Option<StableKey>) -> Option<StableKey> {
        next_key(&self.limbo, after)
    }

    /// The key of the first node with known mappings behind `after`, of whatever checksum.
    pub(crate) fn next_node(&self, after: Option<StableKey>) -> Option<StableKey> {
        next_key(&self.stable, after)
    }

    /// The page that waits under checksum `sum`.
    pub(crate) fn waiting(&self, sum: Checksum) -> Option<Place> {
        self.unstable.get(&sum).copied()
    }

    /// The checksum under which the first page with this sample waits, if any does.
    pub(crate) fn waiting_like(&self, sample: Sample) -> Option<Checksum> {
        let cursor = self
            .unstable
            .cursor_lower_bound(&Checksum::unknown(sample))?;
        let sum = *cursor.current().0;
        (sum.sample() == sample).then_some(sum)
    }

    /// Lets `place` wait under `sum`, instead of whoever did. Allocates only if nobody did.
    pub(crate) fn wait(&mut self, sum: Checksum, place: Place, flags: Flags) -> Result {
        match self.unstable.entry(sum) {
            Entry::Occupied(mut waiting) => *waiting.get_mut() = place,
            Entry::Vacant(nobody) => {
                nobody.insert(place, RBTreeNodeReservation::new(flags)?);
                self.unstable_len = self.unstable_len.saturating_add(1);
            }
        }
        Ok(())
    }

    /// Takes `place` out of the unstable tree, if it is what waits under `sum`.
    pub(crate) fn stop_waiting(&mut self, sum: Checksum, place: Place) {
        if let Some(waiting) = self.unstable.find_mut(&sum) {
            if *waiting.get() == place {
                waiting.remove();
                self.unstable_len = self.unstable_len.saturating_sub(1);
            }
        }
    }
}

fn next_key<N>(tree: &RBTree<StableKey, N>, after: Option<StableKey>) -> Option<StableKey> {
    let cursor = match after {
        None => tree.cursor_front(),
        Some(key) => match key.nth.checked_add(1) {
            Some(nth) => tree.cursor_lower_bound(&StableKey { nth, ..key }),
            None => tree.cursor_lower_bound(&StableKey {
                sum: key.sum.successor()?,
                nth: 0,
            }),
        },
    };
    cursor.map(|at| *at.current().0)
}
