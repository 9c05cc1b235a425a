// SPDX-License-Identifier: GPL-2.0

//! The merge protocol.
//!
//! A page goes from "seen" to "waiting in the unstable tree" to "merged". Whatever goes wrong on the
//! way, memory stays as it was, and the page is looked at again in a later pass.

use super::{
    candidate::{Candidate, CandidateKind, Outcome},
    index::{MmId, Nodes, NodesLike, PageAddr},
    metadata::gfp_inherited,
    page_map::{Moment, PageMap},
    probation::{Print, Probation, Verdict},
    scan::seconds_since,
    use_mm, Core, Engine, MmState, State, GFP_SCAN,
};
use crate::{
    hash::{Checksum, Hasher, Sample},
    mm::{
        entry::{PageEntry, PageState},
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

/// Says whether the huge page that a page is part of may be split.
struct Splits<'a> {
    mms: &'a mut RBTree<MmId, MmState>,
    place: PageAddr,
    pass: u32,
    began: Instant<Monotonic>,
    /// That it may is known already.
    decided: bool,
}

impl<'a> Splits<'a> {
    /// For the page at `place`; and what else is known.
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

    /// The same for a page of whose huge page it is known that it may be split.
    fn decided(state: &'a mut State, place: PageAddr) -> (Self, &'a mut Core) {
        let (splits, core) = Self::of(state, place);
        let splits = Self {
            decided: true,
            ..splits
        };
        (splits, core)
    }

    /// Whether `page` is part of a huge page that is to stay whole, as far as that can be told without noting
    /// anything.
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

impl State {
    /// Tries to merge pages of `mm`, whose samples held between two looks, into merged pages. What
    /// came of each is noted with it.
    ///
    /// Holds `mmap_lock` for all of them, so there should be few.
    pub(super) fn join_all(
        &mut self,
        hasher: &Hasher,
        mm: &Mm,
        mm_id: MmId,
        candidates: &mut [Option<Candidate>],
    ) {
        let lock = MmapLock::try_new(mm);
        let mut vma: Option<MergeableVma<'_>> = None;
        for candidate in candidates.iter_mut().flatten() {
            let CandidateKind::Steady(sample, joined) = &mut candidate.kind else {
                continue;
            };
            let addr = candidate.addr;
            vma = vma
                .filter(|vma| vma.start() <= addr && addr < vma.end())
                .or_else(|| MergeableVma::at(lock.as_ref().ok()?, addr));
            let place = PageAddr { mm_id, addr };
            *joined = match (&vma, *joined) {
                (Some(vma), Outcome::OnProbation) => self.check(hasher, vma, place, *sample),
                (Some(vma), Outcome::Waiting(sum)) => self.check_waiting(hasher, vma, place, sum),
                (Some(vma), _) => self.stable_tree_search(hasher, vma, place, *sample),
                (None, _) => Outcome::Skip,
            };
            if let Outcome::Skip = joined {
                self.retry(place);
                if lru::was_in_the_way() {
                    self.note_batched(place);
                }
            }
        }
        self.core.lately = 0;
    }

    /// Merges a page for which [`Self::join_all`] found no merged page with the one that waits under its
    /// checksum, or lets it wait.
    pub(super) fn merge_or_wait(
        &mut self,
        hasher: &Hasher,
        mm: &Mm,
        place: PageAddr,
        sum: Checksum,
    ) {
        let sum = if self.changed_lately(sum) {
            // Another one of the same batch came before; what is published twice stays twice.
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
        match self.core.index.unstable_lookup(sum) {
            Some(other) if other == place => {}
            Some(other) => self.merge_with_waiting(hasher, mm, place, other, sum),
            None => self.unstable_insert(place, sum),
        }
    }

    /// Whether it is not true any more that there is no merged page for one which is about to wait under `sum`; or
    /// that all pages with its sample have one content, if `sum` is not known.
    fn changed_lately(&self, sum: Checksum) -> bool {
        let (index, sample) = (&self.core.index, sum.sample());
        if self.core.lately & sample.bit() == 0 {
            return false;
        }
        let unknown = Checksum::unknown(sample);
        if sum.is_unknown() {
            let is_known = |sum: Checksum| !sum.is_unknown();
            return index.nodes_like(sample) != NodesLike::None
                || index.unstable_lookup_sample(sample).is_some_and(is_known);
        }
        index.nodes_with(sum).is_some() || index.nodes_with(unknown).is_some()
    }

    /// Looks whether the full checksum of a page on probation has held, and if so, goes on as
    /// [`Self::stable_tree_search`] does.
    fn check(
        &mut self,
        hasher: &Hasher,
        vma: &MergeableVma<'_>,
        place: PageAddr,
        sample: Sample,
    ) -> Outcome {
        let Some(page) = vma.page_at(place.addr).filter(PageRef::is_plain_anon) else {
            return Outcome::Skip;
        };
        let sum = page.checksum(hasher);
        drop(page);
        if sum.sample() != sample {
            return self.changed(place, sum.sample());
        }
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
                // One that is steady is not looked at again without retry_steady.
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

    /// Looks whether a page that waits under `sum` still has that checksum, and whether there is a merged page for
    /// it by now. If it has another one, it is on probation from now on.
    fn check_waiting(
        &mut self,
        hasher: &Hasher,
        vma: &MergeableVma<'_>,
        place: PageAddr,
        sum: Checksum,
    ) -> Outcome {
        if !self.waits(place, sum) {
            // Another candidate of the batch was merged with it, or waits in its stead.
            return Outcome::NotYet;
        }
        let Some(page) = vma.page_at(place.addr).filter(PageRef::is_plain_anon) else {
            return Outcome::Skip;
        };
        if page.checksum(hasher) != sum {
            drop(page);
            self.leave_unstable(place, sum);
            return self.check(hasher, vma, place, sum.sample());
        }
        drop(page);
        // Merged pages that are equal to it may have got their room back before they got their checksums.
        self.core.find_sums(hasher, sum.sample());
        let joined = match self.core.index.nodes_with(sum) {
            Some(nodes) => self.merge_with_any(vma, place, nodes, None),
            None => None,
        };
        match joined {
            Some(Ok(())) => Outcome::Yes,
            Some(Err(err)) if err != EAGAIN => {
                // Who waits is not a candidate before its turn comes again.
                self.leave_unstable(place, sum);
                Outcome::failed(err)
            }
            _ => Outcome::NotYet,
        }
    }

    /// Tries to merge a page into one of the merged pages with its checksum.
    ///
    /// As long as all pages with its sample have the same content, as far as anybody knows, the checksum
    /// is not even computed: the page is as likely to be another one of these, and the comparison that
    /// follows anyway says so for certain.
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
            match self.join_zero(vma, place) {
                Ok(()) => return Outcome::Yes,
                Err(err) if err != EAGAIN => return Outcome::failed(err),
                // Not all zeroes.
                _ => {}
            }
        }
        let unknown = Checksum::unknown(sample);
        match self.core.index.nodes_like(sample) {
            NodesLike::Unique(nodes) => {
                match self.merge_with_any(vma, place, nodes, Some(hasher)) {
                    Some(Ok(())) => return Outcome::Yes,
                    Some(Err(err)) if err != EAGAIN => return Outcome::failed(err),
                    None if nodes.sum().is_unknown() => return Outcome::NoMatch(unknown),
                    _ => {}
                }
            }
            NodesLike::None => {
                let waiting = self.core.index.unstable_lookup_sample(sample);
                if waiting.is_none_or(Checksum::is_unknown) {
                    return Outcome::NoMatch(unknown);
                }
            }
            NodesLike::Ambiguous => {}
        }
        self.core.find_sums(hasher, sample);
        let Some(page) = vma.page_at(place.addr).filter(PageRef::is_plain_anon) else {
            return Outcome::Skip;
        };
        let sum = page.checksum(hasher);
        drop(page);
        if sum.sample() != sample {
            return self.changed(place, sum.sample());
        }
        let joined = match self.core.index.nodes_with(sum) {
            Some(nodes) => self.merge_with_any(vma, place, nodes, None),
            None => None,
        };
        match joined {
            Some(Ok(())) => Outcome::Yes,
            Some(Err(err)) if err != EAGAIN => Outcome::failed(err),
            _ => Outcome::NoMatch(sum),
        }
    }

    /// Merges a page of zeroes with the kernel's zero page. It is not remembered afterwards: that is no page
    /// that is scanned.
    fn join_zero(&mut self, vma: &MergeableVma<'_>, place: PageAddr) -> Result {
        let page = vma
            .page_at(place.addr)
            .filter(PageRef::is_plain_anon)
            .ok_or(EBUSY)?;
        // Looked at without a lock, to be spared unmapping it for nothing.
        if !page.is_zero() {
            return Err(EAGAIN);
        }
        let (mut splits, _) = Splits::of(self, place);
        if splits.keep_whole(&page) {
            return Err(E2BIG);
        }
        vma.replace_with_zero_page(place.addr, page, &mut splits)?;
        self.forget(place);
        Ok(())
    }

    /// Merges a page that waits, and whose sample is that of a page of zeroes, with the zero page, if it is
    /// one.
    pub(super) fn merge_zero(&mut self, mm: &Mm, place: PageAddr) {
        let Ok(lock) = MmapLock::try_new(mm) else {
            return;
        };
        if let Some(vma) = MergeableVma::at(&lock, place.addr) {
            // If it is not, or cannot be merged now, the next pass tries again.
            let _ = self.join_zero(&vma, place);
        }
    }

    /// Tries to merge a page into one of these merged pages, or of some of them. `None`: none takes another
    /// page. With `guessing`, only those are tried whose sample was never found to be that of other
    /// content; the hasher tells whether it still is the page's.
    fn merge_with_any(
        &mut self,
        vma: &MergeableVma<'_>,
        place: PageAddr,
        nodes: Nodes,
        guessing: Option<&Hasher>,
    ) -> Option<Result> {
        let sum = match nodes {
            Nodes::One(key) => return self.merge_with_node(vma, place, key, guessing),
            Nodes::Several(sum) => sum,
        };
        let mut result = None;
        let keys = self.core.index.by_mappings(sum, NodeBox::items);
        for key in keys.into_iter().flatten() {
            match self.merge_with_node(vma, place, key, guessing) {
                // Other content, or the page changed: another node may still fit.
                Some(Err(err)) if err == EAGAIN => result = Some(Err(err)),
                None => {}
                // Merged; or pinned or locked, and that will not be different with another node.
                done => return done,
            }
        }
        result
    }

    /// Tries to merge a page into the page of the node `key`. `None`: that takes no other page, or is gone.
    fn merge_with_node(
        &mut self,
        vma: &MergeableVma<'_>,
        place: PageAddr,
        key: StableKey,
        guessing: Option<&Hasher>,
    ) -> Option<Result> {
        let (mut splits, core) = Splits::of(self, place);
        let result = core.try_merge_with_node(vma, key, guessing, &mut splits)?;
        Some(result.map(|item| self.merged(place, item, key)))
    }

    /// Merges the page at `place` with the one that waits at `other`, or lets it wait in its stead.
    fn merge_with_waiting(
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
        // From here on the module may not be unloaded.
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
        // Looked at without a lock, to be spared undoing a merge that cannot be completed.
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
            // Shared by fork: nothing to gain.
            return;
        }
        // A split cannot be cow_broken, so both pages have to be fit for merging, and equal, before either
        // huge page is split.
        let large = page.is_large() || other_page.is_large();
        if large {
            if Splits::of(self, place).0.keep_whole(&page) {
                // It comes by again when it may be split.
                return;
            }
            if Splits::of(self, other).0.keep_whole(&other_page) {
                return self.unstable_insert(place, sum);
            }
            // References on the other one were counted before there was a second one of ours, if both are
            // parts of one huge page.
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
                // The other one changed where the sample does not look.
                return self.unstable_insert(place, sum);
            }
            // From now on both need their checksums.
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
        let result = match self.merge_into_first(hasher, this, other, sum) {
            Err(ENOMEM) => {
                self.core.starved.set(true);
                Err(ENOMEM)
            }
            // The other page may be one that can be the merged one.
            Err(EMLINK) => self.merge_into_first(hasher, other, this, sum),
            result => result,
        };
        // If it is neither, because strangers have both, that lasts: once in a while is enough.
        if result.is_err_and(|err| err != EMLINK) {
            self.retry(place);
        }
    }

    /// Makes the first page a merged page, and merges the other one into it. If it is the latter that
    /// fails, the first is cow_broken, and waits, unless others have joined it by then; and the other one waits no
    /// longer, but is looked at again. `ENOMEM`: there is no memory for the rmap item of the first. Huge
    /// pages that they are parts of may be split, that is decided.
    fn merge_into_first(
        &mut self,
        hasher: &Hasher,
        (vma, place): (&MergeableVma<'_>, PageAddr),
        (other_vma, other): (&MergeableVma<'_>, PageAddr),
        sum: Checksum,
    ) -> Result {
        let item = self.core.item_for(vma.mm(), sum.sample())?;
        let Ok(other_item) = self.core.item_for(other_vma.mm(), sum.sample()) else {
            // The other page's group is at its limit. Queue this page instead of it, so that equal pages of
            // other groups still find a partner.
            self.unstable_insert(place, sum);
            return Ok(());
        };
        let key = self.make_ksm_page(hasher, vma, place, item, sum)?;
        if self
            .merge_with_ksm_page(other_vma, other, other_item, key)
            .is_err()
        {
            // The next one does not try it again in vain.
            self.leave_unstable(other, sum);
            self.retry(other);
            if lru::was_in_the_way() {
                self.note_batched(other);
            }
            // A merged page that nobody shares is no gain.
            let id = self.core.index.node(key).and_then(NodeBox::id);
            self.break_cow_later(place, id);
        }
        Ok(())
    }

    /// Lets two pages with the same sample wait under their checksums, of which `other` waited under
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
        self.core.index.unstable_remove(unknown, other);
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
                // It has changed since it was looked at, and is looked at again in the next pass.
                self.retry(place);
            }
        }
    }

    /// Merges the page at `place` into the page of the node `key`.
    fn merge_with_ksm_page(
        &mut self,
        vma: &MergeableVma<'_>,
        place: PageAddr,
        item: ItemBox,
        key: StableKey,
    ) -> Result {
        let item = {
            let (mut splits, core) = Splits::decided(self, place);
            let node = core.index.node(key).ok_or(EBUSY)?;
            let NodePage::Locked(kpage) = node.locked_page() else {
                return Err(EBUSY);
            };
            replace_page(vma, &kpage, node, item, core, &mut splits)?
        };
        self.merged(place, item, key);
        Ok(())
    }

    /// Makes the page at `place` a merged page, with a node of its own. `EAGAIN`: it is not what it was.
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
                // The next steps, and the whole next pass, look for them.
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

    /// Has the merged page at `place` made an ordinary page again when `state` is unlocked: that takes memory,
    /// which may have to be waited for. If there is no room to remember it, it stays merged, listed with its
    /// node like any other, and is as good a partner for the next equal page.
    pub(super) fn break_cow_later(&mut self, place: PageAddr, node: Option<NodeId>) {
        let _ = self.to_break.push_within_capacity((place, node));
    }

    /// Whether the page at `place` is still the only one that is listed with `node`.
    fn is_alone(&mut self, place: PageAddr, node: NodeId) -> bool {
        let listed = self
            .entry(place)
            .0
            .and_then(|entry| entry.listed_with(node));
        listed.is_some_and(|(_, items)| items == 1)
    }

    /// Notes that the page at `place`, which was the only one of `node`, is an ordinary page again, and lets it
    /// wait.
    ///
    /// So it is the other page's turn to be tried first, which costs nothing when that is pinned.
    fn cow_broken(&mut self, place: PageAddr, node: NodeId) {
        let (Some(entry), core) = self.entry(place) else {
            return;
        };
        // It may have been forgotten meanwhile, and more.
        let Some((key, _)) = entry.listed_with(node) else {
            return;
        };
        let sample = key.sum.sample();
        // Nobody wrote to it, so that it was merged for so short a time is no strike.
        let print = Print::of(key.sum);
        let probation = Probation::new(entry.strikes(), print, core.clock.secs());
        if core.release_item(entry) {
            core.replace(place, entry, PageEntry::steady_on(sample, probation));
            self.core.try_free_orphan(key, false);
            self.unstable_insert(place, key.sum);
        }
    }

    /// Lists the page at `place` with the node whose page it is: a child inherited the mapping.
    pub(super) fn stable_tree_append(&mut self, mm: &Mm, place: PageAddr, id: NodeId) {
        // Whatever it was before, it is not any more. Without memory, or while the page is locked, the next
        // pass tries again, and does not skip the area.
        if !self.forget(place) || self.try_append(mm, place, id).is_err() {
            self.note_change(place);
        }
    }

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
        let mut item = ItemBox::new(sample, self.core.clock.beat(), gfp_inherited())?;
        self.remember(mm, place, sample)?;
        let node = self.core.index.node(key).ok_or(EBUSY)?;
        let result = node.add_rmap_item(&page, &mut item, &vma, place.addr);
        // Locks are given up first: taking an item off again would take the folio lock.
        drop(page);
        drop(lock);
        match result {
            Ok(()) => self.merged(place, item, key),
            Err(_) => {
                // Just remembered, and not merged.
                self.forget(place);
            }
        }
        result
    }
}

