// SPDX-License-Identifier: GPL-2.0

//! The merge protocol.
//!
//! A page goes from "seen" to "waiting in the unstable tree" to "merged". Whatever goes wrong on the
//! way, memory stays as it was, and the page is looked at again in a later pass.

use super::{
    checksum::Checksum,
    index::{Place, SlotId, StableKey, MAX_COMPARES},
    scan::{use_mm, Cursor},
    Engine, State, GFP_SCAN,
};
use crate::mm::{
    folio::PageRef,
    stable::{ItemBox, NodeBox, NodeId},
    vma::MergeableVma,
    word::PageWord,
};
use kernel::{
    mm::{Mm, MmWithUser},
    page::PAGE_SIZE,
    prelude::*,
};

/// What came of comparing the page at hand with the one that waits.
enum Compared {
    /// They are equal now.
    Equal,
    /// The one that waits is gone, or is not what it was.
    OtherChanged,
    /// Nothing can be done with the page at hand now.
    Hopeless,
}

impl State {
    /// Tries to merge the page at `place` in `mm`, whose checksum `sum` held between two looks: into
    /// a merged page, or with the page that waits under that checksum; or lets it wait.
    pub(super) fn merge_steady(&mut self, seed: u64, mm: &MmWithUser, place: Place, sum: Checksum) {
        if self.join_stable(mm, place, sum) {
            return;
        }
        match self.index.waiting(sum) {
            Some(other) if other == place => {}
            Some(other) => self.merge_with_waiting(seed, mm, place, other, sum),
            None => self.wait(place, sum),
        }
    }

    /// Puts a page into the unstable tree, in the place of whoever waits under that checksum.
    fn wait(&mut self, place: Place, sum: Checksum) {
        let before = self.index.waiting(sum);
        if self.index.wait(sum, place, GFP_SCAN).is_err() {
            return;
        }
        if let Some(other) = before {
            self.reword(other, PageWord::seen(sum));
        }
        self.reword(place, PageWord::unstable(sum));
    }

    /// Tries to merge a page into one of the merged pages with its checksum.
    fn join_stable(&mut self, mm: &MmWithUser, place: Place, sum: Checksum) -> bool {
        let mut key = self.index.next_stable(sum, None);
        for _ in 0..MAX_COMPARES {
            let Some(at) = key else {
                return false;
            };
            key = self.index.next_stable(sum, Some(at));
            let stale = match self.index.node(at) {
                Some(node) => node.page().is_none(),
                None => continue,
            };
            if stale {
                self.release(at);
                continue;
            }
            match self.join(mm, place, at) {
                Ok(()) => {
                    self.index.stop_waiting(sum, place);
                    return true;
                }
                // Other content, or the page changed: another node may still fit.
                Err(err) if err == EAGAIN => {}
                // Pinned or locked; that will not be different with another node.
                Err(_) => return false,
            }
        }
        false
    }

    /// Merges the page at `place` into the page of the node `key`.
    fn join(&mut self, mm: &MmWithUser, place: Place, key: StableKey) -> Result {
        let mut item = ItemBox::new(GFP_SCAN)?;
        {
            let node = self.index.node(key).ok_or(EAGAIN)?;
            let guard = mm.mmap_read_lock();
            let vma = MergeableVma::at(&guard, place.addr).ok_or(EAGAIN)?;
            let page = vma.page_at(place.addr).ok_or(EAGAIN)?;
            let kpage = node.page().ok_or(EAGAIN)?;
            // Without any lock first: most pages that are not equal end here, left alone.
            if page.is_ksm() || page.differs_from(&kpage) {
                return Err(EAGAIN);
            }
            drop(kpage);
            let kpage = node.locked_page().ok_or(EAGAIN)?;
            vma.join(place.addr, page, &kpage, node, &mut item)?;
        }
        self.merged(place, item, key);
        Ok(())
    }

    /// Notes that the page at `place`, which is remembered, was merged.
    fn merged(&mut self, place: Place, item: ItemBox, key: StableKey) {
        self.items = self.items.saturating_add(1);
        self.index.to_stable(key);
        let word = self
            .mms
            .get_mut(&place.slot)
            .and_then(|mm| mm.pages.get_mut(place.addr));
        match word {
            Some(word) => *word = PageWord::merged(item),
            // Every candidate is remembered.
            None => self.detach(item),
        }
    }

    /// Merges the page at `place` with the one that waits at `other`, or lets it wait in its stead.
    fn merge_with_waiting(
        &mut self,
        seed: u64,
        mm: &MmWithUser,
        place: Place,
        other: Place,
        sum: Checksum,
    ) {
        let other_mm = self.mms.get(&other.slot).map(|known| known.mm.clone());
        let Some(other_mm) = other_mm.and_then(|mm| use_mm(&mm)) else {
            return self.wait(place, sum);
        };
        match self.compare(seed, mm, place, &other_mm, other, sum) {
            Compared::Equal => {}
            Compared::OtherChanged => return self.wait(place, sum),
            Compared::Hopeless => return,
        }
        let Ok(key) = self.publish(mm, place, sum) else {
            return;
        };
        if self.join(&other_mm, other, key).is_ok() {
            self.index.stop_waiting(sum, other);
            return;
        }
        // A merged page that nobody shares is no gain: undo it. This page waits from now on, so
        // that it is the other one's turn to be tried first, which costs nothing when it is pinned.
        self.undo(mm, place, key);
        self.wait(place, sum);
    }

