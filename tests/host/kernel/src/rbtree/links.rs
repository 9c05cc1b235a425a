// SPDX-License-Identifier: GPL-2.0

//! Red-black trees: a red node has no red child, and all ways from the root down pass the same number
//! of black nodes.
//!
//! Everything is written once for both sides: 0 is where smaller keys are, 1 where larger ones are.

use super::Node;
use std::ptr;

/// A node, or null for none, which counts as black.
pub(super) type Ptr<K, V> = *mut Node<K, V>;

/// The room that `struct rb_node` takes, and for the same purpose.
pub(super) struct Links<K, V> {
    /// The node above, of which the lowest bit says that this one is red.
    up: Ptr<K, V>,
    down: [Ptr<K, V>; 2],
}

const RED: usize = 1;

impl<K, V> Links<K, V> {
    /// Those of a node in no tree.
    pub(super) const NONE: Self = Self {
        up: ptr::null_mut(),
        down: [ptr::null_mut(); 2],
    };

    /// The node below on one side.
    pub(super) fn child(&self, side: usize) -> Ptr<K, V> {
        self.down[side]
    }
}

/// Where a node may be put: below `parent` on a side where it has no child, or at the root when
/// there is no node at all.
pub(super) struct Place<K, V> {
    pub(super) parent: Ptr<K, V>,
    pub(super) side: usize,
}

impl<K, V> Place<K, V> {
    /// That of the first node.
    pub(super) const ROOT: Self = Self {
        parent: ptr::null_mut(),
        side: 0,
    };
}

// What follows works on the nodes of one tree, of which nobody else has a reference meanwhile.
// A pointer named `root` is the tree's own; others are nodes of that tree, valid, or null where it
// says so. That is what `# Safety` means throughout.

/// # Safety
///
/// See above.
unsafe fn parent<K, V>(node: Ptr<K, V>) -> Ptr<K, V> {
    // SAFETY: by the contract.
    unsafe { (*node).links.up.map_addr(|addr| addr & !RED) }
}

/// # Safety
///
/// See above.
unsafe fn child<K, V>(node: Ptr<K, V>, side: usize) -> Ptr<K, V> {
    // SAFETY: by the contract.
    unsafe { (*node).links.down[side] }
}

/// # Safety
///
/// See above; `node` may be null.
unsafe fn is_red<K, V>(node: Ptr<K, V>) -> bool {
    // SAFETY: by the contract.
    !node.is_null() && unsafe { (*node).links.up.addr() & RED != 0 }
}

/// # Safety
///
/// See above.
unsafe fn paint<K, V>(node: Ptr<K, V>, red: bool) {
    // SAFETY: by the contract.
    unsafe {
        let links = &mut (*node).links;
        links.up = links.up.map_addr(|addr| addr & !RED | usize::from(red));
    }
}

/// # Safety
///
/// See above; `parent` may be null.
unsafe fn set_parent<K, V>(node: Ptr<K, V>, parent: Ptr<K, V>) {
    // SAFETY: by the contract.
    unsafe {
        let red = usize::from(is_red(node));
        (*node).links.up = parent.map_addr(|addr| addr | red);
    }
}

/// On which side of its parent a node is.
///
/// # Safety
///
/// See above; `node` may be null if the parent has one child, `parent` if `node` is the root.
unsafe fn side_of<K, V>(node: Ptr<K, V>, parent: Ptr<K, V>) -> usize {
    // SAFETY: by the contract.
    usize::from(!parent.is_null() && unsafe { child(parent, 1) } == node)
}

