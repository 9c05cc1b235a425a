// SPDX-License-Identifier: GPL-2.0

//! The merge protocol.
//!
//! A page goes from "seen" to "waiting in the unstable tree" to "merged". Whatever goes wrong on the
//! way, memory stays as it was, and the page is looked at again in a later pass.

use super::{
    checksum::{Checksum, Hasher, Sample},
    index::{Index, Nodes, NodesLike, Place, SlotId, StableKey, MAX_COMPARES},
    pagemap::Found,
    scan::{known_mm, use_mm, Candidate, CandidateKind, Cursor},
    Core, Engine, State, GFP_SCAN,
};
use crate::mm::{
    folio::{LockedPage, PageRef},
    intree,
    stable::{ItemBox, NodeBox, NodeId},
    vma::{MergeableVma, Next, HOLD_VMAS},
    word::PageWord,
};
use kernel::{
    mm::{Mm, MmWithUser},
    page::PAGE_SIZE,
    prelude::*,
    sync::atomic::Relaxed,
};

/// What came of looking for a merged page to join.
#[derive(Clone, Copy)]
pub(super) enum Joined {
    /// Not looked for yet.
    Unknown,
    /// The page is merged.
    Yes,
    /// There is none. This is the page's checksum (perhaps [`Checksum::unknown`]), and whether it may be
    /// mapped elsewhere, too.
    NoneFits(Checksum, bool),
    /// Nothing can be done with the page now.
    Hopeless,
}

impl State {
    /// Tries to merge pages of `mm`, whose samples held between two looks, into merged pages. What
    /// came of each is noted with it.
    ///
    /// Holds `mmap_lock` for all of them, so there should be few.
    pub(super) fn join_all(
        &mut self,
        hasher: &Hasher,
        mm: &MmWithUser,
        slot: SlotId,
        candidates: &mut [Option<Candidate>],
    ) {
        let guard = mm.mmap_read_lock();
        let mut vma: Option<MergeableVma<'_>> = None;
        for candidate in candidates.iter_mut().flatten() {
            let CandidateKind::Steady(sample, joined) = &mut candidate.kind else {
                continue;
            };
            let addr = candidate.addr;
            vma = vma
                .filter(|vma| vma.start() <= addr && addr < vma.end())
                .or_else(|| MergeableVma::at(&guard, addr));
            *joined = match &vma {
                Some(vma) => self.join_stable(hasher, vma, Place { slot, addr }, *sample),
                None => Joined::Hopeless,
            };
            if let Joined::Hopeless = joined {
                self.core.try_again();
            }
        }
    }

    /// Merges a page for which [`Self::join_all`] found no merged page with the one that waits under its
    /// checksum, or lets it wait.
    pub(super) fn merge_or_wait(
        &mut self,
        hasher: &Hasher,
        mm: &MmWithUser,
        place: Place,
        sum: Checksum,
        may_be_shared: bool,
    ) {
        match self.core.index.waiting(sum) {
            Some(other) if other == place => {}
            Some(other) => self.merge_with_waiting(hasher, mm, place, other, sum, may_be_shared),
            // One of the same batch may have been merged since.
            None => match self.core.index.nodes_with(sum) {
                Some(nodes) => {
                    let guard = mm.mmap_read_lock();
                    let joined = MergeableVma::at(&guard, place.addr)
                        .and_then(|vma| self.join_one_of(&vma, place, nodes, None));
                    drop(guard);
                    // None of them takes any more.
                    if joined.is_none() {
                        self.wait(place, sum);
                    }
                }
                None => self.wait(place, sum),
            },
        }
    }

    /// Puts a page into the unstable tree, in the place of whoever waits under that checksum.
    fn wait(&mut self, place: Place, sum: Checksum) {
        let before = self.core.index.waiting(sum);
        if self.core.index.wait(sum, place, GFP_SCAN).is_err() {
            return self.core.try_again();
        }
        if let Some(other) = before {
            if let (Some(word), core) = self.word(other) {
                core.relabel(word, PageWord::steady(sum.sample()));
            }
        }
        match self.word(place) {
            (Some(word), core) => {
                core.try_again();
                core.relabel(word, PageWord::waiting(sum));
            }
            // Every candidate is remembered.
            (None, core) => core.index.stop_waiting(sum, place),
        }
    }

