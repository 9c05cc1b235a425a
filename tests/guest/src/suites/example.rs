// SPDX-License-Identifier: GPL-2.0
//! An example of a suite, to copy when you add one. `Documentation/testing.md` has the recipe.
//!
//! A suite is a file with a table of tests, and a test is a function. The harness (`harness.rs`) runs each
//! test as root in the guest, in a process of its own. It does the following, so that no test has to:
//!
//! * Before a test, the module is loaded and stopped, nothing is merged, and the files read as they ship.
//!   Only `pass_millisecs` is 0, because passes a second apart would take hours.
//! * A panic, an error, a signal and the time limit each end the test as `not ok`.
//! * After a test, all of its processes are killed and reaped. So a test that fails leaves none behind.
//! * Then run=2 unmerges all pages. The test fails if `pages_shared` or `pages_sharing` does not read 0.
//! * After all tests, the module must unload. In the debug kernel, no memory may have leaked.
//! * The host reads the kernel log (`scripts/vm`). A warning or an oops fails the run, even if all tests pass.
//!
//! Each test states what any engine must do, so in-tree KSM must pass this suite as well:
//!
//! ```text
//! tests/run example
//! RKSM_ENGINE=ksm tests/run example
//! ```

use std::time::Duration;

use anyhow::ensure;

// The macro that makes the table. A suite imports nothing from another suite: what two suites need is a file
// beside `harness.rs`, or in `tests/lib/src/` if the torture test or the benchmark needs it, too.
use super::tests;
use crate::engine::{self, wait_for};
use crate::harness::{Module, Outcome, Suite, PASS};
use crate::pageflags::merged_frames;
use crate::scan;
use crate::worker::{verify_all, Worker};

pub const SUITE: Suite = Suite {
    // The name for `tests/run`. The KTAP name of a test is `example.equal-pages-share-one-frame`.
    name: "example",
    // One line for `tests/run list`.
    about: "how to write a test: equal pages merge, and a write splits one",
    // Load the module before each test. A suite that loads and unloads it on its own says `Unloaded`.
    module: Module::Loaded,
    // Name, time limit in seconds on an emulated CPU, function. The name says what holds if the test passes.
    // The limit is for a test that hangs, so be generous.
    tests: tests![
        ("equal-pages-share-one-frame", 120, equal_pages),
        ("a-write-is-seen-by-its-writer-alone", 120, a_write),
    ],
};

/// The pages of each process. Tens show as much as thousands, and emulation is slow.
const N: usize = 16;

/// How long the kernel may take to finish a migration.
const MIGRATION_LIMIT: Duration = Duration::from_secs(10);

fn equal_pages() -> Outcome {
    // A `Worker` is a child process with a region of memory, which obeys commands. It has called
    // `madvise(MADV_MERGEABLE)` when `mergeable()` returns. Page `k` has the content of seed 100 + `k`: so
    // page 5 of one process equals page 5 of the other one, and no further page.
    let mut equal = [Worker::mergeable(N, 100)?, Worker::mergeable(N, 100)?];
    // Pages that equal no others. Without them, an engine that merges everything would pass.
    let mut other = Worker::mergeable(N, 5000)?;

    // Start the scan and wait for the condition, not for a time: a pass takes long on an emulated CPU.
    // `until_merged` gives up after a number of passes, and the error then has all counters.
    // `pages_shared` counts the merged pages, and `pages_sharing` their further mappings. Here each merged
    // page has two mappings, so both are N.
    scan::until_merged(N as u64, N as u64)?;
    // Nothing shows that a page does *not* merge, except further passes that find it.
    scan::passes(2)?;
    // The thread would still change things below. Merged pages stay merged without it.
    scan::stop()?;

    // Counters are the engine's own word. Ask the kernel, too: `merged()` counts the pages with the KSM flag
    // in /proc/kpageflags.
    ensure!(
        other.merged()? == 0,
        "pages without an equal are merged: {:?}",
        engine::counters()?
    );
    // Both processes map the same frame for each page. A loop, because the kernel may migrate a page between
    // the two reads, and a test that fails by chance is a bug.
    let [a, b] = [equal[0].span(), equal[1].span()];
    wait_for("frame in common", MIGRATION_LIMIT, || {
        let frames = merged_frames(a)?;
        Ok(frames.iter().all(Option::is_some) && frames == merged_frames(b)?)
    })?;

    // Each process compares every byte with what it wrote. End each test with this: a page that merged with
    // an unequal one is the worst that an engine can do.
    verify_all(&mut equal)?;
    other.verify()?;
    // Nothing is to be undone here. Dropping a worker kills and reaps it, and the harness does the rest.
    PASS
}

fn a_write() -> Outcome {
    // Three processes, so that two still share the page after the third wrote to it.
    let mut workers = [
        Worker::mergeable(N, 100)?,
        Worker::mergeable(N, 100)?,
        Worker::mergeable(N, 100)?,
    ];
    scan::until_merged(N as u64, 2 * N as u64)?;
    // Without the thread, whatever happens to the page now is by the write alone.
    scan::stop()?;

    // Page 3 of the first process: byte 0 becomes 0xee. The worker records that, and `verify` expects it.
    workers[0].poke(3, 1, 0, 0xee)?;
    // The first process has a page of its own now, and its other pages are untouched. The other processes
    // have lost nothing.
    wait_for("split of one page", MIGRATION_LIMIT, || {
        let mut merged = [0; 3];
        for (count, worker) in merged.iter_mut().zip(&workers) {
            *count = worker.merged()?;
        }
        // The output of a test becomes KTAP diagnostics. Print numbers, as a failure may be hard to repeat.
        println!("merged pages after the write: {merged:?}");
        Ok(merged == [N - 1, N, N])
    })?;
    // The writer reads its write, and the others what they had before.
    verify_all(&mut workers)?;

    // The counters may follow only when the engine scans the page next. There is one mapping less, but as
    // many merged pages, because two processes still share page 3. The written page must not merge again.
    scan::passes(2)?;
    scan::until_merged(N as u64, 2 * N as u64 - 1)?;
    verify_all(&mut workers)?;
    PASS
}
