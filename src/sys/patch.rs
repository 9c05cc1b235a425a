// SPDX-License-Identifier: GPL-2.0

//! Changing words of the kernel's static data, which a kernel may have made read-only.
//!
//! A plain store there would be an oops. The kernel's exception table catches this one, so that the
//! module can refuse to load instead.

use crate::mm::ffi;
use kernel::{error::to_result, prelude::*};

/// Writes a word, or fails with `EFAULT` if it is read-only.
///
/// # Safety
///
/// `at` is aligned and valid for reads, and a write of `value` to it does no harm.
pub(crate) unsafe fn write(at: *mut usize, value: usize) -> Result {
    // SAFETY: The caller vouches for the write. A fault that it takes is caught.
    to_result(unsafe { ffi::rksm_store_word(at, value) })
}

/// Whether a word can be written. Writes to it what it holds.
///
/// # Safety
///
/// `at` is aligned and valid for reads, and nobody else changes the word while this runs.
pub(crate) unsafe fn is_writable(at: *mut usize) -> bool {
    // SAFETY: By the caller's promise the word can be read, and the write changes nothing.
    unsafe { write(at, at.read_volatile()) }.is_ok()
}
