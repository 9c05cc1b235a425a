// SPDX-License-Identifier: GPL-2.0
//! The very files that the kernel module is built from.

#[path = "../../../src/abi/btf.rs"]
pub mod btf;
#[path = "../../../src/abi/buildid.rs"]
pub mod buildid;
#[path = "../../../src/abi/signature.rs"]
pub mod signature;
