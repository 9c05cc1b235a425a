// SPDX-License-Identifier: GPL-2.0
//! results.json in readable form: Markdown tables and plots.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::machine::Machine;
use crate::plot::{self, Bars};
use crate::results::{self, Record};
use crate::table::figure;
use crate::trace::Spread;
use crate::{exact, targets, wall};

/// A metric and its presentation.
struct Metric {
    mode: &'static str,
    name: &'static str,
    /// The `smart_scan` setting of the figure; `None` takes any.
    smart_scan: Option<u64>,
    title: &'static str,
    unit: &'static str,
    /// The file of the plot.
    plot: Option<&'static str>,
}

const fn metric(
    mode: &'static str,
    name: &'static str,
    title: &'static str,
    unit: &'static str,
) -> Metric {
    Metric {
        mode,
        name,
        smart_scan: None,
        title,
        unit,
        plot: None,
    }
}

const fn plotted(metric: Metric, plot: &'static str) -> Metric {
    Metric {
        plot: Some(plot),
        ..metric
    }
}

const fn smart(metric: Metric, smart_scan: u64) -> Metric {
    Metric {
        smart_scan: Some(smart_scan),
        ..metric
    }
}

const IDLE: &str = "cpu_per_page_idle";

static METRICS: [Metric; 17] = [
    metric(
        exact::MODE,
        "sharing",
        "Pages shared when merging was done",
        "pages",
    ),
    metric(
        exact::MODE,
        "passes_to_99",
        "Passes until 99 % of the expected sharing",
        "passes",
    ),
    plotted(
        metric(
            exact::MODE,
            "cpu_to_99",
            "CPU until 99 % of the expected sharing",
            "instructions",
        ),
        "cpu-to-99.svg",
    ),
    plotted(
        metric(
            exact::MODE,
            "cpu_per_page_first",
            "First pass",
            "instructions per page",
        ),
        "first.svg",
    ),
    plotted(
        metric(
            exact::MODE,
            "cpu_per_page_merging",
            "The pass that merges most",
            "instructions per page",
        ),
        "merging.svg",
    ),
    plotted(
        smart(
            metric(
                exact::MODE,
                IDLE,
                "A later pass, nothing changed, nothing skipped (smart_scan=0)",
                "instructions per page",
            ),
            0,
        ),
        "idle.svg",
    ),
    plotted(
        smart(
            metric(
                exact::MODE,
                IDLE,
                "Later passes, nothing changed, smart_scan=1 (mean of a whole round of skips)",
                "instructions per page",
            ),
            1,
        ),
        "idle-smart.svg",
    ),
    metric(exact::MODE, "metadata_bytes", "Metadata", "bytes"),
    plotted(
        metric(
            exact::MODE,
            "metadata_bytes_per_page",
            "Metadata",
            "bytes per page",
        ),
        "metadata.svg",
    ),
    plotted(
        metric(
            exact::MODE,
            "ptl_hold_max",
            "The longest hold of a page-table lock",
            "instructions",
        ),
        "ptl.svg",
    ),
    plotted(
        metric(
            exact::MODE,
            "mmap_lock_hold_max",
            "The longest hold of an mmap_lock",
            "instructions",
        ),
        "mmap-lock.svg",
    ),
    plotted(
        metric(
            wall::MODE,
            "seconds_to_99",
            "Time until 99 % of the expected sharing",
            "s",
        ),
        "seconds-to-99.svg",
    ),
    metric(
        wall::MODE,
        "fault_median",
        "Page faults of a bystander: median",
        "ns",
    ),
    plotted(
        metric(
            wall::MODE,
            "fault_p99",
            "Page faults of a bystander: 99 of 100 are faster",
            "ns",
        ),
        "fault-p99.svg",
    ),
    metric(
        wall::MODE,
        "fault_max",
        "Page faults of a bystander: the slowest",
        "ns",
    ),
    metric(
        wall::MODE,
        "fault_fresh_p99",
        "Page faults of a bystander, pages that were not there: 99 of 100 are faster",
        "ns",
    ),
    metric(
        wall::MODE,
        "fault_broken_p99",
        "Page faults of a bystander, pages that had been merged: 99 of 100 are faster",
        "ns",
    ),
];

struct Report {
    records: Vec<Record>,
    spread: Vec<Spread>,
}

impl Report {
    fn find(&self, metric: &Metric, workload: &str, engine: &str) -> Option<f64> {
        self.records
            .iter()
            .filter(|r| r.workload == workload && r.engine == engine)
            .filter(|r| r.mode == metric.mode && r.metric == metric.name)
            // An engine without the file never skips, so its figure counts as both.
            .find(|r| {
                metric.smart_scan.is_none()
                    || r.smart_scan.is_none()
                    || r.smart_scan == metric.smart_scan
            })
            .map(|r| r.value)
    }

    /// Return `min–max` of a figure that was measured more than once.
    fn spread(&self, metric: &Metric, workload: &str, engine: &str) -> Option<String> {
        if metric.mode != wall::MODE {
            return None;
        }
        let found = self.spread.iter().find(|s| {
            s.median.workload == workload
                && s.median.engine == engine
                && s.median.metric == metric.name
        })?;
        Some(format!(" ({}–{})", figure(found.min), figure(found.max)))
    }

