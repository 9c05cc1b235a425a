// SPDX-License-Identifier: GPL-2.0

//! Tests of `hash.rs`.

use crate::hash::{
    Checksum, Hasher, Sample, FULL_BITS, LINES, LINE_WORDS, PAGE_WORDS, SEED_WORDS, SUM_BITS,
};
use kernel::testing::Random;
use proptest::prelude::*;
use std::{
    cell::RefCell,
    collections::{BTreeSet, HashSet},
};

type Page = [u64; PAGE_WORDS];

const LAST: usize = PAGE_WORDS - 1;

fn hasher(seed: u64) -> Hasher {
    let mut random = Random::new(seed);
    Hasher::new(std::array::from_fn::<_, SEED_WORDS, _>(|_| random.draw()))
}

fn sample(hasher: &Hasher, page: &Page) -> Sample {
    hasher.sample(|nth| page[nth])
}

fn checksum(hasher: &Hasher, page: &Page) -> Checksum {
    checksum_of(hasher, |nth| page[nth])
}

fn checksum_of(hasher: &Hasher, word: impl Fn(usize) -> u64) -> Checksum {
    let line = |nth| std::array::from_fn(|at| word(nth * LINE_WORDS + at));
    hasher.checksum(&word, line)
}

fn random_page(random: &mut Random) -> Page {
    std::array::from_fn(|_| random.draw())
}

/// Pages of different kinds: noise, zeros, ones, text, small numbers, addresses.
fn pages(random: &mut Random) -> Vec<Page> {
    let text = b"In the beginning there was one page, and it was equal to itself. ";
    let letters = |at: usize| u64::from(text[at % text.len()]);
    let of_text = |nth: usize| (0..8).fold(0, |word, at| (word << 8) | letters(8 * nth + at));
    vec![
        random_page(random),
        [0; PAGE_WORDS],
        [u64::MAX; PAGE_WORDS],
        std::array::from_fn(of_text),
        std::array::from_fn(|nth| nth as u64),
        std::array::from_fn(|nth| 0x7f3a_1200_0000 + 64 * nth as u64),
    ]
}

/// Return which words `f` reads.
fn words_read<R>(f: impl FnOnce(&dyn Fn(usize) -> u64) -> R) -> Vec<usize> {
    let read = RefCell::new(Vec::new());
    f(&|nth| {
        read.borrow_mut().push(nth);
        nth as u64
    });
    read.into_inner()
}

fn words_of_sample(hasher: &Hasher) -> BTreeSet<usize> {
    words_read(|word| hasher.sample(word)).into_iter().collect()
}

/// Raw bits, including neighbours and extremes.
fn bits() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        0..64u64,
        (u64::MAX - 64)..=u64::MAX,
        (0..64u32).prop_map(|bit| 1 << bit),
    ]
}

fn raw_sample() -> impl Strategy<Value = u32> {
    bits().prop_map(|bits| (bits ^ (bits >> 32)) as u32)
}

