// SPDX-License-Identifier: GPL-2.0

//! The merge protocol.
//!
//! A candidate merges with an equal KSM page, or with an equal page that is queued in the unstable tree, or is
//! queued itself. If a step fails, memory is as it was before, and a later pass scans the page again.
//!
//! All functions of [`State`] and [`Core`] run with `state` locked. They only try `mmap_lock` and folio locks.

use super::{
    candidate::{Attempt, Candidate, CandidateKind, Check, Outcome},
    entry::{PageEntry, PageState},
    index::{Nodes, NodesLike},
    metadata::gfp_inherited,
    mms::{MmId, PageAddr},
    page_map::{Moment, PageMap},
    probation::{Print, Probation, Verdict},
    state::{seconds_since, Core, MmState, State, GFP_SCAN},
    use_mm, Engine,
};
use crate::{
    hash::{Checksum, Hasher, Sample},
    mm::{
        folio::{LockedPage, NodeId, PageRef},
        lru,
        mmap_lock::{MmapLock, NotLocked},
        replace::{Published, SplitPolicy},
        rmap_item::ItemBox,
        stable_key::StableKey,
        stable_node::{NodeBox, NodePage},
        vma::{MergeableVma, Which},
    },
};
use kernel::{
    mm::{Mm, MmWithUser},
    page::PAGE_SIZE,
    prelude::*,
    rbtree::RBTree,
    time::{Instant, Monotonic},
};

/// How many pages are merged under one hold of `mmap_lock`.
pub(super) const MERGE_PAGES: usize = 16;

/// The split policy for one page: whether the huge page that it is part of may be split.
struct Splits<'a> {
    mms: &'a mut RBTree<MmId, MmState>,
    place: PageAddr,
    pass: u32,
    began: Instant<Monotonic>,
    /// Whether the split was allowed before, so that there is nothing to check.
    decided: bool,
}

impl<'a> Splits<'a> {
    /// Makes the policy for the page at `place`. Also returns the state of all pages, which stays usable beside
    /// it.
    fn of(state: &'a mut State, place: PageAddr) -> (Self, &'a mut Core) {
        let State { mms, core, .. } = state;
        let splits = Self {
            mms,
            place,
            pass: core.pass,
            began: core.born,
            decided: false,
        };
        (splits, core)
    }

    /// Like [`Self::of`], for a page whose huge page may be split as was checked before.
    fn decided(state: &'a mut State, place: PageAddr) -> (Self, &'a mut Core) {
        let (splits, core) = Self::of(state, place);
        let splits = Self {
            decided: true,
            ..splits
        };
        (splits, core)
    }

    /// Whether `page` is part of a huge page that is not to be split yet. Changes nothing, unlike
    /// [`may_split`](SplitPolicy::may_split).
    fn keep_whole(&self, page: &PageRef) -> bool {
        if !page.is_large() || self.decided {
            return false;
        }
        let known = self.mms.get(&self.place.mm_id);
        known.is_some_and(|known| {
            let second = seconds_since(self.began);
            known.pages.keeps_whole(self.place.addr, second)
        })
    }

    /// Returns the current pass and second, as [`PageMap`] counts them.
    fn now(&self) -> Moment {
        Moment {
            pass: self.pass,
            second: seconds_since(self.began),
        }
    }
}

impl SplitPolicy for Splits<'_> {
    fn may_split(&mut self) -> bool {
        if self.decided {
            return true;
        }
        let now = self.now();
        let known = self.mms.get_mut(&self.place.mm_id);
        known.is_none_or(|known| known.pages.may_split(self.place.addr, now))
    }

    fn was_split(&mut self) {
        let now = self.now();
        if let Some(known) = self.mms.get_mut(&self.place.mm_id) {
            known.pages.note_split(self.place.addr, now);
        }
    }
}

/// The result of [`State::merge_into_first`].
enum FirstMerge {
    /// The first page is a KSM page now; or it is queued.
    Done,
    /// Other processes map the page in a way that rules it out as a KSM page. The other page may do.
    RuledOut,
    /// There is no memory.
    NoMemory,
    /// The page has changed, or is in use or locked.
    Failed,
}

