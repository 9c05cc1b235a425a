// SPDX-License-Identifier: GPL-2.0

//! The cost of looking at a page: our sample and our checksum, and alternatives to them. Each iteration is
//! one page of 4 KiB.
//!
//! `warm`: one page again and again, which stays in the first-level cache. `cold`: pages at random from
//! a buffer of 1 GiB, much larger than any cache. Pages do not depend on each other, so the processor
//! fetches several at a time, as it does when the module walks a page table.

#[path = "../../../src/hash.rs"]
#[allow(dead_code, clippy::style, clippy::precedence)]
mod hash;

use criterion::{criterion_group, criterion_main, Criterion};
use hash::{Hasher, LINE_WORDS, PAGE_WORDS, SEED_WORDS};
use kernel::testing::Random;
use std::{alloc::Layout, hint::black_box, time::Duration};
use twox_hash::{XxHash3_64, XxHash64};

type Page = [u64; PAGE_WORDS];

/// The number of pages in the large buffer. It is small when `cargo test` only tries each bench once.
fn many() -> usize {
    if std::env::args().any(|arg| arg == "--bench") {
        1 << 18
    } else {
        1 << 9
    }
}

/// Allocate random content, in huge pages if the system provides them: the module sees all memory through
/// huge mappings.
fn pages(count: usize) -> &'static mut [Page] {
    const HUGE: usize = 2 << 20;
    let size = count * size_of::<Page>();
    let layout = Layout::from_size_align(size, HUGE).expect("a size that can be");
    // SAFETY: The layout is not of size 0.
    let start = unsafe { std::alloc::alloc_zeroed(layout) };
    assert!(!start.is_null(), "no memory");
    // SAFETY: The memory is ours. The system may refuse the advice.
    unsafe { libc::madvise(start.cast(), size, libc::MADV_HUGEPAGE) };
    // SAFETY: This is zeroed memory of this size and alignment, which is never freed.
    let pages = unsafe { std::slice::from_raw_parts_mut(start.cast::<Page>(), count) };
    let mut random = Random::new(1);
    for word in pages.as_flattened_mut() {
        *word = random.draw();
    }
    pages
}

fn bytes(page: &Page) -> &[u8] {
    // SAFETY: Words have no padding, and bytes have no alignment.
    unsafe { std::slice::from_raw_parts(page.as_ptr().cast(), size_of::<Page>()) }
}

/// A way to look at a page.
type Candidate = (&'static str, fn(&Hasher, &Page) -> u64);

const CANDIDATES: [Candidate; 8] = [
    ("nothing", |_, page| page.as_ptr() as u64),
    ("one word", |_, page| page[PAGE_WORDS - 1]),
    ("sample, 8 words", |hasher, page| {
        u64::from(hasher.sample(|nth| page[nth]).get())
    }),
    ("checksum", |hasher, page| {
        let line = |nth: usize| std::array::from_fn(|at| page[nth * LINE_WORDS + at]);
        hasher.checksum(|nth| page[nth], line).get()
    }),
    ("xxh64", |_, page| XxHash64::oneshot(1, bytes(page))),
    ("xxh3, SIMD", |_, page| XxHash3_64::oneshot(bytes(page))),
    ("crc32c, SSE 4.2", |_, page| {
        u64::from(crc32c::crc32c(bytes(page)))
    }),
    ("read only", |_, page| {
        page.iter().fold(0, |sum, word| sum ^ word)
    }),
];

fn checksums(c: &mut Criterion) {
    let mut random = Random::new(2);
    let hasher = Hasher::new(std::array::from_fn::<_, SEED_WORDS, _>(|_| random.draw()));
    let pages = pages(many());
    let mut group = c.benchmark_group("warm");
    for (name, look) in CANDIDATES {
        group.bench_function(name, |b| b.iter(|| look(&hasher, black_box(&pages[0]))));
    }
    group.finish();
    let mut group = c.benchmark_group("cold");
    for (name, look) in CANDIDATES {
        group.bench_function(name, |b| {
            b.iter(|| {
                let at = random.draw() as usize % pages.len();
                look(&hasher, black_box(&pages[at]))
            })
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = checksums
}
criterion_main!(benches);
