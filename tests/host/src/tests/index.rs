// SPDX-License-Identifier: GPL-2.0

//! Tests of `ksm/index.rs` and `ksm/unstable_tree.rs`, compared with plain maps.

use super::counted::{Counted, Ledger};
use crate::hash::{Checksum, Sample, SUM_BITS};
use crate::ksm::{
    index::{Index, Nodes, NodesLike, MAX_COMPARES},
    mms::PageAddr,
    unstable_tree::UnstableTree,
};
use crate::mm::stable_key::StableKey;
use kernel::{
    alloc::flags::GFP_NOWAIT,
    error::code::{ENOENT, ENOMEM},
    testing::{failing, live, watch, Events, Live, Plan},
};
use proptest::{prelude::*, sample};
use std::collections::BTreeMap;

/// Few checksums, so that many nodes share one; both ends of the range are among them.
const MAX: u64 = (1 << SUM_BITS) - 1;
const SUMS: [u64; 5] = [0, 1, 2, MAX - 1, MAX];

/// A key as plain numbers.
type Plain = (u64, u64);

fn plain(key: StableKey) -> Plain {
    (key.sum.get(), key.serial)
}

fn sum(nth: usize) -> Checksum {
    Checksum::from_raw(SUMS[nth % SUMS.len()])
}

fn place(nth: usize) -> PageAddr {
    PageAddr {
        mm_id: nth as u64 / 3,
        addr: nth % 3 * 4096,
    }
}

/// Return the first key after `after` in `tree`.
fn next_in(tree: &BTreeMap<Plain, usize>, after: Option<Plain>) -> Option<Plain> {
    tree.keys()
        .copied()
        .find(|key| after.is_none_or(|after| *key > after))
}

/// The trees, and their expected content.
struct Pair {
    index: Index<Counted>,
    queue: UnstableTree,
    stable: BTreeMap<Plain, usize>,
    full: BTreeMap<Plain, usize>,
    orphans: BTreeMap<Plain, usize>,
    unstable: BTreeMap<u64, PageAddr>,
    /// All keys ever made.
    keys: Vec<StableKey>,
    ledger: Ledger,
}

impl Pair {
    fn new() -> Self {
        assert_eq!(live(), Live::default(), "left behind by a test before");
        Self {
            index: Index::new(),
            queue: UnstableTree::new(),
            stable: BTreeMap::new(),
            full: BTreeMap::new(),
            orphans: BTreeMap::new(),
            unstable: BTreeMap::new(),
            keys: Vec::new(),
            ledger: Ledger::default(),
        }
    }

    /// Return one of the keys ever made.
    fn key(&self, at: sample::Index) -> Option<StableKey> {
        (!self.keys.is_empty()).then(|| *at.get(&self.keys))
    }

