// SPDX-License-Identifier: GPL-2.0

//! Items of the kernel's C side.

use crate::testing;
use std::sync::atomic::{AtomicIsize, Ordering};

/// An address space, reduced to its reference count. [`TestMm`](crate::testing::TestMm) makes them.
#[allow(non_camel_case_types)]
pub struct mm_struct {
    /// The references, including the maker's own.
    pub(crate) mm_count: AtomicIsize,
}

/// Take a reference.
///
/// # Safety
///
/// `mm` is valid, and the caller has a reference or a borrow.
pub unsafe fn mmgrab(mm: *mut mm_struct) {
    // SAFETY: `mm` is valid by the contract.
    let before = unsafe { (*mm).mm_count.fetch_add(1, Ordering::Relaxed) };
    testing::note_mm_get();
    testing::must(before >= 1, "mmgrab() of an mm that was freed");
}

/// Drop a reference.
///
/// # Safety
///
/// `mm` is valid, and the caller owns a reference, which it no longer uses.
pub unsafe fn mmdrop(mm: *mut mm_struct) {
    // SAFETY: `mm` is valid by the contract.
    let before = unsafe { (*mm).mm_count.fetch_sub(1, Ordering::Relaxed) };
    testing::note_mm_drop();
    // The last reference belongs to the maker, which does not use this function.
    testing::must(before >= 2, "mmdrop() of a reference that did not exist");
}

/// What connects an anonymous page with its VMAs.
#[allow(non_camel_case_types)]
pub struct anon_vma(());

/// An entry of a list.
#[allow(non_camel_case_types)]
#[repr(C)]
pub struct hlist_node {
    /// The next entry.
    pub next: *mut hlist_node,
    /// What points at this one.
    pub pprev: *mut *mut hlist_node,
}
