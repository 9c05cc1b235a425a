// SPDX-License-Identifier: GPL-2.0
//! The kernel's own view of pages: /proc/<pid>/pagemap and /proc/kpageflags.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result};

use crate::region::PAGE;

const PM_PRESENT: u64 = 1 << 63;
const PM_SWAP: u64 = 1 << 62;
const PM_UFFD_WP: u64 = 1 << 57;
const PM_SOFT_DIRTY: u64 = 1 << 55;
const PM_PFN: u64 = (1 << 55) - 1;
const KPF_SWAPCACHE: u64 = 1 << 13;
const KPF_COMPOUND: u64 = (1 << 15) | (1 << 16);
const KPF_KSM: u64 = 1 << 21;
const KPF_ZERO_PAGE: u64 = 1 << 24;

/// A range of pages of a process.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    pub pid: u32,
    pub addr: usize,
    pub pages: usize,
}

impl Span {
    /// The length in bytes.
    pub fn len(self) -> usize {
        self.pages * PAGE
    }

    /// Return whether the span has no pages.
    pub fn is_empty(self) -> bool {
        self.pages == 0
    }
}

/// The entry of each page of `span` in /proc/<pid>/pagemap.
fn entries(span: Span) -> Result<Vec<u64>> {
    let file = File::open(format!("/proc/{}/pagemap", span.pid)).context("pagemap")?;
    let mut raw = vec![0u8; span.pages * 8];
    file.read_exact_at(&mut raw, (span.addr / PAGE * 8) as u64)
        .context("pagemap")?;
    Ok(raw
        .chunks_exact(8)
        .map(|c| u64::from_le_bytes(c.try_into().expect("8 bytes")))
        .collect())
}

/// The page frame behind each page of `span`; `None` where none is mapped.
pub fn frames(span: Span) -> Result<Vec<Option<u64>>> {
    Ok(entries(span)?
        .into_iter()
        .map(|e| (e & PM_PRESENT != 0).then_some(e & PM_PFN))
        .collect())
}

/// How many pages of `span` are swapped out.
pub fn swapped(span: Span) -> Result<usize> {
    Ok(entries(span)?
        .into_iter()
        .filter(|e| e & PM_SWAP != 0)
        .count())
}

/// Of each page of `span`: whether it was written to since soft-dirty tracking began.
pub fn soft_dirty(span: Span) -> Result<Vec<bool>> {
    marked(span, Mark::SoftDirty)
}

/// A mark in a pagemap entry.
#[derive(Clone, Copy)]
pub enum Mark {
    /// Written to since the marks were cleared.
    SoftDirty,
    /// Write-protected by a userfaultfd.
    Protected,
}

/// For each page of `span`, return whether it has the mark, in memory or swapped out.
pub fn marked(span: Span, mark: Mark) -> Result<Vec<bool>> {
    let bit = match mark {
        Mark::SoftDirty => PM_SOFT_DIRTY,
        Mark::Protected => PM_UFFD_WP,
    };
    Ok(entries(span)?.into_iter().map(|e| e & bit != 0).collect())
}

/// For each page of `span`, return its frame if that has the flag.
fn flagged_frames(span: Span, flag: u64) -> Result<Vec<Option<u64>>> {
    let flags = File::open("/proc/kpageflags").context("kpageflags")?;
    frames(span)?
        .into_iter()
        .map(|frame| {
            let Some(pfn) = frame else { return Ok(None) };
            let mut raw = [0u8; 8];
            flags
                .read_exact_at(&mut raw, pfn * 8)
                .context("kpageflags")?;
            Ok((u64::from_le_bytes(raw) & flag != 0).then_some(pfn))
        })
        .collect()
}

/// For each page of `span`, return its frame if that is merged.
pub fn merged_frames(span: Span) -> Result<Vec<Option<u64>>> {
    flagged_frames(span, KPF_KSM)
}

/// Count the pages of `span` that map the kernel's zero page.
pub fn zeroes(span: Span) -> Result<usize> {
    Ok(flagged_frames(span, KPF_ZERO_PAGE)?
        .iter()
        .flatten()
        .count())
}

/// Count the pages of `span` that are in memory and in the swap cache.
pub fn in_swap_cache(span: Span) -> Result<usize> {
    Ok(flagged_frames(span, KPF_SWAPCACHE)?
        .iter()
        .flatten()
        .count())
}

/// Count the pages of `span` that are part of a large folio.
pub fn large(span: Span) -> Result<usize> {
    Ok(flagged_frames(span, KPF_COMPOUND)?.iter().flatten().count())
}

/// Count the pages of `span` that are merged.
pub fn merged(span: Span) -> Result<usize> {
    Ok(merged_frames(span)?.iter().flatten().count())
}

/// Merged pages of several ranges.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Census {
    pub frames: BTreeSet<u64>,
    pub mappings: BTreeMap<u32, u64>,
}

impl Census {
    pub fn take(spans: &[Span]) -> Result<Self> {
        let mut census = Self::default();
        for &span in spans {
            let merged = merged_frames(span)?;
            let count = merged.iter().flatten().count() as u64;
            *census.mappings.entry(span.pid).or_default() += count;
            census.frames.extend(merged.into_iter().flatten());
        }
        Ok(census)
    }

    pub fn total_mappings(&self) -> u64 {
        self.mappings.values().sum()
    }
}
