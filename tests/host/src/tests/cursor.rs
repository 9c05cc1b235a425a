// SPDX-License-Identifier: GPL-2.0

//! Tests of `ksm/cursor.rs`: passes over a registry whose address spaces come and go, compared with a plain
//! list of those that are still to be scanned.

use crate::ksm::{
    cursor::Position,
    mms::{Registry, Reservation},
};
use kernel::{
    alloc::flags::GFP_NOWAIT,
    sync::aref::ARef,
    testing::{failing, Plan, TestMm},
};
use proptest::prelude::*;
use std::collections::VecDeque;

const MMS: usize = 8;

/// The number of the current address space, and the position in it.
type Turn = (u64, usize);

/// A scan, and its expected course.
struct Pair {
    registry: Registry,
    position: Position,
    mms: Vec<TestMm>,
    /// The numbers of the registered address spaces, in order, each with its address space.
    live: Vec<(u64, usize)>,
    /// The address spaces still to be scanned in this pass, in order.
    waiting: VecDeque<u64>,
    now: Option<Turn>,
    /// The address spaces of this pass, exited or not; `None` between passes.
    pass: Option<Vec<u64>>,
    passes: usize,
}

impl Pair {
    fn new() -> Self {
        Self {
            registry: Registry::new(),
            position: Position::new(),
            mms: (0..MMS).map(|_| TestMm::new()).collect(),
            live: Vec::new(),
            waiting: VecDeque::new(),
            now: None,
            pass: None,
            passes: 0,
        }
    }

    /// Register an address space, if there is memory for that.
    fn enter(&mut self, mm: usize, plan: Plan) {
        let reservation = failing(plan, || Reservation::new(GFP_NOWAIT));
        let enough = reservation.is_ok();
        let reference = ARef::from(self.mms[mm].mm());
        drop(self.registry.enter(reference, reservation.ok()));
        if enough && !self.live.iter().any(|(_, known)| *known == mm) {
            self.live.push((self.registry.last_id(), mm));
        }
    }

    fn exit(&mut self, mm: usize) {
        self.registry.exit(self.mms[mm].mm().as_raw());
        let Some(at) = self.live.iter().position(|(_, known)| *known == mm) else {
            return;
        };
        let (id, _) = self.live.remove(at);
        self.waiting.retain(|other| *other != id);
        if self.now.is_some_and(|(now, _)| now == id) {
            self.now = None;
        }
    }

    /// Take one step of a scan: `pages` further in the current address space, or to its end.
    fn step(&mut self, pages: usize, ends: bool) {
        if self.position.is_between_passes() {
            assert!(self.pass.is_none());
            let ids: Vec<u64> = self.live.iter().map(|(id, _)| *id).collect();
            self.position.begin(self.registry.last_id());
            self.waiting = ids.iter().copied().collect();
            self.pass = Some(ids);
        }
        if self.now.is_none() {
            self.now = self.waiting.pop_front().map(|id| (id, 0));
        }
        let turn = self.position.current_mm(|after| self.registry.next(after));
        assert_eq!(turn.map(|(id, _)| id), self.now.map(|(id, _)| id));
        let Some((id, addr)) = self.now else {
            // All were scanned.
            self.position = Position::new();
            self.pass = None;
            self.passes += 1;
            return;
        };
        assert_eq!(self.position.addr(), addr);
        if ends {
            self.position.leave();
            self.now = None;
        } else {
            let to = addr.saturating_add(pages * 4096);
            self.position.move_to(to);
            self.now = Some((id, to));
        }
    }

    /// Start again from the first, with the same ones.
    fn rewind(&mut self) {
        let Some(pass) = &self.pass else {
            return;
        };
        self.position.rewind();
        self.now = None;
        let alive = |id: &&u64| self.live.iter().any(|(live, _)| live == *id);
        self.waiting = pass.iter().filter(alive).copied().collect();
    }
}

#[derive(Clone, Debug)]
enum Op {
    Enter(usize, Plan),
    Exit(usize),
    Step(usize, bool),
    Rewind,
    /// The effect of writing 2 to `run`.
    StartAgain,
}

