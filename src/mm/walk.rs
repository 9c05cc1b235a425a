// SPDX-License-Identifier: GPL-2.0

//! Walking the page tables of one VMA, many pages under one page-table lock.
//!
//! The kernel's page walker finds the tables and skips what is not populated. It calls back for each entry
//! that leads to a page table or maps a huge page, and this module looks at the pages there.
//!
//! There are three walks:
//!
//! | function | what it finds | for |
//! | --- | --- | --- |
//! | [`fill`] | up to a batch of pages, with their samples | the scan |
//! | [`page_at`] | the anonymous page at one address, with a reference | a merge |
//! | [`next_ksm_page`] | the first KSM page of a range | unmerging |
//!
//! What they do with an entry depends on what it stands for. Of a huge page, each part is looked at by itself.
//!
//! | entry | [`fill`] | [`page_at`] | [`next_ksm_page`] |
//! | --- | --- | --- | --- |
//! | anonymous page | adds its sample | takes a reference | |
//! | KSM page | adds the identity of its node | takes a reference | ends there |
//! | KSM-placed zero page | | | ends there |
//! | KSM page that is being migrated | notes that it is away | | ends there |
//! | other page that is being migrated, or any that is swapped out | notes that it is away | | |
//! | broken memory (but no KSM page), device memory, page of a file | | | |
//!
//! # Differences from mm/ksm.c
//!
//! `scan_get_next_rmap_item()` walks to one page, takes a reference, and gives `mmap_lock` up. The checksum of the
//! page is computed later. Here a walk samples many pages in place: their mappings keep them under the page-table
//! lock, so no reference is needed.
//!
//! # What bounds a walk
//!
//! `mmap_lock` is held for the whole walk, and a page-table lock for [`LOCK_ENTRIES`] entries. A process can make
//! its page tables as sparse as it likes, so a bound on pages would not bound the time. The budget of a walk
//! also counts page tables ([`WALK_TABLES`]), the tables above them ([`WALK_DIRECTORIES`]), and bytes
//! ([`WALK_BYTES`]). A walk that used its budget up says where to continue.
//!
//! # Examples
//!
//! ```ignore
//! batch.clear();
//! let mut addr = from;
//! while addr < vma.end() && !batch.is_full(BATCH_PAGES) {
//!     addr = walk::fill(&vma, addr, usize::MAX, BATCH_PAGES, hasher, batch);
//! }
//! for page in batch.pages() {
//!     classify(page.addr(), page.seen());
//! }
//! ```

use super::{
    ffi,
    folio::{is_ksm_mapping, node_id_of, Content, NodeId, PageRef},
    pte::{PteLock, PMD_SIZE},
    seen::SeenPage,
    vma::MergeableVma,
};
use crate::hash::Hasher;
use core::ptr::{self, NonNull};
use kernel::{
    bindings,
    ffi::{c_int, c_void},
    page::PAGE_SIZE,
    prelude::*,
};

/// The most pages that one walk adds to a batch: as many as one page table maps.
pub(crate) const BATCH_PAGES: usize = 512;

/// The most entries, or pages of a huge page, that are looked at under one hold of a page-table lock.
///
/// Each costs a few cache misses, and the process may spin for the lock in a fault.
const LOCK_ENTRIES: usize = 64;

/// The most page tables, and VMAs, that are gone through for one batch, as they may all be next to empty.
const WALK_TABLES: usize = 64;

/// The most tables one level above page tables that are gone through under one hold of `mmap_lock`.
///
/// Each has 512 entries for page tables or huge pages, which may all be empty, too.
const WALK_DIRECTORIES: usize = 16;

/// The longest range that is gone through under one hold of `mmap_lock`, in bytes: it has 8192 entries for such
/// tables, all of which may be empty.
const WALK_BYTES: usize = 8 << 40;

/// How many entries are looked at together to see whether they are all empty.
const FEW: usize = 8;

/// The pages that one step of a scan came by, in the order of their addresses.
///
/// Too large for the stack of the kernel, so it is initialised in place and used again for each step.
pub(crate) struct Batch {
    pages: [SeenPage; BATCH_PAGES],
    len: usize,
    /// An address in each page table that has entries of pages which are swapped out or being moved.
    away: [usize; WALK_TABLES],
    away_len: usize,
    left: WalkBudget,
}

