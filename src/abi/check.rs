// SPDX-License-Identifier: GPL-2.0

//! The checks at load.
//!
//! [`check_build`] compares the build id of the running kernel with that of the image that the module was built
//! for. [`check()`] compares the interfaces that the module uses, as the running kernel's BTF describes them.

use super::{
    btf::{Blob, Btf},
    buildid, layout, signature,
};
use crate::mm::ffi;
use kernel::{alloc::KVVec, fmt, prelude::*};

/// Returns the BTF of the running kernel.
fn kernel_btf() -> &'static [u8] {
    let mut len = 0;
    // SAFETY: The call returns the bounds of a section, and `len` has room for its length.
    let start = unsafe { ffi::rksm_btf(&raw mut len) };
    // SAFETY: The section is part of the kernel image. It is read-only and never freed.
    unsafe { core::slice::from_raw_parts(start.cast(), len) }
}

/// Returns the ELF notes of the running kernel.
fn kernel_notes() -> &'static [u8] {
    let mut len = 0;
    // SAFETY: The call returns the bounds of a section, and `len` has room for its length.
    let start = unsafe { ffi::rksm_notes(&raw mut len) };
    // SAFETY: The section is part of the kernel image. It is read-only and never freed.
    unsafe { core::slice::from_raw_parts(start.cast(), len) }
}

/// Formats a build id for the log.
struct Id<'a>(&'a [u8]);

impl fmt::Display for Id<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("none");
        }
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Checks that the running kernel is the build that the module was made for.
///
/// A module that was built for an image without a build id only fits a kernel without one.
///
/// # Errors
///
/// Logs both build ids and returns `ENOEXEC` if they differ.
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
        "built for the kernel with build id {wanted}, but build id {running} is running: \
         build rksm again, for the running kernel\n"
    );
    Err(ENOEXEC)
}

/// Checks all interfaces that the module relies on. May sleep.
///
/// # Errors
///
/// * `ENOEXEC`: an interface is missing or differs, or the BTF of the kernel cannot be read. The log names each
///   such interface.
/// * `ENOMEM`: there is no memory for the index of types.
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
