// SPDX-License-Identifier: GPL-2.0
//! Changes to the address space under merged pages.

use anyhow::{ensure, Result};

use super::tests;
use crate::harness::{Module, Outcome, Suite, PASS};
use crate::scan;
use crate::worker::{verify_all, Worker};

pub const SUITE: Suite = Suite {
    name: "vmops",
    about: "munmap, mremap, mprotect and MADV_DONTNEED on merged pages",
    module: Module::Loaded,
    tests: tests![
        ("munmap-a-part", 60, munmap_part),
        ("mremap-moves-the-content", 60, mremap),
        ("mremap-while-scanning", 60, mremap_scanning),
        ("mprotect-none-and-back", 60, mprotect_none),
        ("mprotect-read-then-write", 60, mprotect_read),
        ("read-only-pages-merge", 60, read_only),
        ("madv-dontneed", 60, dontneed),
        ("madv-dontneed-then-fill-again", 60, dontneed_fill),
    ],
};

const N: usize = 24;
const RW: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;

fn pair() -> Result<[Worker; 2]> {
    let workers = [Worker::mergeable(N, 100)?, Worker::mergeable(N, 100)?];
    scan::until_merged(N as u64, N as u64)?;
    Ok(workers)
}

fn munmap_part() -> Outcome {
    let mut workers = pair()?;
    workers[0].truncate(N / 3)?;
    verify_all(&mut workers)?;
    // Pages that only one worker has left are still merged pages.
    scan::until_merged(N as u64, N as u64 / 3)?;
    verify_all(&mut workers)?;
    workers[1].truncate(N / 3)?;
    scan::until_merged(N as u64 / 3, N as u64 / 3)?;
    verify_all(&mut workers)?;
    PASS
}

fn mremap() -> Outcome {
    let mut workers = pair()?;
    scan::stop()?;
    workers[0].relocate()?;
    verify_all(&mut workers)?;
    // The kernel unmerges the pages that it moves.
    ensure!(workers[0].merged()? == 0 && workers[1].merged()? == N);
    scan::until_merged(N as u64, N as u64)?;
    ensure!(workers[0].merged()? == N, "not merged at the new address");
    verify_all(&mut workers)?;
    PASS
}

fn mremap_scanning() -> Outcome {
    let mut workers = pair()?;
    for _ in 0..20 {
        workers[0].relocate()?;
        verify_all(&mut workers)?;
    }
    scan::until_merged(N as u64, N as u64)?;
    verify_all(&mut workers)?;
    PASS
}

fn mprotect_none() -> Outcome {
    let mut workers = pair()?;
    workers[0].protect(0, N, libc::PROT_NONE)?;
    scan::passes(3)?;
    workers[1].verify()?;
    workers[0].protect(0, N, RW)?;
    verify_all(&mut workers)?;
    workers[0].poke(0, N, 3, 3)?;
    verify_all(&mut workers)?;
    PASS
}

fn mprotect_read() -> Outcome {
    let mut workers = pair()?;
    workers[0].protect(0, N, libc::PROT_READ)?;
    verify_all(&mut workers)?;
    ensure!(workers[0].merged()? == N, "mprotect split the pages");
    // Becoming writable again must not let a write reach the shared page.
    workers[0].protect(0, N, RW)?;
    workers[0].poke(0, N, 3, 3)?;
    verify_all(&mut workers)?;
    ensure!(workers[1].merged()? == N);
    PASS
}

fn read_only() -> Outcome {
    let mut workers = [Worker::with_pages(N)?, Worker::with_pages(N)?];
    for worker in &mut workers {
        worker.fill(0, N, 100, 1)?;
        worker.protect(0, N, libc::PROT_READ)?;
        worker.advise(0, N, libc::MADV_MERGEABLE)?;
    }
    scan::until_merged(N as u64, N as u64)?;
    verify_all(&mut workers)?;
    for worker in &mut workers {
        worker.protect(0, N, RW)?;
    }
    workers[1].poke(0, N, 3, 3)?;
    verify_all(&mut workers)?;
    PASS
}

fn dontneed() -> Outcome {
    let mut workers = pair()?;
    workers[0].dontneed(0, N / 2)?;
    verify_all(&mut workers)?;
    ensure!(workers[1].merged()? == N);
    // Reading mapped the kernel's zero page, which never merges.
    ensure!(workers[0].merged()? == N / 2);
    scan::until_merged(N as u64, N as u64 / 2)?;
    verify_all(&mut workers)?;
    PASS
}

fn dontneed_fill() -> Outcome {
    let mut workers = pair()?;
    for _ in 0..5 {
        workers[0].dontneed(0, N)?;
        workers[0].fill(0, N, 100, 1)?;
        verify_all(&mut workers)?;
    }
    scan::until_merged(N as u64, N as u64)?;
    verify_all(&mut workers)?;
    PASS
}
