// SPDX-License-Identifier: GPL-2.0

//! Page sizes, of x86-64.

/// The number of address bits within a page.
pub const PAGE_SHIFT: usize = 12;

/// Bytes per page.
pub const PAGE_SIZE: usize = 1 << PAGE_SHIFT;

/// The bits of an address that select its page.
pub const PAGE_MASK: usize = !(PAGE_SIZE - 1);

/// Round up to whole pages; `None` if that overflows.
pub const fn page_align(addr: usize) -> Option<usize> {
    match addr.checked_add(PAGE_SIZE - 1) {
        Some(end) => Some(end & PAGE_MASK),
        None => None,
    }
}
