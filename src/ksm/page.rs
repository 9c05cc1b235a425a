// SPDX-License-Identifier: GPL-2.0

//! What is remembered of a page, and how that changes.

use super::{
    candidate::{Candidate, CandidateKind, Outcome, ScanBuffer},
    index::{MmId, NodesLike, PageAddr},
    metadata::gfp_inherited,
    page_map::Found,
    probation::{self, Print, Probation, Strikes},
    scan::known_mm,
    Core, State, GFP_SCAN,
};
use crate::{
    hash::{Checksum, Sample},
    mm::{
        entry::{PageEntry, PageState},
        rmap_item::ItemBox,
        stable_key::StableKey,
        stable_node::Unlinked,
        walk::Seen,
    },
};
use kernel::{mm::Mm, prelude::*};

/// How many leaves of pages are forgotten under one hold of `state`.
const FORGET_LEAVES: usize = 16;

/// How much is still to be forgotten under this hold of `state`, and what came of it.
pub(super) struct Forget {
    leaves: usize,
    busy: bool,
}

impl Forget {
    pub(super) fn new() -> Self {
        Self {
            leaves: FORGET_LEAVES,
            busy: false,
        }
    }

    pub(super) fn everything() -> Self {
        Self {
            leaves: usize::MAX,
            busy: false,
        }
    }

    /// Whether something could not be forgotten, as its merged page is locked by another task.
    pub(super) fn was_busy(&self) -> bool {
        self.busy
    }
}

impl State {
    /// The entry of the page at `place`, and all that is known of others.
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

