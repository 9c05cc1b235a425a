// SPDX-License-Identifier: GPL-2.0

//! Tests of how an entry is packed, and of the item that it owns.

use super::*;
use crate::mm::{
    rmap_item::{ItemBox, ItemWord},
    seen::SeenPage,
};
use proptest::prelude::*;

fn item(of: Sample, note: u32) -> ItemBox {
    ItemBox::new(of, note, GFP_SCAN).unwrap()
}

fn node(key: StableKey) -> NodeBox {
    NodeBox::new(key, GFP_SCAN).unwrap()
}

const KEY: StableKey = StableKey {
    sum: Checksum::unknown(Sample::from_raw(9)),
    serial: 0,
};

proptest! {
    /// What is put into an entry comes out again.
    #[test]
    fn entries_keep_what_they_are_given(raw: u32, count in 0..11u64, full: u64, second in 0..512u32) {
        let of = Sample::from_raw(raw);
        let strikes = Strikes::from_raw(count);
        let sum = Checksum::new(of, full);
        let probation = Probation::new(strikes, Print::of(sum), second);
        for entry in [PageEntry::seen_on(of, probation), PageEntry::steady_on(of, probation)] {
            prop_assert_eq!(entry.sample(), of);
            prop_assert_eq!(entry.strikes(), strikes);
            prop_assert_eq!(entry.probation(), Some(probation));
            prop_assert_eq!(entry.merged_in(), None);
        }
        let entry = PageEntry::unstable(sum, strikes);
        prop_assert!(matches!(entry.state(), PageState::Unstable(found) if found == sum));
        prop_assert_eq!((entry.sample(), entry.strikes()), (of, strikes));
        prop_assert_eq!(entry.probation(), None);
    }

    /// An entry matches a page only if the page is as the entry says, and has nothing to wait for.
    #[test]
    fn steady_entries_match_their_sample(raw in 0..3u32, other in 0..3u32, count in 0..2u64) {
        let (of, page) = (Sample::from_raw(raw), SeenPage::anon(0x1000, Sample::from_raw(other)));
        let probation = Probation::new(Strikes::from_raw(count), Print::UNKNOWN, 0);
        prop_assert_eq!(
            PageEntry::steady_on(of, probation).matches(page),
            raw == other && count == 0
        );
        prop_assert!(!PageEntry::seen(of).matches(page));
        prop_assert!(!PageEntry::unstable(Checksum::unknown(of), Strikes::NONE).matches(page));
        prop_assert!(!PageEntry::merged(item(of, 0)).matches(page));
        prop_assert!(!PageEntry::steady(of).matches(SeenPage::ksm(0x1000, None)));
    }
}

#[test]
fn merged_entries_match_their_node() {
    let (node, other) = (node(KEY), node(KEY));
    let listed = item(sample(1), 0);
    node.link(&listed);
    let mut entry = PageEntry::merged(listed);
    let page = |node: &NodeBox| SeenPage::ksm(0x1000, node.id());
    assert!(entry.matches(page(&node)) && !entry.matches(page(&other)));
    assert!(!entry.matches(SeenPage::ksm(0x1000, None)));
    assert_eq!(entry.listed_with(node.id().unwrap()), Some((KEY, 1)));
    assert_eq!(entry.listed_with(other.id().unwrap()), None);
    // The page is freed, and with it the node. The entry is not that of a page without a node, either.
    node.test_page().set(TestPage {
        gone: true,
        ..node.test_page().get()
    });
    assert!(node.release().is_ok());
    assert!(matches!(entry.state(), PageState::Merged(None)));
    assert!(!entry.matches(SeenPage::ksm(0x1000, None)));
    assert!(entry.take_item().is_some());
    assert!(entry.take_item().is_none());
    assert!(matches!(entry.state(), PageState::Seen(of) if of == sample(1)));
}

#[test]
fn items_keep_their_notes() {
    let item = item(sample(3), 0xffff_fff5);
    assert_eq!((item.sample(), item.note()), (sample(3), 0xffff_fff5));
    item.set_note(7);
    assert_eq!((item.sample(), item.note()), (sample(3), 7));
}

#[test]
fn words_free_their_items_once() {
    let before = live();
    drop(ItemWord::of_item(item(sample(1), 0)));
    assert_eq!(live(), before);
    let mut word = ItemWord::of_item(item(sample(1), 0));
    assert_eq!(word.item().unwrap().sample(), sample(1));
    let taken = word.replace(ItemWord::new::<1>(!0)).unwrap();
    assert_eq!(word.get(), !0 << 3 | 1);
    assert!(word.item().is_none());
    assert!(word.replace(ItemWord::of_item(taken)).is_none());
    drop(word);
    assert_eq!(live(), before);
}

/// The kernel still finds a listed item, so it must not be freed.
#[test]
fn a_listed_item_is_leaked_and_that_is_logged() {
    let node = node(KEY);
    let (before, logged) = (live(), errors());
    let listed = item(sample(1), 0);
    node.link(&listed);
    drop(PageEntry::merged(listed));
    assert_eq!(errors(), logged + 1);
    assert_eq!(live().allocations, before.allocations + 1);
    assert_eq!(node.items(), 1);
    node.test_page().set(TestPage {
        gone: true,
        ..node.test_page().get()
    });
}

/// Leaves with such pages are not skipped.
#[test]
fn merged_pages_and_seen_pages_on_probation_are_watched() {
    let probation = Probation::new(Strikes::from_raw(1), Print::UNKNOWN, 0);
    let of = sample(1);
    let plain = || {
        [
            PageEntry::seen(of),
            PageEntry::steady(of),
            PageEntry::steady_on(of, probation),
            PageEntry::unstable(unknown(1), Strikes::from_raw(1)),
        ]
    };
    assert!(!PageEntry::any_is_watched(&plain()));
    for watched in [
        PageEntry::merged(item(of, 0)),
        PageEntry::seen_on(of, probation),
    ] {
        // In the second chunk, and the last of it.
        let mut entries: std::vec::Vec<_> = (0..6).flat_map(|_| plain()).collect();
        assert!(!PageEntry::any_is_watched(&entries));
        entries.push(watched);
        assert!(PageEntry::any_is_watched(&entries));
    }
}
