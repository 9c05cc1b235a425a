// SPDX-License-Identifier: GPL-2.0

//! References to objects that hold their own count.

use std::{marker::PhantomData, mem::ManuallyDrop, ops::Deref, ptr::NonNull};

/// Objects that hold their own count.
///
/// # Safety
///
/// The object lives at least until the last reference is given up, and is always counted.
pub unsafe trait AlwaysRefCounted {
    /// Takes a reference.
    fn inc_ref(&self);

    /// Gives up a reference.
    ///
    /// # Safety
    ///
    /// The caller has one, and does not use it afterwards.
    unsafe fn dec_ref(obj: NonNull<Self>);
}

/// One reference.
///
/// # Invariants
///
/// Owns a reference to the object at `ptr`.
pub struct ARef<T: AlwaysRefCounted> {
    ptr: NonNull<T>,
    _p: PhantomData<T>,
}

// SAFETY: moves a shared and maybe the last reference to `T`, so both are asked of `T`.
unsafe impl<T: AlwaysRefCounted + Sync + Send> Send for ARef<T> {}
// SAFETY: as above, since a shared `ARef` can be cloned.
unsafe impl<T: AlwaysRefCounted + Sync + Send> Sync for ARef<T> {}

impl<T: AlwaysRefCounted> Unpin for ARef<T> {}

impl<T: AlwaysRefCounted> ARef<T> {
    /// Takes over a reference.
    ///
    /// # Safety
    ///
    /// The caller has one, and leaves it to the result.
    pub unsafe fn from_raw(ptr: NonNull<T>) -> Self {
        // INVARIANT: by the contract.
        Self {
            ptr,
            _p: PhantomData,
        }
    }

    /// Leaves the reference to the caller.
    pub fn into_raw(me: Self) -> NonNull<T> {
        ManuallyDrop::new(me).ptr
    }
}

impl<T: AlwaysRefCounted> Clone for ARef<T> {
    fn clone(&self) -> Self {
        Self::from(&**self)
    }
}

impl<T: AlwaysRefCounted> Deref for ARef<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: alive by the type invariant.
        unsafe { self.ptr.as_ref() }
    }
}

impl<T: AlwaysRefCounted> From<&T> for ARef<T> {
    fn from(object: &T) -> Self {
        object.inc_ref();
        // SAFETY: taken just now.
        unsafe { Self::from_raw(NonNull::from(object)) }
    }
}

impl<T: AlwaysRefCounted> Drop for ARef<T> {
    fn drop(&mut self) {
        // SAFETY: by the type invariant there is one to give up.
        unsafe { T::dec_ref(self.ptr) }
    }
}
