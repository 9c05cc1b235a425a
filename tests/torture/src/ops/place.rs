// SPDX-License-Identifier: GPL-2.0
//! Moves between NUMA nodes, and write protection by userfaultfd.

use std::io;
use std::time::Duration;

use rksm_test_lib::numa;
use rksm_test_lib::pageflags::Span;
use rksm_test_lib::sys::{self, Ended, Forked};

use crate::page::{Desc, PAGE};
use crate::plan::{Op, Step};
use crate::raw::uffd::Uffd;
use crate::worker::{Act, Stop, Worker};

/// Move pages to another node, also those that other processes map.
pub fn move_pages(worker: &mut Worker, step: &Step) -> Act {
    let (slot, i, n) = worker.range(step)?;
    let Some(&node) = worker
        .nodes
        .get(step.arg as usize % worker.nodes.len().max(1))
    else {
        return Err(Stop::Refused(libc::ENODEV));
    };
    let addr = worker.mem(slot)?.addr() + i * PAGE;
    let span = Span {
        pid: std::process::id(),
        addr,
        pages: n,
    };
    let moved = numa::move_to(span, node);
    worker.verify(slot, i, n)?;
    moved?;
    Ok(())
}

/// Move all pages of this process from one node to another.
pub fn migrate(worker: &mut Worker, step: &Step) -> Act {
    let [a, b, ..] = worker.nodes[..] else {
        return Err(Stop::Refused(libc::ENODEV));
    };
    let (from, to) = if step.arg % 2 == 0 { (a, b) } else { (b, a) };
    let moved = numa::migrate_process(std::process::id(), from, to);
    worker.verify_all()?;
    moved?;
    Ok(())
}

/// Write-protect pages, write, page out or read some of them, and lift the protection.
pub fn uffd(worker: &mut Worker, step: &Step, served: bool) -> Act {
    let (slot, i, n) = worker.range(step)?;
    let n = n.min(64);
    let addr = worker.mem(slot)?.addr() + i * PAGE;
    let uffd = Uffd::new(!served)?;
    uffd.register(addr, n * PAGE)?;
    // They stay registered until `uffd` is dropped.
    uffd.protect(addr, n * PAGE, true)?;
    worker.verify(slot, i, n)?;
    if step.arg % 2 == 0 {
        let paged = worker.mem(slot)?.advise(i, n, libc::MADV_PAGEOUT);
        worker.verify(slot, i, n)?;
        // Locked pages cannot be paged out.
        drop(paged);
    }
    std::thread::sleep(Duration::from_millis(u64::from((step.arg >> 8) & 15)));
    let server = if served { Some(serve(&uffd)?) } else { None };
    for k in (i..i + n).step_by(3) {
        let (place, version) = worker.place(slot, k);
        worker.put(slot, k, Desc::own(3, place, version), step.op)?;
    }
    worker.verify(slot, i, n)?;
    if let Some(pid) = server {
        end_server(pid)?;
    }
    uffd.protect(addr, n * PAGE, false)?;
    drop(uffd);
    worker.verify(slot, i, n)
}

/// Fork a child that lets every write through, one by one.
fn serve(uffd: &Uffd) -> io::Result<libc::pid_t> {
    match sys::fork()? {
        Forked::Parent(pid) => Ok(pid),
        Forked::Child => {
            let _ = sys::die_with_parent();
            while let Ok(at) = uffd.next_fault() {
                match uffd.protect(at & !(PAGE - 1), PAGE, false) {
                    Ok(()) => {}
                    // The writer was killed, and this process is about to be.
                    Err(e) if e.raw_os_error() == Some(libc::ESRCH) => {
                        std::thread::sleep(Duration::from_secs(3600));
                    }
                    Err(_) => break,
                }
            }
            sys::exit_now(1)
        }
    }
}

fn end_server(pid: libc::pid_t) -> Act {
    sys::kill(pid, libc::SIGKILL)?;
    loop {
        match sys::try_wait(pid)? {
            Some((_, Ended::Signal(libc::SIGKILL))) => return Ok(()),
            Some((_, how)) => {
                return Err(Stop::Fault(format!(
                    "a server of userfaultfd ended by {how:?}"
                )))
            }
            None => std::thread::sleep(Duration::from_millis(1)),
        }
    }
}

pub fn act(worker: &mut Worker, step: &Step) -> Act {
    match step.op {
        Op::MovePages => move_pages(worker, step),
        Op::MigratePages => migrate(worker, step),
        Op::Uffd => uffd(worker, step, false),
        _ => uffd(worker, step, true),
    }
}
