// SPDX-License-Identifier: GPL-2.0

//! The allocators, which differ in how much they give at once.

use super::{AllocError, Flags};
use crate::testing;

/// An allocator.
pub trait Allocator: 'static {
    /// The most bytes of one allocation.
    const MAX_BYTES: usize;

    /// Accounts an allocation of `new` bytes that replaces one of `old` bytes, if it is to succeed.
    /// The old one is unchanged on failure. Nothing is allocated for no bytes.
    #[doc(hidden)]
    fn charge(old: usize, new: usize, flags: Flags) -> Result<(), AllocError> {
        testing::allocate(old, new, Self::MAX_BYTES, flags)
    }

    /// Accounts that an allocation of so many bytes is freed.
    #[doc(hidden)]
    fn uncharge(bytes: usize) {
        testing::free(bytes);
    }
}

/// Physically contiguous memory.
pub struct Kmalloc;

impl Allocator for Kmalloc {
    // A page block of the highest order.
    const MAX_BYTES: usize = 4 << 20;
}

/// Virtually contiguous memory.
pub struct Vmalloc;

impl Allocator for Vmalloc {
    const MAX_BYTES: usize = isize::MAX as usize;
}

/// Physically contiguous memory if possible, virtually contiguous otherwise.
pub struct KVmalloc;

impl Allocator for KVmalloc {
    const MAX_BYTES: usize = isize::MAX as usize;
}
