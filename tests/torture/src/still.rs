// SPDX-License-Identifier: GPL-2.0
//! Checks while all processes stand still: which merged pages they have, by the kernel's own view, and how
//! many of these the engine has listed.
//!
//! After a pass, each mapping of a merged page is listed, as migration, reclaim and memory failure find it
//! only by that. And when `run=2` reports success, no process has a merged page.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{ensure, Context, Result};
use rksm_test_lib::engine::{read_from, wait_for, write_to, RKSM};
use rksm_test_lib::{module, proc};

use crate::arena::{Arena, Phase};
use crate::control::knobs;
use crate::page::PAGE;
use crate::raw;

/// Passes after which all mappings must be listed: one that may be in progress, and a whole one.
const PASSES: u64 = 2;
/// How often to look again before two numbers count as different.
const LOOKS: u32 = 4;
/// The number of wrong processes to describe in full.
const TOLD: u64 = 6;

/// The findings of all rounds.
#[derive(Clone, Copy, Debug, Default)]
pub struct Findings {
    /// The number of stands.
    pub stands: u64,
    /// The time that they took.
    pub millis: u64,
    /// Processes and merged pages that were checked.
    pub processes: u64,
    pub merged: u64,
    /// Processes with an unlisted merged page, and processes with a listed page that is not merged.
    pub unlisted: u64,
    pub outdated: u64,
    /// How often `run=2` was refused because of protected pages, and how often its result was wrong.
    pub busy: u64,
    pub untrue: u64,
}

impl Findings {
    pub fn line(&self) -> String {
        format!("# {self:?}\n")
    }

    /// Return the results: whether mappings are listed, and whether `run=2` reports the truth.
    pub fn results(&self) -> [(&'static str, Result<(), String>); 2] {
        let listed = match (self.stands, self.unlisted, self.outdated) {
            (0, ..) => Err("never looked".to_string()),
            (_, 0, 0) => Ok(()),
            (_, unlisted, outdated) => Err(format!(
                "{unlisted} processes with merged pages that are not listed after a pass, {outdated} with \
                 fewer than are listed"
            )),
        };
        let unmerged = match (self.stands, self.untrue) {
            (0, _) => Err("never looked".to_string()),
            (_, 0) => Ok(()),
            (_, untrue) => Err(format!("run=2 was wrong {untrue} times")),
        };
        [
            ("mappings-are-listed", listed),
            ("run-2-tells-the-truth", unmerged),
        ]
    }
}

/// The merged pages of a process: in the kernel's page tables, and in the engine's lists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Count {
    merged: u64,
    listed: u64,
}

/// The counts of all workers and children, by the number of the ledger and the pid.
type Counts = BTreeMap<(u8, u32), Count>;

fn count_all(arena: &Arena) -> Result<Counts> {
    let (mut all, mut frames) = (Counts::new(), Frames::open()?);
    for (id, block) in arena.blocks.iter().enumerate() {
        let pid = block.pid.load(Ordering::Relaxed);
        if block.in_use() && pid != 0 {
            if let Some(count) = count(pid, &mut frames)? {
                all.insert((id as u8, pid), count);
            }
        }
    }
    Ok(all)
}

/// Count for one process, unless it has ended.
fn count(pid: u32, frames: &mut Frames) -> Result<Option<Count>> {
    if is_gone(pid) {
        return Ok(None);
    }
    let merged = merged_areas(pid, frames).map(|areas| areas.iter().map(|area| area.merged).sum());
    let listed = proc::ksm_stat(pid, "ksm_merging_pages");
    let (Ok(merged), Ok(listed)) = (merged, listed) else {
        // It may have been killed at this moment.
        ensure!(is_gone(pid), "pid {pid} cannot be read");
        return Ok(None);
    };
    let listed = u64::try_from(listed).context("ksm_merging_pages")?;
    Ok(Some(Count { merged, listed }))
}

/// Return whether a process has ended. It need not have been reaped.
pub fn is_gone(pid: u32) -> bool {
    proc::stat(pid).map_or(true, |stat| matches!(stat.state, 'Z' | 'X'))
}

/// A private mapping with merged pages.
struct Area {
    range: String,
    merged: u64,
}

