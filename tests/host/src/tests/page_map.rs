// SPDX-License-Identifier: GPL-2.0

//! Tests of `ksm/page_map/`, compared with a map of the standard library.

mod pair;

use super::counted::Counted;
use crate::ksm::{
    page_map::{Found, Moment, PageMap, Pass},
    unlisted::Unlisted,
};
use kernel::{
    alloc::flags::GFP_NOWAIT,
    page::{PAGE_MASK, PAGE_SIZE},
    testing::{failing, live, watch, Live, Plan, Random},
};
use pair::{Look, Pair, Way};
use proptest::{prelude::*, sample::Index};
use std::iter;

const LEAF: usize = 512 * PAGE_SIZE;
/// The last pages of user space with four and with five levels of page tables.
const LAST_4_LEVELS: usize = (1 << 47) - 2 * PAGE_SIZE;
const LAST_5_LEVELS: usize = (1 << 56) - 2 * PAGE_SIZE;
const LAST_OF_ALL: usize = usize::MAX & PAGE_MASK;

#[derive(Clone, Debug)]
enum Op {
    /// Of the pages of the pool between these two: those that the scan finds, and how.
    Absorb(Index, Index, Vec<u8>, Way, Plan),
    Remember(Index, Plan),
    Remove(Index),
    Change(Index),
    /// From a page of the pool to a page of the pool, plus a number of bytes.
    Next(Index, Index, usize),
    /// From a page of the pool, for a number of bytes.
    NextBytes(Index, usize),
    Walk(Index, Index),
    /// All leaves from that of a page on.
    VisitLeaves(Index),
    Clear(Index, Index),
    Forget(Index, Index, usize),
}

fn plan() -> impl Strategy<Value = Plan> {
    prop_oneof![
        8 => Just(Plan::Never),
        1 => Just(Plan::Always),
        1 => (0..4usize).prop_map(Plan::Nth),
        1 => (0..4usize).prop_map(Plan::After),
        1 => any::<u64>().prop_map(|seed| Plan::Percent { percent: 40, seed }),
    ]
}

/// For each page of a range in turn, repeatedly: whether the scan finds it, and what happens to it.
fn looks() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        2 => Just(vec![0]),
        1 => Just(vec![1]),
        3 => prop::collection::vec(0..4u8, 1..40),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    let page = any::<Index>;
    let way = prop_oneof![Just(Way::Stepwise), Just(Way::Runs)];
    prop_oneof![
        12 => (page(), page(), looks(), way, plan())
            .prop_map(|(from, to, looks, way, plan)| Op::Absorb(from, to, looks, way, plan)),
        12 => (page(), plan()).prop_map(|(at, plan)| Op::Remember(at, plan)),
        12 => page().prop_map(Op::Remove),
        6 => page().prop_map(Op::Change),
        6 => (page(), page(), 0..2 * PAGE_SIZE).prop_map(|(a, b, more)| Op::Next(a, b, more)),
        6 => (page(), 0..3 * LEAF).prop_map(|(a, bytes)| Op::NextBytes(a, bytes)),
        2 => (page(), page()).prop_map(|(a, b)| Op::Walk(a, b)),
        2 => page().prop_map(Op::VisitLeaves),
        1 => (page(), page()).prop_map(|(a, b)| Op::Clear(a, b)),
        4 => (page(), page(), 0..4usize).prop_map(|(a, b, nth)| Op::Forget(a, b, nth)),
    ]
}

