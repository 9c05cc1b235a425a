// SPDX-License-Identifier: GPL-2.0
//! The engine's instructions, function by function, computed from how often each translation block ran.

use std::collections::HashMap;
use std::fmt::Write;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::phase::Phase;
use crate::results;
use crate::table::figure;
use crate::trace::{Block, Trace};

/// Functions below this share of a phase are summed up in one line.
const LEAST_SHARE: f64 = 0.004;

/// Functions by address.
struct Symbols(Vec<(u64, String)>);

impl Symbols {
    /// Parse the text of /proc/kallsyms.
    fn parse(text: &str) -> Self {
        let mut list: Vec<(u64, String)> = text
            .lines()
            .filter_map(|line| {
                let mut words = line.split_whitespace();
                let addr = u64::from_str_radix(words.next()?, 16).ok()?;
                let kind = words.next()?;
                let name = words.next()?;
                let module = words.next().unwrap_or("");
                let is_code = kind.eq_ignore_ascii_case("t") || kind.eq_ignore_ascii_case("w");
                is_code.then(|| (addr, demangled(name) + &tag(module)))
            })
            .collect();
        // Of several names for one address, use the alphabetically first.
        list.sort();
        list.dedup_by_key(|(addr, _)| *addr);
        Self(list)
    }

    /// Return the function that contains `addr`, and its start.
    fn find(&self, addr: u64) -> Option<(u64, &str)> {
        let after = self.0.partition_point(|(start, _)| *start <= addr);
        let (start, name) = self.0.get(after.checked_sub(1)?)?;
        Some((*start, name))
    }
}

fn tag(module: &str) -> String {
    match module.trim_matches(['[', ']']) {
        "" => String::new(),
        module => format!(" [{module}]"),
    }
}

/// Return the path in a Rust symbol. Other names stay as they are.
fn demangled(name: &str) -> String {
    format!("{:#}", rustc_demangle::demangle(name))
}

#[derive(Default)]
struct Line {
    insns: u64,
    calls: u64,
}

/// Return one phase's table.
fn phase_table(phase: &Phase, blocks: &[&Block], symbols: &Symbols) -> String {
    let mut lines: HashMap<&str, Line> = HashMap::new();
    for block in blocks {
        let (start, name) = symbols.find(block.addr).unwrap_or((0, "?"));
        let line = lines.entry(name).or_default();
        line.insns += block.insns;
        if block.addr == start {
            line.calls += block.execs;
        }
    }
    let total: u64 = lines.values().map(|l| l.insns).sum();
    let per_page = |n: u64| n as f64 / phase.pages.max(1) as f64;
    let mut out = format!(
        "\n{} {} {}: {} instructions per page, {} pages (schedstat: {})\n",
        phase.engine,
        phase.workload,
        phase.what,
        figure(per_page(total)),
        phase.pages,
        figure(per_page(phase.cpu)),
    );
    out += "   share  insns/page  calls/page  insns/call  function\n";
    let mut list: Vec<(&str, Line)> = lines.into_iter().collect();
    list.sort_by_key(|(name, line)| (std::cmp::Reverse(line.insns), *name));
    let mut rest = 0;
    for (name, line) in list {
        let share = line.insns as f64 / total.max(1) as f64;
        if share < LEAST_SHARE {
            rest += line.insns;
            continue;
        }
        let each = match line.calls {
            0 => "-".into(),
            n => figure((line.insns as f64 / n as f64).round()),
        };
        let _ = writeln!(
            out,
            "{:>7.1}% {:>11.1} {:>11.3} {:>11}  {name}",
            share * 100.0,
            per_page(line.insns),
            per_page(line.calls),
            each
        );
    }
    let _ = writeln!(
        out,
        "{:>7.1}% {:>11.1} {:>11} {:>11}  (all others)",
        rest as f64 / total.max(1) as f64 * 100.0,
        per_page(rest),
        "",
        ""
    );
    out
}

/// Return whether a phase is shown: the first passes, and one idle pass of each kind.
fn is_shown(phase: &Phase) -> bool {
    match phase.what.split_once(' ') {
        Some(("pass", number)) => matches!(number, "1" | "2"),
        Some((_, number)) => number == "1",
        None => false,
    }
}

/// Return the tables for the files that the guest and the plugin left in `dir`.
pub fn report(dir: &Path) -> Result<String> {
    let phases: Vec<Phase> = results::load(&dir.join("phases.json"))?;
    let trace = Trace::load(dir)?;
    let file = dir.join("kallsyms");
    let text = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
    let symbols = Symbols::parse(&text);
    let mut out = String::new();
    for phase in phases.iter().filter(|p| is_shown(p)) {
        let blocks: Vec<&Block> = trace
            .blocks
            .iter()
            .filter(|b| b.phase == phase.number)
            .collect();
        if !blocks.is_empty() {
            out += &phase_table(phase, &blocks, &symbols);
        }
        for hold in trace.holds.iter().filter(|h| h.phase == phase.number) {
            let taken_by = symbols.find(hold.caller).map_or("?", |(_, name)| name);
            let _ = writeln!(
                out,
                "{}: {} holds, the longest {} instructions, taken by {taken_by}",
                hold.kind, hold.count, hold.max
            );
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KALLSYMS: &str = "ffffffff81000000 T first\n\
        ffffffff81000100 t second\n\
        ffffffff81000180 D data\n\
        ffffffffc0000000 t _RNvMs_NtCs5dzzLbY2Yv_4rksm6engineNtB4_6Engine4scan\t[rksm]\n";

    #[test]
    fn the_function_that_holds_an_address() {
        let symbols = Symbols::parse(KALLSYMS);
        let name = |addr| symbols.find(addr).unwrap().1;
        assert_eq!(name(0xffffffff81000000), "first");
        assert_eq!(name(0xffffffff810000ff), "first");
        assert_eq!(name(0xffffffff81000190), "second");
        assert!(symbols.find(0).is_none());
    }

    #[test]
    fn rust_names_become_paths() {
        let name = "_RNvMs_NtCs5dzzLbY2Yv_4rksm6engineNtB4_6Engine4scan";
        assert_eq!(demangled(name), "<rksm::engine::Engine>::scan");
        assert_eq!(demangled("memcmp"), "memcmp");
    }

    #[test]
    fn shares_and_calls() {
        let phase = Phase {
            number: 1,
            workload: "unique".into(),
            engine: "ksm".into(),
            what: "idle 1".into(),
            pages: 10,
            cpu: 1000,
        };
        let block = |addr, execs, insns| Block {
            phase: 1,
            addr,
            execs,
            insns,
        };
        let blocks = [
            block(0xffffffff81000000, 10, 50),
            block(0xffffffff81000010, 20, 700),
            block(0xffffffff81000100, 50, 250),
        ];
        let list: Vec<&Block> = blocks.iter().collect();
        let table = phase_table(&phase, &list, &Symbols::parse(KALLSYMS));
        let rows: Vec<Vec<&str>> = table
            .lines()
            .skip(3)
            .map(|l| l.split_whitespace().collect())
            .collect();
        assert_eq!(rows[0], ["75.0%", "75.0", "1.000", "75", "first"]);
        assert_eq!(rows[1], ["25.0%", "25.0", "5.000", "5", "second"]);
    }
}
