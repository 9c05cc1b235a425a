// SPDX-License-Identifier: GPL-2.0

//! Memory. [`crate::testing`] counts all of it, and decides which allocations fail.

pub mod allocator;
pub mod kbox;
pub mod kvec;

pub use self::kbox::{Box, KBox, KVBox, VBox};
pub use self::kvec::{KVVec, KVec, VVec, Vec};

/// An allocation failed.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct AllocError;

/// Flags of an allocation.
#[derive(Clone, Copy, PartialEq)]
pub struct Flags(u32);

impl Flags {
    /// Return whether all of `flags` are set.
    pub fn contains(self, flags: Flags) -> bool {
        self & flags == flags
    }

    /// Return whether an allocation is charged to a memory cgroup.
    pub(crate) fn is_accounted(self) -> bool {
        self.0 & bits::ACCOUNT != 0
    }

    /// Return whether an allocation may sleep.
    pub(crate) fn may_sleep(self) -> bool {
        self.0 & bits::DIRECT_RECLAIM != 0
    }
}

impl core::ops::BitOr for Flags {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl core::ops::BitAnd for Flags {
    type Output = Self;

    fn bitand(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

impl core::ops::Not for Flags {
    type Output = Self;

    fn not(self) -> Self {
        Self(!self.0)
    }
}

/// One bit for each property that flags consist of. The values are arbitrary.
mod bits {
    pub(super) const DIRECT_RECLAIM: u32 = 1 << 0;
    pub(super) const KSWAPD_RECLAIM: u32 = 1 << 1;
    pub(super) const IO: u32 = 1 << 2;
    pub(super) const FS: u32 = 1 << 3;
    pub(super) const HIGH: u32 = 1 << 4;
    pub(super) const NOWARN: u32 = 1 << 5;
    pub(super) const ZERO: u32 = 1 << 6;
    pub(super) const HIGHMEM: u32 = 1 << 7;
    pub(super) const ACCOUNT: u32 = 1 << 8;
}

/// Allocation flags.
pub mod flags {
    use super::{bits, Flags};

    /// Zeroed memory.
    pub const __GFP_ZERO: Flags = Flags(bits::ZERO);
    /// Memory from highmem is acceptable.
    pub const __GFP_HIGHMEM: Flags = Flags(bits::HIGHMEM);
    /// No warning on failure.
    pub const __GFP_NOWARN: Flags = Flags(bits::NOWARN);
    /// May not sleep, may take reserves.
    pub const GFP_ATOMIC: Flags = Flags(bits::HIGH | bits::KSWAPD_RECLAIM);
    /// May sleep.
    pub const GFP_KERNEL: Flags =
        Flags(bits::DIRECT_RECLAIM | bits::KSWAPD_RECLAIM | bits::IO | bits::FS);
    /// May sleep; accounted.
    pub const GFP_KERNEL_ACCOUNT: Flags = Flags(GFP_KERNEL.0 | bits::ACCOUNT);
    /// May not sleep.
    pub const GFP_NOWAIT: Flags = Flags(bits::KSWAPD_RECLAIM | bits::NOWARN);
}
