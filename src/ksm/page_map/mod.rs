// SPDX-License-Identifier: GPL-2.0

//! What is remembered of each page of one address space.

mod leaf;

use core::mem::size_of;
use kernel::{alloc::Flags, page::PAGE_SHIFT, prelude::*, rbtree::RBTree};
pub(crate) use leaf::Moment;
use leaf::{Age, Leaf, LEAF_PAGES, LEAF_SHIFT};

use super::unlisted::Unlisted;

/// How many leaves [`PageMap::next_skipped`] looks at; and after how many pages that are not skipped it ends: twice
/// as many as one step of the scan has.
const SKIP_SEARCH: usize = 64;
const SKIP_SEARCH_PAGES: usize = 2 * LEAF_PAGES;

/// For how many seconds a leaf stays of whose pages nothing is known but that they were split off huge pages: for as
/// long as one ever waits for the next split, and as long again for khugepaged to come by.
const EMPTY_SECS: u16 = 256;

/// How much trouble one page makes, and how much of it is too much: more than four pages lately.
const THRASH_STEP: usize = 16;
const THRASH_LIMIT: u8 = 64;

/// A sparse map from page-aligned addresses to entries of type `W`.
///
/// Addresses are grouped by 512 pages; a leaf holds one bit per page, and the entries of the pages
/// that have one, packed in the order of their addresses. So a page costs `size_of::<W>()` and its
/// share of a leaf, wherever pages lie close together. A leaf of a single page holds no more than its
/// entry.
///
/// A leaf whose huge pages were split stays for a while when it has lost its last entry: most often these come back,
/// in a huge page that is not to be split again at once.
pub(crate) struct PageMap<W> {
    leaves: RBTree<usize, Leaf<W>>,
    /// See [`Self::bytes`].
    bytes: usize,
}

/// A pass, as far as leaves have to know it to decide whether it skips them.
pub(crate) struct Pass<'a> {
    /// Its number.
    pub(crate) number: u32,
    /// Whether there is news for all pages, see [`Cursor`](super::scan::Cursor).
    pub(crate) retry_steady: bool,
    /// Which leaves are not skipped, as pages may have to be listed there.
    pub(crate) unlisted: &'a Unlisted,
}

/// Where a page is: which leaf, and which page of it.
#[derive(Clone, Copy)]
struct PageIndex {
    leaf: usize,
    page: usize,
}

impl PageIndex {
    fn of(addr: usize) -> Self {
        let page = addr >> PAGE_SHIFT;
        Self {
            leaf: page >> LEAF_SHIFT,
            page: page % LEAF_PAGES,
        }
    }

    fn addr(self) -> usize {
        (self.leaf << LEAF_SHIFT | self.page) << PAGE_SHIFT
    }
}

impl<W> PageMap<W> {
    /// An empty map.
    pub(crate) fn new() -> Self {
        Self {
            leaves: RBTree::new(),
            bytes: 0,
        }
    }

    /// The memory that a leaf takes besides what [`Leaf::bytes`] says: three entries of `struct rb_node`, then key
    /// and value.
    const NODE_BYTES: usize = 4 * size_of::<usize>() + size_of::<Leaf<W>>();

    /// Does something to a leaf that may change how large it is.
    fn change<R>(bytes: &mut usize, leaf: &mut Leaf<W>, deed: impl FnOnce(&mut Leaf<W>) -> R) -> R {
        let before = leaf.bytes();
        let result = deed(leaf);
        *bytes = bytes.saturating_sub(before).saturating_add(leaf.bytes());
        result
    }

    /// The entry of the page at `addr`, to be changed.
    pub(crate) fn get_mut(&mut self, addr: usize) -> Option<&mut W> {
        let index = PageIndex::of(addr);
        self.leaves.get_mut(&index.leaf)?.get_mut(index.page)
    }

    /// Whether any page of the leaf that `addr` is in has a entry.
    pub(crate) fn has_leaf(&self, addr: usize) -> bool {
        let leaf = self.leaves.get(&PageIndex::of(addr).leaf);
        leaf.is_some_and(|leaf| leaf.len() != 0)
    }

    /// The entry of the page at `addr`, to be changed for something that happened to the page.
    pub(crate) fn get_changed(&mut self, addr: usize) -> Option<&mut W> {
        let index = PageIndex::of(addr);
        let leaf = self.leaves.get_mut(&index.leaf)?;
        leaf.age.begin_anew();
        leaf.get_mut(index.page)
    }

