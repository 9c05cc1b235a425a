// SPDX-License-Identifier: GPL-2.0

//! What is remembered of each page of one address space, in little memory.
//!
//! A [`PageMap`] has a tree of leaves, one for each range of 512 pages (2 MiB) with tracked pages. The scan
//! also remembers for each leaf whether its pages change, in [`Age`], and whether huge pages in it may be
//! split.
//!
//! The maps are protected by the engine's mutex.

mod leaf;

use core::mem::size_of;
use kernel::{alloc::Flags, page::PAGE_SHIFT, prelude::*, rbtree::RBTree};
pub(crate) use leaf::Moment;
use leaf::{Age, Leaf, LEAF_PAGES, LEAF_SHIFT};

use super::unlisted::Unlisted;

/// How many leaves one call of [`PageMap::next_skipped`] checks, at most.
const SKIP_SEARCH: usize = 64;
/// After how many pages in leaves that are not skipped it ends: twice as many as one step of the scan has.
const SKIP_SEARCH_PAGES: usize = 2 * LEAF_PAGES;

/// For how many seconds a leaf without entries is kept to remember that its huge pages were split: as long as
/// the longest wait for the next split, and as long again for khugepaged to collapse the range.
const EMPTY_SECS: u16 = 256;

/// How much one page adds to the thrash score of its leaf.
const THRASH_STEP: usize = 16;
/// From this score on the leaf is left out of eager merging. More than four pages reach it.
const THRASH_LIMIT: u8 = 64;

/// A sparse map from page-aligned addresses to entries of type `W`.
///
/// Addresses are grouped into leaves of 512 pages. A leaf has one bit for each page, and the entries of the
/// pages that have one, packed in the order of their addresses. So a page costs `size_of::<W>()`, and its share
/// of a leaf where pages lie close together. A leaf with a single page has just its entry.
///
/// A leaf whose huge pages were split is kept for a while after it has lost its last entry. Most often the
/// pages come back as part of a huge page, which is not to be split again at once.
///
/// # Examples
///
/// The scan brings a leaf up to date with the pages that it comes by, in ascending order:
///
/// ```
/// use crate::ksm::page_map::{Found, PageMap};
/// use kernel::{page::PAGE_SIZE, prelude::*};
///
/// let mut map = PageMap::new();
/// let addr = 0x7f00_0000_1000;
/// let next = addr + PAGE_SIZE;
///
/// // Pass 1 comes by a page that has no entry yet.
/// let mut cursor = map.leaf_from(addr, 1, GFP_KERNEL)?;
/// assert!(matches!(cursor.seek(addr), Found::Nothing));
/// cursor.insert('a', 1, GFP_KERNEL).map_err(|_| ENOMEM)?;
/// assert_eq!(map.get_mut(addr), Some(&mut 'a'));
///
/// // Pass 2 only comes by the page behind it. The first one is not mapped any more.
/// let mut cursor = map.leaf_from(addr, 2, GFP_KERNEL)?;
/// assert!(matches!(cursor.seek(next), Found::Passed(passed, 'a') if passed == addr));
/// assert_eq!(cursor.remove_passed(), Some('a'));
/// assert!(matches!(cursor.seek(next), Found::Nothing));
/// cursor.insert('b', 1, GFP_KERNEL).map_err(|_| ENOMEM)?;
///
/// // With its last entry, the leaf goes.
/// assert_eq!(map.remove(next, 0), Some('b'));
/// assert!(map.is_empty());
/// # Ok::<(), Error>(())
/// ```
pub(crate) struct PageMap<W> {
    leaves: RBTree<usize, Leaf<W>>,
    /// The size of the map, see [`Self::bytes`].
    bytes: usize,
}

/// A pass, as far as it matters for skipping leaves.
pub(crate) struct Pass<'a> {
    /// The number of the pass.
    pub(crate) number: u32,
    /// Whether the pass retries steady pages, see [`Cursor`](super::cursor::Cursor).
    pub(crate) retry_steady: bool,
    /// Leaves that must not be skipped, because merged pages may have to be listed there.
    pub(crate) unlisted: &'a Unlisted,
}

/// The position of a page: the number of its leaf, and its index in the leaf.
#[derive(Clone, Copy)]
struct PageIndex {
    leaf: usize,
    page: usize,
}

impl PageIndex {
    /// Returns the position of the page at `addr`.
    fn of(addr: usize) -> Self {
        let page = addr >> PAGE_SHIFT;
        Self {
            leaf: page >> LEAF_SHIFT,
            page: page % LEAF_PAGES,
        }
    }

    /// Returns the address of the page.
    fn addr(self) -> usize {
        (self.leaf << LEAF_SHIFT | self.page) << PAGE_SHIFT
    }
}

