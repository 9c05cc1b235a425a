// SPDX-License-Identifier: GPL-2.0

//! Whether the running kernel looks like the one that the module was built for.

// The host tool uses all of these, the module only what reads.
#[allow(dead_code)]
pub mod btf;
#[allow(dead_code)]
pub mod buildid;
pub(crate) mod check;
#[allow(dead_code)]
pub mod signature;

pub mod layout {
    //! What mm/ksm.c keeps to itself, from the target kernel's BTF: the layouts that the core kernel
    //! expects of stable nodes and rmap items, the signatures of all interfaces that are used, and the
    //! image's build id.
    //! Made by `rksm-tools layout`.
    #![allow(dead_code)]

    include!(concat!(env!("RKSM_GEN"), "/ksm_layout.rs"));
}