impl State {
    /// Searches the stable tree for each candidate of `mm`, and merges those for which it has an equal page.
    ///
    /// Returns the outcomes in the order of the candidates. Holds `mmap_lock` for the whole call, so there are
    /// at most [`MERGE_PAGES`] candidates.
    pub(super) fn stable_tree_search_all(
        &mut self,
        hasher: &Hasher,
        mm: &Mm,
        mm_id: MmId,
        candidates: &[Option<Candidate>],
    ) -> [Outcome; MERGE_PAGES] {
        let mut outcomes = [Outcome::NotSearched; MERGE_PAGES];
        let lock = MmapLock::try_new(mm);
        let mut vma: Option<MergeableVma<'_>> = None;
        for (candidate, outcome) in candidates.iter().flatten().zip(&mut outcomes) {
            let CandidateKind::Steady(sample, check) = candidate.kind else {
                continue;
            };
            let addr = candidate.addr;
            vma = vma
                .filter(|vma| vma.start() <= addr && addr < vma.end())
                .or_else(|| MergeableVma::at(lock.as_ref().ok()?, addr));
            let place = PageAddr { mm_id, addr };
            *outcome = match (&vma, check) {
                (Some(vma), Check::None) => self.stable_tree_search(hasher, vma, place, sample),
                (Some(vma), Check::Probation) => self.check_probation(hasher, vma, place, sample),
                (Some(vma), Check::Queued(sum)) => self.check_queued(hasher, vma, place, sum),
                (None, _) => Outcome::Skip,
            };
            if let Outcome::Skip = outcome {
                self.retry(place);
                if lru::was_in_the_way() {
                    self.note_batched(place);
                }
            }
        }
        self.core.lately = 0;
        outcomes
    }

    /// Merges a page with the one that is queued under its checksum, or queues it. It is one for which
    /// [`Self::stable_tree_search_all`] found no merged page.
    pub(super) fn merge_or_queue(
        &mut self,
        hasher: &Hasher,
        mm: &Mm,
        place: PageAddr,
        sum: Checksum,
    ) {
        let sum = if self.changed_lately(sum) {
            // Another page of this batch may have become a KSM page since. Content that became two KSM pages
            // stays two.
            let Ok(lock) = MmapLock::try_new(mm) else {
                return self.retry(place);
            };
            let Some(vma) = MergeableVma::at(&lock, place.addr) else {
                return;
            };
            match self.stable_tree_search(hasher, &vma, place, sum.sample()) {
                Outcome::NoMatch(sum) => sum,
                Outcome::Skip => return self.retry(place),
                _ => return,
            }
        } else {
            sum
        };
        match self.core.unstable.lookup(sum) {
            Some(other) if other == place => {}
            Some(other) => self.merge_with_queued(hasher, mm, place, other, sum),
            None => self.unstable_insert(place, sum),
        }
    }

    /// Whether the earlier search for a page that is about to be queued under `sum` may be outdated: it found
    /// no merged page, or, if `sum` is unknown, no two contents with that sample.
    fn changed_lately(&self, sum: Checksum) -> bool {
        let (index, sample) = (&self.core.index, sum.sample());
        if self.core.lately & sample.bit() == 0 {
            return false;
        }
        let unknown = Checksum::unknown(sample);
        if sum.is_unknown() {
            let queued = self.core.unstable.lookup_sample(sample);
            return index.nodes_like(sample) != NodesLike::None
                || queued.is_some_and(|sum| !sum.is_unknown());
        }
        index.nodes_with(sum).is_some() || index.nodes_with(unknown).is_some()
    }

    /// Compares the full checksum of a page on probation with the earlier one. If it has held, continues as
    /// [`Self::stable_tree_search`].
    fn check_probation(
        &mut self,
        hasher: &Hasher,
        vma: &MergeableVma<'_>,
        place: PageAddr,
        sample: Sample,
    ) -> Outcome {
        let sum = match self.checksum_of(hasher, vma, place, sample) {
            Ok(sum) => sum,
            Err(outcome) => return outcome,
        };
        let (Some(entry), core) = self.entry(place) else {
            return Outcome::NotYet;
        };
        let old = entry.probation().unwrap_or(Probation::NONE);
        match old.check(sum, core.clock.secs()) {
            (Verdict::Held, new) => {
                match entry.state() {
                    PageState::Steady(_) => entry.set_probation(new),
                    _ => core.set_page_state(entry, PageEntry::steady_on(sample, new)),
                }
                if core.filter.has_two(sample) {
                    self.stable_tree_search(hasher, vma, place, sample)
                } else {
                    Outcome::NotYet
                }
            }
            (Verdict::Begun, new) => {
                entry.set_probation(new);
                // A steady page is not a candidate again unless it is retried.
                self.retry(place);
                Outcome::NotYet
            }
            (Verdict::Moved, new) => {
                core.set_page_state(entry, PageEntry::seen_on(sample, new));
                self.note_change(place);
                Outcome::NotYet
            }
        }
    }

