// SPDX-License-Identifier: GPL-2.0

//! The kernel's tracepoints, by name.

use core::ptr::{self, NonNull};
use kernel::{bindings, ffi::c_void, prelude::*, str::CStr};

/// The tracepoint of this name, if the kernel has it.
pub(crate) fn find_tracepoint(name: &CStr) -> Option<NonNull<bindings::tracepoint>> {
    struct Search<'a> {
        name: &'a CStr,
        found: *mut bindings::tracepoint,
    }

    /// # Safety
    ///
    /// `data` is a `Search`, `tracepoint` is valid.
    unsafe extern "C" fn look(tracepoint: *mut bindings::tracepoint, data: *mut c_void) {
        // SAFETY: the caller's promise; tracepoints have names.
        unsafe {
            let search = &mut *data.cast::<Search<'_>>();
            if CStr::from_char_ptr((*tracepoint).name) == search.name {
                search.found = tracepoint;
            }
        }
    }

    let mut search = Search {
        name,
        found: ptr::null_mut(),
    };
    // SAFETY: `look` takes what it is given.
    unsafe { bindings::for_each_kernel_tracepoint(Some(look), (&raw mut search).cast()) };
    NonNull::new(search.found)
}
