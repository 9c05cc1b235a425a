// SPDX-License-Identifier: GPL-2.0
//! A session in one boot: one engine after the other, on the same workloads.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::engine::Engine;
use crate::results::{self, Record};
use crate::{exact, phase, wall};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Exact,
    Wall,
}

impl Mode {
    pub fn name(self) -> &'static str {
        match self {
            Self::Exact => exact::MODE,
            Self::Wall => wall::MODE,
        }
    }
}

pub struct Session<'a> {
    pub mode: Mode,
    pub workloads: &'a [String],
    /// How often to measure each workload.
    pub runs: usize,
    /// The directory for the figures.
    pub out: &'a Path,
}

impl Session<'_> {
    /// Measure the engines in turn. Nothing stays merged in between.
    pub fn run(&self, engines: &[Engine]) -> Result<()> {
        prepare_guest()?;
        let mut records = Vec::new();
        for &engine in engines {
            self.run_engine(engine, &mut records)?;
        }
        Ok(())
    }

    /// Run one workload once. Load the module again first: memory that it kept from an earlier workload would
    /// not count as metadata of this one.
    fn run_once(&self, engine: Engine, name: &str) -> Result<Vec<Record>> {
        engine.load()?;
        if self.mode == Mode::Exact {
            // The profile needs the module's symbols as well.
            fs::copy("/proc/kallsyms", self.out.join("kallsyms")).context("kallsyms")?;
        }
        let records = match self.mode {
            Mode::Exact => exact::run(engine, name),
            Mode::Wall => wall::run(engine, name),
        }?;
        engine.unload()?;
        Ok(records)
    }

    fn run_engine(&self, engine: Engine, records: &mut Vec<Record>) -> Result<()> {
        for (index, name) in self.workloads.iter().enumerate() {
            println!(
                "[{}/{}] {} mode, {}: {name}",
                index + 1,
                self.workloads.len(),
                self.mode.name(),
                engine.name()
            );
            for _ in 0..self.runs {
                let run = self.run_once(engine, name);
                records.extend(run.with_context(|| format!("{} on {name}", engine.name()))?);
                // Save each time, so that a later failure cannot lose figures.
                let file = format!("{}.json", self.mode.name());
                results::save(&self.out.join(file), records)?;
                results::save(&self.out.join("phases.json"), &phase::all())?;
            }
        }
        Ok(())
    }
}

/// Allow huge pages only where a workload asks for them, and let khugepaged make none.
fn prepare_guest() -> Result<()> {
    let huge = Path::new("/sys/kernel/mm/transparent_hugepage");
    fs::write(huge.join("enabled"), "madvise").context("huge pages")?;
    fs::write(huge.join("khugepaged/scan_sleep_millisecs"), "100000000").context("khugepaged")?;
    Ok(())
}