const PM_PRESENT: u64 = 1 << 63;
const PM_FILE: u64 = 1 << 61;
const PM_PFN: u64 = (1 << 55) - 1;
const KPF_KSM: u64 = 1 << 21;
/// How many entries of pagemap to read at once.
const CHUNK: usize = 2048;

/// The kernel's flags of page frames. Each is read once, as the same frames appear again and again.
struct Frames {
    flags: File,
    known: HashMap<u64, bool>,
}

impl Frames {
    fn open() -> Result<Self> {
        let flags = File::open("/proc/kpageflags").context("kpageflags")?;
        let known = HashMap::new();
        Ok(Self { flags, known })
    }

    fn is_merged(&mut self, frame: u64) -> Result<bool> {
        if let Some(&merged) = self.known.get(&frame) {
            return Ok(merged);
        }
        let flags = words_at(&self.flags, frame as usize, 1)?;
        let merged = flags.iter().any(|flags| flags & KPF_KSM != 0);
        self.known.insert(frame, merged);
        Ok(merged)
    }
}

fn merged_areas(pid: u32, frames: &mut Frames) -> Result<Vec<Area>> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).context("maps")?;
    let pagemap = File::open(format!("/proc/{pid}/pagemap")).context("pagemap")?;
    let mut all = Vec::new();
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let (Some(range), Some(mode)) = (words.next(), words.next()) else {
            continue;
        };
        let Some((from, to)) = range.split_once('-') else {
            continue;
        };
        let hex = |text| usize::from_str_radix(text, 16).context("maps");
        let (from, to) = (hex(from)? / PAGE, hex(to)? / PAGE);
        // Skip kernel addresses, and mappings that cannot hold anonymous pages.
        if !mode.ends_with('p') || from >> 35 != 0 {
            continue;
        }
        let mut merged = 0;
        let mut at = from;
        while at < to {
            let n = CHUNK.min(to - at);
            for entry in words_at(&pagemap, at, n)? {
                if entry & PM_PRESENT != 0 && entry & PM_FILE == 0 {
                    merged += u64::from(frames.is_merged(entry & PM_PFN)?);
                }
            }
            at += n;
        }
        if merged != 0 {
            let range = range.to_string();
            all.push(Area { range, merged });
        }
    }
    Ok(all)
}

fn words_at(file: &File, at: usize, n: usize) -> Result<Vec<u64>> {
    let mut raw = vec![0u8; n * 8];
    file.read_exact_at(&mut raw, at as u64 * 8)?;
    let words = raw.chunks_exact(8);
    Ok(words
        .map(|w| w.iter().rev().fold(0, |all, &b| (all << 8) | u64::from(b)))
        .collect())
}

fn write(knob: &str, value: &str) -> io::Result<()> {
    write_to(Path::new(RKSM), knob, value.as_bytes())
}

/// Wait for some passes, then stop the scan.
fn let_pass(slow: u64) -> Result<()> {
    let scans = || read_from(Path::new(RKSM), "full_scans");
    knobs::calm();
    write("run", "1").context("run=1")?;
    let before = scans()?;
    wait_for("pass", Duration::from_secs(300 * slow), || {
        Ok(scans()? >= before + PASSES)
    })?;
    write("run", "0").context("run=0")?;
    Ok(())
}

/// Return all processes, and those whose two numbers still differ after several looks.
fn that_differ(arena: &Arena) -> Result<(Counts, Counts)> {
    let mut all = count_all(arena)?;
    let mut looks = 0;
    loop {
        let wrong = all.iter().filter(|(_, count)| count.merged != count.listed);
        let differ: Counts = wrong.map(|(&who, &count)| (who, count)).collect();
        if differ.is_empty() || looks == LOOKS {
            return Ok((all, differ));
        }
        // The last action may not be finished.
        std::thread::sleep(Duration::from_millis(20));
        let mut frames = Frames::open()?;
        for &who in differ.keys() {
            match count(who.1, &mut frames)? {
                Some(count) => all.insert(who, count),
                None => all.remove(&who),
            };
        }
        looks += 1;
    }
}

