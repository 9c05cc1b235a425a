// SPDX-License-Identifier: GPL-2.0

//! A page map, and a map of the standard library with the expected content.

use super::LEAF;
use crate::{
    ksm::page_map::{Found, LeafCursor, PageMap},
    tests::counted::{Counted, Ledger},
};
use kernel::{
    alloc::flags::GFP_NOWAIT,
    page::PAGE_SIZE,
    testing::{failing, live, watch, Events, Live, Plan},
};
use std::collections::BTreeMap;

/// What happens to a page that is visited.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Look {
    /// It gets an entry if it has none.
    Remember,
    /// It gets an entry if it has none, and another one if it has.
    Change,
    /// It keeps its entry, if it has one.
    Skip,
}

/// How to visit the pages of a leaf.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Way {
    /// One after the other.
    Stepwise,
    /// All at once if possible.
    Runs,
}

/// The map, and its expected content.
pub(super) struct Pair {
    pub(super) map: PageMap<Counted>,
    /// The value of each page.
    pub(super) model: BTreeMap<usize, usize>,
    /// The number of pages with a value in each leaf.
    pub(super) leaves: BTreeMap<usize, usize>,
    pub(super) ledger: Ledger,
}

impl Pair {
    pub(super) fn new() -> Self {
        assert_eq!(live(), Live::default(), "left behind by a test before");
        Self {
            map: PageMap::new(),
            model: BTreeMap::new(),
            leaves: BTreeMap::new(),
            ledger: Ledger::default(),
        }
    }

    pub(super) fn with(pages: impl IntoIterator<Item = usize>) -> Self {
        let mut pair = Self::new();
        for addr in pages {
            pair.remember(addr, Plan::Never);
        }
        pair
    }

    /// Record that a page has the value `id`.
    fn note(&mut self, addr: usize, id: usize) {
        if self.model.insert(addr, id).is_none() {
            *self.leaves.entry(addr / LEAF).or_default() += 1;
        }
    }

    /// Record that a page has no value. Return the one that it had.
    fn note_gone(&mut self, addr: usize) -> Option<usize> {
        let id = self.model.remove(&addr)?;
        let left = self.leaves.get_mut(&(addr / LEAF)).unwrap();
        *left -= 1;
        if *left == 0 {
            self.leaves.remove(&(addr / LEAF));
        }
        Some(id)
    }

    /// Do what the engine does with a batch of pages found in `from..to`: remember these pages, except those
    /// without memory for it, and no others.
    pub(super) fn absorb(
        &mut self,
        from: usize,
        to: usize,
        batch: &[(usize, Look)],
        way: Way,
        plan: Plan,
    ) {
        let known = batch.iter().all(|page| self.model.contains_key(&page.0));
        let unchanged = known && self.model.range(from..to).count() == batch.len();
        let ((), events) = watch(|| {
            failing(plan, || {
                let mut covered = from;
                for leaf in batch.chunk_by(|a, b| a.0 / LEAF == b.0 / LEAF) {
                    self.clear(covered, leaf[0].0);
                    self.absorb_leaf(leaf, way);
                    covered = leaf[leaf.len() - 1].0.saturating_add(PAGE_SIZE);
                }
                self.clear(covered, to);
            })
        });
        assert_eq!(events.sleeping, 0, "other flags than those it was given");
        if unchanged {
            assert_eq!(events, Events::default(), "memory for what is known");
        }
        // Only pages without memory for them are missing.
        for &(addr, look) in batch {
            if look != Look::Skip && events.failed == 0 {
                assert!(self.model.contains_key(&addr), "{addr:#x}");
            }
        }
        let first = |&(addr, _): &(usize, Look)| addr;
        for addr in self.model.range(from..to).map(|(addr, _)| addr) {
            assert!(batch.binary_search_by_key(addr, first).is_ok());
        }
    }

