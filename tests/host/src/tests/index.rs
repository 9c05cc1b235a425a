// SPDX-License-Identifier: GPL-2.0

//! Tests of `engine/index.rs`: against plain maps.

use super::counted::{Counted, Ledger};
use crate::engine::{
    checksum::Checksum,
    index::{Index, Place, StableKey},
};
use kernel::{
    alloc::flags::GFP_NOWAIT,
    error::code::ENOMEM,
    testing::{failing, live, watch, Events, Live, Plan},
};
use proptest::{prelude::*, sample};
use std::collections::BTreeMap;

/// Few, so that many nodes share one; both ends of the range are among them.
const SUMS: [u64; 5] = [0, 1, 2, (u64::MAX >> 3) - 1, u64::MAX >> 3];

/// A key as plain numbers.
type Plain = (u64, u64);

fn plain(key: StableKey) -> Plain {
    (key.sum.get(), key.nth)
}

fn sum(nth: usize) -> Checksum {
    Checksum::from_raw(SUMS[nth % SUMS.len()])
}

fn place(nth: usize) -> Place {
    Place {
        slot: nth as u64 / 3,
        addr: nth % 3 * 4096,
    }
}

/// The first key behind `after` in `tree`.
fn next_in(tree: &BTreeMap<Plain, usize>, after: Option<Plain>) -> Option<Plain> {
    tree.keys()
        .copied()
        .find(|key| after.is_none_or(|after| *key > after))
}

/// The index, and what should be in it.
struct Pair {
    index: Index<Counted>,
    stable: BTreeMap<Plain, usize>,
    limbo: BTreeMap<Plain, usize>,
    unstable: BTreeMap<u64, Place>,
    /// All keys ever made.
    keys: Vec<StableKey>,
    ledger: Ledger,
}

impl Pair {
    fn new() -> Self {
        assert_eq!(live(), Live::default(), "left behind by a test before");
        Self {
            index: Index::new(),
            stable: BTreeMap::new(),
            limbo: BTreeMap::new(),
            unstable: BTreeMap::new(),
            keys: Vec::new(),
            ledger: Ledger::default(),
        }
    }

    /// One of the keys ever made.
    fn key(&self, at: sample::Index) -> Option<StableKey> {
        (!self.keys.is_empty()).then(|| *at.get(&self.keys))
    }

    fn new_key(&mut self, sum: Checksum) -> StableKey {
        let key = self.index.new_key(sum);
        assert_eq!(key.sum, sum);
        assert!(self.keys.iter().all(|other| other.nth != key.nth));
        self.keys.push(key);
        key
    }

    fn insert(&mut self, key: StableKey, plan: Plan) {
        let node = self.ledger.make();
        let id = node.id();
        let (result, events) = watch(|| failing(plan, || self.index.insert(key, node, GFP_NOWAIT)));
        assert_eq!(events.sleeping, 0, "other flags than those it was given");
        assert_eq!(result.is_err(), events.failed > 0);
        match result {
            Ok(()) => assert_eq!(self.stable.insert(plain(key), id), None),
            Err(err) => {
                assert_eq!(err, ENOMEM);
                assert!(!self.ledger.is_alive(id));
                self.check_content();
            }
        }
    }

    fn remove(&mut self, key: StableKey) {
        let (node, events) = watch(|| self.index.remove(key));
        let was = self
            .stable
            .remove(&plain(key))
            .or_else(|| self.limbo.remove(&plain(key)));
        assert_eq!(node.map(|node| node.id()), was);
        assert_eq!(events.allocs + events.failed, 0);
        assert_eq!(events.frees, usize::from(was.is_some()));
    }

    fn move_to_limbo(&mut self, key: StableKey) {
        let ((), events) = watch(|| self.index.to_limbo(key));
        assert_eq!(events, Events::default(), "not just moved");
        if let Some(id) = self.stable.remove(&plain(key)) {
            self.limbo.insert(plain(key), id);
        }
    }

    fn move_to_stable(&mut self, key: StableKey) {
        let ((), events) = watch(|| self.index.to_stable(key));
        assert_eq!(events, Events::default(), "not just moved");
        if let Some(id) = self.limbo.remove(&plain(key)) {
            self.stable.insert(plain(key), id);
        }
    }

    /// Takes a node out and puts it back, as is done with one that turns out to be in use.
    fn put_back(&mut self, key: StableKey) {
        let Some(node) = self.index.remove(key) else {
            return;
        };
        let id = node.id();
        assert!(self.index.insert(key, node, GFP_NOWAIT).is_ok());
        self.limbo.remove(&plain(key));
        self.stable.insert(plain(key), id);
    }

    fn next_stable(&self, sum: Checksum, after: Option<StableKey>) -> Option<StableKey> {
        let next = self.index.next_stable(sum, after);
        let of_sum = |(key, id): (&Plain, &usize)| (key.0 == sum.get()).then_some((*key, *id));
        let of_sum = self.stable.iter().filter_map(of_sum).collect();
        assert_eq!(next.map(plain), next_in(&of_sum, after.map(plain)));
        next
    }

