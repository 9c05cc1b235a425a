// SPDX-License-Identifier: GPL-2.0
//! userfaultfd in the mode that protects pages from any access (`UFFDIO_RWPROTECT`).

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use anyhow::{Context, Result};

use crate::pageflags::Span;

// From the kernel's <linux/userfaultfd.h>.
const USER_MODE_ONLY: libc::c_int = 1;
const API: u64 = 0xaa;
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_RWPROTECT: libc::c_ulong = 0xc018_aa09;
const FEATURE_RWP: u64 = 1 << 17;
const REGISTER_MODE_RWP: u64 = 1 << 3;

/// A userfaultfd that covers a span of this process, opened as any user may.
pub struct Rwp(OwnedFd);

impl Rwp {
    /// Register `span`. `None` if the kernel has no such mode.
    pub fn new(span: Span) -> Result<Option<Self>> {
        // SAFETY: The call takes integers only.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, USER_MODE_ONLY | libc::O_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error()).context("userfaultfd");
        }
        // SAFETY: The descriptor is open, and nothing else owns it.
        let this = Self(unsafe { OwnedFd::from_raw_fd(fd as RawFd) });
        if this.ioctl(UFFDIO_API, &mut [API, FEATURE_RWP, 0]).is_err() {
            return Ok(None);
        }
        let (start, len) = (span.addr as u64, span.len() as u64);
        this.ioctl(UFFDIO_REGISTER, &mut [start, len, REGISTER_MODE_RWP, 0])
            .context("UFFDIO_REGISTER")?;
        Ok(Some(this))
    }

    /// Protect pages from any access, or lift the protection.
    pub fn protect(&self, span: Span, on: bool) -> Result<()> {
        let (start, len) = (span.addr as u64, span.len() as u64);
        self.ioctl(UFFDIO_RWPROTECT, &mut [start, len, u64::from(on)])
            .context("UFFDIO_RWPROTECT")
    }

    fn ioctl(&self, request: libc::c_ulong, with: &mut [u64]) -> io::Result<()> {
        // SAFETY: The argument is as large as the request says.
        let ret = unsafe { libc::ioctl(self.0.as_raw_fd(), request as _, with.as_mut_ptr()) };
        match ret {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}
