// SPDX-License-Identifier: GPL-2.0
//! All system calls on memory, and all access to memory that others change.

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

/// A private anonymous mapping. Nothing in Rust refers to what is in it: it is
/// read and written by copying whole words, so that whatever the kernel and
/// other processes do to it is only ever a wrong value.
pub struct Mem {
    addr: usize,
    pages: usize,
}

fn map(addr: usize, len: usize, prot: c_int, flags: c_int) -> io::Result<usize> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | flags;
    // SAFETY: anonymous memory, at a place that the kernel chooses, or
    // (MAP_FIXED) instead of pages of a `Mem` that the caller has.
    let at = unsafe { libc::mmap(addr as *mut c_void, len, prot, flags, -1, 0) };
    if at == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(at as usize)
}

fn unmap(addr: usize, len: usize) -> io::Result<()> {
    // SAFETY: the range belongs to a `Mem` that its owner gives up, or is a hole that we just made.
    check(unsafe { libc::munmap(addr as *mut c_void, len) }.into()).map(drop)
}

const RW: c_int = libc::PROT_READ | libc::PROT_WRITE;

impl Mem {
    /// Untouched memory.
    pub fn new(pages: usize) -> io::Result<Self> {
        let addr = map(0, pages * PAGE, RW, 0)?;
        Ok(Self { addr, pages })
    }

    /// Untouched memory that begins where a huge page can.
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

    /// What page `i` holds now.
    pub fn read(&self, i: usize, page: &mut Words) {
        let from = self.at(i, 1) as *const u64;
        // SAFETY: the page is mapped and readable; `page` is as long.
        unsafe { std::ptr::copy_nonoverlapping(from, page.as_mut_ptr(), WORDS) };
    }

    pub fn write(&mut self, i: usize, page: &Words) {
        self.poke(i, 0, page);
    }

    /// Writes some words of page `i`.
    pub fn poke(&mut self, i: usize, word: usize, words: &[u64]) {
        assert!(word + words.len() <= WORDS);
        let to = (self.at(i, 1) + word * 8) as *mut u64;
        // SAFETY: the words lie in a page that is mapped and writable, and no reference to it exists.
        unsafe { std::ptr::copy_nonoverlapping(words.as_ptr(), to, words.len()) };
    }

    /// Puts untouched memory in the place of some pages.
    pub fn refresh(&mut self, i: usize, n: usize) -> io::Result<()> {
        map(self.at(i, n), n * PAGE, RW, libc::MAP_FIXED).map(drop)
    }

    pub fn advise(&self, i: usize, n: usize, advice: c_int) -> io::Result<()> {
        // SAFETY: the pages are ours, and losing what is in them harms nobody but the ledger.
        check(unsafe { libc::madvise(self.ptr(i, n), n * PAGE, advice) }.into()).map(drop)
    }

    pub fn protect(&self, i: usize, n: usize, prot: c_int) -> io::Result<()> {
        // SAFETY: the pages are ours; the caller does not touch them against `prot`.
        check(unsafe { libc::mprotect(self.ptr(i, n), n * PAGE, prot) }.into()).map(drop)
    }

    pub fn lock(&self, i: usize, n: usize) -> io::Result<()> {
        // SAFETY: the pages are ours.
        check(unsafe { libc::mlock(self.ptr(i, n), n * PAGE) }.into()).map(drop)
    }

    pub fn unlock(&self, i: usize, n: usize) -> io::Result<()> {
        // SAFETY: the pages are ours.
        check(unsafe { libc::munlock(self.ptr(i, n), n * PAGE) }.into()).map(drop)
    }

    /// Makes it longer or shorter, and moves it if need be.
    pub fn resize(&mut self, pages: usize) -> io::Result<()> {
        let (old, new) = (self.pages * PAGE, pages * PAGE);
        // SAFETY: the mapping is ours, and nothing refers to the place it has now.
        let at = unsafe { libc::mremap(self.ptr(0, 0), old, new, libc::MREMAP_MAYMOVE) };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        self.addr = at as usize;
        self.pages = pages;
        Ok(())
    }

    /// Moves all of it to another place.
    pub fn relocate(&mut self) -> io::Result<()> {
        let len = self.pages * PAGE;
        let hole = map(0, len, libc::PROT_NONE, 0)?;
        move_onto(self.addr, hole, len)?;
        self.addr = hole;
        Ok(())
    }

