// SPDX-License-Identifier: GPL-2.0

//! Tests of the states of a page, one transition each.

use super::*;

const HERE: PageAddr = PageAddr {
    mm_id: 1,
    addr: ADDRS[0],
};
const THERE: PageAddr = PageAddr {
    mm_id: 2,
    addr: ADDRS[3],
};

fn is_steady(kind: Option<CandidateKind>, content: u32, is_on_probation: bool) -> bool {
    match kind {
        Some(CandidateKind::Steady(of, Check::Probation)) => {
            of == sample(content) && is_on_probation
        }
        Some(CandidateKind::Steady(of, Check::None)) => of == sample(content) && !is_on_probation,
        _ => false,
    }
}

/// Gives the page an entry with this probation.
fn set(world: &mut World, place: PageAddr, new: PageEntry) {
    let (Some(entry), core) = world.state.entry(place) else {
        panic!("{place:?} is not tracked");
    };
    core.replace(place, entry, new);
}

fn on_probation(count: u64, now: u32) -> Probation {
    Probation::new(Strikes::from_raw(count), Print::of(sum(1, 1)), now)
}

#[test]
fn a_page_is_seen_then_steady() {
    let mut world = World::new();
    assert!(world.see(HERE, 1).is_none());
    assert_eq!(world.show(HERE), Shown::Seen(sample(1)));
    let mut leaf = idle();
    let kind = world.visit(HERE, Seen::Anon(sample(1)), &mut leaf);
    // No other page has the sample.
    assert!(kind.is_none() && leaf.changed);
    assert_eq!(world.show(HERE), Shown::Steady(sample(1)));
    world.end();
}

#[test]
fn two_pages_with_a_sample_are_candidates_when_they_are_steady() {
    let mut world = World::new();
    world.see(HERE, 1);
    assert!(world.see(THERE, 1).is_none());
    assert!(is_steady(world.see(HERE, 1), 1, false));
    assert!(is_steady(world.see(THERE, 1), 1, false));
    world.end();
}

#[test]
fn a_steady_page_is_only_retried_on_request() {
    let mut world = World::new();
    world.steady(HERE, 1);
    world.steady(THERE, 1);
    let seen = Seen::Anon(sample(1));
    let mut leaf = idle();
    assert!(world.visit(HERE, seen, &mut leaf).is_none());
    assert!(is_steady(
        world.visit(HERE, seen, &mut retrying()),
        1,
        false
    ));
    assert!(!leaf.changed);
    world.end();
}

#[test]
fn other_content_makes_a_page_seen() {
    let mut world = World::new();
    world.steady(HERE, 1);
    world.steady(THERE, 2);
    let mut leaf = retrying();
    let kind = world.visit(HERE, Seen::Anon(sample(2)), &mut leaf);
    assert!(kind.is_none() && leaf.changed);
    assert_eq!(world.show(HERE), Shown::Seen(sample(2)));
    assert_eq!((world.strikes(HERE), leaf.quick_cow_breaks), (0, 0));
    world.end();
}

#[test]
fn a_page_on_probation_waits_until_it_is_due() {
    let mut world = World::new();
    world.see(HERE, 1);
    world.steady(THERE, 1);
    let entry = PageEntry::seen_on(sample(1), on_probation(8, FIRST_SECOND));
    set(&mut world, HERE, entry);
    // Eight strikes take 16 seconds.
    for (second, is_due) in [(101, false), (109, false), (115, false), (116, true)] {
        world.begin_pass(second);
        let mut leaf = retrying();
        let kind = world.visit(HERE, Seen::Anon(sample(1)), &mut leaf);
        assert_eq!(is_steady(kind, 1, true), is_due, "second {second}");
        // The merge compares the checksum first.
        assert_eq!(world.show(HERE), Shown::Seen(sample(1)));
        assert!(!leaf.changed);
    }
    world.end();
}

#[test]
fn without_an_equal_the_end_of_probation_is_not_checked() {
    let mut world = World::new();
    world.see(HERE, 1);
    let entry = PageEntry::seen_on(sample(1), on_probation(8, FIRST_SECOND));
    set(&mut world, HERE, entry);
    world.begin_pass(FIRST_SECOND + 16);
    let mut leaf = retrying();
    let kind = world.visit(HERE, Seen::Anon(sample(1)), &mut leaf);
    assert!(kind.is_none() && leaf.changed);
    assert_eq!(world.show(HERE), Shown::Steady(sample(1)));
    assert_eq!(world.strikes(HERE), 8);
    // It is still checked when there is one.
    world.steady(THERE, 1);
    assert!(is_steady(world.see(HERE, 1), 1, true));
    world.end();
}

