// SPDX-License-Identifier: GPL-2.0

//! Tests of `engine/pagemap.rs`: against a map of the standard library.

use super::counted::{Counted, Ledger};
use crate::engine::pagemap::PageMap;
use kernel::{
    alloc::flags::GFP_NOWAIT,
    error::code::ENOMEM,
    page::{PAGE_MASK, PAGE_SIZE},
    testing::{failing, live, watch, Events, Live, Plan, Random},
};
use proptest::{prelude::*, sample::Index};
use std::collections::BTreeMap;

const LEAF: usize = 512 * PAGE_SIZE;
/// The last pages of user space with four and with five levels of page tables.
const LAST_4_LEVELS: usize = (1 << 47) - 2 * PAGE_SIZE;
const LAST_5_LEVELS: usize = (1 << 56) - 2 * PAGE_SIZE;
const LAST_OF_ALL: usize = usize::MAX & PAGE_MASK;

/// The map, and what should be in it.
struct Pair {
    map: PageMap<Counted>,
    /// Which value each page has.
    model: BTreeMap<usize, usize>,
    /// How many pages of each leaf have one.
    leaves: BTreeMap<usize, usize>,
    ledger: Ledger,
}

impl Pair {
    fn new() -> Self {
        assert_eq!(live(), Live::default(), "left behind by a test before");
        Self {
            map: PageMap::new(),
            model: BTreeMap::new(),
            leaves: BTreeMap::new(),
            ledger: Ledger::default(),
        }
    }

    fn insert(&mut self, addr: usize, plan: Plan) {
        let word = self.ledger.make();
        let id = word.id();
        let had = self.model.get(&addr).copied();
        let (result, events) = watch(|| failing(plan, || self.map.insert(addr, word, GFP_NOWAIT)));
        assert_eq!(result.is_err(), events.failed > 0);
        assert_eq!(events.sleeping, 0, "other flags than those it was given");
        if had.is_some() {
            assert_eq!(events, Events::default(), "allocated for a page it had");
        }
        match result {
            Ok(old) => {
                assert_eq!(old.map(|word| word.id()), had);
                self.model.insert(addr, id);
                if had.is_none() {
                    *self.leaves.entry(addr / LEAF).or_default() += 1;
                }
            }
            Err(err) => {
                assert_eq!(err, ENOMEM);
                assert!(!self.ledger.is_alive(id));
                self.check_content();
            }
        }
    }

    fn remove(&mut self, addr: usize) {
        let (word, events) = watch(|| self.map.remove(addr));
        assert_eq!(events.allocs + events.failed, 0, "allocated to remove");
        let expected = self.model.remove(&addr);
        assert_eq!(word.as_ref().map(Counted::id), expected);
        if expected.is_some() {
            let left = self.leaves.get_mut(&(addr / LEAF)).unwrap();
            *left -= 1;
            if *left == 0 {
                self.leaves.remove(&(addr / LEAF));
            }
        }
    }

