// SPDX-License-Identifier: GPL-2.0

//! Tests of the state of the engine: of pages in `ksm/page.rs`, of stable nodes in `ksm/stable_tree.rs`.
//!
//! The pages of processes do not exist. A [`World`] says what a walk sees of them, and what the kernel does to
//! KSM pages.

mod entry;
mod page;
mod random;
mod stable_tree;

use super::{
    candidate::{CandidateKind, Check},
    entry::{PageEntry, PageState},
    filter::Filter,
    mms::{MmId, PageAddr},
    page::LeafPass,
    probation::{Print, Probation, Strikes},
    settings::Settings,
    state::{State, GFP_SCAN},
};
use crate::{
    hash::{Checksum, Hasher, Sample, SEED_WORDS},
    mm::{
        folio::{NodeId, TestPage},
        seen::Seen,
        stable_key::StableKey,
        stable_node::NodeBox,
    },
};
use kernel::{
    prelude::*,
    sync::{atomic::Relaxed, Arc},
    testing::{self, errors, live, Live, TestMm},
};
use std::collections::BTreeMap;

static MODULE: ThisModule = ThisModule;

/// The state of an engine with a few address spaces, in which pages of a few addresses may be tracked.
struct World {
    state: State,
    mms: std::vec::Vec<TestMm>,
    /// The keys of all nodes ever made.
    keys: std::vec::Vec<StableKey>,
    hasher: Hasher,
    /// What was allocated and logged before.
    before: (Live, usize),
}

/// The addresses: two leaves, with a hole in the first.
const ADDRS: [usize; 4] = [0x20_0000, 0x20_1000, 0x20_5000, 0x40_0000];

/// The second in which the first pass begins. 0 would be the one before the first pass.
const FIRST_SECOND: u32 = 100;

fn sample(content: u32) -> Sample {
    Sample::from_raw(content.wrapping_mul(0x0101_0101))
}

/// The full checksum of content number `full` among those with sample number `content`.
fn sum(content: u32, full: u64) -> Checksum {
    Checksum::new(sample(content), full << 39)
}

fn unknown(content: u32) -> Checksum {
    Checksum::unknown(sample(content))
}

impl World {
    fn new() -> Self {
        Self::with_max_sharing(3)
    }

    fn with_max_sharing(max: u32) -> Self {
        let before = (live(), errors());
        let mut world = Self {
            before,
            state: State::new(&MODULE, Arc::new(Settings::new(100), GFP_KERNEL).unwrap()).unwrap(),
            mms: (0..2).map(|_| TestMm::new()).collect(),
            keys: std::vec::Vec::new(),
            hasher: Hasher::new([7; SEED_WORDS]),
        };
        world.state.core.filter = Filter::for_pages(1000, 1 << 30).unwrap();
        let settings = &world.state.core.settings;
        settings.max_page_sharing.store(max, Relaxed);
        world.begin_pass(FIRST_SECOND);
        world
    }

    fn use_zero_page(&mut self, on: bool) {
        self.state.set_zeroes(on.then(|| self.hasher.zeroes()));
    }

    fn begin_pass(&mut self, second: u32) {
        let core = &mut self.state.core;
        core.pass += 1;
        core.clock.begin_pass(second);
    }

    /// All addresses in all address spaces.
    fn places(&self) -> impl Iterator<Item = PageAddr> {
        (0..self.mms.len() as MmId).flat_map(|mm| {
            ADDRS.map(|addr| PageAddr {
                mm_id: mm + 1,
                addr,
            })
        })
    }

    /// Has the scan come by a page.
    fn visit(&mut self, place: PageAddr, seen: Seen, leaf: &mut LeafPass) -> Option<CandidateKind> {
        match (self.state.entry(place), seen) {
            ((Some(entry), core), _) => core.classify_page(place, entry, seen, leaf),
            (_, Seen::Anon(sample)) => {
                let mm = self.mms[place.mm_id as usize - 1].mm();
                // Without memory, a later pass tracks it.
                let _ = self.state.remember(mm, place, sample);
                None
            }
            (_, Seen::Ksm(Some(node))) => Some(CandidateKind::Unlisted(node)),
            (_, Seen::Ksm(None)) => Some(CandidateKind::Ownerless),
        }
    }

    /// Has an ordinary pass come by an anonymous page with this sample.
    fn see(&mut self, place: PageAddr, content: u32) -> Option<CandidateKind> {
        self.visit(place, Seen::Anon(sample(content)), &mut retrying())
    }

    /// Tracks a page, and makes it steady.
    fn steady(&mut self, place: PageAddr, content: u32) {
        self.see(place, content);
        self.see(place, content);
        assert_eq!(self.show(place), Shown::Steady(sample(content)));
    }

    /// Makes the page, which is tracked, the first one of a new node. Returns the key.
    fn publish(&mut self, place: PageAddr, sum: Checksum) -> Result<StableKey> {
        let core = &mut self.state.core;
        let item = core.try_new_item(sum.sample(), GFP_SCAN)?;
        let key = core.index.new_key(sum);
        core.index
            .insert(key, NodeBox::new(key, GFP_SCAN)?, GFP_SCAN)?;
        core.index.node(key).unwrap().link(&item);
        self.state.merged(place, item, key);
        self.keys.push(key);
        Ok(key)
    }

    /// Merges the page, which is tracked, into the page of a node. Returns whether that has room.
    fn merge(&mut self, place: PageAddr, key: StableKey) -> Result<bool> {
        let core = &mut self.state.core;
        let item = core.try_new_item(key.sum.sample(), GFP_SCAN)?;
        let Some(node) = core.index.node(key) else {
            return Ok(false);
        };
        if node.items() >= core.settings.max_sharing() || node.page().is_none() {
            return Ok(false);
        }
        node.link(&item);
        self.state.merged(place, item, key);
        Ok(true)
    }

