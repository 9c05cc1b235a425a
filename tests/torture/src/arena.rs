// SPDX-License-Identifier: GPL-2.0
//! State that all processes share and that outlives each of them: the ledgers with the expected content of
//! every page, the last steps, and the counts.
//!
//! It is a shared mapping of a memfd, which no engine merges. It consists of atomics only, so that a process
//! may die at any point.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::page::Desc;
use crate::plan::{Allowed, Op, Step};

/// The number of ledgers: the workers' first, then those of children and victims.
pub const BLOCKS: usize = 96;
pub const WORKERS_MAX: usize = 32;
/// The number of slots (VMAs) of a process, and the largest number of pages in each.
pub const SLOTS: usize = 6;
pub const PAGES: usize = 1024;
/// The number of shared pages of each worker, which other processes write to.
pub const SHARED_PAGES: usize = 16;
/// The number of distinct results: 0, and each errno.
pub const ERRNOS: usize = 136;
const OPS: usize = 64;
const HISTORY: usize = 4;
const LOG: usize = 64;
const EVENTS: usize = 128;

/// The largest number of control tasks.
pub const TASKS_MAX: usize = 16;

/// The page may read as zeroes instead (after `MADV_FREE`).
pub const MAY_BE_ZERO: u32 = 1;

/// The expected content of one page.
#[repr(C)]
pub struct Entry {
    desc: AtomicU64,
    flags: AtomicU32,
    /// When it was last found to be right, in milliseconds.
    seen: AtomicU32,
    /// Its last changes, newest first: the operation and the number of the step.
    history: [AtomicU32; HISTORY],
}

impl Entry {
    pub fn desc(&self) -> Desc {
        Desc(self.desc.load(Ordering::Relaxed))
    }

    pub fn may_be_zero(&self) -> bool {
        self.flags.load(Ordering::Relaxed) & MAY_BE_ZERO != 0
    }

    /// Set the expected content.
    pub fn set(&self, desc: Desc, flags: u32) {
        self.desc.store(desc.0, Ordering::Relaxed);
        self.flags.store(flags, Ordering::Relaxed);
    }

    pub fn copy(&self, from: &Self) {
        self.desc.store(from.desc().0, Ordering::Relaxed);
        let flags = from.flags.load(Ordering::Relaxed);
        self.flags.store(flags, Ordering::Relaxed);
        for (to, from) in self.history.iter().zip(&from.history) {
            to.store(from.load(Ordering::Relaxed), Ordering::Relaxed);
        }
    }

    /// Record that step `number` did `op` to it.
    pub fn note(&self, op: Op, number: u32) {
        let mut carry = ((number & 0xff_ffff) << 8) | (op as u32 + 1);
        for place in &self.history {
            carry = place.swap(carry, Ordering::Relaxed);
        }
    }

    pub fn seen(&self, now: u64) {
        self.seen.store(now as u32, Ordering::Relaxed);
    }

    pub fn last_seen(&self) -> u32 {
        self.seen.load(Ordering::Relaxed)
    }

    pub fn forget(&self) {
        self.history
            .iter()
            .for_each(|h| h.store(0, Ordering::Relaxed));
    }

    /// Describe its last changes, newest first.
    pub fn history(&self) -> String {
        let told: Vec<String> = self
            .history
            .iter()
            .map(|h| h.load(Ordering::Relaxed))
            .filter(|&h| h != 0)
            .map(|h| {
                let op = Op::from_code(((h & 0xff) - 1) as u8).map_or("?", Op::name);
                format!("{op} in step {}", h >> 8)
            })
            .collect();
        told.join(", ")
    }
}

/// A page that other processes may write to.
#[repr(C)]
pub struct SharedPage {
    /// The claim on it: the number of a block plus one, or 0.
    claim: AtomicU32,
    desc: AtomicU64,
    /// Another content that it may have: a write is in progress, or its writer died.
    alternative: AtomicU64,
}

/// No descriptor has this value.
const NO_ALTERNATIVE: u64 = u64::MAX;

