// SPDX-License-Identifier: GPL-2.0
//! A process that the engine disturbs: it faults and writes in an area that
//! is registered like any other, and measures how long each fault takes.

use std::time::{Duration, Instant};

use anyhow::{bail, Result};
use rksm_guest_tests::sys;

use crate::results::percentile;
use crate::worker::Mapping;

/// 16 MiB.
const PAGES: usize = 4096;
/// Between filling the area and writing to it again: time for the engine to
/// merge something.
const PAUSE: Duration = Duration::from_millis(50);

/// Fault latencies in ns.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Latency {
    pub median: u64,
    pub p99: u64,
    pub max: u64,
    pub faults: u64,
}

impl Latency {
    fn new(mut all: Vec<u64>) -> Option<Self> {
        all.sort_unstable();
        Some(Self {
            median: percentile(&all, 0.5)?,
            p99: percentile(&all, 0.99)?,
            max: percentile(&all, 1.0)?,
            faults: all.len() as u64,
        })
    }

    /// As one line, for the parent.
    fn line(&self) -> String {
        format!(
            "faults {} {} {} {}",
            self.median, self.p99, self.max, self.faults
        )
    }

    pub fn parse(line: &str) -> Result<Self> {
        let numbers: Vec<u64> = line
            .split(' ')
            .skip(1)
            .map(str::parse)
            .collect::<Result<_, _>>()?;
        let [median, p99, max, faults] = numbers[..] else {
            bail!("the bystander said {line:?}");
        };
        Ok(Self {
            median,
            p99,
            max,
            faults,
        })
    }
}

/// Minor faults of this process so far.
fn faults() -> Result<i64> {
    // SAFETY: all zero is a valid rusage.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: `usage` outlives the call.
    let ret = unsafe { libc::getrusage(libc::RUSAGE_SELF, &mut usage) };
    if ret != 0 {
        bail!(std::io::Error::last_os_error());
    }
    Ok(usage.ru_minflt)
}

struct Bystander {
    area: Mapping,
    times: Vec<u64>,
}

impl Bystander {
    /// Writes to the page, and keeps the time if that took a fault: of a page
    /// that was not there, or that had been merged.
    fn touch(&mut self, index: usize, value: u64) -> Result<()> {
        let word = &mut self.area.page(index)[..8];
        let before = faults()?;
        let start = Instant::now();
        word.copy_from_slice(&value.to_le_bytes());
        // The write must not move behind the clock.
        std::hint::black_box(&word);
        let time = start.elapsed();
        if faults()? > before {
            self.times.push(time.as_nanos() as u64);
        }
        Ok(())
    }

    /// Touches every page afresh, gives the engine time, and writes again.
    fn round(&mut self, round: u64) -> Result<()> {
        self.area.advise(libc::MADV_DONTNEED)?;
        for index in 0..PAGES {
            // Pairs of equal pages, so that there is something to merge.
            self.touch(index, (1 << 63) | (round << 32) | (index / 2) as u64)?;
        }
        std::thread::sleep(PAUSE);
        for index in 0..PAGES {
            self.touch(index, (1 << 62) | (round << 32) | index as u64)?;
        }
        Ok(())
    }
}

/// Takes at least `least` faults and prints their latency.
pub fn run(least: usize) -> Result<()> {
    sys::die_with_parent()?;
    let mut area = Mapping::new(PAGES)?;
    area.advise(libc::MADV_MERGEABLE)?;
    let mut bystander = Bystander {
        area,
        times: Vec::with_capacity(least + 2 * PAGES),
    };
    let mut round = 1;
    while bystander.times.len() < least {
        bystander.round(round)?;
        round += 1;
    }
    if let Some(latency) = Latency::new(bystander.times) {
        println!("{}", latency.line());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latencies_survive_the_pipe() {
        let latency = Latency::new((1..=1000).rev().collect()).unwrap();
        assert_eq!((latency.median, latency.p99, latency.max), (500, 990, 1000));
        assert_eq!(Latency::parse(&latency.line()).unwrap(), latency);
        assert!(Latency::parse("faults 1 2").is_err());
        assert!(Latency::new(Vec::new()).is_none());
    }

    #[test]
    fn only_faults_are_timed() {
        let mut bystander = Bystander {
            area: Mapping::new(8).unwrap(),
            times: Vec::new(),
        };
        bystander.touch(0, 1).unwrap();
        let first = bystander.times.len();
        assert!(first <= 1);
        for _ in 0..10 {
            bystander.touch(0, 2).unwrap();
        }
        assert!(bystander.times.len() < first + 10);
    }
}