    fn new_key(&mut self, sum: Checksum) -> StableKey {
        let key = self.index.new_key(sum);
        assert_eq!(key.sum, sum);
        assert!(self.keys.iter().all(|other| other.serial > key.serial));
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
            Ok(()) => assert_eq!(self.orphans.insert(plain(key), id), None),
            Err(err) => {
                assert_eq!(err, ENOMEM);
                assert!(!self.ledger.is_alive(id));
                self.check_content();
            }
        }
    }

    /// Add a node that has mappings at once.
    fn insert_stable(&mut self, key: StableKey) {
        self.insert(key, Plan::Never);
        self.move_to_stable(key);
    }

    fn remove(&mut self, key: StableKey) {
        let (node, events) = watch(|| self.index.remove(key));
        let was = self.take_known(key);
        let was = was.or_else(|| self.orphans.remove(&plain(key)));
        assert_eq!(node.map(|node| node.id()), was);
        assert_eq!(events.allocs + events.failed, 0);
        assert_eq!(events.frees, usize::from(was.is_some()));
    }

    fn move_to_orphans(&mut self, key: StableKey) {
        let ((), events) = watch(|| self.index.move_to_orphans(key));
        assert_eq!(events, Events::default(), "not just moved");
        if let Some(id) = self.take_known(key) {
            self.orphans.insert(plain(key), id);
        }
    }

    /// Take a node out of the maps of nodes with mappings.
    fn take_known(&mut self, key: StableKey) -> Option<usize> {
        let room = self.stable.remove(&plain(key));
        room.or_else(|| self.full.remove(&plain(key)))
    }

    fn set_full(&mut self, key: StableKey, full: bool) {
        let ((), events) = watch(|| match full {
            true => self.index.set_full(key),
            false => self.index.set_not_full(key),
        });
        assert_eq!(events, Events::default(), "not just moved");
        let (from, to) = match full {
            true => (&mut self.stable, &mut self.full),
            false => (&mut self.full, &mut self.stable),
        };
        if let Some(id) = from.remove(&plain(key)) {
            to.insert(plain(key), id);
        }
    }

    /// Return how many nodes with mappings have this checksum.
    fn known_with(&self, sum: u64) -> usize {
        let keys = self.stable.keys().chain(self.full.keys());
        keys.filter(|key| key.0 == sum).count()
    }

    fn move_to_stable(&mut self, key: StableKey) {
        let ((), events) = watch(|| self.index.move_to_stable(key));
        assert_eq!(events, Events::default(), "not just moved");
        if let Some(id) = self.orphans.remove(&plain(key)) {
            self.stable.insert(plain(key), id);
        }
    }

    /// Take a node out and put it back, as for a node that turns out to be in use.
    fn put_back(&mut self, key: StableKey) {
        let Some(node) = self.index.remove(key) else {
            return;
        };
        assert!(self.index.insert(key, node, GFP_NOWAIT).is_ok());
        if let Some(id) = self.take_known(key) {
            self.orphans.insert(plain(key), id);
            self.move_to_stable(key);
        }
    }

    fn next_stable(&self, sum: Checksum, after: Option<StableKey>) -> Option<StableKey> {
        let next = self.index.next_stable(sum, after);
        let of_sum = |(key, id): (&Plain, &usize)| (key.0 == sum.get()).then_some((*key, *id));
        let of_sum = self.stable.iter().filter_map(of_sum).collect();
        assert_eq!(next.map(plain), next_in(&of_sum, after.map(plain)));
        next
    }

    /// Return all stable nodes with this checksum, in the engine's order.
    fn nodes_of(&self, sum: Checksum) -> Vec<StableKey> {
        let mut found = Vec::new();
        let mut key = self.next_stable(sum, None);
        while let Some(at) = key {
            found.push(at);
            key = self.next_stable(sum, Some(at));
        }
        found
    }

    /// Return whether there are nodes of a sample, and which of them have room, unless there are others with
    /// another checksum.
    fn nodes_like(&self, sample: Sample) -> NodesLike {
        let found = self.index.nodes_like(sample);
        let of_sample = |key: &&Plain| Checksum::from_raw(key.0).sample() == sample;
        let room: Vec<_> = self.stable.keys().filter(of_sample).collect();
        let full: Vec<_> = self.full.keys().filter(of_sample).collect();
        let mut sums: Vec<_> = room.iter().chain(&full).map(|key| key.0).collect();
        sums.dedup();
        sums.sort_unstable();
        sums.dedup();
        match found {
            NodesLike::None => {
                // Full nodes are no reason to compute the checksum, unless theirs is known.
                let unknown = |sum: &u64| Checksum::from_raw(*sum).is_unknown();
                assert!(room.is_empty() && sums.iter().all(unknown));
            }
            NodesLike::Unique(nodes) => {
                assert_eq!(sums, [nodes.sum().get()]);
                match nodes {
                    Nodes::One(key) => assert_eq!(room, [&plain(key)]),
                    Nodes::Several(_) => assert!(room.len() > 1),
                }
            }
            NodesLike::Ambiguous => {
                let known = |sum: &u64| !Checksum::from_raw(*sum).is_unknown();
                assert!(sums.len() > 1 || room.is_empty() && sums.iter().any(known));
            }
        }
        found
    }

    /// Return the nodes of a checksum that have room, some of them in the order of `mappings`.
    fn nodes_with(&self, sum: Checksum, mappings: impl Fn(usize) -> usize) {
        let room: Vec<_> = self
            .stable
            .iter()
            .filter(|(key, _)| key.0 == sum.get())
            .collect();
        match self.index.nodes_with(sum) {
            None => assert!(room.is_empty()),
            Some(Nodes::One(key)) => assert!(room.len() == 1 && *room[0].0 == plain(key)),
            Some(Nodes::Several(of)) => assert!(room.len() > 1 && of == sum),
        }
        let mut first: Vec<_> = room.into_iter().take(MAX_COMPARES).collect();
        first.sort_by_key(|(_, id)| std::cmp::Reverse(mappings(**id)));
        let found = self.index.by_mappings(sum, |node| mappings(node.id()));
        let found: Vec<_> = found.into_iter().flatten().map(plain).collect();
        let expected: Vec<_> = first.into_iter().map(|(key, _)| *key).collect();
        assert_eq!(found, expected);
    }

    /// Return the checksum under which a page with this sample is in the unstable tree.
    fn waiting_like(&self, sample: Sample) -> Option<Checksum> {
        let found = self.queue.lookup_sample(sample);
        let sums = self.unstable.keys().copied().map(Checksum::from_raw);
        assert_eq!(found, sums.filter(|sum| sum.sample() == sample).min());
        found
    }

    /// Give a node another checksum, as when it becomes known.
    fn rekey(&mut self, key: StableKey, sum: Checksum, plan: Plan) {
        let (result, events) = watch(|| failing(plan, || self.index.rekey(key, sum, GFP_NOWAIT)));
        let is_full = self.full.contains_key(&plain(key));
        let tree = match is_full {
            true => &mut self.full,
            false => &mut self.stable,
        };
        let old = tree.get(&plain(key)).copied();
        match result {
            Ok(new) => {
                assert_eq!((new.sum, new.serial), (sum, key.serial));
                let id = tree.remove(&plain(key)).unwrap();
                assert_eq!(tree.insert(plain(new), id), None);
                self.keys.retain(|other| *other != key);
                self.keys.push(new);
                assert_eq!((events.allocs, events.frees), (1, 1));
            }
            Err(err) if events.failed > 0 => assert_eq!(err, ENOMEM),
            Err(err) => assert_eq!((err, old), (ENOENT, None)),
        }
    }

    /// Return the next node of one tree, of any checksum.
    fn next_in(&self, which: Tree, after: Option<StableKey>) -> Option<StableKey> {
        let (next, tree) = match which {
            Tree::Stable => (self.index.next_node(after), &self.stable),
            Tree::Full => (self.index.next_full(after), &self.full),
            Tree::Orphan => (self.index.next_orphan(after), &self.orphans),
        };
        assert_eq!(next.map(plain), next_in(tree, after.map(plain)));
        next
    }

    /// Walk one tree as the engine does, and do to each node what `deeds` says.
    fn sweep(&mut self, which: Tree, deeds: &[Deed]) {
        let tree = match which {
            Tree::Stable => &self.stable,
            Tree::Full => &self.full,
            Tree::Orphan => &self.orphans,
        };
        let before: Vec<Plain> = tree.keys().copied().collect();
        let mut seen = Vec::new();
        let mut deeds = deeds.iter().cycle();
        let mut key = self.next_in(which, None);
        while let Some(at) = key {
            key = self.next_in(which, Some(at));
            seen.push(plain(at));
            match (deeds.next().unwrap(), which) {
                (Deed::Leave, _) => {}
                (Deed::Remove, _) => self.remove(at),
                (Deed::Move, Tree::Orphan) => self.move_to_stable(at),
                (Deed::Move, _) => self.move_to_orphans(at),
                // The next node is removed before the walk reaches it.
                (Deed::RemoveNext, _) => key.into_iter().for_each(|next| self.remove(next)),
            }
        }
        assert_eq!(seen, before);
    }

    fn wait(&mut self, sum: Checksum, place: PageAddr, plan: Plan) {
        let before = self.queue.lookup(sum);
        let (result, events) =
            watch(|| failing(plan, || self.queue.insert(sum, place, GFP_NOWAIT)));
        assert_eq!(events.sleeping, 0, "other flags than those it was given");
        assert_eq!(result.is_err(), events.failed > 0);
        if before.is_some() {
            assert_eq!(
                events,
                Events::default(),
                "allocated although a page was waiting"
            );
        }
        if let Err(err) = result {
            assert_eq!(err, ENOMEM);
            assert_eq!(self.queue.lookup(sum), before);
        } else {
            self.unstable.insert(sum.get(), place);
        }
    }

    fn stop_waiting(&mut self, sum: Checksum, place: PageAddr) {
        self.queue.remove(sum, place);
        if self.unstable.get(&sum.get()) == Some(&place) {
            self.unstable.remove(&sum.get());
        }
    }

    fn check_counts(&self) {
        let stable = self.stable.len() + self.full.len();
        let orphans = self.orphans.len();
        let sizes = SUMS.map(|sum| self.known_with(sum));
        let chains: Vec<_> = sizes.into_iter().filter(|size| *size > 1).collect();
        assert_eq!(self.index.chains(), chains.len());
        assert_eq!(self.index.dups(), chains.iter().sum::<usize>());
        assert_eq!(self.index.stable_len(), stable);
        assert_eq!(self.index.orphans_len(), orphans);
        assert_eq!(self.queue.len(), self.unstable.len());
        assert_eq!(self.index.has_no_nodes(), stable + orphans == 0);
        assert_eq!(self.ledger.alive(), stable + orphans);
        assert_eq!(live().allocations, stable + orphans + self.unstable.len());
    }

    fn check_content(&self) {
        self.check_counts();
        for key in &self.keys {
            let id = self.stable.get(&plain(*key));
            let id = id.or_else(|| self.full.get(&plain(*key)));
            let id = id.or_else(|| self.orphans.get(&plain(*key)));
            assert_eq!(self.index.node(*key).map(Counted::id), id.copied());
        }
        for sum in SUMS.map(Checksum::from_raw) {
            let found = self.nodes_of(sum);
            let expected = self.stable.keys().filter(|key| key.0 == sum.get());
            assert!(found.iter().map(|key| plain(*key)).eq(expected.copied()));
            let any = self.index.any_stable(sum);
            assert_eq!(any.is_some(), self.known_with(sum.get()) != 0);
            assert!(any.is_none_or(|key| key.sum == sum));
            self.nodes_with(sum, |id| id % 3);
            self.nodes_like(sum.sample());
            self.waiting_like(sum.sample());
            assert_eq!(
                self.queue.lookup(sum),
                self.unstable.get(&sum.get()).copied()
            );
        }
        for which in [Tree::Stable, Tree::Full, Tree::Orphan] {
            let mut key = self.next_in(which, None);
            while let Some(at) = key {
                key = self.next_in(which, Some(at));
            }
        }
    }

    fn finish(self) {
        self.check_content();
        drop((self.index, self.queue));
        assert_eq!(self.ledger.alive(), 0);
        assert_eq!(live(), Live::default());
    }
}

