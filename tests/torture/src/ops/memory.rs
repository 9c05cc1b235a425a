// SPDX-License-Identifier: GPL-2.0
//! Writes, mappings, moves and advice.

use std::time::Duration;

use crate::arena::{PAGES, SLOTS};
use crate::page::{Desc, CLASSES, HEADER, WORDS};
use crate::plan::{Op, Step};
use crate::raw::Mem;
use crate::worker::{Act, Stop, Worker};

/// The number of pages in a huge page.
const HUGE: usize = 512;

pub fn does(op: Op) -> bool {
    use Op::*;
    matches!(
        op,
        Map | Unmap
            | Write
            | Own
            | Stamp
            | Verify
            | Mergeable
            | Unmergeable
            | Grow
            | Shrink
            | Move
            | MoveOver
            | Protect
            | NoAccess
            | DontNeed
            | Free
            | PageOut
            | Huge
            | NoHuge
            | Collapse
            | Mlock
            | Munlock
    )
}

pub fn act(worker: &mut Worker, step: &Step) -> Act {
    if step.op == Op::Map {
        return map(worker, usize::from(step.slot) % SLOTS, step.arg);
    }
    let (slot, i, n) = worker.range(step)?;
    match step.op {
        Op::Unmap => return unmap(worker, step, slot, i, n),
        Op::Write => write(worker, step, slot, i, n)?,
        Op::Own => own(worker, step, slot, i, n)?,
        Op::Stamp => stamp(worker, slot, i, n)?,
        Op::Verify => {}
        Op::Mergeable => advise_much(worker, step, libc::MADV_MERGEABLE)?,
        Op::Unmergeable => advise_much(worker, step, libc::MADV_UNMERGEABLE)?,
        Op::Huge => advise_much(worker, step, libc::MADV_HUGEPAGE)?,
        Op::NoHuge => advise_much(worker, step, libc::MADV_NOHUGEPAGE)?,
        Op::Collapse => collapse(worker, step)?,
        Op::PageOut => worker.mem(slot)?.advise(i, n, libc::MADV_PAGEOUT)?,
        Op::Grow | Op::Shrink => return resize(worker, step, slot),
        Op::Move => return relocate(worker, slot),
        Op::MoveOver => return move_over(worker, step),
        Op::Protect => return protect(worker, slot, i, n),
        Op::NoAccess => return no_access(worker, step, slot, i, n),
        Op::DontNeed => drop_pages(worker, step, slot, i, n, libc::MADV_DONTNEED)?,
        Op::Free => drop_pages(worker, step, slot, i, n, libc::MADV_FREE)?,
        Op::Mlock => worker.mem(slot)?.lock(i, n)?,
        Op::Munlock => worker.mem(slot)?.unlock(i, n)?,
        _ => {}
    }
    worker.verify(slot, i, n)
}

/// Map a slot again: 8 to 512 pages, or enough for huge pages.
pub fn map(worker: &mut Worker, slot: usize, arg: u32) -> Act {
    worker.verify(slot, 0, worker.pages(slot))?;
    worker.slots[slot] = None;
    let size = (arg >> 8) as usize;
    let mem = match arg % 16 {
        0..2 => Mem::aligned(HUGE + size % (PAGES - HUGE)),
        2..5 => Mem::new(8 + size % (HUGE - 8)),
        _ => Mem::new(8 + size % 88),
    }?;
    if (arg >> 4) & 7 != 0 {
        mem.advise(0, mem.pages(), libc::MADV_MERGEABLE)?;
    }
    for k in 0..PAGES {
        worker.entry(slot, k).forget();
    }
    let pages = mem.pages();
    worker.slots[slot] = Some(mem);
    worker.set_zero(slot, 0, pages, Op::Map);
    // Fill a good part of it at once, as little merges in empty memory.
    for k in 0..pages {
        if (k as u32).wrapping_mul(0x9e37_79b1) >> 28 > (arg >> 16) & 7 {
            worker.put(slot, k, class(arg.wrapping_add(k as u32)), Op::Map)?;
        }
    }
    Ok(())
}