    /// The pages of the leaf that `addr` is in, to be gone through from `addr` on in the order of their
    /// addresses. The leaf is made if need be, which may fail with `ENOMEM`.
    ///
    /// The caller gives the leaf a entry, or calls [`Self::prune`]. `pass` is the number of the pass.
    pub(crate) fn leaf_from(
        &mut self,
        addr: usize,
        pass: u32,
        flags: Flags,
    ) -> Result<LeafCursor<'_, W>> {
        let index = PageIndex::of(addr);
        if self.leaves.get(&index.leaf).is_none() {
            let leaf = Leaf::new(Age::new(index.leaf, pass));
            self.leaves.try_create_and_insert(index.leaf, leaf, flags)?;
            self.bytes = self.bytes.saturating_add(Self::NODE_BYTES);
        }
        let leaf = self.leaves.get_mut(&index.leaf).ok_or(ENOMEM)?;
        if leaf.len() == 0 {
            leaf.age = Age::new(index.leaf, pass);
        } else if leaf.age.is_behind(pass) {
            leaf.age.begin_whole_pass(pass);
        }
        Ok(LeafCursor {
            rank: leaf.rank(index.page),
            at: index,
            leaf,
            bytes: &mut self.bytes,
        })
    }

    /// The first leaves side by side, with an address at or behind `from`, that `pass` skips, because nothing
    /// has come of looking at their pages for some time: their first and their last address. `Err`: there are
    /// none before this address.
    ///
    /// Leaves that this comes by begin the pass, if they have not yet. The pages of those that are skipped are
    /// added to `skipped` then.
    pub(crate) fn next_skipped(
        &mut self,
        from: usize,
        pass: &Pass<'_>,
        skipped: &mut usize,
    ) -> Result<(usize, usize), usize> {
        let mut cursor = self
            .leaves
            .cursor_lower_bound_mut(&PageIndex::of(from).leaf);
        let mut found: Option<(usize, usize)> = None;
        let mut pages = 0usize;
        for _ in 0..SKIP_SEARCH {
            if pages >= SKIP_SEARCH_PAGES {
                break;
            }
            let Some(mut at) = cursor else {
                return found.ok_or(usize::MAX);
            };
            let (&leaf, content) = at.current_mut();
            let mut age = content.age;
            if age.is_behind(pass.number) && content.len() != 0 {
                let must_look = pass.unlisted.may_have(leaf);
                age.begin_pass(pass.number, pass.retry_steady, must_look);
                content.age = age;
                if age.is_skipped() {
                    *skipped = skipped.saturating_add(content.len());
                }
            }
            let first = PageIndex { leaf, page: 0 }.addr();
            let len = content.len();
            found = match (found, age.is_skipped()) {
                (None, false) => {
                    pages = pages.saturating_add(len);
                    None
                }
                (None, true) => Some((first, Self::leaf_end(first))),
                (Some((start, last)), true) if last.checked_add(1) == Some(first) => {
                    Some((start, Self::leaf_end(first)))
                }
                (Some(all), _) => return Ok(all),
            };
            cursor = at.move_next();
        }
        found.ok_or(cursor.map_or(usize::MAX, |at| {
            PageIndex {
                leaf: *at.current().0,
                page: 0,
            }
            .addr()
        }))
    }

    /// Notes that something happened to a page of the leaf that `addr` is in.
    pub(crate) fn note_change(&mut self, addr: usize) {
        if let Some(leaf) = self.leaves.get_mut(&PageIndex::of(addr).leaf) {
            leaf.age.begin_anew();
        }
    }

    /// Has the pages of the leaf that `addr` is in looked at again in the next pass as if there were news: one
    /// of them could not be merged for the moment. That does not make the leaf any younger.
    pub(crate) fn note_retry(&mut self, addr: usize) {
        if let Some(leaf) = self.leaves.get_mut(&PageIndex::of(addr).leaf) {
            leaf.age.note_retry();
        }
    }

    /// Notes that pages of the leaf that `addr` is in were swapped out, or being moved, when the scan came by.
    /// When they come back they may be merged pages that are not known to be mapped there: so the next
    /// pass looks at the leaf again.
    pub(crate) fn note_away(&mut self, addr: usize) {
        if let Some(leaf) = self.leaves.get_mut(&PageIndex::of(addr).leaf) {
            leaf.age.note_away();
        }
    }

    /// The number of the leaf that `addr` is in.
    pub(crate) fn number(addr: usize) -> usize {
        PageIndex::of(addr).leaf
    }

    /// The last address of the leaf that `addr` is in.
    pub(crate) fn leaf_end(addr: usize) -> usize {
        addr | ((1 << (LEAF_SHIFT + PAGE_SHIFT)) - 1)
    }

    /// Takes the entry of the page at `addr` out of the map, which is a change of its leaf, in this second.
    pub(crate) fn remove(&mut self, addr: usize, second: u32) -> Option<W> {
        let index = PageIndex::of(addr);
        let leaf = self.leaves.get_mut(&index.leaf)?;
        let entry = Self::change(&mut self.bytes, leaf, |leaf| leaf.remove(index.page))?;
        leaf.age.begin_anew();
        self.prune(addr, Some(second));
        Some(entry)
    }

    /// Takes away the entries of pages in `from..to` that `keep` does not keep, of the first leaf at or behind `from`.
    /// Returns where to go on behind that leaf; `None`: there is none left before `to`. `second`: see
    /// [`Self::prune`].
    pub(crate) fn retain_leaf(
        &mut self,
        from: usize,
        to: usize,
        second: Option<u32>,
        mut keep: impl FnMut(usize, &mut W) -> bool,
    ) -> Option<usize> {
        let start = PageIndex::of(from);
        let mut cursor = self.leaves.cursor_lower_bound_mut(&start.leaf)?;
        let (&leaf, content) = cursor.current_mut();
        let first = PageIndex { leaf, page: 0 }.addr();
        if first.max(from) >= to {
            return None;
        }
        let page = if leaf == start.leaf { start.page } else { 0 };
        let last = Self::leaf_end(first);
        let end = match to {
            to if to > last => LEAF_PAGES,
            to => PageIndex::of(to.saturating_sub(1)).page.saturating_add(1),
        };
        let addr = |page| PageIndex { leaf, page }.addr();
        Self::change(&mut self.bytes, content, |content| {
            content.retain(page, end, |page, entry| keep(addr(page), entry))
        });
        self.prune(first, second);
        // At the end of the address space this is the last leaf.
        last.checked_add(1).filter(|&next| next < to)
    }

    /// The memory that the map takes, in bytes, without the allocator's own overhead.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Frees the leaf that `addr` is in if it has no entry, but in this `second` only if it has had none for
    /// [`EMPTY_SECS`], or its huge pages were not split.
    pub(crate) fn prune(&mut self, addr: usize, second: Option<u32>) {
        let leaf = PageIndex::of(addr).leaf;
        let Some(content) = self.leaves.get_mut(&leaf).filter(|leaf| leaf.len() == 0) else {
            return;
        };
        if let Some(second) = second.filter(|_| !content.splits.is_default()) {
            if !content.is_empty_for(EMPTY_SECS, second) {
                return;
            }
        }
        self.leaves.remove(&leaf);
        self.bytes = self.bytes.saturating_sub(Self::NODE_BYTES);
    }

    /// Notes that `count` pages of the leaf that `addr` is in gave thrash_score.
    pub(crate) fn note_thrash(&mut self, addr: usize, count: usize) {
        if let Some(leaf) = self.leaves.get_mut(&PageIndex::of(addr).leaf) {
            let count = u8::try_from(count.saturating_mul(THRASH_STEP)).unwrap_or(u8::MAX);
            leaf.thrash_score = leaf.thrash_score.saturating_add(count);
        }
    }

    /// Whether a huge page at `addr` is to stay whole, as it was just put together again.
    pub(crate) fn keeps_whole(&self, addr: usize, second: u64) -> bool {
        let leaf = self.leaves.get(&PageIndex::of(addr).leaf);
        leaf.is_some_and(|leaf| leaf.splits.is_waiting(second))
    }

    /// Whether a huge page at `addr` may be split, for a part of it that will merge. That it was put together
    /// again, and has to wait, is found out here.
    pub(crate) fn may_split(&mut self, addr: usize, now: Moment) -> bool {
        let leaf = self.leaves.get_mut(&PageIndex::of(addr).leaf);
        leaf.is_none_or(|leaf| leaf.splits.may_split(now))
    }

    /// Notes that the huge page at `addr` is split.
    pub(crate) fn note_split(&mut self, addr: usize, now: Moment) {
        if let Some(leaf) = self.leaves.get_mut(&PageIndex::of(addr).leaf) {
            leaf.splits.note(now);
        }
    }

    /// Calls `each` with the address and the entry of every page of the leaf that `from` is in, or of the
    /// first one behind it, unless its pages gave too much trouble lately, and returns the last address of
    /// that leaf. `None`: there is no such leaf.
    ///
    /// Trouble is forgotten little by little, each time that this is called.
    pub(crate) fn visit_leaf(
        &mut self,
        from: usize,
        mut each: impl FnMut(usize, &W),
    ) -> Option<usize> {
        let (&nth, _) = self
            .leaves
            .cursor_lower_bound(&PageIndex::of(from).leaf)?
            .current();
        let leaf = self.leaves.get_mut(&nth)?;
        leaf.thrash_score = leaf.thrash_score.saturating_sub(1);
        if leaf.thrash_score < THRASH_LIMIT {
            let mut page = 0;
            for entry in leaf.entries() {
                let Some(next) = leaf.next(page) else {
                    break;
                };
                each(
                    PageIndex {
                        leaf: nth,
                        page: next,
                    }
                    .addr(),
                    entry,
                );
                page = next.wrapping_add(1);
            }
        }
        let first = PageIndex { leaf: nth, page: 0 };
        Some(Self::leaf_end(first.addr()))
    }

    /// Whether no page has a entry.
    pub(crate) fn is_empty(&self) -> bool {
        self.leaves.is_empty()
    }

    /// Calls `each` with every entry of the leaf that `from` is in and of those behind it, of `budget` leaves
    /// at most. Returns where to go on, if there are more.
    pub(crate) fn for_each_from(
        &self,
        from: usize,
        budget: &mut usize,
        mut each: impl FnMut(&W),
    ) -> Option<usize> {
        let mut next = PageIndex::of(from).leaf;
        loop {
            let cursor = self.leaves.cursor_lower_bound(&next)?;
            let (&leaf, content) = cursor.current();
            let Some(left) = budget.checked_sub(1) else {
                return Some(PageIndex { leaf, page: 0 }.addr());
            };
            *budget = left;
            content.entries().iter().for_each(&mut each);
            next = leaf.checked_add(1)?;
        }
    }
}