    /// Checks whether a page queued under `sum` still has that checksum, and whether there is an equal merged
    /// page by now.
    ///
    /// If its checksum has changed, the page leaves the unstable tree and is on probation from now on.
    fn check_queued(
        &mut self,
        hasher: &Hasher,
        vma: &MergeableVma<'_>,
        place: PageAddr,
        sum: Checksum,
    ) -> Outcome {
        if !self.is_queued(place, sum) {
            // Another candidate of the batch was merged with it, or has replaced it in the unstable tree.
            return Outcome::NotYet;
        }
        let Some(page) = vma.page_at(place.addr).filter(PageRef::is_plain_anon) else {
            return Outcome::Skip;
        };
        if page.checksum(hasher) != sum {
            drop(page);
            self.leave_unstable(place, sum);
            return self.check_probation(hasher, vma, place, sum.sample());
        }
        drop(page);
        // An equal KSM page may have had no room when this page was queued, and no checksum when it got room
        // again.
        self.core.find_sums(hasher, sum.sample());
        match self.merge_with_sum(vma, place, sum) {
            Some(Outcome::Yes) => Outcome::Yes,
            Some(outcome) => {
                // A queued page is not a candidate until the next refresh. A steady one is retried before.
                self.leave_unstable(place, sum);
                outcome
            }
            None => Outcome::NotYet,
        }
    }

    /// Searches for an equal merged page, and merges with it.
    ///
    /// As long as all pages with this sample are thought to have the same content, the checksum is not
    /// computed: the page probably has that content, too, and the merge compares all bytes in any case.
    ///
    /// Returns [`Outcome::NoMatch`] with the checksum under which the page is to be queued if there is no equal
    /// page.
    fn stable_tree_search(
        &mut self,
        hasher: &Hasher,
        vma: &MergeableVma<'_>,
        place: PageAddr,
        sample: Sample,
    ) -> Outcome {
        if self
            .core
            .zeroes
            .is_some_and(|zeroes| zeroes.contains(sample))
        {
            if let Some(outcome) = self.merge_with_zero_page(vma, place).outcome() {
                return outcome;
            }
        }
        let unknown = Checksum::unknown(sample);
        match self.core.index.nodes_like(sample) {
            NodesLike::Unique(nodes) => {
                match self.merge_with_any(vma, place, nodes, Some(hasher)) {
                    Attempt::NoRoom if nodes.sum().is_unknown() => {
                        return Outcome::NoMatch(unknown)
                    }
                    attempt => {
                        if let Some(outcome) = attempt.outcome() {
                            return outcome;
                        }
                    }
                }
            }
            NodesLike::None => {
                let queued = self.core.unstable.lookup_sample(sample);
                if queued.is_none_or(Checksum::is_unknown) {
                    return Outcome::NoMatch(unknown);
                }
            }
            NodesLike::Ambiguous => {}
        }
        self.core.find_sums(hasher, sample);
        let sum = match self.checksum_of(hasher, vma, place, sample) {
            Ok(sum) => sum,
            Err(outcome) => return outcome,
        };
        let outcome = self.merge_with_sum(vma, place, sum);
        outcome.unwrap_or(Outcome::NoMatch(sum))
    }

    /// Returns the checksum of a page that had this sample when it was scanned.
    ///
    /// `Err` if it cannot merge now: the page is gone, or has changed since, which is recorded.
    fn checksum_of(
        &mut self,
        hasher: &Hasher,
        vma: &MergeableVma<'_>,
        place: PageAddr,
        sample: Sample,
    ) -> Result<Checksum, Outcome> {
        let page = vma.page_at(place.addr).filter(PageRef::is_plain_anon);
        let sum = page.ok_or(Outcome::Skip)?.checksum(hasher);
        if sum.sample() != sample {
            return Err(self.changed(place, sum.sample()));
        }
        Ok(sum)
    }

