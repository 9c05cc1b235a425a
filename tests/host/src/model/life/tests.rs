// SPDX-License-Identifier: GPL-2.0

//! All interleavings of several agents at a time, with the protocol as it is and with mutations.

use super::{Mutation, Protocol, State, A, B, C};
use stateright::{Checker, HasDiscoveries, Model};

const ONLY_SCAN: Protocol = Protocol {
    mutation: Mutation::None,
    old: false,
    born: false,
    fork: false,
    run_two: false,
    exit: None,
    write: None,
    protect: None,
    opt_out: None,
    migrate: false,
    reclaim: false,
    swap_in: None,
    hold: None,
    pin: None,
};

/// The agents besides the scan, in each run.
fn configurations() -> Vec<Protocol> {
    let family = Protocol {
        born: true,
        ..ONLY_SCAN
    };
    let forks = Protocol {
        fork: true,
        ..ONLY_SCAN
    };
    vec![
        ONLY_SCAN,
        family,
        // Failing faults.
        Protocol {
            run_two: true,
            protect: Some(A),
            write: Some(B),
            ..ONLY_SCAN
        },
        Protocol {
            run_two: true,
            protect: Some(C),
            opt_out: Some(C),
            ..forks
        },
        Protocol {
            protect: Some(B),
            pin: Some(A),
            write: Some(B),
            migrate: true,
            ..ONLY_SCAN
        },
        Protocol {
            protect: Some(C),
            opt_out: Some(C),
            exit: Some(B),
            ..family
        },
        Protocol {
            protect: Some(C),
            opt_out: Some(C),
            write: Some(A),
            ..forks
        },
        Protocol {
            opt_out: Some(A),
            exit: Some(C),
            run_two: true,
            ..family
        },
        // Skipped leaves.
        Protocol {
            old: true,
            exit: Some(C),
            write: Some(B),
            ..family
        },
        Protocol {
            old: true,
            write: Some(B),
            migrate: true,
            ..family
        },
        Protocol {
            reclaim: true,
            swap_in: Some(A),
            write: Some(B),
            ..ONLY_SCAN
        },
        Protocol {
            reclaim: true,
            swap_in: Some(C),
            ..forks
        },
        // Unavailable locks.
        Protocol {
            hold: Some((A, false)),
            migrate: true,
            write: Some(B),
            ..family
        },
        Protocol {
            hold: Some((B, true)),
            write: Some(A),
            ..family
        },
        Protocol {
            hold: Some((A, true)),
            exit: Some(C),
            ..family
        },
        Protocol {
            migrate: true,
            reclaim: true,
            write: Some(A),
            exit: Some(B),
            ..ONLY_SCAN
        },
        // Exiting address spaces.
        Protocol {
            exit: Some(B),
            pin: Some(A),
            run_two: true,
            ..ONLY_SCAN
        },
        Protocol {
            exit: Some(A),
            pin: Some(A),
            migrate: true,
            hold: Some((A, false)),
            ..ONLY_SCAN
        },
        Protocol {
            exit: Some(A),
            pin: Some(B),
            ..ONLY_SCAN
        },
        // `run=2`.
        Protocol {
            run_two: true,
            reclaim: true,
            swap_in: Some(A),
            migrate: true,
            ..ONLY_SCAN
        },
        Protocol {
            run_two: true,
            write: Some(B),
            migrate: true,
            ..forks
        },
    ]
}

/// Return the names of the violated properties and the number of states. With `sought`, stop once that
/// property is violated.
fn check(model: Protocol, sought: Option<&'static str>) -> (Vec<&'static str>, usize) {
    let enough = match sought {
        Some(name) => HasDiscoveries::AnyOf([name].into()),
        None => HasDiscoveries::All,
    };
    let checker = model.checker().finish_when(enough).spawn_dfs().join();
    let broken = checker
        .discoveries()
        .into_iter()
        .filter(|(name, _)| {
            let found = checker.discovery_classification(name);
            matches!(found, stateright::DiscoveryClassification::Counterexample)
        })
        .map(|(name, path)| {
            println!("{name}:");
            for (state, agent) in path.into_vec() {
                println!("  {}", sketch(&state));
                println!("{agent:?}");
            }
            name
        })
        .collect();
    (broken, checker.unique_state_count())
}