/// A position in a leaf that only moves forward.
///
/// # Invariants
///
/// `rank` entries are before the page `at`, which is a page of the leaf or the one behind its last.
pub(crate) struct LeafCursor<'a, W> {
    leaf: &'a mut Leaf<W>,
    /// Those of the map.
    bytes: &'a mut usize,
    at: PageIndex,
    rank: usize,
}

/// What [`LeafCursor::seek`] came to.
pub(crate) enum Found<'a, W> {
    /// A entry that is in the way: the one of the page at this address, which is before the page that was
    /// sought. Call [`LeafCursor::remove_passed`] or [`LeafCursor::keep_passed`], and seek again.
    Passed(usize, &'a mut W),
    /// The entry of the page that was sought.
    Entry(&'a mut W),
    /// The page that was sought has no entry.
    Nothing,
}

impl<W> LeafCursor<'_, W> {
    /// Moves on to the page at `addr`, which is in the leaf, and behind the one that was sought last
    /// (or that one again, if it had no entry).
    #[inline]
    pub(crate) fn seek(&mut self, addr: usize) -> Found<'_, W> {
        let sought = PageIndex::of(addr);
        if sought.page != self.at.page {
            let passed = self.leaf.next(self.at.page);
            if let Some(page) = passed.filter(|&page| page < sought.page) {
                // INVARIANT: no entry in between.
                self.at.page = page;
                return match self.leaf.words_mut().get_mut(self.rank) {
                    Some(entry) => Found::Passed(self.at.addr(), entry),
                    // Cannot be, by the invariant.
                    None => Found::Nothing,
                };
            }
            // INVARIANT: no entry in between.
            self.at = sought;
        }
        if !self.leaf.has(self.at.page) {
            return Found::Nothing;
        }
        match self.leaf.words_mut().get_mut(self.rank) {
            Some(entry) => {
                // INVARIANT: moved on by one page and one entry.
                self.at.page = self.at.page.wrapping_add(1);
                self.rank = self.rank.wrapping_add(1);
                Found::Entry(entry)
            }
            None => Found::Nothing,
        }
    }

    /// Takes the entry that was passed last out of the map.
    pub(crate) fn remove_passed(&mut self) -> Option<W> {
        let page = self.at.page;
        PageMap::change(self.bytes, self.leaf, |leaf| leaf.remove(page))
    }

    /// Leaves the entry that was passed last where it is.
    pub(crate) fn keep_passed(&mut self) {
        // INVARIANT: moved on by one page and one entry.
        self.at.page = self.at.page.wrapping_add(1);
        self.rank = self.rank.wrapping_add(1);
    }

    /// Gives the page that was sought last, and that had none, a entry. `expected` says how many more
    /// entries are about to come, this one included.
    ///
    /// On failure the leaf is unchanged.
    #[inline]
    pub(crate) fn insert(&mut self, entry: W, expected: usize, flags: Flags) -> Result<(), W> {
        let (page, rank) = (self.at.page, self.rank);
        PageMap::change(self.bytes, self.leaf, |leaf| {
            leaf.insert(page, rank, entry, expected, flags)
        })?;
        // INVARIANT: moved on by one page and one entry.
        self.at.page = self.at.page.wrapping_add(1);
        self.rank = self.rank.wrapping_add(1);
        Ok(())
    }

    /// The entries of `count` pages from the first one on, if each of them has one, and if the cursor
    /// has not moved yet. Moves behind them.
    pub(crate) fn known_run(&mut self, count: usize) -> Option<&mut [W]> {
        let all = self.leaf.count(self.at.page, count)? == count;
        let run = self.rank..self.rank.checked_add(count)?;
        if !all {
            return None;
        }
        let entries = self.leaf.words_mut().get_mut(run)?;
        // INVARIANT: moved on by as many pages as entries.
        self.at.page = self.at.page.wrapping_add(count);
        self.rank = self.rank.wrapping_add(count);
        Some(entries)
    }

    /// Whether no page from the first one on has a entry, if the cursor has not moved yet.
    pub(crate) fn is_empty_from_here(&self) -> bool {
        self.rank == self.leaf.len()
    }

    /// Gives `count` pages from the first one on a entry each, if none of them nor any page behind them
    /// has one, and if the cursor has not moved yet. `entry` makes the entry of the nth page. Moves
    /// behind them.
    ///
    /// Returns whether that was done.
    pub(crate) fn fill_run(
        &mut self,
        count: usize,
        flags: Flags,
        mut entry: impl FnMut(usize) -> W,
    ) -> bool {
        if self.rank != self.leaf.len() {
            return false;
        }
        let page = self.at.page;
        let filled = PageMap::change(self.bytes, self.leaf, |leaf| {
            leaf.fill(page, count, flags, &mut entry).unwrap_or(false)
        });
        if !filled {
            return false;
        }
        // INVARIANT: moved on by as many pages as entries.
        self.at.page = self.at.page.wrapping_add(count);
        self.rank = self.rank.wrapping_add(count);
        true
    }

    /// Decides whether the next passes skip the leaf, for nothing has come of looking at its pages for some time; not
    /// as long as its entries `keep` it from that.
    ///
    /// That takes a look at all entries, so only one step of a pass does it: the first, with no entry before where it
    /// begins.
    pub(crate) fn decide_skips(&mut self, keep: impl FnOnce(&[W]) -> bool) {
        if self.rank != 0 {
            return;
        }
        let mut age = self.leaf.age;
        age.decide_skips(|| !keep(self.leaf.entries()));
        self.leaf.age = age;
    }

    /// Whether the pages of the leaf are to be looked at anew in this pass.
    #[inline]
    pub(crate) fn is_refreshing(&self) -> bool {
        self.leaf.age.is_refreshing()
    }

    /// Whether there is news for the leaf that it has not seen yet.
    pub(crate) fn missed_retry(&self) -> bool {
        self.leaf.age.missed_retry()
    }

    /// Whether huge pages of the leaf may be split from now on, which they had to wait for.
    #[inline]
    pub(crate) fn end_wait(&mut self, second: impl FnOnce() -> u64) -> bool {
        let ended = self.leaf.splits.end_wait(second);
        if ended {
            // The rest of the leaf may be looked at in other steps, or be skipped.
            self.leaf.age.note_retry_steady();
        }
        ended
    }

    /// How many entries the leaf has.
    pub(crate) fn len(&self) -> usize {
        self.leaf.len()
    }
}
