// SPDX-License-Identifier: GPL-2.0

//! The trees in which equal pages are found.
//!
//! Both are keyed by checksum, recorded when the page was hashed: a page that changes makes its entry
//! useless, but never a tree wrong. Nothing is thrown away between passes.
//!
//! As long as no two pages with the same sample are known to differ, nobody computes the checksum: they
//! are all entered under [`Checksum::unknown`].

use crate::{
    hash::{Checksum, Sample},
    mm::stable_key::StableKey,
};
use core::mem::size_of;
use kernel::{
    alloc::Flags,
    prelude::*,
    rbtree::{Entry, RBTree, RBTreeNode, RBTreeNodeReservation},
};

/// Numbers a registered address space; never used twice.
pub(crate) type MmId = u64;

/// Where a page is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PageAddr {
    /// The address space.
    pub(crate) mm_id: MmId,
    /// The address, page aligned.
    pub(crate) addr: usize,
}

/// What [`Index::nodes_like`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NodesLike {
    /// No node.
    None,
    /// Nodes with one checksum.
    Unique(Nodes),
    /// Nodes with more than one checksum.
    Ambiguous,
}

/// Nodes of one checksum that take another page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Nodes {
    /// The only one.
    One(StableKey),
    /// More than one with this checksum.
    Several(Checksum),
}

impl Nodes {
    /// The checksum.
    pub(crate) fn sum(self) -> Checksum {
        match self {
            Self::One(key) => key.sum,
            Self::Several(sum) => sum,
        }
    }
}

/// The most stable nodes of one checksum that are looked at for a page, so that nobody can craft
/// collisions that keep the thread busy.
pub(crate) const MAX_COMPARES: usize = 8;

/// The index of one set of pages that may be merged with each other.
pub(crate) struct Index<N> {
    /// Nodes with at least one known mapping, whose pages may be mapped once more.
    stable: RBTree<StableKey, N>,
    /// Nodes whose pages are mapped as often as they may be. They stand apart so that looking for one
    /// that takes another page never comes by these, however many there are.
    full: RBTree<StableKey, N>,
    /// How many nodes are in these two.
    stable_len: usize,
    /// Checksums that more than one node in these two has, and how many nodes those are.
    chains: usize,
    dups: usize,
    /// Nodes without known mappings: stale, or soon to be, or mapped by a child that was forked
    /// since the last pass. No page is merged with these.
    orphans: RBTree<StableKey, N>,
    orphans_len: usize,
    /// Pages that have no equal yet, by checksum; one page for each.
    unstable: RBTree<Checksum, PageAddr>,
    unstable_len: usize,
    next_nth: u64,
}

impl<N> Index<N> {
    /// An index of nothing.
    pub(crate) fn new() -> Self {
        Self {
            stable: RBTree::new(),
            full: RBTree::new(),
            stable_len: 0,
            chains: 0,
            dups: 0,
            orphans: RBTree::new(),
            orphans_len: 0,
            unstable: RBTree::new(),
            unstable_len: 0,
            next_nth: u64::MAX,
        }
    }

    /// How many nodes have known mappings.
    pub(crate) fn stable_len(&self) -> usize {
        self.stable_len
    }

    /// How many checksums there are that more than one node with known mappings has: content that is mapped
    /// more often than one page may be.
    pub(crate) fn chains(&self) -> usize {
        self.chains
    }

    /// How many nodes have a checksum that others have, too.
    pub(crate) fn dups(&self) -> usize {
        self.dups
    }

    /// How many nodes have none.
    pub(crate) fn orphans_len(&self) -> usize {
        self.orphans_len
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
        let place = LINKS + size_of::<Checksum>() + size_of::<PageAddr>();
        let nodes = self.stable_len.saturating_add(self.orphans_len);
        nodes
            .saturating_mul(node)
            .saturating_add(self.unstable_len.saturating_mul(place))
    }

    /// Whether there is no node at all.
    pub(crate) fn has_no_nodes(&self) -> bool {
        self.stable_len == 0 && self.orphans_len == 0
    }

    /// A key that no node has.
    pub(crate) fn new_key(&mut self, sum: Checksum) -> StableKey {
        let nth = self.next_nth;
        self.next_nth = nth.wrapping_sub(1);
        StableKey { sum, nth }
    }

    /// Adds a node without mappings under its key, to the orphans. The tree is unchanged on failure.
    pub(crate) fn insert(&mut self, key: StableKey, node: N, flags: Flags) -> Result {
        let node = RBTreeNode::new(key, node, flags)?;
        if self.orphans.insert(node).is_none() {
            self.orphans_len = self.orphans_len.saturating_add(1);
        }
        Ok(())
    }

    /// The key of the first node with checksum `sum` behind `after` that takes another page.
    pub(crate) fn next_stable(&self, sum: Checksum, after: Option<StableKey>) -> Option<StableKey> {
        next_of(&self.stable, sum, after)
    }

