// SPDX-License-Identifier: GPL-2.0

//! Trees of owned nodes.
//!
//! Behind the kernel's interface is a sorted array of nodes: it needs no `Ord` where the kernel
//! needs none, its cursors are indices, and it is too simple to hide mistakes. Each node is an
//! allocation of the size that the kernel's has.

use crate::{
    alloc::{Flags, KBox},
    error::Result,
};
use std::mem::MaybeUninit;

/// A tree.
pub struct RBTree<K, V> {
    nodes: std::vec::Vec<KBox<Node<K, V>>>,
}

struct Node<K, V> {
    /// The room that `struct rb_node` takes.
    _links: [usize; 3],
    key: K,
    value: V,
}

impl<K, V> Node<K, V> {
    fn both(&self) -> (&K, &V) {
        (&self.key, &self.value)
    }

    fn both_mut(&mut self) -> (&K, &mut V) {
        (&self.key, &mut self.value)
    }
}

impl<K, V> RBTree<K, V> {
    /// An empty tree, without memory.
    pub fn new() -> Self {
        Self {
            nodes: std::vec::Vec::new(),
        }
    }

    /// Whether there is no node.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// The nodes, by key.
    pub fn iter(&self) -> Iter<'_, K, V> {
        Iter(self.nodes.iter())
    }

    /// The nodes, by key, with values to be changed.
    pub fn iter_mut(&mut self) -> IterMut<'_, K, V> {
        IterMut(self.nodes.iter_mut())
    }

    /// The keys in their order.
    pub fn keys(&self) -> impl Iterator<Item = &'_ K> {
        self.iter().map(|(key, _)| key)
    }

    /// The values, by key.
    pub fn values(&self) -> impl Iterator<Item = &'_ V> {
        self.iter().map(|(_, value)| value)
    }

    /// The values, by key, to be changed.
    pub fn values_mut(&mut self) -> impl Iterator<Item = &'_ mut V> {
        self.iter_mut().map(|(_, value)| value)
    }

    /// At the smallest key.
    pub fn cursor_front(&self) -> Option<Cursor<'_, K, V>> {
        self.cursor_at(0)
    }

    /// At the smallest key.
    pub fn cursor_front_mut(&mut self) -> Option<CursorMut<'_, K, V>> {
        self.cursor_at_mut(0)
    }

    /// At the largest key.
    pub fn cursor_back(&self) -> Option<Cursor<'_, K, V>> {
        self.cursor_at(self.nodes.len().checked_sub(1)?)
    }

    /// At the largest key.
    pub fn cursor_back_mut(&mut self) -> Option<CursorMut<'_, K, V>> {
        self.cursor_at_mut(self.nodes.len().checked_sub(1)?)
    }

    fn cursor_at(&self, at: usize) -> Option<Cursor<'_, K, V>> {
        (at < self.nodes.len()).then_some(Cursor { tree: self, at })
    }

    fn cursor_at_mut(&mut self, at: usize) -> Option<CursorMut<'_, K, V>> {
        (at < self.nodes.len()).then_some(CursorMut { tree: self, at })
    }

    fn take(&mut self, at: usize) -> RBTreeNode<K, V> {
        RBTreeNode {
            node: self.nodes.remove(at),
        }
    }
}

impl<K: Ord, V> RBTree<K, V> {
    /// Where `key` is, or else where it would go.
    fn search(&self, key: &K) -> core::result::Result<usize, usize> {
        self.nodes.binary_search_by(|node| node.key.cmp(key))
    }

    /// Inserts a new node and returns the one with the same key that it replaced.
    pub fn try_create_and_insert(
        &mut self,
        key: K,
        value: V,
        flags: Flags,
    ) -> Result<Option<RBTreeNode<K, V>>> {
        Ok(self.insert(RBTreeNode::new(key, value, flags)?))
    }

    /// Inserts a node and returns the one with the same key that it replaced.
    pub fn insert(&mut self, node: RBTreeNode<K, V>) -> Option<RBTreeNode<K, V>> {
        match self.search(&node.node.key) {
            Ok(at) => Some(RBTreeNode {
                node: std::mem::replace(&mut self.nodes[at], node.node),
            }),
            Err(at) => {
                self.nodes.insert(at, node.node);
                None
            }
        }
    }