impl SharedPage {
    pub fn claim(&self, block: u8) -> bool {
        let me = u32::from(block) + 1;
        self.claim
            .compare_exchange(0, me, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
    }

    /// Release the claim, if `block` has it.
    pub fn release(&self, block: u8) {
        let me = u32::from(block) + 1;
        let _ = self
            .claim
            .compare_exchange(me, 0, Ordering::AcqRel, Ordering::Relaxed);
    }

    pub fn reset(&self, desc: Desc) {
        self.desc.store(desc.0, Ordering::Relaxed);
        self.alternative.store(NO_ALTERNATIVE, Ordering::Release);
    }

    pub fn begin(&self, desc: Desc) {
        self.alternative.store(desc.0, Ordering::Release);
    }

    pub fn desc(&self) -> Desc {
        Desc(self.desc.load(Ordering::Acquire))
    }

    pub fn alternative(&self) -> Option<Desc> {
        let raw = self.alternative.load(Ordering::Acquire);
        (raw != NO_ALTERNATIVE).then_some(Desc(raw))
    }
}

/// This is no pid.
const IN_USE: u32 = u32::MAX;

/// The ledger of one process: its steps, and the expected content of its pages.
#[repr(C)]
pub struct Block {
    /// 0 if it is free; [`IN_USE`] if a process has it; otherwise the pid of the parent that is about to fork
    /// that process.
    used: AtomicU32,
    pub pid: AtomicU32,
    pub number: AtomicU32,
    pub life: AtomicU32,
    pub child: AtomicU32,
    /// The number of steps begun.
    pub steps: AtomicU32,
    /// The code of the current operation plus one; 0 between two operations.
    op: AtomicU32,
    /// When the operation began, in milliseconds.
    pub since: AtomicU64,
    /// The newest version that it wrote; it never decreases.
    version: AtomicU32,
    /// Whether the process is to be killed.
    pub doomed: AtomicU32,
    /// The [`Stand`] that it has reached; 0 while it works.
    pub stands: AtomicU32,
    log: [[AtomicU64; 2]; LOG],
    pub entries: [[Entry; PAGES]; SLOTS],
}

impl Block {
    fn change(&self, from: u32, to: u32) -> bool {
        self.used
            .compare_exchange(from, to, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
    }

    /// Take the ledger for a process that the caller is about to fork.
    pub fn allocate(&self) -> bool {
        let free = self.change(0, std::process::id());
        if free {
            self.clear();
        }
        free
    }

    /// Take the ledger for the forked process, unless its parent was killed and the ledger was given up.
    pub fn take(&self, parent: u32) -> bool {
        self.change(parent, IN_USE)
    }

    /// Give up the ledger: `parent` was killed, perhaps before it could fork.
    pub fn give_up(&self, parent: u32) {
        self.change(parent, 0);
    }

    /// Start the ledger of a new process.
    pub fn start(&self) {
        self.used.store(IN_USE, Ordering::Relaxed);
        self.clear();
    }

    fn clear(&self) {
        for word in [&self.pid, &self.steps, &self.op, &self.doomed, &self.stands] {
            word.store(0, Ordering::Relaxed);
        }
        for entry in self.log.iter().flatten() {
            entry.store(0, Ordering::Relaxed);
        }
    }

    /// Free the ledger of a process that is gone.
    pub fn release(&self) {
        self.pid.store(0, Ordering::Relaxed);
        self.used.store(0, Ordering::Release);
    }

    pub fn in_use(&self) -> bool {
        self.used.load(Ordering::Acquire) != 0
    }

    /// Record which stand the process has reached.
    pub fn note_stand(&self, stand: Option<Stand>) {
        let code = stand.map_or(0, Stand::code);
        self.stands.store(code, Ordering::Release);
    }

    pub fn has_come_to(&self, stand: Stand) -> bool {
        self.stands.load(Ordering::Acquire) == stand.code()
    }

    pub fn next_version(&self) -> u32 {
        self.version.fetch_add(1, Ordering::Relaxed) + 1
    }

    pub fn begin(&self, step: &Step, now: u64) -> u32 {
        let number = self.steps.fetch_add(1, Ordering::Relaxed) + 1;
        let place = &self.log[number as usize % LOG];
        let what = u64::from(step.op as u8)
            | (u64::from(step.slot) << 8)
            | (u64::from(step.other) << 16)
            | (u64::from(step.at) << 24)
            | (u64::from(step.len) << 40);
        place[0].store(what, Ordering::Relaxed);
        place[1].store(
            (u64::from(number) << 32) | u64::from(step.arg),
            Ordering::Relaxed,
        );
        self.since.store(now, Ordering::Relaxed);
        self.op.store(step.op as u32 + 1, Ordering::Relaxed);
        number
    }

    pub fn end(&self, now: u64) {
        self.since.store(now, Ordering::Relaxed);
        self.op.store(0, Ordering::Relaxed);
    }

    /// Return the current operation.
    pub fn current(&self) -> Option<Op> {
        let code = self.op.load(Ordering::Relaxed);
        code.checked_sub(1)
            .and_then(|code| Op::from_code(code as u8))
    }

    /// Describe the last `n` steps, newest first.
    pub fn last_steps(&self, n: usize) -> String {
        let newest = self.steps.load(Ordering::Relaxed);
        let told = (0..n.min(LOG) as u32).filter_map(|back| {
            let number = newest.checked_sub(back).filter(|&n| n > 0)?;
            let [what, rest] = &self.log[number as usize % LOG];
            let (what, rest) = (what.load(Ordering::Relaxed), rest.load(Ordering::Relaxed));
            let op = Op::from_code(what as u8).filter(|_| rest >> 32 == u64::from(number))?;
            Some(format!(
                "{number} {} slot={} other={} at={} len={} arg={:#x}",
                op.name(),
                ((what >> 8) & 255) as usize % SLOTS,
                (what >> 16) & 255,
                (what >> 24) & 0xffff,
                (what >> 40) & 0xffff,
                rest as u32
            ))
        });
        told.collect::<Vec<_>>().join("; ")
    }
}

/// The purpose of a stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Pages merge.
    Merge,
    /// Some processes have protected pages.
    Protected,
    /// No process has protected pages any more.
    Free,
}

impl Phase {
    pub const ALL: [Self; 3] = [Self::Merge, Self::Protected, Self::Free];
}

/// A time in which no process works. The arena stores it as one number other than 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stand {
    /// The number of the stand, from 1.
    pub number: u32,
    pub phase: Phase,
}

