// SPDX-License-Identifier: GPL-2.0
//! Both engines side by side, for the terminal.

use crate::results::Record;

/// What identifies a row: all but the engine.
type Key<'a> = (&'a str, &'a str, &'a str, Option<u64>);

/// Format a figure with as many digits as are significant.
pub fn figure(value: f64) -> String {
    let digits = if value.fract() == 0.0 || value.abs() >= 1000.0 {
        0
    } else if value.abs() >= 10.0 {
        1
    } else {
        3
    };
    let plain = format!("{value:.digits$}");
    let (whole, rest) = match plain.split_once('.') {
        Some((whole, rest)) => (whole, format!(".{rest}")),
        None => (plain.as_str(), String::new()),
    };
    let mut grouped = String::new();
    let digits: Vec<char> = whole.chars().collect();
    for (i, c) in digits.iter().enumerate() {
        let left = digits.len() - i;
        if i > 0 && left % 3 == 0 && digits[i - 1].is_ascii_digit() {
            grouped.push(',');
        }
        grouped.push(*c);
    }
    grouped + &rest
}

/// Return one line per workload, mode and metric: the figures of in-tree KSM and rksm, and their ratio.
pub fn plain(records: &[Record]) -> String {
    let mut out = format!(
        "{:<20} {:<24} {:>5} {:>16} {:>16} {:>9}  {}\n",
        "workload", "metric", "smart", "ksm", "rksm", "ksm/rksm", "unit"
    );
    for (key, unit) in rows(records) {
        let value = |engine| find(records, key, engine);
        let (ksm, rksm) = (value("ksm"), value("rksm"));
        let ratio = match (ksm, rksm) {
            (Some(a), Some(b)) if b > 0.0 => format!("{:.2}", a / b),
            _ => "-".into(),
        };
        let cell = |v: Option<f64>| v.map_or("-".into(), figure);
        let smart = key.3.map_or("-".into(), |s| s.to_string());
        out += &format!(
            "{:<20} {:<24} {:>5} {:>16} {:>16} {:>9}  {}\n",
            key.0,
            key.2,
            smart,
            cell(ksm),
            cell(rksm),
            ratio,
            unit
        );
    }
    out
}

/// Return the rows in the order in which they were measured. An engine without `smart_scan` is shown beside
/// the other's default, and its idle figure beside both.
fn rows(records: &[Record]) -> Vec<(Key<'_>, &str)> {
    let mut rows: Vec<(Key<'_>, &str)> = Vec::new();
    for r in records {
        let key = (
            r.workload.as_str(),
            r.mode.as_str(),
            r.metric.as_str(),
            r.smart_scan,
        );
        let covered = rows.iter().any(|(k, _)| {
            (k.0, k.1, k.2) == (key.0, key.1, key.2) && (k.3 == key.3 || key.3.is_none())
        });
        if !covered {
            rows.push((key, &r.unit));
        }
    }
    // By workload first, as the engines were measured one after the other.
    let place = |key: &Key<'_>| {
        rows.iter()
            .position(|(k, _)| (k.0, k.1) == (key.0, key.1))
            .unwrap_or(0)
    };
    let mut order: Vec<usize> = (0..rows.len()).collect();
    order.sort_by_key(|&i| (place(&rows[i].0), i));
    order.into_iter().map(|i| rows[i]).collect()
}

fn find(records: &[Record], key: Key<'_>, engine: &str) -> Option<f64> {
    records
        .iter()
        .find(|r| {
            (r.workload.as_str(), r.mode.as_str(), r.metric.as_str()) == (key.0, key.1, key.2)
                && r.engine == engine
                && (r.smart_scan == key.3 || r.smart_scan.is_none())
        })
        .map(|r| r.value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::Sheet;

    #[test]
    fn figures_are_grouped() {
        assert_eq!(figure(1_370_000_123.0), "1,370,000,123");
        assert_eq!(figure(100.0), "100");
        assert_eq!(figure(15.25), "15.2");
        assert_eq!(figure(-1234.0), "-1,234");
    }

    #[test]
    fn an_engine_without_the_knob_stands_beside_the_other() {
        let mut ksm = Sheet::new("unique", "ksm", "exact");
        ksm.put(Some(0), "cpu_per_page_idle", 5000.0, "instructions/page");
        let mut rksm = Sheet::new("unique", "rksm", "exact");
        rksm.put(None, "cpu_per_page_idle", 100.0, "instructions/page");
        let mut all = ksm.into_records();
        all.extend(rksm.into_records());
        let table = plain(&all);
        assert_eq!(table.lines().count(), 2);
        assert!(table.contains("50.00"), "{table}");
    }
}