    /// The place of `key`.
    pub fn entry(&mut self, key: K) -> Entry<'_, K, V> {
        match self.search(&key) {
            Ok(at) => Entry::Occupied(OccupiedEntry { tree: self, at }),
            Err(at) => Entry::Vacant(VacantEntry {
                tree: self,
                at,
                key,
            }),
        }
    }

    /// The place of `key`, if there is such a node.
    pub fn find_mut(&mut self, key: &K) -> Option<OccupiedEntry<'_, K, V>> {
        let at = self.search(key).ok()?;
        Some(OccupiedEntry { tree: self, at })
    }

    /// The value of `key`.
    pub fn get(&self, key: &K) -> Option<&V> {
        let at = self.search(key).ok()?;
        Some(&self.nodes[at].value)
    }

    /// The value of `key`, to be changed.
    pub fn get_mut(&mut self, key: &K) -> Option<&mut V> {
        self.find_mut(key).map(OccupiedEntry::into_mut)
    }

    /// Takes a node out.
    pub fn remove_node(&mut self, key: &K) -> Option<RBTreeNode<K, V>> {
        self.find_mut(key).map(OccupiedEntry::remove_node)
    }

    /// Takes a value out and frees its node.
    pub fn remove(&mut self, key: &K) -> Option<V> {
        self.find_mut(key).map(OccupiedEntry::remove)
    }

    /// At `key`, or at the first larger one.
    pub fn cursor_lower_bound(&self, key: &K) -> Option<Cursor<'_, K, V>> {
        let (Ok(at) | Err(at)) = self.search(key);
        self.cursor_at(at)
    }

    /// At `key`, or at the first larger one.
    pub fn cursor_lower_bound_mut(&mut self, key: &K) -> Option<CursorMut<'_, K, V>> {
        let (Ok(at) | Err(at)) = self.search(key);
        self.cursor_at_mut(at)
    }
}

impl<K, V> Default for RBTree<K, V> {
    fn default() -> Self {
        Self::new()
    }
}

/// The nodes of a tree.
pub struct Iter<'a, K, V>(std::slice::Iter<'a, KBox<Node<K, V>>>);

impl<'a, K, V> Iterator for Iter<'a, K, V> {
    type Item = (&'a K, &'a V);

    fn next(&mut self) -> Option<Self::Item> {
        self.0.next().map(|node| node.both())
    }
}

/// The nodes of a tree, with values to be changed.
pub struct IterMut<'a, K, V>(std::slice::IterMut<'a, KBox<Node<K, V>>>);

impl<'a, K, V> Iterator for IterMut<'a, K, V> {
    type Item = (&'a K, &'a mut V);

    fn next(&mut self) -> Option<Self::Item> {
        self.0.next().map(|node| node.both_mut())
    }
}

impl<'a, K, V> IntoIterator for &'a RBTree<K, V> {
    type Item = (&'a K, &'a V);
    type IntoIter = Iter<'a, K, V>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl<'a, K, V> IntoIterator for &'a mut RBTree<K, V> {
    type Item = (&'a K, &'a mut V);
    type IntoIter = IterMut<'a, K, V>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter_mut()
    }
}

/// At one node of a tree.
pub struct Cursor<'a, K, V> {
    tree: &'a RBTree<K, V>,
    at: usize,
}

impl<K, V> Cursor<'_, K, V> {
    /// This node.
    pub fn current(&self) -> (&K, &V) {
        self.tree.nodes[self.at].both()
    }

    /// The node before it.
    pub fn peek_prev(&self) -> Option<(&K, &V)> {
        Some(self.tree.nodes[self.at.checked_sub(1)?].both())
    }

    /// The node behind it.
    pub fn peek_next(&self) -> Option<(&K, &V)> {
        self.tree.nodes.get(self.at + 1).map(|node| node.both())
    }
}

/// At one node of a tree that may be changed.
pub struct CursorMut<'a, K, V> {
    tree: &'a mut RBTree<K, V>,
    at: usize,
}

