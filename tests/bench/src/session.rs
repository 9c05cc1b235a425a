// SPDX-License-Identifier: GPL-2.0
//! A boot's worth of measuring: one engine after the other, the same workloads.

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
    /// How often each is measured.
    pub runs: usize,
    /// Where the figures go.
    pub out: &'a Path,
}

impl Session<'_> {
    /// Measures the engines in turn; in between, nothing stays merged.
    pub fn run(&self, engines: &[Engine]) -> Result<()> {
        prepare_guest()?;
        let mut records = Vec::new();
        for &engine in engines {
            self.run_engine(engine, &mut records)?;
        }
        Ok(())
    }

    /// One run of one workload. The module is loaded for it anew: what it has
    /// kept of an earlier workload would not count as metadata of this one.
    fn run_once(&self, engine: Engine, name: &str) -> Result<Vec<Record>> {
        engine.load()?;
        if self.mode == Mode::Exact {
            // The profile needs the module's symbols, too.
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
                // Each time, so that what comes later cannot cost what there is.
                let file = format!("{}.json", self.mode.name());
                results::save(&self.out.join(file), records)?;
                results::save(&self.out.join("phases.json"), &phase::all())?;
            }
        }
        Ok(())
    }
}

/// Huge pages only where a workload asks for them, and none made later.
fn prepare_guest() -> Result<()> {
    let huge = Path::new("/sys/kernel/mm/transparent_hugepage");
    fs::write(huge.join("enabled"), "madvise").context("huge pages")?;
    fs::write(huge.join("khugepaged/scan_sleep_millisecs"), "100000000").context("khugepaged")?;
    Ok(())
}
