// SPDX-License-Identifier: GPL-2.0
//! Small readers of /proc.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{anyhow, Context, Result};

/// One value of /proc/<pid>/ksm_stat.
pub fn ksm_stat(pid: u32, key: &str) -> Result<i64> {
    let text = fs::read_to_string(format!("/proc/{pid}/ksm_stat")).context("ksm_stat")?;
    number_after(&text, key).with_context(|| format!("{key} in ksm_stat"))
}

/// The children of this thread.
pub fn children() -> Result<Vec<u32>> {
    let text = fs::read_to_string("/proc/thread-self/children").context("children")?;
    text.split_whitespace()
        .map(|pid| Ok(pid.parse()?))
        .collect()
}

/// A value of /proc/meminfo in KiB.
pub fn meminfo(key: &str) -> Result<i64> {
    let text = fs::read_to_string("/proc/meminfo").context("meminfo")?;
    number_after(&text, &format!("{key}:")).with_context(|| format!("{key} in meminfo"))
}

/// A value of /proc/vmstat.
pub fn vmstat(key: &str) -> Result<i64> {
    vmstat_sum(&[key])
}

/// The sum of some values of /proc/vmstat.
pub fn vmstat_sum(keys: &[&str]) -> Result<i64> {
    let text = fs::read_to_string("/proc/vmstat").context("vmstat")?;
    let value = |key: &&str| number_after(&text, key).with_context(|| format!("{key} in vmstat"));
    keys.iter().map(value).sum()
}

/// Free memory in KiB, including the per-CPU lists. These can be large, and MemFree leaves them out.
pub fn free_kib() -> Result<i64> {
    // Each CPU counts on its own and adds its sum to the total now and then. Force that now.
    fs::write("/proc/sys/vm/stat_refresh", "1").context("stat_refresh")?;
    let text = fs::read_to_string("/proc/zoneinfo").context("zoneinfo")?;
    Ok(free_pages(&text) * 4)
}

/// Sum up the free pages of /proc/zoneinfo.
fn free_pages(zoneinfo: &str) -> i64 {
    let mut words = zoneinfo.split_whitespace();
    let mut sum = 0;
    while let Some(word) = words.next() {
        if word == "nr_free_pages" || word == "count:" {
            sum += words
                .next()
                .and_then(|n| n.parse::<i64>().ok())
                .unwrap_or(0);
        }
    }
    sum
}

fn number_after(text: &str, key: &str) -> Result<i64> {
    text.lines()
        .find_map(|line| {
            let mut words = line.split_whitespace();
            (words.next() == Some(key)).then(|| words.next()?.parse().ok())?
        })
        .ok_or_else(|| anyhow!("no number"))
}

/// The pid of the kernel thread `name`.
pub fn kernel_thread(name: &str) -> Result<Option<u32>> {
    for entry in fs::read_dir("/proc").context("/proc")? {
        let path = entry.context("/proc")?.path();
        let Some(pid) = path.file_name().and_then(|n| n.to_str()?.parse().ok()) else {
            continue;
        };
        let comm = fs::read_to_string(path.join("comm")).unwrap_or_default();
        // A kernel thread has no command line.
        let cmdline = fs::read(path.join("cmdline")).unwrap_or_default();
        if comm.trim_end() == name && cmdline.is_empty() {
            return Ok(Some(pid));
        }
    }
    Ok(None)
}

/// What /proc/<pid>/stat shows of a task.
pub struct Stat {
    pub state: char,
    pub nice: i64,
}

pub fn stat(pid: u32) -> Result<Stat> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).context("stat")?;
    parse_stat(&text).with_context(|| format!("stat reads {text:?}"))
}

fn parse_stat(text: &str) -> Option<Stat> {
    // The name may contain spaces and parentheses; the last parenthesis ends it.
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
    Some(Stat {
        state: fields.first()?.chars().next()?,
        nice: fields.get(16)?.parse().ok()?,
    })
}

/// Return the CPU time that a task has used.
pub fn cpu_time(pid: u32) -> Result<Duration> {
    let text = fs::read_to_string(format!("/proc/{pid}/schedstat")).context("schedstat")?;
    let nanos = text.split_whitespace().next().context("schedstat")?;
    Ok(Duration::from_nanos(nanos.parse().context("schedstat")?))
}

/// Return whether a module is loaded.
pub fn module_loaded(name: &str) -> bool {
    Path::new("/sys/module").join(name).exists()
}

