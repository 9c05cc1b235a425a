// SPDX-License-Identifier: GPL-2.0

//! Tests of the life of a stable node.

use super::*;
use crate::ksm::index::{Nodes, NodesLike, Released};

/// Makes a node with the first `count` places as its mappings.
fn node_with(world: &mut World, count: usize, sum: Checksum) -> StableKey {
    let places: std::vec::Vec<_> = world.places().take(count).collect();
    for &place in &places {
        let seen = Seen::Anon(sum.sample());
        world.visit(place, seen, &mut idle());
        world.visit(place, seen, &mut idle());
    }
    let key = world.publish(places[0], sum).unwrap();
    for &place in &places[1..] {
        assert!(world.merge(place, key).unwrap());
    }
    world.check();
    key
}

/// Makes a node without mappings, whose page is still there.
fn orphan(world: &mut World, sum: Checksum) -> StableKey {
    let key = node_with(world, 1, sum);
    let place = world.places().next().unwrap();
    assert!(world.state.forget(place));
    assert_eq!(world.state.core.index.orphans_len(), 1);
    key
}

#[test]
fn a_node_in_use_is_not_released() {
    for count in 1..=3 {
        let mut world = World::new();
        let key = node_with(&mut world, count, sum(1, 1));
        world.state.core.release(key);
        assert_eq!(world.node(key).items(), count);
        world.check();
        world.set_page(key, |page| page.gone = true);
        world.state.core.release(key);
        assert!(world.state.core.index.has_no_nodes());
        assert_eq!(world.state.core.items, 0);
        world.end();
    }
}

#[test]
fn an_orphan_goes_when_its_page_is_free() {
    let mut world = World::new();
    let key = orphan(&mut world, sum(1, 1));
    let core = &mut world.state.core;
    core.sweep_orphans(10, false);
    assert_eq!(core.index.orphans_len(), 1, "its page is mapped");
    world.set_page(key, |page| {
        page.mapped = false;
        page.swapcache = true;
    });
    world.state.core.sweep_orphans(10, false);
    assert_eq!(world.state.core.index.orphans_len(), 1, "in the swap cache");
    world.set_page(key, |page| {
        page.swapcache = false;
        page.locked = true;
    });
    world.state.core.sweep_orphans(10, true);
    assert_eq!(world.state.core.index.orphans_len(), 1, "locked");
    world.set_page(key, |page| page.locked = false);
    world.state.core.sweep_orphans(10, false);
    assert!(world.state.core.index.has_no_nodes());
    world.end();
}

#[test]
fn by_force_an_orphan_goes_with_its_page_mapped() {
    let mut world = World::new();
    let key = orphan(&mut world, sum(1, 1));
    let page = world.node(key).test_page();
    world.state.core.sweep_orphans(10, true);
    assert!(world.state.core.index.has_no_nodes());
    assert!(page.get().cleared && page.get().mapped);
    world.end();
}

/// Only pages that no process maps go before a setting changes.
#[test]
fn unused_orphans_go() {
    let mut world = World::new();
    let key = orphan(&mut world, sum(1, 1));
    assert!(!world.state.core.release_unused());
    world.set_page(key, |page| {
        page.mapped = false;
        page.swapcache = true;
    });
    assert!(world.state.core.release_unused());
    world.end();
}

#[test]
fn a_node_with_mappings_is_no_orphan() {
    let mut world = World::new();
    let key = node_with(&mut world, 2, sum(1, 1));
    world.set_page(key, |page| page.mapped = false);
    world.state.core.try_free_orphan(key, true);
    assert_eq!(world.node(key).items(), 2);
    world.set_page(key, |page| page.gone = true);
    world.end();
}

#[test]
fn stale_nodes_of_both_trees_are_released() {
    let mut world = World::new();
    let full = node_with(&mut world, 3, sum(1, 1));
    let places: std::vec::Vec<_> = world.places().skip(3).take(2).collect();
    for &place in &places {
        world.see(place, 2);
    }
    let stable = world.publish(places[0], sum(2, 1)).unwrap();
    let kept = world.publish(places[1], sum(2, 2)).unwrap();
    for key in [full, stable] {
        world.set_page(key, |page| page.gone = true);
    }
    let mut at = Some(Released::nothing());
    while let Some(from) = at {
        at = world.state.core.release_some_stale(from);
    }
    assert_eq!(world.nodes(), [kept]);
    world.check();
    world.set_page(kept, |page| page.gone = true);
    world.end();
}

