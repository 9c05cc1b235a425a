// SPDX-License-Identifier: GPL-2.0

//! Tests of `ksm/advisor.rs`: the advice, compared with the formulas in exact numbers.

use crate::ksm::advisor::{Advice, Advisor, DEFAULT_PAGES_TO_SCAN};
use proptest::prelude::*;

const SECOND: u64 = 1000;
const CPU_SECOND: u64 = 1_000_000_000;

fn switched_on() -> Advisor {
    let mut advisor = Advisor::new();
    assert_eq!(advisor.switch(true), Some(500));
    advisor
}

/// A pass of `secs` seconds, in which the thread ran for `busy` percent of the time.
struct Pass {
    secs: u64,
    busy: u64,
}

/// Return the advice after each pass.
fn run(advisor: &mut Advisor, mut pages: u32, passes: &[Pass]) -> Vec<Advice> {
    let mut cpu = 77 * CPU_SECOND;
    let advise = |pass: &Pass| {
        advisor.start_pass(cpu);
        cpu += pass.secs * pass.busy * CPU_SECOND / 100;
        let advice = advisor.end_pass(pass.secs * SECOND, cpu, pages).unwrap();
        pages = advice.pages;
        advice
    };
    passes.iter().map(advise).collect()
}

#[test]
fn off_by_default() {
    let mut advisor = Advisor::new();
    assert!(!advisor.is_on());
    advisor.start_pass(0);
    assert_eq!(advisor.end_pass(SECOND, CPU_SECOND, 100), None);
    let limits = advisor.limits;
    assert_eq!(
        (
            limits.max_cpu,
            limits.min_pages,
            limits.max_pages,
            limits.target_secs
        ),
        (70, 500, 30_000, 200)
    );
}

#[test]
fn switching_says_what_to_start_with() {
    let mut advisor = switched_on();
    assert_eq!(advisor.switch(true), None);
    advisor.limits.min_pages = 1234;
    assert_eq!(advisor.switch(false), Some(DEFAULT_PAGES_TO_SCAN));
    assert_eq!(advisor.switch(false), None);
    assert_eq!(advisor.switch(true), Some(1234));
    advisor.switch(false);
    advisor.limits.min_pages = u64::MAX;
    assert_eq!(advisor.switch(true), Some(u32::MAX));
}

#[test]
fn a_pass_that_began_before_says_nothing() {
    let mut advisor = switched_on();
    assert_eq!(advisor.end_pass(SECOND, CPU_SECOND, 500), None);
    advisor.start_pass(CPU_SECOND);
    assert!(advisor.end_pass(SECOND, CPU_SECOND, 500).is_some());
    assert_eq!(advisor.end_pass(SECOND, CPU_SECOND, 500), None);
}

/// Computed by hand from the comment on `scan_time_advisor()` in mm/ksm.c.
#[test]
fn known_answers() {
    // 400 s instead of 200: factor 50. No earlier pass: change 0.7 * 0 + 0.3 * 100 = 30. 500 * 100 / 50 * 30
    // / 100 = 300. At 2 % of a CPU, 250 pages are one percent: at least 2500.
    let passes = [Pass { secs: 400, busy: 2 }];
    let advice = run(&mut switched_on(), 500, &passes);
    let pages = 2500;
    assert_eq!(
        advice,
        [Advice {
            secs: 400,
            cpu_percent: 2,
            pages
        }]
    );
    // 50 %: 10 pages are one percent, so 100 to 700.
    let passes = [Pass {
        secs: 400,
        busy: 50,
    }];
    assert_eq!(run(&mut switched_on(), 500, &passes)[0].pages, 300);
    // Then it takes 800 s: factor 25, change 0.7 * 30 + 0.3 * 200 = 81, 300 * 4 * 0.81 = 972, but the limit
    // is 300 / 50 * 70 = 420.
    let passes = [
        Pass {
            secs: 400,
            busy: 50,
        },
        Pass {
            secs: 800,
            busy: 50,
        },
    ];
    let advice = run(&mut switched_on(), 500, &passes);
    assert_eq!(
        advice[1],
        Advice {
            secs: 800,
            cpu_percent: 50,
            pages: 420
        }
    );
}

