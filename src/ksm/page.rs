// SPDX-License-Identifier: GPL-2.0

//! The state of a page: how its entry changes, and what has to change with it.
//!
//! A page goes from seen to steady to unstable to merged, and back to seen when its content changes. The sample
//! of each tracked page is counted in the filter. An unstable page is queued in the unstable tree, and a merged
//! page has an rmap item on its stable node. The functions here keep all of that in step with the entry.

use super::{
    candidate::{Candidate, CandidateKind, Candidates, Check, Outcome},
    entry::{PageEntry, PageState},
    forget::Forget,
    index::NodesLike,
    metadata::gfp_inherited,
    mms::{MmId, PageAddr},
    page_map::Found,
    probation::{self, MergeInfo, Print, Probation},
    state::{known_mm, Core, State, GFP_SCAN},
};
use crate::{
    hash::{Checksum, Sample},
    mm::{
        rmap_item::ItemBox,
        seen::{Seen, SeenPage},
        stable_key::StableKey,
        stable_node::Unlinked,
    },
};
use kernel::{mm::Mm, prelude::*};

/// What classification needs to know of a leaf, and what it has found there.
pub(super) struct LeafPass {
    /// Whether a page that was steady before may be a candidate, see [`Cursor`](super::cursor::Cursor).
    pub(super) retry_steady: bool,
    /// Whether the leaf is due for a refresh, see
    /// [`LeafCursor::is_refreshing`](super::page_map::LeafCursor::is_refreshing).
    pub(super) refreshing: bool,
    /// Whether a page has changed, was tracked, or is not tracked any more.
    pub(super) changed: bool,
    /// How many pages were found to be written to soon after their merge.
    pub(super) quick_cow_breaks: usize,
}

impl LeafPass {
    /// Begins with nothing found.
    pub(super) fn new(retry_steady: bool, refreshing: bool) -> Self {
        Self {
            retry_steady,
            refreshing,
            changed: false,
            quick_cow_breaks: 0,
        }
    }

    /// Notes that a page has changed. `quick`: it was merged a short time ago.
    fn note_change(&mut self, quick: bool) {
        self.changed = true;
        self.quick_cow_breaks = self.quick_cow_breaks.saturating_add(quick.into());
    }
}

impl State {
    /// Returns the entry of the page at `place`, together with the state of all other pages.
    pub(super) fn entry(&mut self, place: PageAddr) -> (Option<&mut PageEntry>, &mut Core) {
        let entry = self
            .mms
            .get_mut(&place.mm_id)
            .and_then(|mm| mm.pages.get_mut(place.addr));
        (entry, &mut self.core)
    }

    /// Forgets the page at `place`. Returns whether that was possible now, see [`Core::release_item`].
    pub(super) fn forget(&mut self, place: PageAddr) -> bool {
        let State { mms, core, .. } = self;
        let Some(known) = mms.get_mut(&place.mm_id) else {
            return true;
        };
        let Some(entry) = known.pages.get_mut(place.addr) else {
            return true;
        };
        let left = core.untrack_page(place, entry);
        if left {
            drop(known.pages.remove(place.addr, core.clock.secs()));
        }
        left
    }

    /// Forgets the pages of an address space in `from..to` for which `keep` returns `false`.
    ///
    /// A merged page that is locked by another task stays, see [`Forget::was_busy`]. Goes through as many
    /// leaves as `budget` allows, and calls `cond_resched()` after each. Returns the address to continue at, if
    /// there are more.
    pub(super) fn forget_range(
        &mut self,
        mm_id: MmId,
        from: usize,
        to: usize,
        budget: &mut Forget,
        mut keep: impl FnMut(&Core, usize, &PageEntry) -> bool,
    ) -> Option<usize> {
        let State { mms, core, .. } = self;
        let known = mms.get_mut(&mm_id)?;
        let mut next = from;
        loop {
            let Some(left) = budget.leaves.checked_sub(1) else {
                return Some(next);
            };
            // The leaves of an address space that has exited need not be remembered for their splits.
            let second = known.forgotten_to.is_none().then_some(core.clock.secs());
            next = known.pages.retain_leaf(next, to, second, |addr, entry| {
                if keep(core, addr, entry) {
                    return true;
                }
                let forgotten = core.untrack_page(PageAddr { mm_id, addr }, entry);
                budget.busy |= !forgotten;
                !forgotten
            })?;
            budget.leaves = left;
            crate::mm::cond_resched();
        }
    }