    /// All stable nodes with this checksum, as the engine goes through them.
    fn nodes_of(&self, sum: Checksum) -> Vec<StableKey> {
        let mut found = Vec::new();
        let mut key = self.next_stable(sum, None);
        while let Some(at) = key {
            found.push(at);
            key = self.next_stable(sum, Some(at));
        }
        found
    }

    fn next_limbo(&self, after: Option<StableKey>) -> Option<StableKey> {
        let next = self.index.next_limbo(after);
        assert_eq!(next.map(plain), next_in(&self.limbo, after.map(plain)));
        next
    }

    /// Goes through limbo as the engine does, and does with each node what `deeds` says.
    fn sweep(&mut self, deeds: &[Deed]) {
        let before: Vec<Plain> = self.limbo.keys().copied().collect();
        let mut seen = Vec::new();
        let mut deeds = deeds.iter().cycle();
        let mut key = self.next_limbo(None);
        while let Some(at) = key {
            key = self.next_limbo(Some(at));
            seen.push(plain(at));
            match deeds.next().unwrap() {
                Deed::Leave => {}
                Deed::Remove => self.remove(at),
                Deed::ToStable => self.move_to_stable(at),
                // The one that comes next is gone when it comes.
                Deed::RemoveNext => key.into_iter().for_each(|next| self.remove(next)),
            }
        }
        assert_eq!(seen, before);
    }

    fn wait(&mut self, sum: Checksum, place: Place, plan: Plan) {
        let before = self.index.waiting(sum);
        let (result, events) = watch(|| failing(plan, || self.index.wait(sum, place, GFP_NOWAIT)));
        assert_eq!(events.sleeping, 0, "other flags than those it was given");
        assert_eq!(result.is_err(), events.failed > 0);
        if before.is_some() {
            assert_eq!(events, Events::default(), "allocated where somebody waited");
        }
        if let Err(err) = result {
            assert_eq!(err, ENOMEM);
            assert_eq!(self.index.waiting(sum), before);
        } else {
            self.unstable.insert(sum.get(), place);
        }
    }

    fn stop_waiting(&mut self, sum: Checksum, place: Place) {
        self.index.stop_waiting(sum, place);
        if self.unstable.get(&sum.get()) == Some(&place) {
            self.unstable.remove(&sum.get());
        }
    }

    fn check_counts(&self) {
        let (stable, limbo) = (self.stable.len(), self.limbo.len());
        assert_eq!(self.index.stable_len(), stable);
        assert_eq!(self.index.limbo_len(), limbo);
        assert_eq!(self.index.unstable_len(), self.unstable.len());
        assert_eq!(self.index.has_no_nodes(), stable + limbo == 0);
        assert_eq!(self.ledger.alive(), stable + limbo);
        assert_eq!(live().allocations, stable + limbo + self.unstable.len());
    }

    fn check_content(&self) {
        self.check_counts();
        for key in &self.keys {
            let id = self.stable.get(&plain(*key));
            let id = id.or_else(|| self.limbo.get(&plain(*key)));
            assert_eq!(self.index.node(*key).map(Counted::id), id.copied());
        }
        for sum in SUMS.map(Checksum::from_raw) {
            let found = self.nodes_of(sum);
            let expected = self.stable.keys().filter(|key| key.0 == sum.get());
            assert!(found.iter().map(|key| plain(*key)).eq(expected.copied()));
            assert_eq!(
                self.index.waiting(sum),
                self.unstable.get(&sum.get()).copied()
            );
        }
        let mut key = self.next_limbo(None);
        while let Some(at) = key {
            key = self.next_limbo(Some(at));
        }
    }

    fn finish(self) {
        self.check_content();
        drop(self.index);
        assert_eq!(self.ledger.alive(), 0);
        assert_eq!(live(), Live::default());
    }
}

#[derive(Clone, Debug)]
enum Deed {
    Leave,
    Remove,
    ToStable,
    RemoveNext,
}

#[derive(Clone, Debug)]
enum Op {
    Insert(usize, Plan),
    Remove(sample::Index),
    ToLimbo(sample::Index),
    ToStable(sample::Index),
    PutBack(sample::Index),
    /// Behind a key, which may be gone.
    NextStable(sample::Index),
    NextLimbo(sample::Index),
    Sweep(Vec<Deed>),
    Wait(usize, usize, Plan),
    StopWaiting(usize, usize),
    /// Whoever it is that waits.
    StopWaiter(usize),
}

fn plan() -> impl Strategy<Value = Plan> {
    prop_oneof![4 => Just(Plan::Never), 1 => Just(Plan::Always)]
}

