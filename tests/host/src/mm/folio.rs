// SPDX-License-Identifier: GPL-2.0

//! Stands in for `mm/folio.rs`: pages that tests make up.

use crate::hash::{Checksum, Hasher, Sample};
use std::{cell::Cell, num::NonZeroUsize, rc::Rc};

/// The address of a stable node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct NodeId(NonZeroUsize);

impl NodeId {
    pub(crate) fn new(addr: usize) -> Option<Self> {
        NonZeroUsize::new(addr).map(Self)
    }

    pub(crate) fn get(self) -> usize {
        self.0.get()
    }
}

/// What a KSM page is like.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TestPage {
    /// The kernel has freed it.
    pub(crate) gone: bool,
    /// Another task has it locked.
    pub(crate) locked: bool,
    pub(crate) mapped: bool,
    pub(crate) swapcache: bool,
    pub(crate) poisoned: bool,
    /// Its node was taken off it.
    pub(crate) cleared: bool,
    /// Its content.
    pub(crate) sum: Checksum,
}

impl TestPage {
    /// A page that is mapped, and otherwise idle.
    pub(crate) fn new(sum: Checksum) -> Self {
        Self {
            gone: false,
            locked: false,
            mapped: true,
            swapcache: false,
            poisoned: false,
            cleared: false,
            sum,
        }
    }

    /// Return whether a node has the page.
    pub(crate) fn is_there(&self) -> bool {
        !self.gone && !self.cleared
    }
}

/// A reference on a page.
pub(crate) struct PageRef(pub(crate) Rc<Cell<TestPage>>);

impl PageRef {
    pub(crate) fn is_mapped(&self) -> bool {
        self.0.get().mapped
    }

    pub(crate) fn is_swapcache(&self) -> bool {
        self.0.get().swapcache
    }

    pub(crate) fn is_poisoned(&self) -> bool {
        self.0.get().poisoned
    }

    pub(crate) fn sample(&self, _: &Hasher) -> Sample {
        self.0.get().sum.sample()
    }

    pub(crate) fn checksum(&self, _: &Hasher) -> Checksum {
        assert!(!self.is_poisoned(), "a poisoned page is read");
        self.0.get().sum
    }
}
