// SPDX-License-Identifier: GPL-2.0

//! Tests of `engine/checksum.rs`.

use crate::engine::checksum::Checksum;
use proptest::prelude::*;

/// Hashes of which neighbours and extremes are not left to chance.
fn hash() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        0..64u64,
        (u64::MAX - 64)..=u64::MAX,
        (0..64u32).prop_map(|bit| 1 << bit),
    ]
}

proptest! {
    #[test]
    fn leaves_three_bits(hash in hash()) {
        let sum = Checksum::from_hash(hash);
        prop_assert_eq!(sum.get() >> 61, 0);
        // None but the three low bits of the hash are lost.
        prop_assert_eq!(sum.get(), hash >> 3);
    }

    #[test]
    fn comes_back(hash in hash()) {
        let sum = Checksum::from_hash(hash);
        prop_assert_eq!(Checksum::from_raw(sum.get()), sum);
    }

    /// As a word packs it: with a tag in the three bits.
    #[test]
    fn comes_back_out_of_a_word(hash in hash(), tag in 0..8u64) {
        let sum = Checksum::from_hash(hash);
        let word = (sum.get() << 3) | tag;
        prop_assert_eq!(word & 7, tag);
        prop_assert_eq!(Checksum::from_raw(word >> 3), sum);
    }

    /// Three bits stay free whatever is taken back.
    #[test]
    fn takes_back_no_more_than_61_bits(raw in hash()) {
        let sum = Checksum::from_raw(raw);
        prop_assert_eq!(sum.get() >> 61, 0);
        prop_assert_eq!(sum.get(), raw & (u64::MAX >> 3));
    }

    #[test]
    fn keeps_the_order(a in hash(), b in hash()) {
        let (sum_a, sum_b) = (Checksum::from_hash(a), Checksum::from_hash(b));
        prop_assert_eq!(sum_a.cmp(&sum_b), (a >> 3).cmp(&(b >> 3)));
        prop_assert_eq!(sum_a.cmp(&sum_b), sum_a.get().cmp(&sum_b.get()));
        prop_assert_eq!(sum_a == sum_b, sum_a.get() == sum_b.get());
    }

    /// No key lies between the two neighbours' keys, nor are they one.
    #[test]
    fn tells_neighbours_apart(hash in 0..(u64::MAX - 7)) {
        let (here, next) = (Checksum::from_hash(hash), Checksum::from_hash(hash + 8));
        prop_assert!(here < next);
        prop_assert_eq!(here.get() + 1, next.get());
    }
}