proptest! {
    #[test]
    fn leaves_seven_bits(raw in raw_sample(), hash in bits()) {
        let sum = Checksum::new(Sample::from_raw(raw), hash);
        prop_assert_eq!(sum.get() >> SUM_BITS, 0);
        // Only the low bits of the hash are lost.
        prop_assert_eq!(sum.sample().get(), raw);
        prop_assert_eq!(sum.get() >> FULL_BITS, u64::from(raw));
        prop_assert_eq!(sum.get() & ((1 << FULL_BITS) - 1), (hash >> (64 - FULL_BITS)).max(1));
    }

    /// The unknown checksum is below all others, and equal to none of them.
    #[test]
    fn unknown_comes_first(raw in raw_sample(), hash in bits()) {
        let sample = Sample::from_raw(raw);
        let (known, unknown) = (Checksum::new(sample, hash), Checksum::unknown(sample));
        prop_assert!(unknown < known);
        prop_assert!(unknown.is_unknown() && !known.is_unknown());
        prop_assert_eq!(unknown.sample(), sample);
        prop_assert_eq!(Checksum::from_raw(unknown.get()), unknown);
        let below = unknown.get().checked_sub(1).map(Checksum::from_raw);
        prop_assert!(below.is_none_or(|below| below.sample() < sample));
    }

    /// The sample differs on each memory node; the rest of a checksum does not.
    #[test]
    fn nodes_differ(seed in any::<u64>(), raw in raw_sample(), hash in bits(), nodes in 2..9u32) {
        let all = hasher(seed);
        let per_nid = all.per_nid(nodes);
        let sum = Checksum::new(Sample::from_raw(raw), hash);
        let on = |node| sum.with_sample(per_nid.on_node(sum.sample(), || node));
        prop_assert_eq!(on(0), sum);
        let sums: HashSet<_> = (0..nodes).map(|node| on(node).sample().get()).collect();
        prop_assert_eq!(sums.len(), nodes as usize);
        for node in 0..nodes {
            prop_assert_eq!(on(node).with_sample(sum.sample()), sum);
            // With the nodes together, the sample does not change, and the page's node is not even
            // determined.
            prop_assert_eq!(all.on_node(sum.sample(), || unreachable!()), sum.sample());
        }
    }

    /// The samples of zero pages, on each node.
    #[test]
    fn zeroes(seed in any::<u64>(), nodes in 1..9u32, raw in raw_sample()) {
        let all = hasher(seed);
        let zero = sample(&all, &[0; PAGE_WORDS]);
        prop_assert_eq!(all.zeroes().iter().collect::<Vec<_>>(), vec![zero]);
        let per_nid = all.per_nid(nodes);
        let zeroes: Vec<_> = (0..nodes).map(|node| per_nid.on_node(zero, || node)).collect();
        prop_assert_eq!(per_nid.zeroes().iter().collect::<Vec<_>>(), zeroes.clone());
        for sample in zeroes.iter().copied().chain([Sample::from_raw(raw)]) {
            prop_assert_eq!(per_nid.zeroes().contains(sample), zeroes.contains(&sample));
        }
    }

    #[test]
    fn comes_back(raw in raw_sample(), hash in bits()) {
        let sum = Checksum::new(Sample::from_raw(raw), hash);
        prop_assert_eq!(Checksum::from_raw(sum.get()), sum);
        prop_assert_eq!(Sample::from_raw(sum.sample().get()), sum.sample());
    }

    /// As an entry packs it: with a tag and strikes in the seven bits.
    #[test]
    fn comes_back_out_of_a_word(raw in raw_sample(), hash in bits(), tag in 0..128u64) {
        let sum = Checksum::new(Sample::from_raw(raw), hash);
        let word = (sum.get() << 7) | tag;
        prop_assert_eq!(word & 127, tag);
        prop_assert_eq!(Checksum::from_raw(word >> 7), sum);
        prop_assert_eq!((word >> 32) as u32, raw);
    }

    /// Seven bits stay free, whatever is unpacked.
    #[test]
    fn takes_back_no_more_than_57_bits(raw in bits()) {
        let sum = Checksum::from_raw(raw);
        prop_assert_eq!(sum.get(), raw & (u64::MAX >> 7));
    }

    #[test]
    fn keeps_the_order(a in bits(), b in bits()) {
        let (sum_a, sum_b) = (Checksum::from_raw(a), Checksum::from_raw(b));
        prop_assert_eq!(sum_a.cmp(&sum_b), sum_a.get().cmp(&sum_b.get()));
        prop_assert_eq!(sum_a == sum_b, sum_a.get() == sum_b.get());
    }

    /// Nothing lies between a checksum and its successor, and the last one has no successor.
    #[test]
    fn successor_is_next(raw in bits()) {
        let sum = Checksum::from_raw(raw);
        match sum.successor() {
            Some(next) => {
                prop_assert!(sum < next);
                prop_assert_eq!(next.get(), sum.get() + 1);
                prop_assert_eq!(next.get() >> SUM_BITS, 0);
            }
            None => prop_assert_eq!(sum.get(), u64::MAX >> 7),
        }
    }

    /// Equal content gives equal results, at any address. A sample is a part of its checksum.
    #[test]
    fn equal_for_equal_content(seed in any::<u64>(), content in any::<u64>()) {
        let hasher = hasher(seed);
        for page in pages(&mut Random::new(content)) {
            let copy = Box::new(page);
            let sum = checksum(&hasher, &page);
            prop_assert_eq!(sum, checksum(&hasher, &copy));
            prop_assert_eq!(sample(&hasher, &page), sample(&hasher, &copy));
            prop_assert_eq!(sum.sample(), sample(&hasher, &page));
            prop_assert_eq!(sum.get() >> SUM_BITS, 0);
            // Made in the same way again.
            let again = self::hasher(seed);
            prop_assert_eq!(sum, checksum(&again, &page));
        }
    }

    /// The sample is eight words in four cache lines, one line in each quarter, with the page's last word.
    #[test]
    fn where_the_sample_is_taken(seed in prop::array::uniform9(bits())) {
        let read = words_read(|word| Hasher::new(seed).sample(word));
        prop_assert_eq!(read.len(), 8);
        let places: BTreeSet<usize> = read.into_iter().collect();
        prop_assert_eq!(places.len(), 8);
        prop_assert_eq!(places.last(), Some(&LAST));
        let lines: BTreeSet<usize> = places.iter().map(|nth| nth / 8).collect();
        let quarters: Vec<usize> = lines.iter().map(|line| line / 16).collect();
        prop_assert_eq!(quarters, [0, 1, 2, 3]);
    }

    /// Only these words affect the sample.
    #[test]
    fn other_words_do_not_matter(seed in any::<u64>(), content in any::<u64>()) {
        let hasher = hasher(seed);
        let places = words_of_sample(&hasher);
        let mut random = Random::new(content);
        for page in pages(&mut random) {
            let before = sample(&hasher, &page);
            let mut other = random_page(&mut random);
            places.iter().for_each(|&nth| other[nth] = page[nth]);
            prop_assert_eq!(sample(&hasher, &other), before);
        }
    }
}

