// SPDX-License-Identifier: GPL-2.0
//! Pages that are protected from all access, including the kernel's when it unmerges them.

use std::path::Path;
use std::time::Duration;

use rand::Rng;
use rksm_test_lib::engine::{write_to, RKSM};

use crate::arena::SLOTS;
use crate::page::{mix, PAGE};
use crate::plan::{Op, Step, Who};
use crate::raw::uffd::NoAccess;
use crate::worker::{Act, Stop, Worker};

/// Protect pages, and meanwhile unmerge them, page them out or leave them alone.
pub fn rwp(worker: &mut Worker, step: &Step) -> Act {
    let (slot, i, n) = worker.range(step)?;
    let n = n.min(64);
    worker.verify(slot, i, n)?;
    let addr = worker.mem(slot)?.addr() + i * PAGE;
    let held = NoAccess::new(addr, n * PAGE, step.arg % 4 == 0)?;
    match (step.arg >> 2) % 16 {
        0 => run_two(worker),
        1..5 => unmerge(worker, step, slot, i, n),
        5..8 => {
            let paged = worker.mem(slot)?.advise(i, n, libc::MADV_PAGEOUT);
            // Locked pages cannot be paged out.
            drop(paged);
        }
        _ => {}
    }
    std::thread::sleep(Duration::from_millis(u64::from((step.arg >> 8) & 31)));
    drop(held);
    worker.verify(slot, i, n)
}

/// Try to unmerge. The kernel may refuse, or silently unmerge only some pages or none.
fn unmerge(worker: &Worker, step: &Step, slot: usize, i: usize, n: usize) {
    let Some(mem) = &worker.slots[slot] else {
        return;
    };
    let (i, n) = if step.arg >> 31 == 0 {
        (i, n)
    } else {
        (0, mem.pages())
    };
    let errno = match mem.advise(i, n, libc::MADV_UNMERGEABLE) {
        Ok(()) => 0,
        Err(e) => e.raw_os_error().unwrap_or(libc::EIO),
    };
    worker.arena.count(Op::Unmergeable, errno);
}

/// Ask for everything to be unmerged, which cannot succeed, then let merging continue.
fn run_two(worker: &Worker) {
    if !worker.arena.may(Op::Run2) {
        return;
    }
    let errno = match write_to(Path::new(RKSM), "run", b"2") {
        Ok(()) => 0,
        Err(e) => e.raw_os_error().unwrap_or(libc::EIO),
    };
    worker.arena.count(Op::Run2, errno);
    // The module may be unloaded at the moment.
    let _ = write_to(Path::new(RKSM), "run", b"1");
}

/// Protect some pages while all processes stand still; the seed says which. The caller must touch none of its
/// pages until it drops the result.
pub fn hold(worker: &Worker, number: u32) -> Result<Option<NoAccess>, Stop> {
    let mut rng = Who {
        seed: mix(worker.who.seed ^ u64::from(number)),
        ..worker.who
    }
    .rng();
    let (slot, at, len) = (
        rng.random_range(0..SLOTS),
        rng.random::<u16>(),
        rng.random_range(1..=128),
    );
    let (wanted, by_itself, arg) = (
        rng.random_range(0..4) != 0,
        rng.random_range(0..4) == 0,
        rng.random::<u32>(),
    );
    let there = worker.arena.has_rwp() && worker.arena.may(Op::Rwp);
    if !wanted || !there || worker.pages(slot) == 0 {
        return Ok(None);
    }
    let (slot, i, n) = worker.range_of(slot, at, len)?;
    let Some(mem) = &worker.slots[slot] else {
        return Ok(None);
    };
    let held = match NoAccess::new(mem.addr() + i * PAGE, n * PAGE, by_itself) {
        Ok(held) => held,
        Err(e) => {
            let errno = e.raw_os_error().unwrap_or(libc::EIO);
            worker.arena.count(Op::Rwp, errno);
            return Ok(None);
        }
    };
    worker.arena.count(Op::Rwp, 0);
    if arg % 3 == 0 {
        let step = Step {
            op: Op::Rwp,
            slot: slot as u8,
            other: 0,
            at,
            len,
            arg,
        };
        unmerge(worker, &step, slot, i, n);
    }
    Ok(Some(held))
}
