// SPDX-License-Identifier: GPL-2.0

//! The filter: which samples do at least two pages have?
//!
//! A page whose sample no other page has cannot have an equal. So the scan neither computes its checksum nor
//! searches a tree for it.

use crate::hash::Sample;
use core::mem::size_of;
use kernel::{alloc::KVVec, prelude::*};

/// A blocked counting filter of samples. It says whether at least two pages have a sample.
///
/// It never misses two pages. It is wrong about few of the samples that only one page has.
///
/// Each sample counts in two 2-bit counters of one word (Putze, Sanders, Singler: "Cache-, Hash- and
/// Space-Efficient Bloom Filters", 2007, with counters in place of bits). There are eight counters for each
/// page, so a full filter takes two bytes per page. It is then wrong about one page in fifteen.
///
/// A counter that has reached its maximum stays there, because its true count is unknown.
/// [`Self::is_saturated`] says when so many of them are stuck that the filter should be rebuilt.
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
    /// How many counters were at their maximum when a page was removed, and so are stuck.
    saturated: usize,
}

const COUNTERS_PER_PAGE: usize = 8;
const COUNTERS_PER_WORD: usize = 32;
const PAGES_PER_WORD: usize = COUNTERS_PER_WORD / COUNTERS_PER_PAGE;
/// The smallest filter takes one page.
const MIN_WORDS: usize = 512;
/// The largest filter takes 1 GiB, for half a billion pages (2 TiB). The kernel's allocator warns about
/// requests of 2 GiB.
const MAX_WORDS: usize = 1 << 27;
const MAX: u64 = 3;
/// The bit of a counter that is set for a count of two or more.
const TWO: u64 = 2;

impl Filter {
    /// Creates a filter without memory. It says of every sample that two pages have it.
    pub(crate) fn new() -> Self {
        Self {
            words: KVVec::new(),
            saturated: 0,
        }
    }

    /// Creates an empty filter for `pages` pages, or of the maximum size. May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM` if there is no memory, or if the filter would take more than half of `available` bytes.
    pub(crate) fn for_pages(pages: usize, available: usize) -> Result<Self> {
        let words = pages
            .div_ceil(PAGES_PER_WORD)
            .checked_next_power_of_two()
            .unwrap_or(MAX_WORDS)
            .clamp(MIN_WORDS, MAX_WORDS);
        // The filter is optional. Refuse a size that could push the system into OOM.
        if words.saturating_mul(size_of::<u64>()) > available / 2 {
            return Err(ENOMEM);
        }
        Ok(Self {
            words: KVVec::from_elem(0, words, GFP_KERNEL | __GFP_NOWARN)?,
            saturated: 0,
        })
    }

    /// Returns the number of pages that the filter has room for.
    pub(crate) fn capacity(&self) -> usize {
        self.words.len().saturating_mul(PAGES_PER_WORD)
    }

    /// Whether the filter is large enough for `pages` pages, or has the maximum size.
    pub(crate) fn has_room_for(&self, pages: usize) -> bool {
        pages <= self.capacity() || self.words.len() >= MAX_WORDS
    }

    /// Whether a filter of a quarter of the size would have room for `pages` pages, and for as many again.
    pub(crate) fn is_much_too_large_for(&self, pages: usize) -> bool {
        self.words.len() > MIN_WORDS && self.capacity() / 8 >= pages
    }

    /// Returns the size of the filter, in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.words.len().saturating_mul(size_of::<u64>())
    }

    /// Whether so many counters are stuck at their maximum that the filter should be rebuilt.
    pub(crate) fn is_saturated(&self) -> bool {
        self.saturated > self.capacity() / 8
    }

    /// Returns the index of the word that a sample counts in.
    #[inline(always)]
    fn place(&self, sample: Sample) -> usize {
        (u64::from(sample.get()).wrapping_mul(self.words.len() as u64) >> 32) as usize
    }

    /// Returns by how many bits its two counters are shifted in that word. They always differ.
    #[inline(always)]
    fn shifts(sample: Sample) -> [u32; 2] {
        // The word depends on the high bits of the sample, so hash it again. Otherwise all samples of a word
        // would share the same counters.
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
        // Compare both counters at once: a counter has reached its maximum if both its bits are set, and is not
        // zero if either is.
        let [first, second] = Self::shifts(sample);
        let (high, low) = (*word >> 1, *word);
        let ones = 1 << first | 1 << second;
        let two = (high | low) & ones == ones;
        // No counter overflows into the next one, as those at their maximum are left out.
        *word = low.wrapping_add(ones & !(high & low));
        two
    }

    /// Counts one page less with this sample.
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
