// SPDX-License-Identifier: GPL-2.0

//! The cost of the per-page metadata: the trees, the filter and the page map, with ten thousand, a million
//! and ten million entries. Each iteration is one page.
//!
//! Keys are random, as checksums are, so the larger trees are not in any cache. The page map is visited in
//! the order of addresses, as the scan does.

#[path = "../src/abi.rs"]
mod abi;
#[path = "../../../src/hash.rs"]
#[allow(dead_code, clippy::style, clippy::precedence)]
mod hash;
#[path = "../src/ksm.rs"]
mod ksm;
#[path = "../src/mm.rs"]
mod mm;
#[path = "../src/sys.rs"]
mod sys;

use criterion::{
    criterion_group, criterion_main, measurement::WallTime, BenchmarkGroup, BenchmarkId, Criterion,
};
use hash::{Checksum, Sample};
use kernel::{alloc::flags::GFP_NOWAIT, page::PAGE_SIZE, testing::Random};
use ksm::{
    filter::Filter,
    index::Index,
    mms::PageAddr,
    page_map::{Found, PageMap},
    unstable_tree::UnstableTree,
};
use mm::stable_key::StableKey;
use std::{
    hint::black_box,
    time::{Duration, Instant},
};

/// Small sizes only, when `cargo test` only tries each bench once.
fn sizes() -> &'static [usize] {
    if std::env::args().any(|arg| arg == "--bench") {
        &[10_000, 1_000_000, 10_000_000]
    } else {
        &[1000]
    }
}

/// The number of pages of a leaf, and of a batch.
const LEAF_PAGES: usize = 512;
/// How many entries to add or remove between two timed sections.
const CHUNK: u64 = 1000;

type Group<'a> = BenchmarkGroup<'a, WallTime>;

/// Measure `timed` for one page after the other. `before` prepares the next few, and `after` cleans up after
/// them; neither counts.
fn measure<S, T>(
    group: &mut Group<'_>,
    name: &str,
    size: usize,
    state: &mut S,
    mut before: impl FnMut(&mut S) -> T,
    mut timed: impl FnMut(&mut S, &T),
    mut after: impl FnMut(&mut S, T),
) {
    group.bench_function(BenchmarkId::new(name, size), |b| {
        b.iter_custom(|iters| {
            let mut took = Duration::ZERO;
            let mut left = iters;
            while left > 0 {
                let count = left.min(CHUNK);
                left -= count;
                let all: Vec<T> = (0..count).map(|_| before(state)).collect();
                let start = Instant::now();
                for one in &all {
                    timed(state, one);
                }
                took += start.elapsed();
                all.into_iter().for_each(|one| after(state, one));
            }
            took
        })
    });
}

/// The address of all pages in the unstable tree.
const PLACE: PageAddr = PageAddr { mm_id: 1, addr: 0 };

fn sum(random: &mut Random) -> Checksum {
    Checksum::from_raw(random.draw())
}

/// The trees, their content, and a source of more.
struct Trees {
    index: Index<u64>,
    unstable: UnstableTree,
    /// Their content, in no order.
    waiting: Vec<Checksum>,
    nodes: Vec<StableKey>,
    /// The index of the next one.
    at: usize,
    random: Random,
}

impl Trees {
    /// Fill each of the two large trees with `size` entries.
    fn with(size: usize) -> Self {
        let mut trees = Self {
            index: Index::new(),
            unstable: UnstableTree::new(),
            waiting: Vec::new(),
            nodes: Vec::new(),
            at: 0,
            random: Random::new(1),
        };
        for _ in 0..size {
            let sum = sum(&mut trees.random);
            assert!(trees.unstable.insert(sum, PLACE, GFP_NOWAIT).is_ok());
            trees.waiting.push(sum);
        }
        for _ in 0..size {
            let key = trees.new_key();
            trees.add(key);
            trees.nodes.push(key);
        }
        trees
    }

    fn new_key(&mut self) -> StableKey {
        let sum = sum(&mut self.random);
        self.index.new_key(sum)
    }