/// What is left of the budget of one hold of `mmap_lock`. It does not depend on what the process has mapped.
struct WalkBudget {
    /// Page tables, and VMAs.
    tables: usize,
    /// Tables one level above page tables.
    directories: usize,
    bytes: usize,
}

impl WalkBudget {
    const fn new() -> Self {
        Self {
            tables: WALK_TABLES,
            directories: WALK_DIRECTORIES,
            bytes: WALK_BYTES,
        }
    }

    /// Whether the walk is over.
    fn is_used_up(&self) -> bool {
        self.tables == 0 || self.directories == 0 || self.bytes == 0
    }

    /// Takes the bytes of `from..end`, or as many of them as are left. Returns the end of these.
    fn take_bytes(&mut self, from: usize, end: usize) -> usize {
        let end = end.min(from.saturating_add(self.bytes));
        self.bytes = self.bytes.saturating_sub(end.saturating_sub(from));
        end
    }

    /// Takes a page table. Returns whether that was the last one.
    fn take_table(&mut self) -> bool {
        self.tables = self.tables.saturating_sub(1);
        self.tables == 0
    }

    /// Takes a table of page tables. Returns whether there was one left.
    fn take_directory(&mut self) -> bool {
        let any = self.directories != 0;
        self.directories = self.directories.saturating_sub(1);
        any
    }
}

impl Batch {
    /// Initialises it in place, without pages.
    pub(crate) fn init() -> impl Init<Self> {
        init!(Self {
            pages <- pin_init::init_array_from_fn(|_| SeenPage::default()),
            len: 0,
            away <- pin_init::init_array_from_fn(|_| 0),
            away_len: 0,
            left: WalkBudget::new(),
        })
    }

    /// Takes all pages out, and renews the budget. Call it once for each hold of `mmap_lock`.
    pub(crate) fn clear(&mut self) {
        self.len = 0;
        self.away_len = 0;
        self.left = WalkBudget::new();
    }

    /// Whether [`fill`] would add nothing, with the same `max`: there are enough pages, or the budget is used up.
    pub(crate) fn is_full(&self, max: usize) -> bool {
        self.len >= max.min(BATCH_PAGES) || self.left.is_used_up()
    }

    /// Returns the pages, in ascending order of their addresses.
    pub(crate) fn pages(&self) -> &[SeenPage] {
        self.pages.get(..self.len).unwrap_or(&[])
    }

    /// Returns an address in each page table that has entries of pages which are swapped out or being migrated.
    ///
    /// Such a page may be a KSM page, and may be back at any time without the engine noticing.
    pub(crate) fn away(&self) -> &[usize] {
        self.away.get(..self.away_len).unwrap_or(&[])
    }

    /// Notes that `addr` has the entry of a page that is away.
    ///
    /// Not inlined into the loop over entries, which has no register to spare.
    #[cold]
    #[inline(never)]
    fn push_away(&mut self, addr: usize) {
        let is_noted = self
            .away()
            .last()
            .is_some_and(|last| last / PMD_SIZE == addr / PMD_SIZE);
        // There is room: no more tables than that are gone through for a batch.
        if let (false, Some(slot)) = (is_noted, self.away.get_mut(self.away_len)) {
            *slot = addr;
            self.away_len = self.away_len.wrapping_add(1);
        }
    }

    /// Adds a page, if there is room.
    #[inline(always)]
    fn push(&mut self, page: SeenPage) {
        if let Some(slot) = self.pages.get_mut(self.len) {
            *slot = page;
            self.len = self.len.wrapping_add(1);
        }
    }
}

/// Adds pages of `vma` in `from..limit` to `batch`, until that has `max` pages or its budget is used up.
///
/// Returns the address to continue at. That is the end of the VMA, or `limit`, if there are no more pages before
/// it. The caller clears the batch before the first VMA, and comes with VMAs in ascending order.
///
/// `hasher` takes the samples in place. The mappings keep the pages, under the page-table lock, so no reference
/// is taken. Of a VMA that is not mergeable, only KSM pages are added.
///
/// Takes page-table locks, one at a time.
pub(crate) fn fill(
    vma: &MergeableVma<'_>,
    from: usize,
    limit: usize,
    max: usize,
    hasher: &Hasher,
    batch: &mut Batch,
) -> usize {
    let end = batch.left.take_bytes(from, vma.end().min(limit));
    let max = max.min(BATCH_PAGES);
    let mut reached = end;
    // Many areas without a single page table must not be walked under one hold of `mmap_lock` either.
    batch.left.take_table();
    let mut visit = Visit::Scan {
        batch,
        max,
        hasher,
        ksm_only: !vma.is_mergeable(),
        reached: &mut reached,
    };
    walk(vma, from, end, &mut visit);
    match batch.pages().last() {
        Some(last) if batch.len >= max => last.addr().saturating_add(PAGE_SIZE),
        _ => reached,
    }
}

