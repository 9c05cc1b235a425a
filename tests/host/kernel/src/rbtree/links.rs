// SPDX-License-Identifier: GPL-2.0

//! Red-black trees: a red node has no red child, and all paths from the root down have the same number of
//! black nodes.
//!
//! All code is written once for both sides: 0 is the side of smaller keys, 1 that of larger ones.

use super::Node;
use std::ptr;

/// A node, or null for no node, which counts as black.
pub(super) type Ptr<K, V> = *mut Node<K, V>;

/// It has the size and the purpose of `struct rb_node`.
pub(super) struct Links<K, V> {
    /// The parent. The lowest bit is set if this node is red.
    up: Ptr<K, V>,
    down: [Ptr<K, V>; 2],
}

const RED: usize = 1;

impl<K, V> Links<K, V> {
    /// The links of a node in no tree.
    pub(super) const NONE: Self = Self {
        up: ptr::null_mut(),
        down: [ptr::null_mut(); 2],
    };

    /// The child on one side.
    pub(super) fn child(&self, side: usize) -> Ptr<K, V> {
        self.down[side]
    }
}

/// A place for a new node: below `parent` on a side without a child, or at the root of an empty tree.
pub(super) struct Place<K, V> {
    pub(super) parent: Ptr<K, V>,
    pub(super) side: usize,
}

impl<K, V> Place<K, V> {
    /// The place of the first node.
    pub(super) const ROOT: Self = Self {
        parent: ptr::null_mut(),
        side: 0,
    };
}

// The functions below work on the nodes of one tree, to which no other reference exists meanwhile. A pointer
// named `root` is the tree's own. Other pointers are nodes of that tree, valid, or null where the function
// says so. "See above" under `# Safety` means this.

/// # Safety
///
/// See above.
unsafe fn parent<K, V>(node: Ptr<K, V>) -> Ptr<K, V> {
    // SAFETY: By the contract.
    unsafe { (*node).links.up.map_addr(|addr| addr & !RED) }
}

/// # Safety
///
/// See above.
unsafe fn child<K, V>(node: Ptr<K, V>, side: usize) -> Ptr<K, V> {
    // SAFETY: By the contract.
    unsafe { (*node).links.down[side] }
}

/// # Safety
///
/// See above; `node` may be null.
unsafe fn is_red<K, V>(node: Ptr<K, V>) -> bool {
    // SAFETY: By the contract.
    !node.is_null() && unsafe { (*node).links.up.addr() & RED != 0 }
}

/// # Safety
///
/// See above.
unsafe fn paint<K, V>(node: Ptr<K, V>, red: bool) {
    // SAFETY: By the contract.
    unsafe {
        let links = &mut (*node).links;
        links.up = links.up.map_addr(|addr| addr & !RED | usize::from(red));
    }
}

/// # Safety
///
/// See above; `parent` may be null.
unsafe fn set_parent<K, V>(node: Ptr<K, V>, parent: Ptr<K, V>) {
    // SAFETY: By the contract.
    unsafe {
        let red = usize::from(is_red(node));
        (*node).links.up = parent.map_addr(|addr| addr | red);
    }
}

/// Return on which side of its parent a node is.
///
/// # Safety
///
/// See above; `node` may be null if the parent has one child, `parent` if `node` is the root.
unsafe fn side_of<K, V>(node: Ptr<K, V>, parent: Ptr<K, V>) -> usize {
    // SAFETY: By the contract.
    usize::from(!parent.is_null() && unsafe { child(parent, 1) } == node)
}

/// Put `new` below `parent`, or at the root.
///
/// # Safety
///
/// See above; `new` and `parent` may be null.
unsafe fn hang<K, V>(root: &mut Ptr<K, V>, parent: Ptr<K, V>, side: usize, new: Ptr<K, V>) {
    // SAFETY: By the contract.
    unsafe {
        match parent.as_mut() {
            None => *root = new,
            Some(parent) => parent.links.down[side] = new,
        }
        if !new.is_null() {
            set_parent(new, parent);
        }
    }
}

