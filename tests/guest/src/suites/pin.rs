// SPDX-License-Identifier: GPL-2.0
//! Pages with references by others, such as DMA: they must not merge meanwhile.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use anyhow::{ensure, Context, Result};
use io_uring::{opcode, types, IoUring};

use super::tests;
use crate::disk::Disk;
use crate::engine;
use crate::harness::{skip, Module, Outcome, Suite, PASS};
use crate::pageflags::merged;
use crate::region::{Region, PAGE};
use crate::scan;
use crate::timeout::scaled;
use crate::worker::Worker;

pub const SUITE: Suite = Suite {
    name: "pin",
    about: "pages under O_DIRECT, registered buffers and in pipes are left alone until free",
    module: Module::Loaded,
    tests: tests![
        ("o-direct-read-in-flight", 90, o_direct),
        ("io-uring-registered-buffer", 90, registered_buffer),
        ("page-in-a-pipe", 90, vmspliced),
    ],
};

const N: usize = 8;
/// How many passes to watch pinned pages for.
const PASSES: u64 = 6;

/// Scan for several passes. Check after each that no page of `region`, which is pinned, is merged.
fn expect_left_alone(region: &Region) -> Result<()> {
    for _ in 0..PASSES {
        scan::passes(1)?;
        let n = merged(region.span())?;
        ensure!(n == 0, "{n} pages were merged while held");
    }
    Ok(())
}

/// Scan until `n` pages of `region`, which are no longer pinned, are merged.
fn expect_merge(region: &Region, n: usize) -> Result<()> {
    scan::until(
        "merge after release",
        12,
        || Ok(merged(region.span())? == n),
    )?;
    region.verify()
}

/// `struct iocb` and `struct io_event` of the kernel's <linux/aio_abi.h>.
#[repr(C)]
#[derive(Default)]
struct Iocb {
    data: u64,
    key: u32,
    rw_flags: u32,
    opcode: u16,
    priority: i16,
    fd: u32,
    buf: u64,
    len: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    result_fd: u32,
}

#[repr(C)]
#[derive(Default)]
struct IoEvent {
    data: u64,
    obj: u64,
    res: i64,
    res2: i64,
}

/// An asynchronous read by the kernel's own AIO. Opcode 0 is a read.
struct AsyncRead {
    context: libc::c_ulong,
}

impl AsyncRead {
    fn submit(fd: RawFd, addr: usize, len: usize) -> Result<Self> {
        let mut context: libc::c_ulong = 0;
        // SAFETY: `context` outlives the call.
        let ret = unsafe { libc::syscall(libc::SYS_io_setup, 1, &raw mut context) };
        ensure!(ret == 0, "io_setup: {}", std::io::Error::last_os_error());
        let mut iocb = Iocb {
            fd: fd as u32,
            buf: addr as u64,
            len: len as u64,
            ..Iocb::default()
        };
        let mut list = [&raw mut iocb];
        // SAFETY: The kernel copies the request. The buffer is a mapping that stays until the read is done.
        let ret = unsafe { libc::syscall(libc::SYS_io_submit, context, 1, list.as_mut_ptr()) };
        ensure!(ret == 1, "io_submit: {}", std::io::Error::last_os_error());
        Ok(Self { context })
    }

    /// Return the number of bytes read; `None` if the read takes longer than `limit`.
    fn result(&self, limit: Duration) -> Result<Option<i64>> {
        let mut event = IoEvent::default();
        let limit = libc::timespec {
            tv_sec: limit.as_secs() as libc::time_t,
            tv_nsec: 0,
        };
        // SAFETY: `event` has room for one event, and both arguments outlive the call.
        let n = unsafe {
            libc::syscall(
                libc::SYS_io_getevents,
                self.context,
                1,
                1,
                &raw mut event,
                &raw const limit,
            )
        };
        ensure!(n >= 0, "io_getevents: {}", std::io::Error::last_os_error());
        Ok((n == 1).then_some(event.res))
    }
}

impl Drop for AsyncRead {
    fn drop(&mut self) {
        // SAFETY: The context is ours. The call waits for a read in flight.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.context) };
    }
}