/// Returns the anonymous page at `addr`, with a reference.
///
/// Unlike [`PteLock::anon_page`](super::pte::PteLock::anon_page), this finds a part of a huge page as well.
pub(super) fn page_at(vma: &MergeableVma<'_>, addr: usize) -> Option<PageRef> {
    let mut visit = Visit::Get(None);
    walk(vma, addr, addr.saturating_add(PAGE_SIZE), &mut visit);
    match visit {
        Visit::Get(page) => page,
        _ => None,
    }
}

/// Returns the address of the first KSM page, or KSM-placed zero page, in `from..end`.
///
/// A KSM page that is being migrated counts, as it stays a KSM page. The unshare fault waits for the migration.
pub(super) fn next_ksm_page(vma: &MergeableVma<'_>, from: usize, end: usize) -> Search {
    let mut left = WalkBudget::new();
    let end = left.take_bytes(from, end);
    let mut search = Search::Nothing(end);
    let mut visit = Visit::FindKsm(&mut search, left);
    walk(vma, from, end, &mut visit);
    search
}

/// The result of [`next_ksm_page`].
#[derive(Clone, Copy)]
pub(super) enum Search {
    /// There is a KSM page at this address.
    Found(usize),
    /// There is none before this address. Continue there, unless it is the end of the range.
    Nothing(usize),
}

/// What to do with the pages of a walk.
enum Visit<'a> {
    /// Add them to a batch: [`fill`].
    Scan {
        batch: &'a mut Batch,
        max: usize,
        hasher: &'a Hasher,
        /// Whether only KSM pages matter.
        ksm_only: bool,
        /// Where the walk ended, if its budget was used up.
        reached: &'a mut usize,
    },
    /// Take a reference on the first one: [`page_at`].
    Get(Option<PageRef>),
    /// Find a KSM page: [`next_ksm_page`].
    FindKsm(&'a mut Search, WalkBudget),
}

