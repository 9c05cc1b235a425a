// SPDX-License-Identifier: GPL-2.0

//! Vectors.

use super::{
    allocator::{Allocator, KVmalloc, Kmalloc, Vmalloc},
    AllocError, Flags,
};
use crate::error::{code::EINVAL, Error};
use std::{
    fmt,
    marker::PhantomData,
    ops::{Deref, DerefMut},
    vec::Vec as StdVec,
};

/// A growable array. It has the size of the kernel's, as some code reports its own size.
pub struct Vec<T, A: Allocator> {
    inner: StdVec<T>,
    _a: PhantomData<A>,
}

/// A vector from kmalloc().
pub type KVec<T> = Vec<T, Kmalloc>;
/// A vector from vmalloc().
pub type VVec<T> = Vec<T, Vmalloc>;
/// A vector from kvmalloc().
pub type KVVec<T> = Vec<T, KVmalloc>;

/// There is no capacity left.
pub struct PushError<T>(pub T);

/// There is no such element.
pub struct RemoveError;

/// Why an element was not inserted.
pub enum InsertError<T> {
    /// The index is beyond the end.
    IndexOutOfBounds(T),
    /// There is no capacity left.
    OutOfCapacity(T),
}

macro_rules! plain_error {
    ($(<$param:ident>)?, $type:ty) => {
        impl$(<$param>)? fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(stringify!($type))
            }
        }

        impl$(<$param>)? From<$type> for Error {
            fn from(_: $type) -> Self {
                EINVAL
            }
        }
    };
}

plain_error!(<T>, PushError<T>);
plain_error!(, RemoveError);
plain_error!(<T>, InsertError<T>);

impl<T, A: Allocator> Vec<T, A> {
    /// Create an empty vector, without memory.
    pub const fn new() -> Self {
        Self {
            inner: StdVec::new(),
            _a: PhantomData,
        }
    }

    /// Create an empty vector with room for `capacity` elements.
    pub fn with_capacity(capacity: usize, flags: Flags) -> Result<Self, AllocError> {
        let mut vec = Self::new();
        vec.reserve(capacity, flags)?;
        Ok(vec)
    }

    /// Create a vector of `n` copies of `value`.
    pub fn from_elem(value: T, n: usize, flags: Flags) -> Result<Self, AllocError>
    where
        T: Clone,
    {
        let mut vec = Self::new();
        vec.extend_with(n, value, flags)?;
        Ok(vec)
    }

    /// The number of elements that there is room for.
    pub fn capacity(&self) -> usize {
        self.inner.capacity()
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        self.inner.len()
    }