#[derive(Clone, Copy, Debug)]
enum Tree {
    Stable,
    Full,
    Orphan,
}

#[derive(Clone, Debug)]
enum Deed {
    Leave,
    Remove,
    /// Move it to the other tree.
    Move,
    RemoveNext,
}

#[derive(Clone, Debug)]
enum Op {
    Insert(usize, Plan),
    Remove(sample::Index),
    ToOrphans(sample::Index),
    ToStable(sample::Index),
    SetFull(sample::Index, bool),
    NodesWith(usize, usize),
    PutBack(sample::Index),
    /// The next node after a key, which may be gone.
    NextStable(sample::Index),
    NodesLike(usize),
    WaitingLike(usize),
    Rekey(sample::Index, usize, Plan),
    NextIn(Tree, sample::Index),
    Sweep(Tree, Vec<Deed>),
    Wait(usize, usize, Plan),
    StopWaiting(usize, usize),
    /// Take out whichever page is waiting.
    StopWaiter(usize),
}

fn plan() -> impl Strategy<Value = Plan> {
    prop_oneof![4 => Just(Plan::Never), 1 => Just(Plan::Always)]
}

fn op() -> impl Strategy<Value = Op> {
    let key = any::<sample::Index>;
    let sum = || 0..SUMS.len();
    let place = || 0..9usize;
    let tree = || prop_oneof![Just(Tree::Stable), Just(Tree::Full), Just(Tree::Orphan)];
    let deed = prop_oneof![
        2 => Just(Deed::Leave),
        2 => Just(Deed::Remove),
        1 => Just(Deed::Move),
        1 => Just(Deed::RemoveNext),
    ];
    prop_oneof![
        10 => (sum(), plan()).prop_map(|(sum, plan)| Op::Insert(sum, plan)),
        4 => key().prop_map(Op::Remove),
        6 => key().prop_map(Op::ToOrphans),
        10 => key().prop_map(Op::ToStable),
        8 => (key(), any::<bool>()).prop_map(|(key, full)| Op::SetFull(key, full)),
        4 => (sum(), 1..5usize).prop_map(|(sum, by)| Op::NodesWith(sum, by)),
        1 => key().prop_map(Op::PutBack),
        4 => key().prop_map(Op::NextStable),
        4 => sum().prop_map(Op::NodesLike),
        2 => sum().prop_map(Op::WaitingLike),
        3 => (key(), sum(), plan()).prop_map(|(key, sum, plan)| Op::Rekey(key, sum, plan)),
        4 => (tree(), key()).prop_map(|(tree, at)| Op::NextIn(tree, at)),
        1 => (tree(), prop::collection::vec(deed, 1..8))
            .prop_map(|(tree, deeds)| Op::Sweep(tree, deeds)),
        8 => (sum(), place(), plan()).prop_map(|(sum, at, plan)| Op::Wait(sum, at, plan)),
        4 => (sum(), place()).prop_map(|(sum, at)| Op::StopWaiting(sum, at)),
        2 => sum().prop_map(Op::StopWaiter),
    ]
}

