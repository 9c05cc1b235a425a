// SPDX-License-Identifier: GPL-2.0

//! References to objects that contain their own count.

use std::{marker::PhantomData, mem::ManuallyDrop, ops::Deref, ptr::NonNull};

/// Objects that contain their own count.
///
/// # Safety
///
/// The object lives at least until the last reference is dropped, and is always counted.
pub unsafe trait AlwaysRefCounted {
    /// Take a reference.
    fn inc_ref(&self);

    /// Drop a reference.
    ///
    /// # Safety
    ///
    /// The caller owns one, and does not use it afterwards.
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

// SAFETY: Sending moves a shared and maybe the last reference to `T`, so both traits are required of `T`.
unsafe impl<T: AlwaysRefCounted + Sync + Send> Send for ARef<T> {}
// SAFETY: A shared `ARef` can be cloned, so sharing also shares and moves references to `T`.
unsafe impl<T: AlwaysRefCounted + Sync + Send> Sync for ARef<T> {}

impl<T: AlwaysRefCounted> Unpin for ARef<T> {}

impl<T: AlwaysRefCounted> ARef<T> {
    /// Take over a reference.
    ///
    /// # Safety
    ///
    /// The caller owns one, and leaves it to the result.
    pub unsafe fn from_raw(ptr: NonNull<T>) -> Self {
        // INVARIANT: The caller's reference is the result's now, by the contract.
        Self {
            ptr,
            _p: PhantomData,
        }
    }

    /// Leave the reference to the caller.
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
        // SAFETY: The object is alive by the type invariant.
        unsafe { self.ptr.as_ref() }
    }
}

impl<T: AlwaysRefCounted> From<&T> for ARef<T> {
    fn from(object: &T) -> Self {
        object.inc_ref();
        // SAFETY: The reference was taken just now.
        unsafe { Self::from_raw(NonNull::from(object)) }
    }
}

impl<T: AlwaysRefCounted> Drop for ARef<T> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant there is a reference to drop.
        unsafe { T::dec_ref(self.ptr) }
    }
}