impl<W> PageMap<W> {
    /// Creates an empty map.
    pub(crate) fn new() -> Self {
        Self {
            leaves: RBTree::new(),
            bytes: 0,
        }
    }

    /// The size of a leaf in the tree besides [`Leaf::bytes`]: three words of `struct rb_node`, then key and
    /// value.
    const NODE_BYTES: usize = 4 * size_of::<usize>() + size_of::<Leaf<W>>();

    /// Runs `f`, which may change the size of a leaf, and updates `bytes`.
    fn change<R>(bytes: &mut usize, leaf: &mut Leaf<W>, f: impl FnOnce(&mut Leaf<W>) -> R) -> R {
        let before = leaf.bytes();
        let result = f(leaf);
        *bytes = bytes.saturating_sub(before).saturating_add(leaf.bytes());
        result
    }

    /// Returns the entry of the page at `addr`. This does not count as a change of the leaf.
    pub(crate) fn get_mut(&mut self, addr: usize) -> Option<&mut W> {
        let index = PageIndex::of(addr);
        self.leaves.get_mut(&index.leaf)?.get_mut(index.page)
    }

    /// Whether a page of the leaf of `addr` has an entry.
    pub(crate) fn has_leaf(&self, addr: usize) -> bool {
        let leaf = self.leaves.get(&PageIndex::of(addr).leaf);
        leaf.is_some_and(|leaf| leaf.len() != 0)
    }

    /// Returns the entry of the page at `addr`, and notes a change of the leaf.
    pub(crate) fn get_changed(&mut self, addr: usize) -> Option<&mut W> {
        let index = PageIndex::of(addr);
        let leaf = self.leaves.get_mut(&index.leaf)?;
        leaf.age.begin_anew();
        leaf.get_mut(index.page)
    }

    /// Returns a cursor over the leaf of `addr`, from `addr` on. Creates the leaf if there is none.
    ///
    /// The leaf begins the pass with number `pass` if it has not yet. The caller must add an entry to a new
    /// leaf, or call [`Self::prune`].
    ///
    /// # Errors
    ///
    /// `ENOMEM` if there is no memory.
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

    /// Returns the first range of adjacent leaves at or behind `from` that `pass` skips: its first and last
    /// address.
    ///
    /// `Err`: there is no such leaf before this address. Leaves on the way begin the pass, if they have not
    /// yet. If they are skipped, the number of their pages is added to `skipped`.
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

    /// Notes that a page in the leaf of `addr` has changed.
    pub(crate) fn note_change(&mut self, addr: usize) {
        if let Some(leaf) = self.leaves.get_mut(&PageIndex::of(addr).leaf) {
            leaf.age.begin_anew();
        }
    }

    /// Has the next pass retry the steady pages in the leaf of `addr`, because one of them could not be merged
    /// now.
    ///
    /// This does not count as a change of the leaf.
    pub(crate) fn note_retry(&mut self, addr: usize) {
        if let Some(leaf) = self.leaves.get_mut(&PageIndex::of(addr).leaf) {
            leaf.age.note_retry();
        }
    }

    /// Notes that the walk has found pages in the leaf of `addr` that were swapped out or migrating.
    ///
    /// They may come back as merged pages without an rmap item. So the next pass does not skip the leaf.
    pub(crate) fn note_away(&mut self, addr: usize) {
        if let Some(leaf) = self.leaves.get_mut(&PageIndex::of(addr).leaf) {
            leaf.age.note_away();
        }
    }

    /// Returns the number of the leaf of `addr`.
    pub(crate) fn number(addr: usize) -> usize {
        PageIndex::of(addr).leaf
    }

    /// Returns the last address of the leaf of `addr`.
    pub(crate) fn leaf_end(addr: usize) -> usize {
        addr | ((1 << (LEAF_SHIFT + PAGE_SHIFT)) - 1)
    }

    /// Removes the entry of the page at `addr`, in this `second`, and notes a change of the leaf.
    pub(crate) fn remove(&mut self, addr: usize, second: u32) -> Option<W> {
        let index = PageIndex::of(addr);
        let leaf = self.leaves.get_mut(&index.leaf)?;
        let entry = Self::change(&mut self.bytes, leaf, |leaf| leaf.remove(index.page))?;
        leaf.age.begin_anew();
        self.prune(addr, Some(second));
        Some(entry)
    }

