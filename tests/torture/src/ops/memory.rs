// SPDX-License-Identifier: GPL-2.0
//! Writing, mapping, moving and advising.

use std::time::Duration;

use crate::arena::{PAGES, SLOTS};
use crate::page::{Desc, CLASSES, HEADER, WORDS};
use crate::plan::{Op, Step};
use crate::player::{Act, Player, Stop};
use crate::raw::Mem;

/// Pages in a huge page.
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

pub fn act(player: &mut Player, step: &Step) -> Act {
    if step.op == Op::Map {
        return map(player, usize::from(step.slot) % SLOTS, step.arg);
    }
    let (slot, i, n) = player.range(step)?;
    match step.op {
        Op::Unmap => return unmap(player, step, slot, i, n),
        Op::Write => write(player, step, slot, i, n)?,
        Op::Own => own(player, step, slot, i, n)?,
        Op::Stamp => stamp(player, slot, i, n)?,
        Op::Verify => {}
        Op::Mergeable => advise_much(player, step, libc::MADV_MERGEABLE)?,
        Op::Unmergeable => advise_much(player, step, libc::MADV_UNMERGEABLE)?,
        Op::Huge => advise_much(player, step, libc::MADV_HUGEPAGE)?,
        Op::NoHuge => advise_much(player, step, libc::MADV_NOHUGEPAGE)?,
        Op::Collapse => collapse(player, step)?,
        Op::PageOut => player.mem(slot)?.advise(i, n, libc::MADV_PAGEOUT)?,
        Op::Grow | Op::Shrink => return resize(player, step, slot),
        Op::Move => return relocate(player, slot),
        Op::MoveOver => return move_over(player, step),
        Op::Protect => return protect(player, slot, i, n),
        Op::NoAccess => return no_access(player, step, slot, i, n),
        Op::DontNeed => drop_pages(player, step, slot, i, n, libc::MADV_DONTNEED)?,
        Op::Free => drop_pages(player, step, slot, i, n, libc::MADV_FREE)?,
        Op::Mlock => player.mem(slot)?.lock(i, n)?,
        Op::Munlock => player.mem(slot)?.unlock(i, n)?,
        _ => {}
    }
    player.verify(slot, i, n)
}

/// Maps a slot anew: 8 to 512 pages, or what huge pages fit in.
pub fn map(player: &mut Player, slot: usize, arg: u32) -> Act {
    player.verify(slot, 0, player.pages(slot))?;
    player.slots[slot] = None;
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
        player.entry(slot, k).forget();
    }
    let pages = mem.pages();
    player.slots[slot] = Some(mem);
    player.set_zero(slot, 0, pages, Op::Map);
    // A good part of it is filled at once: little merges in empty memory.
    for k in 0..pages {
        if (k as u32).wrapping_mul(0x9e37_79b1) >> 28 > (arg >> 16) & 7 {
            player.put(slot, k, class(arg.wrapping_add(k as u32)), Op::Map)?;
        }
    }
    Ok(())
}

/// One of few contents, so that most have their equal somewhere.
fn class(arg: u32) -> Desc {
    Desc::class((arg % CLASSES as u32) as u8, arg / 64 % 2)
}

fn unmap(player: &mut Player, step: &Step, slot: usize, i: usize, n: usize) -> Act {
    if step.arg % 8 == 0 {
        player.verify(slot, 0, player.pages(slot))?;
        player.slots[slot] = None;
        return Ok(());
    }
    player.mem(slot)?.refresh(i, n)?;
    player.set_zero(slot, i, n, step.op);
    player.verify(slot, i, n)
}

fn write(player: &mut Player, step: &Step, slot: usize, i: usize, n: usize) -> Act {
    for k in i..i + n {
        // One content for all, one for each, or zeroes.
        let desc = match step.arg >> 28 {
            0 => Desc::ZERO,
            1..8 => class(step.arg),
            _ => class(step.arg.wrapping_add(k as u32)),
        };
        player.put(slot, k, desc, step.op)?;
    }
    Ok(())
}

fn own(player: &mut Player, step: &Step, slot: usize, i: usize, n: usize) -> Act {
    for k in i..i + n {
        let (place, version) = player.place(slot, k);
        let class = (step.arg % CLASSES as u32) as u8;
        player.put(slot, k, Desc::own(class, place, version), step.op)?;
    }
    Ok(())
}

/// Writes a few bytes at the beginning and the end; the rest has to be kept.
fn stamp(player: &mut Player, slot: usize, i: usize, n: usize) -> Act {
    let mut page = [0; WORDS];
    for k in i..i + n {
        let Some(class) = player.class_at(slot, k) else {
            continue;
        };
        player.verify(slot, k, 1)?;
        let (place, version) = player.place(slot, k);
        let desc = Desc::stamped(class, place, version);
        player.bodies.render(desc, &mut page);
        let mem = player.mem(slot)?;
        mem.poke(k, 0, &page[..HEADER]);
        mem.poke(k, WORDS - 1, &page[WORDS - 1..]);
        let number = player
            .block
            .steps
            .load(std::sync::atomic::Ordering::Relaxed);
        player.entry(slot, k).set(desc, 0);
        player.entry(slot, k).note(Op::Stamp, number);
    }
    Ok(())
}

