// SPDX-License-Identifier: GPL-2.0

//! Stands in for `kernel::time`: only the names of the types.

use std::marker::PhantomData;

/// A point in time.
#[derive(Clone, Copy)]
pub struct Instant<C>(PhantomData<C>);

/// The clock `CLOCK_MONOTONIC`.
#[derive(Clone, Copy)]
pub struct Monotonic;