/// Each load gets other places, in all of the page, and other results.
#[test]
fn seeds_differ() {
    let mut places = HashSet::new();
    let mut words = BTreeSet::new();
    let mut samples = HashSet::new();
    let mut sums = HashSet::new();
    let page = pages(&mut Random::new(1))[3];
    for seed in 0..2000 {
        let hasher = hasher(seed);
        let of_sample = words_of_sample(&hasher);
        words.extend(of_sample.iter().copied());
        places.insert(of_sample);
        samples.insert(sample(&hasher, &page).get());
        sums.insert(checksum(&hasher, &page).get());
    }
    // 2000 are drawn of 2^18 sets of places: about 8 appear twice.
    assert!(places.len() > 1970, "{}", places.len());
    // Any word of the first three quarters, and two of the last one.
    let expected = (0..PAGE_WORDS * 3 / 4).chain([LAST - 4, LAST]);
    assert!(words.into_iter().eq(expected));
    assert!(samples.len() >= 1999, "{}", samples.len());
    assert_eq!(sums.len(), 2000);
}

/// Another key with the same places changes the results, too.
#[test]
fn keys_matter() {
    let page = pages(&mut Random::new(1))[3];
    let seed: [u64; SEED_WORDS] = std::array::from_fn(|nth| 0x1234_5678_9abc_def1 + nth as u64);
    let before = checksum(&Hasher::new(seed), &page);
    for key in 1..SEED_WORDS {
        for bit in 0..64 {
            let mut other = seed;
            other[key] ^= 1 << bit;
            let sum = checksum(&Hasher::new(other), &page);
            assert_ne!(sum, before, "key {key}, bit {bit}");
        }
    }
}

/// A checksum reads every cache line once, in order, and also the words of the sample.
#[test]
fn reads_all_words() {
    for seed in 0..20 {
        let hasher = hasher(seed);
        let lines = RefCell::new(Vec::new());
        let line = |nth| {
            lines.borrow_mut().push(nth);
            [nth as u64; LINE_WORDS]
        };
        let words = words_read(|word| hasher.checksum(word, line));
        assert!(lines.into_inner().into_iter().eq(0..LINES));
        let words: BTreeSet<usize> = words.into_iter().collect();
        assert_eq!(words, words_of_sample(&hasher));
    }
}

/// Return a word to replace `old`: one bit, all bits, a little more, nothing, anything.
fn another(random: &mut Random, old: u64) -> u64 {
    loop {
        let new = match random.below(6) {
            0 => old ^ (1 << random.below(64)),
            1 => !old,
            2 => old.wrapping_add(1 + random.below(16)),
            3 => 0,
            4 => old.swap_bytes(),
            _ => random.draw(),
        };
        if new != old {
            return new;
        }
    }
}