    fn node(&self, key: StableKey) -> &NodeBox {
        self.state.core.index.node(key).unwrap()
    }

    fn id(&self, key: StableKey) -> NodeId {
        self.node(key).id().unwrap()
    }

    /// Changes the page of a node as the kernel might.
    fn set_page(&self, key: StableKey, change: impl FnOnce(&mut TestPage)) {
        let page = self.node(key).test_page();
        let mut new = page.get();
        change(&mut new);
        page.set(new);
    }

    /// Returns the nodes that exist, with the keys that they have by now.
    fn nodes(&self) -> std::vec::Vec<StableKey> {
        let index = &self.state.core.index;
        let mut all = std::vec::Vec::new();
        let mut add = |next: &dyn Fn(Option<StableKey>) -> Option<StableKey>| {
            let mut after = None;
            while let Some(key) = next(after) {
                all.push(key);
                after = Some(key);
            }
        };
        add(&|after| index.next_node(after));
        add(&|after| index.next_full(after));
        add(&|after| index.next_orphan(after));
        all
    }

    fn show(&mut self, place: PageAddr) -> Shown {
        match self.state.entry(place).0.map(|entry| entry.state()) {
            None => Shown::Untracked,
            Some(PageState::Seen(sample)) => Shown::Seen(sample),
            Some(PageState::Steady(sample)) => Shown::Steady(sample),
            Some(PageState::Unstable(sum)) => Shown::Unstable(sum),
            Some(PageState::Merged(node)) => Shown::Merged(node),
        }
    }

    fn strikes(&mut self, place: PageAddr) -> u64 {
        self.state.entry(place).0.unwrap().strikes().get()
    }

    /// Checks all that has to hold between entries, trees, filter and counters.
    fn check(&mut self) {
        let places: std::vec::Vec<_> = self.places().collect();
        let (mut pages, mut steady, mut queued) = (0, 0, 0);
        let mut listed: BTreeMap<NodeId, usize> = BTreeMap::new();
        let mut filter = Filter::for_pages(1000, 1 << 30).unwrap();
        for zero in self
            .state
            .core
            .zeroes
            .iter()
            .flat_map(|zeroes| zeroes.iter())
        {
            filter.add(zero);
            filter.add(zero);
        }
        for place in places {
            let shown = self.show(place);
            if shown == Shown::Untracked {
                continue;
            }
            pages += 1;
            let of = self.state.entry(place).0.unwrap().sample();
            filter.add(of);
            match shown {
                Shown::Steady(_) => steady += 1,
                Shown::Unstable(sum) => {
                    queued += 1;
                    let found = self.state.core.unstable.lookup(sum);
                    assert_eq!(found, Some(place), "is queued under {sum:?}");
                }
                Shown::Merged(Some(node)) => *listed.entry(node).or_default() += 1,
                _ => {}
            }
        }
        let core = &self.state.core;
        assert_eq!(core.pages, pages, "pages");
        assert_eq!(core.steady, steady, "steady pages");
        assert_eq!(core.unstable.len(), queued, "queued pages");
        assert_eq!(core.items, listed.values().sum::<usize>(), "items");
        let nodes = self.nodes();
        let full = |key: &StableKey| self.node(*key).items() >= core.settings.max_sharing();
        let (with, without): (std::vec::Vec<_>, std::vec::Vec<_>) =
            nodes.iter().partition(|&&key| self.node(key).items() != 0);
        for &key in &with {
            let node = self.node(key);
            let count = listed.get(&node.id().unwrap()).copied();
            assert_eq!(count, Some(node.items()), "mappings of {key:?}");
            assert_eq!(node.key(), key);
        }
        assert_eq!(core.index.stable_len(), with.len(), "nodes with mappings");
        assert_eq!(core.index.orphans_len(), without.len(), "orphans");
        let mut after = None;
        let mut fulls = 0;
        while let Some(key) = core.index.next_full(after) {
            assert!(full(&key), "{key:?} is in the full tree");
            after = Some(key);
            fulls += 1;
        }
        assert_eq!(with.into_iter().filter(full).count(), fulls, "full nodes");
        // A counter that was at its maximum stays there, so the filter may say so of more samples.
        for of in (0..8).map(sample) {
            assert!(core.filter.has_two(of) || !filter.has_two(of), "{of:?}");
        }
    }

    /// Has the kernel free the pages of all nodes.
    fn free_all_pages(&self) {
        for key in self.nodes() {
            self.set_page(key, |page| page.gone = true);
        }
    }

    /// Frees everything. Nothing may be left then, and nothing may have been logged.
    fn end(mut self) {
        self.check();
        for key in self.nodes() {
            self.set_page(key, |page| {
                page.locked = false;
            });
        }
        let Self {
            state, mms, before, ..
        } = self;
        drop(state);
        assert!(mms.iter().all(|mm| mm.references() == 0));
        drop(mms);
        assert_eq!((live(), errors()), before);
    }
}

/// A state that can be compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shown {
    Untracked,
    Seen(Sample),
    Steady(Sample),
    Unstable(Checksum),
    Merged(Option<NodeId>),
}

/// A leaf in a pass that retries steady pages.
fn retrying() -> LeafPass {
    LeafPass::new(true, false)
}

/// A leaf in a pass that retries nothing.
fn idle() -> LeafPass {
    LeafPass::new(false, false)
}

/// A leaf that is due for a refresh.
fn refreshing() -> LeafPass {
    LeafPass::new(true, true)
}
