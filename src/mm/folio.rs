// SPDX-License-Identifier: GPL-2.0

//! Owned references to pages of user memory, and the folio lock.
//!
//! [`PageRef`] owns a reference, [`LockedPage`] the folio lock as well. What a test says of an unlocked folio may
//! be outdated when it arrives. Under the folio lock, a page does not become a KSM page or stop being one, is
//! not migrated, and is not added to the swap cache.

use super::{ffi, lru};
use crate::hash::{Checksum, Hasher, Sample, LINES, LINE_WORDS, PAGE_WORDS};
use core::{cell::Cell, marker::PhantomData, mem::ManuallyDrop, num::NonZeroUsize, ptr::NonNull};
use kernel::{bindings, error::to_result, prelude::*};

/// The low bits of `folio->mapping` that say what the rest of it points at: `FOLIO_MAPPING_FLAGS`.
///
/// | bits | the rest | the folio |
/// | --- | --- | --- |
/// | both | a stable node | KSM folio of that node |
/// | both | null | KSM folio without a node: it is copied on a write or a swap-in, and no rmap walk finds it |
/// | the first | an `anon_vma` | ordinary anonymous folio |
/// | none | an `address_space`, or null | page of a file; or free |
pub(super) const MAPPING_FLAGS: usize = 3;

/// The identity of a stable node: its address, which is what a KSM page shows.
///
/// It can only be compared. The node may be freed by the time its identity is looked at, and a new one may have
/// the same address.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct NodeId(NonZeroUsize);

impl NodeId {
    /// The identity of the node at `addr`; `None` for zero.
    pub(super) fn new(addr: usize) -> Option<Self> {
        NonZeroUsize::new(addr).map(Self)
    }

    /// The identity that the `mapping` of a KSM folio shows; `None` if that folio has no node.
    pub(super) fn of_mapping(mapping: usize) -> Option<Self> {
        Self::new(mapping & !MAPPING_FLAGS)
    }

    /// Returns the identity as a number that is even, and not zero.
    pub(super) fn get(self) -> usize {
        self.0.get()
    }
}

/// One page of an anonymous folio, with a reference on that folio.
///
/// The reference keeps the memory, not the mapping: the process may unmap the page, or write to it, at any time.
/// The content is only read through raw pointers, see [`Content`].
///
/// # Invariants
///
/// `page` is valid and part of `folio`, and this object owns one reference on that folio. No other task can split
/// the folio meanwhile: a split needs all references but those of the mappings.
pub(crate) struct PageRef {
    page: NonNull<bindings::page>,
    folio: Cell<*mut bindings::folio>,
}

impl PageRef {
    /// Takes over a reference that the caller holds on the folio of `page`.
    ///
    /// # Safety
    ///
    /// `page` is valid, and the caller gives up one reference on its folio.
    pub(super) unsafe fn from_raw(page: NonNull<bindings::page>) -> Self {
        // INVARIANT: The caller hands over the reference.
        Self {
            page,
            // SAFETY: By the caller's promise the page is valid.
            folio: Cell::new(unsafe { ffi::rksm_page_folio(page.as_ptr()) }),
        }
    }

    /// Returns the page, which is valid as long as `self` is.
    pub(super) fn as_ptr(&self) -> *mut bindings::page {
        self.page.as_ptr()
    }

    /// Returns the folio that the page is part of, which is valid as long as `self` is.
    ///
    /// It changes only in [`LockedPage::split`].
    pub(super) fn folio(&self) -> *mut bindings::folio {
        self.folio.get()
    }

    /// Returns the page frame number.
    pub(crate) fn pfn(&self) -> usize {
        // SAFETY: By the type invariant the page is valid.
        unsafe { ffi::rksm_page_pfn(self.as_ptr()) }
    }

    /// The number of the memory node that the page is on.
    pub(crate) fn nid(&self) -> u32 {
        // SAFETY: By the type invariant the page is valid.
        unsafe { ffi::rksm_page_nid(self.as_ptr()) }
    }

    /// Returns the identity of the stable node that this page belongs to, if it is a KSM page of a node.
    pub(crate) fn node_id(&self) -> Option<NodeId> {
        // SAFETY: By the type invariant the folio is valid.
        unsafe { node_id_of(self.folio()) }
    }

