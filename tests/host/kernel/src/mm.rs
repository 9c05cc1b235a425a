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
/// `mmgrab()` counts its references.
#[repr(transparent)]
pub struct Mm {
    mm: UnsafeCell<bindings::mm_struct>,
}

// SAFETY: An `Mm` consists of an atomic count only.
unsafe impl Send for Mm {}
// SAFETY: An `Mm` consists of an atomic count only.
unsafe impl Sync for Mm {}

// SAFETY: The object is counted by the type invariant. It lives as long as its `TestMm`, which does not go
// before all references are dropped.
unsafe impl AlwaysRefCounted for Mm {
    fn inc_ref(&self) {
        // SAFETY: The object is valid, since borrowed.
        unsafe { bindings::mmgrab(self.as_raw()) }
    }

    unsafe fn dec_ref(obj: NonNull<Self>) {
        // SAFETY: The caller gives up its reference.
        unsafe { bindings::mmdrop(obj.cast().as_ptr()) }
    }
}

impl Mm {
    /// The C structure.
    pub fn as_raw(&self) -> *mut bindings::mm_struct {
        self.mm.get()
    }

    /// Borrow from the C structure.
    ///
    /// # Safety
    ///
    /// `ptr` points to an `mm_struct` that is not freed within `'a`.
    pub unsafe fn from_raw<'a>(ptr: *const bindings::mm_struct) -> &'a Mm {
        // SAFETY: `ptr` is valid by the contract. The layout is the same, since `Mm` is transparent.
        unsafe { &*ptr.cast::<Mm>() }
    }
}

impl From<&crate::testing::TestMm> for ARef<Mm> {
    fn from(mm: &crate::testing::TestMm) -> Self {
        mm.mm().into()
    }
}