fn op() -> impl Strategy<Value = Op> {
    let plan = prop_oneof![
        6 => Just(Plan::Never),
        1 => Just(Plan::Always),
        1 => Just(Plan::Nth(1)),
    ];
    prop_oneof![
        6 => (0..MMS, plan).prop_map(|(mm, plan)| Op::Enter(mm, plan)),
        4 => (0..MMS).prop_map(Op::Exit),
        12 => (1..1000usize, any::<bool>()).prop_map(|(pages, ends)| Op::Step(pages, ends)),
        1 => Just(Op::Rewind),
        1 => Just(Op::StartAgain),
    ]
}

proptest! {
    #![proptest_config(super::cases(512))]

    #[test]
    fn each_has_its_turn(ops in prop::collection::vec(op(), 1..400)) {
        let mut pair = Pair::new();
        for op in ops {
            match op {
                Op::Enter(mm, plan) => pair.enter(mm, plan),
                Op::Exit(mm) => pair.exit(mm),
                Op::Step(pages, ends) => pair.step(pages, ends),
                Op::Rewind => pair.rewind(),
                Op::StartAgain => {
                    pair.position = Position::new();
                    (pair.now, pair.pass) = (None, None);
                    pair.waiting.clear();
                }
            }
        }
        // After all this, the pass ends, and so does the next one.
        let passes = pair.passes;
        for _ in 0..2 * (MMS + 1) {
            pair.step(1, true);
        }
        prop_assert!(pair.passes >= passes + 2);
    }
}

/// An address space that comes during a pass is not scanned in it.
#[test]
fn latecomers_wait() {
    let mut pair = Pair::new();
    pair.enter(0, Plan::Never);
    pair.step(1, false);
    pair.enter(1, Plan::Never);
    pair.step(1, true);
    assert_eq!(pair.passes, 0);
    pair.step(1, true);
    assert_eq!(pair.passes, 1);
    // The next pass scans both.
    pair.step(1, true);
    pair.step(1, true);
    assert_eq!(pair.passes, 1);
    pair.step(1, true);
    assert_eq!(pair.passes, 2);
}

/// An address space that takes the place of an exited one is scanned from its first address.
#[test]
fn the_next_begins_at_its_beginning() {
    let mut pair = Pair::new();
    pair.enter(0, Plan::Never);
    pair.enter(1, Plan::Never);
    pair.step(500, false);
    pair.exit(0);
    pair.step(1, false);
    assert_eq!(pair.now.map(|(_, addr)| addr), Some(4096));
}

/// A pass returns only to the address space that it left, at the same position, and to none that is gone.
#[test]
fn comes_back() {
    let mut pair = Pair::new();
    (0..3).for_each(|mm| pair.enter(mm, Plan::Never));
    let turn = |position: &mut Position| position.current_mm(|after| pair.registry.next(after));
    let mut position = Position::new();
    position.begin(3);
    assert_eq!(turn(&mut position).map(|(id, _)| id), Some(1));
    position.move_to(8192);
    let here = position.here();
    assert_eq!(here, (1, 8192));
    for id in 2..4 {
        position.leave();
        assert_eq!(turn(&mut position).map(|(id, _)| id), Some(id));
    }
    position.leave();
    assert!(turn(&mut position).is_none());
    position.come_back_to(here.0, here.1);
    assert_eq!(turn(&mut position).map(|(id, _)| id), Some(1));
    assert_eq!(position.addr(), 8192);
    position.leave();
    assert!(turn(&mut position).is_none());
    position.come_back_to(3, 0);
    pair.exit(2);
    let next = position.current_mm(|after| pair.registry.next(after));
    assert!(next.is_none());
    position.rewind();
    let next = position.current_mm(|after| pair.registry.next(after));
    assert_eq!(next.map(|(id, _)| id), Some(1));
}

/// A pass over an empty registry ends at once.
#[test]
fn nobody() {
    let mut pair = Pair::new();
    pair.step(1, false);
    assert_eq!(pair.passes, 1);
    assert!(pair.position.is_between_passes());
}
