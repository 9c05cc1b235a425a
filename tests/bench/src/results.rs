// SPDX-License-Identifier: GPL-2.0
//! A figure, in the form of results.json.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    pub workload: String,
    pub engine: String,
    pub mode: String,
    /// The value of the file `smart_scan` during the measurement; null if the engine has no such file.
    pub smart_scan: Option<u64>,
    pub metric: String,
    pub value: f64,
    pub unit: String,
}

/// The records of one workload on one engine.
pub struct Sheet {
    workload: String,
    engine: String,
    mode: String,
    records: Vec<Record>,
}

impl Sheet {
    pub fn new(workload: &str, engine: &str, mode: &str) -> Self {
        Self {
            workload: workload.into(),
            engine: engine.into(),
            mode: mode.into(),
            records: Vec::new(),
        }
    }

    pub fn put(&mut self, smart_scan: Option<u64>, metric: &str, value: f64, unit: &str) {
        self.records.push(Record {
            workload: self.workload.clone(),
            engine: self.engine.clone(),
            mode: self.mode.clone(),
            smart_scan,
            metric: metric.into(),
            // Smaller differences than a ten-thousandth are noise.
            value: (value * 1e4).round() / 1e4,
            unit: unit.into(),
        });
    }

    pub fn into_records(self) -> Vec<Record> {
        self.records
    }
}

/// Read a list from a JSON file.
pub fn load<T: DeserializeOwned>(file: &Path) -> Result<Vec<T>> {
    let text = fs::read_to_string(file).with_context(|| file.display().to_string())?;
    serde_json::from_str(&text).with_context(|| file.display().to_string())
}

/// Write a list to a JSON file.
pub fn save<T: Serialize>(file: &Path, list: &[T]) -> Result<()> {
    let text = serde_json::to_string_pretty(list)? + "\n";
    fs::write(file, text).with_context(|| file.display().to_string())
}

/// Return the median of the values; of an even number, the lower one of the middle two.
pub fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len().saturating_sub(1) / 2).copied()
}

pub fn mean(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

/// Return the smallest value that `share` of all values do not exceed.
pub fn percentile(sorted: &[u64], share: f64) -> Option<u64> {
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![]), None);
    }

    #[test]
    fn percentiles() {
        let values: Vec<u64> = (1..=100).collect();
        assert_eq!(percentile(&values, 0.5), Some(50));
        assert_eq!(percentile(&values, 0.99), Some(99));
        assert_eq!(percentile(&values, 1.0), Some(100));
        assert_eq!(percentile(&[], 0.5), None);
    }
}
