// SPDX-License-Identifier: GPL-2.0

//! Tests of the stand-in for the kernel's crate, as far as the other tests rely on it.

use super::counted::{Counted, Ledger};
use kernel::{
    alloc::{flags::*, AllocError, KBox, KVVec, KVec},
    error::code::ENOMEM,
    mm::Mm,
    rbtree::{Entry, RBTree, RBTreeNode, RBTreeNodeReservation},
    sync::aref::ARef,
    testing::{failing, live, watch, Live, Plan, Random, TestMm},
};
use proptest::prelude::*;
use std::collections::BTreeMap;

/// A vector doubles its capacity, or takes the requested one if that is more. It never shrinks.
#[test]
fn vector_grows_as_in_the_kernel() {
    let mut vec = KVec::new();
    let mut capacities = Vec::new();
    for nth in 0..9u64 {
        vec.push(nth, GFP_KERNEL).unwrap();
        capacities.push(vec.capacity());
    }
    assert_eq!(capacities, [1, 2, 4, 4, 8, 8, 8, 8, 16]);
    vec.reserve(7, GFP_KERNEL).unwrap();
    assert_eq!(vec.capacity(), 16);
    vec.reserve(100, GFP_KERNEL).unwrap();
    assert_eq!(vec.capacity(), 109);
    vec.truncate(1);
    vec.clear();
    assert_eq!(vec.capacity(), 109);
    assert_eq!(live().bytes, 109 * 8);
    drop(vec);
    assert_eq!(live(), Live::default());
}

#[test]
fn vector_is_unchanged_when_it_cannot_grow() {
    let mut vec = KVec::with_capacity(2, GFP_KERNEL).unwrap();
    vec.push('a', GFP_KERNEL).unwrap();
    vec.push('b', GFP_KERNEL).unwrap();
    let result = failing(Plan::Always, || vec.push('c', GFP_KERNEL));
    assert_eq!(result, Err(AllocError));
    assert!(vec.push_within_capacity('c').is_err());
    assert!(vec.insert_within_capacity(0, 'c').is_err());
    assert!(vec.remove(2).is_err());
    assert_eq!(&*vec, ['a', 'b']);
    assert_eq!(vec.capacity(), 2);
    assert_eq!(vec.into_iter().collect::<String>(), "ab");
    assert_eq!(live(), Live::default());
}

/// Sizes on which code that reports its own size relies.
#[test]
fn sizes_of_the_kernel() {
    assert_eq!(size_of::<KVec<u64>>(), 24);
    assert_eq!(size_of::<KBox<u64>>(), 8);
    let mut tree = RBTree::new();
    tree.try_create_and_insert(1u64, [0u64; 3], GFP_KERNEL)
        .unwrap();
    assert_eq!(live().bytes, 24 + 8 + 24);
}

/// Physically contiguous memory has a limit.
#[test]
fn kmalloc_has_a_limit() {
    let limit = 4 << 20;
    assert!(KVec::<u8>::with_capacity(limit, GFP_KERNEL).is_ok());
    assert!(KVec::<u8>::with_capacity(limit + 1, GFP_KERNEL).is_err());
    assert!(KVVec::<u8>::with_capacity(limit + 1, GFP_KERNEL).is_ok());
}

#[test]
fn plans() {
    let tries = |plan| {
        failing(plan, || {
            (0..5)
                .map(|_| KBox::new(0u8, GFP_KERNEL).is_ok())
                .collect::<Vec<_>>()
        })
    };
    assert_eq!(tries(Plan::Never), [true; 5]);
    assert_eq!(tries(Plan::Always), [false; 5]);
    assert_eq!(tries(Plan::Nth(2)), [true, true, false, true, true]);
    assert_eq!(tries(Plan::After(2)), [true, true, false, false, false]);
    let seldom = |seed| Plan::Percent { percent: 20, seed };
    let failed = |seed| {
        let run = || (0..1000).for_each(|_| drop(KBox::new(0u8, GFP_KERNEL)));
        watch(|| failing(seldom(seed), run)).1.failed
    };
    assert!((150..250).contains(&failed(1)), "{}", failed(1));
    assert_eq!(failed(1), failed(1));
    // The plan ends with its scope, even if that panics.
    let panics = || failing(Plan::Always, || panic!("as it should"));
    assert!(std::panic::catch_unwind(panics).is_err());
    assert!(KBox::new(0u8, GFP_KERNEL).is_ok());
    // A zero-sized value needs no memory.
    assert!(failing(Plan::Always, || KBox::new((), GFP_KERNEL)).is_ok());
}

#[test]
fn sleeping_is_noticed() {
    for (flags, sleeps) in [
        (GFP_KERNEL, 1),
        (GFP_KERNEL_ACCOUNT, 1),
        (GFP_KERNEL | __GFP_NOWARN, 1),
        (GFP_NOWAIT, 0),
        (GFP_ATOMIC, 0),
    ] {
        let (_, events) = watch(|| drop(KBox::new(0u8, flags)));
        assert_eq!(
            (events.sleeping, events.allocs, events.frees),
            (sleeps, 1, 1)
        );
    }
}

