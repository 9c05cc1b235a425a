// SPDX-License-Identifier: GPL-2.0
//! What others rely on to learn of writes: no write goes unnoticed because pages were merged.

use std::fs;
use std::os::fd::AsRawFd;
use std::time::Duration;

use anyhow::{ensure, Context, Result};

use super::tests;
use crate::cgroup::{self, Group};
use crate::engine;
use crate::harness::{skip, Module, Outcome, Suite, PASS};
use crate::numa;
use crate::pageflags::{marked, merged, swapped, Mark, Span};
use crate::region::{Region, PAGE};
use crate::scan;
use crate::swap::Zram;
use crate::timeout::scaled;
use crate::uffd::Uffd;
use crate::worker::Worker;

pub const SUITE: Suite = Suite {
    name: "dirty",
    about: "soft-dirty bits, PAGEMAP_SCAN and userfaultfd write protection outlast merging",
    module: Module::Loaded,
    tests: tests![
        ("soft-dirty", 240, soft_dirty),
        ("pagemap-scan", 240, pagemap_scan),
        ("pagemap-scan-zero-pages", 120, pagemap_scan_zeroes),
        ("frozen-pages-stay-frozen", 240, frozen),
    ],
};

const N: usize = 192;

/// A way to learn which pages were written to.
trait Tracker {
    /// From now on.
    fn begin(&self) -> Result<()>;
    /// For each page, whether it is reported to have been written to.
    fn written(&self) -> Result<Vec<bool>>;
}

/// `/proc/<pid>/clear_refs` and bit 55 of the entries of `pagemap`.
struct SoftDirty(Span);

impl Tracker for SoftDirty {
    fn begin(&self) -> Result<()> {
        fs::write("/proc/self/clear_refs", "4").context("clear_refs")
    }

    fn written(&self) -> Result<Vec<bool>> {
        marked(self.0, Mark::SoftDirty)
    }
}

/// The ioctl `PAGEMAP_SCAN`, with asynchronous write protection.
struct PagemapScan {
    here: Span,
    _uffd: Uffd,
}

impl PagemapScan {
    const SCAN: libc::c_ulong = 0xc060_6610;
    const WP_MATCHING: u64 = 1 << 0;
    const CHECK_WPASYNC: u64 = 1 << 1;
    const IS_WRITTEN: u64 = 1 << 1;

    /// Finds ranges of pages that were written to: start, end, categories.
    fn scan(&self, flags: u64) -> Result<Vec<[u64; 3]>> {
        let (start, end) = (
            self.here.addr as u64,
            (self.here.addr + self.here.pages * PAGE) as u64,
        );
        let mut found = vec![[0u64; 3]; self.here.pages];
        // size, flags, start, end, walk_end, vec, vec_len, max_pages, category: inverted, mask, anyof; return
        let mut arg = [
            96,
            flags | Self::CHECK_WPASYNC,
            start,
            end,
            0,
            found.as_mut_ptr() as u64,
            found.len() as u64,
            0,
            0,
            Self::IS_WRITTEN,
            0,
            Self::IS_WRITTEN,
        ];
        let pagemap = fs::File::open("/proc/self/pagemap").context("pagemap")?;
        // SAFETY: the argument has the size that it says, as has the array that it points at; both outlive
        // the call.
        let count = unsafe { libc::ioctl(pagemap.as_raw_fd(), Self::SCAN, arg.as_mut_ptr()) };
        ensure!(
            count >= 0,
            "PAGEMAP_SCAN: {}",
            std::io::Error::last_os_error()
        );
        found.truncate(count as usize);
        Ok(found)
    }
}

impl Tracker for PagemapScan {
    fn begin(&self) -> Result<()> {
        self.scan(Self::WP_MATCHING).map(drop)
    }

    fn written(&self) -> Result<Vec<bool>> {
        let mut all = vec![false; self.here.pages];
        for [start, end, _] in self.scan(0)? {
            let first = (start as usize - self.here.addr) / PAGE;
            let last = (end as usize - self.here.addr) / PAGE;
            all[first..last].fill(true);
        }
        Ok(all)
    }
}

/// This process's region, and two workers to merge with: the first has equals of all pages, the second of the
/// first half, which can so be merged pages before the region's join them.
struct Bench {
    twin: Worker,
    third: Worker,
    region: Region,
    group: Group,
    _zram: Zram,
}

impl Bench {
    fn new() -> Result<Option<Self>> {
        let (Some(zram), Some(group)) = (Zram::new(64)?, Group::new("dirty")?) else {
            return Ok(None);
        };
        // First, so that it inherits nothing.
        let twin = Worker::mergeable_in(&group, N, 100)?;
        let mut third = Worker::mergeable_in(&group, N, 100)?;
        third.fill(N / 2, N / 2, 50_000, 1)?;
        let mut region = Region::new(N)?;
        region.advise(0, N, libc::MADV_NOHUGEPAGE)?;
        group.enter(std::process::id())?;
        region.fill(0, N, 100, 1);
        region.advise(0, N, libc::MADV_MERGEABLE)?;
        Ok(Some(Self {
            twin,
            third,
            region,
            group,
            _zram: zram,
        }))
    }