    /// Compares two pages as they are, without any lock held.
    fn compare(
        &self,
        seed: u64,
        mm: &MmWithUser,
        place: Place,
        other_mm: &MmWithUser,
        other: Place,
        sum: Checksum,
    ) -> Compared {
        let Some(page) = page_at(mm, place.addr) else {
            return Compared::Hopeless;
        };
        let Some(other) = page_at(other_mm, other.addr) else {
            return Compared::OtherChanged;
        };
        if page.is_same(&other) {
            // Shared by fork: nothing to gain.
            return Compared::Hopeless;
        }
        if other.is_ksm() {
            return Compared::OtherChanged;
        }
        if !page.differs_from(&other) {
            Compared::Equal
        } else if other.checksum(seed) != sum {
            Compared::OtherChanged
        } else {
            // This one changed, or the checksums collide.
            Compared::Hopeless
        }
    }

    /// Makes the page at `place` a merged page, with a node of its own.
    fn publish(&mut self, mm: &MmWithUser, place: Place, sum: Checksum) -> Result<StableKey> {
        let mut item = ItemBox::new(GFP_SCAN)?;
        let key = self.index.new_key(sum);
        let node = NodeBox::new(key, GFP_SCAN)?;
        self.index.insert(key, node, GFP_SCAN)?;
        // From here on the module may not be unloaded.
        let result = self
            .pin
            .pin()
            .and_then(|()| self.publish_at(mm, place, key, &mut item));
        match result {
            Ok(page) => {
                self.merged(place, item, key);
                drop(page);
                Ok(key)
            }
            Err(err) => {
                self.release(key);
                Err(err)
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
        let node = self.index.node(key).ok_or(EAGAIN)?;
        let guard = mm.mmap_read_lock();
        let vma = MergeableVma::at(&guard, place.addr).ok_or(EAGAIN)?;
        let page = vma.page_at(place.addr).ok_or(EAGAIN)?;
        vma.publish(place.addr, page, node, item)
    }

    /// Makes the merged page at `place` an ordinary page again.
    fn undo(&mut self, mm: &MmWithUser, place: Place, key: StableKey) {
        {
            let guard = mm.mmap_read_lock();
            if let Some(vma) = MergeableVma::at(&guard, place.addr) {
                // Without memory for the copy it stays merged, listed with its node like any other,
                // and is as good a partner for the next equal page.
                if vma
                    .unmerge(place.addr, place.addr.saturating_add(PAGE_SIZE))
                    .is_err()
                {
                    return;
                }
            }
        }
        let item = self
            .mms
            .get_mut(&place.slot)
            .and_then(|mm| mm.pages.get_mut(place.addr))
            .and_then(PageWord::take_item);
        self.reword(place, PageWord::seen(key.sum));
        if let Some(item) = item {
            self.detach(item);
        }
        self.settle(key, false);
    }

    /// Lists the page at `place` with the node whose page it is: a child inherited the mapping.
    pub(super) fn list(&mut self, mm: &MmWithUser, place: Place, id: NodeId) {
        // Whatever it was before, it is not any more. The word itself stays, or is made.
        self.forget(place);
        self.remember_new(mm, place, Checksum::from_raw(0));
        if self.recall(place).is_none() {
            return;
        }
        if self.try_list(mm, place, id).is_err() {
            self.forget(place);
        }
    }

    fn try_list(&mut self, mm: &MmWithUser, place: Place, id: NodeId) -> Result {
        let mut item = ItemBox::new(GFP_SCAN)?;
        let key;
        {
            let guard = mm.mmap_read_lock();
            let vma = MergeableVma::at(&guard, place.addr).ok_or(EAGAIN)?;
            let page = vma.page_at(place.addr).ok_or(EAGAIN)?.lock();
            if page.node_id() != Some(id) {
                return Err(EAGAIN);
            }
            key = page.node_key().ok_or(EAGAIN)?;
            let node = self.index.node(key).ok_or(EAGAIN)?;
            node.attach(&page, &mut item, &vma, place.addr)?;
        }
        self.merged(place, item, key);
        Ok(())
    }

    /// Whether there is anything left of an address space after its pages were unmerged.
    fn forget_unmerged(&mut self, slot: SlotId, mm: &Mm) {
        self.forget_range(slot, 0, usize::MAX);
        crate::mm::report_metadata(mm, 0);
    }
}

impl Engine {
    /// Gives every process back pages of its own, and forgets all that is known of pages.
    pub(super) fn unmerge_all(&self, state: &mut State) -> Result {
        let mut slot = 0;
        loop {
            // Children that are forked meanwhile come later, so they are not missed.
            let next = self.registry.lock().next(slot);
            let Some((id, mm)) = next else {
                break;
            };
            slot = id;
            if let Some(user) = use_mm(&mm) {
                unmerge_mm(&user)?;
            }
            state.forget_unmerged(id, &mm);
        }
        state.swept = None;
        state.sweep_limbo(usize::MAX, true);
        // As in-tree: counting starts again, and so does the scan.
        state.cursor = Cursor::new();
        self.stats.reset_full_scans();
        self.publish_stats(state);
        Ok(())
    }
}

fn unmerge_mm(mm: &MmWithUser) -> Result {
    let guard = mm.mmap_read_lock();
    let mut addr = 0;
    while let Some(vma) = MergeableVma::next(mm, &guard, addr) {
        vma.unmerge(vma.start(), vma.end())?;
        addr = vma.end();
    }
    Ok(())
}

fn page_at(mm: &MmWithUser, addr: usize) -> Option<PageRef> {
    let guard = mm.mmap_read_lock();
    MergeableVma::at(&guard, addr)?.page_at(addr)
}
