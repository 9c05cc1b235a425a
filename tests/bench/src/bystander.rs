// SPDX-License-Identifier: GPL-2.0
//! A process that the engine disturbs: it faults and writes in a VMA that is registered like any other, and
//! measures the duration of each fault.

use std::time::{Duration, Instant};

use anyhow::{bail, Result};
use rksm_test_lib::sys;

use crate::results::percentile;
use crate::worker::Mapping;

/// 16 MiB.
const PAGES: usize = 4096;
/// The time between filling the VMA and writing to it again, in which the engine can merge pages.
const PAUSE: Duration = Duration::from_millis(50);

/// Fault latencies in ns.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Latency {
    pub median: u64,
    pub p99: u64,
    pub max: u64,
    pub faults: u64,
}

/// The latencies of all faults and of the two kinds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Latencies {
    /// All of them.
    pub all: Latency,
    /// Faults on pages that did not exist.
    pub fresh: Latency,
    /// Faults on merged pages; `None` if the engine merged none in time.
    pub broken: Option<Latency>,
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

    fn words(&self) -> String {
        format!("{} {} {} {}", self.median, self.p99, self.max, self.faults)
    }

    fn from_words(words: &[u64]) -> Option<Self> {
        let &[median, p99, max, faults] = words else {
            return None;
        };
        Some(Self {
            median,
            p99,
            max,
            faults,
        })
    }
}

impl Latencies {
    fn new(fresh: Vec<u64>, broken: Vec<u64>) -> Option<Self> {
        Some(Self {
            all: Latency::new(fresh.iter().chain(&broken).copied().collect())?,
            fresh: Latency::new(fresh)?,
            broken: Latency::new(broken),
        })
    }

    /// Print the figures as one line, for the parent.
    fn line(&self) -> String {
        let broken = self.broken.map(|broken| format!(" {}", broken.words()));
        format!(
            "faults {} {}{}",
            self.all.words(),
            self.fresh.words(),
            broken.unwrap_or_default()
        )
    }

    pub fn parse(line: &str) -> Result<Self> {
        let numbers: Vec<u64> = line
            .split(' ')
            .skip(1)
            .map(str::parse)
            .collect::<Result<_, _>>()?;
        let mut each = numbers.chunks(4).map(Latency::from_words);
        match (each.next(), each.next(), each.next(), each.next()) {
            (Some(Some(all)), Some(Some(fresh)), None, None) => Ok(Self {
                all,
                fresh,
                broken: None,
            }),
            (Some(Some(all)), Some(Some(fresh)), Some(broken @ Some(_)), None) => {
                Ok(Self { all, fresh, broken })
            }
            _ => bail!("the bystander printed {line:?}"),
        }
    }
}

/// Return the number of minor faults of this process so far.
fn faults() -> Result<i64> {
    // SAFETY: All zeroes are a valid rusage.
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
    fresh: Vec<u64>,
    broken: Vec<u64>,
}

impl Bystander {
    /// Write to the page. Return the time if that took a fault, on a page that did not exist or was merged.
    fn touch(&mut self, index: usize, value: u64) -> Result<Option<u64>> {
        let word = &mut self.area.page(index)[..8];
        let before = faults()?;
        let start = Instant::now();
        word.copy_from_slice(&value.to_le_bytes());
        // The compiler must not move the write behind the second reading of the clock.
        std::hint::black_box(&word);
        let time = start.elapsed();
        Ok((faults()? > before).then_some(time.as_nanos() as u64))
    }

    /// Touch every page for the first time, give the engine time, and write again.
    fn round(&mut self, round: u64) -> Result<()> {
        self.area.advise(libc::MADV_DONTNEED)?;
        for index in 0..PAGES {
            // Pairs of equal pages, so that some can merge.
            let time = self.touch(index, (1 << 63) | (round << 32) | (index / 2) as u64)?;
            self.fresh.extend(time);
        }
        std::thread::sleep(PAUSE);
        for index in 0..PAGES {
            let time = self.touch(index, (1 << 62) | (round << 32) | index as u64)?;
            self.broken.extend(time);
        }
        Ok(())
    }
}

/// Take at least `least` faults and print their latency.
pub fn run(least: usize) -> Result<()> {
    sys::die_with_parent()?;
    let mut area = Mapping::new(PAGES)?;
    area.advise(libc::MADV_MERGEABLE)?;
    let mut bystander = Bystander {
        area,
        fresh: Vec::with_capacity(least + PAGES),
        broken: Vec::with_capacity(least + PAGES),
    };
    let mut round = 1;
    while bystander.fresh.len() + bystander.broken.len() < least {
        bystander.round(round)?;
        round += 1;
    }
    if let Some(latencies) = Latencies::new(bystander.fresh, bystander.broken) {
        println!("{}", latencies.line());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latencies_survive_the_pipe() {
        let some: Vec<u64> = (1..=1000).rev().collect();
        let latencies = Latencies::new(some.clone(), Vec::new()).unwrap();
        let all = latencies.all;
        assert_eq!((all.median, all.p99, all.max), (500, 990, 1000));
        assert_eq!(Latencies::parse(&latencies.line()).unwrap(), latencies);
        let latencies = Latencies::new(some, vec![7000; 1000]).unwrap();
        assert_eq!((latencies.all.p99, latencies.fresh.p99), (7000, 990));
        assert_eq!(latencies.broken.unwrap().faults, 1000);
        assert_eq!(Latencies::parse(&latencies.line()).unwrap(), latencies);
        assert!(Latencies::parse("faults 1 2").is_err());
        assert!(Latencies::new(Vec::new(), Vec::new()).is_none());
    }

    #[test]
    fn only_faults_are_timed() {
        let mut bystander = Bystander {
            area: Mapping::new(8).unwrap(),
            fresh: Vec::new(),
            broken: Vec::new(),
        };
        bystander.touch(0, 1).unwrap();
        let faults = (0..10).filter_map(|_| bystander.touch(0, 2).unwrap());
        assert!(faults.count() < 10);
    }
}
