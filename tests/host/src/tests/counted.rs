// SPDX-License-Identifier: GPL-2.0

//! Values whose drops are counted.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
};

/// The ledger of a family of values.
#[derive(Clone, Default)]
pub(super) struct Ledger(Rc<Book>);

#[derive(Default)]
struct Book {
    /// For each value ever made, whether it still exists.
    there: RefCell<Vec<bool>>,
    alive: Cell<usize>,
}

/// A value that is to be dropped exactly once.
pub(super) struct Counted {
    id: usize,
    ledger: Ledger,
}

impl Ledger {
    /// Make a value, different from all others of the family.
    pub(super) fn make(&self) -> Counted {
        let mut there = self.0.there.borrow_mut();
        there.push(true);
        self.0.alive.set(self.0.alive.get() + 1);
        Counted {
            id: there.len() - 1,
            ledger: self.clone(),
        }
    }

    /// The number of values that exist.
    pub(super) fn alive(&self) -> usize {
        self.0.alive.get()
    }

    /// Return whether the value `id` exists.
    pub(super) fn is_alive(&self, id: usize) -> bool {
        self.0.there.borrow()[id]
    }
}

impl Counted {
    /// The number of this value in its family.
    pub(super) fn id(&self) -> usize {
        self.id
    }

    /// The ledger of its family.
    pub(super) fn ledger(&self) -> Ledger {
        self.ledger.clone()
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let book = &self.ledger.0;
        let was = std::mem::replace(&mut book.there.borrow_mut()[self.id], false);
        if !std::thread::panicking() {
            assert!(was, "value {} dropped twice", self.id);
        }
        book.alive.set(book.alive.get().saturating_sub(1));
    }
}
