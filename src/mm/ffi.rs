// SPDX-License-Identifier: GPL-2.0

//! Declarations of the functions in `helpers/shim.h`, made by bindgen from that header (see `Kbuild`).
//!
//! C is needed for what bindgen cannot see: macros, inline functions, and what only mm/internal.h declares.
//! `rksm_x` calls the kernel's `x()`, and has its preconditions: locks, references, contexts. Everything else
//! of the kernel comes from [`kernel::bindings`].

#![allow(
    clippy::all,
    dead_code,
    improper_ctypes,
    missing_docs,
    non_camel_case_types,
    non_upper_case_globals,
    unreachable_pub,
    unsafe_op_in_unsafe_fn
)]

use kernel::{bindings::*, ffi};

include!(concat!(env!("RKSM_GEN"), "/shim_bindings.rs"));