impl Visit<'_> {
    /// Returns what is left of the budget, if anything but its range bounds the walk.
    fn allowance(&mut self) -> Option<&mut WalkBudget> {
        match self {
            Visit::Scan { batch, .. } => Some(&mut batch.left),
            Visit::FindKsm(_, left) => Some(left),
            Visit::Get(_) => None,
        }
    }

    /// Notes that the budget was used up, and that the walk ends at `addr`.
    fn stop_at(&mut self, addr: usize) {
        match self {
            Visit::Scan { reached, .. } => **reached = addr,
            Visit::FindKsm(search, _) => **search = Search::Nothing(addr),
            Visit::Get(_) => {}
        }
    }

    /// Looks at one page. Returns whether the walk is over.
    ///
    /// # Safety
    ///
    /// `page` is mapped at `addr`, under a page-table lock that the caller holds.
    unsafe fn page(&mut self, addr: usize, page: NonNull<bindings::page>) -> bool {
        // SAFETY: By the caller's promise the mapping keeps the page.
        let folio = unsafe { ffi::rksm_page_folio(page.as_ptr()) };
        // SAFETY: The mapping keeps the folio of the page, too.
        let ksm = unsafe { ffi::rksm_folio_test_ksm(folio) };
        // SAFETY: The mapping keeps the folio.
        let anon = ksm || unsafe { ffi::rksm_folio_test_plain_anon(folio) };
        // Broken memory must not be read. A KSM page is not read anyway, and must stay listed: by its rmap
        // items, memory_failure() finds the processes to unmap it from.
        // SAFETY: The mapping keeps the page.
        let sound = ksm || anon && !unsafe { ffi::rksm_page_test_hwpoison(page.as_ptr()) };
        match self {
            Visit::Scan {
                batch,
                max,
                hasher,
                ksm_only,
                ..
            } if sound && (ksm || !*ksm_only) => {
                batch.push(if ksm {
                    // SAFETY: The folio is mapped under a page-table lock that the caller holds.
                    SeenPage::ksm(addr, unsafe { node_id_of(folio) })
                } else {
                    // SAFETY: The mapping keeps the page and with it the content, under the caller's lock.
                    let content = unsafe { Content::new(ffi::rksm_page_content(page.as_ptr())) };
                    let sample = hasher.sample(|i| content.word(i));
                    // SAFETY: The mapping keeps the page.
                    let node = || unsafe { ffi::rksm_page_nid(page.as_ptr()) };
                    SeenPage::anon(addr, hasher.on_node(sample, node))
                });
                batch.len >= *max
            }
            Visit::Get(slot) if sound => {
                // SAFETY: The mapping keeps the page, so the count of its folio is not zero. `from_raw` takes
                // over the reference that `rksm_folio_get` takes.
                *slot = Some(unsafe {
                    ffi::rksm_folio_get(folio);
                    PageRef::from_raw(page)
                });
                true
            }
            Visit::FindKsm(search, _) if ksm => {
                **search = Search::Found(addr);
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
        // SAFETY: The callee looks at a value.
        if unsafe { ffi::rksm_pte_present(entry) } {
            // SAFETY: By the caller's promise the entry stands at `addr` in `vma`, under its lock.
            if let Some(page) = NonNull::new(unsafe { ffi::rksm_normal_page(vma, addr, entry) }) {
                // SAFETY: The entry maps the page at `addr`, under the caller's lock.
                return unsafe { self.page(addr, page) };
            }
        }
        let Visit::FindKsm(search, _) = self else {
            return false;
        };
        // SAFETY: The tests look at a value, or at the folio of a migration entry. The task that migrates the
        // folio keeps it, locked, until it replaces the entry under the lock that the caller holds.
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
            **search = Search::Found(addr);
        }
        found
    }

    /// Looks at the part `addr..end` of a page table, as far as one hold of its lock goes.
    ///
    /// Returns whether the walk is over, and the address behind the last entry; or `None` if there is no page
    /// table.
    ///
    /// # Safety
    ///
    /// `pmd` is the entry for `addr..end` in `vma`, whose `mmap_lock` is held.
    unsafe fn table(
        &mut self,
        vma: *mut bindings::vm_area_struct,
        pmd: *mut bindings::pmd_t,
        addr: usize,
        end: usize,
    ) -> Option<(bool, usize)> {
        let mut ptl = ptr::null_mut();
        // SAFETY: By the caller's promise the VMA is valid, and `pmd` is not freed while `mmap_lock` is held.
        // The callee checks under RCU that it still leads to a page table.
        let first = unsafe { ffi::rksm_pte_lock((*vma).vm_mm, pmd, addr, &mut ptl) };
        if first.is_null() {
            return None;
        }
        let result = if let Visit::Scan {
            batch,
            max,
            hasher,
            ksm_only,
            ..
        } = self
        {
            // SAFETY: The entries of `addr..end` start at `first`, and their lock is held.
            unsafe {
                if *ksm_only {
                    scan_entries::<true>(first, addr, end, batch, *max, hasher)
                } else {
                    scan_entries::<false>(first, addr, end, batch, *max, hasher)
                }
            }
        } else {
            let end = end.min(addr.saturating_add(LOCK_ENTRIES * PAGE_SIZE));
            let over = (addr..end).step_by(PAGE_SIZE).enumerate().any(|(i, addr)| {
                // SAFETY: `addr` lies in the range of the page table, which is mapped and locked. So the
                // pointer stays in the table, the entry can be read, and it stands at `addr` in `vma`.
                unsafe { self.entry(vma, addr, ffi::rksm_ptep_get(first.add(i))) }
            });
            (over, end)
        };
        // SAFETY: Locked above, and released here only.
        unsafe { ffi::rksm_pte_unlock(first, ptl) };
        Some(result)
    }

    /// Looks at the part `addr..end` of a huge page. Returns whether the walk is over.
    ///
    /// Returns `None` if `pmd` maps no huge page. Look at the page table then.
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
        // SAFETY: The table of `pmd` is not freed while `mmap_lock` is held, so the entry can be read without
        // its lock, and that lock exists. The test looks at a value. The VMA is valid.
        let ptl = unsafe {
            if !ffi::rksm_pmd_leaf(ffi::rksm_pmd_lockless(pmd)) {
                return None;
            }
            ffi::rksm_pmd_lock((*vma).vm_mm, pmd)
        };
        // SAFETY: The page-table lock is held, so the entry does not change, and its mapping keeps the huge
        // page. The tests look at values. `rksm_normal_page_pmd` returns the first page of the huge page.
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
        // SAFETY: Locked above, and released here only.
        unsafe { ffi::rksm_ptl_unlock(ptl) };
        result
    }

    /// Looks at the pages of a huge page that are mapped at `addr..end`. Returns whether the walk is over.
    ///
    /// # Safety
    ///
    /// `page` is the first page of the huge page that is mapped around `addr..end`, under a
    /// page-table lock that the caller holds.
    unsafe fn huge_pages(&mut self, page: *mut bindings::page, addr: usize, end: usize) -> bool {
        let first = (addr & (PMD_SIZE - 1)) / PAGE_SIZE;
        for (i, addr) in (addr..end).step_by(PAGE_SIZE).enumerate() {
            // SAFETY: `addr` lies in the huge page, so the page with this index is part of it.
            let Some(page) = NonNull::new(unsafe { ffi::rksm_nth_page(page, first + i) }) else {
                return false;
            };
            // SAFETY: By the caller's promise the page is mapped at `addr`, and the lock is held.
            if unsafe { self.page(addr, page) } {
                return true;
            }
        }
        false
    }
}

