// SPDX-License-Identifier: GPL-2.0

//! Tests of `ksm/mms.rs`, compared with plain maps and with the reference counts.

use crate::ksm::mms::{Registry, Reservation};
use kernel::{
    alloc::flags::GFP_NOWAIT,
    error::code::ENOMEM,
    mm::Mm,
    sync::aref::ARef,
    testing::{failing, live, watch, Events, Live, Plan, TestMm},
};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

const MMS: usize = 6;

/// The registry, and its expected content.
struct Pair {
    registry: Registry,
    mms: Vec<TestMm>,
    /// The address space of each number.
    live: BTreeMap<u64, usize>,
    dead: BTreeMap<u64, usize>,
    missed: bool,
    /// Spare reservations, and whether there was ever room for some.
    spares: usize,
    room: bool,
    /// The highest number so far.
    last: u64,
    /// The numbers of those that a pass has walked.
    walked: BTreeSet<u64>,
}

impl Pair {
    fn new() -> Self {
        assert_eq!(live(), Live::default(), "left behind by a test before");
        Self {
            registry: Registry::new(),
            mms: (0..MMS).map(|_| TestMm::new()).collect(),
            live: BTreeMap::new(),
            dead: BTreeMap::new(),
            missed: false,
            spares: 0,
            room: false,
            last: 0,
            walked: BTreeSet::new(),
        }
    }

    fn id_of(&self, mm: usize) -> Option<u64> {
        self.live
            .iter()
            .find(|(_, known)| **known == mm)
            .map(|(id, _)| *id)
    }

    fn which(&self, mm: &Mm) -> usize {
        self.mms
            .iter()
            .position(|known| known.mm().as_raw() == mm.as_raw())
            .unwrap()
    }

    fn enter(&mut self, mm: usize, plan: Plan) {
        let reservation = failing(plan, || Reservation::new(GFP_NOWAIT));
        let reserved = match &reservation {
            Ok(_) => true,
            Err(err) => {
                assert_eq!(*err, ENOMEM);
                false
            }
        };
        let reference = ARef::from(self.mms[mm].mm());
        let (unused, events) = watch(|| self.registry.enter(reference, reservation.ok()));
        assert_eq!(events, Events::default(), "happened under the lock");
        // The reservation is used first, then the spares.
        let spare = !reserved && self.spares > 0;
        match (self.id_of(mm), reserved || spare) {
            // Already known: all is returned, and no spare was used.
            (Some(_), _) => {
                let (back, reservation) = unused.expect("kept a second reference");
                assert_eq!(self.which(&back), mm);
                assert_eq!(reservation.is_some(), reserved);
            }
            (None, false) => {
                let (back, reservation) = unused.expect("entered without memory");
                assert_eq!(self.which(&back), mm);
                assert!(reservation.is_none());
                self.missed = true;
            }
            (None, true) => {
                assert!(unused.is_none());
                self.spares -= usize::from(spare);
                let id = self.registry.last_id();
                assert!(id > self.last, "a number was used twice, or is 0");
                self.last = id;
                self.live.insert(id, mm);
            }
        }
    }

    fn replace_spares(&mut self, count: usize) {
        let mut spares = kernel::alloc::KVec::with_capacity(count, GFP_NOWAIT).unwrap();
        for _ in 0..count {
            spares
                .push_within_capacity(Reservation::new(GFP_NOWAIT).unwrap())
                .unwrap();
        }
        let (back, events) = watch(|| self.registry.replace_spares(spares));
        assert_eq!(events, Events::default(), "happened under the lock");
        assert_eq!(back.len(), self.spares);
        self.spares = count;
        self.room = count != 0;
    }

    fn enter_with_spare(&mut self, mm: usize) {
        let known = self.live.values().any(|&live| live == mm);
        let ((), events) = watch(|| self.registry.enter_with_spare(self.mms[mm].mm()));
        assert_eq!(events.allocs + events.frees + events.mm_drops, 0);
        if known {
            assert_eq!(events.mm_gets, 0);
        } else if self.spares == 0 {
            self.missed = true;
        } else {
            self.spares -= 1;
            let id = self.registry.last_id();
            assert!(id > self.last, "a number was used twice, or is 0");
            self.last = id;
            self.live.insert(id, mm);
        }
        assert_eq!(self.registry.newest(), self.last);
    }

    fn exit(&mut self, mm: usize) {
        let raw = self.mms[mm].mm().as_raw();
        let (known, events) = watch(|| self.registry.exit(raw));
        assert_eq!(events.mm_drops, 0, "dropped under the lock");
        assert_eq!(events.mm_gets + events.allocs + events.failed, 0);
        // The memory of the lookup node may be freed, nothing else.
        assert!(events.frees <= usize::from(known));
        let id = self.id_of(mm);
        assert_eq!(known, id.is_some());
        if let Some(id) = id {
            self.live.remove(&id);
            self.dead.insert(id, mm);
        }
    }

