// SPDX-License-Identifier: GPL-2.0
//! Exact mode: pass by pass, on one CPU with one nanosecond per instruction.

use std::time::Duration;

use anyhow::{ensure, Result};

use crate::engine::{Engine, Pass, Stepper};
use crate::memory::KernelMemory;
use crate::phase;
use crate::results::{mean, median, Record, Sheet};
use crate::workers::{Facts, Workers};

/// How many passes a workload may take to converge.
const MOST_PASSES: usize = 8;
/// How many unchanged passes to measure with nothing skipped.
const IDLE_PASSES: usize = 3;
/// `smart_scan` skips a page longer the older it is, eight passes at most. It takes some passes to reach
/// that, and then nine are a whole round.
const AGEING_PASSES: usize = 12;
const SMART_PASSES: usize = 9;

pub const MODE: &str = "exact";

/// Run one workload on one engine and measure all but the lock holds.
pub fn run(engine: Engine, name: &str) -> Result<Vec<Record>> {
    let mut workers = Workers::start(name)?;
    let mut sheet = Sheet::new(name, engine.name(), MODE);
    let facts = workers.facts();
    println!("#   {} {name}: {} pages", engine.name(), facts.pages);
    if !engine.prepare(name, facts.use_zero_pages)? {
        return Ok(Vec::new());
    }
    let mut run = Run {
        engine,
        name,
        facts,
        smart: engine.has("smart_scan").then_some(1),
        sheet: &mut sheet,
    };
    let mut stepper = Stepper::new(engine)?;
    run.put_sizes();
    let before = quiet_memory()?;
    let noise = quiet_memory()?.growth(&before);
    run.converge(&mut stepper, &mut workers)?;
    run.metadata(&before, noise)?;
    run.idle(&mut stepper)?;
    workers.verify()?;
    drop(workers);
    Ok(sheet.into_records())
}

/// Return the kernel's memory use while the engine is stopped.
fn quiet_memory() -> Result<KernelMemory> {
    // The first read allocates what reading itself needs.
    KernelMemory::read()?;
    std::thread::sleep(Duration::from_millis(500));
    KernelMemory::read()
}

struct Run<'a> {
    engine: Engine,
    name: &'a str,
    facts: Facts,
    smart: Option<u64>,
    sheet: &'a mut Sheet,
}

