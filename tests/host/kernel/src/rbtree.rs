// SPDX-License-Identifier: GPL-2.0

//! Trees of owned nodes.
//!
//! Red-black trees like the kernel's. Each node is an allocation of the same size as in the kernel, so that
//! benches on the host tell something about the module. [`links`] is the tree; this module is the kernel's
//! interface to it.

mod cursor;
mod links;

pub use cursor::{Cursor, CursorMut};

use crate::{
    alloc::{Flags, KBox},
    error::Result,
};
use links::{Links, Place, Ptr};
use std::{marker::PhantomData, mem::MaybeUninit, ptr};

/// A tree.
///
/// # Invariants
///
/// The tree owns the nodes that `root` leads to. They are linked as a red-black tree ordered by their keys.
pub struct RBTree<K, V> {
    root: Ptr<K, V>,
    _owned: PhantomData<KBox<Node<K, V>>>,
}

/// A node, in a tree or not.
struct Node<K, V> {
    links: Links<K, V>,
    key: K,
    value: V,
}

impl<K, V> RBTree<K, V> {
    /// Create an empty tree, without memory.
    pub fn new() -> Self {
        // INVARIANT: There are no nodes.
        Self {
            root: ptr::null_mut(),
            _owned: PhantomData,
        }
    }

    /// Return whether there are no nodes.
    pub fn is_empty(&self) -> bool {
        self.root.is_null()
    }

    /// The nodes, by key.
    pub fn iter(&self) -> Iter<'_, K, V> {
        Iter {
            at: self.end(0),
            _tree: PhantomData,
        }
    }

    /// The nodes, by key, with mutable values.
    pub fn iter_mut(&mut self) -> IterMut<'_, K, V> {
        IterMut {
            at: self.end(0),
            _tree: PhantomData,
        }
    }

    /// The keys in their order.
    pub fn keys(&self) -> impl Iterator<Item = &'_ K> {
        self.iter().map(|(key, _)| key)
    }

    /// The values, by key.
    pub fn values(&self) -> impl Iterator<Item = &'_ V> {
        self.iter().map(|(_, value)| value)
    }

    /// The values, by key, mutable.
    pub fn values_mut(&mut self) -> impl Iterator<Item = &'_ mut V> {
        self.iter_mut().map(|(_, value)| value)
    }

    /// A cursor at the smallest key.
    pub fn cursor_front(&self) -> Option<Cursor<'_, K, V>> {
        self.cursor_at(self.end(0))
    }

    /// A mutable cursor at the smallest key.
    pub fn cursor_front_mut(&mut self) -> Option<CursorMut<'_, K, V>> {
        self.cursor_at_mut(self.end(0))
    }

    /// A cursor at the largest key.
    pub fn cursor_back(&self) -> Option<Cursor<'_, K, V>> {
        self.cursor_at(self.end(1))
    }

    /// A mutable cursor at the largest key.
    pub fn cursor_back_mut(&mut self) -> Option<CursorMut<'_, K, V>> {
        self.cursor_at_mut(self.end(1))
    }

    /// The node with the smallest (0) or largest (1) key; null if there is none.
    fn end(&self, side: usize) -> Ptr<K, V> {
        // SAFETY: `root` is a node of the tree or null, by the type invariant.
        unsafe { links::end(self.root, side) }
    }

    /// Take a node out.
    ///
    /// # Safety
    ///
    /// `at` is a node of this tree, and no reference to it is left.
    unsafe fn take(&mut self, at: Ptr<K, V>) -> RBTreeNode<K, V> {
        // SAFETY: `at` is a node of this tree by the contract.
        unsafe { links::unlink(&mut self.root, at) };
        // SAFETY: The node came from a box, and is not in the tree any more.
        let node = unsafe { KBox::from_raw(at) };
        RBTreeNode { node }
    }

    /// Check that the tree is what the kernel's would be: ordered, balanced, with consistent links. Return
    /// the number of nodes. The kernel has no such function.
    pub fn check(&self) -> usize
    where
        K: Ord,
    {
        // SAFETY: The links are valid by the type invariant, and shared for as long as `self` is.
        let len = unsafe { links::check(self.root) };
        assert!(self.keys().is_sorted_by(|a, b| a < b));
        len
    }
}

impl<K: Ord, V> RBTree<K, V> {
    /// Return the node of `key`, or else the place where it would go.
    fn search(&self, key: &K) -> core::result::Result<Ptr<K, V>, Place<K, V>> {
        let mut place = Place::ROOT;
        let mut at = self.root;
        // SAFETY: `at` is a node of the tree or null, by the type invariant.
        while let Some(node) = unsafe { at.as_ref() } {
            let side = match key.cmp(&node.key) {
                std::cmp::Ordering::Less => 0,
                std::cmp::Ordering::Greater => 1,
                std::cmp::Ordering::Equal => return Ok(at),
            };
            place = Place { parent: at, side };
            at = node.links.child(side);
        }
        Err(place)
    }

