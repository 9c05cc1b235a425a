// SPDX-License-Identifier: GPL-2.0

//! Owned references to pages of user memory, and the folio lock.

use super::{ffi, lru, stable_node::NodeId};
use crate::{
    hash::{Checksum, Hasher, Sample, LINES, LINE_WORDS, PAGE_WORDS},
    ksm::index::StableKey,
};
use core::{cell::Cell, marker::PhantomData, mem::ManuallyDrop, ptr::NonNull};
use kernel::{bindings, error::to_result, prelude::*};

/// The low bits of `folio->mapping` that say what the rest of it points at.
pub(super) const MAPPING_FLAGS: usize = 3;

/// One page of an anonymous folio, with a reference on that folio.
///
/// The page's content belongs to user space and may change at any time; it is only ever read
/// through raw pointers by C code.
///
/// # Invariants
///
/// `page` is valid and part of `folio`, and this object owns one reference on that folio. (Nobody else
/// can split the folio meanwhile: that takes all references but those of the mappings.)
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
        // INVARIANT: the caller hands over the reference.
        Self {
            page,
            // SAFETY: the page is valid by the caller's promise.
            folio: Cell::new(unsafe { ffi::rksm_page_folio(page.as_ptr()) }),
        }
    }

    /// The page itself.
    pub(super) fn as_ptr(&self) -> *mut bindings::page {
        self.page.as_ptr()
    }

    /// The folio that the page is part of. It changes only when we split it.
    pub(super) fn folio(&self) -> *mut bindings::folio {
        self.folio.get()
    }

    /// The page frame number.
    pub(crate) fn pfn(&self) -> usize {
        // SAFETY: by the type invariant the page is valid.
        unsafe { ffi::rksm_page_pfn(self.as_ptr()) }
    }

    /// The number of the memory node that the page is on.
    pub(crate) fn nid(&self) -> u32 {
        // SAFETY: by the type invariant the page is valid.
        unsafe { ffi::rksm_page_nid(self.as_ptr()) }
    }

    /// The identity of the stable node that this page belongs to, if it is a KSM page of a node.
    pub(crate) fn node_id(&self) -> Option<NodeId> {
        // SAFETY: by the type invariant the folio is valid.
        unsafe { node_id_of(self.folio()) }
    }

    /// Whether this is an anonymous page that can be merged: neither KSM nor device memory.
    pub(crate) fn is_plain_anon(&self) -> bool {
        // SAFETY: by the type invariant the folio is valid.
        unsafe { ffi::rksm_folio_test_plain_anon(self.folio()) }
    }

    /// Whether the page is part of a folio of more than one page.
    pub(crate) fn is_large(&self) -> bool {
        // SAFETY: by the type invariant the folio is valid.
        unsafe { ffi::rksm_folio_test_large(self.folio()) }
    }

    /// Whether any page table maps the folio.
    pub(crate) fn is_mapped(&self) -> bool {
        // SAFETY: by the type invariant the folio is valid.
        unsafe { ffi::rksm_folio_mapped(self.folio()) }
    }

    /// Whether the folio is in the swap cache.
    pub(crate) fn is_swapcache(&self) -> bool {
        // SAFETY: by the type invariant the folio is valid.
        unsafe { ffi::rksm_folio_test_swapcache(self.folio()) }
    }

    /// Whether the kernel has given the page up because its memory is broken: it must not be read. With the
    /// folio lock held, one that is not cannot be taken from its mappings.
    pub(crate) fn is_poisoned(&self) -> bool {
        // SAFETY: by the type invariant the page is valid.
        unsafe { ffi::rksm_page_test_hwpoison(self.as_ptr()) }
    }

    /// Whether both are parts of one folio.
    pub(crate) fn shares_folio_with(&self, other: &PageRef) -> bool {
        self.folio() == other.folio()
    }

    /// Whether somebody has the folio locked: a hint.
    pub(crate) fn is_locked(&self) -> bool {
        // SAFETY: by the type invariant the folio is valid.
        unsafe { ffi::rksm_folio_test_locked(self.folio()) }
    }

    /// Whether somebody besides us, the page tables and the swap cache holds a reference on the folio.
    /// Without the folio lock, and of one that is mapped, the answer is a hint.
    pub(crate) fn is_held_by_others(&self) -> bool {
        // SAFETY: by the type invariant the folio is valid.
        let (expected, refs) = unsafe {
            (
                ffi::rksm_folio_expected_refs(self.folio()),
                ffi::rksm_folio_ref_count(self.folio()),
            )
        };
        let held = i64::from(expected) + 1 != i64::from(refs);
        // SAFETY: by the type invariant the folio is valid.
        if held && unsafe { ffi::rksm_folio_maybe_batched(self.folio()) } {
            lru::note_in_the_way();
        }
        held
    }

    /// Whether both are the very same page.
    pub(crate) fn is_same(&self, other: &PageRef) -> bool {
        self.page == other.page
    }

    /// The page's content.
    fn content(&self) -> Content<'_> {
        // SAFETY: by the type invariant the page is valid, and its content is kept by our
        // reference.
        unsafe { Content::new(ffi::rksm_page_content(self.as_ptr())) }
    }

    /// Compares all bytes of both pages. Unless both are write-protected and locked, the answer
    /// may be outdated when it arrives.
    pub(crate) fn differs_from(&self, other: &PageRef) -> bool {
        self.content().differs_from(other.content())
    }

    /// Whether all bytes are zero. Unless the page is write-protected and locked, the answer may be
    /// outdated when it arrives.
    pub(crate) fn is_zero(&self) -> bool {
        // SAFETY: the kernel's zero page is always there, and its content never changes.
        let zero = unsafe { Content::new(ffi::rksm_zero_content()) };
        !self.content().differs_from(zero)
    }

    /// The checksum of the content as it is now.
    pub(crate) fn checksum(&self, hasher: &Hasher) -> Checksum {
        let content = self.content();
        let sum = hasher.checksum(|nth| content.word(nth), |nth| content.line(nth));
        sum.with_sample(hasher.on_node(sum.sample(), || self.nid()))
    }

    /// The sample of the content as it is now.
    pub(crate) fn sample(&self, hasher: &Hasher) -> Sample {
        let content = self.content();
        hasher.on_node(hasher.sample(|nth| content.word(nth)), || self.nid())
    }

    /// Locks the folio if nobody else has it locked.
    ///
    /// The folio lock nests inside `mmap_lock` and outside page-table locks. It is never waited for: tasks hold
    /// it over whatever reclaim or a migration takes.
    pub(crate) fn try_lock(self) -> Result<LockedPage, PageRef> {
        // SAFETY: by the type invariant the folio is valid.
        if unsafe { ffi::rksm_folio_trylock(self.folio()) } {
            // INVARIANT: locked just now.
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
        // SAFETY: by the type invariant we own a reference.
        unsafe { ffi::rksm_folio_put(self.folio()) };
    }
}

