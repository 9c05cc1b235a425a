// SPDX-License-Identifier: GPL-2.0

//! Refusal to unload the module while merged pages exist.

use crate::mm::ffi;
use kernel::{error::to_result, pr_err_once, prelude::*};

/// Checks that [`Pin::pin`] will be able to write to the module.
///
/// Call this while the module is being initialised. Takes `module_mutex`; may sleep.
///
/// # Errors
///
/// Logs the reason and returns `ENOEXEC` if the exit function of a module is read-only in this kernel.
pub(crate) fn check_writable(module: &'static ThisModule) -> Result {
    // SAFETY: This is the module that runs, and it is being initialised.
    if unsafe { ffi::rksm_module_can_pin(module.as_ptr()) } {
        return Ok(());
    }
    pr_err!(
        "this kernel keeps a module's exit function read-only, so unloading could not be refused \
         while pages are merged\n"
    );
    Err(ENOEXEC)
}

/// Keeps the module from being unloaded while it is pinned.
///
/// A pinned module has no exit function, and `delete_module(2)` returns `EBUSY` for such a module. With a
/// reference instead, it would return `EWOULDBLOCK`, and rmmod would only say "in use". No module can refuse
/// `rmmod -f`.
pub(crate) struct Pin {
    module: &'static ThisModule,
    pinned: bool,
}

impl Pin {
    /// Returns a pin that is not in effect yet.
    pub(crate) fn new(module: &'static ThisModule) -> Self {
        Self {
            module,
            pinned: false,
        }
    }

    /// Pins the module, unless it is pinned already. Takes `module_mutex`; may sleep.
    ///
    /// # Errors
    ///
    /// Returns `EBUSY` if the module is still being loaded, or is being unloaded already.
    pub(crate) fn pin(&mut self) -> Result {
        if !self.pinned {
            // SAFETY: This is the module that runs, so it exists.
            to_result(unsafe { ffi::rksm_module_pin(self.module.as_ptr()) })?;
            self.pinned = true;
        }
        Ok(())
    }

    /// Allows unloading again. Takes `module_mutex`; may sleep.
    pub(crate) fn unpin(&mut self) {
        if !self.pinned {
            return;
        }
        // SAFETY: This is the module that runs, and its exit function was saved when it was pinned.
        match to_result(unsafe { ffi::rksm_module_unpin(self.module.as_ptr()) }) {
            Ok(()) => self.pinned = false,
            // Not expected, since the word was writable when the module was pinned.
            Err(_) => pr_err_once!("the module cannot be unloaded any more\n"),
        }
    }
}

/// A kprobe on `delete_module(2)` that logs why unloading is refused.
///
/// The system call itself logs nothing, and runs no code of the module.
pub(crate) struct DeleteModuleProbe(());

impl DeleteModuleProbe {
    /// Registers the probe. Returns `None` if that fails: without kprobes the log does not say why. May sleep.
    pub(crate) fn new() -> Option<Self> {
        // SAFETY: The probe is static data, and `drop` unregisters it before the module is freed.
        (unsafe { ffi::rksm_watch_unload() } == 0).then(|| Self(()))
    }
}

impl Drop for DeleteModuleProbe {
    fn drop(&mut self) {
        // SAFETY: The probe was registered in `new`. The call waits for handlers that run.
        unsafe { ffi::rksm_unwatch_unload() };
    }
}

/// The name of the module, as user space passes it.
const NAME: &[u8; 5] = b"rksm\0";

/// Logs why unloading `module`, which is this one, is refused, if `name` is the user-space address of its name.
///
/// May be called with preemption disabled.
#[inline]
pub(crate) fn log_refusal(module: &ThisModule, name: usize) {
    // SAFETY: This is the module that runs, so it exists.
    if !unsafe { ffi::rksm_module_pinned(module.as_ptr()) } {
        return;
    }
    let mut given = [0u8; NAME.len()];
    // SAFETY: `given` has room for `given.len()` bytes. `name` may be any address: the call catches faults.
    let ret = unsafe { ffi::rksm_copy_user_nofault(given.as_mut_ptr().cast(), name, given.len()) };
    if ret == 0 && given == *NAME {
        pr_err!(
            "unloading is refused while pages are merged; writing 2 to /sys/kernel/mm/rksm/run unmerges them\n"
        );
    }
}
