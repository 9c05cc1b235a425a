// SPDX-License-Identifier: GPL-2.0
//! Sharers that exit.

use std::time::Duration;

use anyhow::{ensure, Result};

use super::{tests, ORDERS};
use crate::engine::{self, wait_for};
use crate::harness::{skip, Module, Outcome, Suite, PASS};
use crate::scan;
use crate::worker::{verify_all, Worker};

pub const SUITE: Suite = Suite {
    name: "exit",
    about: "sharers end in every order and by every means, the others keep their memory",
    module: Module::Loaded,
    tests: tests![
        ("exit-in-every-order", 120, exit_orders),
        ("kill-9-in-every-order", 120, kill_orders),
        (
            "exit-in-every-order-while-stopped",
            120,
            exit_orders_stopped
        ),
        (
            "kill-9-in-every-order-while-stopped",
            120,
            kill_orders_stopped
        ),
        ("dropped-promptly-without-a-scan", 60, dropped_promptly),
        ("never-scanned-process-is-dropped", 60, never_scanned),
        ("short-lived-processes-while-scanning", 90, short_lived),
        ("all-killed-at-once", 60, all_at_once),
    ],
};

const N: usize = 16;

fn sharers() -> Result<Vec<Option<Worker>>> {
    let workers = (0..3)
        .map(|_| Worker::mergeable(N, 100).map(Some))
        .collect::<Result<_>>()?;
    scan::until_merged(N as u64, 2 * N as u64)?;
    Ok(workers)
}

/// End three sharers by `end`, in every order. After each, verify every byte of the remaining ones, let them
/// write, and verify again.
fn in_every_order(scanning: bool, end: fn(Worker) -> Result<()>) -> Outcome {
    for order in ORDERS {
        let mut workers = sharers()?;
        if !scanning {
            scan::stop()?;
        }
        for leaver in order {
            end(workers[leaver].take().expect("each leaves once"))?;
            for worker in workers.iter_mut().flatten() {
                worker.verify()?;
                worker.poke(leaver, 1, 8, leaver as u8)?;
            }
            for worker in workers.iter_mut().flatten() {
                worker.verify()?;
            }
        }
        scan::until_merged(0, 0)?;
    }
    PASS
}

fn exit_orders() -> Outcome {
    in_every_order(true, Worker::exit)
}

fn kill_orders() -> Outcome {
    in_every_order(true, Worker::kill)
}

fn exit_orders_stopped() -> Outcome {
    in_every_order(false, Worker::exit)
}

fn kill_orders_stopped() -> Outcome {
    in_every_order(false, Worker::kill)
}

/// Wait for all counters to be 0 with the thread stopped.
fn expect_dropped() -> Result<()> {
    wait_for("drop of the metadata", Duration::from_secs(4), || {
        let c = engine::counters()?;
        Ok((c.shared, c.sharing, c.unshared, c.volatile) == (0, 0, 0, 0))
    })
}

fn dropped_promptly() -> Outcome {
    if engine::is_in_tree() {
        return skip("in-tree KSM keeps metadata until the next scan");
    }
    let workers = [Worker::mergeable(N, 100)?, Worker::mergeable(N, 100)?];
    let unique = Worker::mergeable(N, 500)?;
    scan::until("counters of all three", 12, || {
        let c = engine::counters()?;
        Ok((c.shared, c.sharing, c.unshared) == (N as u64, N as u64, N as u64))
    })?;
    scan::stop()?;
    let scans = engine::read("full_scans")?;
    unique.kill()?;
    wait_for("drop of the unshared", Duration::from_secs(4), || {
        Ok(engine::read("pages_unshared")? == 0)
    })?;
    for worker in workers {
        worker.exit()?;
    }
    expect_dropped()?;
    ensure!(engine::read("full_scans")? == scans, "it scanned");
    PASS
}

fn never_scanned() -> Outcome {
    // Processes that register and exit before the thread ever ran.
    for _ in 0..5 {
        Worker::mergeable(N, 100)?.exit()?;
    }
    expect_dropped()?;
    let mut survivor = Worker::mergeable(N, 100)?;
    scan::passes(3)?;
    survivor.verify()?;
    PASS
}

fn short_lived() -> Outcome {
    let mut keeper = Worker::mergeable(N, 100)?;
    scan::start()?;
    for i in 0..40 {
        let worker = Worker::mergeable(N, 100)?;
        std::thread::sleep(Duration::from_millis(i % 8));
        if i % 2 == 0 {
            worker.kill()?;
        } else {
            worker.exit()?;
        }
    }
    keeper.verify()?;
    // A merged page stays merged for its last owner.
    scan::until("drop of the dead", 12, || {
        let c = engine::counters()?;
        Ok(c.sharing == 0 && c.shared == keeper.merged()? as u64)
    })?;
    keeper.verify()?;
    keeper.exit()?;
    scan::until_merged(0, 0)?;
    PASS
}

fn all_at_once() -> Outcome {
    let mut workers = (0..8)
        .map(|_| Worker::mergeable(N, 100))
        .collect::<Result<Vec<_>>>()?;
    scan::until_merged(N as u64, 7 * N as u64)?;
    verify_all(&mut workers)?;
    for worker in &workers {
        crate::sys::kill(worker.pid() as libc::pid_t, libc::SIGKILL)?;
    }
    drop(workers);
    scan::until_merged(0, 0)?;
    PASS
}
