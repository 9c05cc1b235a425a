// SPDX-License-Identifier: GPL-2.0
//! The targets of the engine, compared with the figures.

use crate::table::figure;
use crate::{exact, wall};

/// A figure: mode, workload, metric, and `smart_scan` where it matters.
pub type Which = (&'static str, &'static str, &'static str, Option<u64>);

/// The limit for rksm's figure.
enum Limit {
    /// At most this value.
    Most(f64),
    /// At most this value, and less than in-tree by this factor.
    MostAndTimesLess(f64, f64),
    /// Less than in-tree by this factor.
    TimesLess(f64),
}

struct Target {
    what: &'static str,
    which: Which,
    limit: Limit,
}

const IDLE: &str = "cpu_per_page_idle";

fn target(what: &'static str, which: Which, limit: Limit) -> Target {
    Target { what, which, limit }
}

/// The targets that are about one figure each.
fn targets() -> Vec<Target> {
    let exact = |workload, metric| (exact::MODE, workload, metric, None);
    let idle = |workload| (exact::MODE, workload, IDLE, Some(0));
    vec![
        target(
            "unchanged unmerged page, nothing skipped, `unique`, later pass (instructions)",
            idle("unique"),
            Limit::MostAndTimesLess(180.0, 25.0),
        ),
        target(
            "unchanged merged page, `equal`, later pass (instructions)",
            idle("equal"),
            Limit::Most(180.0),
        ),
        target(
            "first pass, `unique`, all bookkeeping included (instructions per page)",
            exact("unique", "cpu_per_page_first"),
            Limit::Most(400.0),
        ),
        target(
            "CPU until 99 % of the expected sharing, `dup50` (instructions)",
            exact("dup50", "cpu_to_99"),
            Limit::TimesLess(5.0),
        ),
        target(
            "passes until 99 %, `dup50`",
            exact("dup50", "passes_to_99"),
            Limit::Most(2.0),
        ),
        target(
            "passes until 99 %, `dup50`, `merge_eagerly`",
            exact("dup50_eager", "passes_to_99"),
            Limit::Most(1.0),
        ),
        target(
            "metadata per scanned unmerged page, `unique` (bytes)",
            exact("unique", "metadata_bytes_per_page"),
            Limit::Most(16.0),
        ),
        target(
            "bystander's page faults while scanning `dup50` at full speed, p99 (ns)",
            (wall::MODE, "dup50", "fault_p99", None),
            Limit::TimesLess(1.0),
        ),
        target(
            "bystander's page faults while scanning `real` at full speed, p99 (ns)",
            (wall::MODE, "real", "fault_p99", None),
            Limit::TimesLess(1.0),
        ),
    ]
}

/// Workloads on which rksm must cost less and merge no less than in-tree KSM, and the figures for the cost.
const BETTER: [&str; 6] = ["tail", "volatile", "vmas", "sparse", "fork", "real"];
const COSTS: [(&str, &str, Option<u64>); 3] = [
    ("CPU until 99 %", "cpu_to_99", None),
    ("later pass, nothing skipped", IDLE, Some(0)),
    ("later passes, smart_scan", IDLE, Some(1)),
];

/// The share of in-tree's sharing that counts as no less: pages of real programs come and go.
const NO_LESS: f64 = 0.99;

fn verdict(met: bool) -> &'static str {
    if met {
        "met"
    } else {
        "**not met**"
    }
}

fn row(what: &str, ksm: Option<f64>, rksm: Option<f64>, target: &str, met: Option<bool>) -> String {
    let cell = |v: Option<f64>| v.map_or("–".to_string(), figure);
    let ratio = match (ksm, rksm) {
        (Some(a), Some(b)) if b > 0.0 => format!("{:.2}", a / b),
        _ => "–".into(),
    };
    format!(
        "| {what} | {} | {} | {ratio} | {target} | {} |\n",
        cell(ksm),
        cell(rksm),
        met.map_or("–", verdict)
    )
}

/// Return the table of targets. `find` returns a figure of an engine.
pub fn table(find: impl Fn(Which, &str) -> Option<f64>) -> String {
    let mut out = String::from("| what | ksmd | rksmd | ksmd : rksmd | target | |\n");
    out += "| --- | ---: | ---: | ---: | --- | --- |\n";
    for target in targets() {
        let ksm = find(target.which, "ksm");
        let rksm = find(target.which, "rksm");
        let times = |n: f64| Some(ksm? / rksm? >= n);
        let (text, met) = match target.limit {
            Limit::Most(most) => (format!("{} or less", figure(most)), rksm.map(|v| v <= most)),
            Limit::MostAndTimesLess(most, n) => (
                format!("{} or less, and {} times less", figure(most), figure(n)),
                rksm.and_then(|v| Some(v <= most && times(n)?)),
            ),
            Limit::TimesLess(1.0) => ("no more than in-tree".into(), times(1.0)),
            Limit::TimesLess(n) => (format!("{} times less", figure(n)), times(n)),
        };
        out += &row(target.what, ksm, rksm, &text, met);
    }
    for workload in BETTER {
        for (what, metric, smart) in COSTS {
            let which = (exact::MODE, workload, metric, smart);
            let (ksm, rksm) = (find(which, "ksm"), find(which, "rksm"));
            let met = ksm.zip(rksm).map(|(a, b)| b < a);
            let what = format!("`{workload}`: {what}");
            out += &row(&what, ksm, rksm, "less than in-tree", met);
        }
        let which = (exact::MODE, workload, "sharing", None);
        let (ksm, rksm) = (find(which, "ksm"), find(which, "rksm"));
        let met = ksm.zip(rksm).map(|(a, b)| b >= NO_LESS * a);
        let what = format!("`{workload}`: pages merged");
        out += &row(&what, ksm, rksm, "no less than in-tree", met);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(start: &str, find: impl Fn(Which, &str) -> Option<f64>) -> String {
        let table = table(find);
        let line = table.lines().find(|l| l.starts_with(start)).unwrap();
        line.to_string()
    }

    /// Return the same two figures, in-tree's and rksm's, for everything.
    fn both(ksm: f64, rksm: f64) -> impl Fn(Which, &str) -> Option<f64> {
        move |_, engine| Some(if engine == "ksm" { ksm } else { rksm })
    }

    #[test]
    fn both_limits_must_hold() {
        let start = "| unchanged unmerged";
        assert!(line(start, both(5000.0, 170.0)).ends_with(" met |"));
        assert!(line(start, both(5000.0, 190.0)).contains("not met"));
        assert!(line(start, both(3000.0, 170.0)).contains("not met"));
    }

    #[test]
    fn merging_less_is_not_met() {
        let start = "| `real`: pages merged";
        assert!(line(start, both(1000.0, 995.0)).ends_with(" met |"));
        assert!(line(start, both(1000.0, 900.0)).contains("not met"));
    }

    #[test]
    fn what_was_not_measured_has_no_verdict() {
        let line = line("| `tail`: CPU", |_, _| None);
        assert!(!line.contains("met"), "{line}");
    }
}