    /// Tries to merge a page into one of the merged pages with its checksum.
    ///
    /// As long as all pages with its sample have the same content, as far as anybody knows, the checksum
    /// is not even computed: the page is as likely to be another one of these, and the comparison that
    /// follows anyway says so for certain.
    fn join_stable(
        &mut self,
        hasher: &Hasher,
        vma: &MergeableVma<'_>,
        place: Place,
        sample: Sample,
    ) -> Joined {
        if self
            .core
            .zeroes
            .is_some_and(|zeroes| zeroes.contains(sample))
        {
            match self.join_zero(vma, place) {
                Ok(()) => return Joined::Yes,
                Err(err) if err != EAGAIN => return Joined::Hopeless,
                // Not all zeroes.
                _ => {}
            }
        }
        let unknown = Checksum::unknown(sample);
        match self.core.index.nodes_like(sample) {
            NodesLike::Alike(nodes) => match self.join_one_of(vma, place, nodes, Some(hasher)) {
                Some(Ok(())) => return Joined::Yes,
                Some(Err(err)) if err != EAGAIN => return Joined::Hopeless,
                None if nodes.sum().is_unknown() => return Joined::NoneFits(unknown, true),
                _ => {}
            },
            NodesLike::None => {
                let waiting = self.core.index.waiting_like(sample);
                if waiting.is_none_or(Checksum::is_unknown) {
                    return Joined::NoneFits(unknown, true);
                }
            }
            NodesLike::Various => {}
        }
        self.core.find_sums(hasher, sample);
        let Some(page) = vma.page_at(place.addr).filter(PageRef::is_plain_anon) else {
            return Joined::Hopeless;
        };
        let sum = page.checksum(hasher);
        let may_be_shared = page.may_be_shared();
        drop(page);
        if sum.sample() != sample {
            if let (Some(word), core) = self.word(place) {
                core.renew(place, word, sum.sample());
            }
            // The area has been accounted for already.
            if let Some(known) = self.mms.get_mut(&place.slot) {
                known.pages.note_change(place.addr);
            }
            return Joined::Hopeless;
        }
        let joined = match self.core.index.nodes_with(sum) {
            Some(nodes) => self.join_one_of(vma, place, nodes, None),
            None => None,
        };
        match joined {
            Some(Ok(())) => Joined::Yes,
            Some(Err(err)) if err != EAGAIN => Joined::Hopeless,
            _ => Joined::NoneFits(sum, may_be_shared),
        }
    }

    /// Merges a page of zeroes with the kernel's zero page. It is not remembered afterwards: that is no page
    /// that is scanned.
    fn join_zero(&mut self, vma: &MergeableVma<'_>, place: Place) -> Result {
        let page = vma
            .page_at(place.addr)
            .filter(PageRef::is_plain_anon)
            .ok_or(EBUSY)?;
        // Looked at without a lock, to be spared unmapping it for nothing.
        if !page.is_zero() {
            return Err(EAGAIN);
        }
        vma.join_zero(place.addr, page)?;
        self.forget(place);
        Ok(())
    }

    /// Merges a page that waits, and whose sample is that of a page of zeroes, with the zero page, if it is
    /// one.
    pub(super) fn merge_zero(&mut self, mm: &MmWithUser, place: Place) {
        let guard = mm.mmap_read_lock();
        if let Some(vma) = MergeableVma::at(&guard, place.addr) {
            // If it is not, or cannot be merged now, the next pass tries again.
            let _ = self.join_zero(&vma, place);
        }
    }

