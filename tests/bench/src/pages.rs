// SPDX-License-Identifier: GPL-2.0
//! The registered pages of processes, seen from outside: their content, and so the expected result of
//! merging.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result};

use crate::content::{mix, PAGE};

/// The number of pages to read at a time.
const CHUNK: usize = 256;
/// Bits of /proc/<pid>/pagemap.
const PRESENT: u64 = 1 << 63;
const FILE_OR_SHARED: u64 = 1 << 61;
const PFN: u64 = (1 << 55) - 1;
/// Bits of /proc/kpageflags: the kernel's zero page, and a part of a huge page.
const ZERO_PAGE: u64 = 1 << 24;
const HUGE: u64 = 1 << 22;

type Hash = (u64, u64);

/// A mapped page: its process, address and content.
struct Seen {
    pid: u32,
    addr: u64,
    pfn: u64,
    hash: Hash,
    is_huge: bool,
}

/// All registered pages of some processes at one moment.
pub struct Survey(Vec<Seen>);

impl Survey {
    pub fn take(pids: &[u32]) -> Result<Self> {
        let flags = File::open("/proc/kpageflags").context("kpageflags")?;
        let mut seen = Vec::new();
        for &pid in pids {
            process(pid, &flags, &mut seen).with_context(|| format!("process {pid}"))?;
        }
        Ok(Self(seen))
    }

    pub fn pages(&self) -> u64 {
        self.0.len() as u64
    }

    /// Return the expected `pages_sharing`: all but one of the mappings of every content that more than one
    /// page holds. A page with several mappings because of a fork is no gain by itself. Nor is a zero page in
    /// a huge one: when that is split because of other pages, the kernel itself frees its zero pages.
    pub fn expected_sharing(&self) -> u64 {
        let zero = hash(&[0; PAGE]);
        let mut groups: HashMap<Hash, (u64, HashSet<u64>)> = HashMap::new();
        for page in self.0.iter().filter(|p| !p.is_huge || p.hash != zero) {
            let (mappings, frames) = groups.entry(page.hash).or_default();
            *mappings += 1;
            frames.insert(page.pfn);
        }
        groups
            .values()
            .filter(|(_, frames)| frames.len() > 1)
            .map(|(mappings, _)| mappings - 1)
            .sum()
    }

    /// Return a number that depends on every byte and address of all pages, except those that are all zero.
    /// It does not matter how zeroes are mapped.
    pub fn digest(&self) -> u64 {
        let zero = hash(&[0; PAGE]);
        self.0
            .iter()
            .filter(|p| p.hash != zero)
            .fold(0, |sum, page| {
                let place = mix(mix(page.pid.into()) ^ page.addr);
                mix(mix(mix(sum ^ place) ^ page.hash.0) ^ page.hash.1)
            })
    }
}

/// Return two independent hashes over the words of a page. A collision is too unlikely to ever occur.
fn hash(page: &[u8]) -> Hash {
    let mut hash = (1, 2);
    for word in words(page) {
        hash.0 = (hash.0 ^ word)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .rotate_left(29);
        hash.1 = (hash.1 ^ word)
            .wrapping_mul(0xd6e8_feb8_6659_fd93)
            .rotate_left(31);
    }
    (mix(hash.0), mix(hash.1))
}

/// Return the mergeable ranges of a process, from its smaps.
fn mergeable(smaps: &str) -> Vec<(u64, u64)> {
    let mut ranges = Vec::new();
    let mut current = None;
    for line in smaps.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            if flags.split_whitespace().any(|f| f == "mg") {
                ranges.extend(current);
            }
        } else if let Some(range) = range(line) {
            current = Some(range);
        }
    }
    ranges
}

fn range(line: &str) -> Option<(u64, u64)> {
    let (start, end) = line.split_whitespace().next()?.split_once('-')?;
    Some((
        u64::from_str_radix(start, 16).ok()?,
        u64::from_str_radix(end, 16).ok()?,
    ))
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes
        .chunks_exact(8)
        .map(|word| u64::from_le_bytes(word.try_into().expect("chunks of eight bytes")))
}

