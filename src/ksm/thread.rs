// SPDX-License-Identifier: GPL-2.0

//! The main loop of rksmd: when it scans, when it sleeps, and its deferred work.

use super::{
    filter::Filter, run, scan_buffer::ScanBuffer, stable_tree::ORPHANS_SWEEP, state::State, Engine,
};
use crate::sys::kthread;
use kernel::{
    prelude::*,
    sync::{atomic::Relaxed, Arc},
    time::{Instant, Monotonic},
};

/// The first delay before unfinished deferred work is retried, in milliseconds.
///
/// Such work is to free nodes whose pages are about to be freed, and to register processes for which there was
/// no memory.
const RETRY_MS: u32 = 20;
/// The longest such delay, in milliseconds. Each one is twice as long as the one before.
const RETRY_MAX_MS: u32 = 1000;

/// The scanning thread of an engine.
pub(crate) struct Rksmd {
    engine: Arc<Engine>,
    buffer: KBox<ScanBuffer>,
}

impl Rksmd {
    /// Prepares the thread, which is still to be spawned. May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM` if there is no memory.
    pub(crate) fn new(engine: Arc<Engine>) -> Result<Self> {
        let buffer = KBox::init(ScanBuffer::init(), GFP_KERNEL)?;
        Ok(Self { engine, buffer })
    }
}

impl kthread::ThreadFn for Rksmd {
    fn main(&mut self, current: &kthread::KthreadContext) {
        self.engine.main_loop(current, &mut self.buffer);
    }
}

impl Engine {
    /// Scans, and runs deferred work, until the thread is to end.
    fn main_loop(&self, current: &kthread::KthreadContext, buffer: &mut ScanBuffer) {
        let mut backoff = RETRY_MS;
        let mut pace = Pace::new();
        while !current.should_stop() {
            if self.is_offlining() {
                current.sleep(None, || !self.is_offlining());
                continue;
            }
            let unfinished = self.run_deferred();
            if self.is_offlining() {
                continue;
            }
            // The delay before deferred work is retried.
            backoff = next_backoff(backoff, unfinished);
            let shortest = self.settings.pass_millisecs.load(Relaxed);
            if self.should_scan() {
                let rest = pace.rest(shortest);
                if rest != 0 {
                    let nap = if unfinished { rest.min(backoff) } else { rest };
                    current.sleep(Some(nap), || {
                        self.settings.pass_millisecs.load(Relaxed) != shortest
                            || !self.should_scan()
                            || self.has_deferred()
                    });
                    continue;
                }
                pace.go_on();
                if let Some(pages) = self.scan(current, buffer) {
                    pace.end_pass(pages, self.settings.sleep_millisecs.load(Relaxed) == 0);
                }
            }
            if self.should_scan() {
                self.rest(current, backoff);
            } else {
                // The last batch may have left deferred work.
                let retry = self.has_leftovers(&self.state.lock()).then_some(backoff);
                // If an address space was missed, retry after `backoff`. Otherwise wake as soon as one is
                // missed.
                current.sleep(retry, || {
                    self.should_scan()
                        || self.has_deferred()
                        || (retry.is_none() && self.registry.lock().has_missed())
                });
            }
        }
    }

    /// Whether there is anything to scan: `run` is 1, and an address space is registered.
    fn should_scan(&self) -> bool {
        self.run() == run::MERGE && !self.registry.lock().is_empty()
    }

    /// Whether there is deferred work to do at once, even if there is nothing to scan.
    pub(super) fn has_deferred(&self) -> bool {
        self.has_new_work.load(Relaxed) || self.registry.lock().has_dead()
    }

    /// Runs deferred work: forgets address spaces that have exited, registers those that were missed, and frees
    /// stale nodes.
    ///
    /// Returns whether something is left to be retried a little later: nodes whose pages are about to be freed,
    /// rmap items whose pages are locked by other tasks, or processes for which there was no memory. Takes
    /// `state` repeatedly, each time for a bounded amount of work.
    fn run_deferred(&self) -> bool {
        if self.registry.lock().has_missed() {
            // If this fails, the next call tries again.
            let _ = self.enter_registered();
        }
        loop {
            let mut state = self.state.lock();
            if self.is_offlining() {
                return false;
            }
            let has_more = self.run_some_deferred(&mut state);
            let left = self.has_leftovers(&state);
            drop(state);
            if !has_more {
                return left;
            }
            crate::mm::cond_resched();
        }
    }