    /// The key of a node with checksum `sum`, whether it takes another page or not.
    pub(crate) fn any_stable(&self, sum: Checksum) -> Option<StableKey> {
        next_of(&self.stable, sum, None).or_else(|| next_of(&self.full, sum, None))
    }

    /// The nodes with checksum `sum` that take another page.
    pub(crate) fn nodes_with(&self, sum: Checksum) -> Option<Nodes> {
        let cursor = self.stable.cursor_lower_bound(&StableKey { sum, nth: 0 })?;
        let first = *cursor.current().0;
        if first.sum != sum {
            return None;
        }
        Some(match cursor.peek_next() {
            Some((next, _)) if next.sum == sum => Nodes::Several(sum),
            _ => Nodes::One(first),
        })
    }

    /// Some nodes with checksum `sum` that take another page, those that are mapped most often first, so
    /// that the others have a chance to get empty. `mappings` says how often a node's page is mapped.
    pub(crate) fn by_mappings(
        &self,
        sum: Checksum,
        mappings: impl Fn(&N) -> usize,
    ) -> [Option<StableKey>; MAX_COMPARES] {
        let mut found = [None; MAX_COMPARES];
        let mut after = None;
        for place in &mut found {
            let Some(key) = self.next_stable(sum, after) else {
                break;
            };
            after = Some(key);
            let often = self.stable.get(&key).map_or(0, &mappings);
            *place = Some((core::cmp::Reverse(often), key));
        }
        // Of nodes that are mapped equally often, the newest is first. (Sorting a slice may panic.)
        [(); MAX_COMPARES].map(|()| {
            let first = found.iter_mut().filter(|node| node.is_some()).min()?;
            first.take().map(|(_, key)| key)
        })
    }

    /// Whether there are nodes whose pages have this sample, and if they all have the same checksum, those
    /// that take another page.
    pub(crate) fn nodes_like(&self, sample: Sample) -> NodesLike {
        let found = like(&self.stable, sample);
        if self.full.is_empty() {
            return found;
        }
        match (found, like(&self.full, sample)) {
            (found, NodesLike::None) => found,
            (NodesLike::None, NodesLike::Unique(full)) if full.sum().is_unknown() => {
                NodesLike::None
            }
            (NodesLike::Unique(nodes), NodesLike::Unique(full)) if nodes.sum() == full.sum() => {
                found
            }
            _ => NodesLike::Ambiguous,
        }
    }

    /// Gives a node with known mappings another checksum. The trees are unchanged on failure.
    pub(crate) fn rekey(
        &mut self,
        key: StableKey,
        sum: Checksum,
        flags: Flags,
    ) -> Result<StableKey> {
        let reservation = RBTreeNodeReservation::new(flags)?;
        let (node, is_full) = match self.stable.remove(&key) {
            Some(node) => (node, false),
            None => (self.full.remove(&key).ok_or(ENOENT)?, true),
        };
        self.uncount(key.sum);
        let key = StableKey { sum, ..key };
        self.count(sum);
        // Numbers are never used twice, so there is no other node with this key.
        let node = reservation.into_node(key, node);
        if is_full {
            self.full.insert(node);
        } else {
            self.stable.insert(node);
        }
        Ok(key)
    }

    /// The node with this key, in whichever tree it is.
    pub(crate) fn node(&self, key: StableKey) -> Option<&N> {
        self.stable
            .get(&key)
            .or_else(|| self.full.get(&key))
            .or_else(|| self.orphans.get(&key))
    }

    /// Takes a node out of the index.
    pub(crate) fn remove(&mut self, key: StableKey) -> Option<N> {
        let known = self.stable.remove(&key).or_else(|| self.full.remove(&key));
        if let Some(node) = known {
            self.uncount(key.sum);
            return Some(node);
        }
        let node = self.orphans.remove(&key)?;
        self.orphans_len = self.orphans_len.saturating_sub(1);
        Some(node)
    }

    /// Marks a node as one without known mappings. Does not allocate.
    pub(crate) fn move_to_orphans(&mut self, key: StableKey) {
        let known = self.stable.remove_node(&key);
        if let Some(node) = known.or_else(|| self.full.remove_node(&key)) {
            self.uncount(key.sum);
            self.orphans.insert(node);
            self.orphans_len = self.orphans_len.saturating_add(1);
        }
    }

    /// Marks a node as one with known mappings. Does not allocate.
    pub(crate) fn move_to_stable(&mut self, key: StableKey) {
        if self.orphans_len == 0 {
            return;
        }
        if let Some(node) = self.orphans.remove_node(&key) {
            self.orphans_len = self.orphans_len.saturating_sub(1);
            self.count(key.sum);
            self.stable.insert(node);
        }
    }

    /// Marks a node with known mappings as one whose page is mapped as often as it may be. Does not
    /// allocate.
    pub(crate) fn set_full(&mut self, key: StableKey) {
        if let Some(node) = self.stable.remove_node(&key) {
            self.full.insert(node);
        }
    }

    /// Marks a node with known mappings as one whose page may be mapped once more. Does not allocate.
    pub(crate) fn set_not_full(&mut self, key: StableKey) {
        if let Some(node) = self.full.remove_node(&key) {
            self.stable.insert(node);
        }
    }

