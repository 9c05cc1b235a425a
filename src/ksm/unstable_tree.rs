// SPDX-License-Identifier: GPL-2.0

//! The unstable tree: pages that wait for an equal.
//!
//! It is keyed by the checksum that was recorded when the page was hashed. A page that changes later can make
//! its place useless, but never the tree wrong. Descents read no page, so unlike that of in-tree KSM the tree
//! survives from pass to pass.

use super::mms::PageAddr;
use crate::hash::{Checksum, Sample};
use core::mem::size_of;
use kernel::{
    alloc::Flags,
    prelude::*,
    rbtree::{Entry, RBTree, RBTreeNodeReservation},
};

/// Queued pages: pages that have no known equal. There is one for each checksum.
///
/// # Examples
///
/// ```
/// use crate::{
///     hash::{Checksum, Sample},
///     ksm::{mms::PageAddr, unstable_tree::UnstableTree},
/// };
/// use kernel::prelude::*;
///
/// let mut tree = UnstableTree::new();
/// let sum = Checksum::unknown(Sample::from_raw(1));
/// let first = PageAddr { mm_id: 1, addr: 0x1000 };
///
/// // No page is queued under this checksum, so the first one waits for an equal.
/// assert_eq!(tree.lookup(sum), None);
/// tree.insert(sum, first, GFP_KERNEL)?;
///
/// // The second page finds it there. When both are merged, it waits no longer.
/// assert_eq!(tree.lookup(sum), Some(first));
/// tree.remove(sum, first);
/// assert_eq!(tree.len(), 0);
/// # Ok::<(), Error>(())
/// ```
pub(crate) struct UnstableTree {
    tree: RBTree<Checksum, PageAddr>,
    len: usize,
}

impl UnstableTree {
    /// Creates an empty tree.
    pub(crate) fn new() -> Self {
        Self {
            tree: RBTree::new(),
            len: 0,
        }
    }

    /// Returns how many pages are queued.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Returns the size of the tree in bytes, without the allocator's overhead.
    pub(crate) fn bytes(&self) -> usize {
        // `struct rb_node`. Key and value follow it.
        const LINKS: usize = 3 * size_of::<usize>();
        let place = LINKS + size_of::<Checksum>() + size_of::<PageAddr>();
        self.len.saturating_mul(place)
    }

    /// Returns the page that is queued under checksum `sum`.
    pub(crate) fn lookup(&self, sum: Checksum) -> Option<PageAddr> {
        self.tree.get(&sum).copied()
    }

    /// Returns the lowest checksum under which a page with this sample is queued.
    pub(crate) fn lookup_sample(&self, sample: Sample) -> Option<Checksum> {
        let cursor = self.tree.cursor_lower_bound(&Checksum::unknown(sample))?;
        let sum = *cursor.current().0;
        (sum.sample() == sample).then_some(sum)
    }

    /// Queues `place` under `sum`, in place of the page that is queued there. Allocates only if there is none.
    pub(crate) fn insert(&mut self, sum: Checksum, place: PageAddr, flags: Flags) -> Result {
        match self.tree.entry(sum) {
            Entry::Occupied(mut queued) => *queued.get_mut() = place,
            Entry::Vacant(vacant) => {
                vacant.insert(place, RBTreeNodeReservation::new(flags)?);
                self.len = self.len.saturating_add(1);
            }
        }
        Ok(())
    }

    /// Removes `place` from the unstable tree, if it is the page that is queued under `sum`.
    pub(crate) fn remove(&mut self, sum: Checksum, place: PageAddr) {
        if let Some(queued) = self.tree.find_mut(&sum) {
            if *queued.get() == place {
                queued.remove();
                self.len = self.len.saturating_sub(1);
            }
        }
    }
}