    /// Runs a bounded amount of deferred work. Returns whether there is more to be done at once.
    fn run_some_deferred(&self, state: &mut State) -> bool {
        self.has_new_work.store(false, Relaxed);
        self.reap(state);
        let mut has_more = state.forget_dying();
        if let Some(at) = state.core.releasing {
            state.core.releasing = state.core.release_some_stale(at);
            has_more = true;
        }
        if state.core.pages == 0 && !self.should_scan() {
            state.core.filter = Filter::new();
        }
        // After run=2, nodes whose pages are still mapped may go, but not if an address space was registered
        // since: it may be the other half of a fork, and map merged pages.
        let force = self.run() == run::UNMERGE
            && !self.unmerging.load(Relaxed)
            && self.registry.lock().newest() == state.unmerged_to;
        state.core.sweep_orphans(ORPHANS_SWEEP, force);
        if self.run() == run::MERGE {
            let pause = self
                .settings
                .stable_node_chains_prune_millisecs
                .load(Relaxed);
            state.core.prune_after(pause);
        }
        state.core.unpin_if_empty();
        self.update_stats(state);
        has_more
    }

    /// Whether there is deferred work that has to be retried after a while.
    pub(super) fn has_leftovers(&self, state: &State) -> bool {
        state.core.index.orphans_len() != 0
            || state.core.releasing.is_some()
            || state.dying != 0
            || self.registry.lock().has_missed()
    }

    /// Sleeps for `sleep_millisecs` between batches.
    ///
    /// Deferred work that comes up meanwhile runs at once. Unfinished work is retried after `backoff`
    /// milliseconds, and then after longer delays. Neither shortens the sleep, or processes that come and go
    /// would keep the thread from sleeping.
    fn rest(&self, current: &kthread::KthreadContext, mut backoff: u32) {
        let sleep = self.settings.sleep_millisecs.load(Relaxed);
        let is_over =
            || self.settings.sleep_millisecs.load(Relaxed) != sleep || self.run() != run::MERGE;
        let began = Instant::<Monotonic>::now();
        let mut left = sleep;
        // The batch may have left deferred work. If there is no sleep, the main loop gets to it at once.
        let mut unfinished = sleep != 0 && self.has_leftovers(&self.state.lock());
        loop {
            let nap = if unfinished { left.min(backoff) } else { left };
            current.sleep(Some(nap), || is_over() || self.has_deferred());
            let past = u32::try_from(began.elapsed().as_millis()).unwrap_or(u32::MAX);
            left = sleep.saturating_sub(past);
            if left == 0 || is_over() || current.should_stop() {
                return;
            }
            unfinished = self.run_deferred();
            if !self.should_scan() || self.is_offlining() {
                // There is nothing left to scan for now, so the main loop decides how to sleep.
                return;
            }
            backoff = next_backoff(backoff, unfinished);
        }
    }
}

/// Returns the delay before deferred work is retried, in milliseconds, if the delay before was `backoff`.
fn next_backoff(backoff: u32, unfinished: bool) -> u32 {
    match unfinished {
        true => backoff.saturating_mul(2).min(RETRY_MAX_MS),
        false => RETRY_MS,
    }
}

/// Keeps passes apart. A pass over a small set takes next to no time, and a page that is the same in two such
/// passes has hardly been shown to be steady.
///
/// With `sleep_millisecs` 0, user space asks for passes without a pause. It may have registered only a few
/// pages, and wait for a few passes to see the effect. So after a pass as small as that, some quick passes
/// follow at once before the next pass is kept apart.
pub(super) struct Pace {
    /// When the last pass that was kept apart began; `None` before the first.
    began: Option<Instant<Monotonic>>,
    /// Whether a pass is under way.
    under_way: bool,
    /// How many more quick passes may follow.
    quick: u8,
}

/// How many quick passes may follow one that was kept apart. The number is high enough that most of them skip
/// what does not change, see [`page_map`](super::page_map). In-tree KSM would do thousands in that time.
const QUICK_PASSES: u8 = 32;

/// The most pages that a quick pass may have.
const QUICK_PAGES: usize = 64;

impl Pace {
    /// Creates a pace for a thread that has not begun a pass.
    pub(super) fn new() -> Self {
        Self {
            began: None,
            under_way: false,
            quick: 0,
        }
    }

    /// Returns how many milliseconds are left until a pass may begin or continue, if passes begin at least
    /// `shortest` milliseconds apart.
    pub(super) fn rest(&self, shortest: u32) -> u32 {
        match self.began {
            Some(began) if !self.under_way && self.quick == 0 => {
                let past = u32::try_from(began.elapsed().as_millis()).unwrap_or(u32::MAX);
                shortest.saturating_sub(past)
            }
            _ => 0,
        }
    }

    /// Notes that a pass begins, unless one is under way.
    pub(super) fn go_on(&mut self) {
        if self.under_way {
            return;
        }
        self.under_way = true;
        match self.quick.checked_sub(1) {
            Some(left) => self.quick = left,
            None => {
                self.began = Some(Instant::now());
                self.quick = QUICK_PASSES;
            }
        }
    }

    /// Notes that the pass is complete, and had `pages` pages. `unpaused`: `sleep_millisecs` is 0.
    pub(super) fn end_pass(&mut self, pages: usize, unpaused: bool) {
        self.under_way = false;
        if pages > QUICK_PAGES || !unpaused {
            self.quick = 0;
        }
    }
}
