// SPDX-License-Identifier: GPL-2.0

//! The memory notifier: memory that goes offline.
//!
//! A stable node holds no reference on its page, only the pfn. So the pfn of a stale node may lie in memory
//! that goes offline. The kernel takes three steps:
//!
//! 1. It marks the section as offline. From then on `pfn_to_online_page()` does not find its pages.
//! 2. It calls [`Listener::offline`], which takes a lock of its owner.
//! 3. It frees the `struct page`s.
//!
//! Look up a pfn only by `pfn_to_online_page()`, and only under that lock. Then either the lookup fails, or the
//! lock is held until the page is no longer used, and the listener waits for it. The nodes need no other care:
//! like any stale node, such a node is noticed when it is looked at.
//!
//! # Locks
//!
//! The kernel calls the listener with the lock of memory hotplug held for writing, and that of CPU hotplug for
//! reading. Both are outside all locks of this module. While a lock that the listener takes is held, call
//! nothing that takes one of them.

use crate::mm::ffi;
use core::ops::Range;
use kernel::{
    bindings,
    ffi::{c_int, c_ulong, c_void},
    prelude::*,
    sync::Arc,
};

/// Receives notifications of memory that goes offline.
///
/// Ranges are of pfns. All methods may sleep. The kernel's locks of memory and CPU hotplug are held.
pub(crate) trait Listener: Send + Sync {
    /// All pages in the range that are in use are about to be migrated.
    ///
    /// [`Self::offline`] or [`Self::stays_online`] follows, before the next range is announced.
    fn going_offline(&self, pfns: Range<usize>);

    /// The range is offline, and none of its pages is in use.
    ///
    /// The listener returns only when no task looks at any of these pages.
    fn offline(&self, pfns: Range<usize>);

    /// The range does not go offline after all. [`Self::going_offline`] may not have been called for it.
    fn stays_online(&self, pfns: Range<usize>);
}

/// The notifier block of a registration, with a pointer to the listener.
#[repr(C)]
struct Block<T> {
    kernel: bindings::notifier_block,
    owner: *const T,
}

/// A registered listener. Dropping it unregisters the listener, and waits for a call that is under way.
///
/// # Invariants
///
/// `block` is registered until the drop, and does not move while it is. Its `owner` points at `_owner`.
pub(crate) struct Registration<T: Listener + 'static> {
    block: KBox<Block<T>>,
    _owner: Arc<T>,
}

// SAFETY: Any task may unregister a notifier block, and nothing else uses it.
unsafe impl<T: Listener> Send for Registration<T> {}
// SAFETY: A shared reference gives access to nothing.
unsafe impl<T: Listener> Sync for Registration<T> {}

impl<T: Listener + 'static> Registration<T> {
    /// Registers `owner` as a listener. May sleep.
    ///
    /// # Errors
    ///
    /// Returns `ENOMEM`, or the error of `register_memory_notifier()`.
    pub(crate) fn new(owner: Arc<T>) -> Result<Self> {
        let mut kernel: bindings::notifier_block = pin_init::zeroed();
        kernel.notifier_call = Some(notified::<T>);
        let block = Block {
            kernel,
            owner: &raw const *owner,
        };
        let mut block = KBox::new(block, GFP_KERNEL)?;
        // SAFETY: The block is initialised. Its allocation lives until `drop` has unregistered it.
        kernel::error::to_result(unsafe {
            ffi::rksm_register_memory_notifier(&raw mut block.kernel)
        })?;
        // INVARIANT: The block was registered just now, and stays in its allocation.
        Ok(Self {
            block,
            _owner: owner,
        })
    }
}

impl<T: Listener + 'static> Drop for Registration<T> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant the block is registered. The call waits for calls of `notified`.
        unsafe { ffi::rksm_unregister_memory_notifier(&raw mut self.block.kernel) };
    }
}

/// Calls the listener of a [`Registration`].
///
/// # Safety
///
/// Only the chain of memory notifiers may call this. `block` is that of a [`Registration`], and `data` points
/// at a `memory_notify`.
unsafe extern "C" fn notified<T: Listener>(
    block: *mut bindings::notifier_block,
    action: c_ulong,
    data: *mut c_void,
) -> c_int {
    // SAFETY: `kernel` is the first member of a `Block`. By the type invariants of `Registration`, that and its
    // owner exist while it is registered.
    let owner = unsafe { &*(*block.cast::<Block<T>>()).owner };
    // SAFETY: By the caller's promise `data` points at a `memory_notify`.
    let notify = unsafe { &*data.cast::<ffi::memory_notify>() };
    let start = notify.start_pfn;
    let pfns = start..start.saturating_add(notify.nr_pages);
    match action as u32 {
        ffi::memory_block_state_MEM_GOING_OFFLINE => owner.going_offline(pfns),
        ffi::memory_block_state_MEM_OFFLINE => owner.offline(pfns),
        ffi::memory_block_state_MEM_CANCEL_OFFLINE => owner.stays_online(pfns),
        _ => {}
    }
    bindings::NOTIFY_OK as c_int
}
