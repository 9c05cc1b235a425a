// SPDX-License-Identifier: GPL-2.0

//! The trace events of the group `ksm`, which in-tree KSM has.
//!
//! They fire for what rksm does, with the arguments that in-tree KSM gives them. So tools that record in-tree
//! KSM also record rksm. An event that is not recorded costs a call and a load. Listeners do not sleep, so
//! the functions can be called under any lock.
//!
//! A merge of two pages fires two events, as in in-tree KSM. One is for the page that becomes a KSM page, the
//! other for the page that it replaces. Only `err` says more here. In-tree KSM has `-EFAULT` for any failure, and
//! rksm has the error of the operation, see [`super`].
//!
//! An rmap item is shown as its address, as in-tree KSM does. Counts and numbers of passes wrap or saturate
//! where the event has fewer bits.

use super::ffi;
use core::ptr;
use kernel::{
    ffi::{c_int, c_void},
    mm::Mm,
    prelude::*,
};

/// The result as the events have it: 0, or a negative errno.
fn errno<T>(result: &Result<T>) -> c_int {
    match result {
        Ok(_) => 0,
        Err(err) => err.to_errno(),
    }
}

/// A count as the events have it: 32 bits, and saturated.
fn count(items: usize) -> u32 {
    u32::try_from(items).unwrap_or(u32::MAX)
}

/// `ksm_start_scan`: pass number `seq` begins, with `items` pages remembered.
pub(crate) fn start_scan(seq: u64, items: usize) {
    // SAFETY: The event is given numbers only.
    unsafe { ffi::rksm_trace_start_scan(seq as c_int, count(items)) };
}

/// `ksm_stop_scan`: pass number `seq` is complete, with `items` pages remembered.
pub(crate) fn stop_scan(seq: u64, items: usize) {
    // SAFETY: The event is given numbers only.
    unsafe { ffi::rksm_trace_stop_scan(seq as c_int, count(items)) };
}

/// `ksm_merge_with_ksm_page`: a page of `mm` was merged with the KSM page `kpage` at `pfn`.
///
/// With `new`, the page at `pfn` itself became a KSM page, and the event shows no `kpage`. A `result` that is an
/// error means that the page was left as it was.
pub(super) fn merge_with_ksm_page<T>(
    new: bool,
    pfn: usize,
    kpage: *mut kernel::bindings::page,
    item: *const c_void,
    mm: &Mm,
    result: &Result<T>,
) {
    let kpage = if new { ptr::null_mut() } else { kpage };
    // SAFETY: The event only shows the pointers. The caller keeps the objects meanwhile.
    unsafe {
        ffi::rksm_trace_merge_with_ksm_page(
            kpage.cast(),
            pfn,
            item.cast_mut(),
            mm.as_raw(),
            errno(result),
        )
    };
}

/// `ksm_advisor`: a pass took `secs` seconds and `cpu_percent` of a CPU, so the next one scans `pages` pages
/// before it sleeps.
pub(crate) fn advisor(secs: u64, pages: u32, cpu_percent: u32) {
    let secs = i64::try_from(secs).unwrap_or(i64::MAX);
    // SAFETY: The event is given numbers only.
    unsafe { ffi::rksm_trace_advisor(secs, pages as usize, cpu_percent) };
}

/// `ksm_merge_one_page`: a page of `mm` was replaced by the kernel's zero page.
///
/// Such a page has no rmap item, so the event shows none. A `result` that is an error means that the page was
/// left as it was.
pub(super) fn merge_with_zero_page<T>(mm: &Mm, result: &Result<T>) {
    // SAFETY: The event only shows the pointers, and `rksm_zero_pfn` reads a constant. The caller keeps the mm.
    unsafe {
        ffi::rksm_trace_merge_one_page(
            ffi::rksm_zero_pfn(),
            ptr::null_mut(),
            mm.as_raw(),
            errno(result),
        )
    };
}

/// `ksm_remove_ksm_page`: the stable node of the page that was at `pfn` is freed.
pub(super) fn remove_ksm_page(pfn: usize) {
    // SAFETY: The event is given a number only.
    unsafe { ffi::rksm_trace_remove_ksm_page(pfn) };
}
