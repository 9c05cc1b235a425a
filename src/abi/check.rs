// SPDX-License-Identifier: GPL-2.0

//! The load-time check: whether this kernel is the build that the module was made for, and whether the
//! interfaces that are used look in its own BTF as they did there.

use super::{
    btf::{Blob, Btf},
    buildid, layout, signature,
};
use crate::mm::ffi;
use kernel::{alloc::KVVec, fmt, prelude::*};

/// The running kernel's BTF.
fn kernel_btf() -> &'static [u8] {
    let mut len = 0;
    // SAFETY: the section is part of the kernel image: read-only, and there for ever.
    unsafe {
        let start = ffi::rksm_btf(&raw mut len);
        core::slice::from_raw_parts(start.cast(), len)
    }
}

/// The running kernel's ELF notes.
fn kernel_notes() -> &'static [u8] {
    let mut len = 0;
    // SAFETY: The section is part of the kernel image: read-only, and there for ever.
    unsafe {
        let start = ffi::rksm_notes(&raw mut len);
        core::slice::from_raw_parts(start.cast(), len)
    }
}

/// A build id for a log line.
struct Id<'a>(&'a [u8]);

impl fmt::Display for Id<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("none");
        }
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Checks that the running kernel is the very build that the module was made for. Both are named in
/// the log when it is not.
///
/// An image without a build id takes only modules that were built for one without.
///
/// Fails with `ENOEXEC`.
pub(crate) fn check_build() -> Result {
    let (wanted, running) = (
        layout::BUILD_ID.id(),
        buildid::find(kernel_notes()).unwrap_or_default(),
    );
    if wanted == running {
        return Ok(());
    }
    let (wanted, running) = (Id(wanted), Id(running));
    pr_err!(
        "built for the kernel with build id {wanted}, but build id {running} is running: build rksm again, for the running kernel\n"
    );
    Err(ENOEXEC)
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