impl Stand {
    fn code(self) -> u32 {
        (self.number << 2) | self.phase as u32
    }

    fn from_code(code: u32) -> Option<Self> {
        let phase = *Phase::ALL.get(code as usize & 3)?;
        (code != 0).then_some(Self {
            number: code >> 2,
            phase,
        })
    }
}

/// All shared state.
#[repr(C)]
pub struct Arena {
    pub seed: AtomicU64,
    pub allowed: AtomicU64,
    /// The number of workers in this round.
    pub workers: AtomicU32,
    /// Whether all processes are to end.
    pub stop: AtomicU32,
    /// The [`Stand`] that all are to reach; 0 while they work.
    pub stand: AtomicU32,
    /// The [`Stand`] that each control task has reached.
    pub task_stands: [AtomicU32; TASKS_MAX],
    /// Whether the kernel can protect pages from being read.
    pub has_rwp: AtomicU32,
    pub failures: AtomicU32,
    pub verified: AtomicU64,
    /// The size of the disk, if there is one.
    pub disk_pages: AtomicU32,
    counts: [[AtomicU64; ERRNOS]; OPS],
    /// What control tasks did: the time, and the operation with its errno.
    events: [[AtomicU64; 2]; EVENTS],
    next_event: AtomicU32,
    pub shared_pid: [AtomicU32; WORKERS_MAX],
    pub shared_addr: [AtomicU64; WORKERS_MAX],
    pub shared_pages: [[SharedPage; SHARED_PAGES]; WORKERS_MAX],
    pub blocks: [Block; BLOCKS],
}

impl Arena {
    /// Record which stand a control task has reached.
    pub fn note_task_stand(&self, task: usize, stand: Option<Stand>) {
        let code = stand.map_or(0, Stand::code);
        self.task_stands[task].store(code, Ordering::Release);
    }

    pub fn task_has_come_to(&self, task: usize, stand: Stand) -> bool {
        self.task_stands[task].load(Ordering::Acquire) == stand.code()
    }

