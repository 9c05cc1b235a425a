// SPDX-License-Identifier: GPL-2.0

//! Walking the page tables of one VMA, many pages under one page-table lock.
//!
//! The kernel's own page walker finds the tables and skips what is not populated; this looks at the
//! entries of one table at a time.

use super::{
    ffi,
    folio::{node_id_of, PageRef},
    stable::NodeId,
    vma::MergeableVma,
};
use crate::engine::checksum::Checksum;
use core::ptr::{self, NonNull};
use kernel::{
    bindings,
    ffi::{c_int, c_void},
    page::PAGE_SIZE,
};

/// The most pages that are looked at under one hold of a page-table lock.
pub(crate) const BATCH_PAGES: usize = 32;

/// What a page was when the walk came by.
#[derive(Clone, Copy)]
pub(crate) enum Seen {
    /// An anonymous page with this checksum.
    Anon(Checksum),
    /// A KSM page of the node with this identity (none: of no node).
    Ksm(Option<NodeId>),
}

/// One page that a walk came by.
#[derive(Clone, Copy)]
pub(crate) struct SeenPage {
    /// Its address, page aligned.
    pub(crate) addr: usize,
    /// What it was.
    pub(crate) seen: Seen,
}

/// The pages that one step of a scan came by, in the order of their addresses.
pub(crate) struct Batch {
    pages: [Option<SeenPage>; BATCH_PAGES],
    len: usize,
}

impl Batch {
    /// No pages.
    pub(crate) const fn new() -> Self {
        Self {
            pages: [None; BATCH_PAGES],
            len: 0,
        }
    }

    /// The pages, in the order of their addresses.
    pub(crate) fn pages(&self) -> impl Iterator<Item = SeenPage> + '_ {
        self.pages.iter().take(self.len).filter_map(|page| *page)
    }

    /// How many pages it holds.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    fn push(&mut self, page: SeenPage) {
        if let Some(slot) = self.pages.get_mut(self.len) {
            *slot = Some(page);
            self.len += 1;
        }
    }
}

/// Fills `batch` with at most `max` pages of `vma` from `from` on. Returns the address to go on from,
/// which is the VMA's end when there are no more pages in it.
///
/// Content is hashed in place with `seed`, under the page-table lock, which is what keeps the pages.
/// No reference is taken. Holds a page-table lock for [`BATCH_PAGES`] pages at most.
pub(crate) fn fill(
    vma: &MergeableVma<'_>,
    from: usize,
    max: usize,
    seed: u64,
    batch: &mut Batch,
) -> usize {
    batch.len = 0;
    let max = max.min(BATCH_PAGES);
    let mut visit = Visit::Scan { batch, max, seed };
    walk(vma, from, vma.end(), &mut visit);
    match batch.pages().last() {
        Some(last) if batch.len >= max => last.addr.saturating_add(PAGE_SIZE),
        _ => vma.end(),
    }
}

/// The anonymous page at `addr`, with a reference.
pub(super) fn page_at(vma: &MergeableVma<'_>, addr: usize) -> Option<PageRef> {
    let mut visit = Visit::Get(None);
    walk(vma, addr, addr.saturating_add(PAGE_SIZE), &mut visit);
    match visit {
        Visit::Get(page) => page,
        _ => None,
    }
}

/// The address of the first KSM page (or KSM-placed zero page) in `from..end`.
///
/// A page that is being migrated counts: KSM pages stay KSM pages until they are freed, and the
/// unshare fault waits for the migration.
pub(super) fn next_ksm_page(vma: &MergeableVma<'_>, from: usize, end: usize) -> Option<usize> {
    let mut visit = Visit::FindKsm(None);
    walk(vma, from, end, &mut visit);
    match visit {
        Visit::FindKsm(addr) => addr,
        _ => None,
    }
}

/// What to do with the pages of a walk.
enum Visit<'a> {
    Scan {
        batch: &'a mut Batch,
        max: usize,
        seed: u64,
    },
    Get(Option<PageRef>),
    FindKsm(Option<usize>),
}

