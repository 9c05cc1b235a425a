// SPDX-License-Identifier: GPL-2.0
//! Copy-on-write: no process sees another's write.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use anyhow::{ensure, Context, Result};

use super::{tests, ORDERS};
use crate::engine;
use crate::harness::{Module, Outcome, Suite, PASS};
use crate::pageflags::Span;
use crate::prng::Prng;
use crate::region::PAGE;
use crate::scan;
use crate::worker::{verify_all, Worker};

pub const SUITE: Suite = Suite {
    name: "cow",
    about: "only its writer sees a write to a merged page",
    module: Module::Loaded,
    tests: tests![
        ("every-order-of-writers", 100, every_order),
        (
            "every-order-of-writers-while-scanning",
            100,
            every_order_scanning
        ),
        ("reading-does-not-unmerge", 60, reading),
        ("writes-at-random-places", 60, random_places),
        ("write-through-proc-mem", 60, proc_mem),
        ("write-by-another-process", 60, vm_writev),
        ("read-system-call-into-a-merged-page", 60, read_syscall),
    ],
};

const N: usize = 16;

/// Start three workers that share N pages.
fn sharers() -> Result<Vec<Worker>> {
    let workers = (0..3)
        .map(|_| Worker::mergeable(N, 100))
        .collect::<Result<_>>()?;
    scan::until_merged(N as u64, 2 * N as u64)?;
    Ok(workers)
}

/// Let the sharers write one after the other, in every order. Verify every byte of all of them after each
/// write.
fn write_in_every_order(scanning: bool) -> Result<()> {
    for (round, order) in ORDERS.iter().enumerate() {
        // New workers each time: pages that are written again and again must stay unchanged for long before
        // they merge.
        let mut workers = sharers()?;
        if !scanning {
            scan::stop()?;
        }
        for &writer in order {
            let value = (round * 3 + writer) as u8;
            workers[writer].poke(0, N, 100 * round + writer, value)?;
            verify_all(&mut workers)?;
        }
        // Make all equal again, so that the next round has something to write to.
        for worker in &mut workers {
            worker.fill(0, N, 1000 * (round as u64 + 1), 1)?;
        }
        scan::until_merged(N as u64, 2 * N as u64)?;
        verify_all(&mut workers)?;
    }
    Ok(())
}

fn every_order() -> Outcome {
    write_in_every_order(false)?;
    PASS
}

fn every_order_scanning() -> Outcome {
    write_in_every_order(true)?;
    PASS
}

fn reading() -> Outcome {
    let mut workers = sharers()?;
    scan::stop()?;
    verify_all(&mut workers)?;
    for worker in &workers {
        ensure!(worker.merged()? == N);
    }
    let c = engine::counters()?;
    ensure!(c.shared == N as u64 && c.sharing == 2 * N as u64, "{c:?}");
    PASS
}

fn random_places() -> Outcome {
    let mut workers = sharers()?;
    let mut prng = Prng::new(4);
    for _ in 0..60 {
        let writer = prng.below(3);
        let (page, offset) = (prng.below(N), prng.below(PAGE));
        workers[writer].poke(page, 1, offset, prng.next_u64() as u8)?;
        verify_all(&mut workers)?;
    }
    PASS
}

/// Let `write` change one byte of each page of the first of three sharers, from outside. Check that the
/// others keep theirs.
fn foreign_write(write: impl Fn(Span, usize, u8) -> Result<()>) -> Outcome {
    const OFFSET: usize = 123;
    let mut workers = sharers()?;
    scan::stop()?;
    let span = workers[0].span();
    for page in 0..N {
        write(span, page * PAGE + OFFSET, page as u8)?;
        workers[0].note_poke(page, OFFSET, page as u8)?;
    }
    verify_all(&mut workers)?;
    ensure!(workers[0].merged()? == 0, "a written page is still merged");
    ensure!(workers[1].merged()? == N && workers[2].merged()? == N);
    scan::passes(3)?;
    verify_all(&mut workers)?;
    PASS
}

fn proc_mem() -> Outcome {
    foreign_write(|span, at, value| {
        let path = format!("/proc/{}/mem", span.pid);
        let file = File::options().write(true).open(&path).context(path)?;
        Ok(file.write_all_at(&[value], (span.addr + at) as u64)?)
    })
}

fn vm_writev() -> Outcome {
    foreign_write(|span, at, value| {
        let mut value = value;
        let local = libc::iovec {
            iov_base: (&raw mut value).cast(),
            iov_len: 1,
        };
        let remote = libc::iovec {
            iov_base: (span.addr + at) as *mut libc::c_void,
            iov_len: 1,
        };
        // SAFETY: `local` describes `value`, which outlives the call. `remote` is memory of another process.
        let n =
            unsafe { libc::process_vm_writev(span.pid as libc::pid_t, &local, 1, &remote, 1, 0) };
        ensure!(n == 1, "{}", std::io::Error::last_os_error());
        Ok(())
    })
}

fn read_syscall() -> Outcome {
    let mut keeper = Worker::mergeable(N, 100)?;
    let mut region = crate::region::Region::new(N)?;
    region.fill(0, N, 100, 1);
    region.advise(0, N, libc::MADV_MERGEABLE)?;
    scan::until_merged(N as u64, N as u64)?;
    scan::stop()?;
    let (output, input) = crate::sys::pipe()?;
    let mut input = File::from(input);
    for page in 0..N {
        let value = page as u8;
        input.write_all(&[value])?;
        // SAFETY: The byte lies in the region, and no reference into it exists.
        let n = unsafe {
            libc::read(
                output.as_raw_fd(),
                (region.at(page) + 9) as *mut libc::c_void,
                1,
            )
        };
        ensure!(n == 1, "{}", std::io::Error::last_os_error());
        region.note_poke(page, 9, value);
    }
    region.verify()?;
    keeper.verify()?;
    ensure!(keeper.merged()? == N);
    PASS
}