    /// Has a page that could not be merged now retried in the next pass.
    pub(super) fn retry(&mut self, place: PageAddr) {
        if let Some(known) = self.mms.get_mut(&place.mm_id) {
            known.pages.note_retry(place.addr);
        }
    }

    /// Starts to track a page that is not tracked yet, and is about to be listed.
    ///
    /// # Errors
    ///
    /// `EEXIST` if the page is tracked, `ENOMEM` if there is no memory.
    pub(super) fn remember(&mut self, mm: &Mm, place: PageAddr, sample: Sample) -> Result {
        let known = known_mm(&mut self.mms, mm, place.mm_id).ok_or(ENOMEM)?;
        let pass = self.core.pass;
        let mut leaf = known.pages.leaf_from(place.addr, pass, gfp_inherited())?;
        let result = match leaf.seek(place.addr) {
            Found::Nothing => leaf
                .insert(PageEntry::seen(sample), 1, gfp_inherited())
                .map_err(|_| ENOMEM),
            _ => Err(EEXIST),
        };
        match result {
            Ok(()) => self.core.track_page(sample),
            Err(_) => known.pages.prune(place.addr, Some(self.core.clock.secs())),
        }
        result
    }

    /// Queues a page in the unstable tree under `sum`, in place of the page that is queued there.
    ///
    /// The page queued there before is steady afterwards. Without memory, `place` is retried in the next pass.
    pub(super) fn unstable_insert(&mut self, place: PageAddr, sum: Checksum) {
        let state = self.entry(place).0.map(|entry| entry.state());
        match state {
            // Do not replace the entry of a merged page: it owns a listed rmap item. Candidates are always
            // tracked.
            Some(PageState::Merged(_)) | None => return,
            Some(PageState::Unstable(old)) if old == sum => return,
            Some(PageState::Unstable(old)) => self.leave_unstable(place, old),
            Some(_) => {}
        }
        let before = self.core.unstable.lookup(sum);
        if self.core.unstable.insert(sum, place, GFP_SCAN).is_err() {
            return self.retry(place);
        }
        if let Some(other) = before.filter(|&other| self.is_queued(other, sum)) {
            if let (Some(entry), core) = self.entry(other) {
                core.make_steady(entry, sum);
            }
        }
        match self.entry(place) {
            (Some(entry), core) => {
                core.bump_retry_seq();
                core.set_page_state(entry, PageEntry::unstable(sum, entry.strikes()));
            }
            (None, core) => core.unstable.remove(sum, place),
        }
    }

    /// Whether the page at `place` is queued under `sum`, according to its entry.
    pub(super) fn is_queued(&mut self, place: PageAddr, sum: Checksum) -> bool {
        let (entry, _) = self.entry(place);
        entry.is_some_and(
            |entry| matches!(entry.state(), PageState::Unstable(found) if found == sum),
        )
    }

    /// Removes the page at `place` from the unstable tree if it is queued under `sum`. The page is steady
    /// afterwards.
    pub(super) fn leave_unstable(&mut self, place: PageAddr, sum: Checksum) {
        if !self.is_queued(place, sum) {
            return;
        }
        self.core.unstable.remove(sum, place);
        if let (Some(entry), core) = self.entry(place) {
            core.make_steady(entry, sum);
        }
    }