/// Return one of few contents, so that most pages have an equal somewhere.
fn class(arg: u32) -> Desc {
    Desc::class((arg % CLASSES as u32) as u8, arg / 64 % 2)
}

fn unmap(worker: &mut Worker, step: &Step, slot: usize, i: usize, n: usize) -> Act {
    if step.arg % 8 == 0 {
        worker.verify(slot, 0, worker.pages(slot))?;
        worker.slots[slot] = None;
        return Ok(());
    }
    worker.mem(slot)?.refresh(i, n)?;
    worker.set_zero(slot, i, n, step.op);
    worker.verify(slot, i, n)
}

fn write(worker: &mut Worker, step: &Step, slot: usize, i: usize, n: usize) -> Act {
    for k in i..i + n {
        // One content for all pages, one for each, or zeroes.
        let desc = match step.arg >> 28 {
            0 => Desc::ZERO,
            1..8 => class(step.arg),
            _ => class(step.arg.wrapping_add(k as u32)),
        };
        worker.put(slot, k, desc, step.op)?;
    }
    Ok(())
}

fn own(worker: &mut Worker, step: &Step, slot: usize, i: usize, n: usize) -> Act {
    for k in i..i + n {
        let (place, version) = worker.place(slot, k);
        let class = (step.arg % CLASSES as u32) as u8;
        worker.put(slot, k, Desc::own(class, place, version), step.op)?;
    }
    Ok(())
}

/// Write a few bytes at the beginning and the end. The rest must not change.
fn stamp(worker: &mut Worker, slot: usize, i: usize, n: usize) -> Act {
    let mut page = [0; WORDS];
    for k in i..i + n {
        let Some(class) = worker.class_at(slot, k) else {
            continue;
        };
        worker.verify(slot, k, 1)?;
        let (place, version) = worker.place(slot, k);
        let desc = Desc::stamped(class, place, version);
        worker.bodies.render(desc, &mut page);
        let mem = worker.mem(slot)?;
        mem.poke(k, 0, &page[..HEADER]);
        mem.poke(k, WORDS - 1, &page[WORDS - 1..]);
        let number = worker
            .block
            .steps
            .load(std::sync::atomic::Ordering::Relaxed);
        worker.entry(slot, k).set(desc, 0);
        worker.entry(slot, k).note(Op::Stamp, number);
    }
    Ok(())
}

/// Give advice for a range or, more often, for a whole slot.
fn advise_much(worker: &mut Worker, step: &Step, advice: libc::c_int) -> Act {
    let (slot, i, n) = worker.range(step)?;
    let pages = worker.pages(slot);
    let (i, n) = if step.arg % 4 == 0 {
        (i, n)
    } else {
        (0, pages)
    };
    worker.mem(slot)?.advise(i, n, advice)?;
    worker.verify(slot, i, n)
}

/// Collapse a range. Few slots have room for a huge page: use one of those, if there is any.
fn collapse(worker: &mut Worker, step: &Step) -> Act {
    let first = usize::from(step.slot) % SLOTS;
    let slot = (first..first + SLOTS)
        .map(|slot| slot % SLOTS)
        .find(|&slot| worker.pages(slot) >= HUGE)
        .unwrap_or(first);
    let step = Step {
        slot: slot as u8,
        ..*step
    };
    advise_much(worker, &step, libc::MADV_COLLAPSE)
}

fn resize(worker: &mut Worker, step: &Step, slot: usize) -> Act {
    let old = worker.pages(slot);
    let by = usize::from(step.len);
    let new = match step.op {
        Op::Grow => (old + by).min(PAGES),
        _ => old.saturating_sub(by).max(8).min(old),
    };
    if new == old {
        return Ok(());
    }
    worker.mem(slot)?.resize(new)?;
    if new > old {
        worker.set_zero(slot, old, new - old, step.op);
    }
    worker.verify(slot, 0, new)
}