#[test]
fn the_most_pages_win_over_all() {
    let mut advisor = switched_on();
    advisor.limits.max_pages = 7;
    let passes = [Pass {
        secs: 4000,
        busy: 1,
    }];
    assert_eq!(run(&mut advisor, 500, &passes)[0].pages, 7);
}

#[test]
fn what_was_remembered_is_forgotten_when_switched_off() {
    let passes = [
        Pass {
            secs: 300,
            busy: 40,
        },
        Pass { secs: 90, busy: 30 },
    ];
    let fresh = run(&mut switched_on(), 500, &passes);
    let mut advisor = switched_on();
    run(&mut advisor, 500, &[Pass { secs: 9, busy: 90 }]);
    advisor.switch(false);
    advisor.switch(true);
    assert_eq!(run(&mut advisor, 500, &passes), fresh);
}

/// If the same work takes the target time at a certain number of pages, the advice reaches that number, or
/// the limit.
#[test]
fn the_target_is_reached() {
    // 2,000,000 pages in 200 s, with 20 ms of sleep after each batch and 1 us of work per page. 10,000
    // batches would sleep for 200 s, so about 200 pages suffice, and the CPU limits allow that.
    let mut advisor = switched_on();
    let (mut pages, mut cpu) = (5000u32, 0);
    let mut secs = 0;
    for _ in 0..60 {
        advisor.start_pass(cpu);
        cpu += 2 * CPU_SECOND;
        secs = 2 + 2_000_000 / u64::from(pages.max(1)) / 50;
        pages = advisor.end_pass(secs * SECOND, cpu, pages).unwrap().pages;
    }
    assert!((1..=400).contains(&secs), "{secs} s with {pages} pages");
}

proptest! {
    /// With any input there is no panic, and the limits hold.
    #[test]
    fn limits_hold(
        max_cpu: u32,
        max_pages: u64,
        target in 1u64..,
        passes in prop::collection::vec((any::<u64>(), any::<u64>(), any::<u32>()), 1..20),
    ) {
        let mut advisor = switched_on();
        advisor.limits.max_cpu = max_cpu;
        advisor.limits.max_pages = max_pages;
        advisor.limits.target_secs = target;
        for (millis, cpu, pages) in passes {
            advisor.start_pass(cpu);
            let advice = advisor.end_pass(millis, cpu.wrapping_mul(3), pages).unwrap();
            prop_assert!(u64::from(advice.pages) <= max_pages);
            prop_assert!(advice.secs >= 1 && advice.cpu_percent >= 1);
            let one = u64::from(pages / advice.cpu_percent).max(1);
            let most = one.saturating_mul(u64::from(max_cpu).max(10));
            prop_assert!(u64::from(advice.pages) <= most);
            let least = (10 * one).min(max_pages).min(u32::MAX.into());
            prop_assert!(u64::from(advice.pages) >= least);
        }
    }

    /// In the range of real machines, the results equal those of the formulas in wider numbers.
    #[test]
    fn as_the_formulas_say(passes in prop::collection::vec((1u64..5000, 0u64..=100), 1..10)) {
        let passes: Vec<Pass> = passes.into_iter().map(|(secs, busy)| Pass { secs, busy }).collect();
        let advice = run(&mut switched_on(), 500, &passes);
        let (mut pages, mut change, mut before) = (500i128, 0i128, None);
        for (pass, advice) in passes.iter().zip(advice) {
            let secs = i128::from(pass.secs);
            let cpu = i128::from(pass.busy).max(1);
            let factor = (20_000 / secs).max(1);
            let now = (secs * 100 / before.unwrap_or(secs)).max(1);
            before = Some(secs);
            change = (70 * change + 30 * now) / 100;
            let one = (pages / cpu).max(1);
            let wanted = pages * 100 / factor * change / 100;
            pages = wanted.min(one * 70).max(one * 10).min(30_000);
            prop_assert_eq!(i128::from(advice.pages), pages);
            prop_assert_eq!(i128::from(advice.cpu_percent), cpu);
        }
    }
}
