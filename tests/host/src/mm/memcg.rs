// SPDX-License-Identifier: GPL-2.0

//! Stands in for `mm/memcg.rs`.

use kernel::{
    alloc::{flags::GFP_KERNEL, flags::GFP_KERNEL_ACCOUNT, Flags},
    mm::Mm,
};

/// Return `flags` with the one that charges the allocation to a group.
pub(crate) fn accounted(flags: Flags) -> Flags {
    flags | GFP_KERNEL_ACCOUNT & !GFP_KERNEL
}

/// Call `f`, whose allocations are charged to the group of the address space.
pub(crate) fn charge<R>(_: &Mm, f: impl FnOnce() -> R) -> R {
    f()
}