    /// Return the workloads, in the order in which they were measured.
    fn workloads(&self) -> Vec<&str> {
        let mut names: Vec<&str> = Vec::new();
        for record in &self.records {
            if !names.contains(&record.workload.as_str()) {
                names.push(&record.workload);
            }
        }
        names
    }

    fn bars(&self, metric: &Metric) -> Vec<Bars> {
        self.workloads()
            .iter()
            .map(|workload| Bars {
                workload: workload.to_string(),
                ksm: self.find(metric, workload, "ksm"),
                rksm: self.find(metric, workload, "rksm"),
            })
            .filter(|b| b.ksm.is_some() || b.rksm.is_some())
            .collect()
    }

    fn table(&self, metric: &Metric) -> String {
        let mut out = String::from("| workload | ksmd | rksmd | ksmd : rksmd |\n");
        out += "| --- | ---: | ---: | ---: |\n";
        for bars in self.bars(metric) {
            let cell = |value: Option<f64>, engine| match value {
                Some(v) => {
                    let spread = self.spread(metric, &bars.workload, engine);
                    figure(v) + &spread.unwrap_or_default()
                }
                None => "–".into(),
            };
            let ratio = match (bars.ksm, bars.rksm) {
                (Some(a), Some(b)) if b > 0.0 => format!("{:.2}", a / b),
                _ => "–".into(),
            };
            out += &format!(
                "| {} | {} | {} | {ratio} |\n",
                bars.workload,
                cell(bars.ksm, "ksm"),
                cell(bars.rksm, "rksm")
            );
        }
        out
    }

    /// Return the table of the workloads and their sizes.
    fn workload_table(&self) -> String {
        let mut out =
            String::from("| workload | pages | expected sharing |\n| --- | ---: | ---: |\n");
        let of = |name| metric(exact::MODE, name, "", "");
        let (pages, expected) = (of("pages"), of("expected_sharing"));
        for workload in self.workloads() {
            let cell = |m| {
                self.find(m, workload, "ksm")
                    .map_or("–".to_string(), figure)
            };
            out += &format!("| {workload} | {} | {} |\n", cell(&pages), cell(&expected));
        }
        out
    }
}

/// Write table.md and the plots to `dir`, from the results there.
pub fn write(dir: &Path) -> Result<()> {
    let spread = dir.join("spread.json");
    let report = Report {
        records: results::load(&dir.join("results.json"))?,
        spread: if spread.exists() {
            results::load(&spread)?
        } else {
            Vec::new()
        },
    };
    let machine = Machine::load(&dir.join("machine.json"))?;
    let mut text = String::from("# Figures of the benchmark\n\n");
    text += "Made by `make bench`; Documentation/benchmark.md says what they mean.\n\n";
    text += &machine.markdown();
    text += "\n## Targets\n\n";
    text += &targets::table(|(mode, workload, name, smart_scan), engine| {
        let metric = Metric {
            smart_scan,
            ..metric(mode, name, "", "")
        };
        report.find(&metric, workload, engine)
    });
    text += "\n## Workloads\n\n";
    text += &report.workload_table();
    for metric in &METRICS {
        let bars = report.bars(metric);
        if bars.is_empty() {
            continue;
        }
        text += &format!("\n## {} ({})\n\n", metric.title, metric.unit);
        if let Some(file) = metric.plot {
            plot::draw(&dir.join(file), metric.title, metric.unit, &bars)?;
            text += &format!("![{}]({file})\n\n", metric.title);
        }
        text += &report.table(metric);
    }
    let file = dir.join("table.md");
    fs::write(&file, text).with_context(|| file.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::Sheet;

    fn report() -> Report {
        let mut records = Vec::new();
        let mut ksm = Sheet::new("unique", "ksm", "exact");
        ksm.put(Some(0), IDLE, 16_000.0, "");
        ksm.put(Some(1), IDLE, 2000.0, "");
        records.extend(ksm.into_records());
        let mut rksm = Sheet::new("unique", "rksm", "exact");
        rksm.put(None, IDLE, 160.0, "");
        records.extend(rksm.into_records());
        let mut wall = Sheet::new("unique", "ksm", "wall");
        wall.put(Some(1), "fault_p99", 50.0, "ns");
        let median = wall.into_records().remove(0);
        records.push(median.clone());
        let spread = Spread {
            median,
            min: 40.0,
            max: 60.0,
            runs: 3,
        };
        Report {
            records,
            spread: vec![spread],
        }
    }

    fn row(name: &str, smart_scan: Option<u64>) -> String {
        let report = report();
        let metric = METRICS
            .iter()
            .find(|m| m.name == name && m.smart_scan == smart_scan)
            .unwrap();
        report.table(metric).lines().last().unwrap().to_string()
    }

    #[test]
    fn an_engine_without_the_knob_stands_in_both_tables() {
        assert_eq!(row(IDLE, Some(0)), "| unique | 16,000 | 160 | 100.00 |");
        assert_eq!(row(IDLE, Some(1)), "| unique | 2,000 | 160 | 12.50 |");
    }

    #[test]
    fn repeated_figures_show_their_spread() {
        assert_eq!(row("fault_p99", None), "| unique | 50 (40–60) | – | – |");
    }
}