/// Return the pages of a pool that a scan of `from..to` finds, no more than a batch holds.
fn batch(pool: &[usize], from: usize, to: usize, looks: &[u8]) -> (usize, Vec<(usize, Look)>) {
    let mut pages: Vec<usize> = pool
        .iter()
        .copied()
        .filter(|addr| (from..to).contains(addr))
        .collect();
    pages.sort_unstable();
    pages.dedup();
    let found: Vec<_> = iter::zip(pages, looks.iter().cycle())
        .filter_map(|(addr, look)| match look {
            0 => Some((addr, Look::Remember)),
            1 => Some((addr, Look::Change)),
            2 => Some((addr, Look::Skip)),
            _ => None,
        })
        .collect();
    match found.get(512) {
        Some(next) => (next.0, found[..512].to_vec()),
        None => (to, found),
    }
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
    #![proptest_config(super::cases(96))]

    #[test]
    fn is_like_a_map(
        pool in pool(),
        full in any::<bool>(),
        ops in prop::collection::vec(op(), 1..160),
        by_removing in any::<bool>(),
    ) {
        let mut pair = Pair::with(pool.iter().copied().filter(|_| full));
        let page = |at: Index| *at.get(&pool);
        for op in ops {
            match op {
                Op::Absorb(from, to, looks, way, plan) => {
                    let (a, b) = (page(from), page(to));
                    let (from, to) = (a.min(b), a.max(b).saturating_add(PAGE_SIZE));
                    let (to, found) = batch(&pool, from, to, &looks);
                    pair.absorb(from, to, &found, way, plan);
                }
                Op::Remember(at, plan) => pair.remember(page(at), plan),
                Op::Remove(at) => pair.remove(page(at)),
                Op::Change(at) => pair.change(page(at)),
                Op::Next(from, to, more) => {
                    pair.next(page(from), page(to).saturating_add(more));
                }
                Op::NextBytes(from, bytes) => {
                    pair.next(page(from), page(from).saturating_add(bytes));
                }
                Op::Walk(from, to) => {
                    pair.walk(page(from), page(to));
                }
                Op::VisitLeaves(from) => pair.visit_leaves(page(from) / LEAF * LEAF),
                Op::Clear(from, to) => pair.clear(page(from), page(to)),
                Op::Forget(from, to, nth) => pair.forget_range(page(from), page(to), nth),
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

/// Grow and shrink many times, with failing allocations now and then.
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
            for _ in 0..if cfg!(miri) { 100 } else { 4000 } {
                let start = starts[random.below(4) as usize] & PAGE_MASK;
                let addr = start.saturating_add(random.below(pages) as usize * PAGE_SIZE);
                let addr = addr & PAGE_MASK;
                match random.below(10) {
                    0 => pair.change(addr),
                    1 => {
                        pair.next(addr, addr.saturating_add(random.below(1 << 24) as usize));
                    }
                    2 => pair.remember(addr, Plan::Always),
                    n if (n < 9) == grows => pair.remember(addr, Plan::Never),
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

/// Passes over the same memory, of which a little changes in between: the engine's usual work.
#[test]
fn passes() {
    for way in [Way::Stepwise, Way::Runs] {
        let mut random = Random::new(11);
        let mut pair = Pair::new();
        let mut there: Vec<bool> = (0..4000).map(|_| random.below(4) != 0).collect();
        let start = LEAF - 3 * PAGE_SIZE;
        for pass in 0..if cfg!(miri) { 5 } else { 40 } {
            let plan = match pass % 4 {
                3 => Plan::Percent {
                    percent: 30,
                    seed: pass,
                },
                _ => Plan::Never,
            };
            let step = [512, 100, 37][pass as usize % 3];
            for (nth, there) in there.chunks(step).enumerate() {
                let from = start + nth * step * PAGE_SIZE;
                let at = |nth: usize| from + nth * PAGE_SIZE;
                let to = at(there.len());
                let found: Vec<_> = (0..there.len())
                    .filter(|&nth| there[nth])
                    .map(|nth| (at(nth), Look::Remember))
                    .collect();
                pair.absorb(from, to, &found, way, plan);
                pair.check_memory();
            }
            if pass % 4 == 2 {
                assert_eq!(
                    pair.model.len(),
                    there.iter().filter(|there| **there).count()
                );
            }
            for _ in 0..40 {
                let from = random.below(4000) as usize;
                let to = (from + random.below(30) as usize).min(4000);
                there[from..to].fill(random.below(3) != 0);
            }
        }
        pair.empty_by_removing();
    }
}

/// Each allocation of a batch fails, once, and from there on. The next pass makes up for it.
#[test]
fn each_allocation_fails() {
    let page = |nth: usize| (nth * PAGE_SIZE, Look::Remember);
    let hole = |nth: usize| nth % 7 == 3;
    let all: Vec<_> = (500..1700).map(page).collect();
    let holes: Vec<_> = (500..1700).filter(|nth| !hole(*nth)).map(page).collect();
    // Start with nothing, and with a few pages, in the way or at the end of a leaf.
    let before: [&[usize]; 4] = [
        &[],
        &[503, 700, 1023],
        &[510, 511, 512, 1699],
        &[10, 520, 1800],
    ];
    for (before, batch, way) in before
        .into_iter()
        .flat_map(|before| {
            [
                (&all, Way::Runs),
                (&all, Way::Stepwise),
                (&holes, Way::Stepwise),
                (&holes, Way::Runs),
            ]
            .map(|(batch, way)| (before, batch, way))
        })
        // Under Miri, one of each kind.
        .step_by(if cfg!(miri) { 10 } else { 1 })
    {
        let run = |plan| {
            let mut pair = Pair::with(before.iter().map(|nth| nth * PAGE_SIZE));
            let (from, to) = (500 * PAGE_SIZE, 1700 * PAGE_SIZE);
            let ((), events) = watch(|| pair.absorb(from, to, batch, way, plan));
            pair.check_content();
            let missing = |pair: &Pair| {
                batch
                    .iter()
                    .filter(|page| !pair.model.contains_key(&page.0))
                    .count()
            };
            let missed = missing(&pair);
            pair.absorb(from, to, batch, way, Plan::Never);
            assert_eq!(missing(&pair), 0);
            assert_eq!(pair.model.range(from..to).count(), batch.len());
            pair.empty_by_removing();
            (events, missed)
        };
        let (events, missed) = run(Plan::Never);
        assert_eq!(missed, 0);
        assert!((3..20).contains(&events.allocs), "{events:?}");
        for nth in (0..events.allocs).step_by(if cfg!(miri) { 4 } else { 1 }) {
            assert_eq!(run(Plan::Nth(nth)).0.failed, 1);
            assert!(run(Plan::After(nth)).1 > 0);
        }
        assert_eq!(run(Plan::Nth(events.allocs)).0.failed, 0);
    }
}

/// A batch allocates as much memory at once as it needs, and no more.
#[test]
fn one_allocation_for_the_words_of_a_batch() {
    for way in [Way::Stepwise, Way::Runs] {
        for count in [1, 2, 100, 511, 512] {
            let mut pair = Pair::new();
            let batch: Vec<_> = (0..count)
                .map(|nth| (nth * PAGE_SIZE, Look::Remember))
                .collect();
            let end = count * PAGE_SIZE;
            let ((), events) = watch(|| pair.absorb(0, end, &batch, way, Plan::Never));
            // The rest is the leaf itself, which the kernel's slabs store in 64 bytes, and 128 bytes for the
            // bits of a leaf with more than one page.
            let leaf = pair.map.bytes();
            if count == 1 {
                assert_eq!((events.allocs, events.frees), (1, 0));
                assert!(leaf <= 64, "{leaf}");
            } else {
                assert_eq!((events.allocs, events.frees), (3, 0));
                let leaf = leaf - count * size_of::<Counted>();
                assert!(leaf <= 64 + 128, "{leaf}");
            }
            pair.empty_by_removing();
        }
    }
}

/// The ends of a leaf, and of all addresses.
#[test]
fn leaf_ends() {
    for addr in [
        0,
        1,
        PAGE_SIZE,
        LEAF - PAGE_SIZE,
        LEAF,
        LAST_4_LEVELS,
        LAST_OF_ALL,
    ] {
        let end = PageMap::<Counted>::leaf_end(addr);
        assert!(end >= addr);
        assert_eq!(end / LEAF, addr / LEAF);
        assert!(end == usize::MAX || (end + 1) % LEAF == 0);
    }
}

/// A new leaf that gets no entry does not stay, and one with an entry does.
#[test]
fn prunes_only_what_is_empty() {
    let mut pair = Pair::new();
    assert!(pair.map.leaf_from(LEAF, 0, GFP_NOWAIT).is_ok());
    assert!(pair.map.bytes() > 0);
    // This call concerns another leaf.
    pair.map.prune(0, Some(0));
    pair.map.prune(2 * LEAF, Some(0));
    assert!(pair.map.bytes() > 0);
    pair.map.prune(2 * LEAF - PAGE_SIZE, Some(0));
    pair.check_memory();
    pair.remember(LEAF, Plan::Never);
    pair.map.prune(LEAF, Some(0));
    pair.check_content();
    pair.empty_by_removing();
}

/// A leaf whose pages thrash is not visited for a while. All others are.
#[test]
fn trouble_passes() {
    let pages = [LEAF, 2 * LEAF - PAGE_SIZE, 2 * LEAF, 4 * LEAF + PAGE_SIZE];
    let mut pair = Pair::with(pages);
    let visited = |pair: &mut Pair, from| {
        let mut count = 0;
        let end = pair.map.visit_leaf(from, |_, _| count += 1);
        // Visited or not, the walk came this far.
        assert_eq!(end, Some(PageMap::<Counted>::leaf_end(from)));
        count
    };
    // These leaves have no entries.
    pair.map.note_thrash(0, 100);
    pair.map.note_thrash(3 * LEAF, 100);
    pair.check_memory();
    assert_eq!(visited(&mut pair, LEAF), 2);
    // A little is tolerated, even if it recurs after a while.
    for _ in 0..10 {
        pair.map.note_thrash(LEAF + PAGE_SIZE, 2);
        for _ in 0..40 {
            assert_eq!(visited(&mut pair, LEAF), 2);
        }
    }
    let mut before = 0;
    for much in [6, 12, 1000, usize::MAX] {
        pair.map.note_thrash(2 * LEAF - PAGE_SIZE, much);
        let mut rounds = 0;
        while visited(&mut pair, LEAF) == 0 {
            rounds += 1;
            assert!(rounds < 256, "never again");
            assert_eq!(visited(&mut pair, 2 * LEAF), 1);
        }
        assert!(rounds > 0 && rounds >= before, "{much}: {rounds}");
        before = rounds;
        // All is forgotten in the end.
        (0..256).for_each(|_| assert_eq!(visited(&mut pair, LEAF), 2));
    }
    // A leaf that comes again starts without a score.
    pair.map.note_thrash(2 * LEAF, 100);
    assert_eq!(visited(&mut pair, 2 * LEAF), 0);
    pair.remove(2 * LEAF);
    pair.remember(2 * LEAF, Plan::Never);
    assert_eq!(visited(&mut pair, 2 * LEAF), 1);
    pair.empty_by_removing();
}

/// Return the times, in milliseconds, at which a huge page is split. A part of it merges for good, and
/// khugepaged collapses it `collapse` after each split. There are `passes` passes that begin `pace` apart.
fn splits(passes: u32, pace: u64, collapse: u64) -> Vec<u64> {
    let mut pair = Pair::with([LEAF]);
    let mut times: Vec<u64> = Vec::new();
    let mut told = 0;
    for pass in 0..passes {
        let now = u64::from(pass) * pace;
        let moment = Moment {
            pass,
            second: now / 1000,
        };
        let mut leaf = pair.map.leaf_from(LEAF, 0, GFP_NOWAIT).unwrap();
        told += usize::from(leaf.end_wait(|| moment.second));
        let split_since = times.last().is_some_and(|&time| now < time + collapse);
        if split_since || pair.map.keeps_whole(LEAF, moment.second) {
            continue;
        }
        if pair.map.may_split(LEAF + PAGE_SIZE, moment) {
            pair.map.note_split(LEAF + PAGE_SIZE, moment);
            times.push(now);
            // Splits in one pass do not have to wait for each other.
            assert!(pair.map.may_split(LEAF + 2 * PAGE_SIZE, moment));
        }
        // No other leaf waits for this one.
        assert!(pair.map.may_split(0, moment) && !pair.map.keeps_whole(0, moment.second));
    }
    // Each split except the first had to wait, and the end of each wait was reported. The last wait may not
    // have ended, or have had no effect yet.
    assert!((times.len() - 1..=times.len()).contains(&told), "{told}");
    pair.empty_by_dropping();
    times
}

/// A huge page that is split and collapsed again is split ever more rarely, in the end less than once a
/// minute, however fast passes and khugepaged are.
#[test]
fn put_together_again_and_again() {
    for (pace, collapse) in [
        (3, 1),
        (100, 50),
        (1000, 100),
        (1000, 10_000),
        (20_000, 10_000),
    ] {
        let hour = 3_600_000;
        let times = splits((2 * hour / pace) as u32, pace, collapse);
        let waits = times.windows(2).map(|pair| pair[1] - pair[0]);
        for (nth, wait) in waits.enumerate() {
            let least = 1000 << (nth + 1).min(7);
            // Seconds are counted whole. With a slow pace the split comes late.
            let most = least + 2 * pace + collapse;
            assert!(
                (least - 1000..=most).contains(&wait),
                "{pace}, {collapse}: {nth} waits {wait}, not {least} to {most}"
            );
        }
        let last = times.iter().filter(|&&time| time > hour).count();
        assert!((20..60).contains(&last), "{last} times in the last hour");
    }
    // If a pass takes an hour, there is one split in two passes, as no wait is longer than one.
    let times = splits(20, 3_600_000, 10_000);
    assert_eq!(times.len(), 10, "{times:?}");
    // A split that lasts does not count as undone.
    assert_eq!(splits(1000, 1000, u64::MAX / 2), [0]);
}

/// Numbers of passes and seconds wrap around.
#[test]
fn waits_go_round() {
    for second in [65_530, 65_535, 65_536, 1 << 40, (1 << 40) - 1] {
        let mut pair = Pair::with([LEAF]);
        let moment = |pass, more| Moment {
            pass,
            second: second + more,
        };
        for (pass, wait) in [(u32::MAX, 2), (1, 4), (65_536, 8)] {
            pair.map.note_split(LEAF, moment(pass, 0));
            let next = pass.wrapping_add(1);
            assert!(!pair.map.may_split(LEAF, moment(next, 0)));
            for more in 0..wait {
                assert!(pair.map.keeps_whole(LEAF, second + more));
                assert!(!pair.map.may_split(LEAF, moment(next, more)));
            }
            for more in [wait, wait + 1, 1000, 65_000] {
                assert!(!pair.map.keeps_whole(LEAF, second + more));
                assert!(pair.map.may_split(LEAF, moment(next, more)));
            }
        }
        pair.empty_by_dropping();
    }
}

/// Runs have the stated bounds, wherever in a leaf they begin and end.
#[test]
fn runs_at_the_edges() {
    for first in [0, 1, 62, 63, 64, 65, 448, 510, 511] {
        for count in [1, 2, 63, 64, 65, 128, 449, 512] {
            let mut pair = Pair::with([LEAF - PAGE_SIZE, 2 * LEAF]);
            let addr = LEAF + first * PAGE_SIZE;
            let mut map = std::mem::replace(&mut pair.map, PageMap::new());
            let Ok(mut leaf) = map.leaf_from(addr, 0, GFP_NOWAIT) else {
                panic!("no leaf");
            };
            let fits = first + count <= 512;
            let ledger = pair.ledger.clone();
            assert!(leaf.known_run(count).is_none());
            assert!(leaf.is_empty_from_here());
            assert_eq!(leaf.fill_run(count, GFP_NOWAIT, |_| ledger.make()), fits);
            assert_eq!(leaf.len(), if fits { count } else { 0 });
            for (more, known) in [(0, fits), (1, false)] {
                let Ok(mut leaf) = map.leaf_from(addr, 0, GFP_NOWAIT) else {
                    panic!("no leaf");
                };
                assert_eq!(leaf.known_run(count + more).is_some(), known);
                // Far too many.
                assert!(leaf.known_run(usize::MAX).is_none());
            }
            map.prune(addr, Some(0));
            pair.map = map;
            let next = Pair::first_of(&mut pair.map, LEAF, usize::MAX);
            assert_eq!(next, Some(if fits { addr } else { 2 * LEAF }));
            if fits {
                let last = addr + (count - 1) * PAGE_SIZE;
                assert!(pair.map.remove(last, 0).is_some());
                assert!(
                    pair.map.remove(last + PAGE_SIZE, 0).is_some()
                        == (last + PAGE_SIZE == 2 * LEAF)
                );
            }
            drop(pair.map);
            assert_eq!(ledger.alive(), 0);
            assert_eq!(live(), Live::default());
        }
    }
}

#[test]
fn next_at_the_edges() {
    let mut pair = Pair::new();
    assert_eq!(pair.next(0, usize::MAX), None);
    for addr in [0, LEAF - PAGE_SIZE, LEAF, 3 * LEAF, LAST_OF_ALL] {
        pair.remember(addr, Plan::Never);
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
    // Nothing more in this leaf, and the next leaf is behind a hole.
    assert_eq!(pair.next(LEAF + PAGE_SIZE, 3 * LEAF), None);
    assert_eq!(pair.next(LEAF + PAGE_SIZE, usize::MAX), Some(3 * LEAF));
    // From a leaf that does not exist.
    assert_eq!(pair.next(2 * LEAF + PAGE_SIZE, usize::MAX), Some(3 * LEAF));
    assert_eq!(pair.next(4 * LEAF, usize::MAX), Some(LAST_OF_ALL));
    assert_eq!(pair.next(LAST_OF_ALL, LAST_OF_ALL), None);
    assert_eq!(pair.next(LAST_OF_ALL, usize::MAX), Some(LAST_OF_ALL));
    pair.empty_by_removing();
}

/// Create the first `leaves` leaves, with all their pages.
fn full(leaves: usize) -> Pair {
    let mut pair = Pair::new();
    for start in (0..leaves * LEAF).step_by(LEAF) {
        let batch: Vec<_> = (0..512)
            .map(|nth| (start + nth * PAGE_SIZE, Look::Remember))
            .collect();
        pair.absorb(start, start + LEAF, &batch, Way::Runs, Plan::Never);
    }
    pair
}

/// The record of many adjacent pages costs little more than their entries.
#[test]
fn dense_pages_are_cheap() {
    let pair = full(8);
    let pages = pair.model.len();
    assert_eq!(pages, 8 * 512);
    let overhead = pair.map.bytes() - pages * size_of::<Counted>();
    assert!(overhead * 3 <= pages, "{overhead} bytes");
    pair.empty_by_dropping();
}

/// After most of its pages are gone, a map is as small as one that never had more.
#[test]
fn few_of_many_are_cheap() {
    for left in [1, 3, 20] {
        let mut pair = full(8);
        for start in (0..8 * LEAF).step_by(LEAF) {
            let kept = (0..512).filter(|nth| nth % (512 / left) == 7).take(left);
            let batch: Vec<_> = kept
                .map(|nth| (start + nth * PAGE_SIZE, Look::Skip))
                .collect();
            pair.absorb(start, start + LEAF, &batch, Way::Stepwise, Plan::Never);
            pair.check_content();
        }
        assert_eq!(pair.model.len(), 8 * left);
        // A leaf, the bits, and room for four times the entries.
        let most = match left {
            1 => 64,
            _ => 64 + 128 + 4 * left * size_of::<Counted>(),
        };
        let bytes = pair.map.bytes();
        assert!(bytes <= 8 * most, "{bytes} bytes");
        pair.empty_by_removing();
    }
}

/// The remaining entries move to a smaller allocation, which is charged like the one before. Without memory
/// for it, this is retried a few times, not with each entry that goes.
#[test]
fn giving_back_is_charged_and_tried_seldom() {
    for plan in [Plan::Never, Plan::Always] {
        let mut pair = Pair::with((0..512).map(|nth| nth * PAGE_SIZE));
        let (_, events) = watch(|| {
            failing(plan, || {
                (0..511).for_each(|nth| pair.remove(nth * PAGE_SIZE));
            })
        });
        let tried = events.allocs + events.failed;
        assert!((1..=7).contains(&tried), "{plan:?}: {events:?}");
        assert_eq!(events.accounted, tried);
        pair.empty_by_removing();
    }
}

/// The size of the batches does not matter. (The first 100 of 512, the default of `pages_to_scan`, get room
/// for 100, which is then doubled to 200, 400 and 800.)
#[test]
fn small_batches_are_cheap() {
    for size in [1, 37, 100, 300, 511] {
        let mut pair = Pair::new();
        let all: Vec<_> = (0..512)
            .map(|nth| (nth * PAGE_SIZE, Look::Remember))
            .collect();
        for batch in all.chunks(size) {
            let end = batch[batch.len() - 1].0 + PAGE_SIZE;
            pair.absorb(batch[0].0, end, batch, Way::Runs, Plan::Never);
        }
        let most = 64 + 128 + 512 * size_of::<Counted>();
        assert!(
            pair.map.bytes() <= most,
            "batches of {size}: {} bytes",
            pair.map.bytes()
        );
        pair.empty_by_dropping();
    }
}

/// Begin a pass. It does not skip leaves with an entry that `keeps` them. Return how many pages it skips.
fn begin(
    pair: &mut Pair,
    number: u32,
    retry_steady: bool,
    unlisted: &Unlisted,
    keeps: impl Fn(&Counted) -> bool,
) -> usize {
    let pass = Pass {
        number,
        retry_steady,
        unlisted,
    };
    let mut skipped = 0;
    let mut from = Some(0);
    while let Some(addr) = from {
        from = match pair.map.next_skipped(addr, &pass, &mut skipped) {
            Ok((_, last)) => last.checked_add(1),
            Err(usize::MAX) => None,
            Err(next) => Some(next),
        };
    }
    // All but those are visited.
    for &leaf in pair.leaves.keys() {
        let leaf = pair.map.leaf_from(leaf * LEAF, number, GFP_NOWAIT);
        leaf.unwrap().decide_skips(|words| words.iter().any(&keeps));
    }
    skipped
}

/// Return the first leaves from `from` on that the current pass, with this number, skips.
fn skipped_from(pair: &mut Pair, from: usize, number: u32) -> Result<(usize, usize), usize> {
    let unlisted = Unlisted::new();
    let pass = Pass {
        number,
        retry_steady: false,
        unlisted: &unlisted,
    };
    let mut skipped = 0;
    let found = pair.map.next_skipped(from, &pass, &mut skipped);
    // All have begun it already.
    assert_eq!(skipped, 0);
    found
}

/// Return which of `passes` passes visit the only leaf. `deed` performs events in some of them.
fn looked_at(
    passes: usize,
    retry_steady: bool,
    mut deed: impl FnMut(usize, &mut Pair),
) -> Vec<usize> {
    let mut pair = Pair::with([LEAF, LEAF + 7 * PAGE_SIZE]);
    let mut looked = Vec::new();
    for pass in 0..passes {
        let number = pass as u32 + 1;
        let skipped = begin(&mut pair, number, retry_steady, &Unlisted::new(), |_| false);
        let found = skipped_from(&mut pair, 0, number);
        if skipped == 0 {
            assert_eq!(found, Err(usize::MAX));
            looked.push(pass);
        } else {
            assert_eq!((skipped, found), (2, Ok((LEAF, 2 * LEAF - 1))));
        }
        deed(pass, &mut pair);
    }
    pair.empty_by_dropping();
    looked
}

/// The longer nothing happens, the more rarely a leaf is visited: as in-tree KSM does with each page.
#[test]
fn old_leaves_are_skipped() {
    let old = [0, 1, 2, 3, 5, 8, 13, 22, 31, 40];
    assert_eq!(looked_at(41, false, |_, _| ()), old);
    // A retry alone does not make it young.
    assert_eq!(looked_at(41, true, |_, _| ()), old);
    // An event on a page does.
    let anew = [0, 1, 2, 3, 5, 8, 13, 16, 17, 18, 19, 21];
    let deeds: [fn(&mut Pair); 2] = [
        |pair| pair.map.note_change(LEAF + PAGE_SIZE),
        |pair| pair.map.note_change(2 * LEAF - PAGE_SIZE),
    ];
    for deed in deeds {
        let once = |pass, pair: &mut Pair| {
            if pass == 15 {
                deed(pair);
            }
        };
        assert_eq!(looked_at(22, false, once), anew);
    }
    // An event on another leaf's page does not.
    let other = |_, pair: &mut Pair| pair.map.note_change(0);
    assert_eq!(looked_at(41, false, other), old);
}

/// An event on one of its pages ends the skipping.
#[test]
fn what_happens_elsewhere_ends_skipping() {
    let looked = |deed: fn(&mut Pair)| {
        looked_at(17, false, |pass, pair| {
            if pass == 14 {
                deed(pair);
            }
        })
    };
    assert_eq!(looked(|_| ()), [0, 1, 2, 3, 5, 8, 13]);
    let anew = [0, 1, 2, 3, 5, 8, 13, 15, 16];
    assert_eq!(
        looked(|pair| assert!(pair.map.get_changed(LEAF).is_some())),
        anew
    );
    // Also an event on a page that is gone, if others are left.
    let mut pair = Pair::with([LEAF, LEAF + 7 * PAGE_SIZE]);
    let mut looked = Vec::new();
    for pass in 0..17 {
        let number = pass as u32 + 1;
        if begin(&mut pair, number, false, &Unlisted::new(), |_| false) == 0 {
            looked.push(pass);
        }
        if pass == 14 {
            pair.remove(LEAF);
        }
    }
    assert_eq!(looked, anew);
    pair.empty_by_dropping();
}

/// A leaf is visited in the pass after one in which pages of it were swapped out or migrating, and only once
/// if they are back.
#[test]
fn leaves_whose_pages_are_away_are_not_skipped() {
    let away_in = |passes: std::ops::Range<usize>| {
        looked_at(41, false, |pass, pair| {
            if passes.contains(&pass) {
                pair.map.note_away(LEAF + PAGE_SIZE);
                pair.map.note_away(0);
            }
        })
    };
    assert_eq!(away_in(0..41), (0..41).collect::<Vec<_>>());
    // The rest of its skips stays.
    let once = [0, 1, 2, 3, 5, 8, 13, 16, 23, 32];
    assert_eq!(away_in(15..16), once);
}

/// A leaf that may have unlisted merged pages is visited in the next pass, once.
#[test]
fn leaves_with_unlisted_pages_are_not_skipped() {
    let mut pair = Pair::with([3 * LEAF, 3 * LEAF + PAGE_SIZE, 9 * LEAF]);
    let mut unlisted = Unlisted::new();
    let mut looked = Vec::new();
    for pass in 0..24 {
        unlisted.begin_pass();
        begin(&mut pair, pass + 1, false, &unlisted, |_| false);
        if skipped_from(&mut pair, 0, pass + 1) != Ok((3 * LEAF, 4 * LEAF - 1)) {
            looked.push(pass);
        }
        if pass == 15 {
            unlisted.add(PageMap::<Counted>::number(3 * LEAF + 7 * PAGE_SIZE));
        }
    }
    assert_eq!(looked, [0, 1, 2, 3, 5, 8, 13, 16, 23]);
    pair.empty_by_dropping();
}

/// A leaf with a page that has to be visited is not skipped.
#[test]
fn some_leaves_are_not_skipped() {
    let mut pair = Pair::with([0, 5 * LEAF, 5 * LEAF + PAGE_SIZE, 9 * LEAF]);
    let kept = pair.model[&(5 * LEAF + PAGE_SIZE)];
    for pass in 1..41 {
        let keeps = |word: &Counted| word.id() == kept;
        begin(&mut pair, pass, false, &Unlisted::new(), keeps);
        let found = skipped_from(&mut pair, LEAF, pass);
        assert_ne!(found, Ok((5 * LEAF, 6 * LEAF - 1)));
    }
    pair.empty_by_dropping();
}

/// A retry that is due while a leaf is skipped stays due until the leaf is visited.
#[test]
fn news_waits_for_a_skipped_leaf() {
    let mut pair = Pair::with([LEAF]);
    let mut owed = Vec::new();
    for pass in 0..30 {
        // Once, in a pass that skips it.
        let skipped = begin(&mut pair, pass + 1, pass == 9, &Unlisted::new(), |_| false) != 0;
        let leaf = pair.map.leaf_from(LEAF, pass + 1, GFP_NOWAIT).unwrap();
        if leaf.missed_retry() && !skipped {
            owed.push(pass);
        }
    }
    assert_eq!(owed, [13]);
    pair.empty_by_dropping();
}

/// A page that is to be retried makes the next visit of its leaf, and of no other, retry, once. This neither
/// ends nor delays skipping, and works without it.
#[test]
fn a_page_to_be_tried_again_is_news_for_its_leaf() {
    let news_in = |skipping: bool, noted: usize| {
        let mut pair = Pair::with([LEAF, 2 * LEAF]);
        let mut seen = Vec::new();
        for pass in 0..30 {
            let number = pass as u32 + 1;
            if skipping {
                begin(&mut pair, number, false, &Unlisted::new(), |_| false);
            }
            let skipped = skipping && skipped_from(&mut pair, LEAF, number).is_ok();
            // A leaf is visited in two parts.
            for _ in 0..2 {
                let leaf = pair.map.leaf_from(LEAF, number, GFP_NOWAIT).unwrap();
                if leaf.missed_retry() && !skipped {
                    seen.push(pass);
                }
                if pass == noted && !skipped {
                    pair.map.note_retry(LEAF + PAGE_SIZE);
                }
            }
            let other = pair.map.leaf_from(2 * LEAF, number, GFP_NOWAIT).unwrap();
            assert!(!other.missed_retry());
        }
        pair.empty_by_dropping();
        seen
    };
    assert_eq!(news_in(false, 4), [5, 5]);
    assert_eq!(news_in(true, 1), [2, 2]);
    assert_eq!(news_in(true, 8), [13, 13]);
    // The visits are in passes 0, 1, 2, 3, 5, 8, 13, 22.
    assert_eq!(news_in(true, 13), [22, 22]);
}

/// A leaf whose huge pages were split is remembered for some minutes after its last page is gone.
#[test]
fn splits_outlive_the_pages() {
    let now = |second: u32| Moment {
        pass: second,
        second: second.into(),
    };
    for (noted, kept) in [(false, false), (true, true)] {
        let mut pair = Pair::with([LEAF, LEAF + PAGE_SIZE, 3 * LEAF]);
        if noted {
            pair.map.note_split(LEAF, now(1000));
        }
        pair.remove(LEAF);
        assert!(pair.map.remove(LEAF + PAGE_SIZE, 1000).is_some());
        assert!(!pair.map.has_leaf(LEAF));
        let mut found = 0;
        let mut look = |map: &mut PageMap<Counted>, second| {
            let next = map.retain_leaf(0, usize::MAX, Some(second), |_, _| {
                found += 1;
                true
            });
            next.map(|next| next / LEAF)
        };
        let first = if kept { 2 } else { 4 };
        assert_eq!(look(&mut pair.map, 1255), Some(first));
        // It does not have to wait if nothing is known of it.
        assert_eq!(pair.map.may_split(LEAF, now(1255)), !kept);
        assert_eq!(pair.map.keeps_whole(LEAF, 1255), kept);
        assert_eq!(look(&mut pair.map, 1256), Some(first));
        assert_eq!(look(&mut pair.map, 1256), Some(4));
        assert!(!pair.map.keeps_whole(LEAF, 1256));
        drop(pair.map);
        assert_eq!(live(), Live::default());
    }
}

/// When the pages come back, it starts like a new leaf in all other respects.
#[test]
fn pages_come_back_to_a_leaf_that_was_split() {
    let mut pair = Pair::with([LEAF]);
    let now = Moment { pass: 7, second: 7 };
    pair.map.note_split(LEAF, now);
    for second in 0..40 {
        assert!(pair.map.remove(LEAF, second).is_some());
        // This does not change when it lost its page.
        pair.map.note_change(LEAF);
        pair.map.note_retry(LEAF);
        pair.map.note_away(LEAF);
        pair.map.prune(LEAF, Some(second + 255));
        let pass = Pass {
            number: second + 1,
            retry_steady: true,
            unlisted: &Unlisted::new(),
        };
        let mut skipped = 0;
        let found = pair.map.next_skipped(0, &pass, &mut skipped);
        assert_eq!((found, skipped), (Err(usize::MAX), 0));
        let mut leaf = pair.map.leaf_from(LEAF, second + 1, GFP_NOWAIT).unwrap();
        assert!(matches!(leaf.seek(LEAF), Found::Nothing) && !leaf.missed_retry());
        let word = pair.ledger.make();
        assert!(leaf.insert(word, 1, GFP_NOWAIT).is_ok());
    }
    // The huge page was collapsed since.
    let later = Moment { pass: 9, second: 9 };
    assert!(!pair.map.may_split(LEAF, later));
    // Nothing is kept of an address space that is gone.
    while pair
        .map
        .retain_leaf(0, usize::MAX, None, |_, _| false)
        .is_some()
    {}
    assert!(pair.map.is_empty());
    assert_eq!(pair.map.bytes(), 0);
    drop(pair);
    assert_eq!(live(), Live::default());
}

/// Each leaf is refreshed in one of eight passes. Skipped passes in a row count as one, so for an old leaf it
/// is every fourth visit.
#[test]
fn leaves_take_turns_in_being_refreshed() {
    for nth in [1, 2, 8, 13] {
        for skipping in [false, true] {
            let mut pair = Pair::with([nth * LEAF]);
            let mut turns = Vec::new();
            for pass in 0..180 {
                let number = pass as u32 + 1;
                let skipped =
                    skipping && begin(&mut pair, number, false, &Unlisted::new(), |_| false) != 0;
                if !skipped {
                    let leaf = pair.map.leaf_from(nth * LEAF, number, GFP_NOWAIT).unwrap();
                    if leaf.is_refreshing() {
                        turns.push(pass);
                    }
                }
            }
            let apart: Vec<_> = turns.windows(2).map(|pair| pair[1] - pair[0]).collect();
            match skipping {
                false => {
                    assert!(turns[0] < 8, "{turns:?}");
                    assert!(apart.iter().all(|&apart| apart == 8), "{turns:?}");
                }
                true => {
                    assert!(turns[0] <= 36, "{turns:?}");
                    assert!(apart.iter().all(|&apart| (8..=36).contains(&apart)));
                    assert_eq!(apart.last(), Some(&36), "{turns:?}");
                }
            }
            pair.empty_by_dropping();
        }
    }
}

/// Each pass reads the entries of a leaf once to decide whether to skip it, in however many steps it visits
/// the pages.
#[test]
fn skips_are_decided_once_a_pass() {
    let mut pair = full(1);
    for number in 1..8 {
        begin(&mut pair, number, false, &Unlisted::new(), |_| true);
        let asked = [0, 1, 100, 511].map(|page| {
            let mut asked = 0;
            let leaf = pair.map.leaf_from(page * PAGE_SIZE, number, GFP_NOWAIT);
            // They keep it from being skipped.
            leaf.unwrap().decide_skips(|words| {
                asked += words.len();
                true
            });
            asked
        });
        let first = if number > 3 { 512 } else { 0 };
        assert_eq!(asked, [first, 0, 0, 0], "pass {number}");
    }
    pair.empty_by_dropping();
}

/// The search for a skipped leaf continues where it stopped.
#[test]
fn search_for_skipped_leaves_is_bounded() {
    let mut pair = Pair::with((0..300).map(|nth| 2 * nth * LEAF));
    for pass in 1..6 {
        begin(&mut pair, pass, false, &Unlisted::new(), |_| false);
    }
    let first = skipped_from(&mut pair, 1, 5);
    assert_eq!(first, Ok((0, LEAF - 1)));
    let second = skipped_from(&mut pair, LEAF, 5);
    assert_eq!(second, Ok((2 * LEAF, 3 * LEAF - 1)));
    begin(&mut pair, 6, false, &Unlisted::new(), |_| false);
    let mut from = 0;
    let mut steps = 0;
    while let Err(next) = skipped_from(&mut pair, from, 6) {
        assert!(next > from);
        steps += 1;
        if next == usize::MAX {
            break;
        }
        from = next;
    }
    assert!((3..10).contains(&steps), "{steps}");
    pair.empty_by_dropping();
}

/// The search through pages that are not skipped goes no further than the next step may.
#[test]
fn search_for_skipped_leaves_ends_with_the_step() {
    let mut pair = full(8);
    begin(&mut pair, 1, false, &Unlisted::new(), |_| false);
    assert_eq!(skipped_from(&mut pair, 0, 1), Err(2 * LEAF));
    assert_eq!(skipped_from(&mut pair, 3 * LEAF + 1, 1), Err(5 * LEAF));
    assert_eq!(skipped_from(&mut pair, 7 * LEAF, 1), Err(usize::MAX));
    pair.empty_by_dropping();
}

/// Neighbouring leaves are skipped together, but no more than a step may visit.
#[test]
fn neighbours_are_skipped_together() {
    const COUNT: usize = 100;
    let mut pair = Pair::with((0..COUNT).map(|nth| nth * LEAF));
    let kept = pair.model[&(80 * LEAF)];
    for pass in 1..6 {
        let keeps = |word: &Counted| word.id() == kept;
        begin(&mut pair, pass, false, &Unlisted::new(), keeps);
    }
    let mut ends = Vec::new();
    let mut from = 0;
    while let Ok((first, last)) = skipped_from(&mut pair, from, 5) {
        ends.push((first / LEAF, last / LEAF));
        assert!(first % LEAF == 0 && last % LEAF == LEAF - 1);
        from = last + 1;
    }
    assert_eq!(ends, [(0, 63), (64, 79), (81, COUNT - 1)]);
    let last = skipped_from(&mut pair, 99 * LEAF, 5);
    assert_eq!(last, Ok((99 * LEAF, 100 * LEAF - 1)));
    pair.empty_by_dropping();
}

/// A walk can keep some of the entries that it passes and remove others.
#[test]
fn passed_and_kept() {
    let mut map = PageMap::new();
    for page in [1usize, 3, 4, 200] {
        let mut leaf = map.leaf_from(page * PAGE_SIZE, 0, GFP_NOWAIT).unwrap();
        assert!(matches!(leaf.seek(page * PAGE_SIZE), Found::Nothing));
        assert!(leaf.insert(page, 1, GFP_NOWAIT).is_ok());
    }
    let mut leaf = map.leaf_from(0, 0, GFP_NOWAIT).unwrap();
    let mut passed = Vec::new();
    loop {
        match leaf.seek(201 * PAGE_SIZE) {
            Found::Passed(addr, word) => {
                assert_eq!(addr, *word * PAGE_SIZE);
                let keep = *word % 2 == 0;
                passed.push(*word);
                if keep {
                    leaf.keep_passed();
                } else {
                    leaf.remove_passed();
                }
            }
            found => {
                assert!(matches!(found, Found::Nothing));
                break;
            }
        }
    }
    assert!(leaf.insert(201, 1, GFP_NOWAIT).is_ok());
    assert_eq!(passed, [1, 3, 4, 200]);
    let mut left = Vec::new();
    let mut budget = 9;
    map.for_each_from(0, &mut budget, |word| left.push(*word));
    assert_eq!(left, [4, 200, 201]);
    assert_eq!(map.get_mut(200 * PAGE_SIZE), Some(&mut 200));
}
