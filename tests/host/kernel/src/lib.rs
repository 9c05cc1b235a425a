// SPDX-License-Identifier: GPL-2.0

//! A stand-in for the kernel's Rust crate, for tests on the host.
//!
//! Names, signatures, trait bounds and meaning are the kernel's. Items that the module's pure logic does not
//! use are left out; add them here when a file needs them. Only [`testing`] has no counterpart in the kernel:
//! it makes allocations fail, and counts them and the references on address spaces.

pub mod alloc;
pub mod bindings;
pub mod error;
pub mod mm;
pub mod page;
pub mod prelude;
pub mod rbtree;
pub mod sync;
pub mod testing;
pub mod time;

/// The module that is loaded.
pub struct ThisModule;

/// Log an error. [`testing::errors`] counts them.
#[macro_export]
macro_rules! pr_err {
    ($($arg:tt)*) => {
        $crate::testing::note_error(&format!($($arg)*))
    };
}