    /// Merges a page into a merged page with checksum `sum`, which is that of the page. `None`: there is no
    /// equal one with room.
    fn merge_with_sum(
        &mut self,
        vma: &MergeableVma<'_>,
        place: PageAddr,
        sum: Checksum,
    ) -> Option<Outcome> {
        let nodes = self.core.index.nodes_with(sum)?;
        self.merge_with_any(vma, place, nodes, None).outcome()
    }

    /// Replaces a page of zeroes by the kernel's zero page. The page is not tracked afterwards.
    fn merge_with_zero_page(&mut self, vma: &MergeableVma<'_>, place: PageAddr) -> Attempt {
        let Some(page) = vma.page_at(place.addr).filter(PageRef::is_plain_anon) else {
            return Attempt::Failed;
        };
        // Check without the folio lock first, so as not to unmap the page for nothing.
        if !page.is_zero() {
            return Attempt::Differs;
        }
        let (mut splits, _) = Splits::of(self, place);
        if splits.keep_whole(&page) {
            return Attempt::LeftWhole;
        }
        let result = vma.replace_with_zero_page(place.addr, page, &mut splits);
        Attempt::from(result).map(|()| {
            self.forget(place);
        })
    }

    /// Replaces a queued page whose sample is that of a page of zeroes by the kernel's zero page, if it is all
    /// zeroes.
    pub(super) fn merge_zero(&mut self, mm: &Mm, place: PageAddr) {
        let Ok(lock) = MmapLock::try_new(mm) else {
            return;
        };
        if let Some(vma) = MergeableVma::at(&lock, place.addr) {
            // If this fails, the next pass tries again.
            let _ = self.merge_with_zero_page(&vma, place);
        }
    }

    /// Merges a page into one of `nodes`, the first of [`MAX_COMPARES`](super::index::MAX_COMPARES) that is
    /// equal.
    ///
    /// If `guessing` is given, the checksum of the page was not computed. Nodes that are known to share their
    /// sample with other content are not tried then, and the hasher tells whether the page still has that
    /// sample.
    fn merge_with_any(
        &mut self,
        vma: &MergeableVma<'_>,
        place: PageAddr,
        nodes: Nodes,
        guessing: Option<&Hasher>,
    ) -> Attempt {
        let sum = match nodes {
            Nodes::One(key) => return self.merge_with_node(vma, place, key, guessing),
            Nodes::Several(sum) => sum,
        };
        let mut result = Attempt::NoRoom;
        let keys = self.core.index.by_mappings(sum, NodeBox::items);
        for key in keys.into_iter().flatten() {
            match self.merge_with_node(vma, place, key, guessing) {
                // Another node may still be equal.
                Attempt::Differs => result = Attempt::Differs,
                Attempt::NoRoom => {}
                // Merged; or the page is in use or locked, which would stop a merge with another node as well.
                done => return done,
            }
        }
        result
    }

    /// Merges a page into the page of the node `key`.
    fn merge_with_node(
        &mut self,
        vma: &MergeableVma<'_>,
        place: PageAddr,
        key: StableKey,
        guessing: Option<&Hasher>,
    ) -> Attempt {
        let (mut splits, core) = Splits::of(self, place);
        let attempt = core.try_merge_with_node(vma, key, guessing, &mut splits);
        attempt.map(|item| self.merged(place, item, key))
    }

