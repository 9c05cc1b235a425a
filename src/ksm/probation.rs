// SPDX-License-Identifier: GPL-2.0

//! Pages that are not worth merging because they are written to soon after.
//!
//! A sample is made of eight entries of a page, so it holds while the other 504 change, and a page that looks as
//! if it held still is merged and broken again, for nothing. Each time that happens the page gets a *strike*.
//! A page with strikes is on *probation*: it is merged again only after its full checksum has held, and the more
//! strikes it has, the longer that must be.

use crate::hash::Checksum;

/// A write within so many beats (see [`Clock`]) after a merge comes too soon.
const SOON_BEATS: u32 = 4;

/// With up to so many strikes it is enough that the full checksum holds from one look to the next. So content
/// that is replaced a few times merges as quickly as it did the first time.
const FREE: u8 = 4;

/// Changes that are seen while the page is not merged bring it up to so many strikes. More are only given
/// for merges that came to nothing.
const CHANGE_LIMIT: u8 = FREE + 1;

/// The most strikes: 64 s to hold still.
const MAX: u8 = FREE + 5;

/// How many seconds a page with so many strikes has to hold still: none, then 4, 8, and so on.
const fn hold_secs(strikes: u8) -> u32 {
    match strikes.checked_sub(FREE) {
        None | Some(0) => 0,
        Some(more) => 2 << more,
    }
}

/// How much a page has done to be taken for volatile.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Strikes(u8);

impl Strikes {
    /// A page without strikes.
    pub(crate) const NONE: Self = Self(0);

    /// How many bits [`Self::get`] takes.
    pub(crate) const BITS: u32 = 4;

    /// Takes back what [`Self::get`] gave.
    pub(crate) const fn from_raw(raw: u64) -> Self {
        let raw = (raw & ((1 << Self::BITS) - 1)) as u8;
        Self(if raw < MAX { raw } else { MAX })
    }

    /// The number.
    pub(crate) const fn get(self) -> u64 {
        self.0 as u64
    }

    /// Whether there is none.
    pub(crate) const fn is_none(self) -> bool {
        self.0 == 0
    }

    /// Whether it is enough that its checksum holds from one look to the next, see [`FREE`].
    pub(crate) const fn are_few(self) -> bool {
        self.0 <= FREE
    }

    /// Of a merged page, when it is written to `age` beats after it was merged. `hidden`: its sample is what it
    /// was.
    pub(crate) fn after_write(self, age: u32, hidden: bool) -> Self {
        if is_soon(age) && hidden && self.are_few() {
            self.after_change()
        } else if is_soon(age) {
            Self(self.0.saturating_add(1).min(MAX))
        } else if age <= hold_secs(self.0) {
            // It was not merged for longer than it had to wait for it.
            self
        } else {
            Self::NONE
        }
    }

    /// Of a page that is not merged, when its content is not what it was but its sample is. Counts double: content
    /// that is replaced would show in the sample, so this is the next of many small writes.
    pub(crate) fn after_change(self) -> Self {
        Self(self.0.saturating_add(2).min(CHANGE_LIMIT).max(self.0))
    }
}

/// Whether a write `age` beats after a merge comes too soon.
pub(crate) const fn is_soon(age: u32) -> bool {
    age <= SOON_BEATS
}

/// A few bits of a full checksum: enough to see that a page changed, all but once in 65,535 times.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Print(u16);

impl Print {
    /// Of a page whose checksum is not known.
    pub(crate) const UNKNOWN: Self = Self(0);

    /// Of the page that has this checksum.
    pub(crate) fn of(sum: Checksum) -> Self {
        match sum.is_unknown() {
            true => Self::UNKNOWN,
            false => Self((sum.get() as u16).max(1)),
        }
    }
}

/// What is kept of a page that has strikes, or whose checksum is to be compared with the one it had: fits beside
/// the sample in a [`PageEntry`](crate::mm::entry::PageEntry).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Probation {
    strikes: Strikes,
    print: Print,
    /// The second in which the page has held still long enough, modulo [`SECS`].
    until: u32,
}

const UNTIL_BITS: u32 = 9;
/// Long enough to tell what is over from what is still to come.
const SECS: u32 = 1 << UNTIL_BITS;
const UNTIL_SHIFT: u32 = Strikes::BITS;
const PRINT_SHIFT: u32 = UNTIL_SHIFT + UNTIL_BITS;
const _: () = assert!(2 * hold_secs(MAX) < SECS && Probation::BITS == 29);