/// Rotate: move a node down to one side; its child on the other side takes its place.
///
/// # Safety
///
/// See above; there is such a child.
unsafe fn rotate<K, V>(root: &mut Ptr<K, V>, node: Ptr<K, V>, side: usize) {
    // SAFETY: By the contract.
    unsafe {
        let up = child(node, 1 - side);
        let above = parent(node);
        let node_side = side_of(node, above);
        hang(root, node, 1 - side, child(up, side));
        hang(root, above, node_side, up);
        hang(root, up, side, node);
    }
}

/// Put a node into the tree.
///
/// # Safety
///
/// See above; `node` is in no tree.
pub(super) unsafe fn link<K, V>(root: &mut Ptr<K, V>, place: Place<K, V>, node: Ptr<K, V>) {
    // SAFETY: By the contract.
    unsafe {
        (*node).links = Links::NONE;
        paint(node, true);
        hang(root, place.parent, place.side, node);
        after_link(root, node);
    }
}

/// Restore the red-black properties after a node became red.
///
/// # Safety
///
/// See above.
unsafe fn after_link<K, V>(root: &mut Ptr<K, V>, mut node: Ptr<K, V>) {
    // SAFETY: By the contract; a red node has a parent, since the root is black.
    unsafe {
        loop {
            let mut above = parent(node);
            if above.is_null() {
                return paint(node, false);
            }
            if !is_red(above) {
                return;
            }
            let top = parent(above);
            let side = side_of(above, top);
            let uncle = child(top, 1 - side);
            if is_red(uncle) {
                paint(above, false);
                paint(uncle, false);
                paint(top, true);
                node = top;
                continue;
            }
            if side_of(node, above) != side {
                rotate(root, above, side);
                above = node;
            }
            paint(above, false);
            paint(top, true);
            return rotate(root, top, 1 - side);
        }
    }
}

/// Put `new` in the place of `old`, which is in no tree afterwards.
///
/// # Safety
///
/// See above; `new` is in no tree.
pub(super) unsafe fn replace<K, V>(root: &mut Ptr<K, V>, old: Ptr<K, V>, new: Ptr<K, V>) {
    // SAFETY: By the contract.
    unsafe {
        let above = parent(old);
        let side = side_of(old, above);
        (*new).links = std::mem::replace(&mut (*old).links, Links::NONE);
        hang(root, above, side, new);
        for side in 0..2 {
            hang(root, new, side, child(new, side));
        }
    }
}

/// Take a node out of the tree.
///
/// # Safety
///
/// See above.
pub(super) unsafe fn unlink<K, V>(root: &mut Ptr<K, V>, node: Ptr<K, V>) {
    // SAFETY: By the contract. `next` exists if there are two children.
    unsafe {
        let above = parent(node);
        let side = side_of(node, above);
        let children = [child(node, 0), child(node, 1)];
        if let Some(empty) = children.iter().position(|child| child.is_null()) {
            let lone = children[1 - empty];
            hang(root, above, side, lone);
            if !is_red(node) {
                after_unlink(root, lone, above, side);
            }
            return;
        }
        // The next node takes its place and its colour.
        let next = end(children[1], 0);
        let lost_red = is_red(next);
        let lone = child(next, 1);
        let (gap, gap_side) = if next == children[1] {
            (next, 1)
        } else {
            let gap = parent(next);
            hang(root, gap, 0, lone);
            hang(root, next, 1, children[1]);
            (gap, 0)
        };
        hang(root, next, 0, children[0]);
        hang(root, above, side, next);
        paint(next, is_red(node));
        if !lost_red {
            after_unlink(root, lone, gap, gap_side);
        }
    }
}