    /// Merges the page at `place` with the one queued at `other`, or queues it in place of that one.
    fn merge_with_queued(
        &mut self,
        hasher: &Hasher,
        mm: &Mm,
        place: PageAddr,
        other: PageAddr,
        sum: Checksum,
    ) {
        let other_mm = self.mms.get(&other.mm_id).map(|known| known.mm.clone());
        let Some(other_mm) = other_mm else {
            return self.unstable_insert(place, sum);
        };
        // Pin the module before there is a KSM page: its exit function must not run from here on.
        if self.core.pin.pin().is_err() {
            return self.retry(place);
        }
        let Ok(lock) = MmapLock::try_new(mm) else {
            return self.retry(place);
        };
        let mut second = None;
        if other.mm_id != place.mm_id {
            match MmapLock::try_new(&other_mm) {
                Ok(lock) => second = Some(lock),
                Err(NotLocked::Exiting) => return self.unstable_insert(place, sum),
                Err(NotLocked::Contended) => return self.retry(place),
            }
        }
        let other_lock = second.as_ref().unwrap_or(&lock);
        let Some(vma) = MergeableVma::at(&lock, place.addr) else {
            return;
        };
        // Check without locks first, so as not to start a merge that cannot be completed.
        let Some((other_vma, other_page)) =
            MergeableVma::at(other_lock, other.addr).and_then(|vma| {
                let page = vma.page_at(other.addr).filter(|page| {
                    page.is_plain_anon()
                        && !page.is_held_by_others()
                        && page.sample(hasher) == sum.sample()
                })?;
                Some((vma, page))
            })
        else {
            if lru::was_in_the_way() {
                self.note_batched(other);
            }
            return self.unstable_insert(place, sum);
        };
        let Some(page) = vma.page_at(place.addr).filter(PageRef::is_plain_anon) else {
            return;
        };
        if page.is_same(&other_page) {
            // The pages are one page, shared over a fork. There is nothing to gain.
            return;
        }
        // A split cannot be undone. So before either huge page is split, check that both pages can be merged,
        // and are equal.
        let large = page.is_large() || other_page.is_large();
        if large {
            if Splits::of(self, place).0.keep_whole(&page) {
                // The page is a candidate again when the huge page may be split.
                return;
            }
            if Splits::of(self, other).0.keep_whole(&other_page) {
                return self.unstable_insert(place, sum);
            }
            // If both pages are part of one huge page, our own second reference would count as one held by
            // others. References on the other page were counted before we took it.
            if other_page.is_locked() || !other_vma.maps_unmarked(other.addr, &other_page) {
                return self.unstable_insert(place, sum);
            }
            let held = !page.shares_folio_with(&other_page) && page.is_held_by_others();
            if held || page.is_locked() || !vma.maps_unmarked(place.addr, &page) {
                return self.retry(place);
            }
        }
        if page.differs_from(&other_page) {
            if !sum.is_unknown() {
                // The other page has changed where the sample does not look.
                return self.unstable_insert(place, sum);
            }
            // Two pages with this sample differ, so both need their checksums from now on.
            let sums = (page.checksum(hasher), other_page.checksum(hasher));
            drop((page, other_page));
            return self.split_sample(sum, place, sums.0, other, sums.1);
        }
        if page.is_large() && !Splits::of(self, place).0.may_split() {
            return;
        }
        if other_page.is_large() && !Splits::of(self, other).0.may_split() {
            return self.unstable_insert(place, sum);
        }
        drop(page);
        drop(other_page);
        let (this, other) = ((&vma, place), (&other_vma, other));
        let first = match self.merge_into_first(hasher, this, other, sum) {
            FirstMerge::RuledOut => self.merge_into_first(hasher, other, this, sum),
            FirstMerge::NoMemory => {
                self.core.starved.set(true);
                FirstMerge::NoMemory
            }
            first => first,
        };
        match first {
            // If both pages are ruled out, that is likely to last. Do not retry before the next refresh.
            FirstMerge::Done | FirstMerge::RuledOut => {}
            FirstMerge::NoMemory | FirstMerge::Failed => self.retry(place),
        }
    }