/// Puts `new` below `parent`, or at the root.
///
/// # Safety
///
/// See above; `new` and `parent` may be null.
unsafe fn hang<K, V>(root: &mut Ptr<K, V>, parent: Ptr<K, V>, side: usize, new: Ptr<K, V>) {
    // SAFETY: by the contract.
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

/// Moves a node down to one side; its child of the other side takes its place.
///
/// # Safety
///
/// See above; there is such a child.
unsafe fn rotate<K, V>(root: &mut Ptr<K, V>, node: Ptr<K, V>, side: usize) {
    // SAFETY: by the contract.
    unsafe {
        let up = child(node, 1 - side);
        let above = parent(node);
        let node_side = side_of(node, above);
        hang(root, node, 1 - side, child(up, side));
        hang(root, above, node_side, up);
        hang(root, up, side, node);
    }
}

/// Puts a node into the tree.
///
/// # Safety
///
/// See above; `node` is in no tree.
pub(super) unsafe fn link<K, V>(root: &mut Ptr<K, V>, place: Place<K, V>, node: Ptr<K, V>) {
    // SAFETY: by the contract.
    unsafe {
        (*node).links = Links::NONE;
        paint(node, true);
        hang(root, place.parent, place.side, node);
        after_link(root, node);
    }
}

/// Makes the tree a red-black tree again when a node came to be red.
///
/// # Safety
///
/// See above.
unsafe fn after_link<K, V>(root: &mut Ptr<K, V>, mut node: Ptr<K, V>) {
    // SAFETY: by the contract; a red node has a parent, since the root is black.
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

/// Puts `new` in the place of `old`, which is in no tree afterwards.
///
/// # Safety
///
/// See above; `new` is in no tree.
pub(super) unsafe fn replace<K, V>(root: &mut Ptr<K, V>, old: Ptr<K, V>, new: Ptr<K, V>) {
    // SAFETY: by the contract.
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

/// Takes a node out of the tree.
///
/// # Safety
///
/// See above.
pub(super) unsafe fn unlink<K, V>(root: &mut Ptr<K, V>, node: Ptr<K, V>) {
    // SAFETY: by the contract; `next` is there where there are two children.
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
        // The next one takes its place and its colour.
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

/// Makes the tree a red-black tree again when the ways through `node`, which is below `above` on one
/// side, lost a black node.
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
    // SAFETY: by the contract; the ways on the other side pass at least one black node below
    // `above`, so there is a sibling, and where it is red it has two black children.
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

/// The last node of one side below `node`, which itself may be it.
///
/// # Safety
///
/// See above, but others may have shared references; `node` may be null.
pub(super) unsafe fn end<K, V>(mut node: Ptr<K, V>, side: usize) -> Ptr<K, V> {
    // SAFETY: by the contract.
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

/// The neighbour of a node in the order of the keys; null if there is none.
///
/// # Safety
///
/// See above, but others may have references to keys and values; `node` may be null.
pub(super) unsafe fn step<K, V>(mut node: Ptr<K, V>, side: usize) -> Ptr<K, V> {
    if node.is_null() {
        return node;
    }
    // SAFETY: by the contract.
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

/// Calls `f` with each node, after those below it.
///
/// # Safety
///
/// See above; `root` may be null, and `f` may free the node.
pub(super) unsafe fn for_each_bottom_up<K, V>(root: Ptr<K, V>, mut f: impl FnMut(Ptr<K, V>)) {
    let mut node = root;
    // SAFETY: by the contract; a node is not looked at after it was given to `f`.
    unsafe {
        while !node.is_null() {
            let links = &mut (*node).links;
            let below = links.down.iter_mut().find(|below| !below.is_null());
            if let Some(below) = below {
                // Comes back here when that side is done.
                node = std::mem::replace(below, ptr::null_mut());
                continue;
            }
            let above = parent(node);
            f(node);
            node = above;
        }
    }
}

/// Fails unless this is a red-black tree whose links agree. Returns how many nodes it has.
///
/// # Safety
///
/// See above, but others may have shared references; `root` may be null.
pub(super) unsafe fn check<K, V>(root: Ptr<K, V>) -> usize {
    /// How many nodes there are, and how many black ones on each way down.
    ///
    /// # Safety
    ///
    /// See above; `node` may be null.
    unsafe fn below<K, V>(node: Ptr<K, V>) -> (usize, usize) {
        if node.is_null() {
            return (0, 1);
        }
        // SAFETY: by the contract.
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
    // SAFETY: by the contract.
    unsafe {
        assert!(!is_red(root));
        assert!(root.is_null() || parent(root).is_null());
        below(root).0
    }
}