    /// Records that the page at `place` was merged into the node `key`, with `item` as its rmap item.
    ///
    /// The page must be tracked, and its entry have the sample of `item`.
    pub(super) fn merged(&mut self, place: PageAddr, item: ItemBox, key: StableKey) {
        self.core.items = self.core.items.saturating_add(1);
        self.core.bump_retry_seq();
        self.core.lately |= key.sum.sample().bit();
        self.core.index.move_to_stable(key);
        if item.mappings() >= self.core.settings.max_sharing() {
            self.core.index.set_full(key);
        }
        // The next pass scans the leaf, even if it was about to skip it: a merged page is watched for writes.
        let State { mms, core, .. } = self;
        let known = mms.get_mut(&place.mm_id);
        let entry = known.and_then(|known| known.pages.get_changed(place.addr));
        match entry {
            Some(entry) if !matches!(entry.state(), PageState::Merged(_)) => {
                let strikes = entry.strikes();
                if !strikes.is_none() {
                    let info = MergeInfo::from_raw(item.note()).with_strikes(strikes);
                    item.set_note(info.get());
                }
                let old = core::mem::replace(entry, PageEntry::merged(item));
                core.remove_from_tree(place, old.state());
            }
            // Cannot happen: each candidate is tracked and not merged. The drop leaks the item, and logs that.
            _ => drop(item),
        }
    }

    /// Records that a page has changed since it was sampled, and has `sample` now.
    pub(super) fn changed(&mut self, place: PageAddr, sample: Sample) -> Outcome {
        if let (Some(entry), core) = self.entry(place) {
            core.page_changed(place, entry, sample);
        }
        self.note_change(place);
        Outcome::NotYet
    }

    /// Records a change to a page of a leaf for which `MmState::note` has run already.
    pub(super) fn note_change(&mut self, place: PageAddr) {
        if let Some(known) = self.mms.get_mut(&place.mm_id) {
            known.pages.note_change(place.addr);
        }
    }
}

impl Core {
    /// Returns the candidate for a steady page with this sample, if the filter says that two pages have it.
    #[inline]
    pub(super) fn candidate(&self, sample: Sample) -> Option<CandidateKind> {
        self.filter
            .has_two(sample)
            .then_some(CandidateKind::Steady(sample, Check::None))
    }

    /// Like [`Self::candidate`], for a page that may be on probation.
    #[inline]
    pub(super) fn candidate_on(
        &self,
        probation: Option<Probation>,
        sample: Sample,
    ) -> Option<CandidateKind> {
        self.filter.has_two(sample).then_some(match probation {
            None => CandidateKind::Steady(sample, Check::None),
            Some(_) => CandidateKind::Steady(sample, Check::Probation),
        })
    }

    /// Starts to track a page with this sample.
    pub(super) fn track_page(&mut self, sample: Sample) {
        self.changes = self.changes.wrapping_add(1);
        self.count(sample);
        self.pages = self.pages.saturating_add(1);
    }

    /// Counts one more page with this sample in the filter.
    pub(super) fn count(&mut self, sample: Sample) {
        if self.filter.add(sample) {
            self.bump_retry_seq();
        }
    }

    /// Has the next pass retry all steady pages, because any of them may have got an equal.
    ///
    /// To retry a single page, call [`State::retry`].
    pub(super) fn bump_retry_seq(&mut self) {
        self.retry_seq = self.retry_seq.wrapping_add(1);
    }

    /// Stops tracking a page, and removes it from the tree that it is in.
    ///
    /// Returns whether that was possible now, see [`Self::release_item`]. If not, the entry has to stay.
    pub(super) fn untrack_page(&mut self, place: PageAddr, entry: &mut PageEntry) -> bool {
        if !self.release_item(entry) {
            return false;
        }
        self.changes = self.changes.wrapping_add(1);
        self.pages = self.pages.saturating_sub(1);
        self.filter.remove(entry.sample());
        self.remove_from_tree(place, entry.state());
        true
    }