fn process(pid: u32, flags: &File, seen: &mut Vec<Seen>) -> Result<()> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).context("smaps")?;
    let pagemap = File::open(format!("/proc/{pid}/pagemap")).context("pagemap")?;
    let memory = File::open(format!("/proc/{pid}/mem")).context("mem")?;
    let mut entries = vec![0; CHUNK * 8];
    let mut page = vec![0; PAGE];
    for (start, end) in mergeable(&smaps) {
        let mut addr = start;
        while addr < end {
            let count = (((end - addr) / PAGE as u64) as usize).min(CHUNK);
            let entries = &mut entries[..count * 8];
            pagemap
                .read_exact_at(entries, addr / PAGE as u64 * 8)
                .context("reading pagemap")?;
            for (n, entry) in words(entries).enumerate() {
                if entry & PRESENT == 0 || entry & FILE_OR_SHARED != 0 {
                    continue;
                }
                let pfn = entry & PFN;
                let mut kind = [0; 8];
                flags
                    .read_exact_at(&mut kind, pfn * 8)
                    .context("kpageflags")?;
                let kind = u64::from_le_bytes(kind);
                if kind & ZERO_PAGE != 0 {
                    continue;
                }
                let addr = addr + (n * PAGE) as u64;
                memory
                    .read_exact_at(&mut page, addr)
                    .context("reading memory")?;
                seen.push(Seen {
                    pid,
                    addr,
                    pfn,
                    hash: hash(&page),
                    is_huge: kind & HUGE != 0,
                });
            }
            addr += (count * PAGE) as u64;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "7f00-7f10 rw-p 00000000 00:00 0\nRss: 4 kB\nVmFlags: rd wr mg \n\
        8000-9000 rw-p 00000000 00:00 0 [heap]\nVmFlags: rd wr \n";

    fn page(pid: u32, pfn: u64, content: u64) -> Seen {
        Seen {
            pid,
            addr: pfn * 4096,
            pfn,
            hash: (content, content),
            is_huge: false,
        }
    }

    #[test]
    fn only_what_is_registered() {
        assert_eq!(mergeable(SMAPS), [(0x7f00, 0x7f10)]);
    }

    #[test]
    fn hashes_tell_pages_apart() {
        let mut page = vec![0; PAGE];
        let zero = hash(&page);
        page[PAGE - 1] = 1;
        let last = hash(&page);
        page[PAGE - 1] = 0;
        page[0] = 1;
        let first = hash(&page);
        assert!(zero != last && zero != first && first != last);
        assert_ne!(zero.0, zero.1);
    }

    #[test]
    fn pages_shared_by_fork_are_no_gain() {
        let alone = Survey(vec![page(1, 5, 9), page(2, 5, 9)]);
        assert_eq!(alone.expected_sharing(), 0);
        let merged = Survey(vec![page(1, 5, 9), page(2, 5, 9), page(3, 6, 9)]);
        assert_eq!(merged.expected_sharing(), 2);
    }

    #[test]
    fn zeroes_in_huge_pages_count_for_nothing() {
        let zero = |pid, is_huge| Seen {
            hash: hash(&[0; PAGE]),
            is_huge,
            ..page(pid, pid.into(), 0)
        };
        let huge = Survey(vec![zero(1, true), zero(2, true)]);
        assert_eq!((huge.expected_sharing(), huge.digest()), (0, 0));
        let small = Survey(vec![zero(1, false), zero(2, false)]);
        assert_eq!((small.expected_sharing(), small.digest()), (1, 0));
    }

    #[test]
    fn the_digest_depends_on_content_and_place() {
        let digest = |pid, content| Survey(vec![page(pid, 5, content)]).digest();
        assert_eq!(digest(1, 2), digest(1, 2));
        assert_ne!(digest(1, 2), digest(1, 3));
        assert_ne!(digest(1, 2), digest(2, 2));
    }
}