    /// Forgets the pages in `from..to` of an address space that `keep` does not keep, and whose merged pages
    /// are not locked by another task. Goes through as many leaves as `budget` says. Returns where to go on, if
    /// there are more.
    pub(super) fn forget_range(
        &mut self,
        mm_id: MmId,
        from: usize,
        to: usize,
        budget: &mut Forget,
        mut keep: impl FnMut(usize, &PageEntry) -> bool,
    ) -> Option<usize> {
        let State { mms, core, .. } = self;
        let known = mms.get_mut(&mm_id)?;
        let mut next = from;
        loop {
            let Some(left) = budget.leaves.checked_sub(1) else {
                return Some(next);
            };
            // Nothing is to be known for later of what is gone for good.
            let second = known.forgotten_to.is_none().then_some(core.clock.secs());
            next = known.pages.retain_leaf(next, to, second, |addr, entry| {
                if keep(addr, entry) {
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

    /// Has a page that could not be merged for the moment tried again in the next pass.
    pub(super) fn retry(&mut self, place: PageAddr) {
        if let Some(known) = self.mms.get_mut(&place.mm_id) {
            known.pages.note_retry(place.addr);
        }
    }

    /// Remembers a page that is not remembered, and that is to be listed.
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

    /// Puts a page into the unstable tree, in the place of whoever waits under that checksum.
    pub(super) fn unstable_insert(&mut self, place: PageAddr, sum: Checksum) {
        let state = self.entry(place).0.map(|entry| entry.state());
        match state {
            // An item that is listed must never be dropped; or every candidate is remembered.
            Some(PageState::Merged(_)) | None => return,
            Some(PageState::Unstable(old)) if old == sum => return,
            Some(PageState::Unstable(old)) => self.leave_unstable(place, old),
            Some(_) => {}
        }
        let before = self.core.index.unstable_lookup(sum);
        if self
            .core
            .index
            .unstable_insert(sum, place, GFP_SCAN)
            .is_err()
        {
            return self.retry(place);
        }
        if let Some(other) = before.filter(|&other| self.waits(other, sum)) {
            if let (Some(entry), core) = self.entry(other) {
                core.make_steady(entry, sum);
            }
        }
        match self.entry(place) {
            (Some(entry), core) => {
                core.bump_retry_seq();
                core.set_page_state(entry, PageEntry::unstable(sum, entry.strikes()));
            }
            (None, core) => core.index.unstable_remove(sum, place),
        }
    }

    /// Whether the page at `place` waits under `sum`, as far as its entry tells.
    pub(super) fn waits(&mut self, place: PageAddr, sum: Checksum) -> bool {
        let (entry, _) = self.entry(place);
        entry.is_some_and(
            |entry| matches!(entry.state(), PageState::Unstable(found) if found == sum),
        )
    }

    /// Takes the page at `place` out of the unstable tree if it waits under `sum`: it is steady from now on.
    pub(super) fn leave_unstable(&mut self, place: PageAddr, sum: Checksum) {
        if !self.waits(place, sum) {
            return;
        }
        self.core.index.unstable_remove(sum, place);
        if let (Some(entry), core) = self.entry(place) {
            core.make_steady(entry, sum);
        }
    }

    /// Notes that the page at `place`, which is remembered with the same sample, was merged.
    pub(super) fn merged(&mut self, place: PageAddr, item: ItemBox, key: StableKey) {
        self.core.items = self.core.items.saturating_add(1);
        self.core.bump_retry_seq();
        self.core.lately |= key.sum.sample().bit();
        self.core.index.move_to_stable(key);
        if item.mappings() >= self.core.max_sharing {
            self.core.index.set_full(key);
        }
        // What is merged is looked at in the next pass, which may have been going to skip the area.
        let State { mms, core, .. } = self;
        let known = mms.get_mut(&place.mm_id);
        let entry = known.and_then(|known| known.pages.get_changed(place.addr));
        match entry {
            Some(entry) if !matches!(entry.state(), PageState::Merged(_)) => {
                let strikes = entry.strikes();
                if !strikes.is_none() {
                    item.set_strikes(strikes);
                }
                let old = core::mem::replace(entry, PageEntry::merged(item));
                core.remove_from_tree(place, old.state());
            }
            // Every candidate is remembered, and is not merged; or else the item would be lost, and say so.
            _ => drop(item),
        }
    }

    /// Notes that a page has changed since its sample was taken, and has this one now.
    pub(super) fn changed(&mut self, place: PageAddr, sample: Sample) -> Outcome {
        if let (Some(entry), core) = self.entry(place) {
            core.page_changed(place, entry, sample);
        }
        self.note_change(place);
        Outcome::NotYet
    }

    /// Notes that something happened to a page whose area has been accounted for already.
    pub(super) fn note_change(&mut self, place: PageAddr) {
        if let Some(known) = self.mms.get_mut(&place.mm_id) {
            known.pages.note_change(place.addr);
        }
    }
}

impl Core {
    /// Notes that a page with this sample is remembered from now on.
    pub(super) fn track_page(&mut self, sample: Sample) {
        self.changes = self.changes.wrapping_add(1);
        self.count(sample);
        self.pages = self.pages.saturating_add(1);
    }

    /// Counts one more page with this sample.
    pub(super) fn count(&mut self, sample: Sample) {
        if self.filter.add(sample) {
            self.bump_retry_seq();
        }
    }

    /// Has pages that are steady looked at again in the next pass: for any of them something may have changed.
    /// (For what concerns a single page, see [`State::retry`].)
    pub(super) fn bump_retry_seq(&mut self) {
        self.retry_seq = self.retry_seq.wrapping_add(1);
    }

    /// Notes that a page is no longer remembered, and takes it out of whichever tree it is in. Returns whether
    /// that was possible now, see [`Self::release_item`]; if not, it has to stay as it is.
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

    /// Changes what is remembered of a page to "seen with this sample": its content is not what it was. Returns
    /// whether that was possible now, see [`Self::release_item`]; if not, the next pass finds the page changed
    /// again.
    fn page_changed(&mut self, place: PageAddr, entry: &mut PageEntry, sample: Sample) -> bool {
        let (merged_in, strikes) = (entry.merged_in(), entry.strikes());
        let hidden = entry.sample() == sample;
        if !self.release_item(entry) {
            return false;
        }
        let strikes = self.strikes_after(merged_in, strikes, hidden);
        let probation = Probation::new(strikes, Print::UNKNOWN, self.clock.secs());
        self.replace(place, entry, PageEntry::seen_on(sample, probation));
        true
    }

    /// The strikes of a page that was written to, as far as its old entry tells, which says when it was merged, and
    /// how many strikes it had: more when the write came soon after the merge, so that merging it was no gain.
    /// `hidden`: its sample is what it was.
    fn strikes_after(&mut self, merged_in: Option<u32>, strikes: Strikes, hidden: bool) -> Strikes {
        match merged_in {
            Some(beat) => {
                let age = self.clock.beats_since(beat);
                if probation::is_soon(age) {
                    self.quick_cow_breaks = self.quick_cow_breaks.saturating_add(1);
                }
                strikes.after_write(age, hidden)
            }
            // Nobody had to look for long to see that.
            None => strikes,
        }
    }

    /// Changes what is remembered of a page that is not merged to another entry, and undoes what the old one stood
    /// for.
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

    /// Changes the entry of a page that does not wait, and is not merged, to another with the same sample.
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

    /// Undoes what the state of a page that is not merged stands for, besides its sample.
    fn remove_from_tree(&mut self, place: PageAddr, state: PageState) {
        match state {
            PageState::Steady(_) => self.steady = self.steady.saturating_sub(1),
            PageState::Unstable(sum) => self.index.unstable_remove(sum, place),
            _ => {}
        }
    }

    /// Takes the rmap item, if there is one, out of a entry and off its node, and frees both where possible.
    /// Returns whether the entry is without one now. If not, because another task has the merged page locked,
    /// it still says "merged": an item that is listed must never be dropped.
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
                } else if left.saturating_add(1) == self.max_sharing {
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

    /// Does [`Self::classify_page`] for pages that follow each other, from number `first` of the batch on, and
    /// that are remembered as `entries` say. `retry_steady`: see [`Cursor`](super::scan::Cursor).
    pub(super) fn classify_range(
        &mut self,
        mm_id: MmId,
        entries: &mut [PageEntry],
        first: usize,
        scratch: &mut ScanBuffer,
        retry_steady: bool,
    ) {
        for (nth, entry) in entries.iter_mut().enumerate() {
            let Some(&page) = scratch.batch.pages().get(first.wrapping_add(nth)) else {
                break;
            };
            let kind = if page.is_unchanged(entry) {
                match page.sample() {
                    Some(sample) if retry_steady => self.candidate(sample),
                    _ => continue,
                }
            } else {
                let place = PageAddr {
                    mm_id,
                    addr: page.addr(),
                };
                self.classify_page(place, entry, page.seen(), retry_steady)
            };
            if let Some(kind) = kind {
                scratch.push(Candidate {
                    addr: page.addr(),
                    kind,
                });
            }
        }
    }

    /// Compares what a page is with what is remembered of it, and says whether it is worth trying to
    /// merge. `retry_steady`: see [`Cursor`](super::scan::Cursor).
    #[inline]
    pub(super) fn classify_page(
        &mut self,
        place: PageAddr,
        entry: &mut PageEntry,
        seen: Seen,
        retry_steady: bool,
    ) -> Option<CandidateKind> {
        match (entry.state(), seen) {
            (PageState::Steady(old), Seen::Anon(new)) if old == new => {
                if !retry_steady {
                    return None;
                }
                let kind = self.candidate_on(entry.probation(), new);
                if let (true, Some(probation)) = (self.refreshing, entry.probation()) {
                    entry.set_probation(probation.eased());
                }
                kind
            }
            (PageState::Seen(old), Seen::Anon(new)) if old == new => {
                let probation = match entry.probation() {
                    None => {
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
                    // Nobody has an equal, so it does not matter for now whether it has held still.
                    self.set_page_state(entry, PageEntry::steady_on(new, probation));
                }
                kind
            }
            (PageState::Unstable(sum), Seen::Anon(new)) if sum.sample() == new => {
                // Who waits under `unknown` was not compared with merged pages when none took another page:
                // now there may be room. Newcomers go there, and never find this one.
                let has_nowhere_to_go =
                    || sum.is_unknown() && self.index.nodes_like(new) == NodesLike::None;
                if !self.refreshing || has_nowhere_to_go() {
                    // It has to be found out here when it is zero now, or when that matters from now on:
                    // no equal page ever comes to wait.
                    let may_be_zero = self.zeroes.is_some_and(|zeroes| zeroes.contains(new));
                    return may_be_zero.then_some(CandidateKind::Zero);
                }
                if !sum.is_unknown() {
                    // If its checksum has not changed, it goes on waiting, and that is retry_steady for nobody.
                    return Some(CandidateKind::Steady(new, Outcome::Waiting(sum)));
                }
                // It waits again, under the checksum that it has now. That is no event for the area.
                let changes = self.changes;
                self.index.unstable_remove(sum, place);
                self.make_steady(entry, sum);
                self.changes = changes;
                self.candidate_on(entry.probation(), new)
            }
            (PageState::Merged(Some(old)), Seen::Ksm(Some(new))) if old == new => None,
            (_, Seen::Anon(new)) => {
                // New content, or somebody wrote to what was merged.
                self.page_changed(place, entry, new);
                // With few strikes it may merge in the next pass, if its checksum is known by then.
                let strikes = entry.strikes();
                (!strikes.is_none() && strikes.are_few())
                    .then_some(CandidateKind::Steady(new, Outcome::OnProbation))
            }
            (_, Seen::Ksm(Some(node))) => Some(CandidateKind::Unlisted(node)),
            (_, Seen::Ksm(None)) => {
                let sample = entry.sample();
                let probation = Probation::new(entry.strikes(), Print::UNKNOWN, self.clock.secs());
                if self.release_item(entry) {
                    self.replace(place, entry, PageEntry::seen_on(sample, probation));
                }
                Some(CandidateKind::Ownerless)
            }
        }
    }

    /// Changes the entry of a page that waits under `sum` to "steady". The unstable tree has it no more.
    pub(super) fn make_steady(&mut self, entry: &mut PageEntry, sum: Checksum) {
        let now = self.clock.secs();
        let probation = Probation::new(entry.strikes(), Print::of(sum), now);
        self.set_page_state(entry, PageEntry::steady_on(sum.sample(), probation));
    }
}
