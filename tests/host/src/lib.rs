// SPDX-License-Identifier: GPL-2.0

//! Tests, on the host, of those parts of the module that need no page table.
//!
//! [`ksm`] and [`mm`] include the module's own files unchanged. The crate `kernel` beside this one stands in for
//! the kernel's, and files in `mm/` for those of the module that cannot be built here. To test another file, name
//! it in `ksm.rs` or `mm.rs`, add a file of tests to `tests.rs`, and add the missing items to the stand-ins.

/// The examples in the module's documentation: see `build.rs`.
#[cfg(test)]
mod examples {
    include!(concat!(env!("OUT_DIR"), "/examples.rs"));
}
#[cfg(test)]
mod abi;
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
mod sys;
#[cfg(test)]
mod tests;