/// A change of any one word shows in the bits that are not the sample, and for a sampled word in the sample,
/// too. Chance would miss one in 2^25; this tries 250,000.
#[test]
fn any_changed_word_is_seen() {
    let full = |sum: Checksum| sum.get() & ((1 << FULL_BITS) - 1);
    let mut random = Random::new(3);
    for seed in 0..8 {
        let hasher = hasher(seed);
        let places = words_of_sample(&hasher);
        for mut page in pages(&mut random) {
            let before = checksum(&hasher, &page);
            for nth in (0..PAGE_WORDS).cycle().take(10 * PAGE_WORDS) {
                let old = page[nth];
                page[nth] = another(&mut random, old);
                let after = checksum(&hasher, &page);
                assert_ne!(
                    full(after),
                    full(before),
                    "{nth}: {old:#x} {:#x}",
                    page[nth]
                );
                let sampled = places.contains(&nth);
                assert_eq!(after.sample() != before.sample(), sampled, "{nth}");
                page[nth] = old;
            }
        }
    }
}

/// Changes of two words do not cancel out: exchanged, or both changed by the same bits or by the same
/// difference.
#[test]
fn two_changed_words_are_seen() {
    let mut random = Random::new(4);
    for seed in 0..4 {
        let hasher = hasher(seed);
        for mut page in pages(&mut random) {
            let before = checksum(&hasher, &page);
            for _ in 0..2500 {
                let one = random.below(512) as usize;
                // Often a neighbour, of this lane or of the other.
                let distance = [1, 2, 3, 4, 8, 1 + random.below(511)][random.below(6) as usize];
                let two = (one + distance as usize) % PAGE_WORDS;
                let was = (page[one], page[two]);
                let bits = 1 << random.below(64);
                (page[one], page[two]) = match random.below(4) {
                    0 => (was.1, was.0),
                    1 => (was.0 ^ bits, was.1 ^ bits),
                    2 => (was.0.wrapping_add(bits), was.1.wrapping_sub(bits)),
                    _ => (!was.0, !was.1),
                };
                if (page[one], page[two]) != was {
                    assert_ne!(checksum(&hasher, &page), before, "{one} {two}");
                }
                (page[one], page[two]) = was;
            }
        }
    }
}

/// Return the number of equal pairs among the values.
fn equal_pairs<T: Ord>(mut values: Vec<T>) -> usize {
    values.sort_unstable();
    values
        .chunk_by(|a, b| a == b)
        .map(|equal| equal.len() * (equal.len() - 1) / 2)
        .sum()
}

/// A bound that chance exceeds once in millions of times: the mean plus six deviations.
fn bound(count: usize, bits: u32) -> usize {
    let pairs = count as f64 * (count as f64 - 1.0) / 2.0;
    let mean = pairs / 2f64.powi(bits as i32);
    (mean + 6.0 * mean.sqrt() + 6.0) as usize
}

const MANY: usize = 100_000;

