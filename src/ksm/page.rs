// SPDX-License-Identifier: GPL-2.0

//! What is remembered of a page, and how that changes.

use super::{
    candidate::{Candidate, CandidateKind, Joined, Scratch},
    index::{NodesLike, Place, SlotId, StableKey},
    metadata::gfp_inherited,
    page_map::Found,
    probation::{self, Print, Probation, Strikes},
    scan::known_mm,
    Core, State, GFP_SCAN,
};
use crate::{
    hash::{Checksum, Sample},
    mm::{
        rmap_item::{Detached, ItemBox},
        walk::Seen,
        word::{PageEntry, PageState},
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
    /// The word of the page at `place`, and all that is known of others.
    pub(super) fn word(&mut self, place: Place) -> (Option<&mut PageEntry>, &mut Core) {
        let word = self
            .mms
            .get_mut(&place.slot)
            .and_then(|mm| mm.pages.get_mut(place.addr));
        (word, &mut self.core)
    }

    /// Forgets the page at `place`. Returns whether that was possible now, see [`Core::release_item`].
    pub(super) fn forget(&mut self, place: Place) -> bool {
        let State { mms, core, .. } = self;
        let Some(known) = mms.get_mut(&place.slot) else {
            return true;
        };
        let Some(word) = known.pages.get_mut(place.addr) else {
            return true;
        };
        let left = core.leave(place, word);
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
        slot: SlotId,
        from: usize,
        to: usize,
        budget: &mut Forget,
        mut keep: impl FnMut(usize, &PageEntry) -> bool,
    ) -> Option<usize> {
        let State { mms, core, .. } = self;
        let known = mms.get_mut(&slot)?;
        let mut next = from;
        loop {
            let Some(left) = budget.leaves.checked_sub(1) else {
                return Some(next);
            };
            // Nothing is to be known for later of what is gone for good.
            let second = known.forgotten_to.is_none().then_some(core.clock.secs());
            next = known.pages.retain_leaf(next, to, second, |addr, word| {
                if keep(addr, word) {
                    return true;
                }
                let forgotten = core.leave(Place { slot, addr }, word);
                budget.busy |= !forgotten;
                !forgotten
            })?;
            budget.leaves = left;
            crate::mm::cond_resched();
        }
    }

    /// Has a page that could not be merged for the moment tried again in the next pass.
    pub(super) fn retry(&mut self, place: Place) {
        if let Some(known) = self.mms.get_mut(&place.slot) {
            known.pages.note_retry(place.addr);
        }
    }

    /// Remembers a page that is not remembered, and that is to be listed.
    pub(super) fn remember(&mut self, mm: &Mm, place: Place, sample: Sample) -> Result {
        let known = known_mm(&mut self.mms, mm, place.slot).ok_or(ENOMEM)?;
        let pass = self.core.pass;
        let mut leaf = known.pages.leaf_from(place.addr, pass, gfp_inherited())?;
        let result = match leaf.seek(place.addr) {
            Found::Nothing => leaf
                .insert(PageEntry::seen(sample), 1, gfp_inherited())
                .map_err(|_| ENOMEM),
            _ => Err(EEXIST),
        };
        match result {
            Ok(()) => self.core.enter(sample),
            Err(_) => known.pages.prune(place.addr, Some(self.core.clock.secs())),
        }
        result
    }

    /// Puts a page into the unstable tree, in the place of whoever waits under that checksum.
    pub(super) fn wait(&mut self, place: Place, sum: Checksum) {
        let state = self.word(place).0.map(|word| word.state());
        match state {
            // An item that is listed must never be dropped; or every candidate is remembered.
            Some(PageState::Merged(_)) | None => return,
            Some(PageState::Unstable(old)) if old == sum => return,
            Some(PageState::Unstable(old)) => self.leave_unstable(place, old),
            Some(_) => {}
        }
        let before = self.core.index.waiting(sum);
        if self.core.index.wait(sum, place, GFP_SCAN).is_err() {
            return self.retry(place);
        }
        if let Some(other) = before.filter(|&other| self.waits(other, sum)) {
            if let (Some(word), core) = self.word(other) {
                core.stop_waiting(word, sum);
            }
        }
        match self.word(place) {
            (Some(word), core) => {
                core.try_again();
                core.relabel(word, PageEntry::waiting(sum, word.strikes()));
            }
            (None, core) => core.index.stop_waiting(sum, place),
        }
    }

    /// Whether the page at `place` waits under `sum`, as far as its word tells.
    pub(super) fn waits(&mut self, place: Place, sum: Checksum) -> bool {
        let (word, _) = self.word(place);
        word.is_some_and(|word| matches!(word.state(), PageState::Unstable(found) if found == sum))
    }

    /// Takes the page at `place` out of the unstable tree if it waits under `sum`: it is steady from now on.
    pub(super) fn leave_unstable(&mut self, place: Place, sum: Checksum) {
        if !self.waits(place, sum) {
            return;
        }
        self.core.index.stop_waiting(sum, place);
        if let (Some(word), core) = self.word(place) {
            core.stop_waiting(word, sum);
        }
    }

    /// Notes that the page at `place`, which is remembered with the same sample, was merged.
    pub(super) fn merged(&mut self, place: Place, item: ItemBox, key: StableKey) {
        self.core.items = self.core.items.saturating_add(1);
        self.core.try_again();
        self.core.lately |= key.sum.sample().bit();
        self.core.index.move_to_stable(key);
        if item.mappings() >= self.core.max_sharing {
            self.core.index.set_full(key);
        }
        // What is merged is looked at in the next pass, which may have been going to skip the area.
        let State { mms, core, .. } = self;
        let known = mms.get_mut(&place.slot);
        let word = known.and_then(|known| known.pages.get_changed(place.addr));
        match word {
            Some(word) if !matches!(word.state(), PageState::Merged(_)) => {
                let strikes = word.strikes();
                if !strikes.is_none() {
                    item.set_strikes(strikes);
                }
                let old = core::mem::replace(word, PageEntry::merged(item));
                core.retire(place, old.state());
            }
            // Every candidate is remembered, and is not merged; or else the item would be lost, and say so.
            _ => drop(item),
        }
    }

    /// Notes that a page has changed since its sample was taken, and has this one now.
    pub(super) fn changed(&mut self, place: Place, sample: Sample) -> Joined {
        if let (Some(word), core) = self.word(place) {
            core.renew(place, word, sample);
        }
        self.note_change(place);
        Joined::NotYet
    }

    /// Notes that something happened to a page whose area has been accounted for already.
    pub(super) fn note_change(&mut self, place: Place) {
        if let Some(known) = self.mms.get_mut(&place.slot) {
            known.pages.note_change(place.addr);
        }
    }
}

impl Core {
    /// Notes that a page with this sample is remembered from now on.
    pub(super) fn enter(&mut self, sample: Sample) {
        self.changes = self.changes.wrapping_add(1);
        self.count(sample);
        self.pages = self.pages.saturating_add(1);
    }

    /// Counts one more page with this sample.
    pub(super) fn count(&mut self, sample: Sample) {
        if self.filter.add(sample) {
            self.try_again();
        }
    }

    /// Has pages that are steady looked at again in the next pass: for any of them something may have changed.
    /// (For what concerns a single page, see [`State::retry`].)
    pub(super) fn try_again(&mut self) {
        self.events = self.events.wrapping_add(1);
    }

    /// Notes that a page is no longer remembered, and takes it out of whichever tree it is in. Returns whether
    /// that was possible now, see [`Self::release_item`]; if not, it has to stay as it is.
    pub(super) fn leave(&mut self, place: Place, word: &mut PageEntry) -> bool {
        if !self.release_item(word) {
            return false;
        }
        self.changes = self.changes.wrapping_add(1);
        self.pages = self.pages.saturating_sub(1);
        self.filter.remove(word.sample());
        self.retire(place, word.state());
        true
    }

    /// Changes what is remembered of a page to "seen with this sample": its content is not what it was. Returns
    /// whether that was possible now, see [`Self::release_item`]; if not, the next pass finds the page changed
    /// again.
    fn renew(&mut self, place: Place, word: &mut PageEntry, sample: Sample) -> bool {
        let (merged_in, strikes) = (word.merged_in(), word.strikes());
        let hidden = word.sample() == sample;
        if !self.release_item(word) {
            return false;
        }
        let strikes = self.strikes_after(merged_in, strikes, hidden);
        let probation = Probation::new(strikes, Print::UNKNOWN, self.clock.secs());
        self.replace(place, word, PageEntry::seen_on(sample, probation));
        true
    }

    /// The strikes of a page that was written to, as far as its old word tells, which says when it was merged, and
    /// how many strikes it had: more when the write came soon after the merge, so that merging it was no gain.
    /// `hidden`: its sample is what it was.
    fn strikes_after(&mut self, merged_in: Option<u32>, strikes: Strikes, hidden: bool) -> Strikes {
        match merged_in {
            Some(beat) => {
                let age = self.clock.beats_since(beat);
                if probation::is_soon(age) {
                    self.soon_broken = self.soon_broken.saturating_add(1);
                }
                strikes.after_write(age, hidden)
            }
            // Nobody had to look for long to see that.
            None => strikes,
        }
    }

    /// Changes what is remembered of a page that is not merged to another word, and undoes what the old one stood
    /// for.
    pub(super) fn replace(&mut self, place: Place, word: &mut PageEntry, new: PageEntry) {
        self.changes = self.changes.wrapping_add(1);
        if let PageState::Steady(_) = new.state() {
            self.steady = self.steady.saturating_add(1);
        }
        let sample = new.sample();
        let old = core::mem::replace(word, new);
        if old.sample() != sample {
            self.filter.remove(old.sample());
            self.count(sample);
        }
        self.retire(place, old.state());
    }

    /// Changes the word of a page that does not wait, and is not merged, to another with the same sample.
    pub(super) fn relabel(&mut self, word: &mut PageEntry, new: PageEntry) {
        self.changes = self.changes.wrapping_add(1);
        let old = core::mem::replace(word, new);
        if let PageState::Steady(_) = old.state() {
            self.steady = self.steady.saturating_sub(1);
        }
        if let PageState::Steady(_) = word.state() {
            self.steady = self.steady.saturating_add(1);
        }
    }

    /// Undoes what the state of a page that is not merged stands for, besides its sample.
    fn retire(&mut self, place: Place, state: PageState) {
        match state {
            PageState::Steady(_) => self.steady = self.steady.saturating_sub(1),
            PageState::Unstable(sum) => self.index.stop_waiting(sum, place),
            _ => {}
        }
    }

    /// Takes the rmap item, if there is one, out of a word and off its node, and frees both where possible.
    /// Returns whether the word is without one now. If not, because another task has the merged page locked,
    /// it still says "merged": an item that is listed must never be dropped.
    pub(super) fn release_item(&mut self, word: &mut PageEntry) -> bool {
        let Some(mut item) = word.take_item() else {
            return true;
        };
        match item.detach() {
            Detached::Idle => {}
            Detached::Busy => {}
            Detached::Stale(key) => self.release(key),
            Detached::Done(key, left) => {
                self.items = self.items.saturating_sub(1);
                if left == 0 {
                    self.index.move_to_orphans(key);
                } else if left.saturating_add(1) == self.max_sharing {
                    self.index.set_not_full(key);
                }
            }
        }
        if item.mappings() != 0 {
            *word = PageEntry::merged(item);
            return false;
        }
        true
    }

    /// Does [`Self::look`] for pages that follow each other, from number `first` of the batch on, and
    /// that are remembered as `words` say. `news`: see [`Cursor`].
    pub(super) fn look_at_run(
        &mut self,
        slot: SlotId,
        words: &mut [PageEntry],
        first: usize,
        scratch: &mut Scratch,
        news: bool,
    ) {
        for (nth, word) in words.iter_mut().enumerate() {
            let Some(&page) = scratch.batch.pages().get(first.wrapping_add(nth)) else {
                break;
            };
            let kind = if page.is_unchanged(word) {
                match page.sample() {
                    Some(sample) if news => self.candidate(sample),
                    _ => continue,
                }
            } else {
                let place = Place {
                    slot,
                    addr: page.addr(),
                };
                self.look(place, word, page.seen(), news)
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
    /// merge. `news`: see [`Cursor`].
    #[inline]
    pub(super) fn look(
        &mut self,
        place: Place,
        word: &mut PageEntry,
        seen: Seen,
        news: bool,
    ) -> Option<CandidateKind> {
        match (word.state(), seen) {
            (PageState::Steady(old), Seen::Anon(new)) if old == new => {
                if !news {
                    return None;
                }
                let kind = self.candidate_on(word.probation(), new);
                if let (true, Some(probation)) = (self.refreshing, word.probation()) {
                    word.set_probation(probation.eased());
                }
                kind
            }
            (PageState::Seen(old), Seen::Anon(new)) if old == new => {
                let probation = match word.probation() {
                    None => {
                        self.relabel(word, PageEntry::steady(new));
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
                    self.relabel(word, PageEntry::steady_on(new, probation));
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
                    // If its checksum has not changed, it goes on waiting, and that is news for nobody.
                    return Some(CandidateKind::Steady(new, Joined::Waiting(sum)));
                }
                // It waits again, under the checksum that it has now. That is no event for the area.
                let changes = self.changes;
                self.index.stop_waiting(sum, place);
                self.stop_waiting(word, sum);
                self.changes = changes;
                self.candidate_on(word.probation(), new)
            }
            (PageState::Merged(Some(old)), Seen::Ksm(Some(new))) if old == new => None,
            (_, Seen::Anon(new)) => {
                // New content, or somebody wrote to what was merged.
                self.renew(place, word, new);
                // With few strikes it may merge in the next pass, if its checksum is known by then.
                let strikes = word.strikes();
                (!strikes.is_none() && strikes.are_few())
                    .then_some(CandidateKind::Steady(new, Joined::OnProbation))
            }
            (_, Seen::Ksm(Some(node))) => Some(CandidateKind::Unlisted(node)),
            (_, Seen::Ksm(None)) => {
                let sample = word.sample();
                let probation = Probation::new(word.strikes(), Print::UNKNOWN, self.clock.secs());
                if self.release_item(word) {
                    self.replace(place, word, PageEntry::seen_on(sample, probation));
                }
                Some(CandidateKind::Ownerless)
            }
        }
    }

    /// Changes the word of a page that waits under `sum` to "steady". The unstable tree has it no more.
    pub(super) fn stop_waiting(&mut self, word: &mut PageEntry, sum: Checksum) {
        let now = self.clock.secs();
        let probation = Probation::new(word.strikes(), Print::of(sum), now);
        self.relabel(word, PageEntry::steady_on(sum.sample(), probation));
    }
}
