// SPDX-License-Identifier: GPL-2.0
//! A process of a workload. It maps, fills and registers its VMAs as planned, reports that, and sleeps until
//! it gets a command.
//!
//! Commands are lines on standard input (`rewrite ROUND`, `verify`). The process ends at the end of the
//! input. Every answer is one line.

use std::io::{BufRead, Write};

use anyhow::{bail, ensure, Context, Result};
use rksm_test_lib::sys::{self, Forked};

use crate::content::{fill, Content, PAGE};
use crate::workload::{plan, Area, Child, Process};

const HUGE: usize = 2 << 20;

/// An anonymous mapping; it stays until the process ends.
pub struct Mapping {
    base: *mut u8,
    pages: usize,
}

impl Mapping {
    /// Map `pages` pages at a multiple of 2 MiB.
    pub fn new(pages: usize) -> Result<Self> {
        let length = pages * PAGE;
        // SAFETY: This is a fresh anonymous mapping, which replaces nothing of ours.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length + HUGE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error()).context("mmap");
        }
        let base = at as usize;
        let aligned = base.next_multiple_of(HUGE);
        // The surplus would be a part of the VMA, so unmap it.
        for (from, to) in [(base, aligned), (aligned + length, base + length + HUGE)] {
            // SAFETY: The range is an unused part of the mapping made above.
            let ret = unsafe { libc::munmap(from as *mut libc::c_void, to - from) };
            ensure!(from == to || ret == 0, "munmap");
        }
        Ok(Self {
            base: aligned as *mut u8,
            pages,
        })
    }

    pub fn advise(&mut self, advice: libc::c_int) -> Result<()> {
        // SAFETY: The range belongs to this mapping, which is only borrowed through `self`, so its content
        // may change.
        let ret = unsafe { libc::madvise(self.base.cast(), self.pages * PAGE, advice) };
        if ret != 0 {
            return Err(std::io::Error::last_os_error()).context("madvise");
        }
        Ok(())
    }

    /// Unmap page `index`; it must not be used any more.
    fn punch(&mut self, index: usize) -> Result<()> {
        assert!(index < self.pages);
        // SAFETY: The page lies in the mapping, and the caller does not use it again.
        let ret = unsafe { libc::munmap(self.base.add(index * PAGE).cast(), PAGE) };
        ensure!(ret == 0, "munmap");
        Ok(())
    }

    pub fn page(&mut self, index: usize) -> &mut [u8] {
        assert!(index < self.pages);
        // SAFETY: The page lies in the mapping, which is only borrowed through `self`. Only pages that the
        // plan does not use are ever unmapped. A page is always initialised: fresh ones are zero.
        unsafe { std::slice::from_raw_parts_mut(self.base.add(index * PAGE), PAGE) }
    }
}

struct Filled {
    area: Area,
    mapping: Mapping,
}

impl Filled {
    fn new(area: &Area, seed: u64) -> Result<Self> {
        let mut mapping = Mapping::new(area.span)?;
        if area.huge {
            mapping.advise(libc::MADV_HUGEPAGE)?;
        }
        mapping.advise(libc::MADV_MERGEABLE)?;
        if area.split {
            for index in (0..area.span).filter(|i| i % area.stride != 0) {
                mapping.punch(index)?;
            }
        }
        let mut filled = Self {
            area: area.clone(),
            mapping,
        };
        for place in 0..area.contents.len() {
            filled.put(place, area.contents[place], seed);
        }
        Ok(filled)
    }

    fn put(&mut self, place: usize, content: Content, seed: u64) {
        self.area.contents[place] = content;
        let page = self.mapping.page(place * self.area.stride);
        // A write, so that a zero page is also a page of its own.
        page[0] = 1;
        fill(content, seed, page);
    }

    fn verify(&mut self, seed: u64) -> Result<()> {
        let mut want = vec![0; PAGE];
        for place in 0..self.area.contents.len() {
            fill(self.area.contents[place], seed, &mut want);
            if self.mapping.page(place * self.area.stride) != want {
                bail!("page {place} holds something else than was written");
            }
        }
        Ok(())
    }
}

/// Fork the children of process `me`. In each child, fork its own children as well, and do its writes. Return
/// only in `me`, or in a child with its number as `me`.
fn fork_tree(process: &Process, root: &mut Filled, seed: u64) -> Result<()> {
    let mut me = 0;
    let mut next = 1;
    while next <= process.children.len() {
        let child: &Child = &process.children[next - 1];
        if child.parent == me {
            if let Forked::Child = sys::fork()? {
                sys::die_with_parent()?;
                me = next;
            }
        }
        next += 1;
    }
    if me == 0 {
        return Ok(());
    }
    for (place, content) in &process.children[me - 1].writes {
        root.put(*place, *content, seed);
    }
    println!("ready {}", std::process::id());
    // All processes end with the first one.
    loop {
        std::thread::park();
    }
}

/// Run process `index` of workload `name`.
pub fn run(name: &str, index: usize, seed: u64) -> Result<()> {
    sys::die_with_parent()?;
    let plan = plan(name, 1).context("no such workload")?;
    let process = plan.processes.get(index).context("no such process")?;
    let mut areas = process
        .areas
        .iter()
        .map(|a| Filled::new(a, seed))
        .collect::<Result<Vec<_>>>()?;
    if !process.children.is_empty() {
        fork_tree(process, &mut areas[0], seed)?;
    }
    println!("ready {}", std::process::id());
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        match line.split_once(' ').unwrap_or((&line, "")) {
            ("rewrite", round) => {
                let round = round.parse()?;
                for filled in &mut areas {
                    for place in filled.area.volatile.clone() {
                        let content = filled.area.rewritten(index, place, round);
                        filled.put(place, content, seed);
                    }
                }
                println!("rewritten");
            }
            ("verify", _) => {
                for filled in &mut areas {
                    filled.verify(seed)?;
                }
                println!("verified");
            }
            _ => bail!("worker: {line:?} is not understood"),
        }
        std::io::stdout().flush()?;
    }
    Ok(())
}
