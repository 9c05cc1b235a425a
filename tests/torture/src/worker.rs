// SPDX-License-Identifier: GPL-2.0
//! A process that follows its plan, on memory whose ledger knows every byte.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result};
use rand::Rng;
use rksm_test_lib::pageflags::{merged_frames, Span};
use rksm_test_lib::sys;

use crate::arena::{
    Arena, Block, Entry, Phase, MAY_BE_ZERO, PAGES, SHARED_PAGES, SLOTS, WORKERS_MAX,
};
use crate::ops;
use crate::ops::process::Child;
use crate::page::{Bodies, Desc, Kind, Place, Words, PAGE, WORDS};
use crate::plan::{Allowed, Op, Plan, Step, Who};
use crate::raw::{self, Mem};

/// The exit status of a process that found and reported an error.
pub const STATUS_WRONG: i32 = 3;
/// How many steps lie between two checks of all pages.
const LOOK_EVERY: u32 = 64;

/// Why an operation ends early.
#[derive(Debug)]
pub enum Stop {
    /// The kernel refused; the ledger is right all the same.
    Refused(i32),
    /// A page has wrong content, or another error occurred.
    Fault(String),
}

impl From<io::Error> for Stop {
    fn from(e: io::Error) -> Self {
        Self::Refused(e.raw_os_error().unwrap_or(libc::EIO))
    }
}

impl From<anyhow::Error> for Stop {
    fn from(e: anyhow::Error) -> Self {
        match e
            .downcast_ref::<io::Error>()
            .and_then(io::Error::raw_os_error)
        {
            Some(errno) => Self::Refused(errno),
            None => Self::Fault(format!("{e:#}")),
        }
    }
}

pub type Act = Result<(), Stop>;

/// How long a process works.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// Until the round stops.
    Stopped,
    /// For this number of steps.
    Steps(u32),
}

pub struct Worker {
    pub arena: &'static Arena,
    pub block: &'static Block,
    /// The number of its block: the owner in its pages.
    pub id: u8,
    pub who: Who,
    pub slots: [Option<Mem>; SLOTS],
    pub shared_pages: Option<Mem>,
    pub children: Vec<Child>,
    /// The number of children forked so far.
    pub forks: u32,
    pub disk: Option<File>,
    /// NUMA nodes with memory.
    pub nodes: Vec<u32>,
    pub bodies: Bodies,
    pub leaving: bool,
}

/// The disk to read with O_DIRECT, if the controller found one.
pub const DISK_ENV: &str = "RKSM_TORTURE_DISK";

impl Worker {
    /// Set up a process that begins with untouched memory and the ledger `id`.
    pub fn new(arena: &'static Arena, id: u8, who: Who) -> Result<Self> {
        let block = &arena.blocks[id as usize];
        block.start();
        block.number.store(who.number, Ordering::Relaxed);
        block.life.store(who.life, Ordering::Relaxed);
        block.child.store(who.child, Ordering::Relaxed);
        block.pid.store(std::process::id(), Ordering::Relaxed);
        let disk = std::env::var(DISK_ENV).ok().map(|path| {
            File::options()
                .read(true)
                .custom_flags(libc::O_DIRECT)
                .open(&path)
                .context(path)
        });
        let mut this = Self {
            arena,
            block,
            id,
            who,
            slots: Default::default(),
            shared_pages: None,
            children: Vec::new(),
            forks: 0,
            disk: disk.transpose()?,
            nodes: rksm_test_lib::numa::nodes().unwrap_or_default(),
            bodies: Bodies::new(),
            leaving: false,
        };
        let mut rng = Who {
            child: who.child | (1 << 31),
            ..who
        }
        .rng();
        for slot in 0..SLOTS {
            ops::memory::map(&mut this, slot, rng.random())
                .map_err(|e| anyhow::anyhow!("first mapping: {e:?}"))?;
        }
        Ok(this)
    }

