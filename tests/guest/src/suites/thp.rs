// SPDX-License-Identifier: GPL-2.0
//! Huge pages that must stay whole, and huge pages that khugepaged collapses again.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};

use super::tests;
use crate::engine::{self, wait_for};
use crate::harness::{skip, Module, Outcome, Suite, PASS};
use crate::hugepage::{huge_kib, huge_region, part, NO_HUGE_PAGE, PARTS};
use crate::pageflags::{merged, merged_frames, zeroes, Span};
use crate::prng;
use crate::proc::vmstat;
use crate::region::{Region, HUGE, PAGE};
use crate::scan;
use crate::timeout::scaled;
use crate::uffd::{Mode, Uffd};
use crate::worker::Worker;

pub const SUITE: Suite = Suite {
    name: "thp",
    about: "a huge page is split only for a part that merges, and not again and again",
    module: Module::Loaded,
    tests: tests![
        (
            "a-byte-differs-from-a-merged-page",
            120,
            a_byte_differs_from_merged
        ),
        ("marked-by-userfaultfd", 120, marked),
        ("a-pair-that-cannot-merge", 240, pairs),
        (
            "shared-by-a-fork-at-another-address",
            120,
            at_another_address
        ),
        ("zeroes-that-cannot-merge", 120, zeroes_that_cannot),
        ("put-together-again", 240, put_together_again),
        (
            "put-together-again-with-zeroes",
            90,
            put_together_again_with_zeroes
        ),
        ("locked", 120, locked),
    ],
};

/// Passes after which all equal pages have merged.
const PASSES: u64 = 8;

/// Passes after which that is also true of pages that changed outside their sample.
const MANY_PASSES: u64 = 60;

/// Why a test does not run with the in-tree engine.
const IN_TREE_SPLITS: &str = "the in-tree engine splits first, and then sees that nothing merges";
const IN_TREE_FIGHTS: &str = "the in-tree engine splits again and again";

fn ensure_whole(what: &str, region: &Region) -> Result<()> {
    ensure!(huge_kib(region)? != 0, "{what}: split in vain");
    Ok(())
}

/// Return the byte at `offset` of a page with the content of `seed`, and another value for it.
fn two_values(seed: u64, offset: usize) -> (u8, u8) {
    let mut page = [0; PAGE];
    prng::fill(seed, &mut page);
    (page[offset], page[offset] ^ 0x11)
}

fn unmap(mut region: Region) -> Result<()> {
    region.truncate(0)
}

/// Mark the pages of `region` by a userfaultfd until the result is dropped. `None` if the kernel has no such
/// mark.
fn mark(region: &Region, mode: Mode) -> Result<Option<Uffd>> {
    let uffd = Uffd::new(region.span(), mode)?;
    if let Some(uffd) = &uffd {
        uffd.protect(region.span(), true)?;
    }
    Ok(uffd)
}

/// Hold a reference to page `i` of `region` until the result is dropped.
fn hold(region: &Region, i: usize) -> Result<(OwnedFd, OwnedFd)> {
    let (output, input) = crate::sys::pipe()?;
    let page = libc::iovec {
        iov_base: region.at(i) as *mut libc::c_void,
        iov_len: PAGE,
    };
    // SAFETY: The range is our own mapping; the kernel only takes a reference.
    let n = unsafe { libc::vmsplice(input.as_raw_fd(), &raw const page, 1, 0) };
    ensure!(n == PAGE as isize, "vmsplice gave {n}");
    Ok((output, input))
}

/// Huge pages with one part that differs from a merged page in one byte, mostly outside its sample.
fn a_byte_differs_from_merged() -> Outcome {
    const COUNT: usize = 3;
    for (all_like_one, seed) in [(false, 100), (true, 200)] {
        let twin_seed = |k: usize| seed + if all_like_one { 0 } else { k as u64 };
        let twins = if all_like_one { 1 } else { COUNT };
        let mut small = [
            Worker::mergeable(twins, seed)?,
            Worker::mergeable(twins, seed)?,
        ];
        scan::until_merged(twins as u64, twins as u64)?;
        let mut regions = Vec::new();
        for k in 0..COUNT {
            let Some(mut region) = huge_region(100_000 * (k as u64 + 1))? else {
                return skip(NO_HUGE_PAGE);
            };
            let offset = 1001 + 80 * k;
            region.fill(100, 1, twin_seed(k), 0);
            region.poke(100, offset, two_values(twin_seed(k), offset).1);
            region.advise(0, PARTS, libc::MADV_MERGEABLE)?;
            regions.push(region);
        }
        scan::passes(2 * PASSES)?;
        for region in &regions {
            ensure_whole("differs in a byte", region)?;
            region.verify()?;
        }
        // The same, but other parts can merge.
        for (k, region) in regions.iter_mut().enumerate() {
            let offset = 1001 + 80 * k;
            region.poke(100, offset, two_values(twin_seed(k), offset).0);
        }
        scan::until("merge of the equal parts", MANY_PASSES, || {
            let mut all = true;
            for region in &regions {
                all &= merged(part(region, 100))? == 1;
            }
            Ok(all)
        })?;
        for region in regions {
            ensure!(huge_kib(&region)? == 0, "merged, and still a huge page");
            region.verify()?;
            unmap(region)?;
        }
        small.iter_mut().try_for_each(Worker::verify)?;
        let [a, b] = small;
        a.exit()?;
        b.exit()?;
        scan::until_merged(0, 0)?;
    }
    PASS
}

