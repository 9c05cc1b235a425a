// SPDX-License-Identifier: GPL-2.0

//! References that the per-CPU batches of the LRU lists hold.
//!
//! A page that was just faulted in waits in such a batch, with a reference, for its CPU to put it on an LRU
//! list. To the merge protocol that is a reference like any other: the page is left alone. So the scan has the
//! batches emptied, within these limits:
//!
//! * It does so only when a batch was in the way.
//! * It leaves isolated CPUs in peace.
//! * It does not wait for a CPU whose tasks keep the work from running.
//!
//! Pages that were left alone for a batch are tried once more at the end of the same pass.
//!
//! In-tree KSM calls `lru_add_drain_all()` at the start of each pass. That queues work on all CPUs with batches,
//! isolated ones too, and waits for it without a limit.

use super::ffi;
use kernel::sync::atomic::{Atomic, Relaxed};

/// How long the scan waits for the CPUs to empty their batches, in milliseconds. What takes longer is done
/// some time.
const WAIT_MS: u32 = 50;

/// Whether a page was left alone that a batch may hold. It is a hint, and so its order with other memory does
/// not matter.
static IN_THE_WAY: Atomic<bool> = Atomic::new(false);

/// Notes that a page was left alone that a batch may hold.
pub(super) fn note_in_the_way() {
    IN_THE_WAY.store(true, Relaxed);
}

/// Whether a page was left alone that a batch may hold, since this was asked last.
pub(crate) fn was_in_the_way() -> bool {
    let was = IN_THE_WAY.load(Relaxed);
    if was {
        IN_THE_WAY.store(false, Relaxed);
    }
    was
}

/// Empties the batches of this CPU, and has all others that are not isolated empty theirs. Sleeps, but not for
/// long; no lock may be held.
pub(crate) fn drain() {
    // SAFETY: Called by a task that holds no lock.
    unsafe { ffi::rksm_lru_drain(WAIT_MS) };
}

/// The module's share in the workqueues of all CPUs. Dropping it waits until none of its work runs.
pub(crate) struct Drains(());

impl Drains {
    /// Prepares the work. It must be dropped after the thread that calls [`drain`].
    pub(crate) fn new() -> Self {
        // SAFETY: Called once, before any use, when the module is loaded.
        unsafe { ffi::rksm_lru_init() };
        Self(())
    }
}

impl Drop for Drains {
    fn drop(&mut self) {
        // SAFETY: Nothing queues work any more, as the thread has ended.
        unsafe { ffi::rksm_lru_exit() };
    }
}