#[test]
fn a_refresh_takes_a_strike_off_a_steady_page() {
    let mut world = World::new();
    world.see(HERE, 1);
    let entry = PageEntry::steady_on(sample(1), on_probation(2, FIRST_SECOND));
    set(&mut world, HERE, entry);
    for left in [1, 0, 0] {
        world.visit(HERE, Seen::Anon(sample(1)), &mut refreshing());
        assert_eq!(world.strikes(HERE), left);
        assert_eq!(world.show(HERE), Shown::Steady(sample(1)));
    }
    world.end();
}

#[test]
fn a_queued_page_waits() {
    let mut world = World::new();
    world.steady(HERE, 1);
    world.state.unstable_insert(HERE, sum(1, 1));
    let mut leaf = retrying();
    let kind = world.visit(HERE, Seen::Anon(sample(1)), &mut leaf);
    assert!(kind.is_none() && !leaf.changed);
    assert_eq!(world.show(HERE), Shown::Unstable(sum(1, 1)));
    world.end();
}

#[test]
fn a_page_replaces_the_one_queued_before() {
    let mut world = World::new();
    world.steady(HERE, 1);
    world.steady(THERE, 1);
    world.state.unstable_insert(HERE, sum(1, 1));
    world.check();
    world.state.unstable_insert(THERE, sum(1, 1));
    assert_eq!(world.show(HERE), Shown::Steady(sample(1)));
    assert_eq!(world.show(THERE), Shown::Unstable(sum(1, 1)));
    // Its checksum is remembered, so it merges only if that holds.
    assert!(is_steady(world.see(HERE, 1), 1, true));
    world.check();
    world.state.unstable_insert(THERE, sum(1, 2));
    assert_eq!(world.state.core.unstable.lookup(sum(1, 1)), None);
    world.end();
}

#[test]
fn a_queued_page_that_changes_leaves_the_tree() {
    let mut world = World::new();
    world.steady(HERE, 1);
    world.state.unstable_insert(HERE, sum(1, 1));
    let mut leaf = retrying();
    world.visit(HERE, Seen::Anon(sample(2)), &mut leaf);
    assert!(leaf.changed);
    assert_eq!(world.show(HERE), Shown::Seen(sample(2)));
    assert_eq!(world.state.core.unstable.len(), 0);
    world.end();
}

#[test]
fn a_refresh_checks_whether_a_queued_page_has_changed() {
    let mut world = World::new();
    world.steady(HERE, 1);
    world.state.unstable_insert(HERE, sum(1, 1));
    let mut leaf = refreshing();
    let kind = world.visit(HERE, Seen::Anon(sample(1)), &mut leaf);
    let Some(CandidateKind::Steady(of, Check::Queued(queued))) = kind else {
        panic!("it is no candidate");
    };
    assert_eq!((of, queued), (sample(1), sum(1, 1)));
    assert_eq!(world.show(HERE), Shown::Unstable(sum(1, 1)));
    world.end();
}

#[test]
fn a_refresh_queues_a_page_without_a_checksum_again() {
    let mut world = World::new();
    world.steady(HERE, 1);
    world.steady(THERE, 1);
    // With a KSM page that is like it, it has somewhere to go.
    world.see(PageAddr { mm_id: 1, ..THERE }, 1);
    let key = world
        .publish(PageAddr { mm_id: 1, ..THERE }, sum(1, 1))
        .unwrap();
    world.state.unstable_insert(HERE, unknown(1));
    let mut leaf = refreshing();
    let kind = world.visit(HERE, Seen::Anon(sample(1)), &mut leaf);
    assert!(is_steady(kind, 1, false) && !leaf.changed);
    assert_eq!(world.show(HERE), Shown::Steady(sample(1)));
    world.check();
    // Without one, it stays.
    world.set_page(key, |page| page.gone = true);
    world.state.core.release(key);
    world.state.unstable_insert(HERE, unknown(1));
    let kind = world.visit(HERE, Seen::Anon(sample(1)), &mut refreshing());
    assert!(kind.is_none());
    assert_eq!(world.show(HERE), Shown::Unstable(unknown(1)));
    world.end();
}

