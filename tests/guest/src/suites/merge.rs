// SPDX-License-Identifier: GPL-2.0
//! Which pages merge, and which must not.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};

use super::tests;
use crate::cgroup::Group;
use crate::engine;
use crate::harness::{skip, Module, Outcome, Suite, PASS};
use crate::numa;
use crate::pageflags::{merged, Span};
use crate::prng::Prng;
use crate::proc;
use crate::region::{Region, HUGE, PAGE};
use crate::scan;
use crate::worker::{verify_all, Worker};

pub const SUITE: Suite = Suite {
    name: "merge",
    about: "equal pages merge, unequal and foreign ones do not",
    module: Module::Loaded,
    tests: tests![
        ("within-a-process", 60, within_a_process),
        ("across-two-processes", 60, across_two_processes),
        ("across-a-fork", 60, across_a_fork),
        ("merged-pages-are-inherited-by-fork", 60, inherited_by_fork),
        ("onto-a-merged-page", 60, onto_a_merged_page),
        ("zero-pages", 60, zero_pages),
        ("300-sharers-of-one-page", 60, many_sharers),
        ("one-byte-makes-a-difference", 60, one_byte),
        ("nearly-equal-pages", 60, nearly_equal),
        ("changes-that-hardly-show", 90, hardly_shows),
        ("unregistered-memory-is-left-alone", 60, unregistered),
        ("shared-mapping-is-left-alone", 60, shared_mapping),
        ("private-file-pages", 60, private_file_pages),
        ("merges-again-after-a-write", 60, merges_again),
        ("pages-of-who-did-not-ask", 90, strangers),
        ("three-passes-after-the-last-write", 150, three_passes),
        ("who-waits-has-changed-unseen", 60, changed_unseen),
        ("rewritten-while-being-merged", 120, rewritten),
        ("one-that-differs-before-two-equals", 60, differs_before),
    ],
};

const N: usize = 32;

fn within_a_process() -> Outcome {
    let mut region = Region::new(2 * N)?;
    // N equal pages, and N pages in equal pairs.
    region.fill(0, N, 100, 0);
    region.fill(N, N / 2, 200, 1);
    region.fill(N + N / 2, N / 2, 200, 1);
    region.advise(0, 2 * N, libc::MADV_MERGEABLE)?;
    scan::until_merged(1 + N as u64 / 2, N as u64 - 1 + N as u64 / 2)?;
    ensure!(merged(region.span())? == 2 * N);
    region.verify()?;
    PASS
}

fn across_two_processes() -> Outcome {
    let mut workers = [Worker::mergeable(N, 100)?, Worker::mergeable(N, 100)?];
    scan::until_merged(N as u64, N as u64)?;
    for worker in &workers {
        ensure!(worker.merged()? == N);
    }
    verify_all(&mut workers)?;
    PASS
}

fn across_a_fork() -> Outcome {
    let mut region = Region::new(N)?;
    region.fill(0, N, 100, 1);
    region.advise(0, N, libc::MADV_MERGEABLE)?;
    let mut child = Worker::inheriting(&mut region)?;
    // Writing gives the child pages of its own, again equal to its parent's.
    child.fill(0, N, 7, 1)?;
    child.fill(0, N, 100, 1)?;
    scan::until_merged(N as u64, N as u64)?;
    ensure!(merged(region.span())? == N && child.merged()? == N);
    child.verify()?;
    region.verify()?;
    PASS
}

fn inherited_by_fork() -> Outcome {
    let mut region = Region::new(N)?;
    region.fill(0, N, 100, 0);
    region.advise(0, N, libc::MADV_MERGEABLE)?;
    scan::until_merged(1, N as u64 - 1)?;
    let mut child = Worker::inheriting(&mut region)?;
    ensure!(child.merged()? == N, "the child has private pages");
    // The scan has to find the new mappings.
    scan::until_merged(1, 2 * N as u64 - 1)?;
    child.poke(0, N / 2, 11, 0xee)?;
    child.verify()?;
    region.verify()?;
    ensure!(
        merged(region.span())? == N,
        "the child's write split its parent's"
    );
    child.exit()?;
    scan::passes(1)?;
    region.verify()?;
    PASS
}

fn onto_a_merged_page() -> Outcome {
    let mut workers = vec![Worker::mergeable(N, 100)?, Worker::mergeable(N, 100)?];
    scan::until_merged(N as u64, N as u64)?;
    workers.push(Worker::mergeable(N, 100)?);
    scan::until_merged(N as u64, 2 * N as u64)?;
    ensure!(workers[2].merged()? == N);
    verify_all(&mut workers)?;
    PASS
}