/// Describe all that is known about a process.
fn describe(arena: &Arena, id: u8, pid: u32, count: Count) -> String {
    let block = &arena.blocks[id as usize];
    let mut text = format!(
        "owner {id} (pid {pid}, child {}): {} merged pages, {} listed; its last steps: {}\n",
        block.child.load(Ordering::Relaxed),
        count.merged,
        count.listed,
        block.last_steps(16)
    );
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap_or_default();
    let areas = Frames::open().and_then(|mut frames| merged_areas(pid, &mut frames));
    for area in areas.unwrap_or_default() {
        let mut lines = smaps.lines().skip_while(|l| !l.starts_with(&area.range));
        let flags = lines.find(|l| l.starts_with("VmFlags:")).unwrap_or("");
        // Writing to a string never fails.
        let _ = writeln!(text, "#   {} in {} {flags}", area.merged, area.range);
    }
    text
}

/// Check what must be true in a phase.
pub fn look(arena: &Arena, phase: Phase, slow: u64, findings: &mut Findings) -> Result<()> {
    match phase {
        Phase::Merge => {
            module::ensure_loaded(true)?;
            findings.stands += 1;
            check_listed(arena, slow, findings)
        }
        Phase::Protected => {
            check_listed(arena, slow, findings)?;
            with_protected(arena, findings)
        }
        Phase::Free => without_protected(arena, findings),
    }
}

/// Check that after a pass each mapping of a merged page is listed, and nothing else is.
fn check_listed(arena: &Arena, slow: u64, findings: &mut Findings) -> Result<()> {
    let_pass(slow)?;
    let (all, mut differ) = that_differ(arena)?;
    if !differ.is_empty() {
        // The kernel works on its own, too: it may have swapped or moved pages during the pass.
        let_pass(slow)?;
        let (_, again) = that_differ(arena)?;
        differ.retain(|who, _| again.contains_key(who));
    }
    findings.processes += all.len() as u64;
    findings.merged += all.values().map(|count| count.merged).sum::<u64>();
    for (&(id, pid), &count) in &differ {
        let number = match count.merged > count.listed {
            true => &mut findings.unlisted,
            false => &mut findings.outdated,
        };
        *number += 1;
        if *number <= TOLD {
            let text = describe(arena, id, pid, count);
            raw::say(&format!("# LISTED WRONG: {text}"));
        }
    }
    Ok(())
}

/// With protected pages, `run=2` either unmerges all or reports that it could not, and the remaining pages
/// stay listed.
fn with_protected(arena: &Arena, findings: &mut Findings) -> Result<()> {
    match write("run", "2") {
        Ok(()) => check_unmerged(arena, findings, "pages were protected")?,
        Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
            findings.busy += 1;
            let (_, differ) = that_differ(arena)?;
            for (&(id, pid), &count) in &differ {
                findings.untrue += 1;
                if findings.untrue <= TOLD {
                    let text = describe(arena, id, pid, count);
                    raw::say(&format!("# LISTED WRONG after run=2 failed: {text}"));
                }
            }
        }
        Err(e) => {
            findings.untrue += 1;
            raw::say(&format!("# run=2 with pages protected: {e}\n"));
        }
    }
    Ok(())
}

/// Without protected pages, `run=2` unmerges all.
fn without_protected(arena: &Arena, findings: &mut Findings) -> Result<()> {
    // Writing the present value does nothing.
    write("run", "0").context("run=0")?;
    match write("run", "2") {
        Ok(()) => check_unmerged(arena, findings, "none was protected")?,
        Err(e) => {
            findings.untrue += 1;
            raw::say(&format!("# run=2 with nothing protected: {e}\n"));
        }
    }
    knobs::calm();
    write("run", "1").context("run=1")?;
    Ok(())
}

fn check_unmerged(arena: &Arena, findings: &mut Findings, when: &str) -> Result<()> {
    for (&(id, pid), &count) in count_all(arena)?.iter().filter(|(_, c)| c.merged != 0) {
        findings.untrue += 1;
        if findings.untrue <= TOLD {
            let text = describe(arena, id, pid, count);
            raw::say(&format!("# LEFT MERGED by run=2, while {when}: {text}"));
        }
    }
    Ok(())
}
