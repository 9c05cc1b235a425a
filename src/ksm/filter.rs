// SPDX-License-Identifier: GPL-2.0

//! Which samples more than one page has.

use crate::hash::Sample;
use core::mem::size_of;
use kernel::{alloc::KVVec, prelude::*};

/// A blocked counting filter: says of a sample whether at least two pages have it. It never misses two,
/// and is wrong about few of those that only one page has.
///
/// Each sample counts in two 2-bit counters of one word (Putze, Sanders, Singler: "Cache-, Hash- and
/// Space-Efficient Bloom Filters", 2007, with counters in the place of bits). Eight counters a page make
/// it two bytes when full; then about one page in fifteen is taken for one that has an equal.
///
/// A counter that has reached its end stays there, as nobody knows how much further it would have
/// counted; [`Self::is_saturated`] says when enough of these were left behind to count anew.
///
/// # Examples
///
/// ```
/// use crate::{hash::Sample, ksm::filter::Filter};
/// # use kernel::prelude::*;
///
/// // For 10,000 pages, while 1 MiB is available.
/// let mut filter = Filter::for_pages(10_000, 1 << 20)?;
/// let sample = Sample::from_raw(0x1234_5678);
///
/// // One page with a sample may be unique. With the second one, both may have an equal.
/// assert!(!filter.add(sample));
/// assert!(filter.add(sample));
/// assert!(filter.has_two(sample));
///
/// filter.remove(sample);
/// assert!(!filter.has_two(sample));
///
/// // A filter without memory excludes no page.
/// assert!(Filter::new().has_two(sample));
/// # Ok::<(), Error>(())
/// ```
pub(crate) struct Filter {
    words: KVVec<u64>,
    saturated: usize,
}

const COUNTERS_PER_PAGE: usize = 8;
const COUNTERS_PER_WORD: usize = 32;
const PAGES_PER_WORD: usize = COUNTERS_PER_WORD / COUNTERS_PER_PAGE;
/// The smallest filter is one page.
const MIN_WORDS: usize = 512;
/// The largest is one GiB, for half a billion pages (2 TiB): the kernel's allocator takes a request of 2 GiB
/// for a mistake, and says so.
const MAX_WORDS: usize = 1 << 27;
const MAX: u64 = 3;
/// The bit of a counter that says "two or more".
const TWO: u64 = 2;

impl Filter {
    /// A filter without memory, which takes every page for one that has an equal.
    pub(crate) fn new() -> Self {
        Self {
            words: KVVec::new(),
            saturated: 0,
        }
    }

    /// A filter for `pages` pages, or as many as the largest one has room for, that has counted none. Fails
    /// if it would take more than half of `available` bytes.
    pub(crate) fn for_pages(pages: usize, available: usize) -> Result<Self> {
        let words = pages
            .div_ceil(PAGES_PER_WORD)
            .checked_next_power_of_two()
            .unwrap_or(MAX_WORDS)
            .clamp(MIN_WORDS, MAX_WORDS);
        // One can do without: nobody is to be killed for it, as far as what is available can tell.
        if words.saturating_mul(size_of::<u64>()) > available / 2 {
            return Err(ENOMEM);
        }
        Ok(Self {
            words: KVVec::from_elem(0, words, GFP_KERNEL | __GFP_NOWARN)?,
            saturated: 0,
        })
    }

    /// For how many pages there is room.
    pub(crate) fn capacity(&self) -> usize {
        self.words.len().saturating_mul(PAGES_PER_WORD)
    }

    /// Whether it is large enough for `pages` pages, or as large as can be.
    pub(crate) fn has_room_for(&self, pages: usize) -> bool {
        pages <= self.capacity() || self.words.len() >= MAX_WORDS
    }

    /// Whether one of a quarter of its size would do for `pages` pages, and for as many again.
    pub(crate) fn is_much_too_large_for(&self, pages: usize) -> bool {
        self.words.len() > MIN_WORDS && self.capacity() / 8 >= pages
    }

    /// The memory that it takes, in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.words.len().saturating_mul(size_of::<u64>())
    }

    /// Whether many counters say more than there is.
    pub(crate) fn is_saturated(&self) -> bool {
        self.saturated > self.capacity() / 8
    }

    /// Which word a sample counts in.
    #[inline(always)]
    fn place(&self, sample: Sample) -> usize {
        (u64::from(sample.get()).wrapping_mul(self.words.len() as u64) >> 32) as usize
    }

    /// How far its two counters are shifted in that word. They are not the same.
    #[inline(always)]
    fn shifts(sample: Sample) -> [u32; 2] {
        // Another hash of the same bits, or all samples of a word would have the same counters.
        let hash = sample.get().wrapping_mul(0x9e37_79b1);
        let first = hash >> 27 << 1;
        let second = first ^ (hash >> 21 & 0x3e | 2);
        [first, second]
    }

    /// Counts one more page with this sample. Returns whether at least two pages seem to have it now.
    #[inline]
    pub(crate) fn add(&mut self, sample: Sample) -> bool {
        let place = self.place(sample);
        let Some(word) = self.words.get_mut(place) else {
            return true;
        };
        let mut two = true;
        for shift in Self::shifts(sample) {
            let count = *word >> shift & MAX;
            two &= count != 0;
            if count != MAX {
                *word = word.wrapping_add(1 << shift);
            }
        }
        two
    }

    /// Counts one page with this sample less.
    pub(crate) fn remove(&mut self, sample: Sample) {
        let place = self.place(sample);
        if let Some(word) = self.words.get_mut(place) {
            for shift in Self::shifts(sample) {
                match *word >> shift & MAX {
                    0 => {}
                    MAX => self.saturated = self.saturated.saturating_add(1),
                    _ => *word = word.wrapping_sub(1 << shift),
                }
            }
        }
    }

    /// Whether at least two pages seem to have this sample.
    #[inline(always)]
    pub(crate) fn has_two(&self, sample: Sample) -> bool {
        let Some(word) = self.words.get(self.place(sample)) else {
            return true;
        };
        let [first, second] = Self::shifts(sample);
        let twos = TWO << first | TWO << second;
        word & twos == twos
    }
}
