// SPDX-License-Identifier: GPL-2.0

//! Who is to blame when memory runs out.

use crate::mm::ffi;
use kernel::types::NotThreadSafe;

/// While this lives, the OOM killer picks the current task first.
pub(crate) struct OomOrigin(NotThreadSafe);

impl OomOrigin {
    /// Blames the current task.
    pub(crate) fn current() -> Self {
        // SAFETY: concerns the current task only.
        unsafe { ffi::rksm_set_oom_origin(true) };
        Self(NotThreadSafe)
    }
}

impl Drop for OomOrigin {
    fn drop(&mut self) {
        // SAFETY: the current task is the one that was blamed: the type cannot be sent to another.
        unsafe { ffi::rksm_set_oom_origin(false) };
    }
}