    /// Makes the first page a KSM page, and merges the second one into it.
    ///
    /// If the second step fails, the first page is unshared later and queued again, unless other pages have
    /// been merged into it by then. The second page leaves the unstable tree and is retried. Huge pages that
    /// either is part of are split without asking: that was decided before.
    fn merge_into_first(
        &mut self,
        hasher: &Hasher,
        (vma, place): (&MergeableVma<'_>, PageAddr),
        (other_vma, other): (&MergeableVma<'_>, PageAddr),
        sum: Checksum,
    ) -> FirstMerge {
        let Ok(item) = self.core.item_for(vma.mm(), sum.sample()) else {
            return FirstMerge::NoMemory;
        };
        let Ok(other_item) = self.core.item_for(other_vma.mm(), sum.sample()) else {
            // The other page's group is at its limit. Queue this page instead of it, so that equal pages of
            // other groups still find a partner.
            self.unstable_insert(place, sum);
            return FirstMerge::Done;
        };
        let key = match self.make_ksm_page(hasher, vma, place, item, sum) {
            Ok(key) => key,
            Err(ENOMEM) => return FirstMerge::NoMemory,
            Err(EMLINK) => return FirstMerge::RuledOut,
            Err(_) => return FirstMerge::Failed,
        };
        if !self.merge_with_ksm_page(other_vma, other, other_item, key) {
            // Do not let the next equal page try it in vain.
            self.leave_unstable(other, sum);
            self.retry(other);
            if lru::was_in_the_way() {
                self.note_batched(other);
            }
            // A KSM page with a single mapping saves nothing.
            let id = self.core.index.node(key).and_then(NodeBox::id);
            self.break_cow_later(place, id);
        }
        FirstMerge::Done
    }

    /// Queues two pages with the same sample but other content under their checksums. `other` was queued under
    /// `unknown`.
    fn split_sample(
        &mut self,
        unknown: Checksum,
        place: PageAddr,
        sum: Checksum,
        other: PageAddr,
        other_sum: Checksum,
    ) {
        self.core.lately |= unknown.sample().bit();
        self.core.unstable.remove(unknown, other);
        for (place, sum) in [(other, other_sum), (place, sum)] {
            let (Some(entry), core) = self.entry(place) else {
                continue;
            };
            let sample = entry.sample();
            let probation = Probation::new(entry.strikes(), Print::UNKNOWN, core.clock.secs());
            core.set_page_state(entry, PageEntry::steady_on(sample, probation));
            if sample == sum.sample() {
                self.unstable_insert(place, sum);
            } else {
                // The page has changed since it was compared. The next pass scans it again.
                self.retry(place);
            }
        }
    }

    /// Merges the page at `place` into the page of the node `key`, with `item` as its rmap item.
    ///
    /// Returns whether it is merged. If not, the node may be stale, or its page locked by another task.
    fn merge_with_ksm_page(
        &mut self,
        vma: &MergeableVma<'_>,
        place: PageAddr,
        item: ItemBox,
        key: StableKey,
    ) -> bool {
        let (mut splits, core) = Splits::decided(self, place);
        let Some(node) = core.index.node(key) else {
            return false;
        };
        let NodePage::Locked(kpage) = node.locked_page() else {
            return false;
        };
        let attempt = replace_page(vma, &kpage, node, item, core, &mut splits);
        // Unlock the page first.
        drop(kpage);
        let Attempt::Merged(item) = attempt else {
            return false;
        };
        self.merged(place, item, key);
        true
    }

    /// Makes the page at `place` a KSM page, with a node of its own. Returns the key of the node.
    ///
    /// # Errors
    ///
    /// `ENOMEM` without memory for the node, and the errors of [`MergeableVma::make_ksm_page`]: `EAGAIN` if the
    /// content does not match `sum` any more.
    fn make_ksm_page(
        &mut self,
        hasher: &Hasher,
        vma: &MergeableVma<'_>,
        place: PageAddr,
        mut item: ItemBox,
        sum: Checksum,
    ) -> Result<StableKey> {
        let (mut splits, core) = Splits::decided(self, place);
        let key = core.index.new_key(sum);
        let node = NodeBox::new(key, GFP_SCAN)?;
        core.index.insert(key, node, GFP_SCAN)?;
        match core.make_ksm_page_at(hasher, vma, key, &mut item, &mut splits) {
            Ok(Published { shared, strays }) => {
                if shared {
                    let leaf = PageMap::<PageEntry>::number(place.addr);
                    core.unlisted.add(leaf);
                }
                // Look for strays in the next steps, and in the whole next pass.
                core.has_strays |= strays;
                core.found_strays |= strays;
                self.merged(place, item, key);
                Ok(key)
            }
            Err(err) => {
                core.release(key);
                Err(err)
            }
        }
    }

    /// Has the merged page at `place` unshared when `state` is unlocked, because that may wait for memory.
    ///
    /// If there is no room to remember it, the page stays merged and listed. The next equal page can merge into
    /// it.
    pub(super) fn break_cow_later(&mut self, place: PageAddr, node: Option<NodeId>) {
        let _ = self.to_break.push_within_capacity((place, node));
    }

    /// Whether the page at `place` is still the only mapping listed with `node`.
    fn is_alone(&mut self, place: PageAddr, node: NodeId) -> bool {
        let listed = self
            .entry(place)
            .0
            .and_then(|entry| entry.listed_with(node));
        listed.is_some_and(|(_, items)| items == 1)
    }

    /// Records that the page at `place` is an ordinary page again, after it was the only one of `node`, and
    /// queues it.
    ///
    /// So the roles change: the next equal page is tried as the KSM page first, and if it is pinned, nothing
    /// has to be unshared.
    fn cow_broken(&mut self, place: PageAddr, node: NodeId) {
        let (Some(entry), core) = self.entry(place) else {
            return;
        };
        // While `state` was unlocked, the page may have been forgotten, or merged with another node.
        let Some((key, _)) = entry.listed_with(node) else {
            return;
        };
        let sample = key.sum.sample();
        // No process wrote to the page, so the short life of the merge is no reason for a strike.
        let print = Print::of(key.sum);
        let probation = Probation::new(entry.strikes(), print, core.clock.secs());
        if core.release_item(entry) {
            core.replace(place, entry, PageEntry::steady_on(sample, probation));
            self.core.try_free_orphan(key, false);
            self.unstable_insert(place, key.sum);
        }
    }

    /// Lists the page at `place`, which is the page of the node `id`: a child inherited the mapping.
    pub(super) fn stable_tree_append(&mut self, mm: &Mm, place: PageAddr, id: NodeId) {
        // The old entry is outdated in any case. Without memory, or while the page is locked, the next pass
        // tries again, and does not skip the leaf.
        if !self.forget(place) || self.try_append(mm, place, id).is_err() {
            self.note_change(place);
        }
    }

    /// Adds an rmap item for the page at `place` to the node `id`. `place` must not be tracked yet.
    ///
    /// `EBUSY` if a lock is contended, or the page is not that of the node; `ENOMEM` if there is no memory.
    fn try_append(&mut self, mm: &Mm, place: PageAddr, id: NodeId) -> Result {
        let lock = MmapLock::try_new(mm).map_err(|_| EBUSY)?;
        let vma = MergeableVma::find(&lock, place.addr, Which::MayBeMerged).ok_or(EBUSY)?;
        let page = vma.page_at(place.addr).ok_or(EBUSY)?;
        let page = page.try_lock().map_err(|_| EBUSY)?;
        if page.node_id() != Some(id) {
            return Err(EBUSY);
        }
        let key = page.node_key().ok_or(EBUSY)?;
        let sample = key.sum.sample();
        let mut item = self.core.try_new_item(sample, gfp_inherited())?;
        self.remember(mm, place, sample)?;
        let node = self.core.index.node(key).ok_or(EBUSY)?;
        let result = node.add_rmap_item(&page, &mut item, &vma, place.addr);
        // Drop the locks first: [`Self::forget`] may have to take the folio lock to take the item off.
        drop(page);
        drop(lock);
        match result {
            Ok(()) => self.merged(place, item, key),
            Err(_) => {
                // The entry was added above, and is not merged.
                self.forget(place);
            }
        }
        result
    }
}

impl Core {
    /// Merges the page of `splits`, which is in `vma`, into the page of the node `key`. Returns the listed item.
    ///
    /// `guessing`: see [`State::merge_with_any`].
    fn try_merge_with_node(
        &mut self,
        vma: &MergeableVma<'_>,
        key: StableKey,
        guessing: Option<&Hasher>,
        splits: &mut Splits<'_>,
    ) -> Attempt<ItemBox> {
        let place = splits.place;
        let Some(node) = self.index.node(key) else {
            return Attempt::NoRoom;
        };
        if node.items() >= self.settings.max_sharing() {
            return Attempt::NoRoom;
        }
        if guessing.is_some() && node.is_ambiguous() {
            // The sample is known to be ambiguous, so the checksum has to decide.
            return Attempt::Differs;
        }
        let kpage = match node.locked_page() {
            NodePage::Locked(kpage) => kpage,
            NodePage::Busy => return Attempt::Failed,
            NodePage::Gone => {
                self.release(key);
                return Attempt::NoRoom;
            }
        };
        if kpage.is_poisoned() {
            // The node is not stale. It goes when no process maps the page any more.
            return Attempt::NoRoom;
        }
        if self.settings.per_nid() {
            let nid = kpage.nid();
            let page = vma.page_at(place.addr);
            if page.is_some_and(|page| page.nid() != nid) {
                node.set_nid_changed();
                return Attempt::NoRoom;
            }
        }
        let Ok(item) = self.new_item(key.sum.sample()) else {
            return Attempt::Failed;
        };
        let attempt = replace_page(vma, &kpage, node, item, self, splits);
        if let (Some(hasher), Attempt::Differs) = (guessing, &attempt) {
            // The contents differ, unless the page was written to just now.
            let sample = vma.page_at(place.addr).map(|page| page.sample(hasher));
            if sample == Some(key.sum.sample()) {
                node.set_ambiguous();
            }
        }
        attempt
    }

    /// Makes the page of `splits`, which is in `vma`, the page of the node `key`, if it still has the checksum
    /// of `key`.
    fn make_ksm_page_at(
        &self,
        hasher: &Hasher,
        vma: &MergeableVma<'_>,
        key: StableKey,
        item: &mut ItemBox,
        splits: &mut Splits<'_>,
    ) -> Result<Published> {
        let place = splits.place;
        let node = self.index.node(key).ok_or(EBUSY)?;
        let page = vma.page_at(place.addr).ok_or(EBUSY)?;
        let sum = key.sum;
        let is_still = |page: &PageRef| match sum.is_unknown() {
            true => page.sample(hasher) == sum.sample(),
            false => page.checksum(hasher) == sum,
        };
        vma.make_ksm_page(place.addr, page, node, item, is_still, splits)
    }
}

impl Engine {
    /// Unshares merged pages of which the merge could not be completed, see [`State::break_cow_later`].
    ///
    /// The caller holds no lock of the engine. May sleep for memory, but only tries `mmap_lock`.
    pub(super) fn break_cow_pending(&self) {
        loop {
            let mut state = self.state.lock();
            let Some((place, node)) = state.to_break.pop() else {
                return;
            };
            if node.is_some_and(|node| !state.is_alone(place, node)) {
                // Other pages were merged into it meanwhile; or it was forgotten, and the next scan lists it.
                continue;
            }
            let mm = state.mms.get(&place.mm_id).map(|known| known.mm.clone());
            drop(state);
            let Some(mm) = mm.and_then(|mm| use_mm(&mm)) else {
                continue;
            };
            if !unshare(&mm, place.addr) {
                // The page stays merged and listed.
                continue;
            }
            drop(mm);
            if let Some(node) = node {
                self.state.lock().cow_broken(place, node);
            }
        }
    }
}

/// Makes the merged page at `addr` an ordinary page, unless `mmap_lock` is contended. Returns whether it is no
/// merged page any more.
fn unshare(mm: &MmWithUser, addr: usize) -> bool {
    let Ok(lock) = MmapLock::try_new(mm) else {
        return false;
    };
    let Some(vma) = MergeableVma::find(&lock, addr, Which::MayBeMerged) else {
        // The page is unmapped.
        return true;
    };
    let end = addr.saturating_add(PAGE_SIZE);
    let done = vma.unmerge(mm, addr, end);
    done.result.is_ok() && done.reached >= end && done.unserved().is_empty()
}

/// Replaces the page of `splits`, which is in `vma`, by `kpage`, the page of `node`, and lists the mapping with
/// `item`. Returns the item if the page is merged.
fn replace_page(
    vma: &MergeableVma<'_>,
    kpage: &LockedPage,
    node: &NodeBox,
    mut item: ItemBox,
    core: &Core,
    splits: &mut Splits<'_>,
) -> Attempt<ItemBox> {
    let addr = splits.place.addr;
    // Recheck under the lock: memory_failure() may have poisoned the page while we waited.
    if kpage.is_poisoned() {
        return Attempt::Failed;
    }
    let Some(page) = vma.page_at(addr) else {
        return Attempt::Failed;
    };
    // Neither page can migrate now: we hold a reference on one, and the lock of the other. The next pass gives
    // the node another key.
    if core.settings.per_nid() && page.nid() != kpage.nid() {
        node.set_nid_changed();
        return Attempt::Failed;
    }
    // `replace_page` asks the policy again. Check here first, so as not to compare the pages for nothing.
    if splits.keep_whole(&page) {
        return Attempt::LeftWhole;
    }
    let result = vma.replace_page(addr, page, kpage, node, &mut item, splits);
    Attempt::from(result).map(|()| item)
}