    /// Removes the entries in `from..to` for which `keep` returns `false`, from the first leaf at or behind
    /// `from`.
    ///
    /// Returns the address behind that leaf; `None` if that is not before `to`, or there is no such leaf.
    /// `second`: see [`Self::prune`].
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
        // The last leaf of the address space has no address behind it.
        last.checked_add(1).filter(|&next| next < to)
    }

    /// Returns the size of the map, in bytes, without the allocator's overhead.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Frees the leaf of `addr` if it has no entries.
    ///
    /// If `second` is given, a leaf whose huge pages were split is kept until it has been empty for
    /// [`EMPTY_SECS`].
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

    /// Notes that `count` pages in the leaf of `addr` were written to soon after they were merged.
    pub(crate) fn note_thrash(&mut self, addr: usize, count: usize) {
        if let Some(leaf) = self.leaves.get_mut(&PageIndex::of(addr).leaf) {
            let count = u8::try_from(count.saturating_mul(THRASH_STEP)).unwrap_or(u8::MAX);
            leaf.thrash_score = leaf.thrash_score.saturating_add(count);
        }
    }

    /// Whether a huge page at `addr` is not to be split yet, because khugepaged has collapsed the range again.
    pub(crate) fn keeps_whole(&self, addr: usize, second: u64) -> bool {
        let leaf = self.leaves.get(&PageIndex::of(addr).leaf);
        leaf.is_some_and(|leaf| leaf.splits.is_waiting(second))
    }

    /// Whether a huge page at `addr` may be split for a page of it that will merge.
    ///
    /// If the range was split in an earlier pass, it was collapsed since. Then a wait begins here.
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

    /// Calls `each` with address and entry of each page in the first leaf at or behind that of `from`.
    ///
    /// Leaves the pages out if too many of them were written to soon after a merge lately. The thrash score
    /// decays by one with each call. Returns the last address of the leaf; `None` if there is none.
    pub(crate) fn visit_leaf(
        &mut self,
        from: usize,
        mut each: impl FnMut(usize, &W),
    ) -> Option<usize> {
        let (&number, _) = self
            .leaves
            .cursor_lower_bound(&PageIndex::of(from).leaf)?
            .current();
        let leaf = self.leaves.get_mut(&number)?;
        leaf.thrash_score = leaf.thrash_score.saturating_sub(1);
        if leaf.thrash_score < THRASH_LIMIT {
            let mut page = 0;
            for entry in leaf.entries() {
                let Some(next) = leaf.next(page) else {
                    break;
                };
                each(
                    PageIndex {
                        leaf: number,
                        page: next,
                    }
                    .addr(),
                    entry,
                );
                page = next.wrapping_add(1);
            }
        }
        let first = PageIndex {
            leaf: number,
            page: 0,
        };
        Some(Self::leaf_end(first.addr()))
    }

    /// Whether the map has no leaves.
    pub(crate) fn is_empty(&self) -> bool {
        self.leaves.is_empty()
    }

    /// Calls `each` with each entry of the leaf of `from` and those behind it.
    ///
    /// Visits as many leaves as `budget` allows, and reduces it. Returns the address to continue at, if there
    /// are more.
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

/// A cursor in a leaf that only moves forward.
///
/// # Invariants
///
/// `rank` entries are before the page `at`, which is a page of the leaf or the one behind its last.
pub(crate) struct LeafCursor<'a, W> {
    leaf: &'a mut Leaf<W>,
    /// The size of the map.
    bytes: &'a mut usize,
    at: PageIndex,
    rank: usize,
}