impl Visit<'_> {
    /// Looks at one page. Returns whether the walk is over.
    ///
    /// # Safety
    ///
    /// `page` is mapped at `addr`, under a page-table lock that the caller holds.
    unsafe fn page(&mut self, addr: usize, page: NonNull<bindings::page>) -> bool {
        // SAFETY: the page is kept by its mapping.
        let folio = unsafe { ffi::rksm_page_folio(page.as_ptr()) };
        // SAFETY: as above.
        let ksm = unsafe { ffi::rksm_folio_test_ksm(folio) };
        // SAFETY: as above.
        let anon = ksm || unsafe { ffi::rksm_folio_test_plain_anon(folio) };
        match self {
            Visit::Scan { batch, max, seed } if anon => {
                let seen = if ksm {
                    // SAFETY: as above.
                    Seen::Ksm(unsafe { node_id_of(folio) })
                } else {
                    // SAFETY: as above.
                    let hash = unsafe { ffi::rksm_page_hash(page.as_ptr(), *seed) };
                    Seen::Anon(Checksum::from_hash(hash))
                };
                batch.push(SeenPage { addr, seen });
                batch.len >= *max
            }
            Visit::Get(slot) if anon => {
                // SAFETY: the page is kept by its mapping, so its folio's count is not zero.
                *slot = Some(unsafe {
                    ffi::rksm_folio_get(folio);
                    PageRef::from_raw(page)
                });
                true
            }
            Visit::FindKsm(slot) if ksm => {
                *slot = Some(addr);
                true
            }
            _ => false,
        }
    }

    /// Looks at one page-table entry. Returns whether the walk is over.
    ///
    /// # Safety
    ///
    /// `entry` stands at `addr` in `vma`, under a page-table lock that the caller holds.
    unsafe fn entry(
        &mut self,
        vma: *mut bindings::vm_area_struct,
        addr: usize,
        entry: bindings::pte_t,
    ) -> bool {
        // SAFETY: looks at a value.
        if unsafe { ffi::rksm_pte_present(entry) } {
            // SAFETY: the caller's promise.
            if let Some(page) = NonNull::new(unsafe { ffi::rksm_normal_page(vma, addr, entry) }) {
                // SAFETY: the entry maps it.
                return unsafe { self.page(addr, page) };
            }
        }
        let Visit::FindKsm(slot) = self else {
            return false;
        };
        // SAFETY: looks at a value, and at the folio of a migration entry, which is locked by
        // whoever migrates it and kept until the entry is replaced under the lock that we hold.
        let found = unsafe {
            if ffi::rksm_pte_present(entry) {
                ffi::rksm_is_ksm_zero_pte(entry)
            } else if ffi::rksm_pte_none(entry) {
                false
            } else {
                let folio = ffi::rksm_migration_folio(entry);
                !folio.is_null() && ffi::rksm_folio_test_ksm(folio)
            }
        };
        if found {
            *slot = Some(addr);
        }
        found
    }

    /// Looks at the part `addr..end` of a huge page. `None`: it is none, look at the page table.
    ///
    /// # Safety
    ///
    /// `pmd` is the entry for `addr` in `vma`, whose `mmap_lock` is held.
    unsafe fn huge(
        &mut self,
        vma: *mut bindings::vm_area_struct,
        pmd: *mut bindings::pmd_t,
        addr: usize,
        end: usize,
    ) -> Option<bool> {
        // SAFETY: the entry can be read at any time while `mmap_lock` is held; the VMA is valid.
        let ptl = unsafe {
            if !ffi::rksm_pmd_leaf(ffi::rksm_pmd_lockless(pmd)) {
                return None;
            }
            ffi::rksm_pmd_lock((*vma).vm_mm, pmd)
        };
        // SAFETY: the page-table lock is held, so the entry does not change, and what it maps is
        // kept by the mapping.
        let result = unsafe {
            let entry = ffi::rksm_pmd_lockless(pmd);
            if !ffi::rksm_pmd_present(entry) {
                Some(false)
            } else if !ffi::rksm_pmd_leaf(entry) {
                None
            } else {
                let page = ffi::rksm_normal_page_pmd(vma, addr, entry);
                Some(!page.is_null() && self.huge_pages(page, addr, end))
            }
        };
        // SAFETY: locked above.
        unsafe { ffi::rksm_ptl_unlock(ptl) };
        result
    }

    /// # Safety
    ///
    /// `page` is the first page of the huge page that is mapped around `addr..end`, under a
    /// page-table lock that the caller holds.
    unsafe fn huge_pages(&mut self, page: *mut bindings::page, addr: usize, end: usize) -> bool {
        let first = (addr & (PMD_SIZE - 1)) / PAGE_SIZE;
        for (nth, addr) in (addr..end).step_by(PAGE_SIZE).enumerate() {
            // SAFETY: `addr` lies in the huge page, so the page is part of it.
            let Some(page) = NonNull::new(unsafe { ffi::rksm_nth_page(page, first + nth) }) else {
                return false;
            };
            // SAFETY: mapped, by the caller's promise.
            if unsafe { self.page(addr, page) } {
                return true;
            }
        }
        false
    }
}

/// The size of what one entry of the second-lowest level of page tables maps.
const PMD_SIZE: usize = 1 << 21;

fn walk(vma: &MergeableVma<'_>, start: usize, end: usize, visit: &mut Visit<'_>) {
    let start = start.max(vma.start());
    let end = end.min(vma.end());
    if start < end {
        // SAFETY: `mmap_lock` is held by the type invariant of `vma`, the range lies in it, and
        // `visit` is what `rksm_walk_pmd` expects, used by nobody else until this returns.
        unsafe { ffi::rksm_walk_vma(vma.as_ptr(), start, end, ptr::from_mut(visit).cast()) };
    }
}

/// Called by the kernel's page walker (through shim.c) for each populated entry of the second-lowest
/// level. Returns 1 when the walk is over.
///
/// # Safety
///
/// `ctx` is the `Visit` of [`walk`]; `pmd` is the entry for `addr..end` in `vma`, whose `mmap_lock` is
/// held.
#[no_mangle]
unsafe extern "C" fn rksm_walk_pmd(
    ctx: *mut c_void,
    vma: *mut bindings::vm_area_struct,
    pmd: *mut bindings::pmd_t,
    addr: usize,
    end: usize,
) -> c_int {
    // SAFETY: the caller's promise; the walker calls this from `walk` only, which lent us `visit`.
    let visit = unsafe { &mut *ctx.cast::<Visit<'_>>() };
    // SAFETY: the caller's promise.
    if let Some(over) = unsafe { visit.huge(vma, pmd, addr, end) } {
        return c_int::from(over);
    }
    let mut ptl = ptr::null_mut();
    // SAFETY: the VMA is valid; page tables are not freed while `mmap_lock` is held.
    let first = unsafe { ffi::rksm_pte_lock((*vma).vm_mm, pmd, addr, &mut ptl) };
    if first.is_null() {
        return 0;
    }
    let mut over = false;
    for (nth, addr) in (addr..end).step_by(PAGE_SIZE).enumerate() {
        // SAFETY: `addr..end` lies in the range of one page table, which is mapped and locked.
        over = unsafe {
            let entry = ffi::rksm_ptep_get(first.add(nth));
            visit.entry(vma, addr, entry)
        };
        if over {
            break;
        }
    }
    // SAFETY: locked above.
    unsafe { ffi::rksm_pte_unlock(first, ptl) };
    c_int::from(over)
}
