// SPDX-License-Identifier: GPL-2.0

//! The entries of the pages of one leaf.

use core::{mem::size_of, slice};
use kernel::{
    alloc::{
        flags::{GFP_KERNEL, GFP_KERNEL_ACCOUNT, GFP_NOWAIT},
        kvec::InsertError,
        Flags,
    },
    prelude::*,
};

/// Pages per leaf: those of one page table on x86-64, though nothing depends on that.
pub(super) const LEAF_PAGES: usize = 512;
pub(super) const LEAF_SHIFT: usize = 9;
const BITS: usize = u64::BITS as usize;
const GROUPS: usize = LEAF_PAGES / BITS;

/// Words of some of 512 pages.
pub(super) struct Leaf<W> {
    content: Content<W>,
    /// See [`PageMap::note_thrash`](super::PageMap::note_thrash).
    pub(super) thrash_score: u8,
    /// What is known of how much looking at the pages is worth.
    pub(super) age: Age,
    /// Whether a huge page here may be split.
    pub(super) splits: Splits,
}

/// For how long nothing has come of looking at the pages of a leaf.
#[derive(Clone, Copy, Default)]
pub(super) struct Age {
    /// Passes in which nothing changed.
    passes: u8,
    /// How many of the next passes are to skip the leaf.
    skips: u8,
    /// [`Self::SKIPPED`], [`Self::MISSED_RETRY`], [`Self::AWAY`] and [`Self::RETRY`]; and in the upper bits the number
    /// of passes since its pages were looked at anew.
    flags: u8,
    /// The pass that it has begun, modulo 2⁸.
    pass: u8,
}

impl Age {
    /// This pass skips the leaf.
    const SKIPPED: u8 = 1;
    /// There is news for it that it has not seen yet.
    const MISSED_RETRY: u8 = 2;
    /// A merged page may come to be mapped in it without the engine.
    const AWAY: u8 = 4;
    /// There is news for it alone in the next pass.
    const RETRY: u8 = 8;

    const REFRESHED_SHIFT: u32 = 4;
    /// A number that does not come about says that the leaf has no entries.
    const EMPTY: u8 = 0xf << Self::REFRESHED_SHIFT;
    /// After so many passes it is time to look at its pages anew.
    const REFRESH_PASSES: u8 = 8;

    fn set(&mut self, flag: u8, on: bool) {
        self.flags = if on {
            self.flags | flag
        } else {
            self.flags & !flag
        };
    }

