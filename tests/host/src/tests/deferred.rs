// SPDX-License-Identifier: GPL-2.0

//! Tests of `ksm/deferred.rs`.

use crate::ksm::deferred::Deferred;

/// They come out in the order in which they went in. Those beyond the limit are dropped.
#[test]
fn first_in_first_out() {
    let mut deferred = Deferred::new();
    assert_eq!(deferred.pop(), None);
    for nth in 0..100 {
        deferred.push(nth);
    }
    let all: Vec<_> = std::iter::from_fn(|| deferred.pop()).collect();
    assert!(all.len() > 1 && all.len() < 100);
    assert!(all.iter().copied().eq(0..all.len()));
    deferred.push(7);
    assert_eq!(deferred.pop(), Some(7));
}

/// It is time to wait once each was tried in vain, not before. Each round tries all of them.
#[test]
fn waits_after_a_round() {
    let mut deferred = Deferred::new();
    (0..3).for_each(|nth| deferred.push(nth));
    for _ in 0..2 {
        for nth in 0..3 {
            let place = deferred.pop().unwrap();
            assert_eq!(place, nth);
            assert_eq!(deferred.put_back(place), nth == 2);
        }
    }
    // One of them can be locked, so retry the others first.
    deferred.pop().unwrap();
    deferred.note_locked();
    let next = deferred.pop().unwrap();
    assert!(!deferred.put_back(next));
    let next = deferred.pop().unwrap();
    assert!(deferred.put_back(next));
}

/// A lock that is never released does not keep the pass from ending.
#[test]
fn ends_some_time() {
    let mut deferred = Deferred::new();
    deferred.push(1);
    let mut rounds = 0;
    while let Some(place) = deferred.pop() {
        assert!(deferred.put_back(place));
        rounds += 1;
        assert!(rounds < 1000);
    }
    assert!(rounds > 3);
}
