// SPDX-License-Identifier: GPL-2.0

//! Tests, on the host, of those parts of the module that are pure logic.
//!
//! [`engine`] takes the module's own files as they are; the crate `kernel` beside this one stands
//! in for the kernel's. To test another file: name it in `engine.rs`, add a file of tests to
//! `tests.rs`, and add to the stand-in what the compiler misses.

#[cfg(test)]
mod engine;
#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;