    /// Whether this is an anonymous page that can be merged: neither a KSM page nor device memory.
    pub(crate) fn is_plain_anon(&self) -> bool {
        // SAFETY: By the type invariant the folio is valid.
        unsafe { ffi::rksm_folio_test_plain_anon(self.folio()) }
    }

    /// Whether the page is part of a folio of more than one page.
    pub(crate) fn is_large(&self) -> bool {
        // SAFETY: By the type invariant the folio is valid.
        unsafe { ffi::rksm_folio_test_large(self.folio()) }
    }

    /// Whether any page table maps the folio. A folio that is being migrated is mapped nowhere for a moment.
    pub(crate) fn is_mapped(&self) -> bool {
        // SAFETY: By the type invariant the folio is valid.
        unsafe { ffi::rksm_folio_mapped(self.folio()) }
    }

    /// Whether the folio is in the swap cache, and so may be mapped again by a swap-in.
    pub(crate) fn is_swapcache(&self) -> bool {
        // SAFETY: By the type invariant the folio is valid.
        unsafe { ffi::rksm_folio_test_swapcache(self.folio()) }
    }

    /// Whether the kernel has given the page up because its memory is broken. It must not be read then.
    ///
    /// memory_failure() may mark the page at any time, but unmaps it under the folio lock only.
    pub(crate) fn is_poisoned(&self) -> bool {
        // SAFETY: By the type invariant the page is valid.
        unsafe { ffi::rksm_page_test_hwpoison(self.as_ptr()) }
    }

    /// Whether both pages are parts of one folio, and so share one folio lock.
    pub(crate) fn shares_folio_with(&self, other: &PageRef) -> bool {
        self.folio() == other.folio()
    }

    /// Whether the folio is locked, by this or by another task. The answer is a hint.
    pub(crate) fn is_locked(&self) -> bool {
        // SAFETY: By the type invariant the folio is valid.
        unsafe { ffi::rksm_folio_test_locked(self.folio()) }
    }

    /// Whether the folio has a reference besides ours and those of the page tables and the swap cache.
    ///
    /// In mm/ksm.c, `write_protect_page()` has this check for "O_DIRECT or similar I/O" inline.
    ///
    /// Such a reference may be one of get_user_pages(), by which a device or a process writes to the page. It
    /// may also be one of a per-CPU LRU batch, which [`lru`] deals with. The answer is a hint, unless the caller
    /// holds the folio lock and no page table maps the page writable or readable for get_user_pages_fast().
    pub(crate) fn is_held_by_others(&self) -> bool {
        // SAFETY: By the type invariant the folio is valid, and both calls look at its counters.
        let (expected, refs) = unsafe {
            (
                ffi::rksm_folio_expected_refs(self.folio()),
                ffi::rksm_folio_ref_count(self.folio()),
            )
        };
        let held = i64::from(expected) + 1 != i64::from(refs);
        // SAFETY: By the type invariant the folio is valid.
        if held && unsafe { ffi::rksm_folio_maybe_batched(self.folio()) } {
            lru::note_in_the_way();
        }
        held
    }

    /// Whether both are the same page of memory, and not only equal ones.
    pub(crate) fn is_same(&self, other: &PageRef) -> bool {
        self.page == other.page
    }