#[test]
fn a_queued_page_that_may_be_zero_is_a_candidate() {
    let mut world = World::new();
    let zero = world.hasher.zeroes().iter().next().unwrap();
    let seen = Seen::Anon(zero);
    world.visit(HERE, seen, &mut retrying());
    world.visit(HERE, seen, &mut retrying());
    world.state.unstable_insert(HERE, Checksum::new(zero, 1));
    assert!(world.visit(HERE, seen, &mut retrying()).is_none());
    world.use_zero_page(true);
    let kind = world.visit(HERE, seen, &mut retrying());
    assert!(matches!(kind, Some(CandidateKind::Zero)));
    world.check();
    world.use_zero_page(false);
    assert!(world.visit(HERE, seen, &mut retrying()).is_none());
    world.end();
}

/// With `use_zero_pages`, a single page of zeroes has an equal: the zero page.
#[test]
fn the_filter_counts_the_zero_page_while_it_is_used() {
    let mut world = World::new();
    let zero = world.hasher.zeroes().iter().next().unwrap();
    for on in [false, true, true, false, false] {
        world.use_zero_page(on);
        assert_eq!(world.state.core.filter.has_two(zero), on);
    }
    world.end();
}

#[test]
fn a_merged_page_stays_merged() {
    let mut world = World::new();
    world.steady(HERE, 1);
    let key = world.publish(HERE, sum(1, 1)).unwrap();
    let node = Some(world.id(key));
    let mut leaf = refreshing();
    assert!(world.visit(HERE, Seen::Ksm(node), &mut leaf).is_none());
    assert!(!leaf.changed);
    assert_eq!(world.show(HERE), Shown::Merged(node));
    world.set_page(key, |page| page.gone = true);
    world.end();
}

#[test]
fn a_write_soon_after_a_merge_is_a_strike() {
    let mut world = World::new();
    world.steady(HERE, 1);
    let key = world.publish(HERE, sum(1, 1)).unwrap();
    world.begin_pass(FIRST_SECOND + 1);
    let mut leaf = idle();
    let kind = world.visit(HERE, Seen::Anon(sample(2)), &mut leaf);
    // With few strikes, its checksum is computed now, so that it may merge in the next pass.
    assert!(is_steady(kind, 2, true));
    assert_eq!((leaf.changed, leaf.quick_cow_breaks), (true, 1));
    assert_eq!(world.show(HERE), Shown::Seen(sample(2)));
    assert_eq!(world.strikes(HERE), 1);
    // The node has lost its last mapping.
    assert_eq!(world.state.core.index.orphans_len(), 1);
    world.set_page(key, |page| page.gone = true);
    world.end();
}

#[test]
fn a_write_that_the_sample_does_not_show_counts_double() {
    let mut world = World::new();
    world.steady(HERE, 1);
    let key = world.publish(HERE, sum(1, 1)).unwrap();
    world.begin_pass(FIRST_SECOND + 1);
    world.see(HERE, 1);
    assert_eq!(world.strikes(HERE), 2);
    world.set_page(key, |page| page.gone = true);
    world.end();
}

#[test]
fn a_write_long_after_a_merge_is_none() {
    let mut world = World::new();
    world.steady(HERE, 1);
    let key = world.publish(HERE, sum(1, 1)).unwrap();
    for second in 1..=5 {
        world.begin_pass(FIRST_SECOND + second);
    }
    let mut leaf = idle();
    let kind = world.visit(HERE, Seen::Anon(sample(2)), &mut leaf);
    assert!(kind.is_none());
    assert_eq!((leaf.changed, leaf.quick_cow_breaks), (true, 0));
    assert_eq!(world.strikes(HERE), 0);
    world.set_page(key, |page| page.gone = true);
    world.end();
}

#[test]
fn strikes_outlive_a_merge() {
    let mut world = World::new();
    world.see(HERE, 1);
    let entry = PageEntry::steady_on(sample(1), on_probation(3, FIRST_SECOND));
    set(&mut world, HERE, entry);
    let key = world.publish(HERE, sum(1, 1)).unwrap();
    assert_eq!(world.strikes(HERE), 3);
    world.begin_pass(FIRST_SECOND + 1);
    world.see(HERE, 2);
    assert_eq!(world.strikes(HERE), 4);
    world.set_page(key, |page| page.gone = true);
    world.end();
}