/// Move a slot. A move of several mappings may fail half way; then give up the whole slot.
fn relocate(worker: &mut Worker, slot: usize) -> Act {
    let moved = worker.mem(slot)?.relocate();
    if let Err(e) = moved {
        give_up(worker, slot);
        return Err(e.into());
    }
    worker.verify(slot, 0, worker.pages(slot))
}

fn give_up(worker: &mut Worker, slot: usize) {
    worker.slots[slot] = None;
}

/// Move pages of one slot onto those of another.
fn move_over(worker: &mut Worker, step: &Step) -> Act {
    let (from, i, n) = worker.range(step)?;
    let shift = 1 + usize::from(step.other) % (SLOTS - 1);
    let (to, j, m) = worker.range_of((from + shift) % SLOTS, step.arg as u16, step.len)?;
    let n = n.min(m);
    let Some(mut source) = worker.slots[from].take() else {
        return Ok(());
    };
    let taken = worker.mem(to)?.take(j, &mut source, i, n);
    worker.slots[from] = Some(source);
    if let Err(e) = taken {
        give_up(worker, from);
        give_up(worker, to);
        return Err(e.into());
    }
    let number = worker
        .block
        .steps
        .load(std::sync::atomic::Ordering::Relaxed);
    for k in 0..n {
        worker.entry(to, j + k).copy(worker.entry(from, i + k));
        worker.entry(to, j + k).note(step.op, number);
    }
    worker.set_zero(from, i, n, step.op);
    worker.verify(from, i, n)?;
    worker.verify(to, j, n)
}

fn protect(worker: &mut Worker, slot: usize, i: usize, n: usize) -> Act {
    let rw = libc::PROT_READ | libc::PROT_WRITE;
    worker.mem(slot)?.protect(i, n, libc::PROT_READ)?;
    let read_only = worker.verify(slot, i, n);
    let none = worker.mem(slot)?.protect(i, n, libc::PROT_NONE);
    // Always make them writable again, as other operations expect that.
    let back = worker.mem(slot)?.protect(i, n, rw);
    if let Err(e) = back {
        give_up(worker, slot);
        return Err(e.into());
    }
    read_only?;
    none?;
    worker.verify(slot, i, n)
}

/// Remove all access for a while, in which the pages may be unmerged.
fn no_access(worker: &mut Worker, step: &Step, slot: usize, i: usize, n: usize) -> Act {
    worker.verify(slot, i, n)?;
    let none = worker.mem(slot)?.protect(i, n, libc::PROT_NONE);
    let unmerged = match step.arg % 4 {
        0 if none.is_ok() => worker.mem(slot)?.advise(i, n, libc::MADV_UNMERGEABLE),
        _ => Ok(()),
    };
    std::thread::sleep(Duration::from_millis(u64::from((step.arg >> 8) & 31)));
    let rw = libc::PROT_READ | libc::PROT_WRITE;
    if let Err(e) = worker.mem(slot)?.protect(i, n, rw) {
        give_up(worker, slot);
        return Err(e.into());
    }
    none?;
    unmerged?;
    worker.verify(slot, i, n)
}

fn drop_pages(
    worker: &mut Worker,
    step: &Step,
    slot: usize,
    i: usize,
    n: usize,
    advice: libc::c_int,
) -> Act {
    if advice == libc::MADV_FREE && (worker.forks > 0 || worker.who.child != 0) {
        // An unmerged page is clean. If it is shared over a fork and one process gives it up, the kernel
        // (7.3) takes it from both: Documentation/testing.md. Only written pages are safe.
        write(worker, step, slot, i, n)?;
    }
    let done = worker.mem(slot)?.advise(i, n, advice);
    match (&done, advice) {
        (Ok(()), libc::MADV_DONTNEED) => worker.set_zero(slot, i, n, step.op),
        // A call that fails at one of several mappings has changed those before it.
        _ => worker.set_maybe_zero(slot, i, n, step.op),
    }
    match done {
        Ok(()) => Ok(()),
        Err(e) => Err(Stop::from(e)),
    }
}
