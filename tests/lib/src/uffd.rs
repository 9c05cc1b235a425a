// SPDX-License-Identifier: GPL-2.0
//! Userfaultfd over this process's memory: protection, and pages that are brought when they are first used.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::time::Duration;

use anyhow::{ensure, Context, Result};

use crate::pageflags::Span;
use crate::region::PAGE;
use crate::sys;

// From the kernel's <linux/userfaultfd.h>.
const USER_MODE_ONLY: libc::c_int = 1;
const API_VERSION: u64 = 0xaa;
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_WAKE: libc::c_ulong = 0x8010_aa02;
const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;
const UFFDIO_ZEROPAGE: libc::c_ulong = 0xc020_aa04;
const UFFDIO_WRITEPROTECT: libc::c_ulong = 0xc018_aa06;
const UFFDIO_RWPROTECT: libc::c_ulong = 0xc018_aa09;
const REGISTER_MODE_MISSING: u64 = 1 << 0;
const REGISTER_MODE_WP: u64 = 1 << 1;
const REGISTER_MODE_MINOR: u64 = 1 << 2;
const REGISTER_MODE_RWP: u64 = 1 << 3;
const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
const FEATURE_MINOR_SHMEM: u64 = 1 << 10;
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const FEATURE_WP_ASYNC: u64 = 1 << 15;
const FEATURE_RWP: u64 = 1 << 17;
const EVENT_PAGEFAULT: u8 = 0x12;

/// What a userfaultfd watches for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// A write to a protected page waits for [`Uffd::let_through`].
    Write,
    /// The kernel lets such a write through and only notes it in the page table, see `PAGEMAP_SCAN`.
    WriteAsync,
    /// Any access to a protected page waits. The descriptor is opened as any user may open it, so an access
    /// by the kernel fails.
    Access,
    /// Any access to a page that is not there waits for [`Uffd::bring`].
    Missing,
    /// A fault on a page of a memfd that is in the page cache already waits. Nothing is protected.
    Minor,
}

impl Mode {
    fn features(self) -> u64 {
        match self {
            Self::Write => FEATURE_PAGEFAULT_FLAG_WP,
            Self::WriteAsync => {
                FEATURE_PAGEFAULT_FLAG_WP | FEATURE_WP_ASYNC | FEATURE_WP_UNPOPULATED
            }
            Self::Access => FEATURE_RWP,
            Self::Missing => 0,
            Self::Minor => FEATURE_MINOR_SHMEM,
        }
    }

    fn register_mode(self) -> u64 {
        match self {
            Self::Write | Self::WriteAsync => REGISTER_MODE_WP,
            Self::Access => REGISTER_MODE_RWP,
            Self::Missing => REGISTER_MODE_MISSING,
            Self::Minor => REGISTER_MODE_MINOR,
        }
    }
}

/// A userfaultfd that covers a span of this process. Closing it lifts all protection.
pub struct Uffd {
    file: File,
    span: Span,
    mode: Mode,
}

impl Uffd {
    /// Register `span`. `None` if the kernel has no userfaultfd, or not [`Mode::Access`].
    pub fn new(span: Span, mode: Mode) -> Result<Option<Self>> {
        let user_only = match mode {
            Mode::Access => USER_MODE_ONLY,
            _ => 0,
        };
        let flags = user_only | libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: The call takes integers only.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        if fd < 0 {
            let error = io::Error::last_os_error();
            return match error.raw_os_error() {
                Some(libc::ENOSYS) => Ok(None),
                _ => Err(error).context("userfaultfd"),
            };
        }
        // SAFETY: The call succeeded, so the descriptor is open, and nothing else owns it.
        let file = unsafe { File::from_raw_fd(fd as RawFd) };
        let this = Self { file, span, mode };
        match this.ioctl(UFFDIO_API, &mut [API_VERSION, mode.features(), 0]) {
            // Only newer kernels have this mode.
            Err(e) if mode == Mode::Access && e.raw_os_error() == Some(libc::EINVAL) => {
                return Ok(None);
            }
            other => other.context("UFFDIO_API")?,
        }
        let (start, len) = (span.addr as u64, span.len() as u64);
        this.ioctl(UFFDIO_REGISTER, &mut [start, len, mode.register_mode(), 0])
            .context("UFFDIO_REGISTER")?;
        Ok(Some(this))
    }

    fn ioctl(&self, request: libc::c_ulong, arg: &mut [u64]) -> io::Result<()> {
        // SAFETY: `arg` is as large as each request used here says, and outlives the call.
        let ret = unsafe { libc::ioctl(self.file.as_raw_fd(), request, arg.as_mut_ptr()) };
        match ret {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Protect the pages of `span`, or lift their protection.
    pub fn protect(&self, span: Span, on: bool) -> Result<()> {
        let (start, len) = (span.addr as u64, span.len() as u64);
        let request = match self.mode {
            Mode::Access => UFFDIO_RWPROTECT,
            _ => UFFDIO_WRITEPROTECT,
        };
        self.ioctl(request, &mut [start, len, u64::from(on)])
            .with_context(|| format!("protecting by userfaultfd, {:?}", self.mode))
    }

    /// Lift the protection of page `i`, and wake the writer.
    pub fn let_through(&self, i: usize) -> Result<()> {
        let page = Span {
            addr: self.span.addr + i * PAGE,
            pages: 1,
            ..self.span
        };
        self.protect(page, false)
    }

    /// Bring page `i`, with this content or as zeroes, and wake who waits for it. Return whether it was missing.
    pub fn bring(&self, i: usize, content: Option<&[u8; PAGE]>) -> Result<bool> {
        let addr = (self.span.addr + i * PAGE) as u64;
        let brought = loop {
            let brought = match content {
                Some(from) => {
                    let from = from.as_ptr() as u64;
                    self.ioctl(UFFDIO_COPY, &mut [addr, from, PAGE as u64, 0, 0])
                }
                None => self.ioctl(UFFDIO_ZEROPAGE, &mut [addr, PAGE as u64, 0, 0]),
            };
            match brought {
                // The address space is being changed.
                Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => std::thread::yield_now(),
                other => break other,
            }
        };
        match brought {
            Ok(()) => Ok(true),
            Err(e) if e.raw_os_error() == Some(libc::EEXIST) => {
                self.ioctl(UFFDIO_WAKE, &mut [addr, PAGE as u64])
                    .context("UFFDIO_WAKE")?;
                Ok(false)
            }
            Err(e) => Err(e).context("bringing a page by userfaultfd"),
        }
    }

    /// Return the page that a thread waits for; `None` if none faults within `limit`.
    pub fn next_fault(&self, limit: Duration) -> Result<Option<usize>> {
        if !sys::poll_in(self.file.as_raw_fd(), limit)? {
            return Ok(None);
        }
        let mut message = [0u8; 32];
        let n = (&self.file).read(&mut message).context("userfaultfd")?;
        ensure!(
            n == message.len() && message[0] == EVENT_PAGEFAULT,
            "{message:?}"
        );
        let addr = u64::from_ne_bytes(message[16..24].try_into()?) as usize;
        Ok(Some((addr - self.span.addr) / PAGE))
    }
}