/// Only pruning comes by stale nodes of the full tree.
#[test]
fn full_nodes_are_pruned_when_they_are_stale() {
    let mut world = World::new();
    let key = node_with(&mut world, 3, sum(1, 1));
    world.state.core.prune_after(0);
    assert_eq!(world.nodes(), [key]);
    world.set_page(key, |page| page.gone = true);
    // The last search began a moment ago.
    world.state.core.prune_after(u32::MAX);
    assert_eq!(world.nodes(), [key]);
    world.state.core.prune_after(0);
    assert!(world.state.core.index.has_no_nodes());
    world.end();
}

#[test]
fn a_locked_orphan_is_waited_for() {
    let mut world = World::new();
    let key = orphan(&mut world, sum(1, 1));
    world.set_page(key, |page| page.locked = true);
    assert_eq!(world.state.core.see_unlocked(None), Err(None));
    world.set_page(key, |page| page.locked = false);
    assert_eq!(world.state.core.see_unlocked(None), Ok(None));
    world.set_page(key, |page| page.gone = true);
    world.end();
}

/// With the key, the samples of the mappings change, which the filter counts.
#[test]
fn a_node_gets_another_key_with_its_mappings() {
    for count in [1, 3] {
        let mut world = World::new();
        let key = node_with(&mut world, count, sum(1, 1));
        world.state.core.rekey(key, sum(2, 1)).unwrap();
        let [new] = world.nodes()[..] else {
            panic!("one node");
        };
        assert_eq!(new.sum, sum(2, 1));
        assert_eq!(world.state.core.filter.has_two(sample(2)), count > 1);
        world.check();
        let without = testing::failing(testing::Plan::Always, || {
            world.state.core.rekey(new, sum(3, 1))
        });
        assert_eq!(without, Err(ENOMEM));
        world.check();
        world.set_page(new, |page| page.gone = true);
        world.end();
    }
}

#[test]
fn missing_checksums_are_computed() {
    let mut world = World::new();
    let places: std::vec::Vec<_> = world.places().take(4).collect();
    for &place in &places {
        world.see(place, 1);
    }
    let known = world.publish(places[0], unknown(1)).unwrap();
    let stale = world.publish(places[1], unknown(1)).unwrap();
    let poisoned = world.publish(places[2], unknown(1)).unwrap();
    world.set_page(known, |page| page.sum = sum(1, 5));
    world.set_page(stale, |page| page.gone = true);
    world.set_page(poisoned, |page| page.poisoned = true);
    let hasher = Hasher::new([7; SEED_WORDS]);
    world.state.core.find_sums(&hasher, sample(1));
    let index = &world.state.core.index;
    assert!(index.nodes_with(unknown(1)).is_none());
    assert!(matches!(index.nodes_with(sum(1, 5)), Some(Nodes::One(_))));
    assert_eq!(index.nodes_like(sample(1)), NodesLike::Ambiguous);
    assert_eq!(world.nodes().len(), 2);
    world.check();
    world.free_all_pages();
    world.end();
}

#[test]
fn a_migrated_node_gets_the_sample_of_its_numa_node() {
    let mut world = World::new();
    let key = node_with(&mut world, 2, sum(1, 1));
    let hasher = Hasher::new([7; SEED_WORDS]);
    while !world.state.core.rekey_migrated_nodes(&hasher) {}
    assert_eq!(world.nodes(), [key]);
    world.set_page(key, |page| page.sum = sum(1, 1).with_sample(sample(4)));
    world.node(key).set_nid_changed();
    while !world.state.core.rekey_migrated_nodes(&hasher) {}
    let [new] = world.nodes()[..] else {
        panic!("one node");
    };
    assert_eq!(new.sum.sample(), sample(4));
    world.check();
    world.set_page(new, |page| page.gone = true);
    world.end();
}
