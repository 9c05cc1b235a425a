// SPDX-License-Identifier: GPL-2.0

//! Safe abstractions over the kernel's memory management, for an engine that merges pages.
//!
//! | module | what it has |
//! | --- | --- |
//! | [`mmap_lock`] | the lock of an address space, taken while that has users |
//! | [`vma`] | VMAs that may hold merged pages, under that lock |
//! | [`walk`], [`seen`] | the pages of a VMA, many under one page-table lock |
//! | `pte` | one page-table entry under its lock, and the MMU notifier around changes |
//! | [`folio`] | references on pages, and the folio lock |
//! | `rmap`, `mappers` | processes that share a page over a fork, and which a merge allows |
//! | [`replace`] | merging: a KSM page takes the place of an equal page |
//! | [`unshare`] | unmerging: a process gets back pages of its own |
//! | [`stable_node`], [`rmap_item`] | what the kernel's rmap walk reads to find the mappings of a KSM page |
//! | [`lru`], [`memcg`], [`trace`] | LRU batches, memory cgroups, trace events |
//!
//! # Locks
//!
//! A lock is a value: [`MmapLock`](mmap_lock::MmapLock), [`MergeableVma`](vma::MergeableVma) under it,
//! [`LockedPage`](folio::LockedPage), and `PteLock` and `NotifierRange` of `pte`. A function that needs a lock
//! takes such a value, and its documentation names the locks that it takes by itself. The order of all locks
//! stands with [`Engine`](crate::ksm::Engine).
//!
//! # Errors
//!
//! Operations on a page tell by their error why they left it alone, and what the engine can do:
//!
//! | error | reason | then |
//! | --- | --- | --- |
//! | `EBUSY` | the page is locked, gone, in use or marked by userfaultfd | try again in a later pass |
//! | `EAGAIN` | its content is not what the caller took it for | look at it again |
//! | `E2BIG` | it is part of a huge page that is to stay whole | wait until a split is worthwhile |
//! | `EMLINK` | it has a mapping that could not be found after a merge | leave it unmerged |
//! | `ENOMEM` | there is no memory | try again in a later pass |
//!
//! # Unsafe code and C
//!
//! `unsafe` code of the module is in this directory, in [`crate::sys`], [`crate::intree`] and
//! [`crate::abi::check`] only. C is only in `helpers/`, for what bindgen cannot reach, see [`ffi`].
//! `abi/symbols.klp` lists what the module uses of the kernel that is not exported. The layout of structures that
//! are private to mm/ksm.c comes from the target kernel's BTF ([`crate::abi::layout`]).

pub(crate) mod ffi;
pub(crate) mod folio;
pub(crate) mod lru;
mod mappers;
pub(crate) mod memcg;
pub(crate) mod mmap_lock;
mod pte;
pub(crate) mod replace;
mod rmap;
pub(crate) mod rmap_item;
pub(crate) mod seen;
pub(crate) mod stable_key;
pub(crate) mod stable_node;
pub(crate) mod trace;
pub(crate) mod unshare;
pub(crate) mod vma;
pub(crate) mod walk;

use kernel::{bindings, mm::Mm, page::PAGE_SIZE};

/// Returns random words, for keys that user space must not be able to guess.
pub(crate) fn random_words<const N: usize>() -> [u64; N] {
    let mut words = [0u64; N];
    // SAFETY: The call writes exactly the bytes of `words`, for which any value is valid.
    unsafe {
        bindings::get_random_bytes((&raw mut words).cast(), core::mem::size_of_val(&words));
    }
    words
}

/// Lets another task run, if one waits for the CPU.
///
/// Call it between the steps of any work that may be long: the kernel may have no preemption. The caller may
/// hold mutexes and `mmap_lock`, but no spinlock.
pub(crate) fn cond_resched() {
    // SAFETY: All callers run in process context and hold no spinlock.
    unsafe { ffi::rksm_cond_resched() };
}

/// Returns how many anonymous pages `mm` maps, swapped ones left aside.
///
/// The kernel counts per CPU and in batches, so this is an estimate.
pub(crate) fn anon_pages(mm: &Mm) -> usize {
    // SAFETY: The reference keeps the mm, and its counter can be read at any time.
    unsafe { ffi::rksm_mm_anon_pages(mm.as_raw()) }
}

/// Returns how many bytes can be allocated without swapping: `MemAvailable` in `/proc/meminfo`.
///
/// This is an estimate of the kernel.
pub(crate) fn available_bytes() -> usize {
    // SAFETY: The call only reads counters of the kernel.
    let pages = unsafe { bindings::si_mem_available() };
    usize::try_from(pages)
        .unwrap_or(0)
        .saturating_mul(PAGE_SIZE)
}

/// Returns how many NUMA nodes there may be: the IDs of all nodes are smaller than this.
pub(crate) fn memory_nodes() -> u32 {
    // SAFETY: The call reads a number that is set at boot and does not change.
    unsafe { ffi::rksm_nr_nodes() }
}

/// Returns how many entries map the kernel's zero page because a page of zeroes was merged with it.
///
/// The kernel counts for the whole system, and takes off what is unmapped: `ksm_zero_pages`.
pub(crate) fn zero_pages() -> isize {
    // SAFETY: The call reads an atomic of the kernel.
    unsafe { ffi::rksm_zero_pages() as isize }
}

/// Returns how many mappings of KSM pages in `mm` have an rmap item: `ksm_merging_pages` in
/// `/proc/<pid>/ksm_stat`.
///
/// Only the engine changes this counter, so it is exact under the engine's mutex.
pub(crate) fn merging_pages(mm: &Mm) -> usize {
    // SAFETY: The reference keeps the mm, and the counter is a word of it that can be read at any time.
    unsafe { (&raw const (*mm.as_raw()).__bindgen_anon_1.ksm_merging_pages).read_volatile() }
}

/// Has `/proc/<pid>/ksm_stat` account `bytes` of metadata to `mm`.
///
/// The kernel multiplies `ksm_rmap_items` by the size of an in-tree item to compute
/// `ksm_process_profit`, so this says how many of those would take as much.
pub(crate) fn report_metadata(mm: &Mm, bytes: usize) {
    // SAFETY: The reference keeps the mm. In-tree KSM does not run, so only the engine writes the counter.
    unsafe {
        ffi::rksm_mm_set_rmap_items(
            mm.as_raw(),
            bytes.div_ceil(crate::abi::layout::KSM_RMAP_ITEM_SIZE),
        )
    };
}
