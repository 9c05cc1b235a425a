// SPDX-License-Identifier: GPL-2.0
//! The kernel's reports about which pages of this process were written.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use super::check;
use crate::page::PAGE;

const SOFT_DIRTY: u64 = 1 << 55;

// From the kernel's <linux/fs.h>.
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
const SCAN_PROTECT: u64 = 1;
const SCAN_CHECK_ASYNC: u64 = 2;
const IS_WRITTEN: u64 = 2;

/// Let all pages of this process count as not written.
pub fn clear_soft_dirty() -> io::Result<()> {
    fs::write("/proc/self/clear_refs", "4")
}

/// Return for each of `n` pages whether it was written since [`clear_soft_dirty`].
pub fn soft_dirty(addr: usize, n: usize) -> io::Result<Vec<bool>> {
    let mut raw = vec![0u8; n * 8];
    File::open("/proc/self/pagemap")?.read_exact_at(&mut raw, (addr / PAGE * 8) as u64)?;
    let words = raw.chunks_exact(8);
    Ok(words
        .map(|w| w.iter().rev().fold(0, |all, &b| (all << 8) | u64::from(b)) & SOFT_DIRTY != 0)
        .collect())
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

#[repr(C)]
#[derive(Default)]
struct Scan {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// Return which of `n` pages were written since they were protected. They are registered with a userfaultfd
/// in whose mode the kernel resolves writes. With `protect`, protect them again.
pub fn written(addr: usize, n: usize, protect: bool) -> io::Result<Vec<bool>> {
    let mut regions = vec![Region::default(); n];
    let mut scan = Scan {
        size: size_of::<Scan>() as u64,
        flags: SCAN_CHECK_ASYNC | if protect { SCAN_PROTECT } else { 0 },
        start: addr as u64,
        end: (addr + n * PAGE) as u64,
        vec: regions.as_mut_ptr() as u64,
        vec_len: n as u64,
        category_mask: IS_WRITTEN,
        return_mask: IS_WRITTEN,
        ..Scan::default()
    };
    let map = File::open("/proc/self/pagemap")?;
    // SAFETY: The request takes a `Scan`, which outlives the call. So does `regions`, to which it points with
    // its length.
    let count = check(unsafe { libc::ioctl(map.as_raw_fd(), PAGEMAP_SCAN, &mut scan) }.into())?;
    let mut all = vec![false; n];
    for region in regions.iter().take(count) {
        let first = (region.start as usize).saturating_sub(addr) / PAGE;
        let last = (region.end as usize).saturating_sub(addr) / PAGE;
        for page in all.iter_mut().take(last).skip(first) {
            *page = true;
        }
    }
    Ok(all)
}