    /// Map the shared pages, which other processes may write to.
    pub fn open_shared_pages(&mut self) -> Act {
        let mem = Mem::new(SHARED_PAGES)?;
        mem.advise(0, SHARED_PAGES, libc::MADV_MERGEABLE)?;
        let number = self.id as usize;
        for page in &self.arena.shared_pages[number] {
            // A writer may be about to find that the process before this one is gone. Or it was killed while
            // it had the claim, and its parent, which stands still, has not reaped it.
            while !page.claim(self.id) {
                self.stand_still()?;
                std::thread::sleep(Duration::from_millis(1));
            }
            page.reset(Desc::ZERO);
            page.release(self.id);
        }
        self.arena.shared_addr[number].store(mem.addr() as u64, Ordering::Relaxed);
        self.arena.shared_pid[number].store(std::process::id(), Ordering::Release);
        self.shared_pages = Some(mem);
        Ok(())
    }

    /// Work until the plan, the round or the process ends. Return the exit status.
    pub fn run(&mut self, mut plan: Plan, until: Until) -> i32 {
        let ended = self.work(&mut plan, until).and_then(|()| self.finish());
        match ended {
            Ok(()) => 0,
            Err(Stop::Refused(errno)) => self.complain(&format!("errno {errno} at the end")),
            Err(Stop::Fault(what)) => self.complain(&what),
        }
    }

    fn work(&mut self, plan: &mut Plan, until: Until) -> Act {
        loop {
            let steps = self.block.steps.load(Ordering::Relaxed);
            if self.leaving
                || self.arena.stopping()
                || matches!(until, Until::Steps(n) if steps >= n)
            {
                return Ok(());
            }
            self.stand_still()?;
            let Some(step) = plan.next() else {
                return Ok(());
            };
            self.step(&step)?;
            ops::process::look_after(self)?;
            if self.block.steps.load(Ordering::Relaxed) % LOOK_EVERY == 0 {
                self.verify_all()?;
            }
        }
    }

    fn step(&mut self, step: &Step) -> Act {
        self.block.begin(step, raw::now());
        let result = ops::act(self, step);
        self.block.end(raw::now());
        match result {
            Ok(()) => self.arena.count(step.op, 0),
            Err(Stop::Refused(errno)) => self.arena.count(step.op, errno),
            Err(fault) => return Err(fault),
        }
        Ok(())
    }

