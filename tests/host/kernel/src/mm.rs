// SPDX-License-Identifier: GPL-2.0

//! Address spaces.

use crate::{
    bindings,
    sync::aref::{ARef, AlwaysRefCounted},
};
use std::{cell::UnsafeCell, ptr::NonNull};

/// An address space.
///
/// # Invariants
///
/// Counted by `mmgrab()`.
#[repr(transparent)]
pub struct Mm {
    mm: UnsafeCell<bindings::mm_struct>,
}

// SAFETY: all there is to an `Mm` is an atomic count.
unsafe impl Send for Mm {}
// SAFETY: as above.
unsafe impl Sync for Mm {}

// SAFETY: by the type invariant; the object lives as long as its `TestMm`, which does not go before
// all references are back.
unsafe impl AlwaysRefCounted for Mm {
    fn inc_ref(&self) {
        // SAFETY: valid, since borrowed.
        unsafe { bindings::mmgrab(self.as_raw()) }
    }

    unsafe fn dec_ref(obj: NonNull<Self>) {
        // SAFETY: the caller gives up its reference.
        unsafe { bindings::mmdrop(obj.cast().as_ptr()) }
    }
}

impl Mm {
    /// The C structure.
    pub fn as_raw(&self) -> *mut bindings::mm_struct {
        self.mm.get()
    }

    /// Borrows from the C structure.
    ///
    /// # Safety
    ///
    /// `ptr` points at an `mm_struct` that is not freed within `'a`.
    pub unsafe fn from_raw<'a>(ptr: *const bindings::mm_struct) -> &'a Mm {
        // SAFETY: valid by the contract; the layout is the same, since transparent.
        unsafe { &*ptr.cast::<Mm>() }
    }
}

impl From<&crate::testing::TestMm> for ARef<Mm> {
    fn from(mm: &crate::testing::TestMm) -> Self {
        mm.mm().into()
    }
}