fn zero_pages() -> Outcome {
    let mut worker = Worker::with_pages(N)?;
    // Written, so these are real pages and not the kernel's zero page.
    worker.fill(0, N, 0, 0)?;
    worker.advise(0, N, libc::MADV_MERGEABLE)?;
    scan::until_merged(1, N as u64 - 1)?;
    worker.verify()?;
    worker.poke(0, N, 4095, 1)?;
    worker.verify()?;
    PASS
}

fn many_sharers() -> Outcome {
    // More than the in-tree engine maps to one page (max_page_sharing).
    const MANY: usize = 300;
    let mut worker = Worker::with_pages(MANY)?;
    worker.fill(0, MANY, 100, 0)?;
    worker.advise(0, MANY, libc::MADV_MERGEABLE)?;
    scan::until("all merged", 12, || Ok(worker.merged()? == MANY))?;
    let c = engine::counters()?;
    ensure!(c.shared <= 2, "{c:?}");
    ensure!(c.shared + c.sharing == MANY as u64, "{c:?}");
    worker.verify()?;
    worker.poke(0, MANY, 0, 0xee)?;
    worker.verify()?;
    PASS
}

fn one_byte() -> Outcome {
    // Pages that differ from a common one in a single byte, at both ends and in between.
    let offsets = [0, 1, 63, 64, 255, 256, 1023, 2048, 3000, 4032, 4094, 4095];
    let mut region = Region::new(offsets.len() + 1)?;
    region.fill(0, offsets.len() + 1, 100, 0);
    let mut plain = [0u8; PAGE];
    crate::prng::fill(100, &mut plain);
    for (i, &offset) in offsets.iter().enumerate() {
        region.poke(i, offset, plain[offset] ^ 0x10);
    }
    region.advise(0, region.pages(), libc::MADV_MERGEABLE)?;
    scan::passes(4)?;
    let c = engine::counters()?;
    ensure!(c.shared == 0 && c.sharing == 0, "{c:?}");
    ensure!(merged(region.span())? == 0);
    region.verify()?;
    PASS
}

/// Start a worker whose pages differ from a common one in one byte each.
fn near_copies() -> Result<Worker> {
    let mut worker = Worker::mergeable(N, 0)?;
    worker.fill(0, N, 100, 0)?;
    for i in 0..N {
        worker.poke(i, 1, (i * 509 + 7) % PAGE, 1 + i as u8)?;
    }
    Ok(worker)
}

/// Pages that hardly differ: most of them have the same sample.
fn nearly_equal() -> Outcome {
    const KINDS: u64 = N as u64;
    // All at once, with nothing merged yet.
    let mut workers = vec![near_copies()?, near_copies()?];
    scan::until_merged(KINDS, KINDS)?;
    verify_all(&mut workers)?;
    // More of the same, and as many that differ from these.
    for extra in 1..=3 {
        let mut worker = near_copies()?;
        if extra > 1 {
            worker.poke(0, N, 2000, 0xa5)?;
        }
        workers.push(worker);
        let (shared, sharing) = match extra {
            1 => (KINDS, 2 * KINDS),
            2 => (KINDS, 2 * KINDS),
            _ => (2 * KINDS, 3 * KINDS),
        };
        scan::until_merged(shared, sharing)?;
        scan::passes(3)?;
        scan::until_merged(shared, sharing)?;
        verify_all(&mut workers)?;
    }
    PASS
}

/// Pages differ from merged ones in one byte until the scan treats them as old. Then they become equal.
fn hardly_shows() -> Outcome {
    let mut workers = [
        Worker::mergeable(N, 100)?,
        Worker::mergeable(N, 100)?,
        Worker::mergeable(N, 100)?,
    ];
    scan::until_merged(N as u64, 2 * N as u64)?;
    for offset in [99, 1234, 3210] {
        workers[2].poke(0, N, offset, 0x5a)?;
        scan::until_merged(N as u64, N as u64)?;
        // Time for the engine to deal with pages that have the same sample as others.
        scan::passes(5)?;
        workers[2].fill(0, N, 100, 1)?;
        scan::until_merged(N as u64, 2 * N as u64)?;
        verify_all(&mut workers)?;
    }
    PASS
}

fn unregistered() -> Outcome {
    let mut plain = Worker::with_pages(N)?;
    plain.fill(0, N, 100, 1)?;
    let mut mergeable = Worker::mergeable(N, 100)?;
    scan::passes(4)?;
    ensure!(plain.merged()? == 0 && mergeable.merged()? == 0);
    plain.verify()?;
    mergeable.verify()?;
    PASS
}

