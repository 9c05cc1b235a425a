// SPDX-License-Identifier: GPL-2.0
//! The parts of userfaultfd that protect pages.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use super::check;

// From the kernel's <linux/userfaultfd.h>.
const UFFD_API: u64 = 0xaa;
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_WRITEPROTECT: libc::c_ulong = 0xc018_aa06;
const UFFDIO_RWPROTECT: libc::c_ulong = 0xc018_aa09;
/// The kernel's own faults on behalf of a process fail. (A debug kernel logs those for which it cannot wait.)
const USER_MODE_ONLY: libc::c_int = 1;
const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1;
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const FEATURE_WP_ASYNC: u64 = 1 << 15;
const FEATURE_RWP: u64 = 1 << 17;
const FEATURE_RWP_ASYNC: u64 = 1 << 18;
const REGISTER_MODE_WP: u64 = 2;
const REGISTER_MODE_RWP: u64 = 8;
const WRITEPROTECT_MODE_WP: u64 = 1;
const EVENT_PAGEFAULT: u8 = 0x12;

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct Protect {
    start: u64,
    len: u64,
    mode: u64,
}

fn open(flags: libc::c_int, features: u64) -> io::Result<OwnedFd> {
    // SAFETY: userfaultfd takes an integer.
    let fd = check(unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | flags) })?;
    // SAFETY: The descriptor is open, and nothing else owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as RawFd) };
    let mut api = Api {
        api: UFFD_API,
        features,
        ioctls: 0,
    };
    // SAFETY: The request takes an `Api`, which outlives the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &mut api) }.into())?;
    Ok(fd)
}

fn register(fd: &OwnedFd, start: usize, len: usize, mode: u64) -> io::Result<()> {
    let mut range = Register {
        start: start as u64,
        len: len as u64,
        mode,
        ioctls: 0,
    };
    // SAFETY: The request takes a `Register`, which outlives the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_REGISTER, &mut range) }.into()).map(drop)
}

/// Pages that are protected from all access until dropped. A thread that touches them waits; with
/// `by_itself`, the kernel lifts the protection at once instead.
pub struct NoAccess(OwnedFd);

impl NoAccess {
    pub fn new(start: usize, len: usize, by_itself: bool) -> io::Result<Self> {
        let features = FEATURE_RWP | if by_itself { FEATURE_RWP_ASYNC } else { 0 };
        let this = Self(open(USER_MODE_ONLY, features)?);
        register(&this.0, start, len, REGISTER_MODE_RWP)?;
        let mut range = Protect {
            start: start as u64,
            len: len as u64,
            mode: 1,
        };
        // SAFETY: The request takes a `Protect`, which outlives the call. The pages are not touched until the
        // descriptor is closed, which lifts the protection.
        check(unsafe { libc::ioctl(this.0.as_raw_fd(), UFFDIO_RWPROTECT, &mut range) }.into())?;
        Ok(this)
    }
}

/// A descriptor that pages can be registered with. Closing it lifts their protection.
pub struct Uffd(OwnedFd);

impl Uffd {
    /// Open a descriptor. With `by_itself`, the kernel resolves each write; otherwise a process has to.
    pub fn new(by_itself: bool) -> io::Result<Self> {
        let mut features = FEATURE_PAGEFAULT_FLAG_WP | FEATURE_WP_UNPOPULATED;
        if by_itself {
            features |= FEATURE_WP_ASYNC;
        }
        open(0, features).map(Self)
    }

    pub fn register(&self, start: usize, len: usize) -> io::Result<()> {
        register(&self.0, start, len, REGISTER_MODE_WP)
    }

    /// Write-protect pages, or lift the protection and wake waiting writers.
    pub fn protect(&self, start: usize, len: usize, on: bool) -> io::Result<()> {
        let mut range = Protect {
            start: start as u64,
            len: len as u64,
            mode: if on { WRITEPROTECT_MODE_WP } else { 0 },
        };
        // SAFETY: The request takes a `Protect`, which outlives the call.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_WRITEPROTECT, &mut range) }.into())
            .map(drop)
    }

    /// Wait for a write to a protected page. Return its address.
    pub fn next_fault(&self) -> io::Result<usize> {
        // The layout of struct uffd_msg: the event in the first byte, the address in the third word.
        let mut message = [0u64; 4];
        loop {
            let fd = self.0.as_raw_fd();
            // SAFETY: `message` has room for one message of 32 bytes.
            let n = unsafe { libc::read(fd, message.as_mut_ptr().cast(), 32) };
            let n = check(n as libc::c_long)?;
            if n == 32 && message[0] as u8 == EVENT_PAGEFAULT {
                return Ok(message[2] as usize);
            }
        }
    }
}
