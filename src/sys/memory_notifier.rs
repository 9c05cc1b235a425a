// SPDX-License-Identifier: GPL-2.0

//! Memory that is taken offline.
//!
//! A stable node holds no reference on its page, only its frame number, so a stale node's frame may be
//! one that leaves the memory map. The kernel first marks its section as offline, then calls
//! [`Listener::offline`], and frees the `struct page` only after that returned. So whoever looks at a frame, by
//! `pfn_to_online_page()`, under a lock that the listener takes, either finds it online, and is done with it
//! before the listener goes on, or does not find it. Nothing has to be done about the nodes: that such a node is
//! stale is seen when it is looked at, as of any other.
//!
//! The listener is called with the lock of memory hotplug held for writing (and that of CPU hotplug for
//! reading): these are outside all locks of this module. Nothing that takes one of them may be called
//! with a lock held that the listener takes.

use crate::mm::ffi;
use core::ops::Range;
use kernel::{
    bindings,
    ffi::{c_int, c_ulong, c_void},
    prelude::*,
    sync::Arc,
};

/// Learns which memory goes away. May sleep. Ranges are of page frame numbers.
pub(crate) trait Listener: Send + Sync {
    /// All pages in use in the range are about to be migrated away. Ends with either of the following.
    /// Only one range at a time.
    fn going_offline(&self, pfns: Range<usize>);

    /// No page in the range is in use any more, and none is online. Returns when no task looks at any of them.
    fn offline(&self, pfns: Range<usize>);

    /// The range stays where it is. `going_offline` may not have been called.
    fn stays_online(&self, pfns: Range<usize>);
}

/// The kernel's view of a registration, with the way back to its owner.
#[repr(C)]
struct Block<T> {
    kernel: bindings::notifier_block,
    owner: *const T,
}

/// A registered listener. Dropping it waits until no call is under way.
///
/// # Invariants
///
/// `block` is registered, and stays where it is until it is not; its `owner` is the one here.
pub(crate) struct Registration<T: Listener + 'static> {
    block: KBox<Block<T>>,
    _owner: Arc<T>,
}

// SAFETY: registering is locked by the kernel, and nothing of the block is used before the drop.
unsafe impl<T: Listener> Send for Registration<T> {}
// SAFETY: nothing can be done with a shared reference.
unsafe impl<T: Listener> Sync for Registration<T> {}

impl<T: Listener + 'static> Registration<T> {
    /// Starts listening.
    pub(crate) fn new(owner: Arc<T>) -> Result<Self> {
        let mut kernel: bindings::notifier_block = pin_init::zeroed();
        kernel.notifier_call = Some(notified::<T>);
        let block = Block {
            kernel,
            owner: &raw const *owner,
        };
        let mut block = KBox::new(block, GFP_KERNEL)?;
        // SAFETY: the block is in an allocation that lives until `drop` unregistered it.
        kernel::error::to_result(unsafe {
            ffi::rksm_register_memory_notifier(&raw mut block.kernel)
        })?;
        // INVARIANT: registered just now.
        Ok(Self {
            block,
            _owner: owner,
        })
    }
}

impl<T: Listener + 'static> Drop for Registration<T> {
    fn drop(&mut self) {
        // SAFETY: registered by the type invariant; this waits for calls under way.
        unsafe { ffi::rksm_unregister_memory_notifier(&raw mut self.block.kernel) };
    }
}

/// # Safety
///
/// Called by the kernel for the block of a [`Registration`], with a `memory_notify`.
unsafe extern "C" fn notified<T: Listener>(
    block: *mut bindings::notifier_block,
    action: c_ulong,
    data: *mut c_void,
) -> c_int {
    // SAFETY: `kernel` is the first member of our block, which outlives its registration, as does its
    // owner.
    let owner = unsafe { &*(*block.cast::<Block<T>>()).owner };
    // SAFETY: this is what comes with all actions.
    let what = unsafe { &*data.cast::<ffi::memory_notify>() };
    let start = what.start_pfn;
    let pfns = start..start.saturating_add(what.nr_pages);
    match action as u32 {
        ffi::memory_block_state_MEM_GOING_OFFLINE => owner.going_offline(pfns),
        ffi::memory_block_state_MEM_OFFLINE => owner.offline(pfns),
        ffi::memory_block_state_MEM_CANCEL_OFFLINE => owner.stays_online(pfns),
        _ => {}
    }
    bindings::NOTIFY_OK as c_int
}