    fn change(&mut self, addr: usize) {
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

    fn get(&self, addr: usize) {
        let id = self.map.get(addr).map(Counted::id);
        assert_eq!(id, self.model.get(&addr).copied());
    }

    fn next(&self, from: usize, to: usize) -> Option<usize> {
        let addr = self.map.next(from, to);
        let expected = if from < to {
            self.model.range(from..to).next().map(|(addr, _)| *addr)
        } else {
            None
        };
        assert_eq!(addr, expected, "next({from:#x}, {to:#x})");
        addr
    }

    /// Goes through a range as the scan does.
    fn walk(&self, from: usize, to: usize) -> Vec<usize> {
        let mut found = Vec::new();
        let mut at = Some(from);
        while let Some(addr) = at.and_then(|at| self.next(at, to)) {
            found.push(addr);
            at = addr.checked_add(PAGE_SIZE);
        }
        found
    }

    /// Empties a range as the engine does.
    fn clear(&mut self, from: usize, to: usize) {
        while let Some(addr) = self.next(from, to) {
            self.remove(addr);
        }
    }

    /// No leaf but those with pages is there, and the map knows how large it is.
    fn check_memory(&self) {
        let live = live();
        // A node for each leaf, and its words.
        assert_eq!(live.allocations, 2 * self.leaves.len());
        assert_eq!(live.bytes, self.map.bytes());
        assert_eq!(self.ledger.alive(), self.model.len());
    }

    fn check_content(&self) {
        let found = self.walk(0, usize::MAX);
        assert!(found.iter().eq(self.model.keys()));
        found.iter().for_each(|&addr| self.get(addr));
        self.check_memory();
    }

    /// Removes all that is left and drops the map.
    fn empty_by_removing(mut self) {
        self.check_content();
        self.clear(0, usize::MAX);
        assert_eq!(self.map.bytes(), 0);
        self.check_memory();
        assert_eq!(live(), Live::default());
    }

    /// Drops the map with all that is left in it.
    fn empty_by_dropping(self) {
        self.check_content();
        let Self { map, ledger, .. } = self;
        drop(map);
        assert_eq!(live(), Live::default());
        assert_eq!(ledger.alive(), 0);
    }
}

#[derive(Clone, Debug)]
enum Op {
    Insert(Index, Plan),
    Remove(Index),
    Change(Index),
    Get(Index),
    /// From a page of the pool to a page of the pool, and so many bytes more.
    Next(Index, Index, usize),
    /// From a page of the pool, so many bytes.
    NextBytes(Index, usize),
    Walk(Index, Index),
    Clear(Index, Index),
}

fn plan() -> impl Strategy<Value = Plan> {
    prop_oneof![
        6 => Just(Plan::Never),
        1 => Just(Plan::Always),
        1 => (0..3usize).prop_map(Plan::Nth),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    let page = any::<Index>;
    prop_oneof![
        40 => (page(), plan()).prop_map(|(at, plan)| Op::Insert(at, plan)),
        24 => page().prop_map(Op::Remove),
        8 => page().prop_map(Op::Change),
        8 => page().prop_map(Op::Get),
        8 => (page(), page(), 0..2 * PAGE_SIZE).prop_map(|(a, b, more)| Op::Next(a, b, more)),
        8 => (page(), 0..3 * LEAF).prop_map(|(a, bytes)| Op::NextBytes(a, bytes)),
        3 => (page(), page()).prop_map(|(a, b)| Op::Walk(a, b)),
        1 => (page(), page()).prop_map(|(a, b)| Op::Clear(a, b)),
    ]
}

/// The pages of one case.
fn pool() -> impl Strategy<Value = Vec<usize>> {
    let start = prop_oneof![
        Just(0),
        0..3 * LEAF,
        LAST_4_LEVELS - 2 * LEAF..LAST_4_LEVELS,
        LAST_5_LEVELS - 2 * LEAF..LAST_5_LEVELS,
        Just(LAST_OF_ALL - LEAF),
    ];
    let dense = (start, 1..1400usize).prop_map(|(start, pages)| {
        let start = start & PAGE_MASK;
        (0..pages)
            .map_while(|nth| start.checked_add(nth * PAGE_SIZE))
            .collect()
    });
    let anywhere = prop_oneof![
        Just(0),
        Just(LAST_4_LEVELS),
        Just(LAST_5_LEVELS),
        Just(LAST_OF_ALL),
        0..1usize << 47,
        0..1usize << 56,
        any::<usize>(),
    ];
    let sparse = prop::collection::vec(anywhere.prop_map(|addr| addr & PAGE_MASK), 1..200);
    let edges = prop::collection::vec(edge(), 1..60);
    prop_oneof![dense, sparse, edges]
}

/// A page at the edge of a leaf, or of one of its words of bits.
fn edge() -> impl Strategy<Value = usize> {
    let leaf = prop::sample::select(vec![
        0,
        1,
        2,
        LAST_4_LEVELS / LEAF - 1,
        LAST_4_LEVELS / LEAF,
        LAST_4_LEVELS / LEAF + 1,
        LAST_5_LEVELS / LEAF,
        LAST_OF_ALL / LEAF - 1,
        LAST_OF_ALL / LEAF,
    ]);
    let page = prop::sample::select(vec![
        0, 1, 62, 63, 64, 65, 127, 128, 255, 256, 447, 448, 510, 511,
    ]);
    (leaf, page).prop_map(|(leaf, page)| leaf * LEAF + page * PAGE_SIZE)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn is_like_a_map(
        pool in pool(),
        full in any::<bool>(),
        ops in prop::collection::vec(op(), 1..400),
        by_removing in any::<bool>(),
    ) {
        let mut pair = Pair::new();
        if full {
            pool.iter().for_each(|&addr| pair.insert(addr, Plan::Never));
        }
        let page = |at: Index| *at.get(&pool);
        for op in ops {
            match op {
                Op::Insert(at, plan) => pair.insert(page(at), plan),
                Op::Remove(at) => pair.remove(page(at)),
                Op::Change(at) => pair.change(page(at)),
                Op::Get(at) => pair.get(page(at)),
                Op::Next(from, to, more) => {
                    pair.next(page(from), page(to).saturating_add(more));
                }
                Op::NextBytes(from, bytes) => {
                    pair.next(page(from), page(from).saturating_add(bytes));
                }
                Op::Walk(from, to) => {
                    pair.walk(page(from), page(to));
                }
                Op::Clear(from, to) => pair.clear(page(from), page(to)),
            }
            pair.check_memory();
        }
        if by_removing {
            pair.empty_by_removing();
        } else {
            pair.empty_by_dropping();
        }
    }
}

/// Grows and shrinks many times over, with allocations failing now and then.
#[test]
fn long_histories() {
    for seed in 0..4 {
        let mut random = Random::new(seed);
        let mut pair = Pair::new();
        // A few leaves near each of these, so that neighbours come and go.
        let starts = [0, 1 << 30, LAST_4_LEVELS - 2 * LEAF, LAST_OF_ALL - 2 * LEAF];
        let pages = [600, 1100, 1536, 24][seed as usize];
        for phase in 0..8 {
            let grows = phase % 2 == 0;
            for _ in 0..4000 {
                let start = starts[random.below(4) as usize] & PAGE_MASK;
                let addr = start.saturating_add(random.below(pages) as usize * PAGE_SIZE);
                let addr = addr & PAGE_MASK;
                match random.below(10) {
                    0 => pair.change(addr),
                    1 => {
                        pair.next(addr, addr.saturating_add(random.below(1 << 24) as usize));
                    }
                    2 => pair.insert(addr, Plan::Always),
                    n if (n < 9) == grows => pair.insert(addr, Plan::Never),
                    _ => pair.remove(addr),
                }
                if random.below(64) == 0 {
                    pair.check_memory();
                }
            }
            pair.check_content();
        }
        pair.empty_by_removing();
    }
}

/// Each of the allocations of an insertion fails once.
#[test]
fn unchanged_when_insertion_fails() {
    // Into a new leaf: its node, then its words.
    for nth in 0..2 {
        let mut pair = Pair::new();
        pair.insert(LEAF, Plan::Nth(nth));
        assert!(pair.model.is_empty());
        assert_eq!(pair.map.bytes(), 0);
        pair.insert(LEAF, Plan::Never);
        pair.empty_by_removing();
    }
    // Into a full leaf, at its begin, in its middle and at its end.
    for page in [0, 2, 9] {
        let mut pair = Pair::new();
        for nth in [1, 3, 4, 5] {
            pair.insert(nth * PAGE_SIZE, Plan::Never);
        }
        pair.insert(page * PAGE_SIZE, Plan::Nth(0));
        assert_eq!(pair.model.len(), 4);
        pair.insert(page * PAGE_SIZE, Plan::Never);
        assert_eq!(pair.model.len(), 5);
        pair.empty_by_dropping();
    }
}

/// A page that has a word gets another without memory.
#[test]
fn replaces_without_memory() {
    let mut pair = Pair::new();
    for addr in [0, LEAF - PAGE_SIZE, LEAF, LAST_OF_ALL] {
        pair.insert(addr, Plan::Never);
        pair.insert(addr, Plan::Always);
    }
    assert_eq!(pair.model.len(), 4);
    pair.empty_by_removing();
}

#[test]
fn next_at_the_edges() {
    let mut pair = Pair::new();
    assert_eq!(pair.next(0, usize::MAX), None);
    for addr in [0, LEAF - PAGE_SIZE, LEAF, 3 * LEAF, LAST_OF_ALL] {
        pair.insert(addr, Plan::Never);
    }
    // Empty and backward ranges.
    assert_eq!(pair.next(0, 0), None);
    assert_eq!(pair.next(LEAF, LEAF), None);
    assert_eq!(pair.next(LEAF, 0), None);
    // The start belongs to the range, the end does not.
    assert_eq!(pair.next(0, 1), Some(0));
    assert_eq!(pair.next(PAGE_SIZE, LEAF - PAGE_SIZE), None);
    assert_eq!(pair.next(PAGE_SIZE, LEAF), Some(LEAF - PAGE_SIZE));
    assert_eq!(pair.next(LEAF, LEAF + 1), Some(LEAF));
    // Nothing more in this leaf, and the next one that there is lies behind a hole.
    assert_eq!(pair.next(LEAF + PAGE_SIZE, 3 * LEAF), None);
    assert_eq!(pair.next(LEAF + PAGE_SIZE, usize::MAX), Some(3 * LEAF));
    // From a leaf that there is not.
    assert_eq!(pair.next(2 * LEAF + PAGE_SIZE, usize::MAX), Some(3 * LEAF));
    assert_eq!(pair.next(4 * LEAF, usize::MAX), Some(LAST_OF_ALL));
    assert_eq!(pair.next(LAST_OF_ALL, LAST_OF_ALL), None);
    assert_eq!(pair.next(LAST_OF_ALL, usize::MAX), Some(LAST_OF_ALL));
    pair.empty_by_removing();
}

/// What is remembered of many pages side by side costs little more than their words.
#[test]
fn dense_pages_are_cheap() {
    let pages = 8 * 512;
    let mut map = PageMap::new();
    for nth in 0..pages {
        let old = map.insert(nth * PAGE_SIZE, nth as u64, GFP_NOWAIT);
        assert!(matches!(old, Ok(None)));
    }
    assert_eq!(map.bytes(), live().bytes);
    let overhead = map.bytes() - pages * size_of::<u64>();
    assert!(overhead * 4 <= pages, "{overhead} bytes");
}
