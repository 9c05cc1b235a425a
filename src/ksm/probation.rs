// SPDX-License-Identifier: GPL-2.0

//! Strikes and probation, for pages that are written to soon after each merge.
//!
//! A sample covers eight of the 512 words of a page, so it may hold while the others change. Such a page looks
//! steady, but each merge is followed by a copy-on-write fault. So a page that is written to soon after a merge
//! gets a *strike*. A page with strikes is on *probation*: it merges again only after its full checksum has
//! held. The more strikes, the longer it must hold.

use crate::hash::Checksum;

/// A write up to this many beats (see [`Clock`]) after a merge comes too soon.
const SOON_BEATS: u32 = 4;

/// With up to this many strikes, the full checksum need only hold from one scan of the page to the next. So
/// content that is replaced a few times merges as quickly as it did the first time.
const FREE: u8 = 5;

/// The most strikes that a page gets for changes while it is not merged. More are given only for merges in
/// vain.
const CHANGE_LIMIT: u8 = FREE + 1;

/// The most strikes. The checksum must hold for 64 seconds then.
const MAX: u8 = FREE + 5;

/// Returns for how many seconds the checksum of a page with this many strikes must hold: 0, then 4, 8, and so
/// on.
const fn hold_secs(strikes: u8) -> u32 {
    match strikes.checked_sub(FREE) {
        None | Some(0) => 0,
        Some(beyond) => 2 << beyond,
    }
}

/// The strikes of a page: a measure of how likely it is that merging it is in vain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Strikes(u8);

impl Strikes {
    /// No strikes.
    pub(crate) const NONE: Self = Self(0);

    /// The number of bits that [`Self::get`] uses.
    pub(crate) const BITS: u32 = 4;

    /// Makes strikes of what [`Self::get`] returned. Higher bits are ignored.
    pub(crate) const fn from_raw(raw: u64) -> Self {
        let raw = (raw & ((1 << Self::BITS) - 1)) as u8;
        Self(if raw < MAX { raw } else { MAX })
    }

    /// Returns the number of strikes.
    pub(crate) const fn get(self) -> u64 {
        self.0 as u64
    }

    /// Whether there are no strikes.
    pub(crate) const fn is_none(self) -> bool {
        self.0 == 0
    }

    /// Whether the checksum need only hold from one scan to the next, see [`FREE`].
    pub(crate) const fn are_few(self) -> bool {
        self.0 <= FREE
    }

    /// Returns the strikes of a merged page after a write `age` beats after the merge.
    ///
    /// `hidden`: the sample is the same as before.
    pub(crate) fn after_write(self, age: u32, hidden: bool) -> Self {
        if is_soon(age) && hidden && self.are_few() {
            self.after_change()
        } else if is_soon(age) {
            Self(self.0.saturating_add(1).min(MAX))
        } else if age <= hold_secs(self.0) {
            // The page was merged for no longer than its probation took.
            self
        } else {
            Self::NONE
        }
    }

    /// Returns the strikes of a page that is not merged after its content has changed under the same sample.
    ///
    /// Such a change counts double. If the content had been replaced, the sample would show it, so this is one
    /// of many small writes.
    pub(crate) fn after_change(self) -> Self {
        Self(self.0.saturating_add(2).min(CHANGE_LIMIT).max(self.0))
    }
}

/// Whether a write `age` beats after a merge comes too soon.
pub(crate) const fn is_soon(age: u32) -> bool {
    age <= SOON_BEATS
}

/// A few bits of a full checksum. They miss a change of the page once in 65,535 times.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Print(u16);

impl Print {
    /// The print of a page whose checksum is not known.
    pub(crate) const UNKNOWN: Self = Self(0);

    /// Returns the print of a page with this checksum.
    pub(crate) fn of(sum: Checksum) -> Self {
        match sum.is_unknown() {
            true => Self::UNKNOWN,
            false => Self((sum.get() as u16).max(1)),
        }
    }
}

/// What is remembered of a page that has strikes, or whose checksum is to be compared with an earlier one.
///
/// It fits beside the sample in a [`PageEntry`](super::entry::PageEntry).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Probation {
    strikes: Strikes,
    print: Print,
    /// The second in which the checksum has held long enough, modulo [`SECS`].
    until: u32,
}

const UNTIL_BITS: u32 = 9;
/// More than twice the longest probation, so that a time that is over can be told from one still to come.
const SECS: u32 = 1 << UNTIL_BITS;
const UNTIL_SHIFT: u32 = Strikes::BITS;
const PRINT_SHIFT: u32 = UNTIL_SHIFT + UNTIL_BITS;
const _: () = assert!(2 * hold_secs(MAX) < SECS && Probation::BITS == 29);

/// The result of comparing a full checksum with the earlier one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It is the same.
    Held,
    /// There was no earlier one. It is remembered from now on.
    Begun,
    /// It differs: the content has changed.
    Moved,
}

impl Probation {
    /// The number of bits that [`Self::get`] uses. All of them are zero if the page is not on probation.
    pub(crate) const BITS: u32 = PRINT_SHIFT + u16::BITS;

    /// Begins the probation of a page with this print in the second `now`.
    pub(crate) fn new(strikes: Strikes, print: Print, now: u32) -> Self {
        if strikes.is_none() && print == Print::UNKNOWN {
            return Self::NONE;
        }
        let until = now.wrapping_add(hold_secs(strikes.0)) % SECS;
        Self {
            strikes,
            print,
            until,
        }
    }