    fn span(&self) -> Span {
        self.region.span()
    }

    /// Merges at least `count` pages of the region, which have been written to soon after earlier merges.
    fn merge(&self, count: usize) -> Result<()> {
        let here = self.span();
        scan::until_still("merge", || Ok(merged(here)? >= count))?;
        scan::stop()
    }

    /// Moves all pages to the other node and back, as far as that is possible.
    fn migrate(&self) -> Result<()> {
        if let Some((a, b)) = numa::two_nodes()? {
            for to in [a, b, a] {
                numa::move_to(self.span(), to)?;
            }
        }
        Ok(())
    }

    /// Swaps out most pages, and says how many.
    fn swap_out(&self) -> Result<usize> {
        for _ in 0..20 {
            let _ = self.group.reclaim(16 << 20)?;
            if swapped(self.span())? == N {
                break;
            }
        }
        swapped(self.span())
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        // The group can only be removed when nobody is in it.
        let _ = cgroup::enter_root(std::process::id());
    }
}

fn soft_dirty() -> Outcome {
    if engine::is_in_tree() {
        return skip("it has up to all written pages reported as clean");
    }
    let Some(bench) = Bench::new()? else {
        return skip("no zram or no memory cgroups");
    };
    let tracker = SoftDirty(bench.span());
    // A kernel without soft-dirty bits has none to report.
    if !tracker.written()?.iter().any(|&written| written) {
        return skip("the kernel has no soft-dirty bits");
    }
    track(bench, &tracker, N)
}

fn pagemap_scan() -> Outcome {
    let Some(bench) = Bench::new()? else {
        return skip("no zram or no memory cgroups");
    };
    let Some(uffd) = Uffd::noting(&bench.region)? else {
        return skip("the kernel has no userfaultfd");
    };
    let tracker = PagemapScan {
        here: bench.span(),
        _uffd: uffd,
    };
    // Pages that were not written to are write-protected, and not merged.
    track(bench, &tracker, N / 2)
}

/// Pages that are filled with zeroes become the kernel's zero page, and are written to again.
fn pagemap_scan_zeroes() -> Outcome {
    engine::write("use_zero_pages", 1)?;
    let mut region = Region::new(N)?;
    region.advise(0, N, libc::MADV_NOHUGEPAGE)?;
    region.fill(0, N, 100, 1);
    let Some(uffd) = Uffd::noting(&region)? else {
        return skip("the kernel has no userfaultfd");
    };
    let tracker = PagemapScan {
        here: region.span(),
        _uffd: uffd,
    };
    let ensure_written = |when: &str, step: usize| -> Result<()> {
        let reported = tracker.written()?;
        let wrong = (0..N).find(|&i| reported[i] != (step != 0 && i % step == 0));
        ensure!(wrong.is_none(), "{when}: page {wrong:?}: {reported:?}");
        Ok(())
    };
    tracker.begin()?;
    for i in (0..N).step_by(2) {
        region.fill(i, 1, 0, 0);
    }
    region.advise(0, N, libc::MADV_MERGEABLE)?;
    let zero_pages = || engine::read("ksm_zero_pages");
    scan::until("zero pages", 12, || Ok(zero_pages()? == N as u64 / 2))?;
    scan::stop()?;
    ensure_written("merged", 2)?;
    tracker.begin()?;
    ensure_written("clean", 0)?;
    ensure!(zero_pages()? == N as u64 / 2);
    for i in (0..N).step_by(4) {
        region.fill(i, 1, 200, 1);
    }
    ensure_written("written to", 4)?;
    ensure!(zero_pages()? == N as u64 / 4);
    engine::write("run", 2)?;
    ensure_written("unmerged", 4)?;
    region.verify()?;
    PASS
}