#[test]
#[should_panic(expected = "references on an mm were leaked")]
fn leaked_reference_is_noticed() {
    let mm = TestMm::new();
    std::mem::forget(ARef::from(mm.mm()));
}

#[test]
#[should_panic(expected = "a reference that did not exist")]
fn reference_dropped_twice_is_noticed() {
    let mm = TestMm::new();
    let raw = ARef::<Mm>::into_raw(mm.mm().into());
    for _ in 0..2 {
        // SAFETY: The second reference is wrong on purpose. `mm` still exists.
        drop(unsafe { ARef::from_raw(raw) });
    }
}

#[test]
#[should_panic(expected = "dropped twice")]
fn value_dropped_twice_is_noticed() {
    let value = std::mem::ManuallyDrop::new(Ledger::default().make());
    for _ in 0..2 {
        // SAFETY: The value owns one reference, which is leaked here, so its memory stays.
        drop(unsafe { leak_and_copy(&value) });
    }
}

/// Return a copy of a value, and keep its ledger forever.
///
/// # Safety
///
/// `value` is not used otherwise.
unsafe fn leak_and_copy(value: &Counted) -> Counted {
    std::mem::forget(value.ledger());
    // SAFETY: The ledger, which is all that a value owns, has one more reference than is dropped.
    unsafe { std::ptr::read(value) }
}

#[derive(Clone, Debug)]
enum Op {
    Insert(u8, Plan),
    Reserve(u8),
    RemoveNode(u8),
    Remove(u8),
    Change(u8),
    Entry(u8),
    LowerBound(u8),
    Cut(u8, u8),
}

fn op() -> impl Strategy<Value = Op> {
    let key = || 0..32u8;
    let plan = prop_oneof![3 => Just(Plan::Never), 1 => Just(Plan::Nth(0))];
    prop_oneof![
        4 => (key(), plan).prop_map(|(key, plan)| Op::Insert(key, plan)),
        2 => key().prop_map(Op::Reserve),
        1 => key().prop_map(Op::RemoveNode),
        2 => key().prop_map(Op::Remove),
        1 => key().prop_map(Op::Change),
        1 => key().prop_map(Op::Entry),
        2 => key().prop_map(Op::LowerBound),
        2 => (key(), 0..3u8).prop_map(|(key, which)| Op::Cut(key, which)),
    ]
}

/// A tree, and its expected content.
struct Pair {
    tree: RBTree<u8, Counted>,
    model: BTreeMap<u8, usize>,
    ledger: Ledger,
}

impl Pair {
    fn insert(&mut self, key: u8, plan: Plan) {
        let value = self.ledger.make();
        let id = value.id();
        let insert = || self.tree.try_create_and_insert(key, value, GFP_NOWAIT);
        match failing(plan, insert) {
            Ok(old) => {
                let old = old.map(|node| node.to_key_value().1.id());
                assert_eq!(old, self.model.insert(key, id));
            }
            Err(err) => assert_eq!(err, ENOMEM),
        }
    }

    /// Insert a node into memory that was allocated before.
    fn insert_reserved(&mut self, key: u8) {
        let value = self.ledger.make();
        let id = value.id();
        let reservation = RBTreeNodeReservation::new(GFP_KERNEL).unwrap();
        let (old, events) = watch(|| self.tree.insert(reservation.into_node(key, value)));
        assert_eq!(events.allocs + events.frees, 0);
        let old = old.map(|node| node.to_key_value().1.id());
        assert_eq!(old, self.model.insert(key, id));
    }

    fn remove_node(&mut self, key: u8) {
        let (node, events) = watch(|| self.tree.remove_node(&key));
        assert_eq!(events.frees, 0);
        let found = node.map(|node: RBTreeNode<_, _>| {
            let (key, value) = node.to_key_value();
            (key, value.id())
        });
        assert_eq!(found, self.model.remove_entry(&key));
    }

    fn entry(&mut self, key: u8) {
        let value = self.ledger.make();
        let id = value.id();
        match self.tree.entry(key) {
            Entry::Vacant(entry) => {
                let reservation = RBTreeNodeReservation::new(GFP_KERNEL).unwrap();
                assert_eq!(entry.insert(value, reservation).id(), id);
            }
            Entry::Occupied(mut entry) => *entry.get_mut() = value,
        }
        self.model.insert(key, id);
    }

    fn lower_bound(&self, key: u8) {
        let cursor = self.tree.cursor_lower_bound(&key);
        let at = cursor.as_ref().map(|cursor| *cursor.current().0);
        assert_eq!(at, self.model.range(key..).next().map(|(key, _)| *key));
        if let (Some(cursor), Some(at)) = (cursor, at) {
            let prev = self.model.range(..at).next_back();
            let next = self.model.range(at + 1..).next();
            assert_eq!(cursor.peek_prev().map(|(key, _)| key), prev.map(|of| of.0));
            assert_eq!(cursor.peek_next().map(|(key, _)| key), next.map(|of| of.0));
        }
    }