    /// Returns the content of the page. Do not read it if the page is poisoned.
    fn content(&self) -> Content<'_> {
        // SAFETY: By the type invariant the page is valid, and our reference keeps the content.
        unsafe { Content::new(ffi::rksm_page_content(self.as_ptr())) }
    }

    /// Whether a byte of both pages differs.
    ///
    /// Unless no user can write to either page, the answer may be outdated when it arrives.
    pub(crate) fn differs_from(&self, other: &PageRef) -> bool {
        self.content().differs_from(other.content())
    }

    /// Whether all bytes are zero.
    ///
    /// Unless no user can write to the page, the answer may be outdated when it arrives.
    pub(crate) fn is_zero(&self) -> bool {
        // SAFETY: The kernel's zero page is never freed, and so its content is kept for any lifetime.
        let zero = unsafe { Content::new(ffi::rksm_zero_content()) };
        !self.content().differs_from(zero)
    }

    /// Returns the checksum of the content as it is now.
    ///
    /// If the content changes meanwhile, this is the checksum of nothing in particular.
    pub(crate) fn checksum(&self, hasher: &Hasher) -> Checksum {
        let content = self.content();
        let sum = hasher.checksum(|i| content.word(i), |i| content.line(i));
        sum.with_sample(hasher.on_node(sum.sample(), || self.nid()))
    }

    /// Returns the sample of the content as it is now.
    pub(crate) fn sample(&self, hasher: &Hasher) -> Sample {
        let content = self.content();
        hasher.on_node(hasher.sample(|i| content.word(i)), || self.nid())
    }

    /// Locks the folio, unless it is locked already. Does not sleep.
    ///
    /// The folio lock nests inside `mmap_lock` and outside page-table locks. There is no way to wait for it:
    /// other tasks hold it while they reclaim or migrate, which may take long.
    ///
    /// # Errors
    ///
    /// Returns the page, with its reference, if the folio is locked.
    pub(crate) fn try_lock(self) -> Result<LockedPage, PageRef> {
        // SAFETY: By the type invariant the folio is valid.
        if unsafe { ffi::rksm_folio_trylock(self.folio()) } {
            // INVARIANT: The folio was locked just now.
            Ok(LockedPage {
                page: ManuallyDrop::new(self),
            })
        } else {
            Err(self)
        }
    }
}

impl Drop for PageRef {
    fn drop(&mut self) {
        // SAFETY: By the type invariant this object owns a reference, which it gives up here only.
        unsafe { ffi::rksm_folio_put(self.folio()) };
    }
}

/// The content of a page of user memory, which may change while it is looked at.
///
/// A reference to it would be undefined behaviour, as user space may write at any time. So all reads are
/// volatile, or in assembly. Whatever they return is a valid word.
///
/// # Invariants
///
/// `words` points at a page of memory that stays mapped in the kernel for `'a`.
#[derive(Clone, Copy)]
pub(super) struct Content<'a> {
    words: *const u64,
    _page: PhantomData<&'a PageRef>,
}

impl Content<'_> {
    /// The content that `content` points at.
    ///
    /// # Safety
    ///
    /// `content` points at the content of a page that is kept for `'a`: by a reference, or by a
    /// mapping under a page-table lock that is held.
    pub(super) unsafe fn new(content: *const kernel::ffi::c_void) -> Self {
        // INVARIANT: By the caller's promise.
        Self {
            words: content.cast(),
            _page: PhantomData,
        }
    }

    /// Reads word number `i` of the page, modulo its words.
    #[inline(always)]
    pub(super) fn word(self, i: usize) -> u64 {
        // SAFETY: The number is taken modulo the words of a page, so the word lies within it. By the type
        // invariant it can be read.
        unsafe { self.words.add(i % PAGE_WORDS).read_volatile() }
    }

    /// Reads cache line number `i` of the page, modulo its lines, a word at a time.
    #[inline(always)]
    fn line(self, i: usize) -> [u64; LINE_WORDS] {
        // SAFETY: The number is taken modulo the lines of a page, so the line lies within it.
        let line = unsafe { self.words.add(i % LINES * LINE_WORDS) };
        // SAFETY: Each word lies within the line, and by the type invariant it can be read.
        core::array::from_fn(|i| unsafe { line.add(i).read_volatile() })
    }

    /// Whether a word differs. Compares a cache line at a time, and stops at the first that differs.
    fn differs_from(self, other: Self) -> bool {
        (0..LINES).any(|i| {
            let at = i * LINE_WORDS;
            // SAFETY: `at` is a word of a page, so both lines lie within their pages. By the type invariant
            // they can be read.
            unsafe { line_differs(self.words.add(at), other.words.add(at)) }
        })
    }
}

