// SPDX-License-Identifier: GPL-2.0
//! Ways to track writes: merging hides no write from them.

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
use crate::uffd::{Mode, Uffd};
use crate::worker::Worker;

pub const SUITE: Suite = Suite {
    name: "dirty",
    about: "soft-dirty bits, PAGEMAP_SCAN and userfaultfd write protection work over merging",
    module: Module::Loaded,
    tests: tests![
        ("soft-dirty", 240, soft_dirty),
        ("pagemap-scan", 240, pagemap_scan),
        ("pagemap-scan-zero-pages", 120, pagemap_scan_zeroes),
        ("frozen-pages-stay-frozen", 240, frozen),
    ],
};

const N: usize = 192;

/// A way to find out which pages were written.
trait Tracker {
    /// Begin to track writes.
    fn begin(&self) -> Result<()>;
    /// For each page, return whether it is reported as written.
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

    /// Return the ranges of written pages: start, end, categories.
    fn scan(&self, flags: u64) -> Result<Vec<[u64; 3]>> {
        let (start, end) = (
            self.here.addr as u64,
            (self.here.addr + self.here.pages * PAGE) as u64,
        );
        let mut found = vec![[0u64; 3]; self.here.pages];
        // The fields: size, flags, start, end, walk_end, vec, vec_len, max_pages, category_inverted,
        // category_mask, category_anyof_mask, return_mask.
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
        // SAFETY: The argument and the array that it points to have the stated sizes, and both outlive the
        // call.
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

/// This process's region and two workers to merge with. The first worker has equals of all pages. The second
/// has equals of the first half, which can thus merge before the region's pages do.
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
        // Start these first, so that they do not inherit the region.
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

    /// Merge at least `count` pages of the region, which were written soon after earlier merges.
    fn merge(&self, count: usize) -> Result<()> {
        let here = self.span();
        scan::until_still("merge", || Ok(merged(here)? >= count))?;
        scan::stop()
    }

    /// Move all pages to the other node and back, as far as possible.
    fn migrate(&self) -> Result<()> {
        if let Some((a, b)) = numa::two_nodes()? {
            for to in [a, b, a] {
                numa::move_to(self.span(), to)?;
            }
        }
        Ok(())
    }

    /// Swap out most pages. Return how many.
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
        // The group can only be removed when it is empty.
        let _ = cgroup::enter_root(std::process::id());
    }
}

fn soft_dirty() -> Outcome {
    if engine::is_in_tree() {
        return skip("in-tree KSM makes written pages appear clean");
    }
    let Some(bench) = Bench::new()? else {
        return skip("no zram or no memory cgroups");
    };
    let tracker = SoftDirty(bench.span());
    // A kernel without soft-dirty bits reports no write at all.
    if !tracker.written()?.iter().any(|&written| written) {
        return skip("the kernel has no soft-dirty bits");
    }
    track(bench, &tracker, N)
}

fn pagemap_scan() -> Outcome {
    let Some(bench) = Bench::new()? else {
        return skip("no zram or no memory cgroups");
    };
    let Some(uffd) = Uffd::new(bench.span(), Mode::WriteAsync)? else {
        return skip("the kernel has no userfaultfd");
    };
    let tracker = PagemapScan {
        here: bench.span(),
        _uffd: uffd,
    };
    // Untouched pages are write-protected, and do not merge.
    track(bench, &tracker, N / 2)
}

/// Pages of zeroes become the kernel's zero page, and are written again.
fn pagemap_scan_zeroes() -> Outcome {
    engine::write("use_zero_pages", 1)?;
    let mut region = Region::new(N)?;
    region.advise(0, N, libc::MADV_NOHUGEPAGE)?;
    region.fill(0, N, 100, 1);
    let Some(uffd) = Uffd::new(region.span(), Mode::WriteAsync)? else {
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

/// Write before and after pages merge, and check the reports after each thing that can happen to a page.
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
            "{when}: {missing} of {sum} written pages are reported clean, {more} others as written"
        );
        if missing != 0 {
            lost.push(when.to_string());
        }
        Ok(())
    };
    for round in 0..2u8 {
        if round == 1 {
            // The second time, writes hit merged pages.
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
            // SAFETY: The byte lies in our own mapping. Another thread may write to it, hence the volatile
            // read.
            unsafe { from.add(at).read_volatile() }
        })
        .collect()
}

/// A snapshot by write protection: each page is copied before its first write. A third of the pages merge
/// before; for another third an equal page appears while they are protected; for the rest, two equal pages
/// appear and merge. Then all pages are migrated and swapped.
fn frozen() -> Outcome {
    if engine::is_in_tree() {
        return skip("in-tree KSM removes the protection when it merges");
    }
    let Some(mut bench) = Bench::new()? else {
        return skip("no zram or no memory cgroups");
    };
    const THIRD: usize = N / 3;
    bench.twin.fill(THIRD, N - THIRD, 10_000, 1)?;
    bench.third.fill(THIRD, N - THIRD, 50_000, 1)?;
    bench.merge(THIRD)?;
    let before: Vec<_> = (0..N).map(|i| copy_of(&bench.region, i)).collect();
    let Some(uffd) = Uffd::new(bench.span(), Mode::Write)? else {
        return skip("the kernel has no userfaultfd");
    };
    uffd.protect(bench.span(), true)?;
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
    held("equal pages appeared", &bench)?;
    bench.migrate()?;
    held("migrated", &bench)?;
    scan::stop()?;
    println!("{} pages are swapped out", bench.swap_out()?);
    held("swapped out", &bench)?;
    bench.region.verify()?;
    scan::passes(4)?;
    held("swapped in", &bench)?;
    // The scan continues while pages are written.
    let addr = bench.region.addr();
    let writer = std::thread::spawn(move || {
        for i in 0..N {
            // SAFETY: The byte lies in the region, which outlives the thread, and no reference into it
            // exists.
            unsafe { ((addr + i * PAGE + 33) as *mut u8).write_volatile(0xee) };
        }
    });
    let mut snapshot: Vec<Option<Vec<u8>>> = vec![None; N];
    while !writer.is_finished() {
        let Some(i) = uffd.next_fault(scaled(Duration::from_millis(50)))? else {
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