proptest! {
    #![proptest_config(super::cases(128))]

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
                Op::ToOrphans(at) => pair.key(at).into_iter().for_each(|key| pair.move_to_orphans(key)),
                Op::ToStable(at) => pair.key(at).into_iter().for_each(|key| pair.move_to_stable(key)),
                Op::SetFull(at, full) => {
                    if let Some(key) = pair.key(at) {
                        pair.set_full(key, full);
                    }
                }
                Op::NodesWith(nth, by) => pair.nodes_with(sum(nth), |id| id % by),
                Op::PutBack(at) => pair.key(at).into_iter().for_each(|key| pair.put_back(key)),
                Op::NextStable(at) => {
                    if let Some(after) = pair.key(at) {
                        pair.next_stable(after.sum, Some(after));
                    }
                }
                Op::NodesLike(nth) => {
                    pair.nodes_like(sum(nth).sample());
                }
                Op::WaitingLike(nth) => {
                    pair.waiting_like(sum(nth).sample());
                }
                Op::Rekey(at, nth, plan) => {
                    if let Some(key) = pair.key(at) {
                        pair.rekey(key, sum(nth), plan);
                    }
                }
                Op::NextIn(tree, at) => {
                    pair.next_in(tree, pair.key(at));
                }
                Op::Sweep(tree, deeds) => pair.sweep(tree, &deeds),
                Op::Wait(nth, at, plan) => pair.wait(sum(nth), place(at), plan),
                Op::StopWaiting(nth, at) => pair.stop_waiting(sum(nth), place(at)),
                Op::StopWaiter(nth) => {
                    if let Some(at) = pair.queue.lookup(sum(nth)) {
                        pair.stop_waiting(sum(nth), at);
                    }
                }
            }
            pair.check_counts();
        }
        pair.finish();
    }
}