/// The result of [`LeafCursor::seek`].
pub(crate) enum Found<'a, W> {
    /// An entry between the cursor and the page that is sought: its address, and the entry.
    ///
    /// Call [`LeafCursor::remove_passed`] or [`LeafCursor::keep_passed`], and seek again.
    Passed(usize, &'a mut W),
    /// The entry of the page. The cursor is behind it.
    Entry(&'a mut W),
    /// The page has no entry. The cursor is at the page.
    Nothing,
}

impl<W> LeafCursor<'_, W> {
    /// Moves to the page at `addr`, and returns what is there.
    ///
    /// The page must be in the leaf, and behind the page sought before, unless that had no entry.
    #[inline]
    pub(crate) fn seek(&mut self, addr: usize) -> Found<'_, W> {
        let sought = PageIndex::of(addr);
        if sought.page != self.at.page {
            let passed = self.leaf.next(self.at.page);
            if let Some(page) = passed.filter(|&page| page < sought.page) {
                // INVARIANT: There is no entry in between.
                self.at.page = page;
                return match self.leaf.words_mut().get_mut(self.rank) {
                    Some(entry) => Found::Passed(self.at.addr(), entry),
                    // Cannot happen, by the invariant.
                    None => Found::Nothing,
                };
            }
            // INVARIANT: There is no entry in between.
            self.at = sought;
        }
        if !self.leaf.has(self.at.page) {
            return Found::Nothing;
        }
        match self.leaf.words_mut().get_mut(self.rank) {
            Some(entry) => {
                // INVARIANT: The cursor moves by one page and one entry.
                self.at.page = self.at.page.wrapping_add(1);
                self.rank = self.rank.wrapping_add(1);
                Found::Entry(entry)
            }
            None => Found::Nothing,
        }
    }

    /// Removes the entry that was passed last from the map, and returns it.
    pub(crate) fn remove_passed(&mut self) -> Option<W> {
        let page = self.at.page;
        PageMap::change(self.bytes, self.leaf, |leaf| leaf.remove(page))
    }

    /// Keeps the entry that was passed last, and moves behind it.
    pub(crate) fn keep_passed(&mut self) {
        // INVARIANT: The cursor moves by one page and one entry.
        self.at.page = self.at.page.wrapping_add(1);
        self.rank = self.rank.wrapping_add(1);
    }

    /// Inserts an entry for the page that was sought last, which has none. The cursor moves behind it.
    ///
    /// `expected` is the number of entries about to be inserted, including this one: memory is allocated for
    /// all of them at once. On failure returns `entry`, and leaves the leaf unchanged.
    #[inline]
    pub(crate) fn insert(&mut self, entry: W, expected: usize, flags: Flags) -> Result<(), W> {
        let (page, rank) = (self.at.page, self.rank);
        PageMap::change(self.bytes, self.leaf, |leaf| {
            leaf.insert(page, rank, entry, expected, flags)
        })?;
        // INVARIANT: The cursor moves by one page and one entry.
        self.at.page = self.at.page.wrapping_add(1);
        self.rank = self.rank.wrapping_add(1);
        Ok(())
    }

    /// Returns the entries of the next `count` pages if each of them has one, and moves behind them.
    ///
    /// The cursor must not have moved yet.
    pub(crate) fn known_run(&mut self, count: usize) -> Option<&mut [W]> {
        let all = self.leaf.count(self.at.page, count)? == count;
        let run = self.rank..self.rank.checked_add(count)?;
        if !all {
            return None;
        }
        let entries = self.leaf.words_mut().get_mut(run)?;
        // INVARIANT: The cursor moves by as many pages as entries.
        self.at.page = self.at.page.wrapping_add(count);
        self.rank = self.rank.wrapping_add(count);
        Some(entries)
    }

    /// Whether no page at or behind the cursor has an entry. The cursor must not have moved yet.
    pub(crate) fn is_empty_from_here(&self) -> bool {
        self.rank == self.leaf.len()
    }

    /// Inserts entries for the next `count` pages, if no page at or behind the cursor has one. Moves behind
    /// them.
    ///
    /// `entry` makes the entry of a page from its index in the run. The cursor must not have moved yet. Returns
    /// whether the entries were inserted; `false` also without memory.
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
        // INVARIANT: The cursor moves by as many pages as entries.
        self.at.page = self.at.page.wrapping_add(count);
        self.rank = self.rank.wrapping_add(count);
        true
    }

    /// Decides whether the next passes skip the leaf, because its pages have not changed for some time.
    ///
    /// `keep` returns whether its entries forbid that. As this reads all entries, only the first step of a pass
    /// in the leaf does it: the one with no entries before its start.
    pub(crate) fn decide_skips(&mut self, keep: impl FnOnce(&[W]) -> bool) {
        if self.rank != 0 {
            return;
        }
        let mut age = self.leaf.age;
        age.decide_skips(|| !keep(self.leaf.entries()));
        self.leaf.age = age;
    }

    /// Whether this pass refreshes the leaf: checksums of its queued pages are recomputed, and its steady pages
    /// retried.
    #[inline]
    pub(crate) fn is_refreshing(&self) -> bool {
        self.leaf.age.is_refreshing()
    }

    /// Whether a retry of the leaf's steady pages is outstanding: it skipped a pass that retried them, or is
    /// retried alone.
    pub(crate) fn missed_retry(&self) -> bool {
        self.leaf.age.missed_retry()
    }

    /// Whether a wait for the next split of huge pages in the leaf has ended now.
    ///
    /// `second` returns the current second, and is only called if there is a wait.
    #[inline]
    pub(crate) fn end_wait(&mut self, second: impl FnOnce() -> u64) -> bool {
        let ended = self.leaf.splits.end_wait(second);
        if ended {
            // Retry the steady pages of the whole leaf: other steps may scan the rest, or a pass may skip it.
            self.leaf.age.note_retry_steady();
        }
        ended
    }

    /// Returns how many pages of the leaf have an entry.
    pub(crate) fn len(&self) -> usize {
        self.leaf.len()
    }
}
