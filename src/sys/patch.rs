// SPDX-License-Identifier: GPL-2.0

//! Writes to static data of the kernel that may be read-only.
//!
//! A plain store to read-only data would be an oops. These functions catch the fault and return an error, so
//! that the module can refuse to load instead.

use crate::mm::ffi;
use kernel::{error::to_result, prelude::*};

/// Writes `value` to `at` at once. Does not sleep.
///
/// # Errors
///
/// Returns `EFAULT` if the word is read-only.
///
/// # Safety
///
/// `at` is aligned and valid for reads, and a write of `value` to it does no harm.
pub(crate) unsafe fn write(at: *mut usize, value: usize) -> Result {
    // SAFETY: By the caller's promise the write does no harm, and the call catches a fault.
    to_result(unsafe { ffi::rksm_store_word(at, value) })
}

/// Returns whether the word at `at` can be written. Writes the value that it holds. Does not sleep.
///
/// # Safety
///
/// `at` is aligned and valid for reads, and nothing else changes the word during the call.
pub(crate) unsafe fn is_writable(at: *mut usize) -> bool {
    // SAFETY: By the caller's promise the word can be read.
    let value = unsafe { at.read_volatile() };
    // SAFETY: By the caller's promise `at` is aligned and valid, and the write does not change the word.
    unsafe { write(at, value) }.is_ok()
}
