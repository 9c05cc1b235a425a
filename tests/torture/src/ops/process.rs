// SPDX-License-Identifier: GPL-2.0
//! Children: they inherit pages and their ledger, work for a while, and exit, exec, or are killed.

use std::os::fd::RawFd;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rksm_test_lib::sys::{self, Ended, Forked};

use crate::arena::{Block, SLOTS};
use crate::page::{mix, Desc, WORDS};
use crate::plan::{Allowed, Op, Plan, Step, Who};
use crate::raw::{self, Mem};
use crate::worker::{Act, Stop, Until, Worker, STATUS_WRONG};

/// The largest number of children of one process at a time.
const CHILDREN: usize = 2;
/// The descriptor of the arena in executed programs.
pub const ARENA_FD: RawFd = 100;

#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Exit,
    Exec,
    Killed,
}

pub struct Child {
    pid: libc::pid_t,
    block: u8,
    end: End,
    /// The parent kills the child after this step of its own.
    kill_after: u32,
}

fn end_of(arg: u32) -> End {
    match (arg >> 8) & 7 {
        0..4 => End::Exit,
        4..6 => End::Exec,
        _ => End::Killed,
    }
}

pub fn fork(worker: &mut Worker, step: &Step) -> Act {
    while worker.children.len() >= CHILDREN {
        reap(worker, true)?;
    }
    let Some(id) = worker.arena.allocate() else {
        return Err(Stop::Refused(libc::EAGAIN));
    };
    worker.forks += 1;
    let block = &worker.arena.blocks[id as usize];
    inherit(worker, block);
    let (end, me) = (end_of(step.arg), std::process::id());
    let pid = match sys::fork() {
        Ok(Forked::Parent(pid)) => pid,
        Ok(Forked::Child) => become_child(worker, me, id, step, end),
        Err(e) => {
            worker.arena.bury(id);
            return Err(e.into());
        }
    };
    block.pid.store(pid as u32, Ordering::Relaxed);
    worker.children.push(Child {
        pid,
        block: id,
        end,
        kill_after: worker.block.steps.load(Ordering::Relaxed) + step.arg % 24,
    });
    // Neither process sees the other's writes: write at once.
    let (slot, i, n) = worker.range(step)?;
    for k in i..i + n {
        let (place, version) = worker.place(slot, k);
        worker.put(slot, k, Desc::own(0, place, version), step.op)?;
    }
    worker.verify_all()
}

/// Copy the parent's ledger to that of the child.
fn inherit(worker: &Worker, block: &Block) {
    for slot in 0..SLOTS {
        for k in 0..worker.pages(slot) {
            block.entries[slot][k].copy(worker.entry(slot, k));
        }
    }
}

fn become_child(worker: &mut Worker, parent: u32, id: u8, step: &Step, end: End) -> ! {
    worker.who.child = worker.forks;
    worker.id = id;
    worker.block = &worker.arena.blocks[id as usize];
    let (who, block) = (worker.who, worker.block);
    if !block.take(parent) {
        // The parent was killed. No error was found.
        sys::exit_now(0);
    }
    block.number.store(who.number, Ordering::Relaxed);
    block.life.store(who.life, Ordering::Relaxed);
    block.child.store(who.child, Ordering::Relaxed);
    block.pid.store(std::process::id(), Ordering::Relaxed);
    worker.children.clear();
    // Other processes write only to the shared pages of the parent.
    worker.shared_pages = None;
    let allowed = Allowed(worker.arena.allowed.load(Ordering::Relaxed));
    let steps = 4 + step.arg % 48;
    let status = worker.run(Plan::new(who, allowed), Until::Steps(steps));
    if status != 0 {
        sys::exit_now(status);
    }
    match end {
        End::Exit => {}
        // No process kills an orphan.
        End::Killed => {
            while raw::parent() == parent && !worker.arena.stopping() {
                std::thread::sleep(Duration::from_millis(5));
                let stood = worker.stand_still();
                if let Err(Stop::Fault(what)) = stood.and_then(|()| worker.verify_all()) {
                    worker.complain(&what);
                    sys::exit_now(STATUS_WRONG);
                }
            }
        }
        End::Exec => {
            let error = Command::new("/proc/self/exe")
                .arg("exec")
                .args([u32::from(id), who.number, who.life, who.child].map(|n| n.to_string()))
                .exec();
            worker.complain(&format!("exec: {error}"));
            sys::exit_now(STATUS_WRONG);
        }
    }
    sys::exit_now(0)
}

/// Run a child that has executed this program. It inherits only the effect of `prctl`, the number of the
/// ledger, and the arena.
pub fn executed(id: u8, number: u32, life: u32, child: u32) -> anyhow::Result<i32> {
    let arena = raw::map_arena(ARENA_FD)?;
    let who = Who {
        seed: mix(arena.seed.load(Ordering::Relaxed)),
        number,
        life,
        child,
    };
    let allowed = Allowed(arena.allowed.load(Ordering::Relaxed));
    let mut worker = Worker::new(arena, id, who)?;
    Ok(worker.run(Plan::new(who, allowed), Until::Steps(12)))
}

