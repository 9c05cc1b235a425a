// SPDX-License-Identifier: GPL-2.0
//! Merged pages that are swapped out and come back.

use std::time::Duration;

use anyhow::{ensure, Context, Result};

use super::tests;
use crate::background::Background;
use crate::cgroup::Group;
use crate::engine::{self, wait_for};
use crate::harness::{skip, Module, Outcome, Suite, PASS};
use crate::pageflags::{in_swap_cache, merged, swapped, Span};
use crate::region::{Region, PAGE};
use crate::scan;
use crate::swap::{SwapDisk, Zram};
use crate::sys;
use crate::worker::{verify_all, Worker};

pub const SUITE: Suite = Suite {
    name: "swap",
    about: "merged pages are swapped out to zram and faulted in again",
    module: Module::Loaded,
    tests: tests![
        ("reclaim-and-fault-in", 120, reclaim),
        ("madv-pageout", 120, pageout),
        ("written-to-while-swapped-out", 120, write_swapped),
        ("owners-exit-while-swapped-out", 120, exit_swapped),
        ("fork-while-swapped-out", 120, fork_swapped),
        ("swapoff", 120, swapoff),
        ("reclaim-while-merging", 180, while_merging),
        ("run-2-while-swapped-out", 120, unmerge_swapped),
        ("run-2-while-reclaiming", 180, while_unmerging),
        ("given-up-by-one-joined-by-another", 120, given_up),
        (
            "unmerged-forked-and-given-up-by-one",
            120,
            unmerged_given_up
        ),
        ("shared-once-and-read-back", 120, shared_once),
    ],
};

const N: usize = 128;
const NO_SWAP: &str = "no zram or no memory cgroups";

fn pages() -> u64 {
    N as u64
}

/// Workers in a cgroup of their own, with swap space. The fields are dropped in this order.
struct Bench {
    workers: Vec<Worker>,
    group: Group,
    zram: Zram,
}

impl Bench {
    /// Start two workers with the same pages, and merge these. `None` without cgroups or swap.
    fn new() -> Result<Option<Self>> {
        let (Some(zram), Some(group)) = (Zram::new(64)?, Group::new("swap")?) else {
            return Ok(None);
        };
        let mut this = Self {
            workers: Vec::new(),
            group,
            zram,
        };
        this.add()?;
        this.add()?;
        scan::until_merged(pages(), pages())?;
        Ok(Some(this))
    }

    fn add(&mut self) -> Result<()> {
        let mut worker = Worker::new()?;
        self.group.enter(worker.pid())?;
        worker.map(N)?;
        worker.fill(0, N, 100, 1)?;
        worker.advise(0, N, libc::MADV_MERGEABLE)?;
        self.workers.push(worker);
        Ok(())
    }

    fn span(&self, i: usize) -> Span {
        self.workers[i].span()
    }

    /// Reclaim as much as possible, several times, as some pages may be busy.
    fn reclaim(&self) -> Result<()> {
        for _ in 0..5 {
            if !self.group.reclaim(8 * N * PAGE)? {
                break;
            }
        }
        Ok(())
    }

    /// Reclaim, and check that most pages of each worker are swapped out.
    fn swap_out(&self) -> Result<()> {
        let mut counts = Vec::new();
        for _ in 0..20 {
            self.reclaim()?;
            counts.clear();
            for worker in &self.workers {
                counts.push(swapped(worker.span())?);
            }
            if counts.iter().all(|&n| n > N * 3 / 4) {
                println!("{counts:?} of {N} pages are swapped out");
                return Ok(());
            }
        }
        anyhow::bail!("only {counts:?} of {N} pages are swapped out");
    }

    /// Merge all equal pages without disturbance, and check all bytes.
    fn merge_again(&mut self) -> Outcome {
        verify_all(&mut self.workers)?;
        scan::until_merged(pages(), pages() * (self.workers.len() as u64 - 1))?;
        verify_all(&mut self.workers)?;
        PASS
    }
}

fn reclaim() -> Outcome {
    let Some(mut bench) = Bench::new()? else {
        return skip(NO_SWAP);
    };
    for stopped in [true, false] {
        if stopped {
            scan::stop()?;
        }
        bench.swap_out()?;
        scan::passes(2)?;
        verify_all(&mut bench.workers)?;
        bench.merge_again()?;
    }
    PASS
}

