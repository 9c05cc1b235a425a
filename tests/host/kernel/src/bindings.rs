// SPDX-License-Identifier: GPL-2.0

//! What the kernel's C side gives.

use crate::testing;
use std::sync::atomic::{AtomicIsize, Ordering};

/// An address space, of which only the reference count is left. Made by
/// [`TestMm`](crate::testing::TestMm).
#[allow(non_camel_case_types)]
pub struct mm_struct {
    /// The references, of which one is the maker's own.
    pub(crate) mm_count: AtomicIsize,
}

/// Takes a reference.
///
/// # Safety
///
/// `mm` is valid, and the caller has a reference or a borrow.
pub unsafe fn mmgrab(mm: *mut mm_struct) {
    // SAFETY: valid by the contract.
    let before = unsafe { (*mm).mm_count.fetch_add(1, Ordering::Relaxed) };
    testing::note_mm_get();
    testing::must(before >= 1, "mmgrab() of an mm that was freed");
}

/// Gives up a reference.
///
/// # Safety
///
/// `mm` is valid, and the caller has a reference, which it no longer uses.
pub unsafe fn mmdrop(mm: *mut mm_struct) {
    // SAFETY: valid by the contract.
    let before = unsafe { (*mm).mm_count.fetch_sub(1, Ordering::Relaxed) };
    testing::note_mm_drop();
    // The last one belongs to the maker, who does not come this way.
    testing::must(before >= 2, "mmdrop() of a reference that nobody had");
}