/// Restore the red-black properties after the paths through `node` lost a black node. `node` is below `above`
/// on one side.
///
/// # Safety
///
/// See above; `node` may be null, and `above` if `node` is the root.
unsafe fn after_unlink<K, V>(
    root: &mut Ptr<K, V>,
    mut node: Ptr<K, V>,
    mut above: Ptr<K, V>,
    mut side: usize,
) {
    // SAFETY: By the contract. The paths on the other side have at least one black node below `above`, so
    // there is a sibling. If that is red, it has two black children.
    unsafe {
        loop {
            if is_red(node) {
                return paint(node, false);
            }
            if above.is_null() {
                return;
            }
            let other = 1 - side;
            let mut sibling = child(above, other);
            if is_red(sibling) {
                paint(sibling, false);
                paint(above, true);
                rotate(root, above, side);
                sibling = child(above, other);
            }
            let inner = child(sibling, side);
            if !is_red(child(sibling, other)) {
                if !is_red(inner) {
                    paint(sibling, true);
                    node = above;
                    above = parent(node);
                    side = side_of(node, above);
                    continue;
                }
                paint(inner, false);
                paint(sibling, true);
                rotate(root, sibling, other);
                sibling = inner;
            }
            paint(sibling, is_red(above));
            paint(above, false);
            paint(child(sibling, other), false);
            return rotate(root, above, side);
        }
    }
}

/// Return the last node on one side below `node`, or `node` itself.
///
/// # Safety
///
/// See above, but other shared references may exist; `node` may be null.
pub(super) unsafe fn end<K, V>(mut node: Ptr<K, V>, side: usize) -> Ptr<K, V> {
    // SAFETY: By the contract.
    unsafe {
        while let Some(below) = node.as_ref().map(|node| node.links.down[side]) {
            if below.is_null() {
                break;
            }
            node = below;
        }
    }
    node
}

/// Return the neighbour of a node in the order of the keys; null if there is none.
///
/// # Safety
///
/// See above, but references to keys and values may exist; `node` may be null.
pub(super) unsafe fn step<K, V>(mut node: Ptr<K, V>, side: usize) -> Ptr<K, V> {
    if node.is_null() {
        return node;
    }
    // SAFETY: By the contract.
    unsafe {
        let mut below = child(node, side);
        if !below.is_null() {
            while !child(below, 1 - side).is_null() {
                below = child(below, 1 - side);
            }
            return below;
        }
        loop {
            let above = parent(node);
            if above.is_null() || child(above, side) != node {
                return above;
            }
            node = above;
        }
    }
}

/// Call `f` with each node, after those below it.
///
/// # Safety
///
/// See above; `root` may be null, and `f` may free the node.
pub(super) unsafe fn for_each_bottom_up<K, V>(root: Ptr<K, V>, mut f: impl FnMut(Ptr<K, V>)) {
    let mut node = root;
    // SAFETY: By the contract. A node is not accessed after it was passed to `f`.
    unsafe {
        while !node.is_null() {
            let links = &mut (*node).links;
            let below = links.down.iter_mut().find(|below| !below.is_null());
            if let Some(below) = below {
                // The loop returns here when that side is done.
                node = std::mem::replace(below, ptr::null_mut());
                continue;
            }
            let above = parent(node);
            f(node);
            node = above;
        }
    }
}

/// Check that this is a red-black tree with consistent links. Return the number of nodes.
///
/// # Safety
///
/// See above, but other shared references may exist; `root` may be null.
pub(super) unsafe fn check<K, V>(root: Ptr<K, V>) -> usize {
    /// Return the number of nodes, and the number of black ones on each path down.
    ///
    /// # Safety
    ///
    /// See above; `node` may be null.
    unsafe fn below<K, V>(node: Ptr<K, V>) -> (usize, usize) {
        if node.is_null() {
            return (0, 1);
        }
        // SAFETY: By the contract.
        unsafe {
            let sides = [0, 1].map(|side| {
                let next = child(node, side);
                assert!(next.is_null() || parent(next) == node);
                assert!(!(is_red(node) && is_red(next)), "two red ones in a row");
                below(next)
            });
            assert_eq!(sides[0].1, sides[1].1, "not the same number of black ones");
            let black = usize::from(!is_red(node));
            (sides[0].0 + sides[1].0 + 1, sides[0].1 + black)
        }
    }
    // SAFETY: By the contract.
    unsafe {
        assert!(!is_red(root));
        assert!(root.is_null() || parent(root).is_null());
        below(root).0
    }
}
