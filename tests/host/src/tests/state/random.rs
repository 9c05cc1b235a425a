// SPDX-License-Identifier: GPL-2.0

//! Random operations on the state, after each of which all parts of it have to agree.

use super::*;
use crate::ksm::{forget::Forget, index::Released};
use proptest::prelude::*;
use testing::{failing, Plan};

/// One operation. Numbers are taken modulo what there is.
#[derive(Clone, Debug)]
enum Op {
    BeginPass(u32),
    SeeAnon(usize, u32, bool, bool),
    SeeOwn(usize),
    SeeNode(usize, usize),
    SeeOwnerless(usize),
    Queue(usize, u32, u64),
    Unqueue(usize),
    Changed(usize, u32),
    Publish(usize, u64),
    Merge(usize, usize),
    Forget(usize),
    ForgetLeaf(usize),
    Lock(usize, bool),
    Unmap(usize, bool),
    Gone(usize),
    Release(usize),
    Sweep(bool),
    ReleaseStale,
    Prune,
    ReleaseUnused,
    FindSums(u32),
    Rekey(usize, u32),
    ZeroPage(bool),
}

fn op() -> impl Strategy<Value = Op> {
    let place = 0..8usize;
    let node = 0..8usize;
    let content = 0..4u32;
    let full = 0..3u64;
    prop_oneof![
        2 => (1..3u32).prop_map(Op::BeginPass),
        12 => (place.clone(), content.clone(), any::<bool>(), any::<bool>())
            .prop_map(|(place, content, retry, refresh)| Op::SeeAnon(place, content, retry, refresh)),
        4 => place.clone().prop_map(Op::SeeOwn),
        2 => (place.clone(), node.clone()).prop_map(|(place, node)| Op::SeeNode(place, node)),
        1 => place.clone().prop_map(Op::SeeOwnerless),
        6 => (place.clone(), content.clone(), full.clone())
            .prop_map(|(place, content, full)| Op::Queue(place, content, full)),
        1 => place.clone().prop_map(Op::Unqueue),
        1 => (place.clone(), content.clone()).prop_map(|(place, content)| Op::Changed(place, content)),
        4 => (place.clone(), full).prop_map(|(place, full)| Op::Publish(place, full)),
        8 => (place.clone(), node.clone()).prop_map(|(place, node)| Op::Merge(place, node)),
        2 => place.clone().prop_map(Op::Forget),
        1 => place.prop_map(Op::ForgetLeaf),
        2 => (node.clone(), any::<bool>()).prop_map(|(node, on)| Op::Lock(node, on)),
        2 => (node.clone(), any::<bool>()).prop_map(|(node, cached)| Op::Unmap(node, cached)),
        1 => node.clone().prop_map(Op::Gone),
        1 => node.clone().prop_map(Op::Release),
        1 => any::<bool>().prop_map(Op::Sweep),
        1 => Just(Op::ReleaseStale),
        1 => Just(Op::Prune),
        1 => Just(Op::ReleaseUnused),
        1 => content.clone().prop_map(Op::FindSums),
        1 => (node, content).prop_map(|(node, content)| Op::Rekey(node, content)),
        1 => any::<bool>().prop_map(Op::ZeroPage),
    ]
}

impl World {
    fn place(&self, i: usize) -> PageAddr {
        let places: std::vec::Vec<_> = self.places().collect();
        places[i % places.len()]
    }

    fn some_node(&self, i: usize) -> Option<StableKey> {
        let nodes = self.nodes();
        (!nodes.is_empty()).then(|| nodes[i % nodes.len()])
    }

    /// Whether the page may become merged, and its sample.
    fn mergeable(&mut self, place: PageAddr) -> Option<Sample> {
        match self.show(place) {
            Shown::Seen(of) | Shown::Steady(of) => Some(of),
            Shown::Unstable(sum) => Some(sum.sample()),
            Shown::Untracked | Shown::Merged(_) => None,
        }
    }

