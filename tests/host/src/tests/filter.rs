// SPDX-License-Identifier: GPL-2.0

//! Tests of `ksm/filter.rs`, compared with plain counts.

use crate::{hash::Sample, ksm::filter::Filter};
use kernel::{
    error::code::ENOMEM,
    testing::{failing, live, watch, Events, Live, Plan, Random},
};
use proptest::prelude::*;
use std::collections::{HashMap, HashSet};

/// The capacity of the smallest filter in pages, and its number of cache lines.
const SMALLEST: usize = 2048;
const SMALLEST_BLOCKS: usize = 64;

fn sample(raw: u64) -> Sample {
    Sample::from_raw(raw as u32)
}

fn filter(pages: usize) -> Filter {
    Filter::for_pages(pages, usize::MAX).unwrap()
}

/// Return `count` samples, all different.
fn distinct(random: &mut Random, count: usize) -> Vec<Sample> {
    let mut seen = HashSet::new();
    std::iter::repeat_with(|| random.draw() as u32)
        .filter(|raw| seen.insert(*raw))
        .map(Sample::from_raw)
        .take(count)
        .collect()
}

fn add_all(filter: &mut Filter, samples: &[Sample]) {
    for one in samples {
        filter.add(*one);
    }
}

/// Return the share of the `samples`, all different and each counted once, that the filter reports as having
/// an equal.
fn mistaken(filter: &Filter, samples: &[Sample]) -> f64 {
    let wrong = samples.iter().filter(|one| filter.has_two(**one)).count();
    wrong as f64 / samples.len() as f64
}

/// The filter, and the number of pages with each sample.
struct Pair {
    filter: Filter,
    counts: HashMap<u32, usize>,
}

impl Pair {
    fn new(pages: usize) -> Self {
        Self {
            filter: filter(pages),
            counts: HashMap::new(),
        }
    }

    fn count(&self, one: Sample) -> usize {
        self.counts.get(&one.get()).copied().unwrap_or(0)
    }

    fn add(&mut self, one: Sample) {
        let two = self.filter.add(one);
        assert_eq!(two, self.filter.has_two(one));
        let count = self.counts.entry(one.get()).or_default();
        *count += 1;
        assert!(two || *count < 2, "{one:?}");
    }

    /// Only added samples are removed.
    fn remove(&mut self, one: Sample) {
        match self.counts.get_mut(&one.get()) {
            Some(count) if *count > 0 => {
                *count -= 1;
                self.filter.remove(one);
            }
            _ => {}
        }
    }

    /// Check that the filter misses no pair.
    fn check(&self) {
        for (raw, count) in &self.counts {
            if *count >= 2 {
                assert!(self.filter.has_two(Sample::from_raw(*raw)), "{raw:#x}");
            }
        }
    }

    /// Check that the filter is exactly what its present content alone would give.
    fn check_exact(&self, others: &[Sample]) {
        let mut fresh = filter(self.filter.capacity());
        for (raw, count) in &self.counts {
            for _ in 0..*count {
                fresh.add(Sample::from_raw(*raw));
            }
        }
        let known = self.counts.keys().map(|raw| Sample::from_raw(*raw));
        for one in known.chain(others.iter().copied()) {
            assert_eq!(self.filter.has_two(one), fresh.has_two(one), "{one:?}");
        }
    }
}

/// Samples of a small pool come often, and often share their counters with others.
fn pool() -> impl Strategy<Value = Vec<u32>> {
    let close = (any::<u32>(), 1..200u32)
        .prop_map(|(from, count)| (0..count).map(|nth| from.wrapping_add(nth)).collect());
    let ends = Just(vec![0, 1, u32::MAX - 1, u32::MAX, 1 << 31, (1 << 31) - 1]);
    let anywhere = prop::collection::vec(any::<u32>(), 1..200);
    prop_oneof![close, ends, anywhere]
}

