// SPDX-License-Identifier: GPL-2.0
//! Others that read and write the pages: disks, pipes, other processes.

use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;

use rksm_test_lib::sys;

use crate::arena::MAIL;
use crate::page::{Desc, Place, CLASSES, DISK, PAGE, WORDS};
use crate::plan::{Op, Step};
use crate::player::{Act, Player, Stop};
use crate::raw;

/// Pages that fit in a pipe.
const PIPE: usize = 16;

/// What page `at` of the disk holds: every other one is equal to pages of processes.
pub fn on_disk(at: usize) -> Desc {
    if at % 2 == 0 {
        return Desc::class((at / 2 % CLASSES) as u8, 0);
    }
    let place = Place {
        owner: DISK,
        slot: 0,
        page: (at % 1024) as u16,
    };
    Desc::own((at % CLASSES) as u8, place, at as u32)
}

/// Reads from the disk straight into pages.
pub fn direct(player: &mut Player, step: &Step) -> Act {
    let (slot, i, n) = player.range(step)?;
    let pages = player.arena.disk_pages.load(Ordering::Relaxed) as usize;
    let (Some(disk), true) = (&player.disk, pages > n) else {
        return Err(Stop::Refused(libc::ENODEV));
    };
    let fd = disk.as_raw_fd();
    let at = step.arg as usize % (pages - n);
    let got = player.mem(slot)?.direct_read(fd, i, n, at);
    let whole = got.as_ref().map_or(0, |bytes| bytes / PAGE);
    let number = player.block.steps.load(Ordering::Relaxed);
    for k in 0..whole {
        player.entry(slot, i + k).set(on_disk(at + k), 0);
        player.entry(slot, i + k).note(step.op, number);
    }
    // What was not read may have been overwritten in part: write it anew.
    for k in i + whole..i + n {
        player.put(slot, k, Desc::ZERO, step.op)?;
    }
    got?;
    player.verify(slot, i, n)
}

/// Puts pages into a pipe and reads them from there, after writing to some.
pub fn vmsplice(player: &mut Player, step: &Step) -> Act {
    let (slot, i, n) = player.range(step)?;
    let n = n.min(PIPE);
    player.verify(slot, i, n)?;
    let (out, into) = sys::pipe()?;
    let bytes = player.mem(slot)?.splice(into.as_raw_fd(), i, n)?;
    let spliced = bytes / PAGE;
    let before: Vec<(Desc, bool)> = (i..i + spliced)
        .map(|k| {
            let entry = player.entry(slot, k);
            (entry.desc(), entry.may_be_zero())
        })
        .collect();
    if step.arg % 2 == 0 {
        // Time for the engine to come by while the pipe has them.
        std::thread::sleep(std::time::Duration::from_millis(u64::from(
            (step.arg >> 8) & 31,
        )));
    }
    if (step.arg >> 1) & 1 == 0 {
        for k in (i..i + spliced).step_by(2) {
            let (place, version) = player.place(slot, k);
            player.put(slot, k, Desc::own(1, place, version), step.op)?;
        }
    }
    let (mut have, mut want) = ([0; WORDS], [0; WORDS]);
    for (k, (old, maybe)) in before.into_iter().enumerate() {
        let got = raw::read_page(out.as_raw_fd(), &mut have)?;
        let now = player.entry(slot, i + k).desc();
        // It is the page itself, so it shows what was written meanwhile, or,
        // where that had to be copied, does not.
        let right = got == PAGE
            && [old, now].into_iter().any(|desc| {
                player.bodies.render(desc, &mut want);
                have == want
            });
        let given_up = maybe && have.iter().all(|&w| w == 0);
        if !right && !given_up {
            return Err(Stop::Fault(format!(
                "page {slot}:{} came out of a pipe wrong ({got} bytes): {}",
                i + k,
                player.bodies.diagnose(&have, now)
            )));
        }
    }
    player.verify(slot, i, n)
}

/// Writes a page of its own, or one that many have, into another process.
pub fn vm_write(player: &mut Player, step: &Step) -> Act {
    let arena = player.arena;
    let players = arena.players.load(Ordering::Relaxed) as usize;
    let to = usize::from(step.other) % players.max(1);
    let i = usize::from(step.at) % MAIL;
    let pid = arena.mail_pid[to].load(Ordering::Acquire);
    let addr = arena.mail_addr[to].load(Ordering::Relaxed) as usize;
    if pid == 0 {
        return Err(Stop::Refused(libc::ESRCH));
    }
    let mail = &arena.mail[to][i];
    if !mail.claim(player.id) {
        return Err(Stop::Refused(libc::EBUSY));
    }
    // Only now is it certain that nobody begins anew at the other end.
    if arena.mail_pid[to].load(Ordering::Acquire) != pid {
        mail.release(player.id);
        return Err(Stop::Refused(libc::ESRCH));
    }
    let desc = if step.arg % 3 == 0 {
        let place = Place {
            owner: player.id,
            slot: 15,
            page: i as u16,
        };
        Desc::own(2, place, player.block.next_version())
    } else {
        Desc::class((step.arg % CLASSES as u32) as u8, 0)
    };
    let mut page = [0; WORDS];
    player.bodies.render(desc, &mut page);
    mail.begin(desc);
    let written = raw::write_remote(pid, addr + i * PAGE, &page);
    // Refused, it wrote nothing: one page is written or not.
    let holds = if matches!(written, Ok(PAGE)) {
        desc
    } else {
        mail.desc()
    };
    mail.reset(holds);
    mail.release(player.id);
    match written {
        Ok(PAGE) => Ok(()),
        Ok(bytes) => Err(Stop::Fault(format!(
            "{bytes} bytes written to process {pid}"
        ))),
        Err(e) => Err(e.into()),
    }
}

pub fn act(player: &mut Player, step: &Step) -> Act {
    match step.op {
        Op::Direct => direct(player, step),
        Op::Vmsplice => vmsplice(player, step),
        _ => vm_write(player, step),
    }
}
