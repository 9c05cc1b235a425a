// SPDX-License-Identifier: GPL-2.0

//! Lookup of the kernel's tracepoints.

use core::ptr::{self, NonNull};
use kernel::{bindings, ffi::c_void, prelude::*, str::CStr};

/// Returns the built-in tracepoint called `name`, if the kernel has it.
pub(crate) fn find_tracepoint(name: &CStr) -> Option<NonNull<bindings::tracepoint>> {
    struct Search<'a> {
        name: &'a CStr,
        found: *mut bindings::tracepoint,
    }

    /// # Safety
    ///
    /// `data` points at a `Search` that nothing else uses during the call. `tracepoint` is valid.
    unsafe extern "C" fn look(tracepoint: *mut bindings::tracepoint, data: *mut c_void) {
        // SAFETY: By the caller's promise `data` points at a `Search` that nothing else uses.
        let search = unsafe { &mut *data.cast::<Search<'_>>() };
        // SAFETY: By the caller's promise `tracepoint` is valid, and each tracepoint has a C string as its name.
        let name = unsafe { CStr::from_char_ptr((*tracepoint).name) };
        if name == search.name {
            search.found = tracepoint;
        }
    }

    let mut search = Search {
        name,
        found: ptr::null_mut(),
    };
    // SAFETY: `look` expects a pointer to a `Search`. This one lives until the call returns, and is not used
    // otherwise during it.
    unsafe { bindings::for_each_kernel_tracepoint(Some(look), (&raw mut search).cast()) };
    NonNull::new(search.found)
}
