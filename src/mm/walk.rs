// SPDX-License-Identifier: GPL-2.0

//! Walking the page tables of one VMA, many pages under one page-table lock.
//!
//! The kernel's own page walker finds the tables and skips what is not populated; this looks at the
//! entries of one table at a time.

use super::{
    entry::PageEntry,
    ffi,
    folio::{is_ksm_mapping, node_id_of, Content, PageRef},
    stable_node::NodeId,
    vma::MergeableVma,
};
use crate::hash::{Hasher, Sample};
use core::ptr::{self, NonNull};
use kernel::{
    bindings,
    ffi::{c_int, c_void},
    page::PAGE_SIZE,
    prelude::*,
};

/// The most pages that one walk comes by: those of one page table.
pub(crate) const BATCH_PAGES: usize = 512;

/// The most entries, or pages of a huge page, that are looked at under one hold of a page-table lock.
const LOCK_ENTRIES: usize = 64;

/// The most page tables, and areas, that are gone through for one batch, as they may all be next to empty.
const WALK_TABLES: usize = 64;

/// The most tables one level above (of 512 page tables, or huge pages, each) that are gone through under one
/// hold of `mmap_lock`: these may be empty, too.
const WALK_DIRECTORIES: usize = 16;

/// The longest range that is gone through under one hold of `mmap_lock`, in bytes: it has 8192 entries for such
/// tables, all of which may be empty.
const WALK_BYTES: usize = 8 << 40;

/// How many entries are looked at together to see whether they are all empty.
const FEW: usize = 8;

/// What a page was when the walk came by.
#[derive(Clone, Copy)]
pub(crate) enum Seen {
    /// An anonymous page with this sample.
    Anon(Sample),
    /// A KSM page of the node with this identity (none: of no node).
    Ksm(Option<NodeId>),
}

/// One page that a walk came by.
#[derive(Clone, Copy, Default)]
pub(crate) struct SeenPage {
    addr: usize,
    /// A sample in the high half and a set low bit, or the address of a node.
    what: u64,
}

impl SeenPage {
    #[inline(always)]
    fn anon(addr: usize, sample: Sample) -> Self {
        Self {
            addr,
            what: u64::from(sample.get()) << 32 | 1,
        }
    }

    fn ksm(addr: usize, node: Option<NodeId>) -> Self {
        Self {
            addr,
            what: node.map_or(0, NodeId::get) as u64,
        }
    }

    /// Its address, page aligned.
    #[inline(always)]
    pub(crate) fn addr(self) -> usize {
        self.addr
    }

    /// Whether it was an anonymous page, and `word` says that it was steady, with the same sample; or
    /// whether it was a KSM page, and `word` says that it is listed with the same node.
    #[inline(always)]
    pub(crate) fn is_unchanged(self, word: &PageEntry) -> bool {
        if self.what & 1 != 0 {
            word.is_steady_with(self.what)
        } else {
            word.is_listed_with(self.what)
        }
    }

    /// Its sample, if it was an anonymous page.
    #[inline(always)]
    pub(crate) fn sample(self) -> Option<Sample> {
        (self.what & 1 != 0).then(|| Sample::from_raw((self.what >> 32) as u32))
    }

    /// What it was.
    #[inline(always)]
    pub(crate) fn seen(self) -> Seen {
        if self.what & 1 != 0 {
            Seen::Anon(Sample::from_raw((self.what >> 32) as u32))
        } else {
            Seen::Ksm(NodeId::new(self.what as usize))
        }
    }
}

/// The pages that one step of a scan came by, in the order of their addresses. Too large for the
/// stack.
pub(crate) struct Batch {
    pages: [SeenPage; BATCH_PAGES],
    len: usize,
    /// An address in each page table that has entries of pages which are swapped out or being moved.
    away: [usize; WALK_TABLES],
    away_len: usize,
    left: WalkBudget,
}

/// What is left of what may be gone through under one hold of `mmap_lock`. None of it depends on what the
/// process has mapped.
struct WalkBudget {
    /// Page tables, and areas.
    tables: usize,
    /// Tables of page tables.
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

    fn is_used_up(&self) -> bool {
        self.tables == 0 || self.directories == 0 || self.bytes == 0
    }

    /// Takes the bytes of `from..end`, or as many as there are. Returns the end of these.
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

    /// Takes all pages out.
    pub(crate) fn clear(&mut self) {
        self.len = 0;
        self.away_len = 0;
        self.left = WalkBudget::new();
    }

    /// Whether [`fill`] would not add anything, with the same `max`.
    pub(crate) fn is_full(&self, max: usize) -> bool {
        self.len >= max.min(BATCH_PAGES) || self.left.is_used_up()
    }

    /// The pages, in the order of their addresses.
    pub(crate) fn pages(&self) -> &[SeenPage] {
        self.pages.get(..self.len).unwrap_or(&[])
    }

    /// An address in each page table that had entries of pages which are swapped out or being moved. Such a page may
    /// be a merged one.
    pub(crate) fn away(&self) -> &[usize] {
        self.away.get(..self.away_len).unwrap_or(&[])
    }

