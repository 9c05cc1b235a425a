// SPDX-License-Identifier: GPL-2.0

//! Tests, on the host, of those parts of the module that are pure logic.
//!
//! [`ksm`] and [`mm`] take the module's own files as they are; the crate `kernel` beside this one stands
//! in for the kernel's. To test another file: name it in `ksm.rs` or `mm.rs`, add a file of tests to
//! `tests.rs`, and add to the stand-in what the compiler misses.

/// The examples in the module's documentation: see `build.rs`.
#[cfg(test)]
mod examples {
    include!(concat!(env!("OUT_DIR"), "/examples.rs"));
}
#[cfg(test)]
#[path = "../../../src/hash.rs"]
#[allow(dead_code, clippy::style, clippy::precedence)]
mod hash;
#[cfg(test)]
mod ksm;
#[cfg(test)]
mod mm;
#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;
