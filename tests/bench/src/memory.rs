// SPDX-License-Identifier: GPL-2.0
//! The kernel's own use of memory.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result};
use rksm_test_lib::proc;

use crate::content::PAGE;

/// The kernel's own use of memory at one moment, in bytes.
///
/// Objects are counted, not the pages of their caches. Objects that were freed before leave room in those
/// pages, so a later allocation would look free.
#[derive(Clone, Debug)]
pub struct KernelMemory {
    /// Objects in use, by slab cache.
    objects: BTreeMap<String, i64>,
    /// Allocations too large for a cache: slab pages that no cache has.
    large: i64,
    vmalloc: i64,
}

impl KernelMemory {
    pub fn read() -> Result<Self> {
        // This adds the per-CPU differences to the totals.
        fs::write("/proc/sys/vm/stat_refresh", "1").context("stat_refresh")?;
        let text = fs::read_to_string("/proc/slabinfo").context("slabinfo")?;
        let caches = caches(&text);
        let slab = proc::meminfo("Slab")? * 1024;
        Ok(Self {
            large: slab - caches.values().map(|c| c.pages).sum::<i64>(),
            objects: caches.into_iter().map(|(n, c)| (n, c.objects)).collect(),
            vmalloc: proc::meminfo("VmallocUsed")? * 1024,
        })
    }

    fn total(&self) -> i64 {
        self.objects.values().sum::<i64>() + self.large + self.vmalloc
    }

    /// Return the growth since `before`.
    pub fn growth(&self, before: &Self) -> i64 {
        self.total() - before.total()
    }

    /// Describe the largest changes since `before`.
    pub fn changes(&self, before: &Self) -> String {
        let mut list: Vec<(i64, String)> = self
            .objects
            .iter()
            .map(|(name, now)| (now - before.objects.get(name).unwrap_or(&0), name.clone()))
            .collect();
        list.push((self.large - before.large, "large".into()));
        list.push((self.vmalloc - before.vmalloc, "vmalloc".into()));
        list.retain(|(change, _)| change.abs() >= PAGE as i64);
        list.sort_by_key(|(change, _)| -change.abs());
        list.iter()
            .map(|(change, name)| format!("{name} {change:+}"))
            .collect::<Vec<_>>()
            .join(", ")
    }
}

struct Cache {
    objects: i64,
    pages: i64,
}

/// Return the bytes of each cache, from the text of /proc/slabinfo.
fn caches(text: &str) -> BTreeMap<String, Cache> {
    text.lines()
        .filter_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            let number = |at: usize| words.get(at)?.parse::<i64>().ok();
            // The format is "name active objects size per-slab pages : tunables a b c : slabdata active-slabs
            // slabs shared".
            Some((
                words.first()?.to_string(),
                Cache {
                    objects: number(1)? * number(3)?,
                    pages: number(5)? * number(14)? * PAGE as i64,
                },
            ))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slabinfo_is_read() {
        let text = "slabinfo - version: 2.1\n\
            # name            <active_objs> <num_objs> <objsize> <objperslab> <pagesperslab>\n\
            ksm_rmap_item  10  64  64  64  1 : tunables 0 0 0 : slabdata 3 4 0\n";
        let caches = caches(text);
        assert_eq!(caches.len(), 1);
        assert_eq!(caches["ksm_rmap_item"].objects, 640);
        assert_eq!(caches["ksm_rmap_item"].pages, 4 * 4096);
    }

    #[test]
    fn growth_is_all_there_is() {
        let memory = |objects, large, vmalloc| KernelMemory {
            objects: [("a".to_string(), objects)].into(),
            large,
            vmalloc,
        };
        let (before, after) = (memory(100, 4096, 0), memory(9000, 12288, 4096));
        assert_eq!(after.growth(&before), 8900 + 8192 + 4096);
        assert_eq!(
            after.changes(&before),
            "a +8900, large +8192, vmalloc +4096"
        );
    }
}