    /// Add a node and note that it has mappings, as for a merged page.
    fn add(&mut self, key: StableKey) {
        assert!(self.index.insert(key, 0, GFP_NOWAIT).is_ok());
        self.index.move_to_stable(key);
    }

    /// Return the index of the next one. None repeats within a chunk.
    fn next(&mut self) -> usize {
        self.at = (self.at + 1) % self.nodes.len();
        self.at
    }
}

fn unstable(group: &mut Group<'_>, size: usize, trees: &mut Trees) {
    let new = |trees: &mut Trees| sum(&mut trees.random);
    let known = |trees: &mut Trees| {
        let at = trees.next();
        trees.waiting[at]
    };
    let look = |trees: &mut Trees, sum: &Checksum| {
        black_box(trees.unstable.lookup(*sum));
    };
    let add = |trees: &mut Trees, sum: &Checksum| {
        let _ = black_box(trees.unstable.insert(*sum, PLACE, GFP_NOWAIT));
    };
    let remove = |trees: &mut Trees, sum: &Checksum| trees.unstable.remove(*sum, PLACE);
    let add_back = |trees: &mut Trees, sum| add(trees, &sum);
    let remove_again = |trees: &mut Trees, sum| remove(trees, &sum);
    let leave = |_: &mut Trees, _| ();
    measure(group, "unstable: found", size, trees, known, look, leave);
    measure(group, "unstable: not found", size, trees, new, look, leave);
    measure(
        group,
        "unstable: added",
        size,
        trees,
        new,
        add,
        remove_again,
    );
    measure(
        group,
        "unstable: removed",
        size,
        trees,
        known,
        remove,
        add_back,
    );
}

fn stable(group: &mut Group<'_>, size: usize, trees: &mut Trees) {
    let new = Trees::new_key;
    let known = |trees: &mut Trees| {
        let at = trees.next();
        trees.nodes[at]
    };
    let look = |trees: &mut Trees, key: &StableKey| {
        black_box(trees.index.next_stable(key.sum, None));
    };
    let add = |trees: &mut Trees, key: &StableKey| trees.add(*key);
    let remove = |trees: &mut Trees, key: &StableKey| {
        black_box(trees.index.remove(*key));
    };
    let add_back = |trees: &mut Trees, key| add(trees, &key);
    let remove_again = |trees: &mut Trees, key| remove(trees, &key);
    let leave = |_: &mut Trees, _| ();
    measure(group, "stable: found", size, trees, known, look, leave);
    measure(group, "stable: not found", size, trees, new, look, leave);
    measure(group, "stable: added", size, trees, new, add, remove_again);
    measure(
        group,
        "stable: removed",
        size,
        trees,
        known,
        remove,
        add_back,
    );
}

fn filter(group: &mut Group<'_>, size: usize) {
    let mut random = Random::new(3);
    let samples: Vec<Sample> = (0..size)
        .map(|_| Sample::from_raw(random.draw() as u32))
        .collect();
    let new_filter = || match Filter::for_pages(size, usize::MAX) {
        Ok(filter) => filter,
        Err(_) => panic!("no memory"),
    };
    let mut filter = new_filter();
    for sample in &samples {
        filter.add(*sample);
    }
    let mut at = samples.iter().cycle();
    let mut next = || at.next().copied().unwrap_or(Sample::from_raw(0));
    group.bench_function(BenchmarkId::new("filter: has_two", size), |b| {
        b.iter(|| filter.has_two(next()))
    });
    // Add and remove in turn, so that the filter stays equally full.
    group.bench_function(BenchmarkId::new("filter: add and remove", size), |b| {
        b.iter(|| {
            let sample = next();
            filter.remove(sample);
            filter.add(sample)
        })
    });
    group.bench_function(BenchmarkId::new("filter: counted anew", size), |b| {
        b.iter_custom(|iters| {
            let mut took = Duration::ZERO;
            let mut left = iters as usize;
            while left > 0 {
                let count = left.min(size);
                left -= count;
                let start = Instant::now();
                let mut filter = new_filter();
                for sample in &samples[..count] {
                    filter.add(*sample);
                }
                black_box(&filter);
                took += start.elapsed();
            }
            took
        })
    });
}