/// Whether an entry is empty: it maps nothing, and no page is away from it.
///
/// # Safety
///
/// `entry` is mapped. It is one word, which the MMU may change at any time.
#[inline(always)]
unsafe fn is_empty(entry: *const bindings::pte_t) -> bool {
    // SAFETY: By the caller's promise the entry can be read, and an entry is one aligned word.
    unsafe { entry.cast::<u64>().read_volatile() == 0 }
}

/// Whether [`FEW`] entries are empty.
///
/// # Safety
///
/// All of them are mapped, and `first` is the first one.
#[inline(always)]
unsafe fn are_empty(first: *const bindings::pte_t) -> bool {
    // SAFETY: By the caller's promise the entries can be read, and each is one aligned word.
    let word = |i| unsafe { first.cast::<u64>().add(i).read_volatile() };
    // Written out: the compiler does not combine the tests of volatile reads.
    const { assert!(FEW == 8) };
    let left = word(0) | word(1) | word(2) | word(3);
    let right = word(4) | word(5) | word(6) | word(7);
    left | right == 0
}

/// Adds the anonymous pages of `addr..end` to `batch`, or with `KSM_ONLY` the KSM pages among them.
///
/// Stops when the batch has `max` pages, or after [`LOCK_ENTRIES`] entries; empty ones do not count. Returns
/// whether the batch is full, and the address behind the last entry.
///
/// This is the inner loop of the scan. So it is generic over `KSM_ONLY`, has no [`Visit`] to match, and makes one
/// call of C for each entry.
///
/// # Safety
///
/// The page-table entries of `addr..end` start at `first`, and their lock is held.
unsafe fn scan_entries<const KSM_ONLY: bool>(
    first: *mut bindings::pte_t,
    addr: usize,
    end: usize,
    batch: &mut Batch,
    max: usize,
    hasher: &Hasher,
) -> (bool, usize) {
    let mut mapped = ffi::rksm_mapped {
        mapping: 0,
        content: ptr::null(),
    };
    let mut next = (first, addr);
    let mut left = LOCK_ENTRIES;
    while next.1 < end && left != 0 {
        let (entry, addr) = next;
        // Behind the last page this may wrap, but is not used then.
        next = (entry.wrapping_add(1), addr.wrapping_add(PAGE_SIZE));
        // SAFETY: By the caller's promise this is the entry of `addr`, and mapped.
        if unsafe { is_empty(entry) } {
            // Most entries of a sparse area are: look at several together.
            // SAFETY: `FEW` entries from this one on belong to addresses before `end`, so they are mapped.
            while end.wrapping_sub(next.1) >= FEW * PAGE_SIZE && unsafe { are_empty(next.0) } {
                next = (
                    next.0.wrapping_add(FEW),
                    next.1.wrapping_add(FEW * PAGE_SIZE),
                );
            }
            continue;
        }
        left = left.wrapping_sub(1);
        // SAFETY: The entry is mapped and its lock held, which keeps what it maps. `mapped` can be written.
        if !unsafe { ffi::rksm_entry_anon(entry, &raw mut mapped) } {
            // SAFETY: The entry is mapped.
            if unsafe { ffi::rksm_entry_away(entry) } {
                batch.push_away(addr);
            }
            continue;
        }
        batch.push(if is_ksm_mapping(mapped.mapping) {
            SeenPage::ksm(addr, NodeId::of_mapping(mapped.mapping))
        } else if KSM_ONLY {
            continue;
        } else {
            // SAFETY: `rksm_entry_anon` returned the content of the page that the entry maps. The mapping keeps
            // it, under the lock.
            let content = unsafe { Content::new(mapped.content) };
            let sample = hasher.sample(|i| content.word(i));
            // SAFETY: The content is that of a page, which the mapping keeps.
            let node = || unsafe { ffi::rksm_content_nid(mapped.content) };
            SeenPage::anon(addr, hasher.on_node(sample, node))
        });
        if batch.len >= max {
            return (true, next.1);
        }
    }
    (false, next.1)
}

