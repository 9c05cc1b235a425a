// SPDX-License-Identifier: GPL-2.0

//! The thread's main loop: when it scans, when it sleeps, and what it does besides.

use super::{filter::Filter, run, stable_tree::ORPHANS_SWEEP, Engine, State};
use crate::sys::kthread;
use kernel::{
    sync::atomic::Relaxed,
    time::{Instant, Monotonic},
};

/// How soon to try again what could not be finished: freeing nodes whose pages are about to be freed,
/// and entering processes for which there was no memory.
const RETRY_MS: u32 = 20;
const RETRY_MAX_MS: u32 = 1000;

impl kthread::ThreadFn for Engine {
    fn main(&self, current: &kthread::KthreadContext) {
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
            // When to try the deferred_work again.
            backoff = next_backoff(backoff, unfinished);
            let shortest = self.pass_millisecs.load(Relaxed);
            if self.should_scan() {
                let rest = pace.rest(shortest);
                if rest != 0 {
                    let nap = if unfinished { rest.min(backoff) } else { rest };
                    current.sleep(Some(nap), || {
                        self.pass_millisecs.load(Relaxed) != shortest
                            || !self.should_scan()
                            || self.has_deferred()
                    });
                    continue;
                }
                pace.go_on();
                if let Some(pages) = self.scan(current) {
                    pace.end_pass(pages, self.sleep_millisecs.load(Relaxed) == 0);
                }
            }
            if self.should_scan() {
                self.rest(current, backoff);
            } else {
                // The last batch may have left some.
                let retry = self.has_leftovers(&self.state.lock()).then_some(backoff);
                // Who was missed is looked for again in a while, or as soon as somebody is.
                current.sleep(retry, || {
                    self.should_scan()
                        || self.has_deferred()
                        || (retry.is_none() && self.registry.lock().has_missed())
                });
            }
        }
    }
}

impl Engine {
    /// Whether there is anything to scan.
    fn should_scan(&self) -> bool {
        self.run() == run::MERGE && !self.registry.lock().is_empty()
    }

    /// Whether something has to be done at once even when nothing is to be scanned.
    pub(super) fn has_deferred(&self) -> bool {
        self.left_chores.load(Relaxed) || self.registry.lock().has_dead()
    }

    /// Forgets who is gone, finds who was missed, frees what can be freed. Returns whether something is left
    /// to be done a little later: nodes whose pages are about to be freed, items whose pages are locked by
    /// other tasks, processes for which there was no memory. Takes `state` again and again, never for long.
    fn run_deferred(&self) -> bool {
        if self.registry.lock().has_missed() {
            // If that fails, the next round tries again.
            let _ = self.enter_registered();
        }
        loop {
            let mut state = self.state.lock();
            if self.is_offlining() {
                return false;
            }
            let more = self.do_some_chores(&mut state);
            let left = self.has_leftovers(&state);
            drop(state);
            if !more {
                return left;
            }
            crate::mm::cond_resched();
        }
    }

    /// Does some of that. Returns whether there is more to be done at once.
    fn do_some_chores(&self, state: &mut State) -> bool {
        self.left_chores.store(false, Relaxed);
        self.reap(state);
        let mut more = state.forget_dying();
        if let Some(at) = state.core.releasing {
            state.core.releasing = state.core.release_some_stale(at);
            more = true;
        }
        if state.core.pages == 0 && !self.should_scan() {
            state.core.filter = Filter::new();
        }
        // An address space that came since all were unmerged may have merged pages: the other half of a fork
        // that was not registered before.
        let force = self.run() == run::UNMERGE
            && !self.unmerging.load(Relaxed)
            && self.registry.lock().newest() == state.unmerged_to;
        state.core.sweep_orphans(ORPHANS_SWEEP, force);
        if self.run() == run::MERGE {
            let pause = self.stable_node_chains_prune_millisecs.load(Relaxed);
            state.core.prune_after(pause);
        }
        state.core.unpin_if_empty();
        self.update_stats(state);
        more
    }

    /// Whether there are deferred_work to try again in a while.
    pub(super) fn has_leftovers(&self, state: &State) -> bool {
        state.core.index.orphans_len() != 0
            || state.core.releasing.is_some()
            || state.dying != 0
            || self.registry.lock().has_missed()
    }

    /// Sleeps `sleep_millisecs` between batches. Chores that turn up meanwhile are done at once, those that
    /// are left over after `backoff` milliseconds at first. Neither shortens the sleep, or processes that come
    /// and go would keep the thread from resting.
    fn rest(&self, current: &kthread::KthreadContext, mut backoff: u32) {
        let sleep = self.sleep_millisecs.load(Relaxed);
        let is_over = || self.sleep_millisecs.load(Relaxed) != sleep || self.run() != run::MERGE;
        let began = Instant::<Monotonic>::now();
        let mut left = sleep;
        // The batch may have left some, to which the main loop comes at once if there is no rest.
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
                // Nobody is left, and there is nothing to rest from.
                return;
            }
            backoff = next_backoff(backoff, unfinished);
        }
    }
}

/// In how many milliseconds to try deferred_work again after `backoff`, if there are any.
fn next_backoff(backoff: u32, unfinished: bool) -> u32 {
    match unfinished {
        true => backoff.saturating_mul(2).min(RETRY_MAX_MS),
        false => RETRY_MS,
    }
}

/// Keeps passes apart, so that a page which has not changed between two of them has held still for a
/// while: a pass over a small set takes no time to speak of.
///
/// Who sets `sleep_millisecs` to 0 asks for passes without a pause, and may wait for a few of them to find out
/// what comes of pages that hardly anything else is registered beside. So a few passes that small follow each other
/// at once before the next one is kept apart.
pub(super) struct Pace {
    /// When the last pass that was kept apart began; `None` before the first.
    began: Option<Instant<Monotonic>>,
    /// Whether a pass is still under way.
    under_way: bool,
    /// How many more may follow it at once.
    quick: u8,
}

/// How many quick passes follow one that was kept apart: so many that most of them skip what does not change, see
/// [`Age`](super::page_map). In-tree KSM would do thousands meanwhile.
const QUICK_PASSES: u8 = 32;

/// How many pages a quick pass has, at most.
const QUICK_PAGES: usize = 64;

impl Pace {
    /// No pass has begun.
    pub(super) fn new() -> Self {
        Self {
            began: None,
            under_way: false,
            quick: 0,
        }
    }

    /// How many milliseconds are left until a pass may begin or go on, if passes begin `shortest`
    /// milliseconds apart at least.
    pub(super) fn rest(&self, shortest: u32) -> u32 {
        match self.began {
            Some(began) if !self.under_way && self.quick == 0 => {
                let past = u32::try_from(began.elapsed().as_millis()).unwrap_or(u32::MAX);
                shortest.saturating_sub(past)
            }
            _ => 0,
        }
    }

    /// Notes that a pass begins, if none is under way.
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

    /// Notes that the pass, which had so many pages, is complete. `unpaused`: nobody wants a pause between batches.
    pub(super) fn end_pass(&mut self, pages: usize, unpaused: bool) {
        self.under_way = false;
        if pages > QUICK_PAGES || !unpaused {
            self.quick = 0;
        }
    }
}
