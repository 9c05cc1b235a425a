// SPDX-License-Identifier: GPL-2.0

//! A leaf of a [`PageMap`](super::PageMap): the entries of 512 pages, and when to scan them.

use core::{mem::size_of, slice};
use kernel::{
    alloc::{
        flags::{GFP_KERNEL, GFP_KERNEL_ACCOUNT, GFP_NOWAIT},
        kvec::InsertError,
        Flags,
    },
    prelude::*,
};

/// The number of pages in a leaf. A page table of x86-64 has as many entries, but nothing depends on that.
pub(super) const LEAF_PAGES: usize = 512;
/// The binary logarithm of [`LEAF_PAGES`].
pub(super) const LEAF_SHIFT: usize = 9;
/// The number of bits in a group: a word of the bitmap.
const BITS: usize = u64::BITS as usize;
/// The number of groups.
const GROUPS: usize = LEAF_PAGES / BITS;

/// A leaf: the entries of some of 512 pages.
pub(super) struct Leaf<W> {
    content: Content<W>,
    /// A measure of merges in vain, see [`PageMap::note_thrash`](super::PageMap::note_thrash).
    pub(super) thrash_score: u8,
    /// When to skip the leaf, to refresh it, and to retry its steady pages.
    pub(super) age: Age,
    /// Whether huge pages in the leaf may be split.
    pub(super) splits: Splits,
}

/// The age of a leaf: for how many passes its pages have not changed. It decides which passes skip the leaf.
///
/// In a leaf without entries, `passes` and `skips` hold the time since which it has none.
#[derive(Clone, Copy, Default)]
pub(super) struct Age {
    /// How many passes with `smart_scan` the leaf has begun since a page changed.
    passes: u8,
    /// How many of the next passes are to skip the leaf.
    skips: u8,
    /// The flags [`Self::SKIPPED`], [`Self::MISSED_RETRY`], [`Self::AWAY`] and [`Self::RETRY`]. The high bits
    /// hold the number of passes since the last refresh.
    flags: u8,
    /// The last pass that the leaf has begun, modulo 2⁸.
    pass: u8,
}

impl Age {
    /// The current pass skips the leaf.
    const SKIPPED: u8 = 1;
    /// A retry of the leaf's steady pages is outstanding: it skipped a pass that retried them, or is retried
    /// alone.
    const MISSED_RETRY: u8 = 2;
    /// Pages were swapped out or migrating, and may come back as merged pages without an rmap item.
    const AWAY: u8 = 4;
    /// The next pass retries the steady pages of this leaf, even if it retries no others.
    const RETRY: u8 = 8;

    /// The position of the number of passes since the last refresh.
    const REFRESHED_SHIFT: u32 = 4;
    /// A number of passes that is never reached. It says that the leaf has no entries.
    const EMPTY: u8 = 0xf << Self::REFRESHED_SHIFT;
    /// The number of passes between two refreshes.
    const REFRESH_PASSES: u8 = 8;

    /// Sets or clears a flag.
    fn set(&mut self, flag: u8, on: bool) {
        self.flags = if on {
            self.flags | flag
        } else {
            self.flags & !flag
        };
    }