/// Huge pages with a part that is equal to a merged page and marked by a userfaultfd.
fn marked() -> Outcome {
    if engine::is_in_tree() {
        return skip(IN_TREE_SPLITS);
    }
    let mut small = [Worker::mergeable(1, 177)?, Worker::mergeable(1, 177)?];
    scan::until_merged(1, 1)?;
    for (k, mode) in [Mode::Write, Mode::WriteAsync, Mode::Access]
        .into_iter()
        .enumerate()
    {
        let Some(mut region) = huge_region(100_000 * (k as u64 + 1))? else {
            return skip(NO_HUGE_PAGE);
        };
        region.fill(100, 1, 177, 0);
        let Some(uffd) = mark(&region, mode)? else {
            println!("not tried: the kernel has no mark {mode:?}");
            unmap(region)?;
            continue;
        };
        region.advise(0, PARTS, libc::MADV_MERGEABLE)?;
        ensure_whole("before", &region)?;
        scan::passes(PASSES)?;
        ensure_whole(&format!("{mode:?}"), &region)?;
        ensure!(engine::counters()?.sharing == 1, "{mode:?}: merged");
        drop(uffd);
        scan::until("merge without the mark", MANY_PASSES, || {
            Ok(merged(part(&region, 100))? == 1)
        })?;
        region.verify()?;
        unmap(region)?;
        scan::until_merged(1, 1)?;
    }
    small.iter_mut().try_for_each(Worker::verify)?;
    PASS
}

/// What keeps two equal pages from merging.
#[derive(Clone, Copy, Debug)]
enum Obstacle {
    /// They differ in one byte.
    Byte,
    Marked,
    Held,
}

/// A VMA with page `i` of content `seed`. No other page has an equal.
struct Side {
    region: Region,
    i: usize,
    huge: bool,
}

impl Side {
    /// Map it. `None` if the kernel provides no huge page.
    fn new(huge: bool, seed: u64, others: u64) -> Result<Option<Self>> {
        let (mut region, i) = if huge {
            match huge_region(others)? {
                Some(region) => (region, 77),
                None => return Ok(None),
            }
        } else {
            (Region::new(1)?, 0)
        };
        region.fill(i, 1, seed, 0);
        Ok(Some(Self { region, i, huge }))
    }

    fn is_merged(&self) -> Result<bool> {
        Ok(merged(part(&self.region, self.i))? == 1)
    }
}

/// Two pages, neither of them merged, that cannot merge. Neither huge page is split for that.
fn pairs() -> Outcome {
    if engine::is_in_tree() {
        return skip(IN_TREE_SPLITS);
    }
    let obstacles = [
        (Obstacle::Byte, 0),
        (Obstacle::Marked, 0),
        (Obstacle::Marked, 1),
        (Obstacle::Held, 0),
        (Obstacle::Held, 1),
    ];
    let mut seed = 1000;
    for huge in [[true, true], [true, false], [false, true]] {
        for (obstacle, of) in obstacles {
            let what = format!("huge {huge:?}, {obstacle:?} {of}");
            seed += 1;
            let mut sides = Vec::new();
            for (k, huge) in huge.into_iter().enumerate() {
                let others = seed * 100_000 + k as u64 * 10_000;
                let Some(side) = Side::new(huge, seed, others)? else {
                    return skip(NO_HUGE_PAGE);
                };
                sides.push(side);
            }
            let offset = 1609;
            let (right, wrong) = two_values(seed, offset);
            let side = &mut sides[of];
            let mut obstructions = (None, None);
            match obstacle {
                Obstacle::Byte => side.region.poke(side.i, offset, wrong),
                Obstacle::Marked => obstructions.0 = mark(&side.region, Mode::Write)?,
                Obstacle::Held => obstructions.1 = Some(hold(&side.region, side.i)?),
            }
            for side in &sides {
                let region = &side.region;
                region.advise(0, region.pages(), libc::MADV_MERGEABLE)?;
            }
            scan::passes(PASSES)?;
            for side in &sides {
                if side.huge {
                    ensure_whole(&what, &side.region)?;
                }
                ensure!(!side.is_merged()?, "{what}: merged");
            }
            drop(obstructions);
            if matches!(obstacle, Obstacle::Byte) {
                let side = &mut sides[of];
                side.region.poke(side.i, offset, right);
            }
            scan::until(&format!("{what}: merge without it"), MANY_PASSES, || {
                Ok(sides[0].is_merged()? && sides[1].is_merged()?)
            })?;
            for side in sides {
                side.region.verify()?;
                unmap(side.region)?;
            }
            scan::until_merged(0, 0)?;
        }
    }
    PASS
}

