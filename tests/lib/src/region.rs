// SPDX-License-Identifier: GPL-2.0
//! Anonymous memory with known content, byte for byte.

use std::io;
use std::os::fd::AsRawFd;

use anyhow::{bail, ensure, Context, Result};
use io_uring::IoUring;

use crate::pageflags::Span;
use crate::prng;

pub const PAGE: usize = 4096;
pub const HUGE: usize = 2 << 20;

/// The expected content of a page: that of a seed, and single bytes written since.
#[derive(Clone, Default)]
struct Content {
    seed: u64,
    pokes: Vec<(usize, u8)>,
}

impl Content {
    fn render(&self, page: &mut [u8]) {
        prng::fill(self.seed, page);
        for &(offset, value) in &self.pokes {
            page[offset] = value;
        }
    }
}

/// A private mapping between two inaccessible pages, so that the kernel never merges it with a neighbouring
/// VMA.
///
/// A forked child finds a `Region` of its parent at the same address, with the same record of its content.
pub struct Region {
    addr: usize,
    content: Vec<Content>,
}

fn mmap(len: usize, prot: libc::c_int) -> Result<usize> {
    // SAFETY: This is a new anonymous mapping at an address that the kernel chooses.
    let addr = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            len,
            prot,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if addr == libc::MAP_FAILED {
        return Err(io::Error::last_os_error()).context("mmap");
    }
    Ok(addr as usize)
}

/// The offset of the word in page `i` that [`Region::poke_scattered`] writes. It differs from page to page.
fn scattered(i: usize) -> usize {
    (i * 37 + 11) % 511 * 8
}

fn check(what: &str, ret: libc::c_int) -> Result<()> {
    if ret != 0 {
        return Err(io::Error::last_os_error()).context(what.to_string());
    }
    Ok(())
}

impl Region {
    /// Map `pages` pages, readable and writable, not yet populated.
    pub fn new(pages: usize) -> Result<Self> {
        Self::aligned(pages, PAGE)
    }

    /// Map pages as `new` does, starting at a multiple of `align`.
    pub fn aligned(pages: usize, align: usize) -> Result<Self> {
        let hole = mmap(pages * PAGE + align + PAGE, libc::PROT_NONE)?;
        let addr = (hole + PAGE).next_multiple_of(align);
        let region = Self {
            addr,
            content: vec![Content::default(); pages],
        };
        region.protect(0, pages, libc::PROT_READ | libc::PROT_WRITE)?;
        Ok(region)
    }

    /// Take over an existing mapping. `verify` expects zeroes in its recorded bytes until they are filled.
    pub fn adopt(addr: usize, pages: usize) -> Self {
        Self {
            addr,
            content: vec![Content::default(); pages],
        }
    }

    pub fn addr(&self) -> usize {
        self.addr
    }

    /// The span of the region in this process.
    pub fn span(&self) -> Span {
        Span {
            pid: std::process::id(),
            addr: self.addr,
            pages: self.pages(),
        }
    }

    pub fn pages(&self) -> usize {
        self.content.len()
    }

    /// The address of page `i`.
    pub fn at(&self, i: usize) -> usize {
        assert!(i <= self.pages(), "page {i} of {}", self.pages());
        self.addr + i * PAGE
    }

    fn ptr(&self, i: usize, n: usize) -> *mut libc::c_void {
        assert!(i + n <= self.pages(), "pages {i}+{n} of {}", self.pages());
        self.at(i) as *mut libc::c_void
    }

    /// Fill pages `i..i + n`: page `i + k` gets the content of `seed + k * step`.
    pub fn fill(&mut self, i: usize, n: usize, seed: u64, step: u64) {
        for k in 0..n {
            let content = Content {
                seed: seed + k as u64 * step,
                pokes: Vec::new(),
            };
            let mut page = [0u8; PAGE];
            content.render(&mut page);
            // SAFETY: The page lies in our own mapping, and no reference into it exists.
            unsafe {
                std::ptr::copy_nonoverlapping(page.as_ptr(), self.ptr(i + k, 1).cast(), PAGE);
            }
            self.content[i + k] = content;
        }
    }

    /// Write one byte of page `i`.
    pub fn poke(&mut self, i: usize, offset: usize, value: u8) {
        assert!(offset < PAGE);
        // SAFETY: The byte lies in our own mapping, and no reference into it exists.
        unsafe { (self.at(i) as *mut u8).add(offset).write_volatile(value) };
        self.note_poke(i, offset, value);
    }

    /// Write one byte of each page, at an offset that differs from page to page.
    pub fn poke_scattered(&mut self, value: u8) {
        for i in 0..self.pages() {
            self.poke(i, scattered(i), value);
        }
    }

    /// Increment the word of each page that [`Self::poke_scattered`] writes. After that the content is no
    /// longer known.
    pub fn bump_scattered(&mut self) {
        for i in 0..self.pages() {
            let word = (self.at(i) + scattered(i)) as *mut u64;
            // SAFETY: The word lies in our own mapping and is aligned, and no reference into it exists.
            unsafe { word.write_volatile(word.read_volatile().wrapping_add(1)) };
        }
    }

    /// Record that another process wrote a byte of page `i`.
    pub fn note_poke(&mut self, i: usize, offset: usize, value: u8) {
        let pokes = &mut self.content[i].pokes;
        pokes.retain(|&(other, _)| other != offset);
        pokes.push((offset, value));
    }