/// Whether two cache lines of memory differ, which may change while they are compared.
///
/// In assembly, since volatile reads in Rust take four instructions a word where three are enough. This is a
/// third of the cost of a merge.
///
/// # Safety
///
/// Both point at 64 bytes that can be read.
#[inline(always)]
unsafe fn line_differs(a: *const u64, b: *const u64) -> bool {
    let differ: u64;
    // SAFETY: The code reads the 64 bytes at `a` and at `b`, which by the caller's promise can be read, and
    // writes two registers.
    unsafe {
        core::arch::asm!(
            "mov {d}, [{a}]",
            "xor {d}, [{b}]",
            "mov {t}, [{a} + 8]",
            "xor {t}, [{b} + 8]",
            "or {d}, {t}",
            "mov {t}, [{a} + 16]",
            "xor {t}, [{b} + 16]",
            "or {d}, {t}",
            "mov {t}, [{a} + 24]",
            "xor {t}, [{b} + 24]",
            "or {d}, {t}",
            "mov {t}, [{a} + 32]",
            "xor {t}, [{b} + 32]",
            "or {d}, {t}",
            "mov {t}, [{a} + 40]",
            "xor {t}, [{b} + 40]",
            "or {d}, {t}",
            "mov {t}, [{a} + 48]",
            "xor {t}, [{b} + 48]",
            "or {d}, {t}",
            "mov {t}, [{a} + 56]",
            "xor {t}, [{b} + 56]",
            "or {d}, {t}",
            a = in(reg) a,
            b = in(reg) b,
            d = out(reg) differ,
            t = out(reg) _,
            options(nostack, readonly),
        );
    }
    differ != 0
}

/// A page whose folio this task has locked.
///
/// Dropping it releases the lock, and then the reference.
///
/// # Invariants
///
/// This object holds the lock of the folio of `page`. Only [`LockedPage::drop`] drops `page`, after it
/// has released the lock.
pub(crate) struct LockedPage {
    page: ManuallyDrop<PageRef>,
}

impl core::ops::Deref for LockedPage {
    type Target = PageRef;

    fn deref(&self) -> &PageRef {
        &self.page
    }
}

impl LockedPage {
    /// Splits the folio, if it is large, so that the page becomes a folio of its own.
    ///
    /// The other pages become folios of their own as well, and are not locked afterwards.
    ///
    /// Lock and reference stay with the page. Takes the kernel's anon_vma lock, and may sleep.
    ///
    /// # Errors
    ///
    /// `EBUSY` if the kernel cannot split it, as when there is another reference on the folio. The kernel's own
    /// error for that is `EAGAIN`, which in this module says that the content of a page is not what it should be.
    pub(crate) fn split(&self) -> Result {
        if !self.is_large() {
            return Ok(());
        }
        // SAFETY: By the type invariants the folio is locked and we hold a reference. The split leaves `page`
        // locked, and moves our reference to its new folio.
        let ret = unsafe { ffi::rksm_split_huge_page(self.as_ptr()) };
        // SAFETY: The page is valid, whether the folio was split or not.
        let folio = unsafe { ffi::rksm_page_folio(self.as_ptr()) };
        // INVARIANT: This is the folio of `page` after the split.
        self.folio.set(folio);
        to_result(ret).map_err(|_| EBUSY)
    }

    /// Takes the stable node off the page, which stays a KSM page, but one without a node.
    ///
    /// Its mappings can no longer be found, so it is neither migrated nor swapped out until the last of them is
    /// gone. A write to it makes a copy.
    pub(super) fn clear_node(&self) {
        // SAFETY: By the type invariants the folio is valid and locked. Without a node, the rmap walk finds no
        // list to go through.
        unsafe { ffi::rksm_folio_set_ksm_node(self.folio(), core::ptr::null_mut()) };
    }
}

impl Drop for LockedPage {
    fn drop(&mut self) {
        // SAFETY: By the type invariant we hold the folio's lock, and `page` keeps the folio.
        unsafe { ffi::rksm_folio_unlock(self.folio()) };
        // SAFETY: Nothing else drops `page`, and it is not used again.
        unsafe { ManuallyDrop::drop(&mut self.page) };
    }
}

/// Returns the identity of the stable node that `folio->mapping` points at, if it is a KSM folio of a node.
///
/// # Safety
///
/// `folio` is valid: referenced, or mapped under a page-table lock that the caller holds.
pub(super) unsafe fn node_id_of(folio: *mut bindings::folio) -> Option<NodeId> {
    // SAFETY: By the caller's promise the folio is valid.
    let mapping = unsafe { ffi::rksm_folio_mapping(folio) } as usize;
    is_ksm_mapping(mapping).then(|| NodeId::of_mapping(mapping))?
}

/// Whether `mapping`, read from an anonymous folio, is that of a KSM page.
#[inline(always)]
pub(super) fn is_ksm_mapping(mapping: usize) -> bool {
    mapping & MAPPING_FLAGS == MAPPING_FLAGS
}