    /// Makes a probation of what [`Self::get`] returned.
    pub(crate) fn from_raw(raw: u32) -> Self {
        Self {
            strikes: Strikes::from_raw(raw.into()),
            print: Print((raw >> PRINT_SHIFT) as u16),
            until: (raw >> UNTIL_SHIFT) % SECS,
        }
    }

    /// Returns the probation as [`Self::BITS`] bits.
    pub(crate) fn get(self) -> u32 {
        u32::from(self.print.0) << PRINT_SHIFT
            | self.until << UNTIL_SHIFT
            | u32::from(self.strikes.0)
    }

    /// The probation of a page that is not on probation.
    pub(crate) const NONE: Self = Self {
        strikes: Strikes::NONE,
        print: Print::UNKNOWN,
        until: 0,
    };

    /// Whether the full checksum is to be computed now: to remember it, or because the page may merge if it has
    /// held.
    pub(crate) fn is_due(self, clock: &Clock) -> bool {
        let hold = hold_secs(self.strikes.0);
        let left = self.until.wrapping_sub(clock.secs()) % SECS;
        // Passes may be minutes apart, so that the time is over by more than `SECS` can tell. A time that was
        // over long ago may then look like one in the future, but only for as long as the probation takes.
        self.print == Print::UNKNOWN || left == 0 || left > hold || clock.between >= hold
    }

    /// Compares the page's checksum with the earlier one. Returns the result, and the new probation.
    pub(crate) fn check(self, sum: Checksum, now: u32) -> (Verdict, Self) {
        let print = Print::of(sum);
        let Self { strikes, .. } = self;
        if self.print == Print::UNKNOWN {
            (Verdict::Begun, Self::new(strikes, print, now))
        } else if self.print == print {
            // The time is over, and does not begin again. Without strikes, the comparison was all that was
            // needed.
            let held = match strikes.is_none() {
                true => Self::NONE,
                false => self,
            };
            (Verdict::Held, held)
        } else {
            (
                Verdict::Moved,
                Self::new(strikes.after_change(), print, now),
            )
        }
    }

    /// Returns the probation with one strike less, after the page has not changed for a long time.
    ///
    /// It keeps the print, even without strikes: whether the checksum holds is still to be checked.
    pub(crate) fn eased(self) -> Self {
        let strikes = Strikes(self.strikes.0.saturating_sub(1));
        if strikes.is_none() && self.print == Print::UNKNOWN {
            return Self::NONE;
        }
        Self { strikes, ..self }
    }
}

/// The time, in seconds and in beats. It stands still during a pass.
pub(crate) struct Clock {
    /// The second in which the pass began. The zero point does not matter.
    secs: u32,
    /// The seconds from the beginning of the previous pass to that of this one.
    between: u32,
    /// Counts passes, but only the first of those that begin in one second. If passes take milliseconds, the
    /// last few of them say little about a page.
    beat: u32,
}

impl Clock {
    /// Creates a clock before the first pass.
    pub(crate) const fn new() -> Self {
        Self {
            secs: 0,
            between: 0,
            beat: 0,
        }
    }

    /// Notes that a pass begins in the second `secs`.
    pub(crate) fn begin_pass(&mut self, secs: u32) {
        self.between = secs.wrapping_sub(self.secs);
        if secs != self.secs {
            self.secs = secs;
            self.beat = self.beat.wrapping_add(1);
        }
    }

    /// Returns the second in which the pass began.
    pub(crate) fn secs(&self) -> u32 {
        self.secs
    }

    /// Returns the number of the beat, modulo 2 to the power of [`BEAT_BITS`].
    pub(crate) fn beat(&self) -> u32 {
        self.beat % (1 << BEAT_BITS)
    }

    /// Returns how many beats have passed since the beat with this number.
    pub(crate) fn beats_since(&self, beat: u32) -> u32 {
        self.beat.wrapping_sub(beat) % (1 << BEAT_BITS)
    }
}

/// How many bits of the number of a beat are kept with a merged page.
pub(crate) const BEAT_BITS: u32 = u32::BITS - Strikes::BITS;

/// What is remembered of a merged page in its rmap item: when it was merged, and its strikes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MergeInfo(u32);

impl MergeInfo {
    /// A page without strikes that is merged now.
    pub(crate) fn now(clock: &Clock) -> Self {
        Self(clock.beat() << Strikes::BITS)
    }

    /// The same with these strikes.
    pub(crate) fn with_strikes(self, strikes: Strikes) -> Self {
        Self(self.beat() << Strikes::BITS | u32::from(strikes.0))
    }

    /// Makes it of what [`Self::get`] returned.
    pub(crate) const fn from_raw(raw: u32) -> Self {
        Self(raw)
    }

    /// Returns it as 32 bits.
    pub(crate) const fn get(self) -> u32 {
        self.0
    }

    /// Returns the beat in which the page was merged.
    pub(crate) const fn beat(self) -> u32 {
        self.0 >> Strikes::BITS
    }

    /// Returns the strikes that the page had when it was merged.
    pub(crate) fn strikes(self) -> Strikes {
        Strikes::from_raw(self.0.into())
    }
}
