// SPDX-License-Identifier: GPL-2.0

//! When the next pass may begin.

use kernel::time::{Instant, Monotonic};

/// Keeps passes apart, so that a page which has not changed between two of them has held still for a
/// while: a pass over a small set takes no time to speak of.
///
/// Who sets `sleep_millisecs` to 0 asks for passes without a pause, and may wait for a few of them to find out
/// what comes of pages that hardly anything else is registered beside. So a few passes that small follow each other
/// at once before the next one is kept apart.
pub(super) struct Pace {
    /// When the last pass that was kept apart began; `None` before the first.
    began: Option<Instant<Monotonic>>,
    /// Whether a pass is still under way.
    under_way: bool,
    /// How many more may follow it at once.
    quick: u8,
}

/// How many quick passes follow one that was kept apart: so many that most of them skip what does not change, see
/// [`Age`](super::page_map). In-tree KSM would do thousands meanwhile.
const QUICK_PASSES: u8 = 32;

/// How many pages a quick pass has, at most.
const QUICK_PAGES: usize = 64;

impl Pace {
    /// No pass has begun.
    pub(super) fn new() -> Self {
        Self {
            began: None,
            under_way: false,
            quick: 0,
        }
    }

    /// How many milliseconds are left until a pass may begin or go on, if passes begin `shortest`
    /// milliseconds apart at least.
    pub(super) fn rest(&self, shortest: u32) -> u32 {
        match self.began {
            Some(began) if !self.under_way && self.quick == 0 => {
                let past = u32::try_from(began.elapsed().as_millis()).unwrap_or(u32::MAX);
                shortest.saturating_sub(past)
            }
            _ => 0,
        }
    }

    /// Notes that a pass begins, if none is under way.
    pub(super) fn go_on(&mut self) {
        if self.under_way {
            return;
        }
        self.under_way = true;
        match self.quick.checked_sub(1) {
            Some(left) => self.quick = left,
            None => {
                self.began = Some(Instant::now());
                self.quick = QUICK_PASSES;
            }
        }
    }

    /// Notes that the pass, which had so many pages, is complete. `unpaused`: nobody wants a pause between batches.
    pub(super) fn end_pass(&mut self, pages: usize, unpaused: bool) {
        self.under_way = false;
        if pages > QUICK_PAGES || !unpaused {
            self.quick = 0;
        }
    }
}