/// The content of a page of user memory, which may change while it is looked at.
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
    /// # Safety
    ///
    /// `content` points at the content of a page that is kept for `'a`: by a reference, or by a
    /// mapping under a page-table lock that is held.
    pub(super) unsafe fn new(content: *const kernel::ffi::c_void) -> Self {
        // INVARIANT: the caller's promise.
        Self {
            words: content.cast(),
            _page: PhantomData,
        }
    }

    /// Word number `nth` of the page, as it is now.
    #[inline(always)]
    pub(super) fn word(self, nth: usize) -> u64 {
        // SAFETY: within the page, as the number is taken modulo its words. Volatile, since user
        // space may write to it at any time; whatever is read is a valid word.
        unsafe { self.words.add(nth % PAGE_WORDS).read_volatile() }
    }

    /// Cache line number `nth` of the page, as it is now.
    #[inline(always)]
    fn line(self, nth: usize) -> [u64; LINE_WORDS] {
        // SAFETY: within the page, as the number is taken modulo its lines. Volatile, as in `word`.
        let line = unsafe { self.words.add(nth % LINES * LINE_WORDS) };
        // SAFETY: as above.
        core::array::from_fn(|nth| unsafe { line.add(nth).read_volatile() })
    }

    /// Compares all words, a cache line at a time.
    fn differs_from(self, other: Self) -> bool {
        (0..LINES).any(|nth| {
            let at = nth * LINE_WORDS;
            // SAFETY: both lines lie within their pages, and each page is aligned to its size.
            unsafe { line_differs(self.words.add(at), other.words.add(at)) }
        })
    }
}

/// Compares two cache lines of memory that may change while they are compared.
///
/// Volatile reads in Rust take four instructions a word where three are enough, and this is a third of
/// the cost of a merge.
///
/// # Safety
///
/// Both point at 64 bytes that can be read.
#[inline(always)]
unsafe fn line_differs(a: *const u64, b: *const u64) -> bool {
    let differ: u64;
    // SAFETY: reads the 64 bytes at `a` and `b`, which the caller promises can be read, and writes two
    // registers.
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

/// A page whose folio is locked by us.
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
    /// Splits the folio, if it is large, so that the page is one of its own. The lock and the
    /// reference stay with the page.
    ///
    /// Returns `EBUSY` if that is not possible, as when somebody else holds a reference on it. (The kernel says
    /// `EAGAIN` for that, which elsewhere says that a page's content is not what it should be.)
    pub(crate) fn split(&self) -> Result {
        if !self.is_large() {
            return Ok(());
        }
        // SAFETY: the folio is locked and we hold a reference, by the type invariants. The split
        // leaves `page` locked and moves our reference to its new folio.
        let ret = unsafe { ffi::rksm_split_huge_page(self.as_ptr()) };
        // SAFETY: the page is valid.
        let folio = unsafe { ffi::rksm_page_folio(self.as_ptr()) };
        // INVARIANT: looked up anew.
        self.folio.set(folio);
        to_result(ret).map_err(|_| EBUSY)
    }

    /// The key of the stable node that this page belongs to.
    pub(crate) fn node_key(&self) -> Option<StableKey> {
        let id = self.node_id()?;
        // SAFETY: the folio is locked and points at the node, so the node is not freed.
        Some(unsafe { id.key() })
    }

    /// Takes the stable node off the page: it stays a KSM page, but one of nobody.
    pub(super) fn clear_node(&self) {
        // SAFETY: the folio is valid and locked by the type invariants.
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

/// The identity of the stable node that `folio->mapping` points at.
///
/// # Safety
///
/// `folio` is valid: referenced, or mapped under a page-table lock that the caller holds.
pub(super) unsafe fn node_id_of(folio: *mut bindings::folio) -> Option<NodeId> {
    // SAFETY: the caller's promise.
    let mapping = unsafe { ffi::rksm_folio_mapping(folio) } as usize;
    is_ksm_mapping(mapping).then(|| NodeId::of_mapping(mapping))?
}

/// Whether `mapping`, read from an anonymous folio, is that of a KSM page.
#[inline(always)]
pub(super) fn is_ksm_mapping(mapping: usize) -> bool {
    mapping & MAPPING_FLAGS == MAPPING_FLAGS
}
