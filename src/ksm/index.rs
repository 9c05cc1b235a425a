// SPDX-License-Identifier: GPL-2.0

//! The trees of stable nodes, in which equal KSM pages are found.
//!
//! Nodes stand in the stable tree, the full tree or the orphans. All are keyed by checksum, which was recorded
//! when the page was hashed. Descents read no page, and the trees survive from pass to pass.
//!
//! As long as no two pages with one sample are known to differ, their checksums are not computed. Their keys
//! are [`Checksum::unknown`] then.
//!
//! This is a plain data structure. It takes no locks, and sleeps only if the flags of an allocation allow it.

use crate::{
    hash::{Checksum, Sample},
    mm::stable_key::StableKey,
};
use core::mem::size_of;
use kernel::{
    alloc::Flags,
    prelude::*,
    rbtree::{RBTree, RBTreeNode, RBTreeNodeReservation},
};

/// The result of [`Index::nodes_like`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NodesLike {
    /// No node has this sample, except perhaps full ones whose checksum is unknown.
    None,
    /// All nodes with this sample have one checksum.
    Unique(Nodes),
    /// Nodes with this sample have different checksums, or all of them are full.
    Ambiguous,
}

/// The nodes with one checksum that have room for another mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Nodes {
    /// A single node.
    One(StableKey),
    /// Two or more nodes with this checksum.
    Several(Checksum),
}

impl Nodes {
    /// Returns the checksum that they have.
    pub(crate) fn sum(self) -> Checksum {
        match self {
            Self::One(key) => key.sum,
            Self::Several(sum) => sum,
        }
    }
}

/// The most stable nodes with one checksum that a page is compared with. So crafted collisions cannot keep the
/// thread busy.
pub(crate) const MAX_COMPARES: usize = 8;

/// The trees of nodes for one set of pages that may merge with each other. `N` is a stable node.
///
/// # Examples
///
/// A merged page has a node in the stable tree:
///
/// ```
/// use crate::{
///     hash::{Checksum, Sample},
///     ksm::index::{Index, Nodes},
/// };
/// use kernel::prelude::*;
///
/// let mut index = Index::new();
/// let sum = Checksum::unknown(Sample::from_raw(1));
///
/// // A new node is an orphan. Lookups find it as soon as a mapping of its page is listed.
/// let key = index.new_key(sum);
/// index.insert(key, "node", GFP_KERNEL)?;
/// assert_eq!(index.nodes_with(sum), None);
/// index.move_to_stable(key);
/// assert_eq!(index.nodes_with(sum), Some(Nodes::One(key)));
///
/// // Its page has `max_page_sharing` mappings: the next page with this content needs another node.
/// index.set_full(key);
/// assert_eq!(index.nodes_with(sum), None);
/// let dup = index.new_key(sum);
/// index.insert(dup, "dup", GFP_KERNEL)?;
/// index.move_to_stable(dup);
/// assert_eq!(index.nodes_with(sum), Some(Nodes::One(dup)));
/// assert_eq!((index.chains(), index.dups()), (1, 2));
///
/// // The last listed mapping of the first page is gone.
/// index.move_to_orphans(key);
/// assert_eq!((index.stable_len(), index.orphans_len()), (1, 1));
/// assert_eq!(index.remove(key), Some("node"));
/// # Ok::<(), Error>(())
/// ```
pub(crate) struct Index<N> {
    /// Nodes that have a listed mapping, and room for another one.
    stable: RBTree<StableKey, N>,
    /// Nodes with as many mappings as allowed. They stand apart, so that a search for a node with room never
    /// visits them, however many there are.
    full: RBTree<StableKey, N>,
    /// How many nodes are in these two trees.
    stable_len: usize,
    /// How many checksums more than one node of these two trees has.
    chains: usize,
    /// How many nodes have one of these checksums.
    dups: usize,
    /// Nodes without listed mappings. Their page is free, about to be, in the swap cache, or mapped only by a
    /// child that was forked since the last pass. No page is merged with them.
    orphans: RBTree<StableKey, N>,
    /// How many nodes are orphans.
    orphans_len: usize,
    /// The serial number of the next key.
    next_serial: u64,
}

impl<N> Index<N> {
    /// Creates an index without nodes.
    pub(crate) fn new() -> Self {
        Self {
            stable: RBTree::new(),
            full: RBTree::new(),
            stable_len: 0,
            chains: 0,
            dups: 0,
            orphans: RBTree::new(),
            orphans_len: 0,
            next_serial: u64::MAX,
        }
    }

    /// Returns how many nodes have listed mappings.
    pub(crate) fn stable_len(&self) -> usize {
        self.stable_len
    }

