// SPDX-License-Identifier: GPL-2.0

//! How many pages to look at before sleeping, so that a pass takes about as long as it should.
//!
//! Arithmetic only; the formulas are those of the scan-time advisor of in-tree KSM, in whole seconds and
//! percent. What would wrap around there stops at the end here.

/// Pages before sleeping when nothing advises.
pub(crate) const DEFAULT_PAGES_TO_SCAN: u32 = 100;

/// The least that is assumed of a CPU to be there for scanning, in percent.
const MIN_CPU: u64 = 10;
/// How much the newest pass counts in the average, in percent.
const WEIGHT: u64 = 30;

/// What the advisor is to keep to.
pub(crate) struct Limits {
    /// The most of one CPU that scanning may take, in percent.
    pub(crate) max_cpu: u32,
    /// The pages that it starts with.
    pub(crate) min_pages: u64,
    /// The most pages that it may say.
    pub(crate) max_pages: u64,
    /// How long a pass should take, in seconds; not 0.
    pub(crate) target_secs: u64,
}

/// The scan-time advisor.
pub(crate) struct Advisor {
    pub(crate) limits: Limits,
    /// What is remembered; `None` when switched off.
    memory: Option<Memory>,
}

/// What is remembered from pass to pass. Starts anew when the advisor is switched on.
#[derive(Default)]
struct Memory {
    /// Average of how long passes took, each in percent of the one before it.
    change: u64,
    /// How long the last pass took, in seconds; 0: there was none.
    secs: u64,
    /// CPU time when the advice was given last, or when the first pass began, in nanoseconds.
    cpu_nanos: Option<u64>,
    /// Whether the pass under way began with the advisor switched on.
    under_way: bool,
}

/// What came of a pass.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Advice {
    /// How long it took, in seconds; at least 1.
    pub(crate) secs: u64,
    /// How much of one CPU it took, in percent; at least 1.
    pub(crate) cpu_percent: u32,
    /// The pages to look at before sleeping from now on.
    pub(crate) pages: u32,
}

fn percent(part: u64, whole: u64) -> u64 {
    part.saturating_mul(100).checked_div(whole).unwrap_or(0)
}

fn to_u32(number: u64) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

impl Advisor {
    /// An advisor that is switched off.
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

    /// Whether it is switched on.
    pub(crate) fn is_on(&self) -> bool {
        self.memory.is_some()
    }

    /// Switches it on or off. Returns the pages to look at before sleeping, if that is a change.
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

    /// Notes that a pass begins. `cpu_nanos`: the CPU time of the scanning thread so far.
    pub(crate) fn start_pass(&mut self, cpu_nanos: u64) {
        if let Some(memory) = &mut self.memory {
            memory.under_way = true;
            memory.cpu_nanos.get_or_insert(cpu_nanos);
        }
    }

    /// Gives advice at the end of a pass that took `millis`, with so many `pages` before each sleep.
    /// `None` when switched off, or when it was switched on in the middle of the pass.
    pub(crate) fn end_pass(&mut self, millis: u64, cpu_nanos: u64, pages: u32) -> Option<Advice> {
        let limits = &self.limits;
        let memory = self.memory.as_mut().filter(|memory| memory.under_way)?;
        memory.under_way = false;

        let secs = (millis / 1000).max(1);
        let cpu_before = memory.cpu_nanos.replace(cpu_nanos).unwrap_or(cpu_nanos);
        let cpu_millis = cpu_nanos.saturating_sub(cpu_before) / 1_000_000;
        let cpu_percent = percent(cpu_millis, secs.saturating_mul(1000)).max(1);

        // How long it should take in percent of what it took.
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