/// Gives advice for a range or, more often, for all of a slot.
fn advise_much(player: &mut Player, step: &Step, advice: libc::c_int) -> Act {
    let (slot, i, n) = player.range(step)?;
    let pages = player.pages(slot);
    let (i, n) = if step.arg % 4 == 0 {
        (i, n)
    } else {
        (0, pages)
    };
    player.mem(slot)?.advise(i, n, advice)?;
    player.verify(slot, i, n)
}

/// Few slots have room for a huge page: one of those, if there is any.
fn collapse(player: &mut Player, step: &Step) -> Act {
    let first = usize::from(step.slot) % SLOTS;
    let slot = (first..first + SLOTS)
        .map(|slot| slot % SLOTS)
        .find(|&slot| player.pages(slot) >= HUGE)
        .unwrap_or(first);
    let step = Step {
        slot: slot as u8,
        ..*step
    };
    advise_much(player, &step, libc::MADV_COLLAPSE)
}

fn resize(player: &mut Player, step: &Step, slot: usize) -> Act {
    let old = player.pages(slot);
    let by = usize::from(step.len);
    let new = match step.op {
        Op::Grow => (old + by).min(PAGES),
        _ => old.saturating_sub(by).max(8).min(old),
    };
    if new == old {
        return Ok(());
    }
    player.mem(slot)?.resize(new)?;
    if new > old {
        player.set_zero(slot, old, new - old, step.op);
    }
    player.verify(slot, 0, new)
}

/// A move of several mappings may fail half-way: then all of it is given up.
fn relocate(player: &mut Player, slot: usize) -> Act {
    let moved = player.mem(slot)?.relocate();
    if let Err(e) = moved {
        give_up(player, slot);
        return Err(e.into());
    }
    player.verify(slot, 0, player.pages(slot))
}

fn give_up(player: &mut Player, slot: usize) {
    player.slots[slot] = None;
}

/// Moves pages of one slot onto those of another.
fn move_over(player: &mut Player, step: &Step) -> Act {
    let (from, i, n) = player.range(step)?;
    let shift = 1 + usize::from(step.other) % (SLOTS - 1);
    let (to, j, m) = player.range_of((from + shift) % SLOTS, step.arg as u16, step.len)?;
    let n = n.min(m);
    let Some(mut source) = player.slots[from].take() else {
        return Ok(());
    };
    let taken = player.mem(to)?.take(j, &mut source, i, n);
    player.slots[from] = Some(source);
    if let Err(e) = taken {
        give_up(player, from);
        give_up(player, to);
        return Err(e.into());
    }
    let number = player
        .block
        .steps
        .load(std::sync::atomic::Ordering::Relaxed);
    for k in 0..n {
        player.entry(to, j + k).copy(player.entry(from, i + k));
        player.entry(to, j + k).note(step.op, number);
    }
    player.set_zero(from, i, n, step.op);
    player.verify(from, i, n)?;
    player.verify(to, j, n)
}

fn protect(player: &mut Player, slot: usize, i: usize, n: usize) -> Act {
    let rw = libc::PROT_READ | libc::PROT_WRITE;
    player.mem(slot)?.protect(i, n, libc::PROT_READ)?;
    let read_only = player.verify(slot, i, n);
    let none = player.mem(slot)?.protect(i, n, libc::PROT_NONE);
    // Whatever came of it: nothing else expects pages that cannot be written.
    let back = player.mem(slot)?.protect(i, n, rw);
    if let Err(e) = back {
        give_up(player, slot);
        return Err(e.into());
    }
    read_only?;
    none?;
    player.verify(slot, i, n)
}

/// Takes all access away for a while, in which the pages may be unmerged.
fn no_access(player: &mut Player, step: &Step, slot: usize, i: usize, n: usize) -> Act {
    player.verify(slot, i, n)?;
    let none = player.mem(slot)?.protect(i, n, libc::PROT_NONE);
    let unmerged = match step.arg % 4 {
        0 if none.is_ok() => player.mem(slot)?.advise(i, n, libc::MADV_UNMERGEABLE),
        _ => Ok(()),
    };
    std::thread::sleep(Duration::from_millis(u64::from((step.arg >> 8) & 31)));
    let rw = libc::PROT_READ | libc::PROT_WRITE;
    if let Err(e) = player.mem(slot)?.protect(i, n, rw) {
        give_up(player, slot);
        return Err(e.into());
    }
    none?;
    unmerged?;
    player.verify(slot, i, n)
}

fn drop_pages(
    player: &mut Player,
    step: &Step,
    slot: usize,
    i: usize,
    n: usize,
    advice: libc::c_int,
) -> Act {
    if advice == libc::MADV_FREE && (player.forks > 0 || player.who.child != 0) {
        // A page that was unmerged is clean. Shared over a fork, the kernel (7.3) takes it from
        // both when one of them gives it up: Documentation/testing.md. Only written ones are safe.
        write(player, step, slot, i, n)?;
    }
    let done = player.mem(slot)?.advise(i, n, advice);
    match (&done, advice) {
        (Ok(()), libc::MADV_DONTNEED) => player.set_zero(slot, i, n, step.op),
        // Refused for one of several mappings, it was done to those before.
        _ => player.set_maybe_zero(slot, i, n, step.op),
    }
    match done {
        Ok(()) => Ok(()),
        Err(e) => Err(Stop::from(e)),
    }
}
