// SPDX-License-Identifier: GPL-2.0
//! Write protection of this process's memory by userfaultfd.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd};
use std::time::Duration;

use anyhow::{ensure, Context, Result};

use crate::region::{Region, PAGE};
use crate::sys;

const API: libc::c_ulong = 0xc018_aa3f;
const REGISTER: libc::c_ulong = 0xc020_aa00;
const WRITEPROTECT: libc::c_ulong = 0xc018_aa06;
const MODE_WP: u64 = 2;
const EVENT_PAGEFAULT: u8 = 0x12;
/// The kernel lets writes through and only notes them in the page table.
const FEATURE_WP_ASYNC: u64 = 1 << 15;
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;

/// A userfaultfd that covers a region.
pub struct Uffd {
    file: File,
    addr: usize,
    pages: usize,
}

impl Uffd {
    /// Register `region`; writes wait for [`Self::let_through`]. `None` if the kernel has no userfaultfd.
    pub fn waiting(region: &Region) -> Result<Option<Self>> {
        Self::new(region, 0)
    }

    /// Register `region`; writes are only noted, see `PAGEMAP_SCAN`.
    pub fn noting(region: &Region) -> Result<Option<Self>> {
        Self::new(region, FEATURE_WP_ASYNC | FEATURE_WP_UNPOPULATED)
    }

    fn new(region: &Region, features: u64) -> Result<Option<Self>> {
        // SAFETY: The call takes flags only.
        let fd =
            unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
        if fd < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::ENOSYS) {
            return Ok(None);
        }
        ensure!(fd >= 0, "userfaultfd: {}", io::Error::last_os_error());
        let this = Self {
            // SAFETY: The call succeeded, so the descriptor is open, and nothing else owns it.
            file: unsafe { File::from_raw_fd(fd as i32) },
            addr: region.addr(),
            pages: region.pages(),
        };
        this.ioctl(API, &mut [0xaa, features, 0])?;
        let len = (this.pages * PAGE) as u64;
        this.ioctl(REGISTER, &mut [this.addr as u64, len, MODE_WP, 0])?;
        Ok(Some(this))
    }

    fn ioctl(&self, request: libc::c_ulong, arg: &mut [u64]) -> Result<()> {
        // SAFETY: `arg` is as large as each request used here says, and outlives the call.
        let ret = unsafe { libc::ioctl(self.file.as_raw_fd(), request, arg.as_mut_ptr()) };
        ensure!(
            ret == 0,
            "ioctl {request:#x}: {}",
            io::Error::last_os_error()
        );
        Ok(())
    }

    /// Protect all pages.
    pub fn protect(&self) -> Result<()> {
        let len = (self.pages * PAGE) as u64;
        self.ioctl(WRITEPROTECT, &mut [self.addr as u64, len, 1])
    }

    /// Lift the protection of page `i`, and wake the writer.
    pub fn let_through(&self, i: usize) -> Result<()> {
        let addr = (self.addr + i * PAGE) as u64;
        self.ioctl(WRITEPROTECT, &mut [addr, PAGE as u64, 0])
    }

    /// Return the page that a writer waits for; `None` if no write faults within `limit`.
    pub fn next_write(&mut self, limit: Duration) -> Result<Option<usize>> {
        if !sys::poll_in(self.file.as_raw_fd(), limit)? {
            return Ok(None);
        }
        let mut message = [0u8; 32];
        let n = self.file.read(&mut message).context("userfaultfd")?;
        ensure!(
            n == message.len() && message[0] == EVENT_PAGEFAULT,
            "{message:?}"
        );
        let addr = u64::from_ne_bytes(message[16..24].try_into()?) as usize;
        Ok(Some((addr - self.addr) / PAGE))
    }
}