    /// Do the same for pages of a single leaf.
    fn absorb_leaf(&mut self, pages: &[(usize, Look)], way: Way) {
        let first = pages[0].0;
        let last = pages[pages.len() - 1].0;
        // Borrowed separately from the rest of the pair.
        let mut map = std::mem::replace(&mut self.map, PageMap::new());
        let (leaf, made) = watch(|| map.leaf_from(first, 0, GFP_NOWAIT));
        let there = self.leaves.contains_key(&(first / LEAF));
        assert!(made.allocs + made.failed == usize::from(!there), "{made:?}");
        match leaf {
            Ok(mut leaf) => {
                let there = self.leaves.get(&(first / LEAF)).copied().unwrap_or(0);
                assert_eq!(leaf.len(), there);
                let dense = (last - first) / PAGE_SIZE + 1 == pages.len();
                let in_runs = way == Way::Runs && dense && self.absorb_run(&mut leaf, pages);
                if !in_runs {
                    let expected = pages.len().saturating_sub(leaf.len());
                    for page in pages {
                        self.absorb_page(&mut leaf, *page, expected);
                    }
                }
            }
            Err(_) => assert!(made.failed == 1 && !there),
        }
        map.prune(first, Some(0));
        self.map = map;
    }

    /// Visit pages without holes at once: all known, or all new. Return whether they were one or the other.
    fn absorb_run(&mut self, leaf: &mut LeafCursor<'_, Counted>, pages: &[(usize, Look)]) -> bool {
        let first = pages[0].0;
        let known = pages.iter().all(|page| self.model.contains_key(&page.0));
        match leaf.known_run(pages.len()) {
            Some(words) => {
                assert!(known);
                assert_eq!(words.len(), pages.len());
                for (word, &(addr, look)) in words.iter_mut().zip(pages) {
                    self.look_at(addr, word, look);
                }
                return true;
            }
            None => assert!(!known),
        }
        let end = (first / LEAF + 1).saturating_mul(LEAF);
        let empty = self.model.range(first..end).next().is_none();
        assert_eq!(leaf.is_empty_from_here(), empty);
        if !empty || pages.iter().any(|page| page.1 == Look::Skip) {
            return false;
        }
        let mut made = Vec::new();
        let make = |nth| {
            assert_eq!(nth, made.len());
            let word = self.ledger.make();
            made.push(word.id());
            word
        };
        let (filled, events) = watch(|| leaf.fill_run(pages.len(), GFP_NOWAIT, make));
        assert_eq!(filled, events.failed == 0);
        // One allocation for the bits, one for the entries.
        assert!(events.allocs <= 2);
        assert_eq!(made.len(), if filled { pages.len() } else { 0 });
        for (&(addr, _), id) in pages.iter().zip(made) {
            self.note(addr, id);
        }
        filled
    }

    fn absorb_page(
        &mut self,
        leaf: &mut LeafCursor<'_, Counted>,
        (addr, look): (usize, Look),
        expected: usize,
    ) {
        loop {
            match leaf.seek(addr) {
                Found::Passed(passed, word) => {
                    // In order, and none twice: this is the first one left before this page.
                    let from = addr / LEAF * LEAF;
                    assert!((from..addr).contains(&passed));
                    let id = word.id();
                    assert_eq!(self.note_gone(passed), Some(id));
                    assert_eq!(leaf.remove_passed().map(|word| word.id()), Some(id));
                    continue;
                }
                Found::Entry(word) => {
                    self.look_at(addr, word, look);
                    return;
                }
                Found::Nothing => break,
            }
        }
        assert!(!self.model.contains_key(&addr), "not found at {addr:#x}");
        if look == Look::Skip {
            return;
        }
        let word = self.ledger.make();
        let id = word.id();
        let (result, events) = watch(|| leaf.insert(word, expected, GFP_NOWAIT));
        assert!(events.allocs <= 2);
        match result {
            Ok(()) => self.note(addr, id),
            // The entry is returned, for the caller to drop.
            Err(word) => {
                assert_eq!((word.id(), events.failed), (id, 1));
                assert_eq!(
                    leaf.len(),
                    self.leaves.get(&(addr / LEAF)).copied().unwrap_or(0)
                );
            }
        }
    }

