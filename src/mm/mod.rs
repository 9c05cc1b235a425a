// SPDX-License-Identifier: GPL-2.0

//! Safe abstractions over the kernel's memory management, for an engine that merges pages.
//!
//! `unsafe` code of the module is in this directory, in [`crate::sys`], [`crate::intree`] and
//! [`crate::abi::check`] only. C is only in `helpers/`, for what bindgen cannot reach. What is used of the
//! kernel but not exported stands in `abi/symbols.klp`; what is used of
//! structures that are private to mm/ksm.c comes from the target kernel's BTF ([`crate::abi::layout`]).
//!
//! The order of locks stands with [`Engine`](crate::ksm::Engine).

pub(crate) mod entry;
pub(crate) mod ffi;
pub(crate) mod folio;
pub(crate) mod lru;
pub(crate) mod memcg;
pub(crate) mod mmap_lock;
mod pte;
pub(crate) mod replace;
mod rmap;
pub(crate) mod rmap_item;
pub(crate) mod stable_node;
pub(crate) mod trace;
pub(crate) mod unshare;
pub(crate) mod vma;
pub(crate) mod walk;

use kernel::{bindings, mm::Mm, page::PAGE_SIZE};

/// Words that nobody can know.
pub(crate) fn random_words<const N: usize>() -> [u64; N] {
    let mut words = [0u64; N];
    // SAFETY: writes exactly the bytes of `words`.
    unsafe {
        bindings::get_random_bytes((&raw mut words).cast(), core::mem::size_of_val(&words));
    }
    words
}

/// Lets others run. Sleeping must be allowed.
pub(crate) fn cond_resched() {
    // SAFETY: reached from process context without spinlocks only, as all users of locks here are.
    unsafe { ffi::rksm_cond_resched() };
}

/// How many anonymous pages `mm` maps, about.
pub(crate) fn anon_pages(mm: &Mm) -> usize {
    // SAFETY: the mm is kept.
    unsafe { ffi::rksm_mm_anon_pages(mm.as_raw()) }
}

/// How many bytes of memory are free, or can be had without swapping, about.
pub(crate) fn available_bytes() -> usize {
    // SAFETY: looks at counters of the kernel.
    let pages = unsafe { bindings::si_mem_available() };
    usize::try_from(pages)
        .unwrap_or(0)
        .saturating_mul(PAGE_SIZE)
}

/// How many memory nodes there may be: their numbers are smaller.
pub(crate) fn memory_nodes() -> u32 {
    // SAFETY: set at boot and never changed.
    unsafe { ffi::rksm_nr_nodes() }
}

/// How many places map the kernel's zero page because a page of zeroes was merged with it.
pub(crate) fn zero_pages() -> isize {
    // SAFETY: reads an atomic of the kernel.
    unsafe { ffi::rksm_zero_pages() as isize }
}

/// How many of the pages that `mm` maps are listed as merged.
pub(crate) fn merging_pages(mm: &Mm) -> usize {
    // SAFETY: the mm is kept; the counter is a word that only the engine writes.
    unsafe { (&raw const (*mm.as_raw()).__bindgen_anon_1.ksm_merging_pages).read_volatile() }
}

/// Has `/proc/<pid>/ksm_stat` account `bytes` of metadata to `mm`.
///
/// The kernel multiplies `ksm_rmap_items` by the size of an in-tree item to compute
/// `ksm_process_profit`, so this says how many of those would take as much.
pub(crate) fn report_metadata(mm: &Mm, bytes: usize) {
    // SAFETY: the mm is kept; the counter is a word that only the engine writes.
    unsafe {
        ffi::rksm_mm_set_rmap_items(
            mm.as_raw(),
            bytes.div_ceil(crate::abi::layout::KSM_RMAP_ITEM_SIZE),
        )
    };
}
