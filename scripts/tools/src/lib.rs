// SPDX-License-Identifier: GPL-2.0
//! Build tools of rksm. See README.md for the command lines.

pub mod abi;
pub mod compare;
pub mod conformance;
pub mod dwarf;
pub mod exports;
pub mod ktap;
pub mod layout;
pub mod list;
pub mod log_check;
pub mod output;
pub mod postlink;
pub mod shape;
pub mod symtab;
pub mod text;
