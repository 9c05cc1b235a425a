// SPDX-License-Identifier: GPL-2.0

//! The scan-time advisor: how many pages to scan before sleeping, so that a pass takes about the target time.
//!
//! Arithmetic only. The formulas are those of the scan-time advisor of in-tree KSM, in whole seconds and
//! percent. Where in-tree KSM would wrap around, values saturate here.

/// `pages_to_scan` while the advisor is off.
pub(crate) const DEFAULT_PAGES_TO_SCAN: u32 = 100;

/// The advisor assumes that scanning may take at least this much of one CPU, in percent.
const MIN_CPU: u64 = 10;
/// The weight of the latest pass in the average, in percent.
const WEIGHT: u64 = 30;

/// The settings of the advisor: the files `advisor_*` in sysfs.
pub(crate) struct Limits {
    /// The most of one CPU that scanning may take, in percent.
    pub(crate) max_cpu: u32,
    /// `pages_to_scan` when the advisor is switched on.
    pub(crate) min_pages: u64,
    /// The highest `pages_to_scan`.
    pub(crate) max_pages: u64,
    /// The target time of a pass, in seconds; not 0.
    pub(crate) target_secs: u64,
}

/// The scan-time advisor. It is protected by its own mutex in [`Engine`](super::Engine).
pub(crate) struct Advisor {
    /// The settings.
    pub(crate) limits: Limits,
    /// What the advisor remembers; `None` while it is off.
    memory: Option<Memory>,
}

/// What the advisor remembers from pass to pass. It starts from scratch when the advisor is switched on.
#[derive(Default)]
struct Memory {
    /// The average duration of passes, each in percent of the one before it.
    change: u64,
    /// The duration of the last pass, in seconds; 0 before the first.
    secs: u64,
    /// The CPU time at the last advice, or at the beginning of the first pass, in nanoseconds.
    cpu_nanos: Option<u64>,
    /// Whether the advisor was on when the current pass began.
    under_way: bool,
}

/// The result of a pass: the new `pages_to_scan`, and what it was computed from.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Advice {
    /// The duration of the pass, in seconds; at least 1.
    pub(crate) secs: u64,
    /// How much of one CPU the pass took, in percent; at least 1.
    pub(crate) cpu_percent: u32,
    /// How many pages to scan before sleeping from now on.
    pub(crate) pages: u32,
}

/// Returns `part` in percent of `whole`; 0 if that is 0.
fn percent(part: u64, whole: u64) -> u64 {
    part.saturating_mul(100).checked_div(whole).unwrap_or(0)
}

/// Converts a number, limited to the largest `u32`.
fn to_u32(number: u64) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

impl Advisor {
    /// Creates an advisor that is switched off, with in-tree KSM's default settings.
    pub(crate) fn new() -> Self {
        Self {
            limits: Limits {
                max_cpu: 70,
                min_pages: 500,
                max_pages: 30_000,
                target_secs: 200,
            },
            memory: None,
        }
    }

    /// Whether the advisor is switched on.
    pub(crate) fn is_on(&self) -> bool {
        self.memory.is_some()
    }

    /// Switches the advisor on or off. Returns the new `pages_to_scan` if this is a change.
    pub(crate) fn switch(&mut self, on: bool) -> Option<u32> {
        if on == self.is_on() {
            return None;
        }
        self.memory = on.then(Memory::default);
        Some(if on {
            to_u32(self.limits.min_pages)
        } else {
            DEFAULT_PAGES_TO_SCAN
        })
    }

    /// Notes that a pass begins. `cpu_nanos` is the CPU time of the scanning thread so far.
    pub(crate) fn start_pass(&mut self, cpu_nanos: u64) {
        if let Some(memory) = &mut self.memory {
            memory.under_way = true;
            memory.cpu_nanos.get_or_insert(cpu_nanos);
        }
    }

    /// Returns advice at the end of a pass that took `millis` milliseconds with `pages` as `pages_to_scan`.
    ///
    /// `None` if the advisor is off, or was switched on in the middle of the pass.
    pub(crate) fn end_pass(&mut self, millis: u64, cpu_nanos: u64, pages: u32) -> Option<Advice> {
        let limits = &self.limits;
        let memory = self.memory.as_mut().filter(|memory| memory.under_way)?;
        memory.under_way = false;

        let secs = (millis / 1000).max(1);
        let cpu_before = memory.cpu_nanos.replace(cpu_nanos).unwrap_or(cpu_nanos);
        let cpu_millis = cpu_nanos.saturating_sub(cpu_before) / 1_000_000;
        let cpu_percent = percent(cpu_millis, secs.saturating_mul(1000)).max(1);

        // The target time in percent of the actual time.
        let factor = percent(limits.target_secs, secs).max(1);
        let secs_before = if memory.secs == 0 { secs } else { memory.secs };
        memory.secs = secs;
        let change = percent(secs, secs_before).max(1);
        let old_part = memory.change.saturating_mul(100 - WEIGHT);
        let change = old_part.saturating_add(change.saturating_mul(WEIGHT)) / 100;
        memory.change = change;

        let pages = u64::from(pages);
        let wanted = percent(pages, factor).saturating_mul(change) / 100;
        let per_percent = (pages / cpu_percent).max(1);
        let pages = wanted
            .min(per_percent.saturating_mul(limits.max_cpu.into()))
            .max(per_percent.saturating_mul(MIN_CPU))
            .min(limits.max_pages);
        Some(Advice {
            secs,
            cpu_percent: to_u32(cpu_percent),
            pages: to_u32(pages),
        })
    }
}
