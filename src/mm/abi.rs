// SPDX-License-Identifier: GPL-2.0

//! The load-time check: compares the interfaces that are used with the running kernel's own BTF.

use super::ffi;
use crate::abi::{
    btf::{Blob, Btf},
    layout, signature,
};
use kernel::{alloc::KVVec, prelude::*};

/// The running kernel's BTF.
fn kernel_btf() -> &'static [u8] {
    let mut len = 0;
    // SAFETY: the section is part of the kernel image: read-only, and there for ever.
    unsafe {
        let start = ffi::rksm_btf(&raw mut len);
        core::slice::from_raw_parts(start.cast(), len)
    }
}

/// Checks all interfaces that the module relies on. Each one that is missing or differs is named in
/// the log.
///
/// Fails with `ENOEXEC` when one differs or the kernel's BTF cannot be read, and `ENOMEM`.
pub(crate) fn check() -> Result {
    let unreadable = |_| {
        pr_err!("this kernel's BTF cannot be read, so nothing can be checked\n");
        ENOEXEC
    };
    let blob = Blob::parse(kernel_btf()).map_err(unreadable)?;
    let types = blob.count_types().map_err(unreadable)?;
    let mut index = KVVec::from_elem(0u32, types as usize, GFP_KERNEL)?;
    blob.fill_index(&mut index).map_err(unreadable)?;
    let btf = Btf::new(blob, &index);
    let mut report = |entry: &signature::Entry, mismatch: signature::Mismatch| {
        let (keyword, name, how) = (entry.keyword(), entry.name_text(), mismatch.as_str());
        pr_err!("{keyword} {name} {how}\n");
    };
    let mismatches =
        signature::check(&btf, layout::EXPECTED.entries(), &mut report).map_err(unreadable)?;
    if mismatches != 0 {
        pr_err!("built for another kernel: {mismatches} interfaces do not match\n");
        return Err(ENOEXEC);
    }
    Ok(())
}
