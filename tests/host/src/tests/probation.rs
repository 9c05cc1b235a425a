// SPDX-License-Identifier: GPL-2.0

//! Tests of how long a page that was written soon after it merged must stay unchanged.

use crate::hash::{Checksum, Sample};
use crate::ksm::probation::{is_soon, Clock, Print, Probation, Strikes, Verdict, BEAT_BITS};
use proptest::prelude::*;

fn sum(content: u64) -> Checksum {
    Checksum::new(Sample::from_raw(7), content << 39)
}

fn strikes(count: u64) -> Strikes {
    Strikes::from_raw(count)
}

/// The largest number of strikes.
fn most() -> Strikes {
    strikes(u64::MAX)
}

/// A clock in a pass that begins in this second, as the one before did.
fn at(second: u32) -> Clock {
    let mut clock = Clock::new();
    clock.begin_pass(second);
    clock.begin_pass(second);
    clock
}

/// Return the number of seconds until a page that just got these strikes, and does not change, may merge.
fn hold(strikes: Strikes) -> Option<u32> {
    let probation = Probation::new(strikes, Print::of(sum(1)), 1000);
    (0..1000).find(|past| probation.is_due(&at(1000 + past)))
}

#[test]
fn holds_double_and_are_bounded() {
    let holds: Vec<_> = (0..12).map(|count| hold(strikes(count)).unwrap()).collect();
    assert_eq!(holds, [0, 0, 0, 0, 0, 0, 4, 8, 16, 32, 64, 64]);
    assert_eq!(most(), strikes(10));
}

#[test]
fn strikes_are_for_writes_that_come_soon() {
    let mut now = Strikes::NONE;
    for count in 1..=20 {
        now = now.after_write(count % 5, false);
        assert_eq!(now, strikes(count.min(10).into()));
    }
    // Merged for no longer than the wait: unchanged. For longer: it starts again.
    assert_eq!(strikes(8).after_write(16, false), strikes(8));
    assert_eq!(strikes(8).after_write(17, true), Strikes::NONE);
    assert_eq!(strikes(4).after_write(5, true), Strikes::NONE);
    assert!(is_soon(4) && !is_soon(5));
}

/// A counter in a page, outside the sample, makes three merges fail. From then on the page must stay
/// unchanged for seconds.
#[test]
fn hidden_writes_count_double() {
    let mut now = Strikes::NONE;
    for expected in [2, 4, 6, 7, 8, 9, 10, 10] {
        now = now.after_write(1, true);
        assert_eq!(now, strikes(expected));
    }
    assert_eq!(strikes(5).after_write(1, true), strikes(6));
}

/// A page that changes while it is not merged is watched for a few seconds only.
#[test]
fn changes_alone_give_few_strikes() {
    for count in 0..10 {
        let mut now = strikes(count);
        for _ in 0..10 {
            let before = now;
            now = now.after_change();
            assert!(now >= before);
        }
        assert_eq!(now, strikes(6).max(strikes(count)));
    }
    assert_eq!(strikes(1).after_change(), strikes(3));
}

/// Content that is replaced three times while merged merges as soon as at first.
#[test]
fn a_few_writes_cost_no_time() {
    let mut now = Strikes::NONE;
    for _ in 0..5 {
        assert!(now.are_few());
        now = now.after_write(1, false);
        let probation = Probation::new(now, Print::UNKNOWN, 5);
        // The first look sees the change, the next one takes the checksum, and the next pass compares it.
        let (verdict, probation) = probation.check(sum(1), 5);
        assert_eq!(verdict, Verdict::Begun);
        assert!(probation.is_due(&at(5)));
        assert_eq!(probation.check(sum(1), 5), (Verdict::Held, probation));
    }
    assert!(!now.after_write(1, false).are_few());
}

/// If a pass takes minutes, a page that is unchanged from one to the next was unchanged for long enough. The
/// range of the clock does not matter.
#[test]
fn slow_passes_are_long_enough() {
    for between in 64..2000 {
        let mut clock = Clock::new();
        clock.begin_pass(7);
        let probation = Probation::new(most(), Print::of(sum(1)), clock.secs());
        for pass in 1..4 {
            clock.begin_pass(7 + pass * between);
            assert!(probation.is_due(&clock), "{pass} passes of {between} s");
        }
    }
}