    /// Whether a flag is set.
    fn has(self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    /// Returns the age of the leaf `number`, which is made in this pass. Leaves start at different points of
    /// the refresh cycle.
    pub(super) fn new(number: usize, pass: u32) -> Self {
        Self {
            pass: pass as u8,
            flags: (number as u8 % Self::REFRESH_PASSES) << Self::REFRESHED_SHIFT,
            ..Self::default()
        }
    }

    /// Returns the age of a leaf that has lost its last entry in this second, see [`Self::was_empty_for`].
    fn empty(second: u32) -> Self {
        let [passes, skips] = (second as u16).to_le_bytes();
        Self {
            passes,
            skips,
            flags: Self::EMPTY,
            ..Self::default()
        }
    }

    /// Returns for how many seconds the leaf has had no entries, modulo 2¹⁶; `None` if that was not noted yet.
    fn was_empty_for(self, second: u32) -> Option<u16> {
        let since = u16::from_le_bytes([self.passes, self.skips]);
        (self.flags & Self::EMPTY == Self::EMPTY).then_some((second as u16).wrapping_sub(since))
    }

    /// Whether this pass refreshes the leaf. A page may have changed where the sample does not look, and have
    /// another checksum, or an equal, by now.
    ///
    /// If the leaf is skipped when a refresh is due, the next scan of it refreshes it.
    pub(super) fn is_refreshing(self) -> bool {
        self.flags >> Self::REFRESHED_SHIFT == 0
    }

    /// Whether the current pass skips the leaf.
    pub(super) fn is_skipped(self) -> bool {
        self.has(Self::SKIPPED)
    }

    /// Whether a retry of the leaf's steady pages is outstanding.
    pub(super) fn missed_retry(self) -> bool {
        self.has(Self::MISSED_RETRY)
    }

    /// See [`PageMap::note_away`](super::PageMap::note_away).
    pub(super) fn note_away(&mut self) {
        self.set(Self::AWAY, true);
    }

    /// Has the steady pages of the leaf retried in this pass.
    pub(super) fn note_retry_steady(&mut self) {
        self.set(Self::MISSED_RETRY, true);
    }

    /// See [`PageMap::note_retry`](super::PageMap::note_retry).
    pub(super) fn note_retry(&mut self) {
        self.set(Self::RETRY, true);
    }

    /// Whether the leaf has not begun this pass yet.
    ///
    /// A pass that comes 256 passes after the last one that the leaf has begun is mistaken for that one. A leaf
    /// begins nearly every pass.
    #[inline]
    pub(super) fn is_behind(self, pass: u32) -> bool {
        self.pass != pass as u8
    }

    /// Begins a pass that does not skip the leaf.
    pub(super) fn begin_whole_pass(&mut self, pass: u32) {
        self.begin(pass);
        self.count_refresh();
    }

    /// Begins a pass: decides whether it retries the steady pages, and clears the flags of the pass before.
    fn begin(&mut self, pass: u32) {
        self.pass = pass as u8;
        let retry = self.is_skipped() && self.missed_retry() || self.has(Self::RETRY);
        self.set(Self::MISSED_RETRY, retry);
        self.set(Self::RETRY | Self::SKIPPED, false);
    }

    /// Counts a pass towards the next refresh.
    fn count_refresh(&mut self) {
        let since = self.flags >> Self::REFRESHED_SHIFT;
        self.set_refreshed(match since.saturating_add(1) {
            since if since < Self::REFRESH_PASSES => since,
            _ => 0,
        });
    }

    /// Sets the number of passes since the last refresh.
    fn set_refreshed(&mut self, since: u8) {
        let flags = self.flags & ((1 << Self::REFRESHED_SHIFT) - 1);
        self.flags = flags | since << Self::REFRESHED_SHIFT;
    }

    /// Begins a pass, and decides whether it skips the leaf.
    ///
    /// `retry_steady`: the pass retries steady pages. `must_look`: the leaf must not be skipped. The ages, and
    /// how many passes are skipped at each, are those of in-tree KSM, which has them for each page.
    pub(super) fn begin_pass(&mut self, pass: u32, retry_steady: bool, must_look: bool) {
        self.begin(pass);
        let age = self.passes;
        self.passes = age.saturating_add(1);
        // This scan finds out whether there are any such pages left.
        let must_look = self.has(Self::AWAY) || must_look;
        self.set(Self::AWAY, false);
        self.set(Self::SKIPPED, age >= 3 && self.skips != 0 && !must_look);
        if !self.is_skipped() {
            return self.count_refresh();
        }
        self.skips = self.skips.saturating_sub(1);
        self.set(Self::MISSED_RETRY, self.missed_retry() || retry_steady);
        // Consecutive passes that skip the leaf count as one. Otherwise each scan of an old leaf, which comes
        // after eight skipped passes, would refresh it, and cost a tenth more.
        if self.skips == 0 && self.flags >> Self::REFRESHED_SHIFT < Self::REFRESH_PASSES - 1 {
            self.count_refresh();
        }
    }

    /// Decides how many of the next passes skip the leaf. The current pass scans it.
    pub(super) fn decide_skips(&mut self, may_skip: impl FnOnce() -> bool) {
        // The age at the beginning of the pass.
        let age = self.passes.saturating_sub(1);
        if age >= 3 && self.skips == 0 && !self.is_skipped() && may_skip() {
            self.skips = match age {
                0..=3 => 1,
                4..=5 => 2,
                6..=8 => 4,
                _ => 8,
            };
        }
    }

    /// Notes that a page has changed: the age starts from zero.
    pub(super) fn begin_anew(&mut self) {
        if self.flags & Self::EMPTY == Self::EMPTY {
            // The fields hold the time since which the leaf has no entries.
            return;
        }
        self.passes = 0;
        self.skips = 0;
    }
}

/// A leaf waits for at most `1 << MAX_SPLIT_LEVEL` seconds before a huge page in it is split again.
const MAX_SPLIT_LEVEL: u8 = 7;

/// A point in time, as [`Splits`] counts it.
#[derive(Clone, Copy)]
pub(crate) struct Moment {
    /// The number of the pass.
    pub(crate) pass: u32,
    /// The number of seconds since any fixed point.
    pub(crate) second: u64,
}

/// Whether huge pages in a leaf may be split.
///
/// If a page is to be split off where a huge page was split in an earlier pass, the range was collapsed in
/// between. Most often that was khugepaged, which would do it again and again. So the leaf waits before the
/// next split, and the wait doubles each time.
///
/// The wait is counted in seconds. A number of passes would be over at once where passes follow each other
/// without a pause, and never where one takes hours.
///
/// A leaf has room for three bytes, so numbers are kept modulo 2¹⁶. Once in 2¹⁶ passes or seconds, one is
/// mistaken for another. Then a split is allowed, or put off, by mistake.
#[derive(Clone, Copy, Default)]
pub(super) struct Splits {
    /// The level: how often the leaf had to wait. And [`Self::SPLIT`], [`Self::WAITING`] or neither.
    bits: u8,
    /// The pass of the last split, or the second in which the wait ends.
    when: [u8; 2],
}

impl Splits {
    const LEVEL: u8 = MAX_SPLIT_LEVEL;
    const SPLIT: u8 = 1 << 6;
    const WAITING: u8 = 1 << 7;

