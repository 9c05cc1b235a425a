// SPDX-License-Identifier: GPL-2.0
//! Files that the tools share with the kernel module.

#[path = "../../../src/abi/btf.rs"]
pub mod btf;
#[path = "../../../src/abi/buildid.rs"]
pub mod buildid;
#[path = "../../../src/abi/signature.rs"]
pub mod signature;