fn pageout() -> Outcome {
    let Some(mut bench) = Bench::new()? else {
        return skip(NO_SWAP);
    };
    // MADV_PAGEOUT skips pages that other processes map as well.
    bench.workers[0].advise(0, N, libc::MADV_PAGEOUT)?;
    verify_all(&mut bench.workers)?;
    bench.workers.pop().context("two workers")?.kill()?;
    scan::stop()?;
    // The thread may have been scanning its address space, which is then torn down a little later.
    let mut out = 0;
    wait_for("most pages swapped out", Duration::from_secs(5), || {
        bench.workers[0].advise(0, N, libc::MADV_PAGEOUT)?;
        out = swapped(bench.span(0))?;
        Ok(out > N / 2)
    })?;
    println!("{out} of {N} pages are swapped out");
    bench.workers[0].verify()?;
    scan::until_merged(0, 0)?;
    bench.add()?;
    bench.merge_again()?;
    // While the scan runs.
    for _ in 0..10 {
        bench.workers[0].advise(0, N, libc::MADV_PAGEOUT)?;
        bench.workers[1].advise(0, N, libc::MADV_PAGEOUT)?;
        verify_all(&mut bench.workers)?;
    }
    bench.merge_again()
}

fn write_swapped() -> Outcome {
    let Some(mut bench) = Bench::new()? else {
        return skip(NO_SWAP);
    };
    scan::stop()?;
    bench.swap_out()?;
    bench.workers[0].poke(0, N, 17, 0x55)?;
    verify_all(&mut bench.workers)?;
    bench.workers[1].poke(0, N / 2, 18, 0x66)?;
    verify_all(&mut bench.workers)?;
    scan::until_merged(0, 0)?;
    verify_all(&mut bench.workers)?;
    PASS
}

fn exit_swapped() -> Outcome {
    let Some(mut bench) = Bench::new()? else {
        return skip(NO_SWAP);
    };
    for round in 0..2 {
        scan::stop()?;
        bench.swap_out()?;
        bench.workers.remove(0).exit()?;
        verify_all(&mut bench.workers)?;
        if round == 1 {
            bench.workers.pop().context("a worker")?.kill()?;
            break;
        }
        bench.add()?;
        bench.merge_again()?;
    }
    // The stable nodes go as well, as run=2 at the end of this test and the final unload confirm.
    scan::until_merged(0, 0)?;
    PASS
}

fn fork_swapped() -> Outcome {
    let Some(mut bench) = Bench::new()? else {
        return skip(NO_SWAP);
    };
    scan::stop()?;
    bench.swap_out()?;
    bench.workers[0].fork()?;
    bench.workers[0].poke(0, N / 2, 3, 3)?;
    verify_all(&mut bench.workers)?;
    // The child has the other half of the pages, and the old content of this half.
    bench.workers[0].verify_child()?;
    scan::passes(4)?;
    bench.swap_out()?;
    bench.workers[0].verify_child()?;
    verify_all(&mut bench.workers)?;
    scan::passes(4)?;
    bench.workers[0].verify_child()?;
    verify_all(&mut bench.workers)?;
    PASS
}

fn swapoff() -> Outcome {
    let Some(mut bench) = Bench::new()? else {
        return skip(NO_SWAP);
    };
    for stopped in [true, false] {
        if stopped {
            scan::stop()?;
        }
        bench.swap_out()?;
        bench.zram.off()?;
        ensure!(swapped(bench.span(0))? == 0 && swapped(bench.span(1))? == 0);
        bench.merge_again()?;
        bench.zram.on_again()?;
    }
    PASS
}

/// Reclaim from the group again and again in the background.
fn reclaiming(bench: &Bench) -> Result<Background> {
    let group = bench.group.again();
    Background::repeat(move || group.reclaim(N * PAGE).map(drop))
}

/// Pages merge while reclaim swaps them out and `verify_all` reads them in again.
fn while_merging() -> Outcome {
    let Some(mut bench) = Bench::new()? else {
        return skip(NO_SWAP);
    };
    let pressure = reclaiming(&bench)?;
    for round in 0..10u64 {
        for (i, worker) in bench.workers.iter_mut().enumerate() {
            worker.fill(0, N / 2, 1000 * (round + 1), 1)?;
            worker.poke(N / 2, N / 4, 9, (round as u8).wrapping_mul(2) + i as u8)?;
        }
        scan::passes(2)?;
        verify_all(&mut bench.workers)?;
    }
    pressure.stop()?;
    for worker in &mut bench.workers {
        worker.fill(0, N, 500, 1)?;
    }
    bench.merge_again()
}