impl Run<'_> {
    fn put(&mut self, metric: &str, value: f64, unit: &str) {
        self.sheet.put(self.smart, metric, value, unit);
    }

    fn put_sizes(&mut self) {
        self.put("pages", self.facts.pages as f64, "pages");
        self.put("expected_sharing", self.facts.expected as f64, "pages");
    }

    fn per_page(&self, cpu: u64) -> f64 {
        cpu as f64 / self.facts.pages as f64
    }

    /// Run a pass, as a phase of its own, and print its result.
    fn pass(
        &self,
        stepper: &mut Stepper,
        what: &str,
        number: usize,
        goal: Option<u64>,
    ) -> Result<Pass> {
        let what = format!("{what} {number}");
        phase::begin(self.engine.name(), self.name, &what, self.facts.pages);
        let pass = stepper.pass_to(goal)?;
        phase::end(pass.cpu);
        println!(
            "#   {} {what}: {:.0} instructions per page, scanned {}, sharing {} of {}",
            self.engine.name(),
            self.per_page(pass.cpu),
            pass.scanned,
            pass.saved,
            self.facts.expected
        );
        Ok(pass)
    }

    /// Return 99 % of the expected sharing.
    fn goal(&self) -> u64 {
        (self.facts.expected * 99).div_ceil(100)
    }

    /// Return the least number of passes. An engine needs time to learn which pages to leave alone.
    fn least_passes(&self) -> usize {
        if self.facts.is_volatile {
            MOST_PASSES
        } else {
            3
        }
    }

    /// Run passes from the first look at the pages until nothing is left to merge.
    fn converge(&mut self, stepper: &mut Stepper, workers: &mut Workers) -> Result<()> {
        let mut passes: Vec<Pass> = Vec::new();
        while passes.len() < MOST_PASSES {
            // No goal if it was reached before, or if there is none.
            let goal =
                Some(self.goal()).filter(|&goal| goal > 0 && passes.iter().all(|p| p.saved < goal));
            let pass = self.pass(stepper, "pass", passes.len() + 1, goal)?;
            let gained = pass.saved > passes.last().map_or(0, |p| p.saved);
            passes.push(pass);
            if passes.len() >= self.least_passes() && !gained && pass.saved >= self.goal() {
                break;
            }
            if self.facts.is_volatile {
                workers.rewrite()?;
            }
        }
        self.report_convergence(&passes);
        Ok(())
    }

    fn report_convergence(&mut self, passes: &[Pass]) {
        let last = passes.last().map_or(0, |p| p.saved);
        self.put("sharing", last as f64, "pages");
        if let Some(first) = passes.first() {
            let value = self.per_page(first.cpu);
            self.put("cpu_per_page_first", value, "instructions/page");
        }
        if self.facts.expected == 0 {
            return;
        }
        if let Some(n) = passes.iter().position(|p| p.saved >= self.goal()) {
            let (last, before) = (&passes[n], &passes[..n]);
            let count = last.passes + before.iter().map(|p| p.passes).sum::<u64>();
            let in_last = last.cpu_to_goal.unwrap_or(last.cpu);
            let cpu = in_last + before.iter().map(|p| p.cpu).sum::<u64>();
            self.put("passes_to_99", count as f64, "passes");
            self.put("cpu_to_99", cpu as f64, "instructions");
        }
        let before = std::iter::once(0).chain(passes.iter().map(|p| p.saved));
        let merging = passes
            .iter()
            .zip(before)
            .max_by_key(|(p, before)| p.saved.saturating_sub(*before));
        if let Some((pass, _)) = merging {
            let value = self.per_page(pass.cpu);
            self.put("cpu_per_page_merging", value, "instructions/page");
        }
    }

    fn metadata(&mut self, before: &KernelMemory, noise: i64) -> Result<()> {
        let after = quiet_memory()?;
        let bytes = after.growth(before);
        println!(
            "#   {} metadata: {bytes} bytes (by itself: {noise}): {}",
            self.engine.name(),
            after.changes(before)
        );
        self.put("metadata_bytes", bytes as f64, "bytes");
        let per_page = bytes as f64 / self.facts.pages as f64;
        self.put("metadata_bytes_per_page", per_page, "bytes/page");
        Ok(())
    }

    /// Run passes in which nothing changes.
    fn idle(&mut self, stepper: &mut Stepper) -> Result<()> {
        if self.smart.is_none() {
            let value = self.idle_passes(stepper, "idle", IDLE_PASSES)?;
            self.put_idle(None, median(value));
            return Ok(());
        }
        self.engine.write("smart_scan", 0)?;
        // Pages that were skipped until now are scanned first.
        stepper.pass()?;
        let value = self.idle_passes(stepper, "idle", IDLE_PASSES)?;
        self.put_idle(Some(0), median(value));
        self.engine.write("smart_scan", 1)?;
        stepper.passes(AGEING_PASSES)?;
        // Some passes skip nearly all, others nothing, so only the mean shows the cost.
        let value = self.idle_passes(stepper, "smart", SMART_PASSES)?;
        self.put_idle(Some(1), mean(&value));
        Ok(())
    }

    fn put_idle(&mut self, smart: Option<u64>, value: Option<f64>) {
        if let Some(value) = value {
            self.sheet
                .put(smart, "cpu_per_page_idle", value, "instructions/page");
        }
    }

    fn idle_passes(&self, stepper: &mut Stepper, what: &str, n: usize) -> Result<Vec<f64>> {
        let mut list = Vec::new();
        for number in 1..=n {
            let pass = self.pass(stepper, what, number, None)?;
            ensure!(
                pass.passes == 1,
                "{} made more than one pass",
                self.engine.name()
            );
            list.push(self.per_page(pass.cpu));
        }
        Ok(list)
    }
}