    /// Return whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.inner.is_empty()
    }

    /// The elements.
    pub fn as_slice(&self) -> &[T] {
        &self.inner
    }

    /// The elements, mutable.
    pub fn as_mut_slice(&mut self) -> &mut [T] {
        &mut self.inner
    }

    fn bytes(&self) -> usize {
        match size_of::<T>() {
            0 => 0,
            size => size * self.capacity(),
        }
    }

    /// Make room for `additional` elements: twice the capacity, or the required one if that is more.
    pub fn reserve(&mut self, additional: usize, flags: Flags) -> Result<(), AllocError> {
        let (len, cap) = (self.len(), self.capacity());
        if cap - len >= additional {
            return Ok(());
        }
        let needed = len.checked_add(additional).ok_or(AllocError)?;
        let new_cap = needed.max(cap.saturating_mul(2));
        // A vector of zero-sized elements has unlimited capacity. It only gets here if the length overflows.
        let bytes = new_cap
            .checked_mul(size_of::<T>())
            .filter(|&bytes| bytes != 0 && isize::try_from(bytes).is_ok())
            .ok_or(AllocError)?;
        A::charge(self.bytes(), bytes, flags)?;
        self.inner.reserve_exact(new_cap - len);
        assert_eq!(self.capacity(), new_cap, "the host's allocator gave more");
        Ok(())
    }

    /// Append an element.
    pub fn push(&mut self, value: T, flags: Flags) -> Result<(), AllocError> {
        self.reserve(1, flags)?;
        self.inner.push(value);
        Ok(())
    }

    /// Append an element if there is room.
    pub fn push_within_capacity(&mut self, value: T) -> Result<(), PushError<T>> {
        if self.len() == self.capacity() {
            return Err(PushError(value));
        }
        self.inner.push(value);
        Ok(())
    }

    /// Insert an element if there is room.
    pub fn insert_within_capacity(&mut self, index: usize, value: T) -> Result<(), InsertError<T>> {
        if index > self.len() {
            return Err(InsertError::IndexOutOfBounds(value));
        }
        if self.len() == self.capacity() {
            return Err(InsertError::OutOfCapacity(value));
        }
        self.inner.insert(index, value);
        Ok(())
    }

    /// Remove the last element.
    pub fn pop(&mut self) -> Option<T> {
        self.inner.pop()
    }

    /// Remove an element. The capacity stays.
    pub fn remove(&mut self, index: usize) -> Result<T, RemoveError> {
        if index >= self.len() {
            return Err(RemoveError);
        }
        Ok(self.inner.remove(index))
    }

    /// Drop all elements. The capacity stays.
    pub fn clear(&mut self) {
        self.inner.clear();
    }

    /// Drop the elements from `len` on. The capacity stays.
    pub fn truncate(&mut self, len: usize) {
        self.inner.truncate(len);
    }

    /// Drop the elements for which `keep` returns false. The capacity stays.
    pub fn retain(&mut self, keep: impl FnMut(&mut T) -> bool) {
        self.inner.retain_mut(keep);
    }

    /// Remove all elements. The capacity stays.
    pub fn drain_all(&mut self) -> std::vec::Drain<'_, T> {
        self.inner.drain(..)
    }

    /// Append `n` copies of `value`.
    pub fn extend_with(&mut self, n: usize, value: T, flags: Flags) -> Result<(), AllocError>
    where
        T: Clone,
    {
        self.reserve(n, flags)?;
        self.inner.resize(self.inner.len() + n, value);
        Ok(())
    }

    /// Append copies of all elements of `other`.
    pub fn extend_from_slice(&mut self, other: &[T], flags: Flags) -> Result<(), AllocError>
    where
        T: Clone,
    {
        self.reserve(other.len(), flags)?;
        self.inner.extend_from_slice(other);
        Ok(())
    }

    /// Truncate, or append copies of `value`.
    pub fn resize(&mut self, new_len: usize, value: T, flags: Flags) -> Result<(), AllocError>
    where
        T: Clone,
    {
        match new_len.checked_sub(self.len()) {
            Some(n) => self.extend_with(n, value, flags),
            None => {
                self.truncate(new_len);
                Ok(())
            }
        }
    }
}

impl<T, A: Allocator> Drop for Vec<T, A> {
    fn drop(&mut self) {
        A::uncharge(self.bytes());
    }
}

impl<T, A: Allocator> Default for Vec<T, A> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T, A: Allocator> Deref for Vec<T, A> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.inner
    }
}

impl<T, A: Allocator> DerefMut for Vec<T, A> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.inner
    }
}

impl<T: fmt::Debug, A: Allocator> fmt::Debug for Vec<T, A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

impl<'a, T, A: Allocator> IntoIterator for &'a Vec<T, A> {
    type Item = &'a T;
    type IntoIter = std::slice::Iter<'a, T>;

    fn into_iter(self) -> Self::IntoIter {
        self.inner.iter()
    }
}

impl<'a, T, A: Allocator> IntoIterator for &'a mut Vec<T, A> {
    type Item = &'a mut T;
    type IntoIter = std::slice::IterMut<'a, T>;

    fn into_iter(self) -> Self::IntoIter {
        self.inner.iter_mut()
    }
}

impl<T, A: Allocator> IntoIterator for Vec<T, A> {
    type Item = T;
    type IntoIter = std::vec::IntoIter<T>;

    fn into_iter(mut self) -> Self::IntoIter {
        A::uncharge(self.bytes());
        // Leave nothing behind for `drop` to account for.
        std::mem::take(&mut self.inner).into_iter()
    }
}