/// Describe a state in one line.
fn sketch(s: &State) -> String {
    let each = s.processes.map(|p| {
        format!(
            "{:?}/{:?}{}{}",
            p.entry,
            p.word,
            if p.skips != 0 { " skipped" } else { "" },
            if p.due { " due" } else { "" }
        )
    });
    format!(
        "{:?} {:?}, items {:?}, lock {:?}: {}",
        s.scan,
        s.run_two,
        s.node.items,
        s.node.lock,
        each.join(", ")
    )
}

#[test]
fn no_interleaving_loses_a_mapping() {
    let mut all = 0;
    for model in configurations() {
        let (broken, states) = check(model, None);
        println!("{states} states: {model:?}");
        assert!(broken.is_empty(), "{model:?}: {broken:?}");
        all += states;
    }
    println!("{all} states");
}

#[test]
fn left_alone_all_equal_pages_merge() {
    let family = Protocol {
        born: true,
        ..ONLY_SCAN
    };
    for model in [ONLY_SCAN, family] {
        let checker = model.checker().spawn_dfs().join();
        assert!(checker.discovery("pages merge").is_some());
        assert!(checker.discovery("nothing is merged in the end").is_none());
    }
}

fn found(mutation: Mutation, what: &'static str) {
    let found = configurations().into_iter().any(|model| {
        let model = Protocol { mutation, ..model };
        check(model, Some(what)).0.contains(&what)
    });
    assert!(found, "{mutation:?} was not found");
}

const LISTED: &str = "a mapping is listed after a pass";
const KEEPS: &str = "a page that could not be unmerged keeps its item";
const LEAVES: &str = "no node leaves a page that is mapped";
const GONE: &str = "an exited process maps nothing";

#[test]
fn taking_a_fault_that_failed_for_a_copy_is_found() {
    found(Mutation::UndoTrustsFault, KEEPS);
    found(Mutation::RunTwoTrustsFault, KEEPS);
    found(Mutation::RunTwoTrustsFault, LEAVES);
    found(Mutation::RunTwoTrustsFault, "run=2 tells the truth");
}

#[test]
fn walking_mergeable_areas_only_is_found() {
    found(Mutation::ScanMergeableOnly, LISTED);
    found(Mutation::ScanKeepsListed, LISTED);
    found(Mutation::RunTwoMergeableOnly, LEAVES);
}

#[test]
fn not_waiting_for_a_swap_in_is_found() {
    found(Mutation::RunTwoIgnoresSwapIn, LEAVES);
}

#[test]
fn freeing_by_force_meanwhile_is_found() {
    found(Mutation::ForceMeanwhile, LEAVES);
}

#[test]
fn skipping_what_others_merged_is_found() {
    found(Mutation::SkipSharers, LISTED);
    found(Mutation::ForgetOwed, LISTED);
    found(Mutation::SkipSwapped, LISTED);
    found(
        Mutation::SkipMerged,
        "an item without a mapping goes after a pass",
    );
}

#[test]
fn forgetting_an_item_whose_lock_is_taken_is_found() {
    found(Mutation::LoseItem, "every item is remembered");
    found(Mutation::UnlinkUnlocked, "a list changes under its lock");
}

#[test]
fn waiting_for_what_a_process_holds_is_found() {
    found(Mutation::WaitForMmap, "no agent waits forever");
}

#[test]
fn faulting_without_users_is_found() {
    found(Mutation::UndoUnpinned, GONE);
    found(Mutation::RunTwoUnpinned, GONE);
}