    /// Tries to merge a page into one of these merged pages, or of some of them. `None`: none takes another
    /// page. With `guessing`, only those are tried whose sample was never found to be that of other
    /// content; the hasher tells whether it still is the page's.
    fn join_one_of(
        &mut self,
        vma: &MergeableVma<'_>,
        place: Place,
        nodes: Nodes,
        guessing: Option<&Hasher>,
    ) -> Option<Result> {
        let sum = match nodes {
            Nodes::One(key) => return self.join_known(vma, place, key, guessing),
            Nodes::Several(sum) => sum,
        };
        let mut result = None;
        let keys = self.core.index.by_mappings(sum, NodeBox::items);
        for key in keys.into_iter().flatten() {
            match self.join_known(vma, place, key, guessing) {
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
    fn join_known(
        &mut self,
        vma: &MergeableVma<'_>,
        place: Place,
        key: StableKey,
        guessing: Option<&Hasher>,
    ) -> Option<Result> {
        let result = self.core.join_node(vma, place, key, guessing)?;
        Some(result.map(|item| self.merged(place, item, key)))
    }

    /// Notes that the page at `place`, which is remembered with the same sample, was merged.
    fn merged(&mut self, place: Place, item: ItemBox, key: StableKey) {
        self.core.items = self.core.items.saturating_add(1);
        self.core.try_again();
        self.core.index.move_to_stable(key);
        if item.mappings() >= self.core.max_sharing {
            self.core.index.set_full(key);
        }
        match self.word(place) {
            (Some(word), core) => {
                let old = core::mem::replace(word, PageWord::merged(item));
                core.retire(place, old);
            }
            // Every candidate is remembered.
            (None, core) => core.detach(item),
        }
    }

    /// Merges the page at `place` with the one that waits at `other`, or lets it wait in its stead.
    fn merge_with_waiting(
        &mut self,
        hasher: &Hasher,
        mm: &MmWithUser,
        place: Place,
        other: Place,
        sum: Checksum,
        may_be_shared: bool,
    ) {
        let other_mm = self.mms.get(&other.slot).map(|known| known.mm.clone());
        let Some(other_mm) = other_mm.and_then(|mm| use_mm(&mm)) else {
            return self.wait(place, sum);
        };
        // Looked at without a lock, to be spared undoing a merge that cannot be completed.
        let Some(other_page) = page_at(&other_mm, other.addr).filter(|page| {
            page.is_plain_anon() && !page.is_held_by_others() && page.sample(hasher) == sum.sample()
        }) else {
            return self.wait(place, sum);
        };
        if may_be_shared {
            let Some(page) = page_at(mm, place.addr).filter(PageRef::is_plain_anon) else {
                return;
            };
            if page.is_same(&other_page) {
                // Shared by fork: nothing to gain.
                return;
            }
            if sum.is_unknown() && page.differs_from(&other_page) {
                // From now on both need their checksums.
                let sums = (page.checksum(hasher), other_page.checksum(hasher));
                drop((page, other_page));
                return self.part(sum, place, sums.0, other, sums.1);
            }
        }
        drop(other_page);
        let other_mm: &MmWithUser = &other_mm;
        let (this, other) = ((mm, place), (other_mm, other));
        let result = match self.merge_into_first(this, other, sum) {
            // The other page may be one that can be the merged one.
            Err(EMLINK) => self.merge_into_first(other, this, sum),
            result => result,
        };
        // If it is neither, because strangers have both, that lasts: once in a while is enough.
        if result.is_err_and(|err| err != EMLINK) {
            self.core.try_again();
        }
    }

    /// Makes the first page a merged page, and merges the other one into it. If it is the latter that
    /// fails, the first waits.
    fn merge_into_first(
        &mut self,
        (mm, place): (&MmWithUser, Place),
        (other_mm, other): (&MmWithUser, Place),
        sum: Checksum,
    ) -> Result {
        let key = self.publish(mm, place, sum)?;
        if self.join(other_mm, other, key).is_ok() {
            return Ok(());
        }
        // A merged page that nobody shares is no gain: undo it. This page waits from now on, so
        // that it is the other one's turn to be tried first, which costs nothing when it is pinned.
        if self.undo(mm, place, key) {
            self.wait(place, sum);
        }
        Ok(())
    }

    /// Lets two pages with the same sample wait under their checksums, of which `other` waited under
    /// `unknown`.
    fn part(
        &mut self,
        unknown: Checksum,
        place: Place,
        sum: Checksum,
        other: Place,
        other_sum: Checksum,
    ) {
        self.core.index.stop_waiting(unknown, other);
        for (place, sum) in [(other, other_sum), (place, sum)] {
            let (Some(word), core) = self.word(place) else {
                continue;
            };
            let sample = word.sample();
            core.relabel(word, PageWord::steady(sample));
            if sample == sum.sample() {
                self.wait(place, sum);
            } else {
                // It has changed since it was looked at, and is looked at again in the next pass.
                core.try_again();
            }
        }
    }

    /// Merges the page at `place` into the page of the node `key`.
    fn join(&mut self, mm: &MmWithUser, place: Place, key: StableKey) -> Result {
        let item = {
            let guard = mm.mmap_read_lock();
            let vma = MergeableVma::at(&guard, place.addr).ok_or(EBUSY)?;
            let node = self.core.index.node(key).ok_or(EBUSY)?;
            let kpage = node.locked_page().ok_or(EBUSY)?;
            join_page(&vma, place, &kpage, node, key, &self.core)?
        };
        self.merged(place, item, key);
        Ok(())
    }

    /// Makes the page at `place` a merged page, with a node of its own.
    fn publish(&mut self, mm: &MmWithUser, place: Place, sum: Checksum) -> Result<StableKey> {
        let core = &mut self.core;
        let mut item = ItemBox::new(sum.sample(), core.pass, GFP_SCAN)?;
        let key = core.index.new_key(sum);
        let node = NodeBox::new(key, GFP_SCAN)?;
        core.index.insert(key, node, GFP_SCAN)?;
        // From here on the module may not be unloaded.
        let result = core
            .pin
            .pin()
            .and_then(|()| core.publish_at(mm, place, key, &mut item));
        match result {
            Ok(_page) => {
                self.merged(place, item, key);
                Ok(key)
            }
            Err(err) => {
                core.release(key);
                Err(err)
            }
        }
    }

    /// Makes the merged page at `place` an ordinary page again. Returns whether that worked.
    fn undo(&mut self, mm: &MmWithUser, place: Place, key: StableKey) -> bool {
        {
            let guard = mm.mmap_read_lock();
            if let Some(vma) = MergeableVma::at(&guard, place.addr) {
                // Without memory for the copy it stays merged, listed with its node like any other,
                // and is as good a partner for the next equal page.
                let end = place.addr.saturating_add(PAGE_SIZE);
                if !vma.unmerge(place.addr, end).is_ok_and(|done| done >= end) {
                    return false;
                }
            }
        }
        if let (Some(word), core) = self.word(place) {
            // Nobody wrote to it: that it was merged for so short a time is no trouble that it gives.
            let broken = core.soon_broken;
            core.renew(place, word, key.sum.sample());
            core.relabel(word, PageWord::steady(key.sum.sample()));
            core.soon_broken = broken;
        }
        self.core.settle(key, false);
        true
    }

    /// Lists the page at `place` with the node whose page it is: a child inherited the mapping.
    pub(super) fn list(&mut self, mm: &MmWithUser, place: Place, id: NodeId) {
        // Whatever it was before, it is not any more.
        self.forget(place);
        // Without memory the next pass tries again.
        let _ = self.try_list(mm, place, id);
    }

    fn try_list(&mut self, mm: &MmWithUser, place: Place, id: NodeId) -> Result {
        let guard = mm.mmap_read_lock();
        let vma = MergeableVma::at(&guard, place.addr).ok_or(EBUSY)?;
        let page = vma.page_at(place.addr).ok_or(EBUSY)?.lock();
        if page.node_id() != Some(id) {
            return Err(EBUSY);
        }
        let key = page.node_key().ok_or(EBUSY)?;
        let sample = key.sum.sample();
        let mut item = ItemBox::new(sample, self.core.pass, GFP_SCAN)?;
        self.remember(mm, place, sample)?;
        let node = self.core.index.node(key).ok_or(EBUSY)?;
        let result = node.attach(&page, &mut item, &vma, place.addr);
        // Locks are given up first: taking an item off again would take the folio lock.
        drop(page);
        drop(guard);
        match result {
            Ok(()) => self.merged(place, item, key),
            Err(_) => self.forget(place),
        }
        result
    }

    /// Remembers a page that is not remembered.
    fn remember(&mut self, mm: &Mm, place: Place, sample: Sample) -> Result {
        let known = known_mm(&mut self.mms, mm, place.slot).ok_or(ENOMEM)?;
        let mut leaf = known.pages.leaf_from(place.addr, GFP_SCAN)?;
        let result = match leaf.seek(place.addr) {
            Found::Nothing => leaf
                .insert(PageWord::seen(sample), 1, GFP_SCAN)
                .map_err(|_| ENOMEM),
            _ => Err(EEXIST),
        };
        match result {
            Ok(()) => self.core.enter(sample),
            Err(_) => known.pages.prune(place.addr),
        }
        result
    }
}

impl Core {
    /// Tries to merge the page at `place`, which is in `vma`, into the page of the node `key`. `None`:
    /// that one takes no more pages, or is gone.
    fn join_node(
        &mut self,
        vma: &MergeableVma<'_>,
        place: Place,
        key: StableKey,
        guessing: Option<&Hasher>,
    ) -> Option<Result<ItemBox>> {
        let node = self.index.node(key)?;
        if node.items() >= self.max_sharing {
            return None;
        }
        if guessing.is_some() && node.is_ambiguous() {
            // The checksum has to tell.
            return Some(Err(EAGAIN));
        }
        let Some(kpage) = node.locked_page() else {
            self.release(key);
            return None;
        };
        if kpage.is_poisoned() {
            // Not stale: the node goes when nobody maps the page any more.
            return None;
        }
        if self.by_node {
            let nid = kpage.memory_node();
            let page = vma.page_at(place.addr);
            if page.is_some_and(|page| page.memory_node() != nid) {
                node.set_strayed();
                return None;
            }
        }
        let result = join_page(vma, place, &kpage, node, key, self);
        if let (Some(hasher), Err(EAGAIN)) = (guessing, result.as_ref().map_err(|err| *err)) {
            // Unless it is that the page has just been written to.
            let sample = vma.page_at(place.addr).map(|page| page.sample(hasher));
            if sample == Some(key.sum.sample()) {
                node.set_ambiguous();
            }
        }
        Some(result)
    }

    /// Finds merged pages that were moved to another memory node, and gives them keys under which pages of
    /// that one come by them.
    pub(super) fn bring_home(&mut self, hasher: &Hasher) {
        for full in [false, true] {
            let next_behind = |index: &Index<NodeBox>, after| {
                if full {
                    index.next_full(after)
                } else {
                    index.next_node(after)
                }
            };
            let mut next = next_behind(&self.index, None);
            while let Some(key) = next {
                next = next_behind(&self.index, Some(key));
                if self.index.node(key).is_some_and(NodeBox::take_strayed) {
                    self.bring_one_home(hasher, key);
                }
                crate::mm::cond_resched();
            }
        }
    }

    fn bring_one_home(&mut self, hasher: &Hasher, key: StableKey) {
        let Some(node) = self.index.node(key) else {
            return;
        };
        // Write-protected wherever it is mapped, so its sample differs from the key's by the memory node
        // only.
        let Some(page) = node.page() else {
            return self.release(key);
        };
        if page.is_poisoned() {
            return;
        }
        let sample = page.sample(hasher);
        drop(page);
        if sample == key.sum.sample() {
            return;
        }
        if self.rekey(key, key.sum.with_sample(sample)).is_err() {
            // Without memory the next pass tries again.
            if let Some(node) = self.index.node(key) {
                node.set_strayed();
            }
        }
    }

    /// Gives a node with known mappings another checksum. Nothing is changed on failure.
    fn rekey(&mut self, key: StableKey, sum: Checksum) -> Result {
        let key = self.index.rekey(key, sum, GFP_SCAN)?;
        if let Some(node) = self.index.node(key) {
            node.set_key(key);
            // Pages that come from now on have an equal in these.
            let filter = &mut self.filter;
            node.set_samples(sum.sample(), |old| {
                filter.remove(old);
                filter.add(sum.sample());
            });
            self.events = self.events.wrapping_add(1);
        }
        Ok(())
    }

    /// Computes the checksums of merged pages with this sample that were merged without, so that pages
    /// which are not like them can be told apart. A few at a time, as there may be any number.
    fn find_sums(&mut self, hasher: &Hasher, sample: Sample) {
        for _ in 0..MAX_COMPARES {
            let Some(key) = self.index.any_stable(Checksum::unknown(sample)) else {
                break;
            };
            let Some(node) = self.index.node(key) else {
                break;
            };
            let Some(page) = node.page() else {
                self.release(key);
                continue;
            };
            let sum = if page.is_poisoned() {
                // Nobody is to read it or join it any more; so that it does not stand in the way of the
                // others, any checksum will do.
                Checksum::new(sample, 0)
            } else {
                // Write-protected wherever it is mapped, so this is the checksum as long as it is merged.
                page.checksum(hasher)
            };
            drop(page);
            if self.rekey(key, sum).is_err() {
                return self.try_again();
            }
        }
    }

    fn publish_at(
        &self,
        mm: &MmWithUser,
        place: Place,
        key: StableKey,
        item: &mut ItemBox,
    ) -> Result<PageRef> {
        let node = self.index.node(key).ok_or(EBUSY)?;
        let guard = mm.mmap_read_lock();
        let vma = MergeableVma::at(&guard, place.addr).ok_or(EBUSY)?;
        let page = vma.page_at(place.addr).ok_or(EBUSY)?;
        vma.publish(place.addr, page, node, item)
    }
}

impl Engine {
    /// Gives every process back pages of its own, and forgets all that is known of pages.
    ///
    /// A process that cannot be served does not keep others from being: the first error is returned when
    /// all were tried. `ERESTARTSYS` ends it at once. What stays merged stays known and counted.
    pub(super) fn unmerge_all(&self, state: &mut State) -> Result {
        // From here on the swap-in path hands out copies of merged pages, not the pages.
        let _copying = intree::SwapInCopies::new();
        let mut result = self.enter_registered();
        let mut slot = 0;
        loop {
            // Children that are forked meanwhile come later, so they are not missed.
            let next = self.registry.lock().next(slot);
            let Some((id, mm)) = next else {
                break;
            };
            slot = id;
            let (served, left) = match use_mm(&mm) {
                Some(user) => unmerge_mm(&user),
                None => (Ok(()), usize::MAX),
            };
            state.forget_range(id, 0, left);
            state.report(id);
            let interrupted = served == Err(ERESTARTSYS);
            result = result.and(served);
            if interrupted {
                result = Err(ERESTARTSYS);
                break;
            }
        }
        // Who exited meanwhile, or just before, is not among the live any more.
        self.reap(state);
        result = result.and(if self.registry.lock().has_missed() {
            Err(ENOMEM)
        } else {
            Ok(())
        });
        state.core.release_stale();
        // Whoever was not served still uses the pages of these nodes.
        state.core.swept = None;
        state.core.sweep_limbo(usize::MAX, result.is_ok());
        state.core.unpin_if_empty();
        self.left_chores.store(self.has_leftovers(state), Relaxed);
        // The scan starts again; as in-tree, so does counting when all is unmerged.
        state.cursor = Cursor::new();
        if result.is_ok() {
            self.stats.reset_full_scans();
        }
        self.publish_stats(state);
        result
    }
}

/// Gives one process back pages of its own. Returns with the outcome from where on there may be merged
/// pages left.
///
/// `mmap_lock` is given up again and again: rksmd merges nothing meanwhile, and the kernel unmerges what it
/// moves to another address, so nothing is missed.
fn unmerge_mm(mm: &MmWithUser) -> (Result, usize) {
    let mut addr = 0;
    loop {
        let guard = mm.mmap_read_lock();
        let mut left = HOLD_VMAS;
        addr = match MergeableVma::next(mm, &guard, addr, &mut left) {
            Next::Vma(vma) => match vma.unmerge(addr, vma.end()) {
                Ok(reached) => reached,
                Err(err) => return (Err(err), vma.merged_from(addr)),
            },
            Next::GoOn(addr) => addr,
            Next::None => return (Ok(()), usize::MAX),
        };
    }
}

/// Merges the page at `place`, which is in `vma`, into `kpage`, the page of `node`, which has the key `key`.
/// `EAGAIN` if they differ, or must not be merged.
fn join_page(
    vma: &MergeableVma<'_>,
    place: Place,
    kpage: &LockedPage,
    node: &NodeBox,
    key: StableKey,
    core: &Core,
) -> Result<ItemBox> {
    // Its lock may have been waited for, behind who has just given it up.
    if kpage.is_poisoned() {
        return Err(EBUSY);
    }
    let page = vma.page_at(place.addr).ok_or(EBUSY)?;
    // Neither moves: what we hold is this very page, and the merged one is locked. The next pass gives the
    // node another key.
    if core.by_node && page.memory_node() != kpage.memory_node() {
        node.set_strayed();
        return Err(EBUSY);
    }
    let mut item = ItemBox::new(key.sum.sample(), core.pass, GFP_SCAN)?;
    vma.join(place.addr, page, kpage, node, &mut item)?;
    Ok(item)
}

fn page_at(mm: &MmWithUser, addr: usize) -> Option<PageRef> {
    let guard = mm.mmap_read_lock();
    MergeableVma::at(&guard, addr)?.page_at(addr)
}