    /// Take the exited address space that was registered first. It keeps its reference.
    fn take_dead(&mut self) -> bool {
        let (dead, events) = watch(|| self.registry.take_dead());
        assert_eq!(events.mm_drops + events.mm_gets + events.allocs, 0);
        let found = dead.as_ref().map(|(id, mm)| (*id, self.which(mm)));
        assert_eq!(found, self.dead.pop_first());
        found.is_some()
    }

    fn next(&self, after: u64) -> Option<u64> {
        let (next, events) = watch(|| self.registry.next(after));
        assert_eq!(events.mm_drops + events.allocs + events.frees, 0);
        if let Some((id, registered)) = &next {
            assert_eq!(registered.is_new, !self.walked.contains(id));
        }
        let found = next
            .as_ref()
            .map(|(id, known)| (*id, self.which(&known.mm)));
        let expected = self.live.iter().find(|(id, _)| **id > after);
        assert_eq!(found, expected.map(|(id, mm)| (*id, *mm)));
        // This is the caller's own reference.
        if let Some((_, mm)) = found {
            assert_eq!(self.mms[mm].references(), self.expected_references(mm) + 1);
        }
        found.map(|(id, _)| id)
    }

    /// Note that a pass has walked an address space, registered or not.
    fn note_walked(&mut self, id: u64) {
        self.registry.note_walked(id);
        if self.live.contains_key(&id) {
            self.walked.insert(id);
        }
    }

    fn take_missed(&mut self) {
        assert_eq!(self.registry.take_missed(), self.missed);
        self.missed = false;
    }

    fn expected_references(&self, mm: usize) -> isize {
        let all = self.live.values().chain(self.dead.values());
        all.filter(|known| **known == mm).count() as isize
    }

    fn check(&self) {
        assert_eq!(self.registry.is_empty(), self.live.is_empty());
        assert_eq!(self.registry.has_dead(), !self.dead.is_empty());
        assert_eq!(self.registry.has_missed(), self.missed);
        for (nth, mm) in self.mms.iter().enumerate() {
            assert_eq!(self.registry.knows(mm.mm()), self.id_of(nth).is_some());
        }
        let last = self.live.keys().next_back();
        assert_eq!(self.registry.last_id(), last.copied().unwrap_or(0));
        for (nth, mm) in self.mms.iter().enumerate() {
            assert_eq!(mm.references(), self.expected_references(nth));
        }
        // Two nodes for each registered or possible one, one for each exited one, and room for spares.
        let nodes = 2 * (self.live.len() + self.spares) + self.dead.len();
        assert_eq!(live().allocations, nodes + usize::from(self.room));
    }

    fn walk(&self) {
        let mut found = Vec::new();
        let mut after = 0;
        while let Some(id) = self.next(after) {
            found.push(id);
            after = id;
        }
        assert!(found.iter().eq(self.live.keys()));
    }

    fn finish(self) {
        self.check();
        self.walk();
        drop(self.registry);
        assert_eq!(live(), Live::default());
        assert!(self.mms.iter().all(|mm| mm.references() == 0));
    }
}

#[derive(Clone, Debug)]
enum Op {
    Enter(usize, Plan),
    ReplaceSpares(usize),
    EnterWithSpare(usize),
    Exit(usize),
    TakeDead,
    TakeAllDead,
    Next(u64),
    Walk,
    NoteWalked(u64),
    TakeMissed,
}

fn op() -> impl Strategy<Value = Op> {
    let plan = prop_oneof![
        6 => Just(Plan::Never),
        2 => Just(Plan::Always),
        1 => Just(Plan::Nth(1)),
    ];
    prop_oneof![
        10 => (0..MMS, plan).prop_map(|(mm, plan)| Op::Enter(mm, plan)),
        1 => (0..5usize).prop_map(Op::ReplaceSpares),
        5 => (0..MMS).prop_map(Op::EnterWithSpare),
        8 => (0..MMS).prop_map(Op::Exit),
        3 => Just(Op::TakeDead),
        1 => Just(Op::TakeAllDead),
        2 => prop_oneof![0..40u64, Just(u64::MAX), Just(u64::MAX - 1)].prop_map(Op::Next),
        1 => Just(Op::Walk),
        2 => (0..40u64).prop_map(Op::NoteWalked),
        1 => Just(Op::TakeMissed),
    ]
}