proptest! {
    #![proptest_config(super::cases(128))]

    /// In any sequence, however full the counters are, the filter sees two of a kind.
    #[test]
    fn never_misses_two(
        pool in pool(),
        pages in 0..3 * SMALLEST,
        ops in prop::collection::vec((any::<prop::sample::Index>(), 0..5u8), 1..2000),
    ) {
        let mut pair = Pair::new(pages);
        for (at, op) in ops {
            let one = Sample::from_raw(*at.get(&pool));
            if op < 3 {
                pair.add(one);
            } else {
                pair.remove(one);
            }
            if pair.count(one) >= 2 {
                prop_assert!(pair.filter.has_two(one));
            }
        }
        pair.check();
    }

    /// As long as no counter is full, removing undoes adding, to the last bit. No counter can be full with
    /// two samples at a time in each cache line.
    #[test]
    fn removing_undoes_adding(
        ops in prop::collection::vec((any::<u32>(), 0..6usize, any::<bool>()), 1..600),
    ) {
        let mut pair = Pair::new(SMALLEST);
        let mut others = Vec::new();
        let mut there: HashMap<usize, Vec<Sample>> = HashMap::new();
        for (raw, again, add) in ops {
            let block = raw as usize / (1 << 26);
            let here = there.entry(block % SMALLEST_BLOCKS).or_default();
            // Often the same one twice.
            let one = match here.first() {
                Some(first) if again == 0 => *first,
                _ => Sample::from_raw(raw),
            };
            others.push(one);
            if add && here.len() < 2 {
                here.push(one);
                pair.add(one);
            } else if let Some(one) = here.pop() {
                pair.remove(one);
            }
        }
        pair.check();
        pair.check_exact(&others);
        for one in there.into_values().flatten() {
            pair.remove(one);
        }
        for one in others {
            prop_assert!(!pair.filter.has_two(one));
            // Nothing is left of any sample: a new one is the first.
            prop_assert!(!pair.filter.add(one));
            prop_assert!(!pair.filter.has_two(one));
            prop_assert!(pair.filter.add(one));
            prop_assert!(pair.filter.has_two(one));
            pair.filter.remove(one);
            pair.filter.remove(one);
        }
    }

    #[test]
    fn has_room_for_what_was_asked(pages in 0..1usize << 20) {
        let filter = filter(pages);
        prop_assert!(filter.capacity() >= pages);
        prop_assert!(filter.capacity() >= SMALLEST);
        prop_assert!(filter.capacity() == SMALLEST || filter.capacity() < 2 * pages);
        // Two bytes for each page.
        prop_assert_eq!(live().bytes, 2 * filter.capacity());
    }
}

/// A sample of one page has no equal; those of two and of three have.
#[test]
fn counts_to_two() {
    let mut filter = filter(1);
    for raw in [0, 1, 0x1234_5678, u32::MAX] {
        let one = Sample::from_raw(raw);
        assert!(!filter.has_two(one));
        assert!(!filter.add(one));
        assert!(!filter.has_two(one));
        assert!(filter.add(one));
        assert!(filter.has_two(one));
        filter.remove(one);
        assert!(!filter.has_two(one));
        filter.remove(one);
        // Samples that are not there cannot be removed.
        filter.remove(one);
        assert!(!filter.has_two(one));
        filter.add(one);
        assert!(!filter.has_two(one));
        filter.remove(one);
    }
    assert!(!filter.is_saturated());
}

/// At capacity, with pages that are all different, fewer than 8 in 100 are reported as having an equal; at
/// half of it, fewer than 3.
#[test]
fn seldom_wrong() {
    let sizes = [(1, SMALLEST), (2, 16 * SMALLEST), (3, 128 * SMALLEST)];
    // Miri is a thousand times slower.
    for (seed, pages) in sizes.into_iter().take(if cfg!(miri) { 1 } else { 3 }) {
        let mut random = Random::new(seed);
        let mut filter = filter(pages);
        assert_eq!(filter.capacity(), pages);
        let samples = distinct(&mut random, pages);
        let (half, rest) = samples.split_at(pages / 2);
        add_all(&mut filter, half);
        let wrong = mistaken(&filter, half);
        assert!(wrong < 0.03, "{pages} pages, half full: {wrong}");
        add_all(&mut filter, rest);
        let wrong = mistaken(&filter, &samples);
        assert!(wrong < 0.08, "{pages} pages, full: {wrong}");
        // But the filter does not refuse all.
        add_all(&mut filter, &samples);
        assert_eq!(mistaken(&filter, &samples), 1.0);
    }
}

/// Pages come and go, all of them different. Until the filter reports that it is saturated, most of its
/// answers are right, and that takes long.
#[test]
fn worn_before_it_is_useless() {
    let pages = SMALLEST * if cfg!(miri) { 1 } else { 16 };
    let mut random = Random::new(7);
    let mut filter = filter(pages);
    let mut samples = distinct(&mut random, pages);
    add_all(&mut filter, &samples);
    let mut replaced = 0;
    let mut seen: HashSet<u32> = samples.iter().map(|one| one.get()).collect();
    while !filter.is_saturated() {
        let wrong_soon = replaced % pages == 0 && mistaken(&filter, &samples) > 0.12;
        assert!(!wrong_soon, "after {replaced} of {pages} were replaced");
        let at = random.below(pages as u64) as usize;
        let new = random.draw() as u32;
        if !seen.insert(new) {
            continue;
        }
        seen.remove(&samples[at].get());
        filter.remove(samples[at]);
        samples[at] = Sample::from_raw(new);
        filter.add(samples[at]);
        replaced += 1;
        assert!(replaced < 100 * pages, "never worn");
    }
    assert!(replaced > pages / 2, "worn after {replaced} of {pages}");
    let wrong = mistaken(&filter, &samples);
    assert!(wrong < 0.12, "{wrong}");
    // Rebuilt, the filter works well again.
    let mut filter = self::filter(pages);
    add_all(&mut filter, &samples);
    assert!(!filter.is_saturated());
    assert!(mistaken(&filter, &samples) < 0.08);
}