/// Walks the part of `start..end` that lies in `vma`, and calls `visit` for its pages.
///
/// The kernel's walker calls [`rksm_walk_pud`] and [`rksm_walk_pmd`]. Takes page-table locks, one at a time.
fn walk(vma: &MergeableVma<'_>, start: usize, end: usize, visit: &mut Visit<'_>) {
    let start = start.max(vma.start());
    let end = end.min(vma.end());
    if start < end {
        // SAFETY: By the type invariant of `vma`, `mmap_lock` is held, and the range lies in the VMA. `visit` is
        // what the two callbacks expect, and is borrowed until this returns.
        unsafe { ffi::rksm_walk_vma(vma.as_ptr(), start, end, ptr::from_mut(visit).cast()) };
    }
}

/// Called by the kernel's page walker for each populated entry of the second-lowest level.
///
/// Such an entry leads to a page table, or maps a huge page. The call comes through helpers/pgtable.c. Returns 1
/// if the walk is over.
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
    // SAFETY: By the caller's promise `ctx` is the `Visit` that `walk` has lent to the walker.
    let visit = unsafe { &mut *ctx.cast::<Visit<'_>>() };
    let mut from = addr;
    while from < end {
        let to = end.min(from.saturating_add(LOCK_ENTRIES * PAGE_SIZE));
        // A huge page may be split or made at any time between two holds of the lock.
        // SAFETY: By the caller's promise `pmd` is the entry for these addresses in `vma`.
        let result = match unsafe { visit.huge(vma, pmd, from, to) } {
            // SAFETY: By the caller's promise `pmd` is the entry for these addresses in `vma`.
            None => unsafe { visit.table(vma, pmd, from, end) },
            Some(over) => Some((over, to)),
        };
        match result {
            Some((false, to)) => from = to,
            Some((true, _)) => return 1,
            None => break,
        }
    }
    let over = visit.allowance().is_some_and(WalkBudget::take_table);
    if over {
        visit.stop_at(end);
    }
    over.into()
}

/// Called by the kernel's page walker for each table one level above page tables, before its entries.
///
/// The part of the table that is walked begins at `addr`. The call comes through helpers/pgtable.c. Returns 1 if
/// the walk is over.
///
/// # Safety
///
/// `ctx` is the `Visit` of [`walk`].
#[no_mangle]
unsafe extern "C" fn rksm_walk_pud(ctx: *mut c_void, addr: usize) -> c_int {
    // SAFETY: By the caller's promise `ctx` is the `Visit` that `walk` has lent to the walker.
    let visit = unsafe { &mut *ctx.cast::<Visit<'_>>() };
    let over = visit.allowance().is_some_and(|left| !left.take_directory());
    if over {
        visit.stop_at(addr);
    }
    over.into()
}

impl MergeableVma<'_> {
    /// Returns the anonymous page at `addr`, with a reference. Finds parts of huge pages, too.
    ///
    /// Takes the page-table lock for a moment. The page may be unmapped as soon as this returns, so
    /// operations on it check under that lock whether it is still mapped.
    pub(crate) fn page_at(&self, addr: usize) -> Option<PageRef> {
        match PteLock::new(self, addr) {
            Some(pte) => pte.anon_page(),
            // No page table: there may be a huge page.
            None => page_at(self, addr),
        }
    }
}
