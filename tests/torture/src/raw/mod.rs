// SPDX-License-Identifier: GPL-2.0
//! All system calls on memory, and all access to memory that other processes change.

pub mod pagemap;
pub mod uffd;

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use libc::{c_int, c_void};

use crate::arena::Arena;
use crate::page::{Words, PAGE, WORDS};

fn check(ret: libc::c_long) -> io::Result<usize> {
    usize::try_from(ret).map_err(|_| io::Error::last_os_error())
}

const HUGE: usize = 2 << 20;

/// A private anonymous mapping. No Rust reference points into it: it is read and written by copying whole
/// words. So any change by the kernel or other processes is at worst a wrong value.
pub struct Mem {
    addr: usize,
    pages: usize,
}

fn map(addr: usize, len: usize, prot: c_int, flags: c_int) -> io::Result<usize> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | flags;
    // SAFETY: This maps anonymous memory at an address that the kernel chooses, or (MAP_FIXED) replaces pages
    // of a `Mem` that the caller has.
    let at = unsafe { libc::mmap(addr as *mut c_void, len, prot, flags, -1, 0) };
    if at == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(at as usize)
}

fn unmap(addr: usize, len: usize) -> io::Result<()> {
    // SAFETY: The range belongs to a `Mem` that its owner gives up, or is a hole that we just made.
    check(unsafe { libc::munmap(addr as *mut c_void, len) }.into()).map(drop)
}

const RW: c_int = libc::PROT_READ | libc::PROT_WRITE;

impl Mem {
    /// Map untouched memory.
    pub fn new(pages: usize) -> io::Result<Self> {
        let addr = map(0, pages * PAGE, RW, 0)?;
        Ok(Self { addr, pages })
    }

    /// Map untouched memory that begins where a huge page can.
    pub fn aligned(pages: usize) -> io::Result<Self> {
        let len = pages * PAGE;
        let hole = map(0, len + HUGE, RW, 0)?;
        let addr = hole.next_multiple_of(HUGE);
        if addr > hole {
            unmap(hole, addr - hole)?;
        }
        let (end, hole_end) = (addr + len, hole + len + HUGE);
        if hole_end > end {
            unmap(end, hole_end - end)?;
        }
        Ok(Self { addr, pages })
    }

    pub fn addr(&self) -> usize {
        self.addr
    }

    pub fn pages(&self) -> usize {
        self.pages
    }

    fn at(&self, i: usize, n: usize) -> usize {
        assert!(i + n <= self.pages, "pages {i}+{n} of {}", self.pages);
        self.addr + i * PAGE
    }

    fn ptr(&self, i: usize, n: usize) -> *mut c_void {
        self.at(i, n) as *mut c_void
    }

    /// Read the present content of page `i`.
    pub fn read(&self, i: usize, page: &mut Words) {
        let from = self.at(i, 1) as *const u64;
        // SAFETY: The page is mapped and readable, and `page` has the same length.
        unsafe { std::ptr::copy_nonoverlapping(from, page.as_mut_ptr(), WORDS) };
    }

    pub fn write(&mut self, i: usize, page: &Words) {
        self.poke(i, 0, page);
    }

    /// Write some words of page `i`.
    pub fn poke(&mut self, i: usize, word: usize, words: &[u64]) {
        assert!(word + words.len() <= WORDS);
        let to = (self.at(i, 1) + word * 8) as *mut u64;
        // SAFETY: The words lie in a page that is mapped and writable, and no reference to it exists.
        unsafe { std::ptr::copy_nonoverlapping(words.as_ptr(), to, words.len()) };
    }

    /// Replace some pages by untouched memory.
    pub fn refresh(&mut self, i: usize, n: usize) -> io::Result<()> {
        map(self.at(i, n), n * PAGE, RW, libc::MAP_FIXED).map(drop)
    }

    pub fn advise(&self, i: usize, n: usize, advice: c_int) -> io::Result<()> {
        // SAFETY: The pages are ours, and only the ledger depends on their content.
        check(unsafe { libc::madvise(self.ptr(i, n), n * PAGE, advice) }.into()).map(drop)
    }

    pub fn protect(&self, i: usize, n: usize, prot: c_int) -> io::Result<()> {
        // SAFETY: The pages are ours; the caller does not access them against `prot`.
        check(unsafe { libc::mprotect(self.ptr(i, n), n * PAGE, prot) }.into()).map(drop)
    }

    pub fn lock(&self, i: usize, n: usize) -> io::Result<()> {
        // SAFETY: The pages are ours.
        check(unsafe { libc::mlock(self.ptr(i, n), n * PAGE) }.into()).map(drop)
    }

    pub fn unlock(&self, i: usize, n: usize) -> io::Result<()> {
        // SAFETY: The pages are ours.
        check(unsafe { libc::munlock(self.ptr(i, n), n * PAGE) }.into()).map(drop)
    }

    /// Make the mapping longer or shorter. The kernel may move it.
    pub fn resize(&mut self, pages: usize) -> io::Result<()> {
        let (old, new) = (self.pages * PAGE, pages * PAGE);
        // SAFETY: The mapping is ours, and no reference points to its present address.
        let at = unsafe { libc::mremap(self.ptr(0, 0), old, new, libc::MREMAP_MAYMOVE) };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        self.addr = at as usize;
        self.pages = pages;
        Ok(())
    }

    /// Move the whole mapping to another address.
    pub fn relocate(&mut self) -> io::Result<()> {
        let len = self.pages * PAGE;
        let hole = map(0, len, libc::PROT_NONE, 0)?;
        move_onto(self.addr, hole, len)?;
        self.addr = hole;
        Ok(())
    }