/// Count the objects in use of a slab cache. Let the cache free its spares first.
pub fn slab_objects(cache: &str) -> Result<i64> {
    // Without this file, the count includes some spares.
    let _ = fs::write(format!("/sys/kernel/slab/{cache}/shrink"), "1");
    let text = fs::read_to_string("/proc/slabinfo").context("slabinfo")?;
    number_after(&text, cache).with_context(|| format!("{cache} in slabinfo"))
}

/// All values of /proc/slabinfo (objects) and /proc/meminfo (KiB), to find out which grew.
pub struct Figures(BTreeMap<String, i64>);

impl Figures {
    /// Take the values now, after every slab cache freed its spares.
    pub fn now() -> Result<Self> {
        for cache in fs::read_dir("/sys/kernel/slab")
            .into_iter()
            .flatten()
            .flatten()
        {
            let _ = fs::write(cache.path().join("shrink"), "1");
        }
        let mut all = BTreeMap::new();
        for file in ["/proc/slabinfo", "/proc/meminfo"] {
            let text = fs::read_to_string(file).context(file)?;
            all.extend(text.lines().filter_map(|line| {
                let mut words = line.split_whitespace();
                let name = words.next()?.trim_end_matches(':').to_owned();
                Some((name, words.next()?.parse().ok()?))
            }));
        }
        Ok(Self(all))
    }

    /// Return one value.
    pub fn get(&self, name: &str) -> Result<i64> {
        self.0
            .get(name)
            .copied()
            .with_context(|| format!("{name} is not counted"))
    }

    /// Return the values that differ from `before`, with the difference.
    pub fn grown<'a>(&'a self, before: &'a Self) -> impl Iterator<Item = (&'a str, i64)> {
        self.0.iter().filter_map(|(name, now)| {
            let more = now - before.0.get(name).copied().unwrap_or(0);
            (more != 0).then_some((name.as_str(), more))
        })
    }
}

/// Return the names of slab caches that contain `part`.
pub fn slab_caches(part: &str) -> Result<Vec<String>> {
    let text = fs::read_to_string("/proc/slabinfo").context("slabinfo")?;
    Ok(text
        .lines()
        .filter_map(|l| l.split_whitespace().next())
        .filter(|n| n.contains(part))
        .map(String::from)
        .collect())
}

/// KiB of huge pages in the mapping of `pid` that contains `addr`.
pub fn anon_huge_kib(pid: u32, addr: usize) -> Result<i64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps")).context("smaps")?;
    let mut here = false;
    for line in text.lines() {
        if let Some((start, end)) = mapping_range(line) {
            here = (start..end).contains(&addr);
        } else if here && line.starts_with("AnonHugePages:") {
            return number_after(line, "AnonHugePages:");
        }
    }
    Err(anyhow!("no mapping contains {addr:#x}"))
}

fn mapping_range(line: &str) -> Option<(usize, usize)> {
    let (start, end) = line.split_whitespace().next()?.split_once('-')?;
    Some((
        usize::from_str_radix(start, 16).ok()?,
        usize::from_str_radix(end, 16).ok()?,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_of_a_task_with_brackets_in_its_name() {
        let stat = parse_stat("7 (a) b) S 2 0 0 0 -1 69238848 0 0 0 0 0 0 0 0 25 5 1 0").unwrap();
        assert_eq!((stat.state, stat.nice), ('S', 5));
    }

    #[test]
    fn numbers_are_found_by_their_whole_key() {
        let text = "ksm_rmap_items 3\nksm_process_profit -4096\n";
        assert_eq!(number_after(text, "ksm_process_profit").unwrap(), -4096);
        assert!(number_after(text, "ksm_process").is_err());
    }

    #[test]
    fn free_pages_are_those_of_zones_and_of_cpus() {
        let text = "Node 0, zone DMA\n      nr_free_pages 100\n  pagesets\n    cpu: 0\n\
                    \x20             count:    20\n              high:     5\n    cpu: 1\n\
                    \x20             count:    3\nNode 0, zone Normal\n      nr_free_pages 1000\n";
        assert_eq!(free_pages(text), 1123);
    }

    #[test]
    fn ranges_of_mappings() {
        assert_eq!(
            mapping_range("1000-3000 rw-p 00000000 00:00 0"),
            Some((0x1000, 0x3000))
        );
        assert_eq!(mapping_range("AnonHugePages:         0 kB"), None);
    }
}