impl Core {
    /// Tries to merge the page that `splits` is about, which is in `vma`, into the page of the node `key`. `None`:
    /// that one takes no more pages, or is gone.
    fn try_merge_with_node(
        &mut self,
        vma: &MergeableVma<'_>,
        key: StableKey,
        guessing: Option<&Hasher>,
        splits: &mut Splits<'_>,
    ) -> Option<Result<ItemBox>> {
        let place = splits.place;
        let node = self.index.node(key)?;
        if node.items() >= self.max_sharing {
            return None;
        }
        if guessing.is_some() && node.is_ambiguous() {
            // The checksum has to tell.
            return Some(Err(EAGAIN));
        }
        let kpage = match node.locked_page() {
            NodePage::Locked(kpage) => kpage,
            NodePage::Busy => return Some(Err(EBUSY)),
            NodePage::Gone => {
                self.release(key);
                return None;
            }
        };
        if kpage.is_poisoned() {
            // Not stale: the node goes when nobody maps the page any more.
            return None;
        }
        if self.per_nid {
            let nid = kpage.nid();
            let page = vma.page_at(place.addr);
            if page.is_some_and(|page| page.nid() != nid) {
                node.set_nid_changed();
                return None;
            }
        }
        let item = match self.new_item(key.sum.sample()) {
            Ok(item) => item,
            Err(err) => return Some(Err(err)),
        };
        let result = replace_page(vma, &kpage, node, item, self, splits);
        if let (Some(hasher), Err(EAGAIN)) = (guessing, result.as_ref().map_err(|err| *err)) {
            // Unless it is that the page has just been written to.
            let sample = vma.page_at(place.addr).map(|page| page.sample(hasher));
            if sample == Some(key.sum.sample()) {
                node.set_ambiguous();
            }
        }
        Some(result)
    }

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
    /// Undoes merges that could not be completed, without any lock of the engine.
    pub(super) fn break_cow_pending(&self) {
        loop {
            let mut state = self.state.lock();
            let Some((place, node)) = state.to_break.pop() else {
                return;
            };
            if node.is_some_and(|node| !state.is_alone(place, node)) {
                // Others have joined it meanwhile, or it was forgotten, in which case the next look lists it.
                continue;
            }
            let mm = state.mms.get(&place.mm_id).map(|known| known.mm.clone());
            drop(state);
            let Some(mm) = mm.and_then(|mm| use_mm(&mm)) else {
                continue;
            };
            if !unshare(&mm, place.addr) {
                // It stays merged and listed.
                continue;
            }
            drop(mm);
            if let Some(node) = node {
                self.state.lock().cow_broken(place, node);
            }
        }
    }
}

