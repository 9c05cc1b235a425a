// SPDX-License-Identifier: GPL-2.0
//! Write tracking: no written page may be reported as clean.

use std::io;
use std::time::Duration;

use anyhow::Result;
use rksm_test_lib::engine::wait_for;
use rksm_test_lib::proc;

use crate::page::{Desc, PAGE};
use crate::plan::{Op, Step};
use crate::raw::pagemap;
use crate::raw::uffd::Uffd;
use crate::raw::Mem;
use crate::worker::{Act, Stop, Worker};

/// Write every third page, with new or common content, and give the engine time to merge them.
fn write_some(worker: &mut Worker, step: &Step, slot: usize, i: usize, n: usize) -> Act {
    for k in (i..i + n).step_by(3) {
        let (place, version) = worker.place(slot, k);
        let desc = match (step.arg >> 4) % 4 {
            0 => Desc::own(5, place, version),
            1 => Desc::ZERO,
            _ => Desc::class((step.arg >> 8) as u8, 0),
        };
        worker.put(slot, k, desc, step.op)?;
    }
    std::thread::sleep(Duration::from_millis(u64::from((step.arg >> 16) & 63)));
    Ok(())
}

fn check(dirty: &[bool], slot: usize, i: usize) -> Act {
    match (0..dirty.len()).step_by(3).find(|&k| !dirty[k]) {
        None => Ok(()),
        Some(k) => Err(Stop::Fault(format!(
            "page {slot}:{} was written to, and the kernel does not know: {dirty:?}",
            i + k
        ))),
    }
}

/// Return how many pages the kernel has tried to move, and how many huge pages to split.
fn moves() -> Result<i64> {
    proc::vmstat_sum(&[
        "pgmigrate_success",
        "pgmigrate_fail",
        "thp_split_page",
        "thp_split_page_failed",
    ])
}

/// Return whether pages moved since the count was `before`. The kernel counts the moves of a migration when
/// it ends.
fn has_moved_since(before: i64) -> bool {
    let moved = || Ok(moves()? != before);
    wait_for("pages that are moved", Duration::from_secs(2), moved).is_ok()
}

/// Track writes by soft-dirty bits. The kernel itself loses writes to a page that it moves while `clear_refs`
/// is written, even without KSM. The migration entry loses its soft-dirty bit, but stays writable
/// (`clear_soft_dirty()` in fs/proc/task_mmu.c). So a move makes the result useless.
fn soft_dirty(worker: &mut Worker, step: &Step) -> Act {
    let (slot, i, n) = worker.range(step)?;
    let before = moves()?;
    pagemap::clear_soft_dirty()?;
    write_some(worker, step, slot, i, n)?;
    let addr = worker.mem(slot)?.addr() + i * PAGE;
    let dirty = pagemap::soft_dirty(addr, n)?;
    if let Err(fault) = check(&dirty, slot, i) {
        return Err(if has_moved_since(before) {
            Stop::Refused(libc::ESTALE)
        } else {
            fault
        });
    }
    worker.verify(slot, i, n)
}

fn scan(worker: &mut Worker, step: &Step) -> Act {
    let (slot, i, n) = worker.range(step)?;
    let addr = worker.mem(slot)?.addr() + i * PAGE;
    let uffd = Uffd::new(true)?;
    uffd.register(addr, n * PAGE)?;
    pagemap::written(addr, n, true)?;
    worker.verify(slot, i, n)?;
    write_some(worker, step, slot, i, n)?;
    let dirty = pagemap::written(addr, n, step.arg % 2 == 0)?;
    check(&dirty, slot, i)?;
    drop(uffd);
    worker.verify(slot, i, n)
}

pub fn act(worker: &mut Worker, step: &Step) -> Act {
    match step.op {
        Op::SoftDirty => soft_dirty(worker, step),
        _ => scan(worker, step),
    }
}

/// Return why the kernel cannot tell which pages were written.
pub fn no_soft_dirty() -> Option<&'static str> {
    let tell = || -> io::Result<[bool; 2]> {
        let mut mem = Mem::new(1)?;
        mem.poke(0, 0, &[1]);
        pagemap::clear_soft_dirty()?;
        let before = pagemap::soft_dirty(mem.addr(), 1)?[0];
        mem.poke(0, 0, &[2]);
        Ok([before, pagemap::soft_dirty(mem.addr(), 1)?[0]])
    };
    match tell() {
        Ok([false, true]) => None,
        _ => Some("the kernel does not track writes"),
    }
}