    fn look_at(&mut self, addr: usize, word: &mut Counted, look: Look) {
        assert_eq!(Some(word.id()), self.model.get(&addr).copied(), "{addr:#x}");
        if look == Look::Change {
            *word = self.ledger.make();
            self.model.insert(addr, word.id());
        }
    }

    /// Add an entry for a single page, if it has none.
    pub(super) fn remember(&mut self, addr: usize, plan: Plan) {
        let word = self.ledger.make();
        let id = word.id();
        let had = self.model.get(&addr).copied();
        let map = &mut self.map;
        let (found, events) = watch(|| {
            failing(plan, || {
                let mut leaf = map.leaf_from(addr, 0, GFP_NOWAIT).ok()?;
                match leaf.seek(addr) {
                    Found::Nothing => leaf.insert(word, 1, GFP_NOWAIT).ok().map(|()| id),
                    Found::Entry(word) => Some(word.id()),
                    Found::Passed(..) => panic!("passed by a page that was not before"),
                }
            })
        });
        assert_eq!(events.sleeping, 0, "other flags than those it was given");
        assert_eq!(found, had.or((events.failed == 0).then_some(id)));
        assert!(had.is_none() || events.allocs + events.failed == 0);
        match found {
            Some(id) => self.note(addr, id),
            None => self.map.prune(addr, Some(0)),
        }
    }

    pub(super) fn remove(&mut self, addr: usize) {
        let (word, events) = watch(|| self.map.remove(addr, 0));
        // One to move the remaining entries to a smaller allocation.
        assert!(events.allocs + events.failed <= 1);
        assert_eq!(events.sleeping, 0);
        assert_eq!(word.as_ref().map(Counted::id), self.note_gone(addr));
    }

    pub(super) fn change(&mut self, addr: usize) {
        let word = self.map.get_mut(addr);
        assert_eq!(
            word.as_deref().map(Counted::id),
            self.model.get(&addr).copied()
        );
        if let Some(word) = word {
            *word = self.ledger.make();
            self.model.insert(addr, word.id());
        }
    }

    /// Return the first page of `map` in `from..to`, without removing any entry.
    pub(super) fn first_of(map: &mut PageMap<Counted>, from: usize, to: usize) -> Option<usize> {
        let (mut first, mut next) = (None, Some(from));
        while let Some(start) = next.filter(|_| first.is_none()) {
            next = map.retain_leaf(start, to, None, |addr, _| {
                first.get_or_insert(addr);
                true
            });
        }
        first
    }

    pub(super) fn next(&mut self, from: usize, to: usize) -> Option<usize> {
        let addr = Self::first_of(&mut self.map, from, to);
        let expected = if from < to {
            self.model.range(from..to).next().map(|(addr, _)| *addr)
        } else {
            None
        };
        assert_eq!(addr, expected, "next({from:#x}, {to:#x})");
        addr
    }

    /// Walk a range as the scan does.
    pub(super) fn walk(&mut self, from: usize, to: usize) -> Vec<usize> {
        let mut found = Vec::new();
        let mut at = Some(from);
        while let Some(addr) = at.and_then(|at| self.next(at, to)) {
            found.push(addr);
            at = addr.checked_add(PAGE_SIZE);
        }
        found
    }

    /// Visit whole leaves, from the one that begins at `from` on.
    pub(super) fn visit_leaves(&mut self, from: usize) {
        let mut found = Vec::new();
        let mut next = Some(from);
        while let Some(from) = next {
            let before = found.len();
            let each = |addr, word: &Counted| found.push((addr, word.id()));
            let end = self.map.visit_leaf(from, each);
            let leaf = self.model.range(from..).next().map(|(addr, _)| addr / LEAF);
            assert_eq!(end, leaf.map(|leaf| leaf * LEAF + (LEAF - 1)));
            let of_leaf = found[before..]
                .iter()
                .all(|(addr, _)| Some(addr / LEAF) == leaf);
            assert!(of_leaf);
            next = end.and_then(|end| end.checked_add(1));
        }
        assert!(found
            .into_iter()
            .eq(self.model.range(from..).map(|(addr, id)| (*addr, *id))));
    }