/// Several nodes with one checksum come newest first, without those of neighbouring checksums.
#[test]
fn nodes_of_one_checksum() {
    let mut pair = Pair::new();
    let mut keys = Vec::new();
    for _ in 0..6 {
        for nth in 0..3 {
            let key = pair.new_key(sum(nth));
            pair.insert_stable(key);
            if nth == 1 {
                keys.insert(0, key);
            }
        }
    }
    assert_eq!(pair.nodes_of(sum(1)), keys);
    pair.move_to_orphans(keys.remove(2));
    pair.remove(keys.remove(3));
    assert_eq!(pair.nodes_of(sum(1)), keys);
    // A node that comes back is no newer for that.
    let back = keys[1];
    pair.move_to_orphans(back);
    pair.move_to_stable(back);
    assert_eq!(pair.nodes_of(sum(1)), keys);
    pair.finish();
}

/// A sample stands for one content only as long as all its nodes have the same checksum. Nodes of
/// neighbouring samples, and nodes without mappings, do not count.
#[test]
fn only_one_checksum_of_a_sample() {
    let mut pair = Pair::new();
    let sample = Sample::from_raw;
    let add = |pair: &mut Pair, raw, hash| {
        let key = pair.new_key(Checksum::new(sample(raw), hash));
        pair.insert_stable(key);
        key
    };
    add(&mut pair, 6, u64::MAX);
    add(&mut pair, 8, 0);
    for raw in [0, 5, 7, 9, u32::MAX] {
        assert_eq!(pair.nodes_like(sample(raw)), NodesLike::None);
    }
    let only = |key| NodesLike::Unique(Nodes::One(key));
    for hash in [0, u64::MAX, 1 << 40] {
        let older = add(&mut pair, 7, hash);
        let newer = add(&mut pair, 7, hash);
        assert_eq!(
            pair.nodes_like(sample(7)),
            NodesLike::Unique(Nodes::Several(newer.sum))
        );
        let other = add(&mut pair, 7, !hash);
        assert_eq!(pair.nodes_like(sample(7)), NodesLike::Ambiguous);
        // A full node still belongs to the same content.
        pair.set_full(other, true);
        assert_eq!(pair.nodes_like(sample(7)), NodesLike::Ambiguous);
        pair.move_to_orphans(other);
        pair.set_full(older, true);
        assert_eq!(pair.nodes_like(sample(7)), only(newer));
        pair.set_full(newer, true);
        assert_eq!(pair.nodes_like(sample(7)), NodesLike::Ambiguous);
        pair.set_full(older, false);
        assert_eq!(pair.nodes_like(sample(7)), only(older));
        pair.move_to_orphans(newer);
        assert_eq!(pair.nodes_like(sample(7)), only(older));
        pair.remove(older);
        assert_eq!(pair.nodes_like(sample(7)), NodesLike::None);
    }
    let last = add(&mut pair, u32::MAX, u64::MAX);
    assert_eq!(pair.nodes_like(sample(u32::MAX)), only(last));
    pair.finish();
}

