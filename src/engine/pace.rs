// SPDX-License-Identifier: GPL-2.0

//! When the next pass may begin.

use kernel::time::{Instant, Monotonic};

/// Keeps passes apart, so that a page which has not changed between two of them has held still for a
/// while: a pass over a small set takes no time to speak of.
pub(super) struct Pace {
    /// When the last pass began; `None` before the first.
    began: Option<Instant<Monotonic>>,
    /// Whether it is still under way.
    under_way: bool,
}

impl Pace {
    /// No pass has begun.
    pub(super) fn new() -> Self {
        Self {
            began: None,
            under_way: false,
        }
    }

    /// How many milliseconds are left until a pass may begin or go on, if passes begin `shortest`
    /// milliseconds apart at least.
    pub(super) fn rest(&self, shortest: u32) -> u32 {
        match self.began {
            Some(began) if !self.under_way => {
                let past = u32::try_from(began.elapsed().as_millis()).unwrap_or(u32::MAX);
                shortest.saturating_sub(past)
            }
            _ => 0,
        }
    }

    /// Notes that a pass begins, if none is under way.
    pub(super) fn go_on(&mut self) {
        if !self.under_way {
            self.began = Some(Instant::now());
            self.under_way = true;
        }
    }

    /// Notes that the pass is complete.
    pub(super) fn end_pass(&mut self) {
        self.under_way = false;
    }
}