/// Makes the merged page at `addr` an ordinary page, if that can be done at once. Returns whether the page is no
/// merged page.
fn unshare(mm: &MmWithUser, addr: usize) -> bool {
    let Ok(lock) = MmapLock::try_new(mm) else {
        return false;
    };
    let Some(vma) = MergeableVma::find(&lock, addr, Which::MayBeMerged) else {
        // Unmapped.
        return true;
    };
    let end = addr.saturating_add(PAGE_SIZE);
    let done = vma.unmerge(mm, addr, end);
    done.result.is_ok() && done.reached >= end && done.unserved().is_empty()
}

/// Merges the page that `splits` is about, which is in `vma`, into `kpage`, the page of `node`, and lists it there
/// by `item`.
///
/// `EAGAIN` if they differ, or must not be merged; `E2BIG` if the page is part of a huge page that stays whole.
fn replace_page(
    vma: &MergeableVma<'_>,
    kpage: &LockedPage,
    node: &NodeBox,
    mut item: ItemBox,
    core: &Core,
    splits: &mut Splits<'_>,
) -> Result<ItemBox> {
    let addr = splits.place.addr;
    // Its lock may have been waited for, behind who has just given it up.
    if kpage.is_poisoned() {
        return Err(EBUSY);
    }
    let page = vma.page_at(addr).ok_or(EBUSY)?;
    // Neither moves: what we hold is this very page, and the merged one is locked. The next pass gives the
    // node another key.
    if core.per_nid && page.nid() != kpage.nid() {
        node.set_nid_changed();
        return Err(EBUSY);
    }
    // Asked once more when nothing else is in the way; but the pages need not be compared for nothing.
    if splits.keep_whole(&page) {
        return Err(E2BIG);
    }
    vma.replace_page(addr, page, kpage, node, &mut item, splits)?;
    Ok(item)
}
