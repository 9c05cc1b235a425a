// SPDX-License-Identifier: GPL-2.0

//! What pages are compared by before they are compared.
//!
//! A [`Sample`] is made of eight of a page's 512 words, so looking at a page costs four cache lines. It
//! is what is remembered of every page. Only when pages with the same sample turn out to differ are all
//! words of these read, for a [`Checksum`], which is the key of both trees.
//!
//! Both use the folded multiplication of wyhash and its kin (multiply two words to 128 bits, xor the
//! halves): it takes half the instructions of xxh64 for each byte, and its weaknesses do not matter
//! here. Nobody can see the results, the keys and the places of the sample are drawn anew at each load,
//! and what decides a merge is the comparison of all bytes. Figures: `Documentation/benchmark.md`.

/// Words of a page.
pub(crate) const PAGE_WORDS: usize = 4096 / 8;

/// Words of a cache line.
pub(crate) const LINE_WORDS: usize = 8;

/// Cache lines of a page.
pub(crate) const LINES: usize = PAGE_WORDS / LINE_WORDS;

/// Cache lines of which the sample has two words each; the last one is the page's last.
const SAMPLED: usize = 4;

/// A 32-bit hash of some words of a page.
///
/// Equal content has equal samples; the reverse is only a hint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Sample(u32);

impl Sample {
    /// Takes back what [`Self::get`] gave.
    pub(crate) const fn from_raw(raw: u32) -> Self {
        Self(raw)
    }

    /// The bits.
    pub(crate) const fn get(self) -> u32 {
        self.0
    }

    /// One of 64 bits, for sets of samples that need not be exact.
    pub(crate) const fn bit(self) -> u64 {
        1 << (self.0 % u64::BITS)
    }

    /// What becomes of it on a memory node. As `salt` is odd, it is another one on each.
    const fn salted(self, salt: u32, node: u32) -> Self {
        Self(self.0 ^ node.wrapping_mul(salt))
    }
}

/// A 57-bit checksum of a page's content: its sample, then 25 bits of a hash of all words. (Seven bits
/// are left to [`PageEntry`](crate::mm::entry::PageEntry), for its tag and the page's strikes.)
///
/// Equal content has equal checksums. The reverse is only likely: what decides a merge is the
/// comparison of all bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Checksum(u64);

/// How many bits of a checksum are not the sample.
pub(crate) const FULL_BITS: u32 = 25;

/// How many bits it has.
pub(crate) const SUM_BITS: u32 = u32::BITS + FULL_BITS;

const SUM_MAX: u64 = (1 << SUM_BITS) - 1;

impl Checksum {
    /// The checksum of a page with this sample whose words have this hash.
    pub(crate) const fn new(sample: Sample, hash: u64) -> Self {
        let bits = match hash >> (u64::BITS - FULL_BITS) {
            // Taken, see below.
            0 => 1,
            bits => bits,
        };
        Self(Self::unknown(sample).0 | bits)
    }

    /// What stands for the checksum of a page with this sample while it is not known. No checksum that
    /// was computed is equal to it, and none with the same sample is smaller.
    pub(crate) const fn unknown(sample: Sample) -> Self {
        Self((sample.0 as u64) << FULL_BITS)
    }

    /// Whether this only stands for a checksum that is not known.
    pub(crate) const fn is_unknown(self) -> bool {
        self.0 & ((1 << FULL_BITS) - 1) == 0
    }

    /// Takes back what [`Self::get`] gave.
    pub(crate) const fn from_raw(raw: u64) -> Self {
        Self(raw & SUM_MAX)
    }

    /// The bits, of which the highest seven are zero.
    pub(crate) const fn get(self) -> u64 {
        self.0
    }

    /// The sample of the page.
    pub(crate) const fn sample(self) -> Sample {
        Sample((self.0 >> FULL_BITS) as u32)
    }

    /// The same, but for the sample.
    pub(crate) const fn with_sample(self, sample: Sample) -> Self {
        Self(Self::unknown(sample).0 | self.0 & ((1 << FULL_BITS) - 1))
    }

    /// The next larger one.
    pub(crate) const fn successor(self) -> Option<Self> {
        if self.0 < SUM_MAX {
            Some(Self(self.0.wrapping_add(1)))
        } else {
            None
        }
    }
}