/// Those nodes of a content that have room are found, however many are full, and those with the most mappings
/// come first. Full nodes that got room are among them.
#[test]
fn full_nodes_do_not_hide_others() {
    let mut pair = Pair::new();
    let mut keys = Vec::new();
    for _ in 0..20 * MAX_COMPARES {
        let key = pair.new_key(sum(1));
        pair.insert_stable(key);
        keys.push(key);
    }
    let (oldest, newest) = (keys[0], keys[keys.len() - 1]);
    for key in &keys[1..] {
        pair.set_full(*key, true);
    }
    assert_eq!(pair.index.nodes_with(sum(1)), Some(Nodes::One(oldest)));
    assert_eq!((pair.index.chains(), pair.index.dups()), (1, keys.len()));
    pair.set_full(newest, false);
    assert_eq!(pair.index.nodes_with(sum(1)), Some(Nodes::Several(sum(1))));
    let oldest_id = pair.stable[&plain(oldest)];
    let found = pair
        .index
        .by_mappings(sum(1), |node| usize::from(node.id() == oldest_id));
    assert_eq!(found[..3], [Some(oldest), Some(newest), None]);
    pair.finish();
}

/// No page can merge with a new node before it has mappings.
#[test]
fn new_nodes_are_orphans() {
    let mut pair = Pair::new();
    let key = pair.new_key(sum(1));
    pair.insert(key, Plan::Never);
    assert_eq!((pair.index.stable_len(), pair.index.orphans_len()), (0, 1));
    assert_eq!(pair.next_stable(sum(1), None), None);
    assert_eq!(pair.next_in(Tree::Orphan, None), Some(key));
    assert!(pair.index.node(key).is_some());
    pair.move_to_stable(key);
    assert_eq!(pair.next_stable(sum(1), None), Some(key));
    assert_eq!(pair.next_in(Tree::Orphan, None), None);
    pair.finish();
}