    /// Returns how many chains there are: checksums that more than one node with listed mappings has.
    pub(crate) fn chains(&self) -> usize {
        self.chains
    }

    /// Returns how many dups there are: nodes that are part of a chain.
    pub(crate) fn dups(&self) -> usize {
        self.dups
    }

    /// Returns how many nodes have no listed mappings.
    pub(crate) fn orphans_len(&self) -> usize {
        self.orphans_len
    }

    /// Returns the size of the index in bytes, without the allocator's overhead. Each `N` takes `node` bytes
    /// besides its place in a tree.
    pub(crate) fn bytes(&self, node: usize) -> usize {
        // `struct rb_node`. Key and value follow it.
        const LINKS: usize = 3 * size_of::<usize>();
        let node = LINKS + size_of::<StableKey>() + size_of::<N>() + node;
        let nodes = self.stable_len.saturating_add(self.orphans_len);
        nodes.saturating_mul(node)
    }

    /// Whether there is no node in any tree.
    pub(crate) fn has_no_nodes(&self) -> bool {
        self.stable_len == 0 && self.orphans_len == 0
    }

    /// Returns a key that no node has.
    pub(crate) fn new_key(&mut self, sum: Checksum) -> StableKey {
        let serial = self.next_serial;
        self.next_serial = serial.wrapping_sub(1);
        StableKey { sum, serial }
    }

    /// Adds a node without mappings to the orphans, under its key. The tree is unchanged on failure.
    pub(crate) fn insert(&mut self, key: StableKey, node: N, flags: Flags) -> Result {
        let node = RBTreeNode::new(key, node, flags)?;
        if self.orphans.insert(node).is_none() {
            self.orphans_len = self.orphans_len.saturating_add(1);
        }
        Ok(())
    }

    /// Returns the key of the first node with checksum `sum` behind `after` that has room.
    pub(crate) fn next_stable(&self, sum: Checksum, after: Option<StableKey>) -> Option<StableKey> {
        next_of(&self.stable, sum, after)
    }

    /// Returns the key of a node with checksum `sum`, with or without room.
    pub(crate) fn any_stable(&self, sum: Checksum) -> Option<StableKey> {
        next_of(&self.stable, sum, None).or_else(|| next_of(&self.full, sum, None))
    }

    /// Returns the nodes with checksum `sum` that have room.
    pub(crate) fn nodes_with(&self, sum: Checksum) -> Option<Nodes> {
        let cursor = self
            .stable
            .cursor_lower_bound(&StableKey { sum, serial: 0 })?;
        let first = *cursor.current().0;
        if first.sum != sum {
            return None;
        }
        Some(match cursor.peek_next() {
            Some((next, _)) if next.sum == sum => Nodes::Several(sum),
            _ => Nodes::One(first),
        })
    }