    /// Remove the node at a cursor, or one of its neighbours.
    fn cut(&mut self, key: u8, which: u8) {
        let Some(mut cursor) = self.tree.cursor_lower_bound_mut(&key) else {
            return;
        };
        let at = *cursor.current().0;
        let prev = self.model.range(..at).next_back().map(|(key, _)| *key);
        let next = self.model.range(at + 1..).next().map(|(key, _)| *key);
        let (left, node, expected) = match which {
            0 => {
                let (left, node) = cursor.remove_current();
                let left = left.map(|cursor| *cursor.current().0);
                assert_eq!(left, next.or(prev));
                (left, Some(node), Some(at))
            }
            1 => {
                let node = cursor.remove_prev();
                (Some(*cursor.current().0), node, prev)
            }
            _ => {
                let node = cursor.remove_next();
                (Some(*cursor.current().0), node, next)
            }
        };
        assert!(which == 0 || left == Some(at));
        let removed = node.map(|node| node.to_key_value().0);
        assert_eq!(removed, expected);
        removed.map(|key| self.model.remove(&key));
    }

    fn check(&self) {
        let content = self.tree.iter().map(|(key, value)| (*key, value.id()));
        assert!(content.eq(self.model.iter().map(|(key, id)| (*key, *id))));
        assert_eq!(self.tree.check(), self.model.len());
        assert_eq!(self.tree.is_empty(), self.model.is_empty());
        let front = self.tree.cursor_front().map(|at| *at.current().0);
        let back = self.tree.cursor_back().map(|at| *at.current().0);
        assert_eq!(front, self.model.keys().next().copied());
        assert_eq!(back, self.model.keys().next_back().copied());
        assert_eq!(live().allocations, self.model.len());
        assert_eq!(self.ledger.alive(), self.model.len());
    }
}

proptest! {
    #![proptest_config(super::cases(96))]

    #[test]
    fn tree_is_like_a_map(ops in prop::collection::vec(op(), 1..150)) {
        let mut pair = Pair {
            tree: RBTree::new(),
            model: BTreeMap::new(),
            ledger: Ledger::default(),
        };
        for op in ops {
            match op {
                Op::Insert(key, plan) => pair.insert(key, plan),
                Op::Reserve(key) => pair.insert_reserved(key),
                Op::RemoveNode(key) => pair.remove_node(key),
                Op::Remove(key) => {
                    let id = pair.tree.remove(&key).map(|value| value.id());
                    prop_assert_eq!(id, pair.model.remove(&key));
                }
                Op::Change(key) => {
                    if let Some(value) = pair.tree.get_mut(&key) {
                        *value = pair.ledger.make();
                        pair.model.insert(key, value.id());
                    }
                    let id = pair.tree.get(&key).map(Counted::id);
                    prop_assert_eq!(id, pair.model.get(&key).copied());
                }
                Op::Entry(key) => pair.entry(key),
                Op::LowerBound(key) => pair.lower_bound(key),
                Op::Cut(key, which) => pair.cut(key, which),
            }
            pair.check();
        }
        drop(pair.tree);
        prop_assert_eq!(live(), Live::default());
        prop_assert_eq!(pair.ledger.alive(), 0);
    }
}

/// The tree stays balanced with many nodes, in any order of insertion and removal.
#[test]
fn large_trees() {
    for seed in 0..6 {
        let mut random = Random::new(seed);
        let mut order: Vec<u64> = (0..3000).map(|nth| nth * 3).collect();
        let shuffle = |order: &mut Vec<u64>, random: &mut Random| {
            for at in (1..order.len()).rev() {
                order.swap(at, random.below(at as u64 + 1) as usize);
            }
        };
        match seed {
            0 => {}
            1 => order.reverse(),
            _ => shuffle(&mut order, &mut random),
        }
        let mut tree = RBTree::new();
        let mut model = BTreeMap::new();
        for (nth, &key) in order.iter().enumerate() {
            assert!(tree.try_create_and_insert(key, key + 1, GFP_KERNEL).is_ok());
            model.insert(key, key + 1);
            if nth % 97 == 0 {
                assert_eq!(tree.check(), nth + 1);
            }
        }
        for value in tree.values_mut() {
            *value += 1;
        }
        assert!(tree
            .values()
            .eq(model.keys().map(|key| key + 2).collect::<Vec<_>>().iter()));
        if seed % 2 == 1 {
            shuffle(&mut order, &mut random);
        }
        for (nth, key) in order.iter().enumerate().take(2900) {
            assert_eq!(tree.remove(key), Some(key + 2));
            model.remove(key);
            if nth % 97 == 0 {
                assert_eq!(tree.check(), model.len());
                assert!(tree.keys().eq(model.keys()));
            }
        }
        drop(tree);
        assert_eq!(live(), Live::default());
    }
}
