// SPDX-License-Identifier: GPL-2.0
//! The records of QEMU's plugin, and how they are added to the results.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::exact;
use crate::phase::Phase;
use crate::results::{self, median, Record, Sheet};

/// The longest hold of one kind of lock in one phase.
#[derive(Debug, PartialEq)]
pub struct Hold {
    pub phase: u64,
    pub kind: String,
    pub count: u64,
    pub max: u64,
    pub caller: u64,
}

/// How often a translation block ran in one phase, and how many instructions it has.
#[derive(Debug, PartialEq)]
pub struct Block {
    pub phase: u64,
    pub addr: u64,
    pub execs: u64,
    pub insns: u64,
}

#[derive(Debug, Default, PartialEq)]
pub struct Trace {
    pub holds: Vec<Hold>,
    pub blocks: Vec<Block>,
}

impl Trace {
    pub fn load(dir: &Path) -> Result<Self> {
        let file = dir.join("trace");
        let text = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
        Self::parse(&text)
    }

    fn parse(text: &str) -> Result<Self> {
        let mut trace = Self::default();
        for line in text.lines() {
            trace
                .add(line)
                .with_context(|| format!("the plugin wrote {line:?}"))?;
        }
        Ok(trace)
    }

    fn add(&mut self, line: &str) -> Option<()> {
        let words: Vec<&str> = line.split(' ').collect();
        let number = |at: usize| words.get(at)?.parse::<u64>().ok();
        let hex = |at: usize| u64::from_str_radix(words.get(at)?, 16).ok();
        match *words.first()? {
            "hold" => self.holds.push(Hold {
                phase: number(1)?,
                kind: words.get(2)?.to_string(),
                count: number(3)?,
                max: number(4)?,
                caller: hex(5)?,
            }),
            "block" => self.blocks.push(Block {
                phase: number(1)?,
                addr: hex(2)?,
                execs: number(3)?,
                insns: number(4)?,
            }),
            _ => return None,
        }
        Some(())
    }
}

/// Return the longest holds per workload and engine, over all its phases.
fn longest(phases: &[Phase], trace: &Trace) -> Vec<Record> {
    let by_number: HashMap<u64, &Phase> = phases.iter().map(|p| (p.number, p)).collect();
    let mut records = Vec::new();
    let mut done: Vec<(&str, &str)> = Vec::new();
    for phase in phases {
        let whose = (phase.workload.as_str(), phase.engine.as_str());
        if done.contains(&whose) {
            continue;
        }
        done.push(whose);
        let mut sheet = Sheet::new(whose.0, whose.1, exact::MODE);
        for (kind, metric) in [("ptl", "ptl_hold_max"), ("mmap_lock", "mmap_lock_hold_max")] {
            let max = trace
                .holds
                .iter()
                .filter(|h| h.kind == kind)
                .filter(|h| {
                    by_number
                        .get(&h.phase)
                        .is_some_and(|p| (p.workload.as_str(), p.engine.as_str()) == whose)
                })
                .map(|h| h.max)
                .max();
            if let Some(max) = max {
                sheet.put(None, metric, max as f64, "instructions");
            }
        }
        records.extend(sheet.into_records());
    }
    records
}

/// A figure of several runs. results.json has the median, spread.json all values.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    #[serde(flatten)]
    pub median: Record,
    pub min: f64,
    pub max: f64,
    pub runs: usize,
}

/// Combine the values of the same figure in all runs.
fn spread(records: &[Record]) -> Vec<Spread> {
    let key = |r: &Record| {
        let Record {
            workload,
            engine,
            metric,
            ..
        } = r;
        (
            workload.clone(),
            engine.clone(),
            metric.clone(),
            r.smart_scan,
        )
    };
    let mut order = Vec::new();
    let mut groups: HashMap<_, Vec<&Record>> = HashMap::new();
    for record in records {
        let group = groups.entry(key(record)).or_default();
        if group.is_empty() {
            order.push(key(record));
        }
        group.push(record);
    }
    order
        .iter()
        .filter_map(|key| {
            let group = &groups[key];
            let values: Vec<f64> = group.iter().map(|r| r.value).collect();
            let value = median(values.clone())?;
            Some(Spread {
                median: Record {
                    value,
                    ..group[0].clone()
                },
                min: values.iter().copied().fold(f64::INFINITY, f64::min),
                max: values.iter().copied().fold(f64::NEG_INFINITY, f64::max),
                runs: values.len(),
            })
        })
        .collect()
}

/// Write results.json and spread.json to `dir`, from the figures there.
pub fn join(dir: &Path) -> Result<()> {
    let mut records: Vec<Record> = Vec::new();
    let exact = dir.join("exact.json");
    if exact.exists() {
        records.extend(results::load::<Record>(&exact)?);
        let phases: Vec<Phase> = results::load(&dir.join("phases.json"))?;
        records.extend(longest(&phases, &Trace::load(dir)?));
    }
    let wall = dir.join("wall.json");
    if wall.exists() {
        let spread = spread(&results::load::<Record>(&wall)?);
        results::save(&dir.join("spread.json"), &spread)?;
        records.extend(spread.into_iter().map(|s| s.median));
    }
    results::save(&dir.join("results.json"), &records)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn phase(number: u64, engine: &str) -> Phase {
        Phase {
            number,
            workload: "unique".into(),
            engine: engine.into(),
            what: format!("pass {number}"),
            pages: 10,
            cpu: 1000,
        }
    }

    #[test]
    fn holds_go_to_their_engine() {
        let text = "hold 1 ptl 10 90 ffff\nhold 2 ptl 10 120 ffff\n\
            hold 3 ptl 10 70 ffff\nhold 3 mmap_lock 2 500 ffff\n";
        let trace = Trace::parse(text).unwrap();
        let phases = [phase(1, "ksm"), phase(2, "ksm"), phase(3, "rksm")];
        let found: Vec<(String, String, f64)> = longest(&phases, &trace)
            .into_iter()
            .map(|r| (r.engine, r.metric, r.value))
            .collect();
        let want = [
            ("ksm", "ptl_hold_max", 120.0),
            ("rksm", "ptl_hold_max", 70.0),
            ("rksm", "mmap_lock_hold_max", 500.0),
        ]
        .map(|(e, m, v)| (e.to_string(), m.to_string(), v));
        assert_eq!(found, want);
    }

    #[test]
    fn runs_become_a_median_with_its_spread() {
        let mut sheet = Sheet::new("unique", "ksm", "wall");
        for value in [5.0, 9.0, 1.0] {
            sheet.put(Some(1), "fault_p99", value, "ns");
            sheet.put(Some(1), "fault_max", 2.0 * value, "ns");
        }
        let all = spread(&sheet.into_records());
        let figures: Vec<(&str, f64, f64, f64, usize)> = all
            .iter()
            .map(|s| {
                (
                    s.median.metric.as_str(),
                    s.median.value,
                    s.min,
                    s.max,
                    s.runs,
                )
            })
            .collect();
        let want = [
            ("fault_p99", 5.0, 1.0, 9.0, 3),
            ("fault_max", 10.0, 2.0, 18.0, 3),
        ];
        assert_eq!(figures, want);
    }

    #[test]
    fn what_is_not_understood_is_an_error() {
        assert!(Trace::parse("hold 1 ptl 10\n").is_err());
        assert!(Trace::parse("block 1 ff 2 6\n").is_ok());
    }
}