    /// Counts a node with known mappings that is about to be inserted.
    fn count(&mut self, sum: Checksum) {
        self.stable_len = self.stable_len.saturating_add(1);
        match self.up_to_two(sum) {
            0 => {}
            1 => {
                self.chains = self.chains.saturating_add(1);
                self.dups = self.dups.saturating_add(2);
            }
            _ => self.dups = self.dups.saturating_add(1),
        }
    }

    /// Counts a node that had known mappings less, now that it was taken out.
    fn uncount(&mut self, sum: Checksum) {
        self.stable_len = self.stable_len.saturating_sub(1);
        match self.up_to_two(sum) {
            0 => {}
            1 => {
                self.chains = self.chains.saturating_sub(1);
                self.dups = self.dups.saturating_sub(2);
            }
            _ => self.dups = self.dups.saturating_sub(1),
        }
    }

    /// How many nodes with known mappings have checksum `sum`; 2 if there are more.
    fn up_to_two(&self, sum: Checksum) -> usize {
        let in_tree = |tree: &RBTree<StableKey, N>| {
            let Some(cursor) = tree.cursor_lower_bound(&StableKey { sum, nth: 0 }) else {
                return 0;
            };
            match (cursor.current().0, cursor.peek_next()) {
                (first, _) if first.sum != sum => 0,
                (_, Some((second, _))) if second.sum == sum => 2,
                _ => 1usize,
            }
        };
        in_tree(&self.stable).saturating_add(in_tree(&self.full))
    }

    /// The key of the first node without known mappings behind `after`.
    pub(crate) fn next_orphan(&self, after: Option<StableKey>) -> Option<StableKey> {
        next_key(&self.orphans, after)
    }

    /// The key of the first node with known mappings behind `after`, of whatever checksum, that takes
    /// another page.
    pub(crate) fn next_node(&self, after: Option<StableKey>) -> Option<StableKey> {
        next_key(&self.stable, after)
    }

    /// The key of the first node behind `after`, of whatever checksum, that takes no other page.
    pub(crate) fn next_full(&self, after: Option<StableKey>) -> Option<StableKey> {
        next_key(&self.full, after)
    }

    /// The page that waits under checksum `sum`.
    pub(crate) fn unstable_lookup(&self, sum: Checksum) -> Option<PageAddr> {
        self.unstable.get(&sum).copied()
    }

    /// The checksum under which the first page with this sample waits, if any does.
    pub(crate) fn unstable_lookup_sample(&self, sample: Sample) -> Option<Checksum> {
        let cursor = self
            .unstable
            .cursor_lower_bound(&Checksum::unknown(sample))?;
        let sum = *cursor.current().0;
        (sum.sample() == sample).then_some(sum)
    }

    /// Lets `place` wait under `sum`, instead of whoever did. Allocates only if nobody did.
    pub(crate) fn unstable_insert(
        &mut self,
        sum: Checksum,
        place: PageAddr,
        flags: Flags,
    ) -> Result {
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
    pub(crate) fn unstable_remove(&mut self, sum: Checksum, place: PageAddr) {
        if let Some(waiting) = self.unstable.find_mut(&sum) {
            if *waiting.get() == place {
                waiting.remove();
                self.unstable_len = self.unstable_len.saturating_sub(1);
            }
        }
    }
}

/// The key of the first node with checksum `sum` behind `after`.
fn next_of<N>(
    tree: &RBTree<StableKey, N>,
    sum: Checksum,
    after: Option<StableKey>,
) -> Option<StableKey> {
    let from = match after {
        Some(key) => StableKey {
            sum,
            nth: key.nth.checked_add(1)?,
        },
        None => StableKey { sum, nth: 0 },
    };
    let cursor = tree.cursor_lower_bound(&from)?;
    let (key, _) = cursor.current();
    (key.sum == sum).then_some(*key)
}

/// What one tree knows of nodes whose pages have this sample.
fn like<N>(tree: &RBTree<StableKey, N>, sample: Sample) -> NodesLike {
    let from = StableKey {
        sum: Checksum::unknown(sample),
        nth: 0,
    };
    let is_like = |key: &StableKey| key.sum.sample() == sample;
    let Some(cursor) = tree.cursor_lower_bound(&from) else {
        return NodesLike::None;
    };
    let first = *cursor.current().0;
    if !is_like(&first) {
        return NodesLike::None;
    }
    // Most often it is the only one.
    match cursor.peek_next() {
        Some((next, _)) if is_like(next) => {
            let various = next.sum != first.sum
                || first.sum.successor().is_some_and(|sum| {
                    tree.cursor_lower_bound(&StableKey { sum, nth: 0 })
                        .is_some_and(|other| is_like(other.current().0))
                });
            if various {
                NodesLike::Ambiguous
            } else {
                NodesLike::Unique(Nodes::Several(first.sum))
            }
        }
        _ => NodesLike::Unique(Nodes::One(first)),
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
