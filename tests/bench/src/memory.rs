// SPDX-License-Identifier: GPL-2.0
//! How much memory the kernel uses for itself.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result};
use rksm_guest_tests::proc;

/// The kernel's own use of memory at one moment, in bytes.
#[derive(Clone, Debug)]
pub struct KernelMemory {
    /// All slab pages, large `kmalloc` ones included.
    pub slab: i64,
    pub vmalloc: i64,
    /// Objects in use, by slab cache.
    caches: BTreeMap<String, i64>,
}

impl KernelMemory {
    pub fn read() -> Result<Self> {
        // Folds the per-CPU differences into the totals. Not there without
        // CONFIG_SMP, where there are none.
        let _ = fs::write("/proc/sys/vm/stat_refresh", "1");
        Ok(Self {
            slab: proc::meminfo("Slab")? * 1024,
            vmalloc: proc::meminfo("VmallocUsed")? * 1024,
            caches: caches(&fs::read_to_string("/proc/slabinfo").context("slabinfo")?),
        })
    }

    /// Slab and vmalloc use in all.
    pub fn total(&self) -> i64 {
        self.slab + self.vmalloc
    }

    /// The caches whose use changed most since `before`, in bytes.
    pub fn changed(&self, before: &Self) -> Vec<(String, i64)> {
        let mut list: Vec<(String, i64)> = self
            .caches
            .iter()
            .map(|(name, now)| (name.clone(), now - before.caches.get(name).unwrap_or(&0)))
            .filter(|(_, change)| change.abs() >= 4096)
            .collect();
        list.sort_by_key(|(_, change)| -change.abs());
        list
    }
}

/// Bytes of objects in use per cache, from the text of /proc/slabinfo.
fn caches(text: &str) -> BTreeMap<String, i64> {
    text.lines()
        .filter_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            let active: i64 = words.get(1)?.parse().ok()?;
            let size: i64 = words.get(3)?.parse().ok()?;
            Some((words[0].to_string(), active * size))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slabinfo_is_read() {
        let text = "slabinfo - version: 2.1\n\
            # name            <active_objs> <num_objs> <objsize> <objperslab>\n\
            ksm_rmap_item        10     64     64   64    1 : tunables 0 0 0\n";
        assert_eq!(caches(text).get("ksm_rmap_item"), Some(&640));
        assert_eq!(caches(text).len(), 1);
    }
}