fn unmerge_swapped() -> Outcome {
    let Some(mut bench) = Bench::new()? else {
        return skip(NO_SWAP);
    };
    for _ in 0..3 {
        scan::stop()?;
        bench.swap_out()?;
        engine::write("run", 2)?;
        let c = engine::counters()?;
        ensure!((c.shared, c.sharing) == (0, 0), "{c:?}");
        verify_all(&mut bench.workers)?;
        ensure!(bench.workers[0].merged()? == 0 && bench.workers[1].merged()? == 0);
        bench.merge_again()?;
    }
    PASS
}

/// Pages that come back from the swap cache while everything is unmerged must not stay merged.
fn while_unmerging() -> Outcome {
    let Some(mut bench) = Bench::new()? else {
        return skip(NO_SWAP);
    };
    for _ in 0..8 {
        let pressure = reclaiming(&bench)?;
        scan::passes(2)?;
        engine::write("run", 2)?;
        let c = engine::counters()?;
        ensure!((c.shared, c.sharing) == (0, 0), "{c:?}");
        verify_all(&mut bench.workers)?;
        for i in 0..2 {
            let merged = bench.workers[i].merged()?;
            ensure!(merged == 0, "{merged} pages came back merged");
        }
        pressure.stop()?;
        bench.merge_again()?;
    }
    PASS
}

/// The last process that maps a merged page gives it up (`MADV_FREE`), then another process's page merges
/// with it. The first reclaim must not drop that process's content.
fn given_up() -> Outcome {
    if engine::is_in_tree() {
        return skip("in-tree KSM loses the third process's pages: they read as zeroes");
    }
    let Some(mut bench) = Bench::new()? else {
        return skip(NO_SWAP);
    };
    bench.workers[1].fill(0, N, 500, 1)?;
    scan::stop()?;
    bench.workers[0].advise(0, N, libc::MADV_FREE)?;
    bench.add()?;
    let joined = bench.span(2);
    scan::until("merge of the third", 12, || Ok(merged(joined)? == N))?;
    scan::stop()?;
    bench.reclaim()?;
    bench.workers[2].verify()?;
    bench.workers[1].verify()?;
    PASS
}

/// Two processes share pages that `run=2` has unmerged over a fork, and one gives them up. The first reclaim
/// must not drop the other one's content.
fn unmerged_given_up() -> Outcome {
    let Some(mut bench) = Bench::new()? else {
        return skip(NO_SWAP);
    };
    if engine::is_in_tree() {
        return skip("in-tree KSM loses the other process's pages: they read as zeroes");
    }
    engine::write("run", 2)?;
    bench.workers[0].fork()?;
    bench.workers[0].advise(0, N, libc::MADV_FREE)?;
    bench.reclaim()?;
    bench.workers[0].verify_child()?;
    PASS
}

/// Pages that a fork once shared and that came back from a disk have one owner, although the swap cache still
/// holds them.
fn shared_once() -> Outcome {
    let Some(_disk) = SwapDisk::new()? else {
        return skip("no null_blk driver");
    };
    let mut region = Region::new(2 * N)?;
    region.advise(0, 2 * N, libc::MADV_NOHUGEPAGE)?;
    region.fill(0, N, 100, 1);
    region.fill(N, N, 100, 1);
    match sys::fork().context("fork")? {
        sys::Forked::Child => sys::exit_now(0),
        sys::Forked::Parent(pid) => wait_for("exit of a child", Duration::from_secs(10), || {
            Ok(sys::try_wait(pid)?.is_some())
        })?,
    }
    let here = Span {
        pid: std::process::id(),
        addr: region.addr(),
        pages: 2 * N,
    };
    for _ in 0..20 {
        region.advise(0, 2 * N, libc::MADV_PAGEOUT)?;
        if swapped(here)? > N * 3 / 2 {
            break;
        }
    }
    let out = swapped(here)?;
    region.verify()?;
    let kept = in_swap_cache(here)?;
    println!(
        "{out} of {} pages were swapped out, {kept} are in the swap cache",
        2 * N
    );
    ensure!(out > N * 3 / 2, "not swapped out");
    if kept < N {
        return skip("this kernel does not keep them in the swap cache");
    }
    region.advise(0, 2 * N, libc::MADV_MERGEABLE)?;
    scan::until_merged(pages(), pages())?;
    region.verify()?;
    PASS
}