/// What a look at the full checksum came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It is what it was.
    Held,
    /// There was none to compare it with.
    Begun,
    /// The content has changed.
    Moved,
}

impl Probation {
    /// How many bits [`Self::get`] takes. All of them are zero when the page is not on probation.
    pub(crate) const BITS: u32 = PRINT_SHIFT + u16::BITS;

    /// That of a page which has this checksum, now that it is the second `now`.
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

    /// Takes back what [`Self::get`] gave.
    pub(crate) fn from_raw(raw: u32) -> Self {
        Self {
            strikes: Strikes::from_raw(raw.into()),
            print: Print((raw >> PRINT_SHIFT) as u16),
            until: (raw >> UNTIL_SHIFT) % SECS,
        }
    }

    /// The bits.
    pub(crate) fn get(self) -> u32 {
        u32::from(self.print.0) << PRINT_SHIFT
            | self.until << UNTIL_SHIFT
            | u32::from(self.strikes.0)
    }

    /// That of a page which is not on probation.
    pub(crate) const NONE: Self = Self {
        strikes: Strikes::NONE,
        print: Print::UNKNOWN,
        until: 0,
    };

    /// Whether the page's full checksum is to be looked at now: to remember it, or because the page has to hold
    /// still no longer if it is still the same.
    pub(crate) fn is_due(self, clock: &Clock) -> bool {
        let hold = hold_secs(self.strikes.0);
        let left = self.until.wrapping_sub(clock.secs()) % SECS;
        // The time began before this pass, and where passes take minutes it may be over by more than can be told.
        // What was over long ago may seem to be still to come, but not for longer than it took.
        self.print == Print::UNKNOWN || left == 0 || left > hold || clock.between >= hold
    }

    /// Compares the page's checksum with the one it had. Returns also how the page is to be remembered.
    pub(crate) fn check(self, sum: Checksum, now: u32) -> (Verdict, Self) {
        let print = Print::of(sum);
        let Self { strikes, .. } = self;
        if self.print == Print::UNKNOWN {
            (Verdict::Begun, Self::new(strikes, print, now))
        } else if self.print == print {
            // Its time is over, and need not begin anew. Without strikes, there was only this to find out.
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

    /// With a strike less, after a long time without a change. The checksum is kept to the last: it is still to
    /// be found out whether that holds.
    pub(crate) fn eased(self) -> Self {
        let strikes = Strikes(self.strikes.0.saturating_sub(1));
        if strikes.is_none() && self.print == Print::UNKNOWN {
            return Self::NONE;
        }
        Self { strikes, ..self }
    }
}

/// The time, as far as it matters here. It stands still during a pass.
pub(crate) struct Clock {
    /// Seconds since some moment.
    secs: u32,
    /// How many there are between the beginnings of the last pass and of this one.
    between: u32,
    /// Counts passes, but of those that begin in one second only the first: what a page did in the last few
    /// passes says little about it when these took some milliseconds.
    beat: u32,
}

impl Clock {
    pub(crate) const fn new() -> Self {
        Self {
            secs: 0,
            between: 0,
            beat: 0,
        }
    }

    /// A pass begins in this second.
    pub(crate) fn begin_pass(&mut self, secs: u32) {
        self.between = secs.wrapping_sub(self.secs);
        if secs != self.secs {
            self.secs = secs;
            self.beat = self.beat.wrapping_add(1);
        }
    }

    /// The second in which the pass began.
    pub(crate) fn secs(&self) -> u32 {
        self.secs
    }

    /// The number of the beat, of which [`BEAT_BITS`] are good for [`Self::beats_since`].
    pub(crate) fn beat(&self) -> u32 {
        self.beat % (1 << BEAT_BITS)
    }

    /// How many beats ago the beat with this number was.
    pub(crate) fn beats_since(&self, beat: u32) -> u32 {
        self.beat.wrapping_sub(beat) % (1 << BEAT_BITS)
    }
}

/// How many bits of the number of a beat are kept with a merged page.
pub(crate) const BEAT_BITS: u32 = u32::BITS - Strikes::BITS;
