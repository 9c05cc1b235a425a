// SPDX-License-Identifier: GPL-2.0

//! Hashes of page contents: samples and checksums.
//!
//! A [`Sample`] is computed from eight of the 512 words of a page, so a look at a page reads four cache lines.
//! The engine remembers a sample of each page. It computes a [`Checksum`], which reads all words, only after
//! pages with the same sample turned out to differ. Checksums are the keys of both trees.
//!
//! Both hashes use the folded multiplication of wyhash: multiply two words to 128 bits, and xor the halves. It
//! takes half the instructions of xxh64 for each byte. It is no cryptographic hash, and need not be one: user
//! space cannot see the results, each load draws new keys and new positions of the sampled words, and a
//! comparison of all bytes decides each merge. `Documentation/benchmark.md` has figures.

/// The number of 64-bit words in a page.
pub(crate) const PAGE_WORDS: usize = 4096 / 8;

/// The number of words in a cache line.
pub(crate) const LINE_WORDS: usize = 8;

/// The number of cache lines in a page.
pub(crate) const LINES: usize = PAGE_WORDS / LINE_WORDS;

/// The number of cache lines that a sample reads, two words of each. One of them is the last line of the page.
const SAMPLED: usize = 4;

/// A 32-bit hash of eight words of a page.
///
/// Equal pages have equal samples. Pages with equal samples may differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Sample(u32);

impl Sample {
    /// Converts a value of [`Self::get`] back.
    pub(crate) const fn from_raw(raw: u32) -> Self {
        Self(raw)
    }

    /// Returns the 32 bits.
    pub(crate) const fn get(self) -> u32 {
        self.0
    }

    /// Returns a word with one bit set, for approximate sets of samples. The bit depends on the sample only.
    pub(crate) const fn bit(self) -> u64 {
        1 << (self.0 % u64::BITS)
    }

    /// Returns the sample of the same words on NUMA node `node`.
    ///
    /// `salt` is odd, so the results for different nodes differ.
    const fn salted(self, salt: u32, node: u32) -> Self {
        Self(self.0 ^ node.wrapping_mul(salt))
    }
}

/// A 57-bit checksum of a page: 32 bits of its sample, then 25 bits of a hash of all words.
///
/// Equal pages have equal checksums. Pages with equal checksums are most likely equal, but only a comparison of
/// all bytes decides that.
///
/// The other seven bits of a word belong to the engine's entry of a page, for its tag and the page's strikes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Checksum(u64);

/// The number of bits of a checksum that are not the sample.
pub(crate) const FULL_BITS: u32 = 25;

/// The number of bits of a checksum.
pub(crate) const SUM_BITS: u32 = u32::BITS + FULL_BITS;

/// The largest checksum.
const SUM_MAX: u64 = (1 << SUM_BITS) - 1;

impl Checksum {
    /// Makes the checksum of a page from its sample and the hash of all its words.
    pub(crate) const fn new(sample: Sample, hash: u64) -> Self {
        let bits = match hash >> (u64::BITS - FULL_BITS) {
            // 0 stands for an unknown checksum.
            0 => 1,
            bits => bits,
        };
        Self(Self::unknown(sample).0 | bits)
    }

    /// Returns the value that stands for the checksum of a page of which only the sample is known.
    ///
    /// It differs from all computed checksums, and is smaller than those with the same sample.
    pub(crate) const fn unknown(sample: Sample) -> Self {
        Self((sample.0 as u64) << FULL_BITS)
    }

    /// Returns whether only the sample is known.
    pub(crate) const fn is_unknown(self) -> bool {
        self.0 & ((1 << FULL_BITS) - 1) == 0
    }

    /// Converts a value of [`Self::get`] back. Ignores the upper seven bits.
    pub(crate) const fn from_raw(raw: u64) -> Self {
        Self(raw & SUM_MAX)
    }

    /// Returns the bits. The upper seven of the word are zero.
    pub(crate) const fn get(self) -> u64 {
        self.0
    }

    /// Returns the sample of the page.
    pub(crate) const fn sample(self) -> Sample {
        Sample((self.0 >> FULL_BITS) as u32)
    }

    /// Returns the checksum with its sample replaced.
    pub(crate) const fn with_sample(self, sample: Sample) -> Self {
        Self(Self::unknown(sample).0 | self.0 & ((1 << FULL_BITS) - 1))
    }

    /// Returns the next larger checksum, or `None` for the largest.
    pub(crate) const fn successor(self) -> Option<Self> {
        if self.0 < SUM_MAX {
            Some(Self(self.0.wrapping_add(1)))
        } else {
            None
        }
    }
}

/// Computes samples and checksums, with keys that are drawn at each load.
///
/// # Examples
///
/// ```
/// use crate::hash::{Hasher, LINE_WORDS, PAGE_WORDS};
///
/// // The module draws these words at random.
/// let hasher = Hasher::new([1, 2, 3, 4, 5, 6, 7, 8, 9]);
/// let sample = |page: &[u64; PAGE_WORDS]| hasher.sample(|i| page[i]);
/// let checksum = |page: &[u64; PAGE_WORDS]| {
///     let line = |i| core::array::from_fn(|word| page[i * LINE_WORDS + word]);
///     hasher.checksum(|i| page[i], line)
/// };
///
/// let zeroes = [0; PAGE_WORDS];
/// assert!(hasher.zeroes().contains(sample(&zeroes)));
///
/// // The sample reads the last word of a page, so it shows this difference.
/// let mut other = zeroes;
/// other[PAGE_WORDS - 1] = 1;
/// assert_ne!(sample(&other), sample(&zeroes));
///
/// // With these words, it does not read the first one. The checksum reads all.
/// let mut other = zeroes;
/// other[0] = 1;
/// assert_eq!(sample(&other), sample(&zeroes));
/// assert_ne!(checksum(&other), checksum(&zeroes));
/// ```
pub(crate) struct Hasher {
    /// The indices of the sampled words, two for each line.
    places: [usize; 2 * SAMPLED],
    keys: [u64; 2 * SAMPLED],
    /// The number of NUMA nodes with samples of their own, or 1 if samples do not depend on the node.
    nodes: u32,
    /// An odd number, from which the difference between the samples of two nodes is computed.
    salt: u32,
}