    /// Count `op` as done (0) or as refused with an errno.
    pub fn count(&self, op: Op, errno: i32) {
        let errno = usize::try_from(errno).unwrap_or(0).min(ERRNOS - 1);
        self.counts[op as usize][errno].fetch_add(1, Ordering::Relaxed);
    }

    /// Record what a control task did.
    pub fn event(&self, op: Op, errno: i32, now: u64) {
        let at = self.next_event.fetch_add(1, Ordering::Relaxed) as usize % EVENTS;
        let what = ((op as u64) << 32) | u64::from(errno as u32);
        self.events[at][0].store(now, Ordering::Relaxed);
        self.events[at][1].store(what, Ordering::Relaxed);
    }

    /// Describe the last actions of control tasks, newest first, in milliseconds before `now`.
    pub fn last_events(&self, n: u32, now: u64) -> String {
        let next = self.next_event.load(Ordering::Relaxed);
        let told = (0..n.min(next)).filter_map(|back| {
            let [time, what] = &self.events[(next - 1 - back) as usize % EVENTS];
            let (time, what) = (time.load(Ordering::Relaxed), what.load(Ordering::Relaxed));
            let op = Op::from_code((what >> 32) as u8)?;
            let result = match what as u32 {
                0 => String::new(),
                errno => format!(" (errno {errno})"),
            };
            Some(format!(
                "-{} {}{result}",
                now.saturating_sub(time),
                op.name()
            ))
        });
        told.collect::<Vec<_>>().join(", ")
    }

    pub fn counted(&self, op: Op, errno: usize) -> u64 {
        self.counts[op as usize][errno].load(Ordering::Relaxed)
    }

    pub fn done(&self, op: Op) -> u64 {
        self.counted(op, 0)
    }

    /// Return how often the operation was done or refused.
    pub fn tried(&self, op: Op) -> u64 {
        (0..ERRNOS).map(|errno| self.counted(op, errno)).sum()
    }

    pub fn clear_counts(&self) {
        for count in self.counts.iter().flatten() {
            count.store(0, Ordering::Relaxed);
        }
        self.verified.store(0, Ordering::Relaxed);
    }

    /// Let all processes stand still, or continue.
    pub fn set_stand(&self, stand: Option<Stand>) {
        let code = stand.map_or(0, Stand::code);
        self.stand.store(code, Ordering::Release);
    }

    /// Return the stand that all are to reach. At the end of a round there is none.
    pub fn stand(&self) -> Option<Stand> {
        Stand::from_code(self.stand.load(Ordering::Acquire)).filter(|_| !self.stopping())
    }

    pub fn stopping(&self) -> bool {
        self.stop.load(Ordering::Relaxed) != 0 || self.failed()
    }

    /// Return whether an operation is allowed in this round.
    pub fn may(&self, op: Op) -> bool {
        Allowed(self.allowed.load(Ordering::Relaxed)).has(op)
    }

    /// Whether the kernel can protect pages from being read.
    pub fn has_rwp(&self) -> bool {
        self.has_rwp.load(Ordering::Relaxed) != 0
    }

    pub fn failed(&self) -> bool {
        self.failures.load(Ordering::Relaxed) != 0
    }

    pub fn fail(&self) {
        self.failures.fetch_add(1, Ordering::Relaxed);
    }

    /// Allocate a ledger for a child or a victim.
    pub fn allocate(&self) -> Option<u8> {
        let first = self.workers.load(Ordering::Relaxed) as usize;
        (first..BLOCKS)
            .find(|&i| self.blocks[i].allocate())
            .map(|i| i as u8)
    }

    /// Release the ledger, and the claims on shared pages, of a process that is gone.
    pub fn bury(&self, block: u8) {
        self.shared_pages
            .iter()
            .flatten()
            .for_each(|m| m.release(block));
        self.blocks[block as usize].release();
    }

    /// Give up ledgers for processes that `parent`, which is gone, did not fork any more.
    pub fn give_up_children(&self, parent: u32) {
        self.blocks.iter().for_each(|b| b.give_up(parent));
    }

    pub fn block_of(&self, pid: u32) -> Option<u8> {
        self.blocks
            .iter()
            .position(|b| b.in_use() && b.pid.load(Ordering::Relaxed) == pid)
            .map(|i| i as u8)
    }
}
