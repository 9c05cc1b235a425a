// SPDX-License-Identifier: GPL-2.0

//! The trace events of the group `ksm`, which in-tree KSM has: they fire for what rksm does, with the
//! arguments that are usual there, so that whoever records these sees rksm.
//!
//! While nobody records an event, it costs a call and a load. Nothing may be assumed of what a listener
//! does but that it does not sleep, so the functions can be called under any lock.

use super::{ffi, rmap_item::ItemBox};
use core::ptr;
use kernel::{ffi::c_int, mm::Mm, prelude::*};

/// 0, or a negative errno.
fn errno<T>(result: &Result<T>) -> c_int {
    match result {
        Ok(_) => 0,
        Err(err) => err.to_errno(),
    }
}

/// A count as the events have it.
fn count(items: usize) -> u32 {
    u32::try_from(items).unwrap_or(u32::MAX)
}

/// `ksm_start_scan`: pass number `seq` begins, with so many pages remembered.
pub(crate) fn start_scan(seq: u64, items: usize) {
    // SAFETY: numbers only.
    unsafe { ffi::rksm_trace_start_scan(seq as c_int, count(items)) };
}

/// `ksm_stop_scan`: pass number `seq` is complete, with so many pages remembered.
pub(crate) fn stop_scan(seq: u64, items: usize) {
    // SAFETY: numbers only.
    unsafe { ffi::rksm_trace_stop_scan(seq as c_int, count(items)) };
}

/// `ksm_merge_with_ksm_page`: a page of `mm` was, or was not, mapped to the merged page `pfn`; or, with
/// `new`, made one.
pub(super) fn merge_with_ksm_page<T>(
    new: bool,
    pfn: usize,
    kpage: *mut kernel::bindings::page,
    item: &ItemBox,
    mm: &Mm,
    result: &Result<T>,
) {
    let kpage = if new { ptr::null_mut() } else { kpage };
    // SAFETY: the pointers are only shown; both objects are kept by the caller meanwhile.
    unsafe {
        ffi::rksm_trace_merge_with_ksm_page(
            kpage.cast(),
            pfn,
            item.as_ptr().cast_mut(),
            mm.as_raw(),
            errno(result),
        )
    };
}

/// `ksm_advisor`: a pass took so many seconds and percent of a CPU, which makes so many pages to look at
/// before sleeping.
pub(crate) fn advisor(secs: u64, pages: u32, cpu_percent: u32) {
    let secs = i64::try_from(secs).unwrap_or(i64::MAX);
    // SAFETY: numbers only.
    unsafe { ffi::rksm_trace_advisor(secs, pages as usize, cpu_percent) };
}

/// `ksm_merge_one_page`: a page of `mm` was, or was not, replaced by the kernel's zero page. There is no rmap
/// item for such a page.
pub(super) fn merge_with_zero_page<T>(mm: &Mm, result: &Result<T>) {
    // SAFETY: the pointers are only shown; the mm is kept by the caller meanwhile.
    unsafe {
        ffi::rksm_trace_merge_one_page(
            ffi::rksm_zero_pfn(),
            ptr::null_mut(),
            mm.as_raw(),
            errno(result),
        )
    };
}

/// `ksm_remove_ksm_page`: the node of the page that was at `pfn` is freed.
pub(super) fn remove_ksm_page(pfn: usize) {
    // SAFETY: a number only.
    unsafe { ffi::rksm_trace_remove_ksm_page(pfn) };
}