fn o_direct() -> Outcome {
    let Some(disk) = Disk::new(2)? else {
        return skip("no null_blk driver");
    };
    let file = disk.open()?;
    // The disk returns zeroes, which the partner holds already.
    let mut partner = Worker::with_pages(N)?;
    partner.fill(0, N, 0, 0)?;
    partner.advise(0, N, libc::MADV_MERGEABLE)?;
    let mut region = Region::new(N)?;
    region.advise(0, N, libc::MADV_MERGEABLE)?;
    // On a busy machine the read may end before the scan; then retry.
    for _ in 0..5 {
        region.fill(0, N, 100, 1);
        scan::passes(2)?;
        let read = AsyncRead::submit(file.as_raw_fd(), region.addr(), N * PAGE)?;
        let conclusive = left_alone_during(&read, &region)?;
        (0..N).for_each(|i| region.note_fill(i, 0));
        region.verify()?;
        if conclusive {
            expect_merge(&region, N)?;
            partner.verify()?;
            return PASS;
        }
    }
    anyhow::bail!("no read lasted for {PASSES} passes")
}

/// Scan while `read` into `region` is in flight, then wait for its end. Return false if it ended too early to
/// tell.
fn left_alone_during(read: &AsyncRead, region: &Region) -> Result<bool> {
    let mut result = None;
    for _ in 0..PASSES {
        scan::passes(1)?;
        let n = merged(region.span())?;
        result = read.result(Duration::ZERO)?;
        if result.is_some() {
            break;
        }
        ensure!(n == 0, "{n} pages were merged with a read in flight");
    }
    let conclusive = result.is_none();
    if conclusive {
        result = read.result(scaled(Duration::from_secs(20)))?;
    }
    ensure!(
        result == Some((N * PAGE) as i64),
        "the read gave {result:?}"
    );
    Ok(conclusive)
}

fn registered_buffer() -> Outcome {
    let mut partner = Worker::mergeable(N, 100)?;
    let mut region = Region::new(N)?;
    region.fill(0, N, 100, 1);
    let mut ring = match IoUring::new(4) {
        Ok(ring) => ring,
        Err(e) => return skip(format!("no io_uring: {e}")),
    };
    region.register(&ring)?;
    region.advise(0, N, libc::MADV_MERGEABLE)?;

    // A read into the pinned page 3 waits for data during the scan. It writes to the frame that it pinned,
    // merged or not.
    let (output, input) = crate::sys::pipe()?;
    let place = (region.at(3) + 100) as *mut u8;
    let read = opcode::ReadFixed::new(types::Fd(output.as_raw_fd()), place, 4, 0).build();
    // SAFETY: The buffer is registered, and stays until the read is done.
    unsafe { ring.submission().push(&read) }.context("push")?;
    ring.submit().context("submit")?;
    expect_left_alone(&region)?;
    region.verify()?;
    File::from(input).write_all(&[1, 2, 3, 4])?;
    ring.submit_and_wait(1).context("wait")?;
    let got = ring.completion().next().context("completion")?.result();
    ensure!(got == 4, "the read gave {got}");
    for i in 0..4 {
        region.note_poke(3, 100 + i, i as u8 + 1);
    }
    region.verify()?;

    ring.submitter().unregister_buffers()?;
    drop(ring);
    // All but the page that was written.
    expect_merge(&region, N - 1)?;
    partner.verify()?;
    PASS
}

fn vmspliced() -> Outcome {
    let mut partner = Worker::mergeable(N, 100)?;
    let mut region = Region::new(N)?;
    region.fill(0, N, 100, 1);
    let (output, input) = crate::sys::pipe()?;
    region.splice(N, &input)?;
    region.advise(0, N, libc::MADV_MERGEABLE)?;
    expect_left_alone(&region)?;

    // The pipe holds the same content as the pages. Reading it drops its references.
    let mut have = vec![0u8; N * PAGE];
    File::from(output).read_exact(&mut have)?;
    let mut want = [0u8; PAGE];
    for (i, page) in have.chunks_exact(PAGE).enumerate() {
        crate::prng::fill(100 + i as u64, &mut want);
        ensure!(page == want, "page {i} in the pipe differs");
    }
    expect_merge(&region, N)?;
    partner.verify()?;
    let c = engine::counters()?;
    ensure!(c.shared == N as u64 && c.sharing == N as u64, "{c:?}");
    PASS
}
