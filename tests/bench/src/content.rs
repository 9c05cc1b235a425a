// SPDX-License-Identifier: GPL-2.0
//! The content of pages, made from a seed. Two pages are equal exactly if their `Content` is.

pub const PAGE: usize = 4096;
const WORDS: usize = PAGE / 8;

/// The content of one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Content {
    Zero,
    /// Every word depends on the number.
    Random(u64),
    /// The same as `Random(base)`, except for the last eight bytes.
    Tail {
        base: u64,
        tail: u64,
    },
    /// The first half as `Random(head)`, the second as `Random(rest)`.
    Head {
        head: u64,
        rest: u64,
    },
}

/// One step of splitmix64, a bijection: different numbers stay different.
pub fn mix(n: u64) -> u64 {
    let mut z = n.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Return the words of `Random(number)`: a linear congruential generator with a mixed start. It is cheap on
/// an emulated CPU, and different starts never meet at the same position.
fn words(seed: u64, number: u64) -> impl Iterator<Item = u64> {
    let mut x = mix(mix(number) ^ seed);
    std::iter::repeat_with(move || {
        x = x
            .wrapping_mul(0x5851_f42d_4c95_7f2d)
            .wrapping_add(0x1405_7b7e_f767_814f);
        x
    })
}

/// Write the content to `page`, which is `PAGE` bytes long.
pub fn fill(content: Content, seed: u64, page: &mut [u8]) {
    assert_eq!(page.len(), PAGE);
    let put = |page: &mut [u8], number: u64| {
        for (to, word) in page.chunks_exact_mut(8).zip(words(seed, number)) {
            to.copy_from_slice(&word.to_le_bytes());
        }
    };
    match content {
        Content::Zero => page.fill(0),
        Content::Random(number) => put(page, number),
        Content::Tail { base, tail } => {
            put(page, base);
            // This differs from the word of the base, as tails must.
            page[PAGE - 8..].copy_from_slice(&mix(tail ^ seed).to_le_bytes());
        }
        Content::Head { head, rest } => {
            put(&mut page[..PAGE / 2], head);
            let half = &mut page[PAGE / 2..];
            for (to, word) in half
                .chunks_exact_mut(8)
                .zip(words(seed, rest).skip(WORDS / 2))
            {
                to.copy_from_slice(&word.to_le_bytes());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(content: Content) -> Vec<u8> {
        let mut page = vec![0xaa; PAGE];
        fill(content, 42, &mut page);
        page
    }

    fn differing(a: &[u8], b: &[u8]) -> Vec<usize> {
        (0..WORDS)
            .filter(|w| a[w * 8..w * 8 + 8] != b[w * 8..w * 8 + 8])
            .collect()
    }

    #[test]
    fn random_pages_differ_in_every_word() {
        let (a, b) = (page(Content::Random(1)), page(Content::Random(2)));
        assert_eq!(differing(&a, &b).len(), WORDS);
        assert_eq!(a, page(Content::Random(1)));
    }

    #[test]
    fn the_seed_matters() {
        let mut other = vec![0; PAGE];
        fill(Content::Random(1), 43, &mut other);
        assert_ne!(page(Content::Random(1)), other);
    }

    #[test]
    fn tails_differ_in_the_last_word_only() {
        let (a, b) = (
            page(Content::Tail { base: 1, tail: 1 }),
            page(Content::Tail { base: 1, tail: 2 }),
        );
        assert_eq!(differing(&a, &b), [WORDS - 1]);
        assert_eq!(differing(&a, &page(Content::Random(1))), [WORDS - 1]);
    }

    #[test]
    fn heads_share_exactly_the_first_half() {
        let (a, b) = (
            page(Content::Head { head: 1, rest: 1 }),
            page(Content::Head { head: 1, rest: 2 }),
        );
        assert_eq!(differing(&a, &b), (WORDS / 2..WORDS).collect::<Vec<_>>());
    }

    #[test]
    fn zero_is_zero() {
        assert!(page(Content::Zero).iter().all(|&b| b == 0));
    }
}
