// SPDX-License-Identifier: GPL-2.0
//! Drive the scanning thread: for a number of passes, until a condition holds, or one batch at a time.

use std::cell::Cell;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};

use crate::engine::{self, wait_for, Counters};
use crate::proc;
use crate::region::Region;

/// How long a pass over a test's few pages may take on a slow emulated CPU.
pub const PASS_LIMIT: Duration = Duration::from_secs(30);

/// Longer than any page has to stay unchanged before it may merge again (64 s at most, for a page that was
/// written soon after it merged).
const HOLD_STILL: Duration = Duration::from_secs(80);

thread_local! {
    static ANCHORED: Cell<u32> = const { Cell::new(0) };
}

/// Register this process by a VMA without a single page.
///
/// With nothing registered, the thread sleeps and `full_scans` stands still. An empty VMA keeps it running
/// and appears in no counter.
fn anchor() -> Result<()> {
    let me = std::process::id();
    if ANCHORED.get() != me {
        let area = Region::new(1)?;
        area.advise(0, 1, libc::MADV_MERGEABLE)?;
        std::mem::forget(area);
        ANCHORED.set(me);
    }
    Ok(())
}

/// Start merging at full pace.
pub fn start() -> Result<()> {
    anchor()?;
    engine::write("pages_to_scan", 1_000_000)?;
    engine::write("sleep_millisecs", 1)?;
    engine::write("run", 1)
}

/// Stop merging. Merged pages stay merged.
pub fn stop() -> Result<()> {
    engine::write("run", 0)
}

/// Wait for `n` whole passes that begin after the call. The thread keeps running.
pub fn passes(n: u64) -> Result<()> {
    start()?;
    // The pass under way, if any, began before the call.
    let goal = engine::read("full_scans")? + n + 1;
    wait_for(&format!("{n} full passes"), PASS_LIMIT, || {
        Ok(engine::read("full_scans")? >= goal)
    })
}

/// Scan until `probe` holds, for at most `max` passes.
pub fn until(what: &str, max: u64, mut probe: impl FnMut() -> Result<bool>) -> Result<()> {
    for _ in 0..max {
        passes(1)?;
        if probe()? {
            return Ok(());
        }
    }
    bail!(
        "{what} did not come about in {max} passes; {:?}",
        engine::counters()?
    )
}

/// Scan until `probe` holds. Give up after twelve passes, or later if pages that were written soon after they
/// merged may still be held back at that time.
pub fn until_still(what: &str, mut probe: impl FnMut() -> Result<bool>) -> Result<()> {
    let end = Instant::now() + HOLD_STILL;
    until(what, 12, &mut probe).or_else(|err| {
        while Instant::now() < end {
            if until(what, 1, &mut probe).is_ok() {
                return Ok(());
            }
        }
        Err(err)
    })
}

/// Scan until the counters have these values; see [`until_still`].
pub fn until_merged(shared: u64, sharing: u64) -> Result<()> {
    until_still(&format!("shared={shared} sharing={sharing}"), || {
        let c = engine::counters()?;
        Ok(c.shared == shared && c.sharing == sharing)
    })
}

/// Run single batches. The thread sleeps for a minute after each; a changed `sleep_millisecs` wakes it for
/// the next.
pub struct Stepper {
    sleep: u32,
}

impl Stepper {
    /// Set `pages_to_scan` to `pages`. No batch runs yet.
    pub fn new(pages: u32) -> Result<Self> {
        anchor()?;
        engine::write("run", 0)?;
        engine::write("pages_to_scan", pages)?;
        engine::write("sleep_millisecs", 60_000)?;
        Ok(Self { sleep: 60_000 })
    }

    /// Run one batch and return the counters after it.
    pub fn step(&mut self) -> Result<Counters> {
        let before = engine::counters()?;
        if engine::read("run")? == 1 {
            self.sleep ^= 1;
            engine::write("sleep_millisecs", self.sleep)?;
        } else {
            engine::write("run", 1)?;
        }
        wait_for("batch", PASS_LIMIT, || {
            let now = engine::counters()?;
            Ok(now.scanned != before.scanned || now.full_scans != before.full_scans)
        })?;
        self.settle()
    }

    /// Wait until the batch is over: the thread sleeps, and no counter changes.
    fn settle(&self) -> Result<Counters> {
        let thread = proc::kernel_thread(engine::thread_name())?.context("no scanning thread")?;
        let mut last = engine::counters()?;
        loop {
            std::thread::sleep(Duration::from_millis(40));
            let now = engine::counters()?;
            if now == last && proc::stat(thread)?.state == 'S' {
                return Ok(now);
            }
            last = now;
        }
    }
}