fn op() -> impl Strategy<Value = Op> {
    let key = any::<sample::Index>;
    let sum = || 0..SUMS.len();
    let place = || 0..9usize;
    let deed = prop_oneof![
        2 => Just(Deed::Leave),
        2 => Just(Deed::Remove),
        1 => Just(Deed::ToStable),
        1 => Just(Deed::RemoveNext),
    ];
    prop_oneof![
        10 => (sum(), plan()).prop_map(|(sum, plan)| Op::Insert(sum, plan)),
        4 => key().prop_map(Op::Remove),
        8 => key().prop_map(Op::ToLimbo),
        4 => key().prop_map(Op::ToStable),
        1 => key().prop_map(Op::PutBack),
        4 => key().prop_map(Op::NextStable),
        4 => key().prop_map(Op::NextLimbo),
        1 => prop::collection::vec(deed, 1..8).prop_map(Op::Sweep),
        8 => (sum(), place(), plan()).prop_map(|(sum, at, plan)| Op::Wait(sum, at, plan)),
        4 => (sum(), place()).prop_map(|(sum, at)| Op::StopWaiting(sum, at)),
        2 => sum().prop_map(Op::StopWaiter),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn is_like_plain_maps(ops in prop::collection::vec(op(), 1..300)) {
        let mut pair = Pair::new();
        for op in ops {
            match op {
                Op::Insert(nth, plan) => {
                    let key = pair.new_key(sum(nth));
                    pair.insert(key, plan);
                }
                Op::Remove(at) => pair.key(at).into_iter().for_each(|key| pair.remove(key)),
                Op::ToLimbo(at) => pair.key(at).into_iter().for_each(|key| pair.move_to_limbo(key)),
                Op::ToStable(at) => pair.key(at).into_iter().for_each(|key| pair.move_to_stable(key)),
                Op::PutBack(at) => pair.key(at).into_iter().for_each(|key| pair.put_back(key)),
                Op::NextStable(at) => {
                    if let Some(after) = pair.key(at) {
                        pair.next_stable(after.sum, Some(after));
                    }
                }
                Op::NextLimbo(at) => {
                    pair.next_limbo(pair.key(at));
                }
                Op::Sweep(deeds) => pair.sweep(&deeds),
                Op::Wait(nth, at, plan) => pair.wait(sum(nth), place(at), plan),
                Op::StopWaiting(nth, at) => pair.stop_waiting(sum(nth), place(at)),
                Op::StopWaiter(nth) => {
                    if let Some(at) = pair.index.waiting(sum(nth)) {
                        pair.stop_waiting(sum(nth), at);
                    }
                }
            }
            pair.check_counts();
        }
        pair.finish();
    }
}

/// Several nodes with one checksum come in the order in which they were made, and those of its
/// neighbours do not come.
#[test]
fn nodes_of_one_checksum() {
    let mut pair = Pair::new();
    let mut keys = Vec::new();
    for round in 0..6 {
        for nth in 0..3 {
            let key = pair.new_key(sum(nth));
            pair.insert(key, Plan::Never);
            if nth == 1 {
                keys.push(key);
            }
        }
        assert_eq!(keys.len(), round + 1);
    }
    pair.move_to_limbo(keys.remove(2));
    pair.remove(keys.remove(3));
    assert_eq!(pair.nodes_of(sum(1)), keys);
    pair.finish();
}

/// Nothing lies behind the last number there is.
#[test]
fn ends_at_the_last_number() {
    let mut pair = Pair::new();
    let last = StableKey {
        sum: sum(0),
        nth: u64::MAX,
    };
    pair.keys.push(last);
    pair.insert(last, Plan::Never);
    let behind = pair.new_key(sum(1));
    pair.insert(behind, Plan::Never);
    assert_eq!(pair.next_stable(sum(0), None), Some(last));
    assert_eq!(pair.next_stable(sum(0), Some(last)), None);
    pair.finish();
}

/// Who waits is not sent away by somebody else.
#[test]
fn only_who_waits_stops() {
    let mut pair = Pair::new();
    let elsewhere = [
        Place {
            slot: 1,
            addr: 4096,
        },
        Place { slot: 2, addr: 0 },
        Place {
            slot: 2,
            addr: 4096,
        },
    ];
    let here = Place { slot: 1, addr: 0 };
    pair.wait(sum(1), here, Plan::Never);
    for other in elsewhere {
        pair.stop_waiting(sum(1), other);
        assert_eq!(pair.index.waiting(sum(1)), Some(here));
    }
    pair.stop_waiting(sum(0), here);
    pair.stop_waiting(sum(2), here);
    assert_eq!(pair.index.waiting(sum(1)), Some(here));
    // Replaced: the one before has nothing to say any more.
    pair.wait(sum(1), elsewhere[0], Plan::Always);
    pair.stop_waiting(sum(1), here);
    assert_eq!(pair.index.waiting(sum(1)), Some(elsewhere[0]));
    pair.stop_waiting(sum(1), elsewhere[0]);
    assert_eq!(pair.index.waiting(sum(1)), None);
    pair.finish();
}