/// Visit the pages of one leaf, all of which are known, at once. Return how many changed.
fn look_at_run(map: &mut PageMap<u64>, addr: usize) -> usize {
    let Ok(mut leaf) = map.leaf_from(addr, 0, GFP_NOWAIT) else {
        return 0;
    };
    match leaf.known_run(LEAF_PAGES) {
        Some(words) => words.iter().filter(|word| **word != black_box(7)).count(),
        None => panic!("not all are known"),
    }
}

/// Visit every other page of one leaf, all of which are known, one after the other.
fn look_at_each(map: &mut PageMap<u64>, addr: usize) -> usize {
    let Ok(mut leaf) = map.leaf_from(addr, 0, GFP_NOWAIT) else {
        return 0;
    };
    let mut changed = 0;
    for page in (0..LEAF_PAGES).step_by(2) {
        match leaf.seek(addr + page * PAGE_SIZE) {
            Found::Entry(word) => changed += usize::from(*word != black_box(7)),
            _ => panic!("not known"),
        }
    }
    changed
}

/// Add every `step`th page of a leaf, and no others.
fn fill(map: &mut PageMap<u64>, addr: usize, step: usize) {
    if let Ok(mut leaf) = map.leaf_from(addr, 0, GFP_NOWAIT) {
        if step == 1 {
            assert!(leaf.fill_run(LEAF_PAGES, GFP_NOWAIT, |_| 7));
            return;
        }
        for page in (0..LEAF_PAGES).step_by(step) {
            match leaf.seek(addr + page * PAGE_SIZE) {
                Found::Nothing => assert!(leaf.insert(7, LEAF_PAGES / step, GFP_NOWAIT).is_ok()),
                _ => panic!("known"),
            }
        }
    }
}

/// Build a map with every `step`th page of as many leaves as give `size` pages.
fn map_of(size: usize, step: usize) -> PageMap<u64> {
    let mut map = PageMap::new();
    for leaf in 0..(size * step).div_ceil(LEAF_PAGES) {
        fill(&mut map, leaf * LEAF_PAGES * PAGE_SIZE, step);
    }
    map
}

fn page_map(group: &mut Group<'_>, size: usize) {
    for (name, step) in [
        ("page map: unchanged, in a row", 1),
        ("page map: unchanged, with holes", 2),
    ] {
        let look = if step == 1 { look_at_run } else { look_at_each };
        let mut map = map_of(size, step);
        let leaves = (size * step).div_ceil(LEAF_PAGES);
        let mut at = (0..leaves).cycle();
        group.bench_function(BenchmarkId::new(name, size), |b| {
            b.iter_custom(|iters| {
                // Whole leaves, of which only the requested part counts.
                let pages = LEAF_PAGES / step;
                let rounds = (iters as usize).div_ceil(pages);
                let start = Instant::now();
                for _ in 0..rounds {
                    let leaf = at.next().unwrap_or(0);
                    black_box(look(&mut map, leaf * LEAF_PAGES * PAGE_SIZE));
                }
                start
                    .elapsed()
                    .mul_f64(iters as f64 / (rounds * pages) as f64)
            })
        });
        group.bench_function(
            BenchmarkId::new(name.replace("unchanged", "new"), size),
            |b| {
                b.iter_custom(|iters| {
                    let (mut took, mut done) = (Duration::ZERO, 0);
                    while done < iters {
                        let start = Instant::now();
                        let map = map_of(size, step);
                        took += start.elapsed();
                        drop(map);
                        done += (leaves * LEAF_PAGES / step) as u64;
                    }
                    took.mul_f64(iters as f64 / done as f64)
                })
            },
        );
    }
    let map = map_of(size, 1);
    let bytes = map.bytes() as f64 / size as f64;
    println!("page map of {size} pages in a row: {bytes:.2} bytes a page");
}

fn all(c: &mut Criterion) {
    let mut group = c.benchmark_group("index");
    for &size in sizes() {
        let mut trees = Trees::with(size);
        unstable(&mut group, size, &mut trees);
        stable(&mut group, size, &mut trees);
        drop(trees);
        filter(&mut group, size);
        page_map(&mut group, size);
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = all
}
criterion_main!(benches);