    fn set(&mut self, state: u8, level: u8, when: u16) {
        self.bits = state | level;
        self.when = when.to_le_bytes();
    }

    fn level(self) -> u8 {
        self.bits & Self::LEVEL
    }

    fn when(self) -> u16 {
        u16::from_le_bytes(self.when)
    }

    /// Whether a huge page is not to be split yet.
    pub(super) fn is_waiting(self, second: u64) -> bool {
        let left = self.when().wrapping_sub(second as u16);
        self.bits & Self::WAITING != 0 && left != 0 && left <= 1 << MAX_SPLIT_LEVEL
    }

    /// Whether a huge page may be split now. If one was split in an earlier pass, the wait begins.
    pub(super) fn may_split(&mut self, now: Moment) -> bool {
        if self.bits & Self::SPLIT != 0 && self.when() != now.pass as u16 {
            let level = self.level().saturating_add(1).min(MAX_SPLIT_LEVEL);
            let over = (now.second as u16).wrapping_add(1 << level);
            self.set(Self::WAITING, level, over);
        }
        !self.is_waiting(now.second)
    }

    /// Whether no split and no wait is remembered.
    pub(super) fn is_default(self) -> bool {
        self.bits == 0
    }

    /// Notes that a huge page is split.
    pub(super) fn note(&mut self, now: Moment) {
        self.set(Self::SPLIT, self.level(), now.pass as u16);
    }

    /// Ends a wait that is over. Returns whether there was one.
    #[inline]
    pub(super) fn end_wait(&mut self, second: impl FnOnce() -> u64) -> bool {
        if self.bits & Self::WAITING == 0 || self.is_waiting(second()) {
            return false;
        }
        self.set(0, self.level(), 0);
        true
    }
}

/// The entries. By far the most leaves are either nearly full, or have a single page.
enum Content<W> {
    Nothing,
    One(u16, W),
    Many(KBox<Many<W>>),
}

/// A bitmap of the pages that have an entry, and the entries.
///
/// # Invariants
///
/// There are as many entries as bits set. `before` holds how many bits are set in the groups before each group.
struct Many<W> {
    present: [u64; GROUPS],
    before: [u16; GROUPS],
    entries: KVec<W>,
}

/// Returns the group of a page, and its bit in the group.
fn bit(page: usize) -> (usize, u64) {
    (page / BITS, 1 << (page % BITS))
}

/// Returns the first page at or after `page` whose bit is set.
fn next_set(present: &[u64; GROUPS], page: usize) -> Option<usize> {
    let mut mask = u64::MAX << (page % BITS);
    for (group, bits) in present.iter().enumerate().skip(page / BITS) {
        let left = bits & mask;
        if left != 0 {
            return Some(group * BITS + left.trailing_zeros() as usize);
        }
        mask = u64::MAX;
    }
    None
}

impl<W> Many<W> {
    fn new(flags: Flags) -> Result<KBox<Self>> {
        // INVARIANT: There are no entries, and no bits are set.
        Ok(KBox::new(
            Self {
                present: [0; GROUPS],
                before: [0; GROUPS],
                entries: KVec::new(),
            },
            flags,
        )?)
    }