    fn run(&mut self, op: &Op, second: &mut u32) {
        match *op {
            Op::BeginPass(pause) => {
                *second += pause;
                self.begin_pass(*second);
            }
            Op::SeeAnon(i, content, retry, refresh) => {
                let mut leaf = LeafPass::new(retry || refresh, refresh);
                let before = self.show(self.place(i));
                self.visit(self.place(i), Seen::Anon(sample(content)), &mut leaf);
                // What the leaf is told has to be true, or smart_scan would skip it.
                let after = self.show(self.place(i));
                let is_change = match (before, after) {
                    (Shown::Untracked, _) => false,
                    (Shown::Unstable(_), Shown::Steady(_)) if refresh => false,
                    (before, after) => before != after,
                };
                assert!(leaf.changed || !is_change, "{before:?} to {after:?}");
            }
            Op::SeeOwn(i) => {
                let place = self.place(i);
                if let Shown::Merged(Some(node)) = self.show(place) {
                    self.visit(place, Seen::Ksm(Some(node)), &mut retrying());
                }
            }
            Op::SeeNode(i, node) => {
                if let Some(key) = self.some_node(node) {
                    let seen = Seen::Ksm(Some(self.id(key)));
                    self.visit(self.place(i), seen, &mut retrying());
                }
            }
            Op::SeeOwnerless(i) => {
                self.visit(self.place(i), Seen::Ksm(None), &mut retrying());
            }
            Op::Queue(i, content, full) => {
                let place = self.place(i);
                let of = self.mergeable(place);
                // Candidates have the sample of the checksum under which they are queued.
                if of == Some(sample(content)) {
                    let sum = if full == 0 {
                        unknown(content)
                    } else {
                        sum(content, full)
                    };
                    self.state.unstable_insert(place, sum);
                }
            }
            Op::Unqueue(i) => {
                let place = self.place(i);
                if let Shown::Unstable(sum) = self.show(place) {
                    self.state.leave_unstable(place, sum);
                    assert_eq!(self.show(place), Shown::Steady(sum.sample()));
                }
            }
            Op::Changed(i, content) => {
                let place = self.place(i);
                if self.mergeable(place).is_some() {
                    self.state.changed(place, sample(content));
                    assert_eq!(self.show(place), Shown::Seen(sample(content)));
                }
            }
            Op::Publish(i, full) => {
                let place = self.place(i);
                if let Some(of) = self.mergeable(place) {
                    let _ = self.publish(place, Checksum::new(of, full << 39));
                }
            }
            Op::Merge(i, node) => {
                let (place, key) = (self.place(i), self.some_node(node));
                if let (Some(of), Some(key)) = (self.mergeable(place), key) {
                    if key.sum.sample() == of {
                        let _ = self.merge(place, key);
                    }
                }
            }
            Op::Forget(i) => {
                let place = self.place(i);
                let forgotten = self.state.forget(place);
                assert_eq!(self.show(place) == Shown::Untracked, forgotten);
            }
            Op::ForgetLeaf(i) => {
                let PageAddr { mm_id, addr } = self.place(i);
                let (from, to) = (addr & !0x1f_ffff, addr | 0x1f_ffff);
                let mut budget = Forget::new();
                self.state
                    .forget_range(mm_id, from, to, &mut budget, |_, _, _| false);
            }
            Op::Lock(node, on) => {
                if let Some(key) = self.some_node(node) {
                    self.set_page(key, |page| page.locked = on);
                }
            }
            Op::Unmap(node, cached) => {
                // Only an orphan's page can be without mappings.
                if let Some(key) = self.some_node(node) {
                    if self.node(key).items() == 0 {
                        self.set_page(key, |page| {
                            page.mapped = false;
                            page.swapcache = cached;
                        });
                    }
                }
            }
            Op::Gone(node) => {
                if let Some(key) = self.some_node(node) {
                    self.set_page(key, |page| page.gone = true);
                }
            }
            Op::Release(node) => {
                if let Some(key) = self.some_node(node) {
                    // A node that is not stale has to be indexed again. Without memory for that it is leaked.
                    testing::failing(Plan::Never, || self.state.core.release(key));
                }
            }
            Op::Sweep(force) => self.state.core.sweep_orphans(10, force),
            Op::ReleaseStale => {
                let mut at = Some(Released::nothing());
                while let Some(from) = at {
                    at = self.state.core.release_some_stale(from);
                }
            }
            Op::Prune => self.state.core.prune_after(0),
            Op::ReleaseUnused => {
                self.state.core.release_unused();
            }
            Op::FindSums(content) => {
                let hasher = Hasher::new([7; SEED_WORDS]);
                self.state.core.find_sums(&hasher, sample(content));
            }
            Op::Rekey(node, content) => {
                if let Some(key) = self.some_node(node) {
                    if self.node(key).items() != 0 {
                        let sum = key.sum.with_sample(sample(content));
                        let _ = self.state.core.rekey(key, sum);
                    }
                }
            }
            Op::ZeroPage(on) => self.use_zero_page(on),
        }
    }
}

proptest! {
    #![proptest_config(crate::tests::cases(2000))]

    #[test]
    fn all_parts_agree(ops in proptest::collection::vec(op(), 1..60)) {
        let mut world = World::with_max_sharing(2);
        let mut second = FIRST_SECOND;
        for op in &ops {
            world.run(op, &mut second);
            world.check();
        }
        world.free_all_pages();
        world.end();
    }

    /// An allocation that fails costs a merge, or delays it. Nothing else.
    #[test]
    fn all_parts_agree_without_memory(
        ops in proptest::collection::vec(op(), 1..60),
        seed in any::<u64>(),
    ) {
        let mut world = World::with_max_sharing(2);
        let mut second = FIRST_SECOND;
        let plan = Plan::Percent { percent: 40, seed };
        failing(plan, || {
            for op in &ops {
                world.run(op, &mut second);
            }
        });
        world.check();
        world.free_all_pages();
        world.end();
    }
}