/// Families of many pages, all different, that random numbers would not produce. Page `i` of a family has the
/// word `word(i, at)`.
type Family = (&'static str, fn(usize, usize) -> u64);

/// Families whose pages all differ in every word.
const EVERYWHERE: [Family; 5] = [
    ("counters", |nth, _| nth as u64),
    ("counters in the high half", |nth, _| (nth as u64) << 32),
    ("counting words", |nth, at| (nth * PAGE_WORDS + at) as u64),
    ("addresses", |nth, at| {
        0x7f00_0000_0000 + (nth * 4096 + at * 8) as u64
    }),
    ("floats", |nth, at| {
        (nth as f64 + at as f64 / 512.0).to_bits()
    }),
];

/// Families whose pages differ from each other, or from one page, in one word only.
const IN_ONE_WORD: [Family; 5] = [
    ("zeros with a counter at the start", |nth, at| {
        if at == 0 {
            nth as u64
        } else {
            0
        }
    }),
    ("zeros with one word, anywhere", |nth, at| {
        if at == nth % PAGE_WORDS {
            1 + (nth / PAGE_WORDS) as u64
        } else {
            0
        }
    }),
    ("zeros with one or two bits", |nth, at| {
        let bit = |nth: usize| u64::from(nth / 64 % PAGE_WORDS == at) << (nth % 64);
        bit(nth)
            | if nth < 32768 {
                0
            } else {
                bit(nth + nth / 32768)
            }
    }),
    ("noise with one bit changed, or two", |nth, at| {
        let noise = Random::new(at as u64).draw();
        let bit = |nth: usize| u64::from(nth / 64 % PAGE_WORDS == at) << (nth % 64);
        noise
            ^ bit(nth)
            ^ if nth < 32768 {
                0
            } else {
                bit(nth + nth / 32768)
            }
    }),
    ("the same words, one exchanged with the last", |nth, at| {
        let (one, add) = (nth % LAST, nth / LAST);
        let from = if at == one {
            LAST
        } else if at == LAST {
            one
        } else {
            at
        };
        (from + add * 1000) as u64
    }),
];

/// Random numbers would have 1.2 equal pairs among the samples of 100,000 pages.
#[test]
fn samples_are_spread() {
    for seed in 0..4 {
        let hasher = hasher(seed);
        for (name, word) in EVERYWHERE {
            let samples: Vec<Sample> = (0..MANY)
                .map(|nth| hasher.sample(|at| word(nth, at)))
                .collect();
            let equal = equal_pairs(samples.clone());
            assert!(
                equal <= bound(MANY, 32),
                "{name}, seed {seed}: {equal} equal"
            );
            // The filter uses both ends: high bits select its word, low bits the counters.
            for shift in [0, 20] {
                let worst =
                    unevenness(samples.iter().map(|sample| (sample.get() >> shift) & 0xfff));
                assert!(
                    worst < 6.0,
                    "{name}, seed {seed}, from bit {shift}: {worst}"
                );
            }
        }
    }
}

/// Return by how many standard deviations chi-square exceeds its expectation, over 4096 bins.
fn unevenness(values: impl Iterator<Item = u32>) -> f64 {
    let mut bins = [0usize; 4096];
    values.for_each(|value| bins[value as usize] += 1);
    let mean = MANY as f64 / 4096.0;
    let square = |&count: &usize| (count as f64 - mean).powi(2) / mean;
    let chi: f64 = bins.iter().map(square).sum();
    (chi - 4095.0) / (2.0 * 4095f64).sqrt()
}

/// Structured pages have no more equal checksums than random numbers of this width: 57 if their samples
/// differ, 25 if they do not.
#[test]
fn checksums_are_spread() {
    let seed = 5;
    let hasher = hasher(seed);
    for (name, word) in EVERYWHERE.into_iter().chain(IN_ONE_WORD) {
        let sums: Vec<Checksum> = (0..MANY)
            .map(|nth| checksum_of(&hasher, |at| word(nth, at)))
            .collect();
        let full = sums.iter().map(|sum| sum.get() & ((1 << FULL_BITS) - 1));
        let equal = equal_pairs(full.collect());
        assert!(equal <= bound(MANY, FULL_BITS), "{name}: {equal} equal");
        let equal = equal_pairs(sums);
        assert!(equal <= bound(MANY, FULL_BITS), "{name}: {equal} equal");
    }
}

/// With the seed known, pages can be made to collide in all bits: where one factor is zero, the other does
/// not matter. So nothing may depend on collisions being rare; see `MAX_COMPARES`.
#[test]
fn with_the_seed_known_any_number_of_pages_collide() {
    let mut random = Random::new(31);
    let seed: [u64; SEED_WORDS] = std::array::from_fn(|_| random.draw());
    let hasher = Hasher::new(seed);
    let sampled = words_read(|word| hasher.sample(word));
    let line = (0..LINES)
        .find(|line| sampled.iter().all(|word| word / LINE_WORDS != *line))
        .expect("only some lines are sampled");
    let mut page = random_page(&mut random);
    // keys[2] is combined with the first word of each line.
    page[line * LINE_WORDS] = seed[1 + 2];
    let sum = checksum(&hasher, &page);
    for nth in 0..4096 {
        page[line * LINE_WORDS + 1] = nth;
        assert_eq!(checksum(&hasher, &page), sum);
    }
    // With another seed they do not collide.
    let other = self::hasher(77);
    let mut sums = HashSet::new();
    for nth in 0..4096 {
        page[line * LINE_WORDS + 1] = nth;
        sums.insert(checksum(&other, &page).get());
    }
    assert!(sums.len() > 4000, "{} of 4096 differ", sums.len());
}