    fn has(&self, page: usize) -> bool {
        let (group, bit) = bit(page);
        self.present.get(group).is_some_and(|bits| bits & bit != 0)
    }

    fn rank(&self, page: usize) -> usize {
        let (group, bit) = bit(page);
        match (self.present.get(group), self.before.get(group)) {
            (Some(bits), Some(&before)) => {
                usize::from(before) + (bits & (bit - 1)).count_ones() as usize
            }
            // `page` is behind the last page.
            _ => self.entries.len(),
        }
    }

    fn next(&self, page: usize) -> Option<usize> {
        next_set(&self.present, page)
    }

    fn set_bit(&mut self, page: usize) {
        let (group, bit) = bit(page);
        if let Some(bits) = self.present.get_mut(group) {
            *bits |= bit;
            let behind = self.before.iter_mut().skip(group.wrapping_add(1));
            behind.for_each(|before| *before = before.wrapping_add(1));
        }
    }

    fn clear_bit(&mut self, page: usize) {
        let (group, bit) = bit(page);
        if let Some(bits) = self.present.get_mut(group) {
            *bits &= !bit;
            let behind = self.before.iter_mut().skip(group.wrapping_add(1));
            behind.for_each(|before| *before = before.wrapping_sub(1));
        }
    }

    /// See [`Leaf::retain`].
    fn retain(&mut self, from: usize, to: usize, mut keep: impl FnMut(usize, &mut W) -> bool) {
        let present = self.present;
        let mut left = present;
        let mut next = 0;
        self.entries.retain(|entry| {
            let Some(page) = next_set(&present, next) else {
                return true;
            };
            next = page.saturating_add(1);
            if !(from..to).contains(&page) || keep(page, entry) {
                return true;
            }
            let (group, bit) = bit(page);
            if let Some(bits) = left.get_mut(group) {
                *bits &= !bit;
            }
            false
        });
        // INVARIANT: `left` has the bits of the entries that are left.
        self.present = left;
        self.count_groups();
    }

    /// Computes `before`.
    fn count_groups(&mut self) {
        let mut sum = 0;
        for (bits, before) in self.present.iter().zip(self.before.iter_mut()) {
            *before = sum;
            sum = sum.wrapping_add(bits.count_ones() as u16);
        }
    }

    /// Makes room for `count` more entries. `reserve` grows by doubling, which must not exceed the size of a
    /// full leaf.
    fn make_room(&mut self, count: usize, flags: Flags) -> Result {
        let (len, capacity) = (self.entries.len(), self.entries.capacity());
        if capacity.saturating_sub(len) >= count {
            return Ok(());
        }
        if capacity.saturating_mul(2) <= LEAF_PAGES || len.saturating_add(count) > LEAF_PAGES {
            return Ok(self.entries.reserve(count, flags)?);
        }
        self.move_to_room_for(LEAF_PAGES, flags)
    }

    /// Moves the entries to memory with room for `count` entries, which must be enough for them. On failure
    /// they stay in place.
    fn move_to_room_for(&mut self, count: usize, flags: Flags) -> Result {
        let mut room = KVec::with_capacity(count, flags)?;
        for entry in self.entries.drain_all() {
            // There is room for all of them.
            let _ = room.push_within_capacity(entry);
        }
        self.entries = room;
        Ok(())
    }

    /// Inserts an entry for `page`, which has none, behind `rank` others. There must be room.
    fn insert_in_room(&mut self, page: usize, rank: usize, entry: W) -> Result<(), W> {
        if rank == self.entries.len() {
            self.entries
                .push_within_capacity(entry)
                .map_err(|err| err.0)?;
        } else {
            self.entries
                .insert_within_capacity(rank, entry)
                .map_err(|err| match err {
                    InsertError::IndexOutOfBounds(entry) | InsertError::OutOfCapacity(entry) => {
                        entry
                    }
                })?;
        }
        // INVARIANT: There is one bit more, and one entry more.
        self.set_bit(page);
        Ok(())
    }
}

impl<W> Leaf<W> {
    pub(super) fn new(age: Age) -> Self {
        // Many leaves have a single page, so keep them small.
        const { assert!(size_of::<W>() != 8 || size_of::<Self>() == 24) };
        Self {
            content: Content::Nothing,
            thrash_score: 0,
            age,
            splits: Splits::default(),
        }
    }