/// Nothing follows the last number, nor the last number of the last checksum.
#[test]
fn ends_at_the_last_number() {
    let mut pair = Pair::new();
    let last = |nth| StableKey {
        sum: sum(nth),
        serial: u64::MAX,
    };
    // The first key of all has this value.
    assert_eq!(pair.new_key(sum(0)), last(0));
    let behind = pair.new_key(sum(1));
    pair.keys.push(last(4));
    for key in [last(0), behind, last(4)] {
        pair.insert(key, Plan::Never);
        pair.move_to_stable(key);
    }
    assert_eq!(pair.next_stable(sum(0), None), Some(last(0)));
    assert_eq!(pair.next_stable(sum(0), Some(last(0))), None);
    for which in [Tree::Stable, Tree::Full, Tree::Orphan] {
        for key in [last(0), behind, last(4)] {
            pair.set_full(key, matches!(which, Tree::Full));
            if matches!(which, Tree::Orphan) {
                pair.move_to_orphans(key);
            }
        }
        assert_eq!(pair.next_in(which, Some(last(0))), Some(behind));
        assert_eq!(pair.next_in(which, Some(behind)), Some(last(4)));
        assert_eq!(pair.next_in(which, Some(last(4))), None);
    }
    pair.finish();
}

/// A waiting page is only removed by its own address.
#[test]
fn only_who_waits_stops() {
    let mut pair = Pair::new();
    let elsewhere = [
        PageAddr {
            mm_id: 1,
            addr: 4096,
        },
        PageAddr { mm_id: 2, addr: 0 },
        PageAddr {
            mm_id: 2,
            addr: 4096,
        },
    ];
    let here = PageAddr { mm_id: 1, addr: 0 };
    pair.wait(sum(1), here, Plan::Never);
    for other in elsewhere {
        pair.stop_waiting(sum(1), other);
        assert_eq!(pair.queue.lookup(sum(1)), Some(here));
    }
    pair.stop_waiting(sum(0), here);
    pair.stop_waiting(sum(2), here);
    assert_eq!(pair.queue.lookup(sum(1)), Some(here));
    // It was replaced, so the earlier one has no say any more.
    pair.wait(sum(1), elsewhere[0], Plan::Always);
    pair.stop_waiting(sum(1), here);
    assert_eq!(pair.queue.lookup(sum(1)), Some(elsewhere[0]));
    pair.stop_waiting(sum(1), elsewhere[0]);
    assert_eq!(pair.queue.lookup(sum(1)), None);
    pair.finish();
}

/// However many nodes have one checksum, a page is compared with [`MAX_COMPARES`] of them at most. However
/// many pages have it, one waits.
#[test]
fn what_collides_is_not_looked_at_without_end() {
    for count in [16, 64, 4096] {
        let mut index = Index::<()>::new();
        let mut queue = UnstableTree::new();
        for nth in 0..count {
            let key = index.new_key(sum(1));
            index.insert(key, (), GFP_NOWAIT).unwrap();
            index.move_to_stable(key);
            queue.insert(sum(1), place(nth), GFP_NOWAIT).unwrap();
        }
        assert_eq!(index.stable_len(), count);
        assert_eq!(queue.len(), 1);
        assert_eq!(queue.lookup(sum(1)), Some(place(count - 1)));
        let looked_at = std::cell::Cell::new(0);
        let found = index.by_mappings(sum(1), |()| {
            looked_at.set(looked_at.get() + 1);
            2
        });
        assert_eq!(looked_at.get(), MAX_COMPARES);
        assert_eq!(found.iter().flatten().count(), MAX_COMPARES);
    }
}
