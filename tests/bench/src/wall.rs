// SPDX-License-Identifier: GPL-2.0
//! Wall mode: the engine at full speed on one of two CPUs, and its effect on another process.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};

use crate::bystander::Latencies;
use crate::engine::Engine;
use crate::results::{Record, Sheet};
use crate::workers::Workers;

pub const MODE: &str = "wall";
/// The number of the bystander's faults per run.
const FAULTS: usize = 20_000;
const POLL: Duration = Duration::from_millis(1);
/// How long merging may take on a slow emulated CPU.
const LIMIT: Duration = Duration::from_secs(300);
/// How many passes to wait for when nothing is left to merge.
const PASSES: u64 = 3;

/// Run one workload on one engine once.
pub fn run(engine: Engine, name: &str) -> Result<Vec<Record>> {
    let mut workers = Workers::start(name)?;
    let facts = workers.facts();
    if !engine.prepare(name, facts.use_zero_pages)? {
        return Ok(Vec::new());
    }
    let mut sheet = Sheet::new(name, engine.name(), MODE);
    let smart = engine.has("smart_scan").then_some(1);
    sheet.put(smart, "pages", facts.pages as f64, "pages");
    sheet.put(smart, "expected_sharing", facts.expected as f64, "pages");
    let race = Race::run(engine, &mut workers)?;
    if let Some(goal) = race.goal {
        sheet.put(smart, "passes_to_99", goal.passes as f64, "passes");
        sheet.put(smart, "cpu_to_99", goal.cpu as f64, "ns");
        sheet.put(smart, "seconds_to_99", goal.time.as_secs_f64(), "s");
    }
    sheet.put(smart, "sharing", race.saved as f64, "pages");
    let Latencies {
        all: latency,
        fresh,
        broken,
    } = bystander(FAULTS)?;
    sheet.put(smart, "fault_median", latency.median as f64, "ns");
    sheet.put(smart, "fault_p99", latency.p99 as f64, "ns");
    sheet.put(smart, "fault_max", latency.max as f64, "ns");
    sheet.put(smart, "fault_fresh_p99", fresh.p99 as f64, "ns");
    if let Some(broken) = broken {
        sheet.put(smart, "fault_broken_p99", broken.p99 as f64, "ns");
    }
    println!(
        "#   {} {name}: {}, sharing {} of {}, faults: median {} ns, p99 {} ns, max {} ns of {}",
        engine.name(),
        race.goal
            .map_or("no goal".into(), |g| format!("99 % after {:.2?}", g.time)),
        race.saved,
        facts.expected,
        latency.median,
        latency.p99,
        latency.max,
        latency.faults
    );
    println!("#     fresh: {fresh:?}, merged before: {broken:?}");
    engine.write("run", 0)?;
    workers.verify()?;
    drop(workers);
    Ok(sheet.into_records())
}

/// The effort to reach 99 % of the expected sharing.
#[derive(Clone, Copy)]
struct Goal {
    passes: u64,
    cpu: u64,
    time: Duration,
}

struct Race {
    goal: Option<Goal>,
    saved: u64,
}

impl Race {
    /// Start the engine at full speed, wait for the goal and for some more passes, and leave the engine
    /// running.
    fn run(engine: Engine, workers: &mut Workers) -> Result<Self> {
        let facts = workers.facts();
        let thread = engine.thread()?;
        let goal_pages = (facts.expected * 99).div_ceil(100);
        let scans = engine.read("full_scans")?;
        let cpu = engine.cpu(thread)?;
        engine.write("pages_to_scan", 100_000_000)?;
        engine.write("sleep_millisecs", 0)?;
        let start = Instant::now();
        engine.write("run", 1)?;
        let mut goal = None;
        let mut passes = 0;
        let mut until = PASSES;
        while passes < until {
            std::thread::sleep(POLL);
            let now = engine.read("full_scans")? - scans;
            if goal.is_none() && facts.expected > 0 && engine.saved()? >= goal_pages {
                goal = Some(Goal {
                    // The pass in progress counts.
                    passes: now + 1,
                    cpu: engine.cpu(thread)? - cpu,
                    time: start.elapsed(),
                });
                until = now + PASSES;
            }
            if now > passes && facts.is_volatile {
                workers.rewrite()?;
            }
            passes = now;
            // No workload needs so many passes, so the goal will not be reached.
            if goal.is_none() && facts.expected > 0 {
                until = until.max(3 * PASSES);
            }
            if start.elapsed() > LIMIT {
                bail!("{}: no {until} passes within {LIMIT:?}", engine.name());
            }
        }
        Ok(Self {
            goal,
            saved: engine.saved()?,
        })
    }
}

/// Run the bystander to its end.
fn bystander(faults: usize) -> Result<Latencies> {
    let output = Command::new(std::env::current_exe()?)
        .args(["bystander", &faults.to_string()])
        .output()
        .context("starting the bystander")?;
    ensure!(
        output.status.success(),
        "the bystander failed: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Latencies::parse(String::from_utf8_lossy(&output.stdout).trim_end())
}