    /// Insert a new node. Return the one with the same key that it replaced.
    pub fn try_create_and_insert(
        &mut self,
        key: K,
        value: V,
        flags: Flags,
    ) -> Result<Option<RBTreeNode<K, V>>> {
        Ok(self.insert(RBTreeNode::new(key, value, flags)?))
    }

    /// Insert a node. Return the one with the same key that it replaced.
    pub fn insert(&mut self, node: RBTreeNode<K, V>) -> Option<RBTreeNode<K, V>> {
        match self.search(&node.node.key) {
            Ok(at) => {
                let new = KBox::into_raw(node.node);
                // SAFETY: `at` is a node of this tree; the new one is in none.
                unsafe { links::replace(&mut self.root, at, new) };
                // SAFETY: The node came from a box, and is not in the tree any more.
                let node = unsafe { KBox::from_raw(at) };
                Some(RBTreeNode { node })
            }
            Err(place) => {
                let new = KBox::into_raw(node.node);
                // SAFETY: The place was found in this tree; the node is in none.
                unsafe { links::link(&mut self.root, place, new) };
                None
            }
        }
    }

    /// The place of `key`.
    pub fn entry(&mut self, key: K) -> Entry<'_, K, V> {
        match self.search(&key) {
            Ok(at) => Entry::Occupied(OccupiedEntry { tree: self, at }),
            Err(place) => Entry::Vacant(VacantEntry {
                tree: self,
                place,
                key,
            }),
        }
    }

    /// The entry of `key`, if there is such a node.
    pub fn find_mut(&mut self, key: &K) -> Option<OccupiedEntry<'_, K, V>> {
        let at = self.search(key).ok()?;
        Some(OccupiedEntry { tree: self, at })
    }

    /// The value of `key`.
    pub fn get(&self, key: &K) -> Option<&V> {
        let at = self.search(key).ok()?;
        // SAFETY: `at` is a node of the tree, shared for as long as `self` is.
        Some(unsafe { &(*at).value })
    }

    /// The value of `key`, mutable.
    pub fn get_mut(&mut self, key: &K) -> Option<&mut V> {
        self.find_mut(key).map(OccupiedEntry::into_mut)
    }

    /// Take a node out.
    pub fn remove_node(&mut self, key: &K) -> Option<RBTreeNode<K, V>> {
        self.find_mut(key).map(OccupiedEntry::remove_node)
    }

    /// Take a value out and free its node.
    pub fn remove(&mut self, key: &K) -> Option<V> {
        self.find_mut(key).map(OccupiedEntry::remove)
    }

    /// The node of `key`, or of the first larger one; null if there is none.
    fn lower_bound(&self, key: &K) -> Ptr<K, V> {
        match self.search(key) {
            Ok(at) => at,
            Err(place) if place.side == 0 => place.parent,
            // SAFETY: The parent is a node of the tree, or null if the tree is empty.
            Err(place) => unsafe { links::step(place.parent, 1) },
        }
    }

    /// A cursor at `key`, or at the first larger one.
    pub fn cursor_lower_bound(&self, key: &K) -> Option<Cursor<'_, K, V>> {
        self.cursor_at(self.lower_bound(key))
    }

    /// A mutable cursor at `key`, or at the first larger one.
    pub fn cursor_lower_bound_mut(&mut self, key: &K) -> Option<CursorMut<'_, K, V>> {
        self.cursor_at_mut(self.lower_bound(key))
    }
}

impl<K, V> Default for RBTree<K, V> {
    fn default() -> Self {
        Self::new()
    }
}

impl<K, V> Drop for RBTree<K, V> {
    fn drop(&mut self) {
        let free = |at| {
            // SAFETY: The node came from a box, and nothing leads to it any more.
            drop(unsafe { KBox::from_raw(at) });
        };
        // SAFETY: The links are valid by the type invariant; the tree is gone afterwards.
        unsafe { links::for_each_bottom_up(self.root, free) };
    }
}

/// The nodes of a tree.
pub struct Iter<'a, K, V> {
    at: Ptr<K, V>,
    _tree: PhantomData<&'a RBTree<K, V>>,
}

impl<'a, K, V> Iterator for Iter<'a, K, V> {
    type Item = (&'a K, &'a V);