/// Fork a child that takes much memory, half of it equal to that of others, and ends during its scan.
pub fn big_exit(worker: &mut Worker, step: &Step) -> Act {
    let killed = step.arg & 1 != 0;
    let me = std::process::id();
    let pid = match sys::fork()? {
        Forked::Parent(pid) => pid,
        Forked::Child => sys::exit_now(big_child(worker, step, killed.then_some(me))),
    };
    let linger = Duration::from_millis(u64::from((step.arg >> 8) & 511));
    let end = std::time::Instant::now() + linger;
    loop {
        if killed && std::time::Instant::now() > end {
            sys::kill(pid, libc::SIGKILL)?;
        }
        match sys::try_wait(pid)? {
            Some((_, Ended::Exit(0))) => return Ok(()),
            Some((_, Ended::Signal(libc::SIGKILL))) if killed => return Ok(()),
            Some((_, ended)) => {
                return Err(Stop::Fault(format!("a large child ended by {ended:?}")));
            }
            None => std::thread::sleep(Duration::from_millis(2)),
        }
    }
}

/// Run the large child. With `killed_by`, it waits to be killed by that process.
fn big_child(worker: &Worker, step: &Step, killed_by: Option<u32>) -> i32 {
    const MANY: usize = 4096;
    let fill = || -> std::io::Result<Mem> {
        sys::die_with_parent()?;
        let mut mem = Mem::new(MANY)?;
        mem.advise(0, MANY, libc::MADV_MERGEABLE)?;
        let mut page = [0; WORDS];
        for k in 0..MANY {
            worker.bodies.render(Desc::class(k as u8, 0), &mut page);
            if k % 2 == 0 {
                page[0] ^= (u64::from(step.arg) << 32) ^ k as u64;
            }
            mem.write(k, &page);
        }
        Ok(mem)
    };
    // It exits with all of its memory, or with none if there was too little.
    std::mem::forget(fill());
    let linger = Duration::from_millis(u64::from((step.arg >> 8) & 511));
    std::thread::sleep(linger);
    while killed_by.is_some_and(|pid| raw::parent() == pid) {
        std::thread::sleep(Duration::from_millis(5));
    }
    0
}

/// Kill children whose time has come, and reap those that have ended.
pub fn look_after(worker: &mut Worker) -> Act {
    reap(worker, false)
}

pub fn wait_for_all(worker: &mut Worker) -> Act {
    while !worker.children.is_empty() {
        reap(worker, true)?;
    }
    Ok(())
}

/// Reap all children that have ended; with `wait`, at least one.
fn reap(worker: &mut Worker, wait: bool) -> Act {
    loop {
        let now = worker.block.steps.load(Ordering::Relaxed);
        let mut reaped = false;
        let mut i = 0;
        while let Some(child) = worker.children.get(i) {
            if child.end == End::Killed && (wait || now >= child.kill_after) {
                worker.arena.blocks[child.block as usize]
                    .doomed
                    .store(1, Ordering::Relaxed);
                sys::kill(child.pid, libc::SIGKILL)?;
            }
            // This process may be killed at any time. If it had reaped a child and not released its ledger,
            // the ledger and any claim on a shared page would be lost. The supervisor takes care of children
            // that were not reaped.
            match sys::has_ended(child.pid as u32)? {
                Some(ended) => {
                    let child = worker.children.swap_remove(i);
                    let buried = bury(worker, &child, ended);
                    sys::try_wait(child.pid)?;
                    buried?;
                    reaped = true;
                }
                None => i += 1,
            }
        }
        if !wait || reaped {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(2));
        worker.stand_still()?;
    }
}

fn bury(worker: &Worker, child: &Child, ended: Ended) -> Act {
    let block = &worker.arena.blocks[child.block as usize];
    let doomed = block.doomed.load(Ordering::Relaxed) != 0;
    let last = block.last_steps(24);
    worker.arena.bury(child.block);
    let op = match (child.end, ended) {
        (End::Exit | End::Killed, Ended::Exit(0)) => Op::ChildExit,
        (End::Exec, Ended::Exit(0)) => Op::ChildExec,
        (_, Ended::Signal(libc::SIGKILL)) if doomed => Op::ChildKilled,
        // The child has reported the error.
        (_, Ended::Exit(STATUS_WRONG)) => return Ok(()),
        _ => {
            return Err(Stop::Fault(format!(
                "child {} ended by {ended:?}; its last steps: {last}",
                child.pid
            )))
        }
    };
    worker.arena.count(op, 0);
    Ok(())
}