/// Full counters stay full. The filter reports when too many of them are left over.
#[test]
fn worn_by_many_equal_pages() {
    let mut filter = filter(SMALLEST);
    let one = sample(0xabcd_ef01);
    add_all(&mut filter, &[one; SMALLEST]);
    assert!(!filter.is_saturated(), "worn by what is there");
    for _ in 0..SMALLEST / 32 {
        filter.remove(one);
    }
    assert!(!filter.is_saturated());
    for _ in SMALLEST / 32..SMALLEST {
        filter.remove(one);
    }
    assert!(filter.is_saturated());
    // An error on the safe side.
    assert!(filter.has_two(one));
    assert!(!self::filter(SMALLEST).is_saturated());
}

/// Without memory, the filter reports an equal for every page, and counts nothing.
#[test]
fn without_memory() {
    let mut filter = Filter::new();
    let mut random = Random::new(9);
    let ((), events) = watch(|| {
        for _ in 0..1000 {
            let one = sample(random.draw());
            assert!(filter.has_two(one));
            assert!(filter.add(one));
            filter.remove(one);
            filter.remove(one);
            assert!(filter.has_two(one));
        }
    });
    assert_eq!(events, Events::default());
    assert_eq!(filter.capacity(), 0);
    assert!(!filter.is_saturated());
}

#[test]
fn no_memory() {
    for pages in [0, 1, SMALLEST, 1 << 20] {
        let result = failing(Plan::Always, || Filter::for_pages(pages, usize::MAX).err());
        assert_eq!(result, Some(ENOMEM));
        assert_eq!(live(), Live::default());
    }
    // Only creation allocates.
    let mut filter = filter(1);
    let ((), events) = watch(|| {
        filter.add(sample(1));
        filter.has_two(sample(1));
        filter.remove(sample(1));
    });
    assert_eq!(events, Events::default());
    drop(filter);
    assert_eq!(live(), Live::default());
}

/// A filter that would take more than half of the free memory is not even allocated, nor is one above a GiB,
/// as the kernel warns about allocations of two.
#[test]
fn modest() {
    for (pages, bytes) in [
        (0, 2 * SMALLEST),
        (SMALLEST + 1, 4 * SMALLEST),
        (1 << 20, 2 << 20),
        (1 << 29, 1 << 30),
        ((1 << 29) + 1, 1 << 30),
        (1 << 50, 1 << 30),
        (usize::MAX, 1 << 30),
    ] {
        let asked = |available| {
            let make = || failing(Plan::Always, || Filter::for_pages(pages, available).err());
            let (result, events) = watch(make);
            assert_eq!(result, Some(ENOMEM));
            events.failed != 0
        };
        assert!(asked(2 * bytes), "{pages} pages");
        assert!(!asked(2 * bytes - 1), "{pages} pages");
        assert!(!asked(0));
    }
}

/// When to use a larger filter and when a smaller one: never both in turn.
#[test]
fn sizes() {
    assert!(!Filter::new().has_room_for(1));
    assert!(!Filter::new().is_much_too_large_for(0));
    let smallest = filter(0);
    assert!(smallest.has_room_for(SMALLEST) && !smallest.has_room_for(SMALLEST + 1));
    assert!(!smallest.is_much_too_large_for(0));
    let large = filter(64 * SMALLEST);
    assert!(large.has_room_for(64 * SMALLEST) && !large.has_room_for(64 * SMALLEST + 1));
    assert!(large.is_much_too_large_for(8 * SMALLEST));
    assert!(!large.is_much_too_large_for(8 * SMALLEST + 1));
    for pages in [1, SMALLEST / 2, SMALLEST, 3 * SMALLEST, 5 * SMALLEST + 1] {
        let fitting = filter(2 * pages);
        assert!(fitting.has_room_for(pages + pages / 2));
        assert!(!fitting.is_much_too_large_for(pages), "{pages} pages");
    }
}