    /// Returns whether the leaf, which has no entries in this `second`, has had none for `seconds`.
    ///
    /// Notes the second if it is the first call since then.
    pub(super) fn is_empty_for(&mut self, seconds: u16, second: u32) -> bool {
        match self.age.was_empty_for(second) {
            Some(past) => past >= seconds,
            None => {
                self.age = Age::empty(second);
                false
            }
        }
    }

    /// Returns how many pages have an entry.
    #[inline]
    pub(super) fn len(&self) -> usize {
        self.entries().len()
    }

    /// Returns the entries, in the order of their pages.
    #[inline]
    pub(super) fn entries(&self) -> &[W] {
        match &self.content {
            Content::Nothing => &[],
            Content::One(_, entry) => slice::from_ref(entry),
            Content::Many(many) => &many.entries,
        }
    }

    /// Returns the entries, in the order of their pages.
    #[inline]
    pub(super) fn words_mut(&mut self) -> &mut [W] {
        match &mut self.content {
            Content::Nothing => &mut [],
            Content::One(_, entry) => slice::from_mut(entry),
            Content::Many(many) => &mut many.entries,
        }
    }

    /// Whether `page` has an entry.
    #[inline]
    pub(super) fn has(&self, page: usize) -> bool {
        match &self.content {
            Content::Nothing => false,
            Content::One(only, _) => usize::from(*only) == page,
            Content::Many(many) => many.has(page),
        }
    }

    /// Returns how many pages before `page` have an entry. This is the index of the entry of `page`.
    #[inline]
    pub(super) fn rank(&self, page: usize) -> usize {
        match &self.content {
            Content::Nothing => 0,
            Content::One(only, _) => usize::from(usize::from(*only) < page),
            Content::Many(many) => many.rank(page),
        }
    }

    /// Returns the entry of `page`.
    pub(super) fn get_mut(&mut self, page: usize) -> Option<&mut W> {
        if !self.has(page) {
            return None;
        }
        let rank = self.rank(page);
        self.words_mut().get_mut(rank)
    }

    /// Returns how many of `count` pages from `page` on have an entry; `None` if they reach beyond the leaf.
    pub(super) fn count(&self, page: usize, count: usize) -> Option<usize> {
        let end = page.checked_add(count).filter(|&end| end <= LEAF_PAGES)?;
        self.rank(end).checked_sub(self.rank(page))
    }

    /// Returns the first page at or after `page` that has an entry.
    #[inline]
    pub(super) fn next(&self, page: usize) -> Option<usize> {
        match &self.content {
            Content::Nothing => None,
            Content::One(only, _) => Some(usize::from(*only)).filter(|&only| only >= page),
            Content::Many(many) => many.next(page),
        }
    }

    /// Inserts an entry for `page`, which has none, behind `rank` others.
    ///
    /// `expected` is the number of entries about to be inserted, including this one. On failure returns
    /// `entry`, and leaves the leaf unchanged.
    pub(super) fn insert(
        &mut self,
        page: usize,
        rank: usize,
        entry: W,
        expected: usize,
        flags: Flags,
    ) -> Result<(), W> {
        if let (Content::Nothing, 1, Ok(only)) = (&self.content, expected, u16::try_from(page)) {
            self.content = Content::One(only, entry);
            return Ok(());
        }
        // Memory for all expected entries is allocated with the first one.
        if let Content::Many(many) = &mut self.content {
            if many.entries.len() < many.entries.capacity() {
                return many.insert_in_room(page, rank, entry);
            }
        }
        let count = expected.clamp(1, LEAF_PAGES.saturating_sub(self.len()).max(1));
        match self.many_with_room(count, flags) {
            Ok(many) => many.insert_in_room(page, rank, entry),
            Err(_) => Err(entry),
        }
    }