/// While another task has the merged page locked, its item cannot be taken off.
#[test]
fn a_write_to_a_page_that_is_locked_is_noticed_later() {
    let mut world = World::new();
    world.steady(HERE, 1);
    let key = world.publish(HERE, sum(1, 1)).unwrap();
    let node = Some(world.id(key));
    world.set_page(key, |page| page.locked = true);
    let mut leaf = idle();
    world.visit(HERE, Seen::Anon(sample(2)), &mut leaf);
    assert_eq!((leaf.changed, leaf.quick_cow_breaks), (false, 0));
    assert_eq!(world.show(HERE), Shown::Merged(node));
    assert!(!world.state.forget(HERE));
    world.check();
    world.set_page(key, |page| page.locked = false);
    world.visit(HERE, Seen::Anon(sample(2)), &mut leaf);
    assert_eq!((leaf.changed, leaf.quick_cow_breaks), (true, 1));
    assert_eq!(world.show(HERE), Shown::Seen(sample(2)));
    world.set_page(key, |page| page.gone = true);
    world.end();
}

#[test]
fn a_write_to_the_last_mapping_of_a_freed_page_frees_the_node() {
    let mut world = World::new();
    world.steady(HERE, 1);
    world.steady(THERE, 1);
    let key = world.publish(HERE, sum(1, 1)).unwrap();
    assert!(world.merge(THERE, key).unwrap());
    world.set_page(key, |page| page.gone = true);
    world.see(HERE, 2);
    assert!(world.state.core.index.has_no_nodes());
    assert_eq!(world.show(HERE), Shown::Seen(sample(2)));
    // The item of the other page is off the list, too. The scan comes by there later.
    assert_eq!(world.show(THERE), Shown::Merged(None));
    world.check();
    world.see(THERE, 2);
    assert_eq!(world.show(THERE), Shown::Seen(sample(2)));
    world.end();
}

#[test]
fn a_page_of_another_node_is_to_be_listed() {
    let mut world = World::new();
    world.steady(HERE, 1);
    world.steady(THERE, 1);
    let key = world.publish(HERE, sum(1, 1)).unwrap();
    let node = world.id(key);
    let mut leaf = idle();
    let kind = world.visit(THERE, Seen::Ksm(Some(node)), &mut leaf);
    assert!(matches!(kind, Some(CandidateKind::Unlisted(id)) if id == node));
    assert!(!leaf.changed);
    world.set_page(key, |page| page.gone = true);
    world.end();
}

#[test]
fn a_page_whose_node_was_taken_off_is_unshared() {
    let mut world = World::new();
    world.steady(HERE, 1);
    let key = world.publish(HERE, sum(1, 1)).unwrap();
    world.set_page(key, |page| page.cleared = true);
    let mut leaf = idle();
    let kind = world.visit(HERE, Seen::Ksm(None), &mut leaf);
    assert!(matches!(kind, Some(CandidateKind::Ownerless)));
    assert!(leaf.changed);
    assert_eq!(world.show(HERE), Shown::Seen(sample(1)));
    assert!(world.state.core.index.has_no_nodes());
    world.end();
}

#[test]
fn a_full_node_has_room_again_when_a_mapping_goes() {
    let mut world = World::new();
    let places: std::vec::Vec<_> = world.places().take(4).collect();
    for &place in &places {
        world.steady(place, 1);
    }
    let key = world.publish(places[0], sum(1, 1)).unwrap();
    assert!(world.merge(places[1], key).unwrap());
    assert!(world.merge(places[2], key).unwrap());
    assert!(!world.merge(places[3], key).unwrap());
    assert!(world
        .state
        .core
        .index
        .next_stable(sum(1, 1), None)
        .is_none());
    world.check();
    assert!(world.state.forget(places[1]));
    assert_eq!(world.show(places[1]), Shown::Untracked);
    assert_eq!(
        world.state.core.index.next_stable(sum(1, 1), None),
        Some(key)
    );
    assert!(world.merge(places[3], key).unwrap());
    world.set_page(key, |page| page.gone = true);
    world.end();
}

#[test]
fn a_tracked_page_is_not_tracked_twice() {
    let mut world = World::new();
    world.see(HERE, 1);
    let mm = world.mms[0].mm();
    assert_eq!(world.state.remember(mm, HERE, sample(1)), Err(EEXIST));
    let place = PageAddr { mm_id: 1, ..THERE };
    let without = testing::failing(testing::Plan::Always, || {
        world.state.remember(mm, place, sample(1))
    });
    assert_eq!(without, Err(ENOMEM));
    world.end();
}

/// A queued page is only remembered with its place in the tree.
#[test]
fn without_memory_a_page_is_not_queued() {
    let mut world = World::new();
    world.steady(HERE, 1);
    testing::failing(testing::Plan::Always, || {
        world.state.unstable_insert(HERE, sum(1, 1))
    });
    assert_eq!(world.show(HERE), Shown::Steady(sample(1)));
    world.end();
}
