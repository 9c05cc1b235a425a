// SPDX-License-Identifier: GPL-2.0

//! The check that the running kernel is the one that the module was built for.
//!
//! [`btf`], [`buildid`] and [`signature`] are pure logic, which the host tool `rksm-tools` compiles, too. It makes
//! [`layout`] at build. `check` compares that with the running kernel at load.

// The host tool uses all items of these modules, and the kernel module only some.
#[allow(dead_code)]
pub mod btf;
#[allow(dead_code)]
pub mod buildid;
pub(crate) mod check;
#[allow(dead_code)]
pub mod signature;

pub mod layout {
    //! Facts about the target kernel's image, which `rksm-tools layout` reads from it.
    //!
    //! These are the layouts of stable nodes and rmap items, which are private to mm/ksm.c, the signatures of all
    //! interfaces that the module uses, and the build id.
    #![allow(dead_code)]

    include!(concat!(env!("RKSM_GEN"), "/ksm_layout.rs"));
}
