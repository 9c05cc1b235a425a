// SPDX-License-Identifier: GPL-2.0

//! All interleavings of several agents at a time, with the protocol as it is and with mutations.

use super::{Mutation, Protocol, A, B, C};
use stateright::{Checker, Model};

const ONLY_SCAN: Protocol = Protocol {
    mutation: Mutation::None,
    merges: (B, A),
    store: [false; 3],
    fork: false,
    exit: false,
    device: false,
    migrate: None,
};

/// The same, but the child's page becomes the KSM page.
fn child_first(protocol: Protocol) -> Protocol {
    Protocol {
        merges: (C, B),
        ..protocol
    }
}

/// The agents besides the scan, in each run: as many at a time as take seconds to check. With
/// `RKSM_MODEL=all`, all of them together, which takes long.
fn configurations() -> Vec<Protocol> {
    let none = [false; 3];
    let both = [true, true, false];
    let all = [true; 3];
    let of = |store, fork, exit, device, migrate| Protocol {
        store,
        fork,
        exit,
        device,
        migrate,
        ..ONLY_SCAN
    };
    if std::env::var("RKSM_MODEL").is_ok_and(|what| what == "all") {
        return [None, Some(A), Some(B)]
            .into_iter()
            .flat_map(|m| [of(all, true, true, true, m), of(both, false, true, true, m)])
            .flat_map(|protocol| match protocol.fork {
                true => vec![protocol, child_first(protocol)],
                false => vec![protocol],
            })
            .collect();
    }
    vec![
        of(both, false, false, false, None),
        of(all, true, false, false, None),
        of([true, false, true], true, true, false, None),
        of(both, false, true, true, None),
        of([true, false, false], true, false, true, None),
        of(both, false, false, false, Some(A)),
        of(both, false, true, false, Some(B)),
        of([true, false, false], false, false, true, Some(A)),
        of(none, true, true, false, Some(A)),
        of([true, false, false], true, false, false, Some(B)),
        child_first(of(all, true, false, false, None)),
        child_first(of([true, false, false], true, true, true, None)),
        child_first(of([true, false, true], true, false, false, Some(A))),
        child_first(of(none, true, true, false, Some(C))),
    ]
}

/// Return the names of the violated properties and the number of states.
fn check(model: Protocol) -> (Vec<&'static str>, usize) {
    let checker = model.checker().spawn_dfs().join();
    let broken = checker
        .discoveries()
        .into_iter()
        .filter(|(name, _)| !checker.discovery_classification(name).is_example())
        .map(|(name, path)| {
            println!("{name}:\n{path}");
            name
        })
        .collect();
    (broken, checker.unique_state_count())
}

trait IsExample {
    fn is_example(&self) -> bool;
}

impl IsExample for stateright::DiscoveryClassification {
    fn is_example(&self) -> bool {
        matches!(self, Self::Example)
    }
}

#[test]
fn no_interleaving_loses_a_write() {
    let mut all = 0;
    for model in configurations() {
        let (broken, states) = check(model);
        println!("{states} states: {model:?}");
        assert!(broken.is_empty(), "{model:?}: {broken:?}");
        all += states;
    }
    println!("{all} states");
}

#[test]
fn left_alone_equal_pages_merge() {
    let checker = ONLY_SCAN.checker().spawn_dfs().join();
    assert!(checker.discovery("the pages merge").is_some());
    assert!(checker
        .discovery("the scan ends with nothing merged")
        .is_none());
}

fn found(mutation: Mutation, what: &str) {
    let found = configurations().into_iter().any(|model| {
        let model = Protocol { mutation, ..model };
        // Some mutations end in the model's own assertions, as the kernel's would.
        let checked = std::panic::catch_unwind(|| check(model).0);
        checked.map_or(what == "panic", |broken| broken.contains(&what))
    });
    assert!(found, "{mutation:?} was not found");
}

const READS: &str = "every process reads what it wrote last";

#[test]
fn ignoring_other_holders_is_found() {
    found(Mutation::IgnoreHolders, READS);
}

#[test]
fn counting_holders_before_clearing_is_found() {
    found(Mutation::HoldersFirst, READS);
}

#[test]
fn comparing_before_clearing_is_found() {
    found(Mutation::CompareFirst, READS);
}

#[test]
fn not_flushing_is_found() {
    found(Mutation::NoFlush, READS);
}

#[test]
fn leaving_a_merged_page_writable_is_found() {
    found(
        Mutation::StaysWritable,
        "no process may write to a merged page",
    );
}

#[test]
fn listing_a_mapping_late_is_found() {
    found(
        Mutation::ListLate,
        "a walk finds all mappings of a merged page",
    );
}

#[test]
fn freeing_a_node_early_is_found() {
    found(
        Mutation::FreeEarly,
        "no page points at a node that was freed",
    );
}

#[test]
fn trusting_a_stale_node_is_found() {
    found(Mutation::TrustNode, READS);
}

#[test]
fn publishing_in_the_middle_of_a_fork_is_found() {
    found(
        Mutation::MergeDuringFork,
        "no process may write to a merged page",
    );
}

#[test]
fn not_finding_the_parent_is_found() {
    found(
        Mutation::OwnSharersOnly,
        "a walk finds all mappings of a merged page",
    );
}

#[test]
fn taking_a_relatives_mapping_for_ones_own_is_found() {
    found(
        Mutation::CountLate,
        "a walk finds all mappings of a merged page",
    );
}