    /// Move pages of `from` onto pages of this mapping, and leave untouched ones there.
    pub fn take(&mut self, to: usize, from: &mut Self, i: usize, n: usize) -> io::Result<()> {
        move_onto(from.at(i, n), self.at(to, n), n * PAGE)?;
        from.refresh(i, n)
    }

    /// Read from a file into the pages, which an O_DIRECT descriptor does without a copy.
    pub fn direct_read(&mut self, fd: RawFd, i: usize, n: usize, at: usize) -> io::Result<usize> {
        // SAFETY: The pages are ours, and no reference points to them.
        let got = unsafe { libc::pread(fd, self.ptr(i, n), n * PAGE, (at * PAGE) as libc::off_t) };
        check(got as libc::c_long)
    }

    /// Splice the pages themselves into a pipe. Return the number of bytes.
    pub fn splice(&self, pipe: RawFd, i: usize, n: usize) -> io::Result<usize> {
        let part = libc::iovec {
            iov_base: self.ptr(i, n),
            iov_len: n * PAGE,
        };
        // SAFETY: The pages are ours. The pipe is meant to see later writes to them.
        check(unsafe { libc::vmsplice(pipe, &part, 1, libc::SPLICE_F_NONBLOCK) } as libc::c_long)
    }
}

impl Drop for Mem {
    fn drop(&mut self) {
        let _ = unmap(self.addr, self.pages * PAGE);
    }
}

fn move_onto(from: usize, to: usize, len: usize) -> io::Result<()> {
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    // SAFETY: Both ranges belong to the callers' `Mem`s, or the target is a hole that was just made for it.
    let at = unsafe { libc::mremap(from as *mut c_void, len, len, flags, to as *mut c_void) };
    if at == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Write a page into another process.
pub fn write_remote(pid: u32, addr: usize, page: &Words) -> io::Result<usize> {
    let local = libc::iovec {
        iov_base: page.as_ptr() as *mut c_void,
        iov_len: PAGE,
    };
    let remote = libc::iovec {
        iov_base: addr as *mut c_void,
        iov_len: PAGE,
    };
    // SAFETY: The kernel reads `page`, and writes only where the other process has a shared page.
    check(unsafe { libc::process_vm_writev(pid as i32, &local, 1, &remote, 1, 0) } as libc::c_long)
}

/// Read from a descriptor into a page.
pub fn read_page(fd: RawFd, page: &mut Words) -> io::Result<usize> {
    // SAFETY: `page` has room for this number of bytes, and any bytes make valid words.
    check(unsafe { libc::read(fd, page.as_mut_ptr().cast(), PAGE) } as libc::c_long)
}

/// Write a page to a file.
pub fn write_page_at(fd: RawFd, page: &Words, at: usize) -> io::Result<usize> {
    // SAFETY: `page` has the stated length.
    let n = unsafe { libc::pwrite(fd, page.as_ptr().cast(), PAGE, (at * PAGE) as libc::off_t) };
    check(n as libc::c_long)
}

/// Milliseconds since the guest booted.
pub fn now() -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` outlives the call.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
    time.tv_sec as u64 * 1000 + time.tv_nsec as u64 / 1_000_000
}

/// Create a file for the arena that stays open over an exec.
pub fn arena_file() -> io::Result<OwnedFd> {
    // SAFETY: The name is a C string.
    let fd = check(unsafe { libc::memfd_create(c"rksm-torture".as_ptr(), 0) }.into())?;
    // SAFETY: The descriptor is open, and nothing else owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as RawFd) };
    // SAFETY: ftruncate takes integers only.
    check(unsafe { libc::ftruncate(fd.as_raw_fd(), size_of::<Arena>() as libc::off_t) }.into())?;
    Ok(fd)
}

/// Map the arena for the life of the process.
pub fn map_arena(fd: RawFd) -> io::Result<&'static Arena> {
    // SAFETY: This is a shared mapping at an address that the kernel chooses.
    let at = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            size_of::<Arena>(),
            RW,
            libc::MAP_SHARED,
            fd,
            0,
        )
    };
    if at == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: The file has this length and never shrinks. The mapping is page-aligned and never unmapped.
    // `Arena` consists of atomics, for which all bytes, zeroes at first, are valid.
    Ok(unsafe { &*at.cast::<Arena>() })
}

/// Let `signal` interrupt system calls and do nothing else.
pub fn interrupt_by(signal: c_int) -> io::Result<()> {
    extern "C" fn nothing(_: c_int) {}
    // SAFETY: All zeroes are a valid sigaction: no flags, no mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = nothing as extern "C" fn(c_int) as usize;
    // SAFETY: The handler does nothing; `action` outlives the call.
    check(unsafe { libc::sigaction(signal, &action, std::ptr::null_mut()) }.into()).map(drop)
}

/// Set the nice value of this process.
pub fn be_nice(nice: c_int) -> io::Result<()> {
    // SAFETY: setpriority takes integers only.
    check(unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice) }.into()).map(drop)
}

/// Return the parent's pid.
pub fn parent() -> u32 {
    // SAFETY: getppid takes no arguments.
    unsafe { libc::getppid() as u32 }
}

/// Write `text` to standard output in one piece, as other processes write as well.
pub fn say(text: &str) {
    let mut rest = text.as_bytes();
    while !rest.is_empty() {
        // SAFETY: `rest` has the stated length.
        match check(unsafe { libc::write(1, rest.as_ptr().cast(), rest.len()) } as libc::c_long) {
            Ok(n) => rest = &rest[n..],
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}
