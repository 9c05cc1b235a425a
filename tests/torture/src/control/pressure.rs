// SPDX-License-Identifier: GPL-2.0
//! Tasks that take pages away: reclaim, compaction, swapping, and groups that run out of memory.

use std::fs;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{bail, Result};
use rand::Rng;
use rksm_test_lib::cgroup::Group;
use rksm_test_lib::swap;
use rksm_test_lib::sys::{self, Ended, Forked};

use super::Control;
use crate::arena::{PAGES, SLOTS};
use crate::page::Desc;
use crate::plan::{Allowed, Op, Plan, Who};
use crate::raw::{self, Mem};
use crate::worker::{Stop, Until, Worker, STATUS_WRONG};

/// The group of the workers, and that of the victims, which run out of memory. rksm-tools log-check expects
/// the kernel's report about the latter.
pub const WORKERS: &str = "torture";
const VICTIMS: &str = "oom";
/// The memory limit of a victim's group: less than a victim takes.
const VICTIM_LIMIT: usize = 10 << 20;

/// Return why there are no groups.
pub fn no_groups() -> Option<&'static str> {
    let controllers = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers");
    let there = controllers.is_ok_and(|c| c.split_whitespace().any(|c| c == "memory"));
    (!there).then_some("the kernel has no memory controller")
}

/// Reclaim memory of the workers.
pub fn reclaim(control: &mut Control) -> Result<()> {
    while !control.stopping() {
        control.pause(100..1200);
        let mib = control.rng.random_range(1..12);
        control.attempt(Op::Reclaim, || {
            let file = format!("/sys/fs/cgroup/rksm-{WORKERS}/memory.reclaim");
            fs::write(file, format!("{mib}M"))
        });
    }
    Ok(())
}

pub fn no_compaction() -> Option<&'static str> {
    fs::metadata("/proc/sys/vm/compact_memory")
        .is_err()
        .then_some("the kernel does not compact memory")
}

pub fn compact(control: &mut Control) -> Result<()> {
    while !control.stopping() {
        control.pause(1000..5000);
        control.attempt(Op::Compact, || {
            fs::write("/proc/sys/vm/compact_memory", "1")
        });
    }
    Ok(())
}

pub fn drop_caches(control: &mut Control) -> Result<()> {
    while !control.stopping() {
        control.pause(2000..9000);
        let what = control.rng.random_range(1..=3).to_string();
        control.attempt(Op::DropCaches, || {
            fs::write("/proc/sys/vm/drop_caches", what)
        });
    }
    Ok(())
}

/// Read all swapped pages back, then swap again.
pub fn swap(control: &mut Control) -> Result<()> {
    while !control.stopping() {
        control.pause(1000..5000);
        if control.attempt(Op::SwapOff, swap::swap_off) != Some(true) {
            continue;
        }
        control.pause(0..500);
        if control.attempt(Op::SwapOn, swap::swap_on) != Some(true) {
            // The user excluded it, or the kernel refused. The swap space is needed all the same.
            swap::swap_on()?;
        }
    }
    Ok(())
}

/// Let processes that share pages with workers run out of memory, one after the other.
pub fn oom(control: &mut Control) -> Result<()> {
    let Some(group) = Group::new(VICTIMS)? else {
        bail!("no memory controller");
    };
    group.set("memory.max", &VICTIM_LIMIT.to_string())?;
    // The kernel may not account for swap.
    let _ = group.set("memory.swap.max", "0");
    let mut life = 0;
    while !control.stopping() {
        control.pause(1500..6000);
        if control.stopping() || !control.allowed.has(Op::Oom) {
            continue;
        }
        let Some(id) = control.arena.allocate() else {
            continue;
        };
        life += 1;
        let who = Who {
            life,
            child: 1,
            ..control.who
        };
        let pid = match sys::fork()? {
            Forked::Parent(pid) => pid,
            Forked::Child => sys::exit_now(victim(control, &group, id, who)),
        };
        let ended = loop {
            if let Some((_, ended)) = sys::try_wait(pid)? {
                break ended;
            }
            std::thread::sleep(Duration::from_millis(10));
            control.stand_still();
        };
        control.arena.bury(id);
        match ended {
            Ended::Signal(libc::SIGKILL) => control.arena.count(Op::Oom, 0),
            // The round ended before it had all its memory.
            Ended::Exit(0) => control.arena.count(Op::Oom, libc::EAGAIN),
            Ended::Exit(STATUS_WRONG) => {}
            how => bail!("a process that was to run out of memory ended by {how:?}"),
        }
    }
    group.remove()
}

/// Work for a while, then take more memory than the group may have.
fn victim(control: &Control, group: &Group, id: u8, who: Who) -> i32 {
    let begin = || -> Result<Worker> {
        sys::die_with_parent()?;
        group.enter(std::process::id())?;
        Worker::new(control.arena, id, who)
    };
    let mut worker = match begin() {
        Ok(worker) => worker,
        Err(e) => {
            control.arena.fail();
            raw::say(&format!("# a victim cannot begin: {e:#}\n"));
            return STATUS_WRONG;
        }
    };
    let status = worker.run(
        Plan::new(who, victims_do(control.allowed)),
        Until::Steps(20),
    );
    if status != 0 {
        return status;
    }
    match devour(&mut worker) {
        Ok(()) | Err(Stop::Refused(_)) => 0,
        Err(Stop::Fault(what)) => worker.complain(&what),
    }
}

/// Return the operations of a victim: those that only take memory of its own.
fn victims_do(allowed: Allowed) -> Allowed {
    let mine = [
        Op::Write,
        Op::Stamp,
        Op::Verify,
        Op::Mergeable,
        Op::Free,
        Op::Rest,
    ];
    let bits = mine.iter().fold(0, |bits, &op| bits | (1 << op as u8));
    Allowed(allowed.0 & bits)
}

fn devour(worker: &mut Worker) -> Result<(), Stop> {
    for _ in 0..4 {
        for slot in 0..SLOTS {
            if worker.arena.stopping() {
                return Ok(());
            }
            let mem = Mem::new(PAGES)?;
            mem.advise(0, PAGES, libc::MADV_MERGEABLE)?;
            worker.slots[slot] = Some(mem);
            worker.set_zero(slot, 0, PAGES, Op::Oom);
            worker.block.since.store(raw::now(), Ordering::Relaxed);
            for k in 0..PAGES {
                // Half of them are equal to pages of other processes.
                let (place, version) = worker.place(slot, k);
                let desc = if k % 2 == 0 {
                    Desc::class(k as u8, 0)
                } else {
                    Desc::own(0, place, version)
                };
                worker.put(slot, k, desc, Op::Oom)?;
            }
        }
        worker.verify_all()?;
    }
    Ok(())
}

pub fn workers_group() -> Result<Option<Group>> {
    Group::new(WORKERS)
}