/// Map `pages` pages of `file` and open them to merging.
fn map_file(file: &File, pages: usize, flags: libc::c_int) -> Result<Region> {
    // SAFETY: This is a new mapping at an address that the kernel chooses.
    let addr = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            pages * PAGE,
            libc::PROT_READ | libc::PROT_WRITE,
            flags,
            file.as_raw_fd(),
            0,
        )
    };
    ensure!(
        addr != libc::MAP_FAILED,
        "{}",
        std::io::Error::last_os_error()
    );
    let region = Region::adopt(addr as usize, pages);
    region.advise(0, pages, libc::MADV_MERGEABLE)?;
    Ok(region)
}

/// Create an unlinked file of `pages` zero pages.
fn scratch_file(pages: usize) -> Result<File> {
    let path = format!("/tmp/rksm-test-{}", std::process::id());
    let mut file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .with_context(|| path.clone())?;
    std::fs::remove_file(&path)?;
    file.write_all(&vec![0u8; pages * PAGE])?;
    Ok(file)
}

fn shared_mapping() -> Outcome {
    let mut region = map_file(&scratch_file(N)?, N, libc::MAP_SHARED)?;
    region.fill(0, N, 100, 0);
    scan::passes(4)?;
    ensure!(merged(region.span())? == 0);
    region.verify()?;
    PASS
}

fn private_file_pages() -> Outcome {
    let mut region = map_file(&scratch_file(N)?, N, libc::MAP_PRIVATE)?;
    // The write makes the first half anonymous. The rest is only read; it belongs to the page cache and must
    // stay there.
    region.fill(0, N / 2, 100, 0);
    region.verify()?;
    scan::until_merged(1, N as u64 / 2 - 1)?;
    let span = region.span();
    ensure!(
        merged(Span {
            pages: N / 2,
            ..span
        })? == N / 2
    );
    ensure!(merged(span)? == N / 2, "page cache was merged");
    region.verify()?;
    PASS
}

fn merges_again() -> Outcome {
    let mut workers = [Worker::mergeable(N, 100)?, Worker::mergeable(N, 100)?];
    for round in 1..4u8 {
        scan::until_merged(N as u64, N as u64)?;
        // Otherwise some pages would merge again before the check.
        scan::stop()?;
        for worker in &mut workers {
            worker.poke(0, N, 77, round)?;
            ensure!(worker.merged()? == 0, "a written page is still merged");
        }
        verify_all(&mut workers)?;
    }
    scan::until_merged(N as u64, N as u64)?;
    verify_all(&mut workers)?;
    PASS
}

/// A child registers pages that it shares with its unregistered parent: the parent's pages stay unchanged.
fn strangers() -> Outcome {
    let mut region = Region::new(N)?;
    region.advise(0, N, libc::MADV_NOHUGEPAGE)?;
    region.fill(0, N, 100, 1);
    let here = region.span();
    let mut child = Worker::inheriting(&mut region)?;
    let mut partner = Worker::mergeable(N, 100)?;
    scan::passes(2)?;
    child.advise(0, N, libc::MADV_MERGEABLE)?;
    scan::until("merge of the child", 12, || {
        ensure!(
            crate::pageflags::merged(here)? == 0 || engine::is_in_tree(),
            "merged although not registered"
        );
        Ok(child.merged()? == N && partner.merged()? == N)
    })?;
    child.poke(0, N, 7, 1)?;
    partner.verify()?;
    region.verify()?;
    child.verify()?;
    engine::write("run", 2)?;
    let c = engine::counters()?;
    ensure!((c.shared, c.sharing) == (0, 0), "{c:?}");
    partner.verify()?;
    region.verify()?;
    PASS
}

/// Pages are equal to one in the unstable tree, except for a word of it that was written since, mostly
/// outside the sample. Only the first of them becomes a merged page in vain.
fn changed_unseen() -> Outcome {
    const OFFSET: usize = 1000;
    // In three of eight rounds the change is found before.
    const ROUNDS: u64 = 8;
    let mut undone = 0;
    for round in 0..ROUNDS {
        let seed = 100 + round;
        let mut waiting = Region::new(2)?;
        waiting.fill(0, 2, seed, 0);
        waiting.poke(1, OFFSET, 0xa5);
        waiting.advise(0, 2, libc::MADV_MERGEABLE)?;
        scan::passes(3)?;
        waiting.poke(0, OFFSET, 0x5a);
        let before = proc::vmstat("cow_ksm")?;
        let mut region = Region::new(N)?;
        region.fill(0, N, seed, 0);
        region.advise(0, N, libc::MADV_MERGEABLE)?;
        scan::until("merge of all equal pages", 12, || {
            Ok(merged(region.span())? == N)
        })?;
        undone += proc::vmstat("cow_ksm")? - before;
        ensure!(merged(waiting.span())? == 0, "unequal pages are merged");
        waiting.verify()?;
        region.verify()?;
        waiting.unmap()?;
        region.unmap()?;
    }
    ensure!(
        undone <= ROUNDS as i64,
        "{undone} merged pages in {ROUNDS} rounds were for nothing"
    );
    PASS
}