/// Two huge pages with an equal part. A child maps each at another address, which no rmap item of a merged
/// page leads to.
fn at_another_address() -> Outcome {
    if engine::is_in_tree() {
        return skip("the in-tree engine merges pages that a child has at another address");
    }
    let (Some(mut a), Some(mut b)) = (huge_region(100_000)?, huge_region(200_000)?) else {
        return skip(NO_HUGE_PAGE);
    };
    for region in [&mut a, &mut b] {
        region.fill(77, 1, 99, 0);
        region.advise(0, PARTS, libc::MADV_MERGEABLE)?;
    }
    let mut children = [Worker::inheriting(&mut a)?, Worker::inheriting(&mut b)?];
    for child in &mut children {
        child.relocate()?;
    }
    scan::passes(2 * PASSES)?;
    for region in [&a, &b] {
        ensure_whole("a child has it at another address", region)?;
        region.verify()?;
    }
    for mut child in children {
        child.verify()?;
        child.exit()?;
    }
    scan::until("merge without the children", MANY_PASSES, || {
        Ok(merged(part(&a, 77))? == 1 && merged(part(&b, 77))? == 1)
    })?;
    a.verify()?;
    b.verify()?;
    PASS
}

/// A part of zeroes that cannot become the zero page.
fn zeroes_that_cannot() -> Outcome {
    if engine::is_in_tree() {
        return skip(IN_TREE_SPLITS);
    }
    engine::write("use_zero_pages", 1)?;
    for (k, obstacle) in [Obstacle::Byte, Obstacle::Marked, Obstacle::Held]
        .into_iter()
        .enumerate()
    {
        let what = format!("{obstacle:?}");
        let Some(mut region) = huge_region(100_000 * (k as u64 + 1))? else {
            return skip(NO_HUGE_PAGE);
        };
        region.fill(5, 1, 0, 0);
        let mut obstructions = (None, None);
        match obstacle {
            Obstacle::Byte => region.poke(5, 1609, 1),
            Obstacle::Marked => obstructions.0 = mark(&region, Mode::Write)?,
            Obstacle::Held => obstructions.1 = Some(hold(&region, 5)?),
        }
        region.advise(0, PARTS, libc::MADV_MERGEABLE)?;
        scan::passes(PASSES)?;
        ensure_whole(&what, &region)?;
        drop(obstructions);
        if matches!(obstacle, Obstacle::Byte) {
            region.poke(5, 1609, 0);
        }
        // The kernel maps the zero page for such parts of a huge page that it splits; for others the engine
        // does.
        scan::until(&format!("{what}: no zeroes left"), MANY_PASSES, || {
            Ok(zeroes(part(&region, 5))? == 1)
        })?;
        region.verify()?;
        unmap(region)?;
    }
    PASS
}

/// A changed value in a file of transparent huge pages, restored when dropped.
struct Setting {
    path: PathBuf,
    before: String,
}

const THP: &str = "/sys/kernel/mm/transparent_hugepage";

impl Setting {
    /// Change it. `None` if the kernel has no such file.
    fn new(name: &str, value: &str) -> Result<Option<Self>> {
        let path = PathBuf::from(THP).join(name);
        let Ok(text) = fs::read_to_string(&path) else {
            return Ok(None);
        };
        // The selected one of several words is in brackets.
        let chosen = text.split(['[', ']']).nth(1).unwrap_or(text.trim());
        let before = chosen.to_string();
        fs::write(&path, value).with_context(|| format!("{value} to {}", path.display()))?;
        Ok(Some(Self { path, before }))
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        let _ = fs::write(&self.path, &self.before);
    }
}

