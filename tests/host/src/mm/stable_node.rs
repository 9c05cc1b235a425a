// SPDX-License-Identifier: GPL-2.0

//! Stands in for `mm/stable_node.rs`: nodes whose pages tests make up.
//!
//! Items are on the list of a node as in the kernel, but the list is a vector.

use super::{
    folio::{NodeId, PageRef, TestPage},
    rmap_item::{ItemBox, RmapItem},
    stable_key::StableKey,
};
use crate::hash::Sample;
use kernel::{alloc::Flags, prelude::*, testing};
use std::{
    cell::{Cell, RefCell},
    ptr,
    rc::Rc,
};

struct StableNode {
    key: Cell<StableKey>,
    items: RefCell<std::vec::Vec<*const RmapItem>>,
    page: Rc<Cell<TestPage>>,
    /// Whether a page ever was this node's.
    published: Cell<bool>,
    nid_changed: Cell<bool>,
}

impl StableNode {
    fn unlink(&self, item: &RmapItem) {
        self.items
            .borrow_mut()
            .retain(|&known| !ptr::eq(known, item));
        item.set_node(ptr::null());
    }

    fn unlink_all(&self) {
        while let Some(item) = self.items.borrow_mut().pop() {
            // SAFETY: An item on a list is not freed.
            unsafe { &*item }.set_node(ptr::null());
        }
    }
}

impl RmapItem {
    pub(crate) fn listed_with(&self, node: NodeId) -> Option<(StableKey, usize)> {
        let node = self.node().filter(|_| self.node_id() == Some(node))?;
        Some((node.key.get(), node.items.borrow().len()))
    }

    fn node(&self) -> Option<&StableNode> {
        let id = self.node_id()?;
        // SAFETY: A node is not freed before it took off all its items.
        Some(unsafe { &*(id.get() as *const StableNode) })
    }
}

pub(crate) enum Unlinked {
    NotLinked,
    Done(StableKey, usize),
    StaleNode(StableKey),
    Busy,
}

impl ItemBox {
    pub(crate) fn mappings(&self) -> usize {
        self.node().map_or(0, |node| node.items.borrow().len())
    }

    pub(crate) fn detach(&mut self) -> Unlinked {
        let Some(node) = self.node() else {
            return Unlinked::NotLinked;
        };
        let (key, page) = (node.key.get(), node.page.get());
        match page {
            _ if !page.is_there() => Unlinked::StaleNode(key),
            TestPage { locked: true, .. } => Unlinked::Busy,
            _ => {
                node.unlink(self);
                Unlinked::Done(key, node.items.borrow().len())
            }
        }
    }
}

/// As in the module. The page of a node that is locked can be inspected.
pub(crate) enum NodePage {
    Gone,
    Busy,
    Locked(PageRef),
}

pub(crate) struct NodeBox(KBox<StableNode>);

impl NodeBox {
    pub(crate) const SIZE: usize = size_of::<StableNode>();

    pub(crate) fn new(key: StableKey, flags: Flags) -> Result<Self> {
        let node = StableNode {
            key: Cell::new(key),
            items: RefCell::default(),
            page: Rc::new(Cell::new(TestPage::new(key.sum))),
            published: Cell::new(false),
            nid_changed: Cell::new(false),
        };
        Ok(Self(KBox::new(node, flags)?))
    }

    /// Return the page, for a test to change.
    pub(crate) fn test_page(&self) -> Rc<Cell<TestPage>> {
        self.0.page.clone()
    }

    /// List `item` as a mapping of the node's page.
    pub(crate) fn link(&self, item: &ItemBox) {
        assert!(item.node_id().is_none(), "the item is on a list");
        item.set_node(ptr::from_ref(&*self.0).cast());
        self.0.published.set(true);
        self.0.items.borrow_mut().push(&raw const **item);
    }

    pub(crate) fn id(&self) -> Option<NodeId> {
        NodeId::new(ptr::from_ref(&*self.0) as usize)
    }

    pub(crate) fn key(&self) -> StableKey {
        self.0.key.get()
    }

    pub(crate) fn set_key(&self, key: StableKey) {
        self.0.key.set(key);
    }

    pub(crate) fn set_nid_changed(&self) {
        self.0.nid_changed.set(true);
    }

    pub(crate) fn take_nid_changed(&self) -> bool {
        self.0.nid_changed.take()
    }

    pub(crate) fn set_samples(&self, sample: Sample, mut changed: impl FnMut(Sample)) {
        for &item in &*self.0.items.borrow() {
            // SAFETY: An item on a list is not freed.
            let item = unsafe { &*item };
            if item.sample() != sample {
                changed(item.sample());
                item.set_sample(sample);
            }
        }
    }

    pub(crate) fn items(&self) -> usize {
        self.0.items.borrow().len()
    }

    pub(crate) fn page(&self) -> Option<PageRef> {
        let page = &self.0.page;
        let is_there = self.0.published.get() && page.get().is_there();
        is_there.then(|| PageRef(page.clone()))
    }

    pub(crate) fn locked_page(&self) -> NodePage {
        match self.page() {
            None => NodePage::Gone,
            Some(page) if page.0.get().locked => NodePage::Busy,
            Some(page) => NodePage::Locked(page),
        }
    }

    pub(crate) fn clear_stable_node(&self, even_mapped: bool) -> bool {
        match self.locked_page() {
            NodePage::Gone => true,
            NodePage::Busy => false,
            NodePage::Locked(page) if page.is_mapped() && !even_mapped => false,
            NodePage::Locked(page) => {
                page.0.set(TestPage {
                    cleared: true,
                    ..page.0.get()
                });
                true
            }
        }
    }

    pub(crate) fn release(self) -> Result<(), NodeBox> {
        if self.page().is_some() {
            return Err(self);
        }
        self.0.unlink_all();
        Ok(())
    }
}

impl Drop for NodeBox {
    fn drop(&mut self) {
        if self.page().is_some() {
            testing::note_error("a stable node in use was dropped\n");
        }
        self.0.unlink_all();
    }
}
