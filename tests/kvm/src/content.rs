// SPDX-License-Identifier: GPL-2.0
//! What the pages of a guest contain. The payload fills and verifies by this, and the host computes from it how
//! many pages can merge.

/// The shares of a guest's pages, in percent. The others are unlike any page of any guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shares {
    /// Pages that all guests have, each once and at another place.
    pub common: u32,
    /// Pages of zeroes.
    pub zero: u32,
    /// Pages with one of [`REPEATED`] contents.
    pub repeated: u32,
}

/// The number of contents of [`Shares::repeated`].
pub const REPEATED: u32 = 4;

/// The pages of one guest.
#[derive(Clone, Copy, Debug)]
pub struct Pages {
    pub guest: u32,
    pub count: u32,
    pub shares: Shares,
}

/// How a page came to have its content. Pages with the same `Kind` are equal, in whatever guests they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    Zero,
    /// A page that all guests have: its number, and how often it was rewritten.
    Common(u32, u32),
    Repeated(u32, u32),
    /// The guest, the page, and how often it was rewritten.
    Own(u32, u32, u32),
}

/// A hash of two numbers, by the finalizer of MurmurHash3.
const fn hash(a: u32, b: u32) -> u32 {
    let mut h = a.wrapping_mul(0x9e37_79b1) ^ b.wrapping_add(0x85eb_ca6b).wrapping_mul(0xc2b2_ae35);
    h ^= h >> 16;
    h = h.wrapping_mul(0x85eb_ca6b);
    h ^= h >> 13;
    h = h.wrapping_mul(0xc2b2_ae35);
    h ^ (h >> 16)
}

impl Pages {
    /// The number of the page's content. All guests have the same contents, each guest in another order.
    fn number(&self, page: u32) -> u32 {
        (page + self.guest.wrapping_mul(37) % self.count) % self.count
    }

    /// Whether the rewrite with this number, of `percent` of all pages, rewrites the page.
    pub fn is_rewritten(&self, page: u32, rewrite: u32, percent: u32) -> bool {
        hash(self.number(page), rewrite) % 100 < percent
    }

    /// Returns the kind of a page that was last rewritten by rewrite `last`; 0 if it never was.
    pub fn kind(&self, page: u32, last: u32) -> Kind {
        let number = self.number(page);
        let Shares {
            common,
            zero,
            repeated,
        } = self.shares;
        let at = hash(number, 0x5eed) % 100;
        if at < common {
            Kind::Common(number, last)
        } else if at < common + zero {
            Kind::Zero
        } else if at < common + zero + repeated {
            Kind::Repeated(number % REPEATED, last)
        } else {
            Kind::Own(self.guest, page, last)
        }
    }
}

impl Kind {
    /// Returns the words of a page of this kind.
    pub fn words(self) -> Words {
        let mix = |tag: u64, a: u32, b: u32| {
            let seed = (tag << 60) ^ (u64::from(a) << 32) ^ u64::from(b);
            (seed ^ (seed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) | 1
        };
        let first = match self {
            Kind::Zero => 0,
            Kind::Common(number, last) => mix(1, number, last),
            Kind::Repeated(number, last) => mix(2, number, last),
            Kind::Own(guest, page, last) => mix(3, page, last) ^ (u64::from(guest) << 40),
        };
        Words {
            word: first,
            step: if first == 0 { 0 } else { 0x9e37_79b9_7f4a_7c15 },
        }
    }
}

/// The 512 words of a page. The iterator does not end.
pub struct Words {
    word: u64,
    step: u64,
}

impl Words {
    #[inline(always)]
    pub fn next_word(&mut self) -> u64 {
        let word = self.word;
        self.word = word.wrapping_add(self.step);
        word
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::collections::{BTreeMap, BTreeSet};
    use std::vec::Vec;

    const SHARES: Shares = Shares {
        common: 60,
        zero: 10,
        repeated: 5,
    };

    fn guest(guest: u32) -> Pages {
        Pages {
            guest,
            count: 4000,
            shares: SHARES,
        }
    }

    fn words(kind: Kind) -> Vec<u64> {
        let mut words = kind.words();
        (0..512).map(|_| words.next_word()).collect()
    }

    #[test]
    fn a_guest_has_its_shares() {
        let mut counts = BTreeMap::<&str, u32>::new();
        for page in 0..4000 {
            let kind = match guest(1).kind(page, 0) {
                Kind::Common(..) => "common",
                Kind::Zero => "zero",
                Kind::Repeated(..) => "repeated",
                Kind::Own(..) => "own",
            };
            *counts.entry(kind).or_default() += 1;
        }
        for (kind, percent) in [("common", 60), ("zero", 10), ("repeated", 5), ("own", 25)] {
            let expected = 40 * percent;
            assert!(counts[kind].abs_diff(expected) < 120, "{kind}: {counts:?}");
        }
    }

    #[test]
    fn guests_have_the_common_pages_in_common_at_other_places() {
        let common = |number| -> BTreeMap<Kind, u32> {
            let kinds = (0..4000).map(|page| (guest(number).kind(page, 0), page));
            kinds
                .filter(|(kind, _)| matches!(kind, Kind::Common(..)))
                .collect()
        };
        let (one, two) = (common(1), common(2));
        assert!(one.keys().eq(two.keys()));
        assert!(one.iter().all(|(kind, page)| two[kind] != *page));
    }

    #[test]
    fn pages_are_equal_only_if_their_kinds_are() {
        let mut kinds = BTreeSet::new();
        for number in 0..3 {
            for page in 0..4000 {
                for last in [0, 1] {
                    kinds.insert(guest(number).kind(page, last));
                }
            }
        }
        let contents: BTreeSet<_> = kinds.iter().map(|&kind| words(kind)).collect();
        assert_eq!(contents.len(), kinds.len());
        assert!(words(Kind::Zero).iter().all(|&word| word == 0));
    }

    #[test]
    fn a_rewrite_takes_about_its_share() {
        let count = (0..4000)
            .filter(|&page| guest(1).is_rewritten(page, 3, 10))
            .count();
        assert!(count.abs_diff(400) < 80, "{count}");
        assert!((0..4000).all(|page| guest(1).is_rewritten(page, 3, 100)));
    }
}
