// SPDX-License-Identifier: GPL-2.0
//! Random operations on memory that merges all the time.

use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};

use super::tests;
use crate::engine;
use crate::harness::{Module, Outcome, Suite, PASS};
use crate::prng::Prng;
use crate::region::{Region, PAGE};
use crate::scan;
use crate::sys::{self, Ended, Forked};

pub const SUITE: Suite = Suite {
    name: "soak",
    about: "processes write, drop, move, protect and verify at random while pages merge",
    module: Module::Loaded,
    tests: tests![
        ("two-processes", 90, two_processes),
        ("with-forks", 90, with_forks)
    ],
};

const PAGES: usize = 48;
const LENGTH: Duration = Duration::from_secs(8);
/// So few contents that most pages have an equal nearly always.
const CONTENTS: usize = 5;

/// Return the seed of the run. `RKSM_SEED` sets it, to repeat a failure.
fn seed() -> u64 {
    let fixed = std::env::var("RKSM_SEED").ok().and_then(|s| s.parse().ok());
    fixed.unwrap_or(20_240_229)
}

fn two_processes() -> Outcome {
    soak(false)
}

fn with_forks() -> Outcome {
    soak(true)
}

fn soak(forks: bool) -> Outcome {
    println!("seed {}", seed());
    scan::start()?;
    let mut pids = Vec::new();
    for i in 0..2 {
        match sys::fork()? {
            Forked::Child => sys::exit_now(worker(seed() + i, forks)),
            Forked::Parent(pid) => pids.push(pid),
        }
    }
    let (mut samples, mut busy, mut most) = (0, 0, 0);
    let mut ended = Vec::new();
    while ended.len() < pids.len() {
        std::thread::sleep(Duration::from_millis(50));
        let sharing = engine::read("pages_sharing")?;
        samples += 1;
        busy += u32::from(sharing > 0);
        most = most.max(sharing);
        for &pid in &pids {
            ended.extend(sys::try_wait(pid).ok().flatten());
        }
    }
    println!("{samples} samples, {busy} with merged pages, at most {most} sharing");
    for (pid, how) in ended {
        ensure!(how == Ended::Exit(0), "process {pid} ended by {how:?}");
    }
    // Without constant merging, the soak would prove nothing. On a busy machine the workers may leave the
    // thread little time.
    ensure!(
        busy * 4 > samples,
        "pages were merged in {busy} of {samples} samples"
    );
    ensure!(most as usize > PAGES / 2, "at most {most} sharing");
    PASS
}

fn worker(seed: u64, forks: bool) -> i32 {
    match work(seed, forks) {
        Ok(()) => 0,
        Err(e) => {
            println!("{e:#}");
            1
        }
    }
}

fn work(seed: u64, forks: bool) -> Result<()> {
    sys::die_with_parent()?;
    let mut prng = Prng::new(seed);
    let mut region = Region::new(PAGES)?;
    region.advise(0, PAGES, libc::MADV_MERGEABLE)?;
    let end = Instant::now() + LENGTH;
    let mut step = 0;
    while Instant::now() < end {
        step += 1;
        let context = || format!("seed {seed}, step {step}");
        random_act(&mut prng, &mut region, forks).with_context(context)?;
        region
            .verify_range(prng.below(PAGES - 8), 8)
            .with_context(context)?;
        if step % 32 == 0 {
            region.verify().with_context(context)?;
            // Give the scan a moment to find unchanged pages.
            std::thread::sleep(Duration::from_millis(prng.next_u64() % 24));
        }
    }
    region.verify()
}

fn random_act(prng: &mut Prng, region: &mut Region, forks: bool) -> Result<()> {
    let (i, n) = (prng.below(PAGES - 8), 1 + prng.below(8));
    match prng.below(if forks { 100 } else { 96 }) {
        0..40 => region.fill(i, n, 1 + prng.below(CONTENTS) as u64, 0),
        40..70 => {
            for k in i..i + n {
                region.poke(k, prng.below(PAGE), prng.next_u64() as u8);
            }
        }
        70..80 => region.dontneed(i, n)?,
        80..85 => {
            region.protect(i, n, libc::PROT_READ)?;
            region.verify_range(i, n)?;
            region.protect(i, n, libc::PROT_READ | libc::PROT_WRITE)?;
        }
        85..90 => {
            region.advise(i, n, libc::MADV_UNMERGEABLE)?;
            region.verify_range(i, n)?;
            region.advise(i, n, libc::MADV_MERGEABLE)?;
        }
        90..92 => region.relocate()?,
        92..96 => std::thread::sleep(Duration::from_millis(10)),
        _ => fork_and_verify(region)?,
    }
    Ok(())
}

/// Fork a child that writes to all it inherited. Neither process sees the other's writes.
fn fork_and_verify(region: &mut Region) -> Result<()> {
    let pid = match sys::fork()? {
        Forked::Child => {
            let ok = region.verify().is_ok() && {
                (0..PAGES).for_each(|i| region.poke(i, i, 0x5a));
                region.verify().is_ok()
            };
            sys::exit_now(i32::from(!ok));
        }
        Forked::Parent(pid) => pid,
    };
    (0..PAGES).step_by(3).for_each(|i| region.poke(i, i, 0xa5));
    loop {
        if let Some((_, how)) = sys::try_wait(pid)? {
            ensure!(how == Ended::Exit(0), "a child ended by {how:?}");
            return region.verify();
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}
