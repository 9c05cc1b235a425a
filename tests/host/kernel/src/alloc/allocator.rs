// SPDX-License-Identifier: GPL-2.0

//! The allocators, which differ in the largest size of an allocation.

use super::{AllocError, Flags};
use crate::testing;

/// An allocator.
pub trait Allocator: 'static {
    /// The largest size of an allocation, in bytes.
    const MAX_BYTES: usize;

    /// Account for an allocation of `new` bytes that replaces one of `old` bytes, if it is to succeed. On
    /// failure the old one is unchanged. An allocation of no bytes allocates nothing.
    #[doc(hidden)]
    fn charge(old: usize, new: usize, flags: Flags) -> Result<(), AllocError> {
        testing::allocate(old, new, Self::MAX_BYTES, flags)
    }

    /// Account for the freeing of an allocation.
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