proptest! {
    #![proptest_config(super::cases(192))]

    #[test]
    fn is_like_plain_maps(ops in prop::collection::vec(op(), 1..200)) {
        let mut pair = Pair::new();
        for op in ops {
            match op {
                Op::Enter(mm, plan) => pair.enter(mm, plan),
                Op::ReplaceSpares(count) => pair.replace_spares(count),
                Op::EnterWithSpare(mm) => pair.enter_with_spare(mm),
                Op::Exit(mm) => pair.exit(mm),
                Op::TakeDead => {
                    pair.take_dead();
                }
                Op::TakeAllDead => while pair.take_dead() {},
                Op::Next(after) => {
                    pair.next(after);
                }
                Op::Walk => pair.walk(),
                Op::NoteWalked(id) => pair.note_walked(id),
                Op::TakeMissed => pair.take_missed(),
            }
            pair.check();
        }
        pair.finish();
    }
}

#[test]
fn entered_twice() {
    let mut pair = Pair::new();
    pair.enter(0, Plan::Never);
    pair.enter(1, Plan::Never);
    let last = pair.last;
    pair.enter(0, Plan::Never);
    // Known, so it is not missed.
    pair.enter(0, Plan::Always);
    pair.check();
    assert_eq!(pair.last, last);
    assert!(!pair.registry.has_missed());
    assert_eq!(pair.mms[0].references(), 1);
    pair.finish();
}

#[test]
fn unknown_one_exits() {
    let mut pair = Pair::new();
    pair.exit(0);
    pair.enter(1, Plan::Never);
    pair.exit(0);
    pair.exit(1);
    // It exits only once.
    pair.exit(1);
    pair.check();
    assert_eq!(pair.dead.len(), 1);
    pair.finish();
}

/// Exited address spaces come in the order of their registration, whatever the order of their exits.
#[test]
fn order_of_the_dead() {
    let mut pair = Pair::new();
    (0..4).for_each(|mm| pair.enter(mm, Plan::Never));
    for mm in [2, 0, 3, 1] {
        pair.exit(mm);
    }
    let mut order = Vec::new();
    while let Some((_, dead)) = pair.registry.take_dead() {
        order.push(pair.which(&dead));
    }
    assert_eq!(order, [0, 1, 2, 3]);
    pair.dead.clear();
    pair.finish();
}

/// One that left and comes again is a new one, even before the first is cleaned up.
#[test]
fn comes_again() {
    let mut pair = Pair::new();
    pair.enter(0, Plan::Never);
    let first = pair.last;
    pair.exit(0);
    pair.enter(0, Plan::Never);
    assert!(pair.last > first);
    assert_eq!(pair.mms[0].references(), 2);
    pair.check();
    assert!(pair.take_dead());
    assert_eq!(pair.mms[0].references(), 1);
    pair.finish();
}

/// A reservation that fails leaves nothing behind.
#[test]
fn no_memory_to_reserve() {
    for nth in 0..2 {
        let result = failing(Plan::Nth(nth), || Reservation::new(GFP_NOWAIT));
        assert_eq!(result.err(), Some(ENOMEM));
        assert_eq!(live(), Live::default());
    }
}

/// A missed registration is remembered until it is queried, and no reference is kept.
#[test]
fn missed() {
    let mut pair = Pair::new();
    pair.enter(0, Plan::Always);
    pair.enter(1, Plan::Nth(1));
    pair.check();
    assert!(pair.registry.has_missed());
    pair.take_missed();
    assert!(!pair.registry.has_missed());
    pair.enter(0, Plan::Never);
    pair.finish();
}

/// Spares are for registrations without a reservation. A registration is missed only if no spare is left.
#[test]
fn spares() {
    let mut pair = Pair::new();
    pair.enter_with_spare(0);
    assert!(pair.registry.has_missed());
    pair.take_missed();
    pair.replace_spares(2);
    pair.check();
    // A registration with a reservation uses that, and a known address space needs none.
    pair.enter(0, Plan::Never);
    pair.enter(0, Plan::Always);
    assert_eq!(pair.spares, 2);
    pair.enter(1, Plan::Always);
    pair.enter(2, Plan::Nth(1));
    assert_eq!(pair.spares, 0);
    assert!(!pair.registry.has_missed());
    pair.check();
    pair.enter(3, Plan::Always);
    assert!(pair.registry.has_missed());
    assert!(!pair.registry.knows(pair.mms[3].mm()));
    // Replaced, as after a round of allocations.
    pair.replace_spares(1);
    pair.take_missed();
    pair.enter_with_spare(3);
    assert!(pair.registry.knows(pair.mms[3].mm()));
    assert!(!pair.registry.has_missed());
    pair.finish();
}

/// Unused spares are freed with the rest.
#[test]
fn unused_spares() {
    let mut pair = Pair::new();
    pair.replace_spares(64);
    assert_eq!(pair.spares, 64);
    pair.enter(0, Plan::Always);
    assert_eq!(pair.spares, 63);
    pair.finish();
}
