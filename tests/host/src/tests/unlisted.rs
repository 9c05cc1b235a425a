// SPDX-License-Identifier: GPL-2.0

//! Tests of the set of leaves that may have merged pages without rmap items.

use crate::ksm::unlisted::Unlisted;
use kernel::testing::Random;
use std::collections::HashSet;

#[test]
fn has_what_was_added_until_the_next_pass_is_over() {
    let mut set = Unlisted::new();
    let mut random = Random::new(1);
    let mut passes: Vec<HashSet<usize>> = Vec::new();
    for pass in 0..50 {
        set.begin_pass();
        passes.push(HashSet::new());
        for _ in 0..pass % 7 * 10 {
            let leaf = random.draw() as usize >> 20;
            set.add(leaf);
            passes[pass].insert(leaf);
        }
        for leaf in passes.iter().rev().take(2).flatten() {
            assert!(set.may_have(*leaf));
        }
    }
    set.begin_pass();
    set.begin_pass();
    for leaf in passes.iter().flatten() {
        assert!(!set.may_have(*leaf));
    }
}

/// Few leaves are mistaken for members: neither neighbours of members nor others.
#[test]
fn is_seldom_wrong() {
    let base = 0x3_fac0_0000usize;
    for stride in [1, 2, 8, 512, 4096, 1 << 18] {
        let mut set = Unlisted::new();
        set.begin_pass();
        (0..100).for_each(|nth| set.add(base + nth * stride));
        let wrong = (100..10_100)
            .filter(|nth| set.may_have(base + nth * stride))
            .count();
        assert!(wrong < 600, "{stride}: {wrong} of 10,000");
    }
}

/// When overfull, the set contains every leaf, and is empty again after two passes.
#[test]
fn may_be_full() {
    let mut set = Unlisted::new();
    set.begin_pass();
    (0..100_000).for_each(|leaf| set.add(leaf));
    assert!((0..1_000_000).step_by(999).all(|leaf| set.may_have(leaf)));
    set.begin_pass();
    assert!(set.may_have(5));
    set.begin_pass();
    assert!(!(0..1_000_000).step_by(999).any(|leaf| set.may_have(leaf)));
}