    fn next(&mut self) -> Option<Self::Item> {
        // SAFETY: `at` is null or a node of the tree, which is shared for `'a`.
        let node = unsafe { self.at.as_ref() }?;
        // SAFETY: `at` is a node of the tree, which is shared for `'a`.
        self.at = unsafe { links::step(self.at, 1) };
        Some((&node.key, &node.value))
    }
}

/// The nodes of a tree, with mutable values.
pub struct IterMut<'a, K, V> {
    at: Ptr<K, V>,
    _tree: PhantomData<&'a mut RBTree<K, V>>,
}

impl<'a, K, V> Iterator for IterMut<'a, K, V> {
    type Item = (&'a K, &'a mut V);

    fn next(&mut self) -> Option<Self::Item> {
        let at = self.at;
        if at.is_null() {
            return None;
        }
        // SAFETY: `at` is a node of the tree, which is borrowed for `'a`; only its links are read.
        self.at = unsafe { links::step(at, 1) };
        // SAFETY: The tree is borrowed for `'a`, and the iterator returns each node once.
        Some(unsafe { (&(*at).key, &mut (*at).value) })
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

/// Memory for a node.
pub struct RBTreeNodeReservation<K, V> {
    node: KBox<MaybeUninit<Node<K, V>>>,
}

impl<K, V> RBTreeNodeReservation<K, V> {
    /// Allocate the memory.
    pub fn new(flags: Flags) -> Result<Self> {
        Ok(Self {
            node: KBox::new_uninit(flags)?,
        })
    }

    /// Turn it into a node.
    pub fn into_node(self, key: K, value: V) -> RBTreeNode<K, V> {
        RBTreeNode {
            node: KBox::write(
                self.node,
                Node {
                    links: Links::NONE,
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
    /// Allocate a node. Drop key and value on failure.
    pub fn new(key: K, value: V, flags: Flags) -> Result<Self> {
        Ok(RBTreeNodeReservation::new(flags)?.into_node(key, value))
    }

    /// Take key and value out and free the node.
    pub fn to_key_value(self) -> (K, V) {
        let node = KBox::into_inner(self.node);
        (node.key, node.value)
    }

    /// Drop key and value and keep the memory.
    pub fn into_reservation(self) -> RBTreeNodeReservation<K, V> {
        RBTreeNodeReservation {
            node: KBox::drop_contents(self.node),
        }
    }
}

/// The place of a key.
pub enum Entry<'a, K, V> {
    /// The place where the key would go.
    Vacant(VacantEntry<'a, K, V>),
    /// The node of the key.
    Occupied(OccupiedEntry<'a, K, V>),
}

/// The place where a key would go.
///
/// # Invariants
///
/// `place` was found in `tree` for `key`, and the tree has not changed since.
pub struct VacantEntry<'a, K, V> {
    tree: &'a mut RBTree<K, V>,
    place: Place<K, V>,
    key: K,
}

impl<'a, K, V> VacantEntry<'a, K, V> {
    /// Insert a node there.
    pub fn insert(self, value: V, reservation: RBTreeNodeReservation<K, V>) -> &'a mut V {
        let new = KBox::into_raw(reservation.into_node(self.key, value).node);
        // SAFETY: The place is valid by the type invariant; the node is in no tree yet.
        unsafe { links::link(&mut self.tree.root, self.place, new) };
        // SAFETY: This is a node of the tree now, which is borrowed for `'a`.
        unsafe { &mut (*new).value }
    }
}

/// The node of a key.
///
/// # Invariants
///
/// `at` is a node of `tree`.
pub struct OccupiedEntry<'a, K, V> {
    tree: &'a mut RBTree<K, V>,
    at: Ptr<K, V>,
}

impl<'a, K, V> OccupiedEntry<'a, K, V> {
    /// The value.
    pub fn get(&self) -> &V {
        // SAFETY: `at` is a node by the type invariant, shared for as long as `self` is.
        unsafe { &(*self.at).value }
    }

    /// The value, mutable.
    pub fn get_mut(&mut self) -> &mut V {
        // SAFETY: `at` is a node by the type invariant, borrowed for as long as `self` is.
        unsafe { &mut (*self.at).value }
    }

    /// The value, mutable for as long as the tree is borrowed.
    pub fn into_mut(self) -> &'a mut V {
        // SAFETY: `at` is a node by the type invariant; the tree is borrowed for `'a`.
        unsafe { &mut (*self.at).value }
    }

    /// Take the node out.
    pub fn remove_node(self) -> RBTreeNode<K, V> {
        // SAFETY: `at` is a node of the tree by the type invariant, and no reference to it is left.
        unsafe { self.tree.take(self.at) }
    }

    /// Take the value out and free its node.
    pub fn remove(self) -> V {
        self.remove_node().to_key_value().1
    }
}