/// Makes samples and checksums, in a way that is different at each load.
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
    /// The sampled words: two of each line.
    places: [usize; 2 * SAMPLED],
    keys: [u64; 2 * SAMPLED],
    /// How many memory nodes there are that have samples of their own.
    nodes: u32,
    /// What the samples of two of them differ by; odd.
    salt: u32,
}

/// The samples of pages of zeroes, one for each memory node that has samples of its own.
#[derive(Clone, Copy)]
pub(crate) struct Zeroes {
    first: Sample,
    nodes: u32,
    salt: u32,
}

impl Zeroes {
    /// All of them.
    pub(crate) fn iter(self) -> impl Iterator<Item = Sample> {
        (0..self.nodes).map(move |node| self.first.salted(self.salt, node))
    }

    /// Whether this is one of them.
    #[inline]
    pub(crate) fn contains(self, sample: Sample) -> bool {
        self.iter().any(|zero| zero == sample)
    }
}

/// How many random words a [`Hasher`] is made of.
pub(crate) const SEED_WORDS: usize = 9;

/// Multiplies to 128 bits and folds.
#[inline(always)]
fn mix(a: u64, b: u64) -> u64 {
    let product = u128::from(a).wrapping_mul(u128::from(b));
    (product as u64) ^ (product >> 64) as u64
}

impl Hasher {
    /// Makes one from random words.
    pub(crate) fn new(seed: [u64; SEED_WORDS]) -> Self {
        let [place, keys @ ..] = seed;
        let mut places = [0; 2 * SAMPLED];
        for (nth, pair) in places.chunks_exact_mut(2).enumerate() {
            let random = (place >> (16 * nth)) as usize;
            // One line in each quarter of the page, and two words of it, half a line apart.
            let line = nth * LINES / SAMPLED + random % (LINES / SAMPLED);
            let word = line * LINE_WORDS + (random >> 8) % (LINE_WORDS / 2);
            pair.copy_from_slice(&[word, word + LINE_WORDS / 2]);
        }
        // In the last quarter it is always the last line, with the very last word: the ends of
        // pages are where what is otherwise alike often differs.
        let last = PAGE_WORDS - 1;
        places[2 * SAMPLED - 2..].copy_from_slice(&[last - LINE_WORDS / 2, last]);
        Self {
            places,
            keys,
            nodes: 1,
            salt: (place >> 32) as u32 | 1,
        }
    }

    /// One for which equal pages on different memory nodes, of which there are `nodes`, have different
    /// samples and checksums: such pages never meet. Those of node 0 are what they were.
    pub(crate) fn per_nid(&self, nodes: u32) -> Self {
        Self {
            places: self.places,
            keys: self.keys,
            nodes: nodes.max(1),
            salt: self.salt,
        }
    }

    /// The sample of a page on the memory node `node()`, which is asked only if it matters, whose words have
    /// this sample.
    #[inline(always)]
    pub(crate) fn on_node(&self, sample: Sample, node: impl FnOnce() -> u32) -> Sample {
        if self.nodes == 1 {
            return sample;
        }
        sample.salted(self.salt, node())
    }

    /// The samples of pages of zeroes.
    pub(crate) fn zeroes(&self) -> Zeroes {
        Zeroes {
            first: self.sample(|_| 0),
            nodes: self.nodes,
            salt: self.salt,
        }
    }

    /// The sample of a page whose word number `n` is `word(n)`.
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

    /// The checksum of a page whose word number `n` is `word(n)`, and whose cache line number `n` is
    /// `line(n)`. The content may change meanwhile; it is then the checksum of nothing in particular.
    #[inline(always)]
    pub(crate) fn checksum(
        &self,
        word: impl Fn(usize) -> u64,
        line: impl Fn(usize) -> [u64; LINE_WORDS],
    ) -> Checksum {
        let k = self.keys;
        let (mut left, mut right) = (k[0], k[1]);
        for nth in 0..LINES {
            let w = line(nth);
            left = mix(w[0] ^ k[2], w[1] ^ left);
            right = mix(w[2] ^ k[3], w[3] ^ right);
            left = mix(w[4] ^ k[2], w[5] ^ left);
            right = mix(w[6] ^ k[3], w[7] ^ right);
        }
        Checksum::new(self.sample(&word), mix(left ^ k[4], right ^ k[5]))
    }
}