    /// Out of the way of the loop over entries, which has no register to spare.
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

    #[inline(always)]
    fn push(&mut self, page: SeenPage) {
        if let Some(slot) = self.pages.get_mut(self.len) {
            *slot = page;
            self.len = self.len.wrapping_add(1);
        }
    }
}

/// Adds pages of `vma` from `from` on, and before `limit`, to `batch`, until it has `max` of them, or fewer when they lie far
/// apart. Returns the address to go on from, which is the VMA's end, or `limit`, when there are no more
/// pages before that.
/// The batch was cleared before its first area; areas come in the order of their addresses.
///
/// Samples are taken in place by `hasher`, under the page-table lock, which is what keeps the pages. No
/// reference is taken. A page-table lock is held for [`LOCK_ENTRIES`] entries at most. Of a VMA that is not
/// mergeable it adds KSM pages only.
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
        Some(last) if batch.len >= max => last.addr.saturating_add(PAGE_SIZE),
        _ => reached,
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

/// The first KSM page (or KSM-placed zero page) in `from..end`, or how far that was looked for.
///
/// A page that is being migrated counts: KSM pages stay KSM pages until they are freed, and the
/// unshare fault waits for the migration.
pub(super) fn next_ksm_page(vma: &MergeableVma<'_>, from: usize, end: usize) -> Search {
    let mut left = WalkBudget::new();
    let end = left.take_bytes(from, end);
    let mut search = Search::Nothing(end);
    let mut visit = Visit::FindKsm(&mut search, left);
    walk(vma, from, end, &mut visit);
    search
}

/// What [`next_ksm_page`] came to.
#[derive(Clone, Copy)]
pub(super) enum Search {
    /// There is one at this address.
    Found(usize),
    /// There is none before this address, from where on nobody looked.
    Nothing(usize),
}

/// What to do with the pages of a walk.
enum Visit<'a> {
    Scan {
        batch: &'a mut Batch,
        max: usize,
        hasher: &'a Hasher,
        /// Whether only KSM pages matter.
        ksm_only: bool,
        /// How far the walk came, if it ended for having gone through many page tables.
        reached: &'a mut usize,
    },
    Get(Option<PageRef>),
    FindKsm(&'a mut Search, WalkBudget),
}

impl Visit<'_> {
    /// What is left of what it may go through, if there is any limit but its range.
    fn allowance(&mut self) -> Option<&mut WalkBudget> {
        match self {
            Visit::Scan { batch, .. } => Some(&mut batch.left),
            Visit::FindKsm(_, left) => Some(left),
            Visit::Get(_) => None,
        }
    }

    /// Notes that the walk ends at `addr`, for having used that up.
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
        // SAFETY: the page is kept by its mapping.
        let folio = unsafe { ffi::rksm_page_folio(page.as_ptr()) };
        // SAFETY: as above.
        let ksm = unsafe { ffi::rksm_folio_test_ksm(folio) };
        // SAFETY: as above.
        let anon = ksm || unsafe { ffi::rksm_folio_test_plain_anon(folio) };
        // Broken memory must not be read. A KSM page is not read anyway, and must stay listed: whoever is
        // about to unmap it finds it by that.
        // SAFETY: as above.
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
                    // SAFETY: as above.
                    SeenPage::ksm(addr, unsafe { node_id_of(folio) })
                } else {
                    // SAFETY: the content is kept by the mapping of the page.
                    let content = unsafe { Content::new(ffi::rksm_page_content(page.as_ptr())) };
                    let sample = hasher.sample(|nth| content.word(nth));
                    // SAFETY: as above.
                    let node = || unsafe { ffi::rksm_page_nid(page.as_ptr()) };
                    SeenPage::anon(addr, hasher.on_node(sample, node))
                });
                batch.len >= *max
            }
            Visit::Get(slot) if sound => {
                // SAFETY: the page is kept by its mapping, so its folio's count is not zero.
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
        // SAFETY: looks at a value.
        if unsafe { ffi::rksm_pte_present(entry) } {
            // SAFETY: the caller's promise.
            if let Some(page) = NonNull::new(unsafe { ffi::rksm_normal_page(vma, addr, entry) }) {
                // SAFETY: the entry maps it.
                return unsafe { self.page(addr, page) };
            }
        }
        let Visit::FindKsm(search, _) = self else {
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
            **search = Search::Found(addr);
        }
        found
    }

    /// Looks at the part `addr..end` of a page table, as far as that goes under one hold of its lock.
    /// Returns whether the walk is over, and how far this came; or `None` if there is no page table.
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
        // SAFETY: the VMA is valid; `pmd` is not freed while `mmap_lock` is held. That it still leads to
        // a page table is checked by the callee, under RCU.
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
            // SAFETY: the entries of `addr..end` start at `first`, and their lock is held.
            unsafe {
                if *ksm_only {
                    scan_entries::<true>(first, addr, end, batch, *max, hasher)
                } else {
                    scan_entries::<false>(first, addr, end, batch, *max, hasher)
                }
            }
        } else {
            let end = end.min(addr.saturating_add(LOCK_ENTRIES * PAGE_SIZE));
            let over = (addr..end)
                .step_by(PAGE_SIZE)
                .enumerate()
                .any(|(nth, addr)| {
                    // SAFETY: `addr` lies in the range of the page table, which is mapped and locked.
                    unsafe { self.entry(vma, addr, ffi::rksm_ptep_get(first.add(nth))) }
                });
            (over, end)
        };
        // SAFETY: locked above.
        unsafe { ffi::rksm_pte_unlock(first, ptl) };
        Some(result)
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