    /// Records that the content of a page has changed: the page is seen, with this sample.
    ///
    /// Returns whether that was possible now, see [`Self::release_item`]. If not, the next pass finds the
    /// change again.
    fn page_changed(&mut self, place: PageAddr, entry: &mut PageEntry, sample: Sample) -> bool {
        let (merged_in, strikes) = (entry.merged_in(), entry.strikes());
        let hidden = entry.sample() == sample;
        if !self.release_item(entry) {
            return false;
        }
        // If the page was not merged, the change has cost nothing.
        let strikes = merged_in.map_or(strikes, |beat| {
            strikes.after_write(self.clock.beats_since(beat), hidden)
        });
        let probation = Probation::new(strikes, Print::UNKNOWN, self.clock.secs());
        self.replace(place, entry, PageEntry::seen_on(sample, probation));
        true
    }

    /// Replaces the entry of a page that is not merged. Updates the filter, the tree and the counters that
    /// depend on it.
    pub(super) fn replace(&mut self, place: PageAddr, entry: &mut PageEntry, new: PageEntry) {
        self.changes = self.changes.wrapping_add(1);
        if let PageState::Steady(_) = new.state() {
            self.steady = self.steady.saturating_add(1);
        }
        let sample = new.sample();
        let old = core::mem::replace(entry, new);
        if old.sample() != sample {
            self.filter.remove(old.sample());
            self.count(sample);
        }
        self.remove_from_tree(place, old.state());
    }

    /// Replaces the entry of a page that is neither queued nor merged by one with the same sample.
    pub(super) fn set_page_state(&mut self, entry: &mut PageEntry, new: PageEntry) {
        self.changes = self.changes.wrapping_add(1);
        let old = core::mem::replace(entry, new);
        if let PageState::Steady(_) = old.state() {
            self.steady = self.steady.saturating_sub(1);
        }
        if let PageState::Steady(_) = entry.state() {
            self.steady = self.steady.saturating_add(1);
        }
    }

    /// Updates the counter or the unstable tree for a page that leaves `state`. The page is not merged.
    fn remove_from_tree(&mut self, place: PageAddr, state: PageState) {
        match state {
            PageState::Steady(_) => self.steady = self.steady.saturating_sub(1),
            PageState::Unstable(sum) => self.unstable.remove(sum, place),
            _ => {}
        }
    }

    /// Takes the rmap item, if there is one, out of an entry and off its node, and frees it.
    ///
    /// A node that is stale is freed as well. One without items becomes an orphan.
    ///
    /// Returns whether the entry is without an item now. If not, another task has the merged page locked, and
    /// the entry still says "merged", because a listed item must not be dropped.
    pub(super) fn release_item(&mut self, entry: &mut PageEntry) -> bool {
        let Some(mut item) = entry.take_item() else {
            return true;
        };
        match item.detach() {
            Unlinked::NotLinked => {}
            Unlinked::Busy => {}
            Unlinked::StaleNode(key) => self.release(key),
            Unlinked::Done(key, left) => {
                self.items = self.items.saturating_sub(1);
                if left == 0 {
                    self.index.move_to_orphans(key);
                } else if left.saturating_add(1) == self.settings.max_sharing() {
                    self.index.set_not_full(key);
                }
            }
        }
        if item.mappings() != 0 {
            *entry = PageEntry::merged(item);
            return false;
        }
        true
    }

    /// Calls [`Self::classify_page`] for consecutive pages of one leaf, which have these `entries`.
    pub(super) fn classify_range(
        &mut self,
        mm_id: MmId,
        entries: &mut [PageEntry],
        pages: &[SeenPage],
        leaf: &mut LeafPass,
        candidates: &mut Candidates,
    ) {
        for (entry, &page) in entries.iter_mut().zip(pages) {
            let kind = if entry.matches(page) {
                match page.sample() {
                    Some(sample) if leaf.retry_steady => self.candidate(sample),
                    _ => continue,
                }
            } else {
                let place = PageAddr {
                    mm_id,
                    addr: page.addr(),
                };
                self.classify_page(place, entry, page.seen(), leaf)
            };
            if let Some(kind) = kind {
                candidates.push(Candidate {
                    addr: page.addr(),
                    kind,
                });
            }
        }
    }

