// SPDX-License-Identifier: GPL-2.0
//! Other readers and writers of the pages: disks, pipes, other processes.

use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;

use rksm_test_lib::sys;

use crate::arena::SHARED_PAGES;
use crate::page::{Desc, Place, CLASSES, DISK, PAGE, WORDS};
use crate::plan::{Op, Step};
use crate::raw;
use crate::worker::{Act, Stop, Worker};

/// The number of pages that fit in a pipe.
const PIPE: usize = 16;

/// Return the content of page `at` of the disk. Every other one is equal to pages of processes.
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

/// Read from the disk into pages, with O_DIRECT.
pub fn direct(worker: &mut Worker, step: &Step) -> Act {
    let (slot, i, n) = worker.range(step)?;
    let pages = worker.arena.disk_pages.load(Ordering::Relaxed) as usize;
    let (Some(disk), true) = (&worker.disk, pages > n) else {
        return Err(Stop::Refused(libc::ENODEV));
    };
    let fd = disk.as_raw_fd();
    let at = step.arg as usize % (pages - n);
    let got = worker.mem(slot)?.direct_read(fd, i, n, at);
    let whole = got.as_ref().map_or(0, |bytes| bytes / PAGE);
    let number = worker.block.steps.load(Ordering::Relaxed);
    for k in 0..whole {
        worker.entry(slot, i + k).set(on_disk(at + k), 0);
        worker.entry(slot, i + k).note(step.op, number);
    }
    // The rest may have been overwritten in part, so write it again.
    for k in i + whole..i + n {
        worker.put(slot, k, Desc::ZERO, step.op)?;
    }
    got?;
    worker.verify(slot, i, n)
}

/// Splice pages into a pipe, write to some of them, and read the pipe.
pub fn vmsplice(worker: &mut Worker, step: &Step) -> Act {
    let (slot, i, n) = worker.range(step)?;
    let n = n.min(PIPE);
    worker.verify(slot, i, n)?;
    let (out, into) = sys::pipe()?;
    let bytes = worker.mem(slot)?.splice(into.as_raw_fd(), i, n)?;
    let spliced = bytes / PAGE;
    let before: Vec<(Desc, bool)> = (i..i + spliced)
        .map(|k| {
            let entry = worker.entry(slot, k);
            (entry.desc(), entry.may_be_zero())
        })
        .collect();
    if step.arg % 2 == 0 {
        // Time for the engine to scan the pages while the pipe holds them.
        std::thread::sleep(std::time::Duration::from_millis(u64::from(
            (step.arg >> 8) & 31,
        )));
    }
    if (step.arg >> 1) & 1 == 0 {
        for k in (i..i + spliced).step_by(2) {
            let (place, version) = worker.place(slot, k);
            worker.put(slot, k, Desc::own(1, place, version), step.op)?;
        }
    }
    let (mut have, mut want) = ([0; WORDS], [0; WORDS]);
    for (k, (old, maybe)) in before.into_iter().enumerate() {
        let got = raw::read_page(out.as_raw_fd(), &mut have)?;
        let now = worker.entry(slot, i + k).desc();
        // The pipe holds the page itself, so it shows later writes. If a write had to copy the page, it does
        // not.
        let right = got == PAGE
            && [old, now].into_iter().any(|desc| {
                worker.bodies.render(desc, &mut want);
                have == want
            });
        let given_up = maybe && have.iter().all(|&w| w == 0);
        if !right && !given_up {
            return Err(Stop::Fault(format!(
                "page {slot}:{} came out of a pipe wrong ({got} bytes): {}",
                i + k,
                worker.bodies.diagnose(&have, now)
            )));
        }
    }
    worker.verify(slot, i, n)
}

/// Write a page into another process: a page of its own, or one that many processes have.
pub fn vm_write(worker: &mut Worker, step: &Step) -> Act {
    let arena = worker.arena;
    let workers = arena.workers.load(Ordering::Relaxed) as usize;
    let to = usize::from(step.other) % workers.max(1);
    let i = usize::from(step.at) % SHARED_PAGES;
    let pid = arena.shared_pid[to].load(Ordering::Acquire);
    let addr = arena.shared_addr[to].load(Ordering::Relaxed) as usize;
    if pid == 0 {
        return Err(Stop::Refused(libc::ESRCH));
    }
    let shared = &arena.shared_pages[to][i];
    if !shared.claim(worker.id) {
        return Err(Stop::Refused(libc::EBUSY));
    }
    // Only now is it certain that no new process started at the other end.
    if arena.shared_pid[to].load(Ordering::Acquire) != pid {
        shared.release(worker.id);
        return Err(Stop::Refused(libc::ESRCH));
    }
    let desc = if step.arg % 3 == 0 {
        let place = Place {
            owner: worker.id,
            slot: 15,
            page: i as u16,
        };
        Desc::own(2, place, worker.block.next_version())
    } else {
        Desc::class((step.arg % CLASSES as u32) as u8, 0)
    };
    let mut page = [0; WORDS];
    worker.bodies.render(desc, &mut page);
    shared.begin(desc);
    let written = raw::write_remote(pid, addr + i * PAGE, &page);
    // A refused call wrote nothing: a single page is written or not.
    let holds = if matches!(written, Ok(PAGE)) {
        desc
    } else {
        shared.desc()
    };
    shared.reset(holds);
    shared.release(worker.id);
    match written {
        Ok(PAGE) => Ok(()),
        Ok(bytes) => Err(Stop::Fault(format!(
            "{bytes} bytes written to process {pid}"
        ))),
        Err(e) => Err(e.into()),
    }
}

pub fn act(worker: &mut Worker, step: &Step) -> Act {
    match step.op {
        Op::Direct => direct(worker, step),
        Op::Vmsplice => vmsplice(worker, step),
        _ => vm_write(worker, step),
    }
}