/// Two equal pages come after one that differs from them in a byte outside the sample. It does not keep them
/// from merging, although no page with their sample comes after them.
fn differs_before() -> Outcome {
    const AREAS: usize = 8;
    let mut areas = Vec::new();
    for seed in 0..AREAS as u64 {
        let mut region = Region::new(3)?;
        region.fill(0, 3, 100 + seed, 0);
        region.poke(0, 1000, 0xa5);
        areas.push(region);
    }
    for region in &areas {
        region.advise(0, 3, libc::MADV_MERGEABLE)?;
    }
    scan::until_merged(AREAS as u64, AREAS as u64)?;
    for region in &areas {
        ensure!(merged(region.span())? == 2);
        region.verify()?;
    }
    PASS
}

/// All pages get the same other content while they merge. That needs one merged page.
fn rewritten() -> Outcome {
    const PAGES: usize = 1024;
    const ROUNDS: u64 = 20;
    engine::write("max_page_sharing", 1_000_000)?;
    let mut prng = Prng::new(1);
    for round in 0..ROUNDS {
        let mut region = Region::aligned(PAGES, HUGE)?;
        region.advise(0, PAGES, libc::MADV_NOHUGEPAGE)?;
        region.fill(0, PAGES, 100 + 2 * round, 0);
        scan::start()?;
        region.advise(0, PAGES, libc::MADV_MERGEABLE)?;
        // The pages merge in the second pass. Chance decides which of them are written at what moment.
        std::thread::sleep(Duration::from_micros(prng.below(30_000) as u64));
        region.fill(0, PAGES, 101 + 2 * round, 0);
        scan::until("merge of all pages", 12, || {
            Ok(merged(region.span())? == PAGES)
        })?;
        let c = engine::counters()?;
        ensure!(c.shared == 1, "round {round}: {c:?}");
        region.verify()?;
        region.unmap()?;
    }
    PASS
}

/// Three processes, in a group and on one memory node, rewrite much memory during the scan. Whatever happened
/// to their pages, all merge within three passes after the last write.
fn three_passes() -> Outcome {
    const PAGES: usize = (32 << 20) / PAGE;
    const TRIALS: u64 = 6;
    let Some(group) = Group::new("rewriters")? else {
        return skip("no memory cgroups");
    };
    let Some((node, _)) = numa::two_nodes()? else {
        return skip("no second memory node");
    };
    // One merged page for each content.
    engine::write("max_page_sharing", 1_000_000)?;
    let began = Instant::now();
    for trial in 0..TRIALS {
        // In the debug kernel one trial takes a minute.
        if began.elapsed() > Duration::from_secs(60) {
            break;
        }
        numa::bind(Some(node))?;
        let workers: Result<Vec<_>> = (0..3)
            .map(|_| {
                let mut worker = Worker::new()?;
                group.enter(worker.pid())?;
                worker.map(PAGES)?;
                // The scan does not split pages at once that khugepaged collapsed.
                worker.advise(0, PAGES, libc::MADV_NOHUGEPAGE)?;
                worker.fill(0, PAGES, 100, 0)?;
                worker.advise(0, PAGES, libc::MADV_MERGEABLE)?;
                Ok(worker)
            })
            .collect();
        numa::bind(None)?;
        let mut workers = workers?;
        // Each write follows a merge. With six strikes a page has to hold still for seconds, and a write that
        // the scan finds half done counts as two: this leaves room for one of these.
        for round in 1..3 {
            // The same content for all; then one for each.
            for seeds in [[0, 0, 0], [1, 2, 3]] {
                for (worker, seed) in workers.iter_mut().zip(seeds) {
                    worker.fill(0, PAGES, 1000 * (trial * 10 + round) + seed, 0)?;
                }
                scan::passes(3)?;
                let c = engine::counters()?;
                let contents = if seeds[1] == 0 { 1 } else { 3 };
                let all = 3 * PAGES as u64;
                ensure!(
                    c.shared == contents && c.sharing == all - contents && c.volatile == 0,
                    "trial {trial}, round {round}: {all} pages, {c:?}"
                );
            }
        }
        verify_all(&mut workers)?;
    }
    PASS
}