    /// Moves pages of `from` onto pages of this one, and leaves untouched ones there.
    pub fn take(&mut self, to: usize, from: &mut Self, i: usize, n: usize) -> io::Result<()> {
        move_onto(from.at(i, n), self.at(to, n), n * PAGE)?;
        from.refresh(i, n)
    }

    /// Reads from a file straight into it.
    pub fn direct_read(&mut self, fd: RawFd, i: usize, n: usize, at: usize) -> io::Result<usize> {
        // SAFETY: the pages are ours and nothing refers to them.
        let got = unsafe { libc::pread(fd, self.ptr(i, n), n * PAGE, (at * PAGE) as libc::off_t) };
        check(got as libc::c_long)
    }

    /// Puts the pages themselves into a pipe; returns the number of bytes.
    pub fn splice(&self, pipe: RawFd, i: usize, n: usize) -> io::Result<usize> {
        let part = libc::iovec {
            iov_base: self.ptr(i, n),
            iov_len: n * PAGE,
        };
        // SAFETY: the pages are ours; that the pipe sees later writes to them is intended.
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
    // SAFETY: both ranges belong to the callers' `Mem`s, or the target is a
    // hole that was just made for it.
    let at = unsafe { libc::mremap(from as *mut c_void, len, len, flags, to as *mut c_void) };
    if at == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Writes a page into another process.
pub fn write_remote(pid: u32, addr: usize, page: &Words) -> io::Result<usize> {
    let local = libc::iovec {
        iov_base: page.as_ptr() as *mut c_void,
        iov_len: PAGE,
    };
    let remote = libc::iovec {
        iov_base: addr as *mut c_void,
        iov_len: PAGE,
    };
    // SAFETY: the kernel reads `page`, and writes only where the other process has a shared page.
    check(unsafe { libc::process_vm_writev(pid as i32, &local, 1, &remote, 1, 0) } as libc::c_long)
}

/// Reads from a descriptor into a page.
pub fn read_page(fd: RawFd, page: &mut Words) -> io::Result<usize> {
    // SAFETY: `page` has room for as many bytes, and any bytes make words.
    check(unsafe { libc::read(fd, page.as_mut_ptr().cast(), PAGE) } as libc::c_long)
}

/// Writes a page to a file.
pub fn write_page_at(fd: RawFd, page: &Words, at: usize) -> io::Result<usize> {
    // SAFETY: `page` is as long as said.
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

/// A file for the arena that stays open over an exec.
pub fn arena_file() -> io::Result<OwnedFd> {
    // SAFETY: the name is a C string.
    let fd = check(unsafe { libc::memfd_create(c"rksm-torture".as_ptr(), 0) }.into())?;
    // SAFETY: the descriptor is open and ours alone.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as RawFd) };
    // SAFETY: ftruncate takes integers only.
    check(unsafe { libc::ftruncate(fd.as_raw_fd(), size_of::<Arena>() as libc::off_t) }.into())?;
    Ok(fd)
}

/// Maps the arena, for as long as the process lives.
pub fn map_arena(fd: RawFd) -> io::Result<&'static Arena> {
    // SAFETY: a shared mapping at a place that the kernel chooses.
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
    // SAFETY: the file is as long and never gets shorter, the mapping is never
    // undone and is page aligned; `Arena` is made of atomics only, for which
    // all bytes, zeroes to begin with, are valid.
    Ok(unsafe { &*at.cast::<Arena>() })
}

/// Has `signal` interrupt system calls and do nothing else.
pub fn interrupt_by(signal: c_int) -> io::Result<()> {
    extern "C" fn nothing(_: c_int) {}
    // SAFETY: all-zero is a valid sigaction: no flags, no mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = nothing as extern "C" fn(c_int) as usize;
    // SAFETY: the handler does nothing; `action` outlives the call.
    check(unsafe { libc::sigaction(signal, &action, std::ptr::null_mut()) }.into()).map(drop)
}

/// Leaves the CPUs to others.
pub fn be_nice(nice: c_int) -> io::Result<()> {
    // SAFETY: takes integers only.
    check(unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice) }.into()).map(drop)
}

/// The parent's pid.
pub fn parent() -> u32 {
    // SAFETY: takes nothing.
    unsafe { libc::getppid() as u32 }
}

/// Puts `text` out in one piece, whoever else prints.
pub fn say(text: &str) {
    let mut rest = text.as_bytes();
    while !rest.is_empty() {
        // SAFETY: `rest` is as long as said.
        match check(unsafe { libc::write(1, rest.as_ptr().cast(), rest.len()) } as libc::c_long) {
            Ok(n) => rest = &rest[n..],
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}
