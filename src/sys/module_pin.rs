// SPDX-License-Identifier: GPL-2.0

//! Refusing to be unloaded while merged pages exist.

use crate::mm::ffi;
use kernel::{error::to_result, pr_err_once, prelude::*};

/// Checks that the module will be able to refuse to be unloaded. Called while it is being initialised.
///
/// Fails with `ENOEXEC` and a line in the log.
pub(crate) fn check_writable(module: &'static ThisModule) -> Result {
    // SAFETY: The module is ours, and is being initialised.
    if unsafe { ffi::rksm_module_can_pin(module.as_ptr()) } {
        return Ok(());
    }
    pr_err!("this kernel keeps a module's exit function read-only, so unloading could not be refused while pages are merged\n");
    Err(ENOEXEC)
}

/// Keeps the module from being unloaded.
///
/// `delete_module(2)` refuses a module that has no exit function with `EBUSY`, so that is what it is
/// given meanwhile. A reference would make it `EWOULDBLOCK`, of which rmmod says "in use", not why.
/// What no module can refuse is `rmmod -f`.
pub(crate) struct Pin {
    module: &'static ThisModule,
    pinned: bool,
}

impl Pin {
    /// Does not pin yet.
    pub(crate) fn new(module: &'static ThisModule) -> Self {
        Self {
            module,
            pinned: false,
        }
    }

    /// Pins the module. Fails with `EBUSY` when it is being unloaded already. May sleep.
    pub(crate) fn pin(&mut self) -> Result {
        if !self.pinned {
            // SAFETY: The module is ours.
            to_result(unsafe { ffi::rksm_module_pin(self.module.as_ptr()) })?;
            self.pinned = true;
        }
        Ok(())
    }

    /// Allows unloading again. May sleep.
    pub(crate) fn unpin(&mut self) {
        if !self.pinned {
            return;
        }
        // SAFETY: The module is ours, and was pinned.
        match to_result(unsafe { ffi::rksm_module_unpin(self.module.as_ptr()) }) {
            Ok(()) => self.pinned = false,
            // It was writable when the module was pinned.
            Err(_) => pr_err_once!("the module cannot be unloaded any more\n"),
        }
    }
}

/// Says in the log why unloading is refused, when somebody tries: `delete_module(2)` itself says
/// nothing, and runs no code of the module.
pub(crate) struct DeleteModuleProbe(());

impl DeleteModuleProbe {
    /// Starts watching. Without kprobes the refusal stays unexplained.
    pub(crate) fn new() -> Option<Self> {
        // SAFETY: the probe is unregistered in `drop`, before the module is freed.
        (unsafe { ffi::rksm_watch_unload() } == 0).then(|| Self(()))
    }
}

impl Drop for DeleteModuleProbe {
    fn drop(&mut self) {
        // SAFETY: registered in `new`. Waits for a handler that is running.
        unsafe { ffi::rksm_unwatch_unload() };
    }
}

const NAME: &[u8; 5] = b"rksm\0";

/// Called (through helpers/module.c) when somebody calls `delete_module(2)`, with preemption disabled.
#[no_mangle]
extern "C" fn rksm_unload_attempt(name: usize) {
    let module = kernel::module::this_module::<crate::LocalModule>();
    // SAFETY: the module is ours.
    if !unsafe { ffi::rksm_module_pinned(module.as_ptr()) } {
        return;
    }
    let mut given = [0u8; NAME.len()];
    // SAFETY: `given` has room for as many bytes. The address may be anything.
    let ret = unsafe { ffi::rksm_copy_user_nofault(given.as_mut_ptr().cast(), name, given.len()) };
    if ret == 0 && given == *NAME {
        pr_err!(
            "unloading is refused while pages are merged; writing 2 to /sys/kernel/mm/rksm/run unmerges them\n"
        );
    }
}
