// SPDX-License-Identifier: GPL-2.0

//! Positions in a tree.

use super::{
    links::{self, Ptr},
    RBTree, RBTreeNode,
};
use std::marker::PhantomData;

/// A position at one node of a tree.
///
/// # Invariants
///
/// `at` is a node of the tree.
pub struct Cursor<'a, K, V> {
    at: Ptr<K, V>,
    _tree: PhantomData<&'a RBTree<K, V>>,
}

impl<K, V> RBTree<K, V> {
    /// Return a cursor at a node of this tree; `None` for null.
    pub(super) fn cursor_at(&self, at: Ptr<K, V>) -> Option<Cursor<'_, K, V>> {
        // INVARIANT: This is only called with nodes of this tree.
        (!at.is_null()).then_some(Cursor {
            at,
            _tree: PhantomData,
        })
    }

    /// Return a mutable cursor at a node of this tree; `None` for null.
    pub(super) fn cursor_at_mut(&mut self, at: Ptr<K, V>) -> Option<CursorMut<'_, K, V>> {
        // INVARIANT: This is only called with nodes of this tree.
        (!at.is_null()).then_some(CursorMut { tree: self, at })
    }
}

/// Key and value of a node.
///
/// # Safety
///
/// `at` is a node that is shared for `'a`, or null.
unsafe fn both<'a, K, V>(at: Ptr<K, V>) -> Option<(&'a K, &'a V)> {
    // SAFETY: The node is null or shared for `'a`, by the contract.
    unsafe { at.as_ref() }.map(|node| (&node.key, &node.value))
}

/// Key and value of a node, the value mutable.
///
/// # Safety
///
/// `at` is a node that is borrowed for `'a`, or null.
unsafe fn both_mut<'a, K, V>(at: Ptr<K, V>) -> Option<(&'a K, &'a mut V)> {
    // SAFETY: The node is null or borrowed for `'a`, by the contract.
    unsafe { at.as_mut() }.map(|node| (&node.key, &mut node.value))
}

impl<K, V> Cursor<'_, K, V> {
    fn neighbour(&self, side: usize) -> Ptr<K, V> {
        // SAFETY: `at` is a node of the tree by the type invariant.
        unsafe { links::step(self.at, side) }
    }

    /// This node.
    pub fn current(&self) -> (&K, &V) {
        // SAFETY: `at` is a node by the type invariant; the tree is shared for longer than this.
        unsafe { (&(*self.at).key, &(*self.at).value) }
    }

    /// The node before it.
    pub fn peek_prev(&self) -> Option<(&K, &V)> {
        // SAFETY: The neighbour is null or a node of the tree, which is shared for longer than this.
        unsafe { both(self.neighbour(0)) }
    }

    /// The node after it.
    pub fn peek_next(&self) -> Option<(&K, &V)> {
        // SAFETY: The neighbour is null or a node of the tree, which is shared for longer than this.
        unsafe { both(self.neighbour(1)) }
    }
}

/// A position at one node of a tree, with mutable values.
///
/// # Invariants
///
/// `at` is a node of the tree.
pub struct CursorMut<'a, K, V> {
    tree: &'a mut RBTree<K, V>,
    at: Ptr<K, V>,
}

impl<K, V> CursorMut<'_, K, V> {
    fn neighbour(&self, side: usize) -> Ptr<K, V> {
        // SAFETY: `at` is a node of the tree by the type invariant.
        unsafe { links::step(self.at, side) }
    }

    /// This node.
    pub fn current(&self) -> (&K, &V) {
        // SAFETY: `at` is a node by the type invariant, shared for as long as `self` is.
        unsafe { (&(*self.at).key, &(*self.at).value) }
    }

    /// This node, with a mutable value.
    pub fn current_mut(&mut self) -> (&K, &mut V) {
        // SAFETY: `at` is a node by the type invariant, borrowed for as long as `self` is.
        unsafe { (&(*self.at).key, &mut (*self.at).value) }
    }

    /// Take this node out, and move to the next one, or else to the previous one.
    pub fn remove_current(self) -> (Option<Self>, RBTreeNode<K, V>) {
        let left = [self.neighbour(1), self.neighbour(0)];
        let Self { tree, at } = self;
        // SAFETY: `at` is a node of the tree by the type invariant.
        let node = unsafe { tree.take(at) };
        let at = left.into_iter().find(|at| !at.is_null());
        // INVARIANT: This is another node, which is still in the tree.
        (at.map(|at| Self { tree, at }), node)
    }

    fn remove_neighbour(&mut self, side: usize) -> Option<RBTreeNode<K, V>> {
        let at = self.neighbour(side);
        // SAFETY: This is a node of the tree other than the cursor's.
        (!at.is_null()).then(|| unsafe { self.tree.take(at) })
    }

    /// Take the previous node out.
    pub fn remove_prev(&mut self) -> Option<RBTreeNode<K, V>> {
        self.remove_neighbour(0)
    }

    /// Take the next node out.
    pub fn remove_next(&mut self) -> Option<RBTreeNode<K, V>> {
        self.remove_neighbour(1)
    }

    fn move_to(self, side: usize) -> Option<Self> {
        let at = self.neighbour(side);
        // INVARIANT: `at` is a node of the tree, unless it is null.
        (!at.is_null()).then_some(Self { at, ..self })
    }

    /// Move to the previous node.
    pub fn move_prev(self) -> Option<Self> {
        self.move_to(0)
    }

    /// Move to the next node.
    pub fn move_next(self) -> Option<Self> {
        self.move_to(1)
    }

    /// The node before this one.
    pub fn peek_prev(&self) -> Option<(&K, &V)> {
        // SAFETY: The neighbour is null or a node of the tree, shared for as long as `self` is.
        unsafe { both(self.neighbour(0)) }
    }

    /// The node after this one.
    pub fn peek_next(&self) -> Option<(&K, &V)> {
        // SAFETY: The neighbour is null or a node of the tree, shared for as long as `self` is.
        unsafe { both(self.neighbour(1)) }
    }

    /// The node before this one, with a mutable value.
    pub fn peek_prev_mut(&mut self) -> Option<(&K, &mut V)> {
        // SAFETY: The neighbour is null or a node of the tree, borrowed for as long as `self` is.
        unsafe { both_mut(self.neighbour(0)) }
    }

    /// The node after this one, with a mutable value.
    pub fn peek_next_mut(&mut self) -> Option<(&K, &mut V)> {
        // SAFETY: The neighbour is null or a node of the tree, borrowed for as long as `self` is.
        unsafe { both_mut(self.neighbour(1)) }
    }
}