    /// Compares a page with its entry, updates the entry, and returns whether the page is a candidate.
    #[inline]
    pub(super) fn classify_page(
        &mut self,
        place: PageAddr,
        entry: &mut PageEntry,
        seen: Seen,
        leaf: &mut LeafPass,
    ) -> Option<CandidateKind> {
        match (entry.state(), seen) {
            (PageState::Steady(old), Seen::Anon(new)) if old == new => {
                if !leaf.retry_steady {
                    return None;
                }
                let kind = self.candidate_on(entry.probation(), new);
                if let (true, Some(probation)) = (leaf.refreshing, entry.probation()) {
                    entry.set_probation(probation.eased());
                }
                kind
            }
            (PageState::Seen(old), Seen::Anon(new)) if old == new => {
                let probation = match entry.probation() {
                    None => {
                        leaf.changed = true;
                        self.set_page_state(entry, PageEntry::steady(new));
                        return self.candidate(new);
                    }
                    Some(probation) => probation,
                };
                if !probation.is_due(&self.clock) {
                    return None;
                }
                let kind = self.candidate_on(Some(probation), new);
                if kind.is_none() {
                    // No other page has this sample, so it does not matter for now whether the page has held
                    // still.
                    leaf.changed = true;
                    self.set_page_state(entry, PageEntry::steady_on(new, probation));
                }
                kind
            }
            (PageState::Unstable(sum), Seen::Anon(new)) if sum.sample() == new => {
                // A page queued under `unknown` was never compared with KSM pages if all of them were full at
                // the time. If one has room now, new pages merge into it directly and never find this page in
                // the unstable tree, so retry it here.
                let has_nowhere_to_go =
                    || sum.is_unknown() && self.index.nodes_like(new) == NodesLike::None;
                if !leaf.refreshing || has_nowhere_to_go() {
                    // Check here whether the page is all zeroes: it may have become so, or `use_zero_pages` may
                    // have been set since. No equal page is ever queued that would find it.
                    let may_be_zero = self.zeroes.is_some_and(|zeroes| zeroes.contains(new));
                    return may_be_zero.then_some(CandidateKind::Zero);
                }
                if !sum.is_unknown() {
                    // The page stays queued if its checksum has not changed. That is no reason to retry other
                    // pages.
                    return Some(CandidateKind::Steady(new, Check::Queued(sum)));
                }
                // Queue the page again, under the checksum that it has now. This is not a change of the leaf.
                self.unstable.remove(sum, place);
                self.make_steady(entry, sum);
                self.candidate_on(entry.probation(), new)
            }
            (PageState::Merged(Some(old)), Seen::Ksm(Some(new))) if old == new => None,
            (_, Seen::Anon(new)) => {
                // The content is new, or the merged page was written to.
                let is_quick = |beat| probation::is_soon(self.clock.beats_since(beat));
                let quick = entry.merged_in().is_some_and(is_quick);
                if self.page_changed(place, entry, new) {
                    leaf.note_change(quick);
                }
                // With few strikes, the page may merge in the next pass, provided that its checksum is known by
                // then.
                let strikes = entry.strikes();
                (!strikes.is_none() && strikes.are_few())
                    .then_some(CandidateKind::Steady(new, Check::Probation))
            }
            (_, Seen::Ksm(Some(node))) => Some(CandidateKind::Unlisted(node)),
            (_, Seen::Ksm(None)) => {
                let sample = entry.sample();
                let probation = Probation::new(entry.strikes(), Print::UNKNOWN, self.clock.secs());
                if self.release_item(entry) {
                    leaf.changed = true;
                    self.replace(place, entry, PageEntry::seen_on(sample, probation));
                }
                Some(CandidateKind::Ownerless)
            }
        }
    }

    /// Makes a page that was queued under `sum` steady. The caller has removed it from the unstable tree.
    pub(super) fn make_steady(&mut self, entry: &mut PageEntry, sum: Checksum) {
        let now = self.clock.secs();
        let probation = Probation::new(entry.strikes(), Print::of(sum), now);
        self.set_page_state(entry, PageEntry::steady_on(sum.sample(), probation));
    }
}