impl<K, V> CursorMut<'_, K, V> {
    /// This node.
    pub fn current(&self) -> (&K, &V) {
        self.tree.nodes[self.at].both()
    }

    /// This node, with a value to be changed.
    pub fn current_mut(&mut self) -> (&K, &mut V) {
        self.tree.nodes[self.at].both_mut()
    }

    /// Takes this node out and goes to the next one, or else to the previous one.
    pub fn remove_current(self) -> (Option<Self>, RBTreeNode<K, V>) {
        let Self { tree, at } = self;
        let node = tree.take(at);
        let at = at.min(tree.nodes.len().saturating_sub(1));
        let cursor = (!tree.is_empty()).then_some(Self { tree, at });
        (cursor, node)
    }

    /// Takes the previous node out.
    pub fn remove_prev(&mut self) -> Option<RBTreeNode<K, V>> {
        self.at = self.at.checked_sub(1)?;
        Some(self.tree.take(self.at))
    }

    /// Takes the next node out.
    pub fn remove_next(&mut self) -> Option<RBTreeNode<K, V>> {
        let next = self.at + 1;
        (next < self.tree.nodes.len()).then(|| self.tree.take(next))
    }

    /// To the previous node.
    pub fn move_prev(self) -> Option<Self> {
        let at = self.at.checked_sub(1)?;
        Some(Self { at, ..self })
    }

    /// To the next node.
    pub fn move_next(self) -> Option<Self> {
        let at = self.at + 1;
        (at < self.tree.nodes.len()).then_some(Self { at, ..self })
    }

    /// The node before this one.
    pub fn peek_prev(&self) -> Option<(&K, &V)> {
        Some(self.tree.nodes[self.at.checked_sub(1)?].both())
    }

    /// The node behind this one.
    pub fn peek_next(&self) -> Option<(&K, &V)> {
        self.tree.nodes.get(self.at + 1).map(|node| node.both())
    }

    /// The node before this one, with a value to be changed.
    pub fn peek_prev_mut(&mut self) -> Option<(&K, &mut V)> {
        Some(self.tree.nodes[self.at.checked_sub(1)?].both_mut())
    }

    /// The node behind this one, with a value to be changed.
    pub fn peek_next_mut(&mut self) -> Option<(&K, &mut V)> {
        let next = self.tree.nodes.get_mut(self.at + 1)?;
        Some(next.both_mut())
    }
}

/// The memory for a node.
pub struct RBTreeNodeReservation<K, V> {
    node: KBox<MaybeUninit<Node<K, V>>>,
}

impl<K, V> RBTreeNodeReservation<K, V> {
    /// Allocates it.
    pub fn new(flags: Flags) -> Result<Self> {
        Ok(Self {
            node: KBox::new_uninit(flags)?,
        })
    }

    /// Makes it a node.
    pub fn into_node(self, key: K, value: V) -> RBTreeNode<K, V> {
        RBTreeNode {
            node: KBox::write(
                self.node,
                Node {
                    _links: [0; 3],
                    key,
                    value,
                },
            ),
        }
    }
}

/// A node that is in no tree.
pub struct RBTreeNode<K, V> {
    node: KBox<Node<K, V>>,
}

impl<K, V> RBTreeNode<K, V> {
    /// Allocates it. Drops key and value on failure.
    pub fn new(key: K, value: V, flags: Flags) -> Result<Self> {
        Ok(RBTreeNodeReservation::new(flags)?.into_node(key, value))
    }

    /// Takes key and value out and frees the node.
    pub fn to_key_value(self) -> (K, V) {
        let node = KBox::into_inner(self.node);
        (node.key, node.value)
    }

    /// Drops key and value and keeps the memory.
    pub fn into_reservation(self) -> RBTreeNodeReservation<K, V> {
        RBTreeNodeReservation {
            node: KBox::drop_contents(self.node),
        }
    }
}

/// The place of a key.
pub enum Entry<'a, K, V> {
    /// Where the key would go.
    Vacant(VacantEntry<'a, K, V>),
    /// Where the key is.
    Occupied(OccupiedEntry<'a, K, V>),
}

/// Where a key would go.
pub struct VacantEntry<'a, K, V> {
    tree: &'a mut RBTree<K, V>,
    at: usize,
    key: K,
}

impl<'a, K, V> VacantEntry<'a, K, V> {
    /// Inserts a node there.
    pub fn insert(self, value: V, reservation: RBTreeNodeReservation<K, V>) -> &'a mut V {
        let node = reservation.into_node(self.key, value).node;
        self.tree.nodes.insert(self.at, node);
        &mut self.tree.nodes[self.at].value
    }
}

/// Where a key is.
pub struct OccupiedEntry<'a, K, V> {
    tree: &'a mut RBTree<K, V>,
    at: usize,
}

impl<'a, K, V> OccupiedEntry<'a, K, V> {
    /// The value.
    pub fn get(&self) -> &V {
        &self.tree.nodes[self.at].value
    }

    /// The value, to be changed.
    pub fn get_mut(&mut self) -> &mut V {
        &mut self.tree.nodes[self.at].value
    }

    /// The value, to be changed for as long as the tree is borrowed.
    pub fn into_mut(self) -> &'a mut V {
        &mut self.tree.nodes[self.at].value
    }

    /// Takes the node out.
    pub fn remove_node(self) -> RBTreeNode<K, V> {
        self.tree.take(self.at)
    }

    /// Takes the value out and frees its node.
    pub fn remove(self) -> V {
        self.remove_node().to_key_value().1
    }
}