/// Whether an entry is empty.
///
/// # Safety
///
/// `entry` is mapped. (It is one word, which the MMU may change at any time.)
#[inline(always)]
unsafe fn is_empty(entry: *const bindings::pte_t) -> bool {
    // SAFETY: the caller's promise.
    unsafe { entry.cast::<u64>().read_volatile() == 0 }
}

/// Whether [`FEW`] entries are empty.
///
/// # Safety
///
/// All of them are mapped, and `first` is the first one.
#[inline(always)]
unsafe fn are_empty(first: *const bindings::pte_t) -> bool {
    // SAFETY: the caller's promise.
    let word = |nth| unsafe { first.cast::<u64>().add(nth).read_volatile() };
    // Written out, since reads that are volatile are not combined by the compiler.
    const { assert!(FEW == 8) };
    let left = word(0) | word(1) | word(2) | word(3);
    let right = word(4) | word(5) | word(6) | word(7);
    left | right == 0
}

/// Puts the anonymous pages of `addr..end` into `batch`, or the KSM pages among them. Returns whether it is full, and how far this came
/// when [`LOCK_ENTRIES`] were looked at, those that are empty left aside.
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
        // The address behind the last page may be no address any more, but is not used then.
        next = (entry.wrapping_add(1), addr.wrapping_add(PAGE_SIZE));
        // SAFETY: by the caller's promise this is the entry of `addr`.
        if unsafe { is_empty(entry) } {
            // Most entries of a sparse area are: look at several together.
            // SAFETY: as above, for so many.
            while end.wrapping_sub(next.1) >= FEW * PAGE_SIZE && unsafe { are_empty(next.0) } {
                next = (
                    next.0.wrapping_add(FEW),
                    next.1.wrapping_add(FEW * PAGE_SIZE),
                );
            }
            continue;
        }
        left = left.wrapping_sub(1);
        // SAFETY: as above. What the entry maps is kept by that, under the lock.
        if !unsafe { ffi::rksm_entry_anon(entry, &raw mut mapped) } {
            // SAFETY: as above.
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
            // SAFETY: as above.
            let content = unsafe { Content::new(mapped.content) };
            let sample = hasher.sample(|nth| content.word(nth));
            // SAFETY: as above.
            let node = || unsafe { ffi::rksm_content_nid(mapped.content) };
            SeenPage::anon(addr, hasher.on_node(sample, node))
        });
        if batch.len >= max {
            return (true, next.1);
        }
    }
    (false, next.1)
}

/// The size of what one entry of the second-lowest level of page tables maps.
pub(super) const PMD_SIZE: usize = 1 << 21;

fn walk(vma: &MergeableVma<'_>, start: usize, end: usize, visit: &mut Visit<'_>) {
    let start = start.max(vma.start());
    let end = end.min(vma.end());
    if start < end {
        // SAFETY: `mmap_lock` is held by the type invariant of `vma`, the range lies in it, and
        // `visit` is what `rksm_walk_pmd` expects, used by nobody else until this returns.
        unsafe { ffi::rksm_walk_vma(vma.as_ptr(), start, end, ptr::from_mut(visit).cast()) };
    }
}

/// Called by the kernel's page walker (through helpers/pgtable.c) for each populated entry of the second-lowest
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
    let mut from = addr;
    while from < end {
        let to = end.min(from.saturating_add(LOCK_ENTRIES * PAGE_SIZE));
        // A huge page may be split or made at any time between two holds of the lock.
        // SAFETY: the caller's promise.
        let result = match unsafe { visit.huge(vma, pmd, from, to) } {
            // SAFETY: the caller's promise.
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

/// Called by the kernel's page walker (through helpers/pgtable.c) for each table of page tables, which begins at
/// `addr`, before its entries are gone through. Returns 1 when the walk is over.
///
/// # Safety
///
/// `ctx` is the `Visit` of [`walk`].
#[no_mangle]
unsafe extern "C" fn rksm_walk_pud(ctx: *mut c_void, addr: usize) -> c_int {
    // SAFETY: the caller's promise; the walker calls this from `walk` only, which lent us `visit`.
    let visit = unsafe { &mut *ctx.cast::<Visit<'_>>() };
    let over = visit.allowance().is_some_and(|left| !left.take_directory());
    if over {
        visit.stop_at(addr);
    }
    over.into()
}