    /// Returns up to [`MAX_COMPARES`] nodes with checksum `sum` that have room, the one with the most mappings
    /// first.
    ///
    /// In that order the others have a chance to become empty. `mappings` returns the number of a node's
    /// mappings.
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
            let count = self.stable.get(&key).map_or(0, &mappings);
            *place = Some((core::cmp::Reverse(count), key));
        }
        // The newest of several nodes with equally many mappings comes first. Sorting a slice might panic, so
        // do not.
        [(); MAX_COMPARES].map(|()| {
            let first = found.iter_mut().filter(|node| node.is_some()).min()?;
            first.take().map(|(_, key)| key)
        })
    }

    /// Returns the nodes with this sample that have room, if all nodes with the sample have one checksum.
    ///
    /// If only full nodes have the sample, the result is [`NodesLike::None`] as long as their checksum is
    /// unknown. Otherwise it is [`NodesLike::Ambiguous`]: the checksum of the page has to be computed.
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

    /// Gives a node with listed mappings another checksum, and returns its new key. The trees are unchanged on
    /// failure.
    ///
    /// # Errors
    ///
    /// `ENOMEM` if there is no memory, `ENOENT` if no node with listed mappings has this key.
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
        // No other node has this key, because no serial number is used twice.
        let node = reservation.into_node(key, node);
        if is_full {
            self.full.insert(node);
        } else {
            self.stable.insert(node);
        }
        Ok(key)
    }

    /// Returns the node with this key, in any of the trees.
    pub(crate) fn node(&self, key: StableKey) -> Option<&N> {
        self.stable
            .get(&key)
            .or_else(|| self.full.get(&key))
            .or_else(|| self.orphans.get(&key))
    }

    /// Removes a node from the index, and returns it.
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

    /// Moves a node to the orphans, after it has lost its last listed mapping. Does not allocate.
    pub(crate) fn move_to_orphans(&mut self, key: StableKey) {
        let known = self.stable.remove_node(&key);
        if let Some(node) = known.or_else(|| self.full.remove_node(&key)) {
            self.uncount(key.sum);
            self.orphans.insert(node);
            self.orphans_len = self.orphans_len.saturating_add(1);
        }
    }

    /// Moves a node from the orphans to the stable tree, if it is there: it has a listed mapping. Does not
    /// allocate.
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

    /// Moves a node to the full tree: it has as many mappings as allowed. Does not allocate.
    pub(crate) fn set_full(&mut self, key: StableKey) {
        if let Some(node) = self.stable.remove_node(&key) {
            self.full.insert(node);
        }
    }

    /// Moves a node back to the stable tree: it has room again. Does not allocate.
    pub(crate) fn set_not_full(&mut self, key: StableKey) {
        if let Some(node) = self.full.remove_node(&key) {
            self.stable.insert(node);
        }
    }

    /// Counts a node with listed mappings that is about to be inserted.
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

    /// Counts one less, after a node with listed mappings was removed.
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

    /// Returns how many nodes with listed mappings have checksum `sum`, or 2 if there are more.
    fn up_to_two(&self, sum: Checksum) -> usize {
        let in_tree = |tree: &RBTree<StableKey, N>| {
            let Some(cursor) = tree.cursor_lower_bound(&StableKey { sum, serial: 0 }) else {
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

    /// Returns the key of the first orphan behind `after`.
    pub(crate) fn next_orphan(&self, after: Option<StableKey>) -> Option<StableKey> {
        next_key(&self.orphans, after)
    }

    /// Returns the key of the first node in the stable tree behind `after`, of any checksum.
    pub(crate) fn next_node(&self, after: Option<StableKey>) -> Option<StableKey> {
        next_key(&self.stable, after)
    }

    /// Returns the key of the first node in the full tree behind `after`, of any checksum.
    pub(crate) fn next_full(&self, after: Option<StableKey>) -> Option<StableKey> {
        next_key(&self.full, after)
    }
}

/// Returns the key of the first node in `tree` with checksum `sum` behind `after`.
fn next_of<N>(
    tree: &RBTree<StableKey, N>,
    sum: Checksum,
    after: Option<StableKey>,
) -> Option<StableKey> {
    let from = match after {
        Some(key) => StableKey {
            sum,
            serial: key.serial.checked_add(1)?,
        },
        None => StableKey { sum, serial: 0 },
    };
    let cursor = tree.cursor_lower_bound(&from)?;
    let (key, _) = cursor.current();
    (key.sum == sum).then_some(*key)
}

/// Does the work of [`Index::nodes_like`] for one tree.
fn like<N>(tree: &RBTree<StableKey, N>, sample: Sample) -> NodesLike {
    let from = StableKey {
        sum: Checksum::unknown(sample),
        serial: 0,
    };
    let is_like = |key: &StableKey| key.sum.sample() == sample;
    let Some(cursor) = tree.cursor_lower_bound(&from) else {
        return NodesLike::None;
    };
    let first = *cursor.current().0;
    if !is_like(&first) {
        return NodesLike::None;
    }
    // Usually it is the only node with this sample.
    match cursor.peek_next() {
        Some((next, _)) if is_like(next) => {
            let is_ambiguous = next.sum != first.sum
                || first.sum.successor().is_some_and(|sum| {
                    tree.cursor_lower_bound(&StableKey { sum, serial: 0 })
                        .is_some_and(|other| is_like(other.current().0))
                });
            if is_ambiguous {
                NodesLike::Ambiguous
            } else {
                NodesLike::Unique(Nodes::Several(first.sum))
            }
        }
        _ => NodesLike::Unique(Nodes::One(first)),
    }
}

/// Returns the first key in `tree` behind `after`.
fn next_key<N>(tree: &RBTree<StableKey, N>, after: Option<StableKey>) -> Option<StableKey> {
    let cursor = match after {
        None => tree.cursor_front(),
        Some(key) => match key.serial.checked_add(1) {
            Some(serial) => tree.cursor_lower_bound(&StableKey { serial, ..key }),
            None => tree.cursor_lower_bound(&StableKey {
                sum: key.sum.successor()?,
                serial: 0,
            }),
        },
    };
    cursor.map(|at| *at.current().0)
}

/// How far a search of all nodes for stale ones has come: the tree, and the last node that was checked.
#[derive(Clone, Copy)]
pub(super) struct Released {
    pub(super) full: bool,
    pub(super) after: Option<StableKey>,
}

impl Released {
    /// The start of the stable tree.
    pub(super) const fn nothing() -> Self {
        Self {
            full: false,
            after: None,
        }
    }

    /// The start of the full tree.
    pub(super) const fn full() -> Self {
        Self {
            full: true,
            after: None,
        }
    }
}