    /// Record that another process filled page `i`.
    pub fn note_fill(&mut self, i: usize, seed: u64) {
        self.content[i] = Content {
            seed,
            pokes: Vec::new(),
        };
    }

    /// Splice the first `n` pages into a pipe. It holds references to them until they are read or it is
    /// closed.
    pub fn splice(&self, n: usize, pipe: &impl AsRawFd) -> Result<()> {
        let range = libc::iovec {
            iov_base: self.addr() as *mut libc::c_void,
            iov_len: n * PAGE,
        };
        // SAFETY: The range is our own mapping; the kernel only takes references.
        let bytes = unsafe { libc::vmsplice(pipe.as_raw_fd(), &range, 1, 0) };
        ensure!(bytes == (n * PAGE) as isize, "vmsplice gave {bytes}");
        Ok(())
    }

    /// Compare every byte of pages `i..i + n` with the expected content.
    pub fn verify_range(&self, i: usize, n: usize) -> Result<()> {
        let (mut want, mut have) = ([0u8; PAGE], [0u8; PAGE]);
        for k in i..i + n {
            self.content[k].render(&mut want);
            // SAFETY: The page lies in our own mapping and is readable.
            unsafe {
                std::ptr::copy_nonoverlapping(self.ptr(k, 1).cast(), have.as_mut_ptr(), PAGE);
            }
            if let Some(at) = (0..PAGE).find(|&at| want[at] != have[at]) {
                bail!(
                    "page {k} byte {at}: {:#04x}, expected {:#04x} (seed {}, pid {})",
                    have[at],
                    want[at],
                    self.content[k].seed,
                    std::process::id()
                );
            }
        }
        Ok(())
    }

    pub fn verify(&self) -> Result<()> {
        self.verify_range(0, self.pages())
    }

    pub fn advise(&self, i: usize, n: usize, advice: libc::c_int) -> Result<()> {
        // SAFETY: The range lies in our own mapping. Of the advice that changes content, only MADV_DONTNEED
        // is used, through `dontneed`.
        let ret = unsafe { libc::madvise(self.ptr(i, n), n * PAGE, advice) };
        check(&format!("madvise({advice})"), ret)
    }

    /// Pin all pages, as the one registered buffer of `ring`.
    pub fn register(&self, ring: &IoUring) -> Result<()> {
        let all = libc::iovec {
            iov_base: self.ptr(0, self.pages()).cast(),
            iov_len: self.pages() * PAGE,
        };
        // SAFETY: The kernel takes references to the pages. It writes to them only in a read that the caller
        // submits to the ring.
        unsafe { ring.submitter().register_buffers(&[all]) }.context("register_buffers")
    }

    /// Drop pages `i..i + n`. They read as zeroes from now on.
    pub fn dontneed(&mut self, i: usize, n: usize) -> Result<()> {
        self.advise(i, n, libc::MADV_DONTNEED)?;
        self.content[i..i + n].fill(Content::default());
        Ok(())
    }

    pub fn protect(&self, i: usize, n: usize, prot: libc::c_int) -> Result<()> {
        // SAFETY: The range lies in our own mapping, and no reference into it exists.
        check("mprotect", unsafe {
            libc::mprotect(self.ptr(i, n), n * PAGE, prot)
        })
    }

    /// Move the whole region to another address.
    pub fn relocate(&mut self) -> Result<()> {
        let pages = self.pages();
        let target = mmap((pages + 2) * PAGE, libc::PROT_NONE)? + PAGE;
        // SAFETY: The source is our own mapping; the target is a hole that we just made.
        let moved = unsafe {
            libc::mremap(
                self.ptr(0, pages),
                pages * PAGE,
                pages * PAGE,
                libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED,
                target as *mut libc::c_void,
            )
        };
        if moved == libc::MAP_FAILED {
            return Err(io::Error::last_os_error()).context("mremap");
        }
        self.addr = moved as usize;
        Ok(())
    }

    /// Unmap all but the first `keep` pages.
    pub fn truncate(&mut self, keep: usize) -> Result<()> {
        let n = self.pages() - keep;
        // SAFETY: The range lies in our own mapping and is forgotten below.
        check("munmap", unsafe {
            libc::munmap(self.ptr(keep, n), n * PAGE)
        })?;
        self.content.truncate(keep);
        Ok(())
    }

    /// Unmap all pages. A region that is only dropped stays mapped until the process exits.
    pub fn unmap(mut self) -> Result<()> {
        self.truncate(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_filled_verifies_and_a_foreign_write_does_not() {
        let mut region = Region::new(4).unwrap();
        region.fill(0, 4, 5, 1);
        region.poke(2, 17, 9);
        region.verify().unwrap();
        // SAFETY: The byte lies in the region, and no reference into it exists.
        unsafe { (region.at(3) as *mut u8).write_volatile(0) };
        let error = region.verify().unwrap_err().to_string();
        assert!(error.starts_with("page 3 byte 0"), "{error}");
    }

    #[test]
    fn dropped_pages_read_as_zeroes_and_moved_ones_keep_their_content() {
        let mut region = Region::aligned(4, HUGE).unwrap();
        assert_eq!(region.addr() % HUGE, 0);
        region.fill(0, 4, 5, 1);
        region.dontneed(1, 2).unwrap();
        region.relocate().unwrap();
        region.verify().unwrap();
        region.truncate(1).unwrap();
        assert_eq!(region.pages(), 1);
        region.verify().unwrap();
    }
}
