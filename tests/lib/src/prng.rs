// SPDX-License-Identifier: GPL-2.0
//! Repeatable pseudo-random numbers, and page content made from a seed.

/// A splitmix64 generator: tiny, and good enough to make pages differ.
pub struct Prng(u64);

impl Prng {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Return a number below `n`, which must not be 0.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next_u64() % n as u64) as usize
    }
}

/// Fill `page` with the content of `seed`. Seed 0 is all zeroes.
pub fn fill(seed: u64, page: &mut [u8]) {
    if seed == 0 {
        page.fill(0);
        return;
    }
    let mut prng = Prng::new(seed);
    for chunk in page.chunks_mut(8) {
        let word = prng.next_u64().to_le_bytes();
        chunk.copy_from_slice(&word[..chunk.len()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_depends_on_the_seed_alone() {
        let (mut a, mut b, mut c) = ([0u8; 4096], [1u8; 4096], [0u8; 4096]);
        fill(7, &mut a);
        fill(7, &mut b);
        fill(8, &mut c);
        assert_eq!(a, b);
        assert_ne!(a, c);
    }

    #[test]
    fn seed_zero_is_a_zero_page() {
        let mut page = [1u8; 4096];
        fill(0, &mut page);
        assert!(page.iter().all(|&b| b == 0));
    }

    #[test]
    fn below_stays_below() {
        let mut prng = Prng::new(1);
        assert!((0..1000).all(|_| prng.below(7) < 7));
    }
}
