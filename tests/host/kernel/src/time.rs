// SPDX-License-Identifier: GPL-2.0

//! Time.

use std::marker::PhantomData;

/// A point in time.
#[derive(Clone, Copy)]
pub struct Instant<C>(std::time::Instant, PhantomData<C>);

impl<C> Instant<C> {
    /// Return the time now.
    pub fn now() -> Self {
        Self(std::time::Instant::now(), PhantomData)
    }

    /// Return how much time has passed since.
    pub fn elapsed(&self) -> Delta {
        Delta(self.0.elapsed())
    }
}

/// The clock `CLOCK_MONOTONIC`.
#[derive(Clone, Copy)]
pub struct Monotonic;

/// A span of time.
#[derive(Clone, Copy)]
pub struct Delta(std::time::Duration);

impl Delta {
    /// Return the number of whole milliseconds.
    pub fn as_millis(self) -> i64 {
        i64::try_from(self.0.as_millis()).unwrap_or(i64::MAX)
    }
}