/// The samples of a page of zeroes, one for each NUMA node with samples of its own.
#[derive(Clone, Copy)]
pub(crate) struct Zeroes {
    first: Sample,
    nodes: u32,
    salt: u32,
}

impl Zeroes {
    /// Returns the samples in the order of their nodes.
    pub(crate) fn iter(self) -> impl Iterator<Item = Sample> {
        (0..self.nodes).map(move |node| self.first.salted(self.salt, node))
    }

    /// Returns whether `sample` is that of a page of zeroes on some node.
    #[inline]
    pub(crate) fn contains(self, sample: Sample) -> bool {
        self.iter().any(|zero| zero == sample)
    }
}

/// The number of random words that [`Hasher::new`] takes.
pub(crate) const SEED_WORDS: usize = 9;

/// Multiplies two words to 128 bits, and returns the xor of the halves.
#[inline(always)]
fn mix(a: u64, b: u64) -> u64 {
    let product = u128::from(a).wrapping_mul(u128::from(b));
    (product as u64) ^ (product >> 64) as u64
}

impl Hasher {
    /// Makes a hasher from random words. Its samples do not depend on the NUMA node.
    pub(crate) fn new(seed: [u64; SEED_WORDS]) -> Self {
        let [place, keys @ ..] = seed;
        let mut places = [0; 2 * SAMPLED];
        for (i, pair) in places.chunks_exact_mut(2).enumerate() {
            let random = (place >> (16 * i)) as usize;
            // Pick one line in each quarter of the page, and two words of it that are half a line apart.
            let line = i * LINES / SAMPLED + random % (LINES / SAMPLED);
            let word = line * LINE_WORDS + (random >> 8) % (LINE_WORDS / 2);
            pair.copy_from_slice(&[word, word + LINE_WORDS / 2]);
        }
        // In the last quarter, always take the last line with the last word of the page: pages that are equal
        // otherwise often differ at their end.
        let last = PAGE_WORDS - 1;
        places[2 * SAMPLED - 2..].copy_from_slice(&[last - LINE_WORDS / 2, last]);
        Self {
            places,
            keys,
            nodes: 1,
            salt: (place >> 32) as u32 | 1,
        }
    }

    /// Returns a hasher for which equal pages on different NUMA nodes have different samples and checksums.
    ///
    /// `nodes` is the number of nodes. Samples and checksums of pages on node 0 stay as they are.
    pub(crate) fn per_nid(&self, nodes: u32) -> Self {
        Self {
            places: self.places,
            keys: self.keys,
            nodes: nodes.max(1),
            salt: self.salt,
        }
    }

    /// Converts the sample of a page's words to that of the page on its NUMA node.
    ///
    /// `node` returns the node of the page, and is called only if samples depend on it.
    #[inline(always)]
    pub(crate) fn on_node(&self, sample: Sample, node: impl FnOnce() -> u32) -> Sample {
        if self.nodes == 1 {
            return sample;
        }
        sample.salted(self.salt, node())
    }

    /// Returns the samples of a page of zeroes.
    pub(crate) fn zeroes(&self) -> Zeroes {
        Zeroes {
            first: self.sample(|_| 0),
            nodes: self.nodes,
            salt: self.salt,
        }
    }

    /// Returns the sample of a page on NUMA node 0. `word(i)` returns word `i` of the page.
    #[inline(always)]
    pub(crate) fn sample(&self, word: impl Fn(usize) -> u64) -> Sample {
        let p = &self.places;
        let k = &self.keys;
        let hash = mix(word(p[0]) ^ k[0], word(p[1]) ^ k[1])
            ^ mix(word(p[2]) ^ k[2], word(p[3]) ^ k[3])
            ^ mix(word(p[4]) ^ k[4], word(p[5]) ^ k[5])
            ^ mix(word(p[6]) ^ k[6], word(p[7]) ^ k[7]);
        Sample((hash ^ hash >> 32) as u32)
    }

    /// Returns the checksum of a page on NUMA node 0.
    ///
    /// `word(i)` returns word `i` of the page, and `line(i)` returns cache line `i`. If the content changes
    /// meanwhile, the result is the checksum of no particular content.
    #[inline(always)]
    pub(crate) fn checksum(
        &self,
        word: impl Fn(usize) -> u64,
        line: impl Fn(usize) -> [u64; LINE_WORDS],
    ) -> Checksum {
        let k = self.keys;
        let (mut left, mut right) = (k[0], k[1]);
        for i in 0..LINES {
            let w = line(i);
            left = mix(w[0] ^ k[2], w[1] ^ left);
            right = mix(w[2] ^ k[3], w[3] ^ right);
            left = mix(w[4] ^ k[2], w[5] ^ left);
            right = mix(w[6] ^ k[3], w[7] ^ right);
        }
        Checksum::new(self.sample(&word), mix(left ^ k[4], right ^ k[5]))
    }
}