    fn has(self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    /// That of the leaf with number `nth`, which is made in this pass. Leaves take turns in being looked at anew.
    pub(super) fn new(nth: usize, pass: u32) -> Self {
        Self {
            pass: pass as u8,
            flags: (nth as u8 % Self::REFRESH_PASSES) << Self::REFRESHED_SHIFT,
            ..Self::default()
        }
    }

    /// That of a leaf which has lost its last entry in this second. See [`Self::was_empty_for`].
    fn empty(second: u32) -> Self {
        let [passes, skips] = (second as u16).to_le_bytes();
        Self {
            passes,
            skips,
            flags: Self::EMPTY,
            ..Self::default()
        }
    }

    /// For how many seconds a leaf has been without entries, modulo 2¹⁶; `None`: that was not noted yet.
    fn was_empty_for(self, second: u32) -> Option<u16> {
        let since = u16::from_le_bytes([self.passes, self.skips]);
        (self.flags & Self::EMPTY == Self::EMPTY).then_some((second as u16).wrapping_sub(since))
    }

    /// Whether its pages are to be looked at anew in this pass: what only changes where the sample does not look may
    /// have got another checksum, or an equal, without anybody noticing. What is skipped has its turn when it is
    /// looked at next.
    pub(super) fn is_refreshing(self) -> bool {
        self.flags >> Self::REFRESHED_SHIFT == 0
    }

    /// Whether this pass skips the leaf.
    pub(super) fn is_skipped(self) -> bool {
        self.has(Self::SKIPPED)
    }

    /// Whether there is news for it that it has not seen yet.
    pub(super) fn missed_retry(self) -> bool {
        self.has(Self::MISSED_RETRY)
    }

    /// See [`PageMap::note_away`](super::PageMap::note_away).
    pub(super) fn note_away(&mut self) {
        self.set(Self::AWAY, true);
    }

    /// Notes that there is news for it in this pass.
    pub(super) fn note_retry_steady(&mut self) {
        self.set(Self::MISSED_RETRY, true);
    }

    /// See [`PageMap::note_retry`](super::PageMap::note_retry).
    pub(super) fn note_retry(&mut self) {
        self.set(Self::RETRY, true);
    }

    /// Whether the pass with this number is still to be begun. (One that comes 256 passes after the last one
    /// that was is not; a leaf takes part in nearly all.)
    #[inline]
    pub(super) fn is_behind(self, pass: u32) -> bool {
        self.pass != pass as u8
    }

    /// Begins a pass that skips nothing.
    pub(super) fn begin_whole_pass(&mut self, pass: u32) {
        self.begin(pass);
        self.count_refresh();
    }

    fn begin(&mut self, pass: u32) {
        self.pass = pass as u8;
        let owed = self.is_skipped() && self.missed_retry() || self.has(Self::RETRY);
        self.set(Self::MISSED_RETRY, owed);
        self.set(Self::RETRY | Self::SKIPPED, false);
    }

    /// Counts a pass of those after which it is time to look at its pages anew.
    fn count_refresh(&mut self) {
        let since = self.flags >> Self::REFRESHED_SHIFT;
        self.set_refreshed(match since.saturating_add(1) {
            since if since < Self::REFRESH_PASSES => since,
            _ => 0,
        });
    }

    fn set_refreshed(&mut self, since: u8) {
        let flags = self.flags & ((1 << Self::REFRESHED_SHIFT) - 1);
        self.flags = flags | since << Self::REFRESHED_SHIFT;
    }

    /// Begins a pass, for which there is news or not, and decides whether it skips the leaf, which it does not
    /// if it `must_look` at it. The ages and numbers of passes are those of in-tree KSM, which has them for
    /// each page.
    pub(super) fn begin_pass(&mut self, pass: u32, retry_steady: bool, must_look: bool) {
        self.begin(pass);
        let age = self.passes;
        self.passes = age.saturating_add(1);
        // This look finds out whether there still are any.
        let must_look = self.has(Self::AWAY) || must_look;
        self.set(Self::AWAY, false);
        self.set(Self::SKIPPED, age >= 3 && self.skips != 0 && !must_look);
        if !self.is_skipped() {
            return self.count_refresh();
        }
        self.skips = self.skips.saturating_sub(1);
        self.set(Self::MISSED_RETRY, self.missed_retry() || retry_steady);
        // Passes that are skipped in a row count as one. Else each look at an old leaf, after eight passes that
        // skip it, would look at all its pages anew, which costs a tenth more.
        if self.skips == 0 && self.flags >> Self::REFRESHED_SHIFT < Self::REFRESH_PASSES - 1 {
            self.count_refresh();
        }
    }

    /// Decides how many of the next passes are to skip the leaf, which this one looks at.
    pub(super) fn decide_skips(&mut self, may_skip: impl FnOnce() -> bool) {
        // As of the beginning of the pass.
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

    /// Notes that something happened to a page.
    pub(super) fn begin_anew(&mut self) {
        if self.flags & Self::EMPTY == Self::EMPTY {
            // These say since when there are none.
            return;
        }
        self.passes = 0;
        self.skips = 0;
    }
}

/// A leaf waits for `1 << MAX_SPLIT_LEVEL` seconds at most before a huge page in it is split again.
const MAX_SPLIT_LEVEL: u8 = 7;

/// A moment, as [`Splits`] count.
#[derive(Clone, Copy)]
pub(crate) struct Moment {
    /// The number of the pass.
    pub(crate) pass: u32,
    /// Seconds since any moment.
    pub(crate) second: u64,
}

/// Whether huge pages in a leaf may be split.
///
/// A part that wants to be split off where there was a split in a pass before means that the pages were put
/// together in between, most often by khugepaged, which would do so for ever. The leaf waits before it
/// lets that happen again, twice as long each time: in seconds, which at one pass a second are as many
/// passes. (A number of passes would be over at once where they follow each other without a pause,
/// and never where one takes hours.)
///
/// A leaf has room for three bytes, so numbers are kept modulo 2¹⁶: once in 2¹⁶ passes or seconds one is taken for
/// another, and a split is allowed, or put off, that should not be.
#[derive(Clone, Copy, Default)]
pub(super) struct Splits {
    /// How often it had to wait, and [`Self::SPLIT`], [`Self::WAITING`] or neither.
    bits: u8,
    /// The pass of the last split, or the second in which the wait is over.
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

    /// Whether a huge page is to stay whole still.
    pub(super) fn is_waiting(self, second: u64) -> bool {
        let left = self.when().wrapping_sub(second as u16);
        self.bits & Self::WAITING != 0 && left != 0 && left <= 1 << MAX_SPLIT_LEVEL
    }

    /// Whether a huge page may be split. If there was a split in another pass, the wait begins.
    pub(super) fn may_split(&mut self, now: Moment) -> bool {
        if self.bits & Self::SPLIT != 0 && self.when() != now.pass as u16 {
            let level = self.level().saturating_add(1).min(MAX_SPLIT_LEVEL);
            let over = (now.second as u16).wrapping_add(1 << level);
            self.set(Self::WAITING, level, over);
        }
        !self.is_waiting(now.second)
    }

    /// Whether there is nothing to remember.
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

/// Far the most leaves are either nearly full, or have a single page.
enum Content<W> {
    Nothing,
    One(u16, W),
    Many(KBox<Many<W>>),
}

/// # Invariants
///
/// There are as many entries as bits are set. `before` says how many are set in the groups before each.
struct Many<W> {
    present: [u64; GROUPS],
    before: [u16; GROUPS],
    entries: KVec<W>,
}

/// Which group the bit of a page is in, and the bit.
fn bit(page: usize) -> (usize, u64) {
    (page / BITS, 1 << (page % BITS))
}

/// The first page at or after `page` whose bit is set.
fn next_set(present: &[u64; GROUPS], page: usize) -> Option<usize> {
    let mut mask = u64::MAX << (page % BITS);
    for (nth, bits) in present.iter().enumerate().skip(page / BITS) {
        let left = bits & mask;
        if left != 0 {
            return Some(nth * BITS + left.trailing_zeros() as usize);
        }
        mask = u64::MAX;
    }
    None
}

impl<W> Many<W> {
    fn new(flags: Flags) -> Result<KBox<Self>> {
        // INVARIANT: no entries, no bits.
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
            // Behind the last page.
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
        // INVARIANT: The bits of the entries that are left.
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

    /// Makes room for `more` entries. Growing by doubling, as `reserve` does, must not go beyond what a
    /// full leaf takes.
    fn make_room(&mut self, more: usize, flags: Flags) -> Result {
        let (len, capacity) = (self.entries.len(), self.entries.capacity());
        if capacity.saturating_sub(len) >= more {
            return Ok(());
        }
        if capacity.saturating_mul(2) <= LEAF_PAGES || len.saturating_add(more) > LEAF_PAGES {
            return Ok(self.entries.reserve(more, flags)?);
        }
        self.move_to_room_for(LEAF_PAGES, flags)
    }

    /// Moves the entries to where there is room for `count`, which they are not more than. They stay where they
    /// are on failure.
    fn move_to_room_for(&mut self, count: usize, flags: Flags) -> Result {
        let mut room = KVec::with_capacity(count, flags)?;
        for entry in self.entries.drain_all() {
            // There is room for all of them.
            let _ = room.push_within_capacity(entry);
        }
        self.entries = room;
        Ok(())
    }

    /// Gives `page`, which has none, a entry, of which `rank` are before it. There is room.
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
        // INVARIANT: one bit more, one entry more.
        self.set_bit(page);
        Ok(())
    }
}

impl<W> Leaf<W> {
    pub(super) fn new(age: Age) -> Self {
        // Many leaves have a single page.
        const { assert!(size_of::<W>() != 8 || size_of::<Self>() == 24) };
        Self {
            content: Content::Nothing,
            thrash_score: 0,
            age,
            splits: Splits::default(),
        }
    }

    /// Of a leaf without entries: whether it has had none for so many seconds, now that it is this `second`.
    pub(super) fn is_empty_for(&mut self, seconds: u16, second: u32) -> bool {
        match self.age.was_empty_for(second) {
            Some(past) => past >= seconds,
            None => {
                self.age = Age::empty(second);
                false
            }
        }
    }

    /// How many pages have a entry.
    #[inline]
    pub(super) fn len(&self) -> usize {
        self.entries().len()
    }

    /// The entries, in the order of their pages.
    #[inline]
    pub(super) fn entries(&self) -> &[W] {
        match &self.content {
            Content::Nothing => &[],
            Content::One(_, entry) => slice::from_ref(entry),
            Content::Many(many) => &many.entries,
        }
    }

    /// The entries, in the order of their pages.
    #[inline]
    pub(super) fn words_mut(&mut self) -> &mut [W] {
        match &mut self.content {
            Content::Nothing => &mut [],
            Content::One(_, entry) => slice::from_mut(entry),
            Content::Many(many) => &mut many.entries,
        }
    }

    /// Whether `page` has a entry.
    #[inline]
    pub(super) fn has(&self, page: usize) -> bool {
        match &self.content {
            Content::Nothing => false,
            Content::One(only, _) => usize::from(*only) == page,
            Content::Many(many) => many.has(page),
        }
    }

    /// How many pages before `page` have a entry, which is where the entry of `page` is.
    #[inline]
    pub(super) fn rank(&self, page: usize) -> usize {
        match &self.content {
            Content::Nothing => 0,
            Content::One(only, _) => usize::from(usize::from(*only) < page),
            Content::Many(many) => many.rank(page),
        }
    }

    /// The entry of `page`.
    pub(super) fn get_mut(&mut self, page: usize) -> Option<&mut W> {
        if !self.has(page) {
            return None;
        }
        let rank = self.rank(page);
        self.words_mut().get_mut(rank)
    }

    /// How many of `count` pages from `page` on have a entry; `None` if they reach over the end.
    pub(super) fn count(&self, page: usize, count: usize) -> Option<usize> {
        let end = page.checked_add(count).filter(|&end| end <= LEAF_PAGES)?;
        self.rank(end).checked_sub(self.rank(page))
    }

    /// The first page at or after `page` that has a entry.
    #[inline]
    pub(super) fn next(&self, page: usize) -> Option<usize> {
        match &self.content {
            Content::Nothing => None,
            Content::One(only, _) => Some(usize::from(*only)).filter(|&only| only >= page),
            Content::Many(many) => many.next(page),
        }
    }

    /// Gives `page`, which has none, a entry, of which `rank` are before it. `expected` says how many more
    /// entries are about to come, this one included. On failure the leaf is unchanged.
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
        // Room is made for all that are expected, once.
        if let Content::Many(many) = &mut self.content {
            if many.entries.len() < many.entries.capacity() {
                return many.insert_in_room(page, rank, entry);
            }
        }
        let more = expected.clamp(1, LEAF_PAGES.saturating_sub(self.len()).max(1));
        match self.many_with_room(more, flags) {
            Ok(many) => many.insert_in_room(page, rank, entry),
            Err(_) => Err(entry),
        }
    }

    /// Gives `count` pages from `page` on, behind all that have one, a entry each; `entry` makes the entry of
    /// the nth page. `None` or `false`: that was not possible, and nothing was done.
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
        for nth in 0..count {
            // There is room for all.
            if many.entries.push_within_capacity(entry(nth)).is_err() {
                return None;
            }
        }
        // INVARIANT: `count` bits more, and as many entries.
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

    /// Takes the entry of `page` away.
    pub(super) fn remove(&mut self, page: usize) -> Option<W> {
        if !self.has(page) {
            return None;
        }
        if let Content::Many(many) = &mut self.content {
            let rank = many.rank(page);
            let entry = many.entries.remove(rank).ok()?;
            // INVARIANT: one bit less, one entry less.
            many.clear_bit(page);
            self.give_back();
            return Some(entry);
        }
        match core::mem::replace(&mut self.content, Content::Nothing) {
            Content::One(_, entry) => Some(entry),
            _ => None,
        }
    }

    /// Takes away the entries of pages in `from..to` that `keep` does not keep. What it does keep stays where it
    /// is, and may have been changed.
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
                // A look at a gap that takes nothing away must not try again what was refused.
                if many.entries.len() != before {
                    self.give_back();
                }
            }
        }
    }

    /// Gives back what few entries do not need. If there is no memory to move them to, tries again when half of
    /// them are gone.
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
            // A quarter, so that a leaf whose pages come and go is not moved all the time. Do not try again with
            // each entry: a memory cgroup at its limit would refuse, and count, each attempt.
            len => {
                let few = many.entries.capacity() / 4;
                if len == few || len < few && len.is_power_of_two() {
                    // Charged like the memory that is given back.
                    let flags = GFP_NOWAIT | (GFP_KERNEL_ACCOUNT & !GFP_KERNEL);
                    let _ = many.move_to_room_for(len.saturating_mul(2), flags);
                }
            }
        }
    }

    /// The memory that the content takes besides the leaf itself, in bytes, without the allocator's own
    /// overhead.
    pub(super) fn bytes(&self) -> usize {
        match &self.content {
            Content::Many(many) => {
                let entries = many.entries.capacity().saturating_mul(size_of::<W>());
                entries.saturating_add(size_of::<Many<W>>())
            }
            _ => 0,
        }
    }

    /// The content as one of many entries, with room for `more`. On failure the leaf is unchanged.
    fn many_with_room(&mut self, more: usize, flags: Flags) -> Result<&mut Many<W>> {
        if !matches!(self.content, Content::Many(_)) {
            let mut many = Many::new(flags)?;
            many.make_room(self.len().saturating_add(more), flags)?;
            let before = core::mem::replace(&mut self.content, Content::Nothing);
            if let Content::One(page, entry) = before {
                // There is room.
                let _ = many.insert_in_room(usize::from(page), 0, entry);
            }
            self.content = Content::Many(many);
        }
        match &mut self.content {
            Content::Many(many) => {
                many.make_room(more, flags)?;
                Ok(many)
            }
            // Cannot be, see above.
            _ => Err(ENOMEM),
        }
    }
}