#[test]
fn begins_anew_with_each_change() {
    let (_, first) = Probation::new(strikes(7), Print::UNKNOWN, 10).check(sum(1), 10);
    assert!(!first.is_due(&at(17)) && first.is_due(&at(18)));
    let (verdict, second) = first.check(sum(2), 18);
    assert_eq!(verdict, Verdict::Moved);
    assert!(!second.is_due(&at(25)) && second.is_due(&at(26)));
    assert_eq!(second.check(sum(2), 26), (Verdict::Held, second));
}

/// A page without strikes whose checksum is compared once.
#[test]
fn checksum_that_moved_gives_strikes() {
    let probation = Probation::new(Strikes::NONE, Print::of(sum(1)), 3);
    assert_ne!(probation, Probation::NONE);
    assert_eq!(probation.check(sum(1), 4), (Verdict::Held, Probation::NONE));
    let (verdict, probation) = probation.check(sum(2), 4);
    assert_eq!(verdict, Verdict::Moved);
    assert_ne!(probation.check(sum(2), 4).1, Probation::NONE);
}

#[test]
fn nothing_known_is_no_bits() {
    assert_eq!(Probation::NONE.get(), 0);
    for now in [0, 1, 511, 512, u32::MAX] {
        let probation = Probation::new(
            Strikes::NONE,
            Print::of(Checksum::unknown(Sample::from_raw(7))),
            now,
        );
        assert_eq!(probation, Probation::NONE);
    }
    // The record of a page is a few bits.
    for content in [0, 1 << 25, u64::MAX] {
        assert_ne!(
            Probation::new(Strikes::NONE, Print::of(sum(content)), 512).get(),
            0
        );
    }
}

#[test]
fn eases_one_by_one() {
    let mut probation = Probation::new(most(), Print::of(sum(1)), 0);
    let mut steps = 0;
    while probation.eased() != probation {
        probation = probation.eased();
        steps += 1;
    }
    assert_eq!(steps, 10);
    // The checksum stays.
    let (verdict, probation) = probation.check(sum(1), 1);
    assert_eq!((verdict, probation), (Verdict::Held, Probation::NONE));
    // Without a checksum nothing is left.
    let unknown = Probation::new(Strikes::from_raw(1), Print::UNKNOWN, 7);
    assert_eq!(unknown.eased(), Probation::NONE);
}

#[test]
fn beats_are_at_least_a_second() {
    let mut clock = Clock::new();
    let begin = clock.beat();
    for pass in 0..1000 {
        clock.begin_pass(pass / 100);
    }
    assert_eq!((clock.secs(), clock.beats_since(begin)), (9, 9));
    // Long passes are one beat each.
    for pass in 1..=7 {
        clock.begin_pass(9 + 1000 * pass);
    }
    assert_eq!((clock.secs(), clock.beats_since(begin)), (7009, 16));
}

#[test]
fn beats_wrap_around() {
    let mut clock = Clock::new();
    clock.begin_pass(1);
    for ago in [0, 1, 4, 5, 1 << 20] {
        let then = clock.beat().wrapping_sub(ago) % (1 << BEAT_BITS);
        assert_eq!(clock.beats_since(then), ago);
    }
}

proptest! {
    #[test]
    fn comes_back(raw in 0u32..1 << Probation::BITS) {
        let probation = Probation::from_raw(raw);
        prop_assert!(probation.get() < 1 << Probation::BITS);
        prop_assert_eq!(Probation::from_raw(probation.get()), probation);
        if strikes(raw.into()).get() == u64::from(raw & 15) {
            prop_assert_eq!(probation.get(), raw);
        }
    }

    /// A page is never delayed for longer than the longest hold, whenever it is scanned, nor does it merge
    /// before its own hold is over.
    #[test]
    fn is_due_in_time(
        count in 0u64..16,
        content: u64,
        now: u32,
        looks in prop::collection::vec(0u32..2000, 1..20),
    ) {
        let probation = Probation::new(strikes(count), Print::of(sum(content)), now);
        let hold = hold(strikes(count)).unwrap();
        for past in looks {
            let is_due = probation.is_due(&at(now.wrapping_add(past)));
            if past < hold {
                prop_assert!(!is_due);
            }
            if !is_due {
                let later = (0..=64).find(|more| probation.is_due(&at(now.wrapping_add(past + more))));
                prop_assert!(later.is_some());
            }
        }
    }
}