    /// Inserts entries for `count` pages from `page` on, which is behind all pages that have one.
    ///
    /// `entry` makes the entry of a page from its index in the run. `None` or `false`: that was not possible,
    /// and no entry was inserted.
    pub(super) fn fill(
        &mut self,
        page: usize,
        count: usize,
        flags: Flags,
        entry: &mut impl FnMut(usize) -> W,
    ) -> Option<bool> {
        let end = page.checked_add(count).filter(|&end| end <= LEAF_PAGES)?;
        if let (Content::Nothing, 1) = (&self.content, count) {
            self.content = Content::One(u16::try_from(page).ok()?, entry(0));
            return Some(true);
        }
        let many = self.many_with_room(count, flags).ok()?;
        for i in 0..count {
            // There is room for all of them.
            if many.entries.push_within_capacity(entry(i)).is_err() {
                return None;
            }
        }
        // INVARIANT: There are `count` bits more, and as many entries.
        for (group, bits) in many.present.iter_mut().enumerate() {
            let start = group * BITS;
            let from = page.saturating_sub(start).min(BITS);
            let to = end.saturating_sub(start).min(BITS);
            if from < to {
                *bits |= (u64::MAX >> (BITS - (to - from))) << from;
            }
        }
        many.count_groups();
        Some(true)
    }

    /// Removes the entry of `page`, and returns it.
    pub(super) fn remove(&mut self, page: usize) -> Option<W> {
        if !self.has(page) {
            return None;
        }
        if let Content::Many(many) = &mut self.content {
            let rank = many.rank(page);
            let entry = many.entries.remove(rank).ok()?;
            // INVARIANT: There is one bit less, and one entry less.
            many.clear_bit(page);
            self.give_back();
            return Some(entry);
        }
        match core::mem::replace(&mut self.content, Content::Nothing) {
            Content::One(_, entry) => Some(entry),
            _ => None,
        }
    }

    /// Removes the entries of pages in `from..to` for which `keep` returns `false`. `keep` may change those
    /// that stay.
    pub(super) fn retain(
        &mut self,
        from: usize,
        to: usize,
        mut keep: impl FnMut(usize, &mut W) -> bool,
    ) {
        match &mut self.content {
            Content::Nothing => {}
            Content::One(only, entry) => {
                let page = usize::from(*only);
                if (from..to).contains(&page) && !keep(page, entry) {
                    self.content = Content::Nothing;
                }
            }
            Content::Many(many) => {
                let before = many.entries.len();
                many.retain(from, to, keep);
                // If nothing was removed, do not retry a move for which there was no memory.
                if many.entries.len() != before {
                    self.give_back();
                }
            }
        }
    }

    /// Gives memory back that the entries do not need. If there is no memory to move them to, retries when half
    /// of them are gone.
    fn give_back(&mut self) {
        let Content::Many(many) = &mut self.content else {
            return;
        };
        match many.entries.len() {
            0 => self.content = Content::Nothing,
            1 => {
                let only = many.next(0).and_then(|page| u16::try_from(page).ok());
                if let Some(only) = only {
                    if let Some(entry) = many.entries.pop() {
                        self.content = Content::One(only, entry);
                    }
                }
            }
            // Wait until only a quarter is used, so that a leaf whose pages come and go is not moved all the
            // time. Do not retry with each entry: a memory cgroup at its limit would refuse, and count, each
            // attempt.
            len => {
                let quarter = many.entries.capacity() / 4;
                if len == quarter || len < quarter && len.is_power_of_two() {
                    // Charge the new memory like the old one.
                    let flags = GFP_NOWAIT | (GFP_KERNEL_ACCOUNT & !GFP_KERNEL);
                    let _ = many.move_to_room_for(len.saturating_mul(2), flags);
                }
            }
        }
    }

    /// Returns the size of the entries outside the leaf itself, in bytes, without the allocator's overhead.
    pub(super) fn bytes(&self) -> usize {
        match &self.content {
            Content::Many(many) => {
                let entries = many.entries.capacity().saturating_mul(size_of::<W>());
                entries.saturating_add(size_of::<Many<W>>())
            }
            _ => 0,
        }
    }

    /// Returns the entries as [`Many`], with room for `count` more. The entries are unchanged on failure.
    fn many_with_room(&mut self, count: usize, flags: Flags) -> Result<&mut Many<W>> {
        if !matches!(self.content, Content::Many(_)) {
            let mut many = Many::new(flags)?;
            many.make_room(self.len().saturating_add(count), flags)?;
            let before = core::mem::replace(&mut self.content, Content::Nothing);
            if let Content::One(page, entry) = before {
                // There is room.
                let _ = many.insert_in_room(usize::from(page), 0, entry);
            }
            self.content = Content::Many(many);
        }
        match &mut self.content {
            Content::Many(many) => {
                many.make_room(count, flags)?;
                Ok(many)
            }
            // Cannot happen, see above.
            _ => Err(ENOMEM),
        }
    }
}
