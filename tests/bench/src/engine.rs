// SPDX-License-Identifier: GPL-2.0
//! Both engines behind one interface.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use rksm_test_lib::{module, proc};

use crate::workload;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    Ksm,
    Rksm,
}

impl Engine {
    pub fn name(self) -> &'static str {
        match self {
            Self::Ksm => "ksm",
            Self::Rksm => "rksm",
        }
    }

    pub fn thread_name(self) -> &'static str {
        match self {
            Self::Ksm => "ksmd",
            Self::Rksm => "rksmd",
        }
    }

    pub fn thread(self) -> Result<u32> {
        proc::kernel_thread(self.thread_name())?
            .with_context(|| format!("there is no {}", self.thread_name()))
    }

    fn path(self, knob: &str) -> PathBuf {
        Path::new("/sys/kernel/mm").join(self.name()).join(knob)
    }

    /// Return whether the engine has this file.
    pub fn has(self, knob: &str) -> bool {
        self.path(knob).exists()
    }

    pub fn read(self, knob: &str) -> Result<u64> {
        let path = self.path(knob);
        let text =
            fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        text.trim_end()
            .parse()
            .with_context(|| format!("{} reads {text:?}", path.display()))
    }

    pub fn write(self, knob: &str, value: u64) -> Result<()> {
        let path = self.path(knob);
        fs::write(&path, value.to_string())
            .with_context(|| format!("writing {value} to {}", path.display()))
    }

    /// Write to a file if the engine has it.
    pub fn set(self, knob: &str, value: u64) -> Result<()> {
        if self.has(knob) {
            self.write(knob, value)?;
        }
        Ok(())
    }

    /// Make the engine ready to be measured. The in-tree one always is.
    pub fn load(self) -> Result<()> {
        if self == Self::Rksm && !module::loaded() {
            module::load()?;
        }
        self.reset()
    }

    pub fn unload(self) -> Result<()> {
        self.reset()?;
        if self == Self::Rksm {
            module::unload_soon(Duration::from_secs(10))?;
        }
        Ok(())
    }

    /// Stop, unmerge everything, and check that.
    pub fn reset(self) -> Result<()> {
        // Writing the value that `run` already has does nothing, so write all three.
        for run in [0, 2, 0] {
            self.write("run", run)?;
        }
        // The in-tree thread may still sleep between two wake-ups. Only a change of this file wakes it, and
        // only if it sees the change.
        self.write("sleep_millisecs", DEFAULT_SLEEP)?;
        std::thread::sleep(Duration::from_millis(100));
        for counter in ["pages_shared", "pages_sharing"] {
            let left = self.read(counter)?;
            ensure!(
                left == 0,
                "{} still has {counter}={left} after unmerging",
                self.name()
            );
        }
        self.set("smart_scan", 1)?;
        self.set("use_zero_pages", 0)?;
        self.set("merge_eagerly", 0)
    }

    /// Reset the engine, and apply the settings of workload `name`. Return false if the engine lacks the file
    /// for it.
    pub fn prepare(self, name: &str, use_zero_pages: bool) -> Result<bool> {
        self.reset()?;
        let wanted = [
            ("use_zero_pages", use_zero_pages),
            ("merge_eagerly", workload::is_eager(name)),
        ];
        for (knob, _) in wanted.iter().filter(|(_, on)| *on) {
            if !self.has(knob) {
                println!("#   {} has no {knob}: nothing to measure", self.name());
                return Ok(false);
            }
            self.write(knob, 1)?;
        }
        Ok(true)
    }

    /// Return the thread's CPU time in ns. It is exact while the thread sleeps.
    pub fn cpu(self, thread: u32) -> Result<u64> {
        Ok(proc::cpu_time(thread)
            .with_context(|| format!("CPU time of {}", self.thread_name()))?
            .as_nanos() as u64)
    }

    /// Return the pages that merging has saved: `pages_sharing`, and the mappings of the kernel's zero page
    /// if the engine counts these.
    pub fn saved(self) -> Result<u64> {
        let zero = match self.has("ksm_zero_pages") {
            true => self.read("ksm_zero_pages")?,
            false => 0,
        };
        Ok(self.read("pages_sharing")? + zero)
    }
}

/// The result of one pass.
#[derive(Clone, Copy, Debug)]
pub struct Pass {
    /// The passes that ended in it: one, unless the engine does not stop there.
    pub passes: u64,
    pub cpu: u64,
    pub scanned: u64,
    pub saved: u64,
    /// The CPU time until the requested sharing was reached.
    pub cpu_to_goal: Option<u64>,
}

/// Runs single passes. Each wake-up scans more pages than there are, so it ends with the pass, and the thread
/// then sleeps. A changed `sleep_millisecs` wakes it for the next one.
pub struct Stepper {
    engine: Engine,
    thread: u32,
    sleep: u64,
    started: bool,
}

/// The polling interval in guest time. Each poll costs the engine a context switch, so poll only while there
/// is something to see.
const POLL: Duration = Duration::from_millis(10);
const CLOSE_POLL: Duration = Duration::from_millis(1);
const PASS_LIMIT: Duration = Duration::from_secs(300);
const SLEEP: u64 = 600_000;
const DEFAULT_SLEEP: u64 = 20;

impl Stepper {
    /// Set up the engine. `run` must be 0; nothing starts yet.
    pub fn new(engine: Engine) -> Result<Self> {
        engine.write("pages_to_scan", 100_000_000)?;
        engine.write("sleep_millisecs", SLEEP)?;
        let thread = engine.thread()?;
        // Read them once, so that the kernel's allocations for reading are done.
        for counter in ["full_scans", "pages_scanned"] {
            engine.read(counter)?;
        }
        engine.saved()?;
        engine.cpu(thread)?;
        proc::stat(thread)?;
        Ok(Self {
            engine,
            thread,
            sleep: SLEEP,
            started: false,
        })
    }

    pub fn pass(&mut self) -> Result<Pass> {
        self.pass_to(None)
    }

    /// Run one pass, and note when `goal` pages are saved.
    pub fn pass_to(&mut self, goal: Option<u64>) -> Result<Pass> {
        let engine = self.engine;
        let scans = engine.read("full_scans")?;
        let scanned = engine.read("pages_scanned")?;
        let cpu = engine.cpu(self.thread)?;
        if self.started {
            self.sleep ^= 1;
            engine.write("sleep_millisecs", self.sleep)?;
        } else {
            engine.write("run", 1)?;
            self.started = true;
        }
        let end = Instant::now() + PASS_LIMIT;
        let mut goal = goal;
        let mut cpu_to_goal = None;
        loop {
            std::thread::sleep(if goal.is_some() { CLOSE_POLL } else { POLL });
            if let Some(pages) = goal {
                if engine.saved()? >= pages {
                    // The thread is off the CPU while this process runs, so the time is exact.
                    cpu_to_goal = Some(engine.cpu(self.thread)? - cpu);
                    goal = None;
                }
            }
            if engine.read("full_scans")? > scans && proc::stat(self.thread)?.state == 'S' {
                break;
            }
            if Instant::now() > end {
                bail!("{}: no pass within {PASS_LIMIT:?}", engine.name());
            }
        }
        Ok(Pass {
            passes: engine.read("full_scans")? - scans,
            cpu: engine.cpu(self.thread)? - cpu,
            scanned: engine.read("pages_scanned")? - scanned,
            saved: engine.saved()?,
            cpu_to_goal,
        })
    }

    pub fn passes(&mut self, n: usize) -> Result<Vec<Pass>> {
        (0..n).map(|_| self.pass()).collect()
    }
}