    /// Stand still as long as all do, with some pages protected in the phase for that.
    pub fn stand_still(&mut self) -> Act {
        let (mut last, mut held) = (None, None);
        while let Some(stand) = self.arena.stand() {
            if last != Some(stand) {
                held = None;
                if stand.phase == Phase::Protected {
                    held = ops::rwp::hold(self, stand.number)?;
                }
                last = Some(stand);
                self.block.note_stand(last);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        if last.is_none() {
            return Ok(());
        }
        // Protected pages must not be touched.
        drop(held);
        self.block.note_stand(None);
        self.verify_all()
    }

    /// Wait for the children and check all pages once more.
    fn finish(&mut self) -> Act {
        self.verify_all()?;
        ops::process::wait_for_all(self)?;
        self.verify_all()
    }

    /// Report an error, which ends the run.
    pub fn complain(&self, what: &str) -> i32 {
        self.arena.fail();
        let w = self.who;
        raw::say(&format!(
            "# FAULT in process {} life {} child {} (pid {}, owner {}), seed {}: {what}\n\
             # its last steps: {}\n\
             # control tasks, milliseconds ago: {}\n",
            w.number,
            w.life,
            w.child,
            std::process::id(),
            self.id,
            w.seed,
            self.block.last_steps(24),
            self.arena.last_events(48, raw::now())
        ));
        STATUS_WRONG
    }

    // --- the ledger ---

    pub fn entry(&self, slot: usize, page: usize) -> &'static Entry {
        &self.block.entries[slot][page]
    }

    /// The number of pages in `slot`; 0 if it is empty.
    pub fn pages(&self, slot: usize) -> usize {
        self.slots[slot].as_ref().map_or(0, Mem::pages)
    }

    /// Apply a step to the present mappings. Return slot, first page, and number of pages.
    pub fn range(&self, step: &Step) -> Result<(usize, usize, usize), Stop> {
        self.range_of(usize::from(step.slot) % SLOTS, step.at, step.len)
    }

    /// Do the same for any slot. An empty slot has no range.
    pub fn range_of(&self, slot: usize, at: u16, len: u16) -> Result<(usize, usize, usize), Stop> {
        let pages = self.pages(slot);
        if pages == 0 {
            return Err(Stop::Refused(libc::ENOENT));
        }
        let i = usize::from(at) % pages;
        Ok((slot, i, usize::from(len).min(pages - i)))
    }

    pub fn mem(&mut self, slot: usize) -> Result<&mut Mem, Stop> {
        self.slots[slot].as_mut().ok_or(Stop::Refused(libc::ENOENT))
    }

    /// Record that the pages read as zeroes from now on.
    pub fn set_zero(&self, slot: usize, i: usize, n: usize, op: Op) {
        let step = self.block.steps.load(Ordering::Relaxed);
        for k in i..i + n {
            self.entry(slot, k).set(Desc::ZERO, 0);
            self.entry(slot, k).note(op, step);
        }
    }

    /// Record that the pages may read as zeroes from now on.
    pub fn set_maybe_zero(&self, slot: usize, i: usize, n: usize, op: Op) {
        let step = self.block.steps.load(Ordering::Relaxed);
        for k in i..i + n {
            let entry = self.entry(slot, k);
            entry.set(entry.desc(), MAY_BE_ZERO);
            entry.note(op, step);
        }
    }

    /// Write a whole page.
    pub fn put(&mut self, slot: usize, i: usize, desc: Desc, op: Op) -> Act {
        let mut page = [0; WORDS];
        self.bodies.render(desc, &mut page);
        self.mem(slot)?.write(i, &page);
        let step = self.block.steps.load(Ordering::Relaxed);
        self.entry(slot, i).set(desc, 0);
        self.entry(slot, i).note(op, step);
        Ok(())
    }

    /// Return the ingredients of a descriptor for page `i` that no page has had before.
    pub fn place(&self, slot: usize, i: usize) -> (Place, u32) {
        let place = Place {
            owner: self.id,
            slot: slot as u8,
            page: (i % PAGES) as u16,
        };
        (place, self.block.next_version())
    }

    // --- verification ---

    pub fn verify(&self, slot: usize, i: usize, n: usize) -> Act {
        let Some(mem) = &self.slots[slot] else {
            return Ok(());
        };
        let (mut have, mut want) = ([0; WORDS], [0; WORDS]);
        let now = raw::now();
        for k in i..i + n {
            let entry = self.entry(slot, k);
            mem.read(k, &mut have);
            self.bodies.render(entry.desc(), &mut want);
            if have == want {
                entry.seen(now);
                continue;
            }
            if entry.may_be_zero() && given_up(mem, k, &have, &want) {
                // Once its content is gone, it stays gone.
                entry.set(Desc::ZERO, 0);
                continue;
            }
            return Err(self.wrong(mem, slot, k, &have));
        }
        self.arena.verified.fetch_add(n as u64, Ordering::Relaxed);
        Ok(())
    }

    fn wrong(&self, mem: &Mem, slot: usize, k: usize, have: &Words) -> Stop {
        let entry = self.entry(slot, k);
        let want = entry.desc();
        let mut again = [0; WORDS];
        mem.read(k, &mut again);
        let still = if again == *have {
            "still so"
        } else {
            "not so when read again"
        };
        let addr = mem.addr() + k * PAGE;
        let span = Span {
            pid: std::process::id(),
            addr,
            pages: 1,
        };
        Stop::Fault(format!(
            "page {slot}:{k} at {addr:#x} ({} pages in all{}): {}; {still}; pagemap and flags: {}; \
             last seen right {} ms ago; \
             its history, newest first: {}",
            mem.pages(),
            if entry.may_be_zero() { ", may be zero" } else { "" },
            self.bodies.diagnose(have, want),
            evidence(span),
            (raw::now() as u32).wrapping_sub(entry.last_seen()),
            entry.history()
        ))
    }

    pub fn verify_all(&mut self) -> Act {
        for slot in 0..SLOTS {
            self.verify(slot, 0, self.pages(slot))?;
        }
        self.verify_shared_pages()
    }

    /// Check the shared pages, except those that a writer has claimed.
    fn verify_shared_pages(&self) -> Act {
        let Some(mem) = &self.shared_pages else {
            return Ok(());
        };
        let (mut have, mut want) = ([0; WORDS], [0; WORDS]);
        for (i, page) in self.arena.shared_pages[self.id as usize].iter().enumerate() {
            if !page.claim(self.id) {
                continue;
            }
            mem.read(i, &mut have);
            let expected = [Some(page.desc()), page.alternative()];
            let right = expected.into_iter().flatten().any(|desc| {
                self.bodies.render(desc, &mut want);
                have == want
            });
            let desc = page.desc();
            page.release(self.id);
            if !right {
                return Err(Stop::Fault(format!(
                    "shared page {i}: {} (or {:?})",
                    self.bodies.diagnose(&have, desc),
                    expected[1].map(|d| d.to_string())
                )));
            }
            self.arena.verified.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Return the class of the body in page `i`, if it is one.
    pub fn class_at(&self, slot: usize, i: usize) -> Option<u8> {
        let entry = self.entry(slot, i);
        let desc = entry.desc();
        let kind = desc.kind()?;
        (!entry.may_be_zero() && matches!(kind, Kind::Class | Kind::Stamped))
            .then(|| desc.class_of())
    }
}

/// Return whether page `k`, read as `have`, was given up and taken. It may have been taken during the read:
/// then it begins like `want`, continues with zeroes, and is all zeroes when read again.
fn given_up(mem: &Mem, k: usize, have: &Words, want: &Words) -> bool {
    let mut again = [0; WORDS];
    have.iter().zip(want).all(|(&h, &w)| h == 0 || h == w) && {
        mem.read(k, &mut again);
        again.iter().all(|&w| w == 0)
    }
}

/// Describe what the kernel says about a page.
fn evidence(span: Span) -> String {
    let word = |file: &str, at: u64| -> io::Result<u64> {
        let mut raw = [0; 8];
        File::open(file)?.read_exact_at(&mut raw, at * 8)?;
        Ok(u64::from_le_bytes(raw))
    };
    let entry = word("/proc/self/pagemap", (span.addr / PAGE) as u64);
    let flags = match entry {
        Ok(e) if e >> 63 != 0 => word("/proc/kpageflags", e & ((1 << 55) - 1)),
        _ => Ok(0),
    };
    let merged = merged_frames(span);
    format!(
        "{entry:x?} {flags:x?} (merged: {merged:x?}); {}",
        vma(span.addr)
    )
}

/// Return the flags of the mapping that contains `addr`.
fn vma(addr: usize) -> String {
    let text = std::fs::read_to_string("/proc/self/smaps").unwrap_or_default();
    let mut here = false;
    for line in text.lines() {
        let range = line
            .split_whitespace()
            .next()
            .and_then(|r| r.split_once('-'));
        let range = range.and_then(|(a, b)| {
            let parse = |n| usize::from_str_radix(n, 16).ok();
            Some(parse(a)?..parse(b)?)
        });
        if let Some(range) = range {
            here = range.contains(&addr);
        } else if here && line.starts_with("VmFlags:") {
            return line.to_string();
        }
    }
    String::new()
}

/// Run a forked worker. Return its exit status.
pub fn main(arena: &'static Arena, who: Who, allowed: Allowed) -> i32 {
    let begin = || -> Result<Worker> {
        sys::die_with_parent()?;
        // The scanning thread has nice 5, and must get enough CPU time.
        raw::be_nice(10)?;
        let mut worker = Worker::new(arena, who.number as u8, who)?;
        anyhow::ensure!((who.number as usize) < WORKERS_MAX, "too many workers");
        worker
            .open_shared_pages()
            .map_err(|stop| anyhow::anyhow!("shared pages: {stop:?}"))?;
        Ok(worker)
    };
    match begin() {
        Ok(mut worker) => worker.run(Plan::new(who, allowed), Until::Stopped),
        Err(e) => {
            arena.fail();
            raw::say(&format!("# process {} cannot begin: {e:#}\n", who.number));
            STATUS_WRONG
        }
    }
}
