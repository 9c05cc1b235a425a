// SPDX-License-Identifier: GPL-2.0

//! Owned references to pages of user memory, and the folio lock.

use super::{ffi, stable::NodeId};
use crate::engine::{checksum::Checksum, index::StableKey};
use core::{mem::ManuallyDrop, ptr::NonNull};
use kernel::{bindings, prelude::*};

/// The low bits of `folio->mapping` that say what the rest of it points at.
const MAPPING_FLAGS: usize = 3;

/// One page of an anonymous folio, with a reference on that folio.
///
/// The page's content belongs to user space and may change at any time; it is only ever read
/// through raw pointers by C code.
///
/// # Invariants
///
/// `page` is valid, and this object owns one reference on the folio the page is part of.
pub(crate) struct PageRef {
    page: NonNull<bindings::page>,
}

impl PageRef {
    /// Takes over a reference that the caller holds on the folio of `page`.
    ///
    /// # Safety
    ///
    /// `page` is valid, and the caller gives up one reference on its folio.
    pub(super) unsafe fn from_raw(page: NonNull<bindings::page>) -> Self {
        // INVARIANT: the caller hands over the reference.
        Self { page }
    }

    /// The page itself.
    pub(super) fn as_ptr(&self) -> *mut bindings::page {
        self.page.as_ptr()
    }

    /// The folio that the page is part of now. It changes only when the folio is split.
    pub(super) fn folio(&self) -> *mut bindings::folio {
        // SAFETY: by the type invariant the page is valid and kept by our reference.
        unsafe { ffi::rksm_page_folio(self.as_ptr()) }
    }

    /// The page frame number.
    pub(crate) fn pfn(&self) -> usize {
        // SAFETY: by the type invariant the page is valid.
        unsafe { ffi::rksm_page_pfn(self.as_ptr()) }
    }

    /// The identity of the stable node that this page belongs to, if it is a KSM page of a node.
    pub(crate) fn node_id(&self) -> Option<NodeId> {
        // SAFETY: by the type invariant the folio is valid.
        unsafe { node_id_of(self.folio()) }
    }

    /// Whether this is a KSM page, be it with a stable node or without.
    pub(crate) fn is_ksm(&self) -> bool {
        // SAFETY: by the type invariant the folio is valid.
        unsafe { ffi::rksm_folio_test_ksm(self.folio()) }
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

    /// Whether both are the very same page.
    pub(crate) fn is_same(&self, other: &PageRef) -> bool {
        self.page == other.page
    }

    /// Compares all bytes of both pages. Unless both are write-protected and locked, the answer
    /// may be outdated when it arrives.
    pub(crate) fn differs_from(&self, other: &PageRef) -> bool {
        // SAFETY: by the type invariants both pages are valid.
        unsafe { ffi::rksm_pages_differ(self.as_ptr(), other.as_ptr()) }
    }

    /// The checksum of the content as it is now.
    pub(crate) fn checksum(&self, seed: u64) -> Checksum {
        // SAFETY: by the type invariant the page is valid.
        Checksum::from_hash(unsafe { ffi::rksm_page_hash(self.as_ptr(), seed) })
    }

    /// Locks the folio, waiting for it if need be.
    ///
    /// The folio lock nests inside `mmap_lock` and outside page-table locks.
    pub(crate) fn lock(self) -> LockedPage {
        // SAFETY: by the type invariant the folio is valid; may sleep, as every caller may.
        unsafe { ffi::rksm_folio_lock(self.folio()) };
        // INVARIANT: locked just now.
        LockedPage {
            page: ManuallyDrop::new(self),
        }
    }

    /// Locks the folio if nobody else has it locked.
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

/// A page whose folio is locked by us.
///
/// # Invariants
///
/// The folio lock of the folio of `page` is held by this object, and `page` is dropped by
/// [`LockedPage::drop`] or moved out by [`LockedPage::unlock`], once.
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
    /// Returns `EBUSY` (or `ENOMEM`, `EAGAIN`) if somebody else holds a reference on it.
    pub(crate) fn split(&self) -> Result {
        if !self.is_large() {
            return Ok(());
        }
        // SAFETY: the folio is locked and we hold a reference, by the type invariants. The split
        // leaves `page` locked and moves our reference to its new folio.
        kernel::error::to_result(unsafe { ffi::rksm_split_huge_page(self.as_ptr()) })
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

    /// Gives the lock back and keeps the reference.
    pub(crate) fn unlock(self) -> PageRef {
        let mut this = ManuallyDrop::new(self);
        // SAFETY: the folio is locked by us; `this` is not used again, so the lock is given back
        // once and the reference moved once.
        unsafe {
            ffi::rksm_folio_unlock(this.folio());
            ManuallyDrop::take(&mut this.page)
        }
    }
}

impl Drop for LockedPage {
    fn drop(&mut self) {
        // SAFETY: the folio is locked by us by the type invariant, and `page` was not moved out,
        // because `unlock` forgets `self`.
        unsafe {
            ffi::rksm_folio_unlock(self.folio());
            ManuallyDrop::drop(&mut self.page);
        }
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
    if mapping & MAPPING_FLAGS != MAPPING_FLAGS {
        return None;
    }
    NodeId::new(mapping & !MAPPING_FLAGS)
}