/// Writes before and after pages are merged, and follows them over all that can happen to the pages.
fn track(mut bench: Bench, tracker: &impl Tracker, mergeable: usize) -> Outcome {
    let mut written = vec![false; N];
    let mut lost = Vec::new();
    let mut check = |when: &str, written: &[bool]| -> Result<()> {
        let reported = tracker.written()?;
        let sum = written.iter().filter(|&&w| w).count();
        let missing = written
            .iter()
            .zip(&reported)
            .filter(|(&w, &r)| w && !r)
            .count();
        let more = reported.iter().filter(|&&r| r).count() - (sum - missing);
        println!(
            "{when}: {missing} of {sum} written pages are reported clean, {more} others written"
        );
        if missing != 0 {
            lost.push(when.to_string());
        }
        Ok(())
    };
    for round in 0..2u8 {
        if round == 1 {
            // The second time writes hit merged pages.
            bench.merge(mergeable)?;
        }
        tracker.begin()?;
        written.fill(false);
        for i in (0..N).step_by(2) {
            bench.region.poke(i, 17, round + 1);
            written[i] = true;
        }
        check("written to", &written)?;
        for i in (0..N).step_by(2) {
            bench.twin.poke(i, 1, 17, round + 1)?;
            bench.third.poke(i, 1, 17, round + 1)?;
        }
        bench.merge(N / 2)?;
        check("merged", &written)?;
        bench.migrate()?;
        check("migrated", &written)?;
        let out = bench.swap_out()?;
        check("swapped out", &written)?;
        println!("{out} pages are swapped out");
        ensure!(out >= N / 2, "{out} pages are swapped out");
        bench.region.verify()?;
        bench.twin.verify()?;
        bench.third.verify()?;
        check("swapped in", &written)?;
        bench.merge(N / 2)?;
        check("merged again", &written)?;
        engine::write("run", 2)?;
        check("unmerged by run=2", &written)?;
        bench.merge(N / 2)?;
        bench.region.advise(0, N, libc::MADV_UNMERGEABLE)?;
        check("unmerged by madvise", &written)?;
        bench.region.advise(0, N, libc::MADV_MERGEABLE)?;
        bench.merge(N / 2)?;
        check("merged once more", &written)?;
        bench.region.verify()?;
        bench.twin.verify()?;
        bench.third.verify()?;
    }
    ensure!(lost.is_empty(), "writes are lost when {}", lost.join(", "));
    PASS
}

fn copy_of(region: &Region, i: usize) -> Vec<u8> {
    let from = region.at(i) as *const u8;
    (0..PAGE)
        .map(|at| {
            // SAFETY: the byte lies in our own mapping. It may be written to at the same time, hence volatile.
            unsafe { from.add(at).read_volatile() }
        })
        .collect()
}

/// A snapshot by write protection: pages are copied before the first write to each. A third of them are merged
/// before; for another third an equal page turns up while they are protected, and for the rest two, which merge.
/// Then all are migrated and swapped.
fn frozen() -> Outcome {
    if engine::is_in_tree() {
        return skip("merging takes the protection away, and snapshots are wrong");
    }
    let Some(mut bench) = Bench::new()? else {
        return skip("no zram or no memory cgroups");
    };
    const THIRD: usize = N / 3;
    bench.twin.fill(THIRD, N - THIRD, 10_000, 1)?;
    bench.third.fill(THIRD, N - THIRD, 50_000, 1)?;
    bench.merge(THIRD)?;
    let before: Vec<_> = (0..N).map(|i| copy_of(&bench.region, i)).collect();
    let Some(mut uffd) = Uffd::waiting(&bench.region)? else {
        return skip("the kernel has no userfaultfd");
    };
    uffd.protect()?;
    let held = |when: &str, bench: &Bench| -> Result<()> {
        let count = marked(bench.span(), Mark::Protected)?
            .iter()
            .filter(|&&held| held)
            .count();
        println!("{when}: {count} of {N} pages are protected");
        ensure!(count == N, "{when}: {count} of {N} pages are protected");
        Ok(())
    };
    held("before", &bench)?;
    bench.twin.fill(0, N, 100, 1)?;
    let last = 2 * THIRD;
    bench.third.fill(last, N - last, 100 + last as u64, 1)?;
    scan::passes(6)?;
    held("equals turned up", &bench)?;
    bench.migrate()?;
    held("migrated", &bench)?;
    scan::stop()?;
    println!("{} pages are swapped out", bench.swap_out()?);
    held("swapped out", &bench)?;
    bench.region.verify()?;
    scan::passes(4)?;
    held("swapped in", &bench)?;
    // Scanning goes on while pages are written to.
    let addr = bench.region.addr();
    let writer = std::thread::spawn(move || {
        for i in 0..N {
            // SAFETY: the byte lies in the region, which outlives the thread, and no reference into it exists.
            unsafe { ((addr + i * PAGE + 33) as *mut u8).write_volatile(0xee) };
        }
    });
    let mut snapshot: Vec<Option<Vec<u8>>> = vec![None; N];
    while !writer.is_finished() {
        let Some(i) = uffd.next_write(scaled(Duration::from_millis(50)))? else {
            continue;
        };
        snapshot[i] = Some(copy_of(&bench.region, i));
        uffd.let_through(i)?;
    }
    ensure!(writer.join().is_ok(), "the writer panicked");
    let mut wrong = 0;
    for (i, (taken, before)) in snapshot.into_iter().zip(before).enumerate() {
        let taken = taken.unwrap_or_else(|| copy_of(&bench.region, i));
        wrong += usize::from(taken != before);
    }
    println!("{wrong} of {N} pages of the snapshot are wrong");
    ensure!(wrong == 0, "{wrong} pages of the snapshot are wrong");
    for i in 0..N {
        bench.region.note_poke(i, 33, 0xee);
    }
    bench.region.verify()?;
    bench.twin.verify()?;
    bench.third.verify()?;
    PASS
}