    /// Forget the pages in `from..to` except each `nth`, a leaf at a time, as the engine does.
    pub(super) fn forget_range(&mut self, from: usize, to: usize, nth: usize) {
        let keeps = |addr: usize| nth != 0 && addr / PAGE_SIZE % nth == 0;
        let mut next = Some(from);
        while let Some(start) = next {
            let mut seen = Vec::new();
            let map = &mut self.map;
            let (more, events) = watch(|| {
                map.retain_leaf(start, to, Some(0), |addr, word| {
                    seen.push((addr, word.id()));
                    keeps(addr)
                })
            });
            // One to move the remaining entries to a smaller allocation.
            assert!(events.allocs + events.failed <= 1 || events.sleeping == 0);
            // All pages of the first leaf, in order.
            let leaf = self.leaves.range(start / LEAF..).next();
            let leaf = leaf.map(|(leaf, _)| *leaf);
            let leaf = leaf.filter(|leaf| (leaf * LEAF).max(start) < to);
            let expected: Vec<_> = self
                .model
                .range(start..to.max(start))
                .map(|(&addr, &id)| (addr, id))
                .filter(|page| Some(page.0 / LEAF) == leaf)
                .collect();
            assert_eq!(seen, expected);
            for (addr, _) in seen {
                if !keeps(addr) {
                    self.note_gone(addr);
                }
            }
            match (leaf, more) {
                (None, more) => assert_eq!(more, None),
                (Some(leaf), Some(more)) => assert_eq!(more, (leaf + 1) * LEAF),
                (Some(leaf), None) => assert!((leaf + 1).saturating_mul(LEAF) >= to),
            }
            next = more;
        }
    }

    pub(super) fn clear(&mut self, from: usize, to: usize) {
        while let Some(addr) = self.next(from, to) {
            self.remove(addr);
        }
    }

    /// Check that only leaves with pages exist, and that the map knows its size.
    pub(super) fn check_memory(&self) {
        let live = live();
        // A node for each leaf, and bits and entries if it has or had more than one page.
        let (leaves, all) = (self.leaves.len(), live.allocations);
        let larger = self.leaves.values().filter(|pages| **pages > 1).count();
        assert!((leaves + 2 * larger..=3 * leaves).contains(&all), "{all}");
        assert_eq!((all - leaves) % 2, 0);
        assert_eq!(live.bytes, self.map.bytes());
        assert_eq!(self.ledger.alive(), self.model.len());
    }

    pub(super) fn check_content(&mut self) {
        assert!(self.walk(0, usize::MAX).iter().eq(self.model.keys()));
        for (&addr, &id) in &self.model {
            assert_eq!(self.map.get_mut(addr).map(|word| word.id()), Some(id));
        }
        for &leaf in self.leaves.keys() {
            assert!(self.map.has_leaf(leaf * LEAF));
        }
        // Every entry once, in the order of the addresses.
        let mut ids = Vec::new();
        // A few leaves at a time.
        let mut from = Some(0);
        while let Some(addr) = from {
            let mut budget = 3;
            from = self
                .map
                .for_each_from(addr, &mut budget, |word| ids.push(word.id()));
            assert!(from.is_none() || budget == 0);
        }
        assert_eq!(self.map.is_empty(), self.model.is_empty());
        assert!(ids.iter().eq(self.model.values()));
        self.check_memory();
    }

    /// Remove all remaining entries and drop the map.
    pub(super) fn empty_by_removing(mut self) {
        self.check_content();
        self.clear(0, usize::MAX);
        assert_eq!(self.map.bytes(), 0);
        self.check_memory();
        assert_eq!(live(), Live::default());
    }

    /// Drop the map with all its entries.
    pub(super) fn empty_by_dropping(mut self) {
        self.check_content();
        let Self { map, ledger, .. } = self;
        drop(map);
        assert_eq!(live(), Live::default());
        assert_eq!(ledger.alive(), 0);
    }
}
