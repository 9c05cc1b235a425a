// SPDX-License-Identifier: GPL-2.0

//! Boxes.

use super::{
    allocator::{Allocator, KVmalloc, Kmalloc, Vmalloc},
    AllocError, Flags,
};
use std::{
    boxed::Box as StdBox,
    fmt,
    marker::PhantomData,
    mem::MaybeUninit,
    ops::{Deref, DerefMut},
};

/// A value in memory of its own.
pub struct Box<T, A: Allocator> {
    inner: StdBox<T>,
    charge: Charge<T, A>,
}

/// A box from kmalloc().
pub type KBox<T> = Box<T, Kmalloc>;
/// A box from vmalloc().
pub type VBox<T> = Box<T, Vmalloc>;
/// A box from kvmalloc().
pub type KVBox<T> = Box<T, KVmalloc>;

/// The account of a box, closed when dropped.
struct Charge<T, A: Allocator>(PhantomData<(fn() -> T, A)>);

impl<T, A: Allocator> Charge<T, A> {
    fn new(flags: Flags) -> Result<Self, AllocError> {
        A::charge(0, size_of::<T>(), flags)?;
        Ok(Self(PhantomData))
    }

    /// Return the same account for another type of the same size.
    fn recast<U>(self) -> Charge<U, A> {
        const { assert!(size_of::<T>() == size_of::<U>()) };
        std::mem::forget(self);
        Charge(PhantomData)
    }
}

impl<T, A: Allocator> Drop for Charge<T, A> {
    fn drop(&mut self) {
        A::uncharge(size_of::<T>());
    }
}

impl<T, A: Allocator> Box<T, A> {
    /// Put `value` into a box. Drop it on failure.
    pub fn new(value: T, flags: Flags) -> Result<Self, AllocError> {
        Ok(Box::write(Self::new_uninit(flags)?, value))
    }

    /// Allocate a box without a value.
    pub fn new_uninit(flags: Flags) -> Result<Box<MaybeUninit<T>, A>, AllocError> {
        let charge = Charge::new(flags)?;
        Ok(Box {
            inner: StdBox::new_uninit(),
            charge,
        })
    }

    /// Take the value out and free the box.
    pub fn into_inner(b: Self) -> T {
        *b.inner
    }

    /// Drop the value and keep the box.
    pub fn drop_contents(this: Self) -> Box<MaybeUninit<T>, A> {
        let Self { inner, charge } = this;
        let raw = StdBox::into_raw(inner);
        // SAFETY: The value is valid, and is treated as uninitialised from here on.
        unsafe { raw.drop_in_place() };
        Box {
            // SAFETY: The pointer came from a box; the layout is the same.
            inner: unsafe { StdBox::from_raw(raw.cast()) },
            charge: charge.recast(),
        }
    }

    /// Leave the memory to the caller.
    pub fn into_raw(b: Self) -> *mut T {
        let Self { inner, charge } = b;
        // The memory stays accounted for.
        std::mem::forget(charge);
        StdBox::into_raw(inner)
    }

    /// Take the memory back.
    ///
    /// # Safety
    /// `raw` comes from [`Self::into_raw`], and is not used any more.
    /// `raw` came from [`Self::into_raw`], and is not used any more.
    pub unsafe fn from_raw(raw: *mut T) -> Self {
        Box {
            // SAFETY: By the contract, `raw` came from a box.
            inner: unsafe { StdBox::from_raw(raw) },
            charge: Charge(PhantomData),
        }
    }
}

impl<T, A: Allocator> Box<MaybeUninit<T>, A> {
    /// Put a value into the box.
    pub fn write(self, value: T) -> Box<T, A> {
        let Self { mut inner, charge } = self;
        inner.write(value);
        Box {
            // SAFETY: The pointer came from a box, and the value is initialised now; the layout is the same.
            inner: unsafe { StdBox::from_raw(StdBox::into_raw(inner).cast()) },
            charge: charge.recast(),
        }
    }
}

impl<T, A: Allocator> Deref for Box<T, A> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.inner
    }
}

impl<T, A: Allocator> DerefMut for Box<T, A> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.inner
    }
}

impl<T: fmt::Debug, A: Allocator> fmt::Debug for Box<T, A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}