/// Let khugepaged run without pauses, until dropped.
fn hurried_khugepaged() -> Result<Vec<Setting>> {
    let mut all = Vec::new();
    for (name, value) in [
        ("enabled", "always"),
        ("khugepaged/scan_sleep_millisecs", "10"),
        ("khugepaged/alloc_sleep_millisecs", "10"),
        ("khugepaged/pages_to_scan", "65536"),
    ] {
        all.extend(Setting::new(name, value)?);
    }
    Ok(all)
}

/// Read every page, as khugepaged ignores unused ones.
fn touch(region: &Region) {
    for i in 0..region.pages() {
        // SAFETY: The page lies in our own mapping and is readable.
        unsafe { (region.at(i) as *const u8).read_volatile() };
    }
}

/// Return when the huge page at `region` was split: `count` times, or fewer until `limit`.
fn splits(region: &Region, count: usize, limit: Duration) -> Result<Vec<Duration>> {
    let began = Instant::now();
    let limit = scaled(limit);
    let mut last = vmstat("thp_split_page")?;
    let mut times = Vec::new();
    while times.len() < count && began.elapsed() < limit {
        touch(region);
        let now = vmstat("thp_split_page")?;
        for _ in last..now {
            times.push(began.elapsed());
        }
        last = now;
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(times)
}

/// Return whether khugepaged collapses `region` before `limit`. The engine may have split it again already.
fn is_put_together(region: &Region, limit: Duration) -> Result<bool> {
    let end = Instant::now() + scaled(limit);
    let before = vmstat("thp_collapse_alloc")?;
    // From now on khugepaged scans the VMA.
    region.advise(0, PARTS, libc::MADV_HUGEPAGE)?;
    while Instant::now() < end {
        touch(region);
        if vmstat("thp_collapse_alloc")? != before {
            return Ok(true);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(false)
}

/// Let khugepaged and the engine compete for `region`, of which a part just merged.
fn fight(region: &Region) -> Outcome {
    const COUNT: usize = 4;
    if engine::is_in_tree() {
        return skip(IN_TREE_FIGHTS);
    }
    let began = Instant::now();
    let _settings = hurried_khugepaged()?;
    let before = vmstat("thp_collapse_alloc")?;
    if !is_put_together(region, Duration::from_secs(20))? {
        return skip("khugepaged does not collapse it again");
    }
    let times = splits(region, COUNT, Duration::from_secs(40))?;
    let took = began.elapsed();
    let together = vmstat("thp_collapse_alloc")? - before;
    println!("collapsed {together} times, split again after {times:.2?}");
    if times.len() < COUNT && together <= times.len() as i64 {
        return skip("khugepaged does not collapse it again");
    }
    ensure!(times.len() == COUNT, "it did not merge again");
    // Before each split the VMA had to wait, for 2, 4, 8 and 16 s, counted in whole seconds. A longer wait,
    // or one that was seen late, proves nothing.
    ensure!(
        took >= Duration::from_secs(2 + 4 + 8 + 16 - COUNT as u64),
        "{COUNT} splits in {took:.2?}"
    );
    PASS
}

/// The engine splits off one equal part, khugepaged collapses the page, the engine splits it again: ever more
/// rarely.
fn put_together_again() -> Outcome {
    engine::write("smart_scan", 1)?;
    // In this order: otherwise the worker inherits the huge page, and khugepaged ignores shared ones.
    let mut small = Worker::mergeable(1, 1000 + 77)?;
    let Some(region) = huge_region(1000)? else {
        return skip(NO_HUGE_PAGE);
    };
    region.advise(0, PARTS, libc::MADV_MERGEABLE)?;
    scan::until_merged(1, 1)?;
    // A pass that finds the page table emptied by khugepaged forgets the VMA and how often it was split. Then
    // start again.
    let mut outcome = fight(&region);
    for _ in 0..3 {
        if outcome.is_ok() {
            break;
        }
        println!("once more: {outcome:?}");
        outcome = fight(&region);
    }
    let outcome = outcome?;
    region.verify()?;
    small.verify()?;
    Ok(outcome)
}

/// The same with parts of zeroes, which khugepaged takes for empty.
fn put_together_again_with_zeroes() -> Outcome {
    engine::write("smart_scan", 1)?;
    engine::write("use_zero_pages", 1)?;
    let Some(mut region) = huge_region(1000)? else {
        return skip(NO_HUGE_PAGE);
    };
    region.fill(100, 100, 0, 0);
    let parts = Span {
        pages: 100,
        ..part(&region, 100)
    };
    region.advise(0, PARTS, libc::MADV_MERGEABLE)?;
    scan::until("zero pages", 12, || Ok(zeroes(parts)? == 100))?;
    let outcome = fight(&region)?;
    region.verify()?;
    Ok(outcome)
}

/// Wait until `pages` pages are locked in memory and no CPU has uncounted ones.
fn until_locked(what: &str, base: i64, pages: usize) -> Result<()> {
    let mut have = 0;
    let result = wait_for(what, Duration::from_secs(10), || {
        drain()?;
        have = vmstat("nr_mlock")? - base;
        Ok(have == pages as i64)
    });
    println!("{what}: {have} pages are locked, {pages} expected");
    result
}

/// Locked pages, huge, large and small, merge. Each merged page counts once, and none is left when no process
/// locks it any more.
fn locked() -> Outcome {
    const N: usize = 2 * PARTS;
    for size in ["hugepages-2048kB", "hugepages-64kB", "small"] {
        let mut settings = Vec::new();
        settings.extend(Setting::new("enabled", "never")?);
        for other in ["hugepages-2048kB", "hugepages-64kB"] {
            let value = if other == size { "always" } else { "never" };
            settings.extend(Setting::new(&format!("{other}/enabled"), value)?);
        }
        until_stable()?;
        let base = vmstat("nr_mlock")?;
        let mut region = Region::aligned(N, HUGE)?;
        let advice = if size == "small" {
            libc::MADV_NOHUGEPAGE
        } else {
            libc::MADV_HUGEPAGE
        };
        region.advise(0, N, advice)?;
        // SAFETY: The range is our own memory.
        let ret = unsafe { libc::mlock(region.addr() as *const libc::c_void, N * PAGE) };
        ensure!(ret == 0, "mlock: {}", std::io::Error::last_os_error());
        for half in [0, N / 2] {
            region.fill(half, N / 2, 5000, 1);
        }
        until_locked(&format!("{size}, locked"), base, N)?;
        let count = |what: &str| {
            let text = fs::read_to_string(format!("{THP}/{size}/stats/{what}"));
            text.unwrap_or_default().trim().to_string()
        };
        println!("{size}: {:?} of them", count("nr_anon"));
        let all = Span {
            pages: N,
            ..part(&region, 0)
        };
        let frames = |span| -> Result<usize> {
            let frames: std::collections::BTreeSet<u64> =
                merged_frames(span)?.into_iter().flatten().collect();
            Ok(frames.len())
        };
        region.advise(0, N, libc::MADV_MERGEABLE)?;
        scan::until("merge of all", 24, || Ok(merged(all)? == N))?;
        scan::stop()?;
        let merged_to = frames(all)?;
        until_locked(&format!("{size}, merged"), base, merged_to)?;
        // Again, after each page had its own memory.
        engine::write("run", 2)?;
        until_locked(&format!("{size}, unmerged"), base, N)?;
        scan::until("merge of all", 24, || Ok(merged(all)? == N))?;
        scan::stop()?;
        until_locked(&format!("{size}, merged again"), base, frames(all)?)?;
        // Unlock half of the pages that share each merged page.
        // SAFETY: The range is our own memory.
        let ret = unsafe { libc::munlock(region.addr() as *const libc::c_void, N / 2 * PAGE) };
        ensure!(ret == 0, "munlock: {}", std::io::Error::last_os_error());
        until_locked(&format!("{size}, half unlocked"), base, frames(all)?)?;
        // Unmap the rest while it is locked.
        region.verify()?;
        unmap(region)?;
        until_locked(&format!("{size}, unmapped"), base, 0)?;
    }
    PASS
}

/// Flush each CPU's batches: pages to be locked or unlocked, and counts. Compacting memory would do so, too,
/// but may split pages that it moves.
fn drain() -> Result<()> {
    fs::write("/proc/sys/vm/drop_caches", "1").context("drop_caches")?;
    fs::write("/proc/sys/vm/stat_refresh", "1").context("stat_refresh")
}

/// Wait until the number of locked pages is stable.
fn until_stable() -> Result<()> {
    let mut last = -1;
    for _ in 0..100 {
        drain()?;
        let now = vmstat("nr_mlock")?;
        if now == last {
            return Ok(());
        }
        last = now;
    }
    bail!("nr_mlock does not become stable")
}
