// SPDX-License-Identifier: GPL-2.0

//! Marking the current task as the one that causes an OOM condition.

use crate::mm::ffi;
use kernel::types::NotThreadSafe;

/// While this object lives, the OOM killer picks the current task first.
pub(crate) struct OomOrigin(NotThreadSafe);

impl OomOrigin {
    /// Marks the current task. Does not sleep.
    pub(crate) fn current() -> Self {
        // SAFETY: The call only sets a flag of the current task's process.
        unsafe { ffi::rksm_set_oom_origin(true) };
        Self(NotThreadSafe)
    }
}

impl Drop for OomOrigin {
    fn drop(&mut self) {
        // SAFETY: The call only clears a flag of the current task's process. It is the task that was marked,
        // since the type is not `Send`.
        unsafe { ffi::rksm_set_oom_origin(false) };
    }
}
