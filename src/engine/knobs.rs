// SPDX-License-Identifier: GPL-2.0

//! The files in `/sys/kernel/mm/rksm/`: names, modes, formats, defaults and errors are those of the
//! files of the same name in `/sys/kernel/mm/ksm/`. Only `merge_eagerly` and `pass_millisecs`
//! are rksm's own.

use super::{run, Engine};
use crate::mm::{
    oom::OomOrigin,
    sysfs::{Directory, Input, Knob, Output},
};
use core::fmt::Write;
use kernel::{
    prelude::*,
    sync::atomic::{Atomic, Relaxed},
};

/// Pages per batch.
pub(super) const DEFAULT_PAGES_TO_SCAN: u32 = 100;
/// Milliseconds between batches.
pub(super) const DEFAULT_SLEEP_MILLISECS: u32 = 20;
/// Milliseconds from pass to pass, at least. In-tree KSM never looks at a page again so soon, for want
/// of speed; memory that changes from one moment to the next is not worth merging.
pub(super) const DEFAULT_PASS_MILLISECS: u32 = 1000;

const RUN: usize = 0;
const PAGES_TO_SCAN: usize = 1;
const SLEEP_MILLISECS: usize = 2;
const PAGES_SHARED: usize = 3;
const PAGES_SHARING: usize = 4;
const PAGES_UNSHARED: usize = 5;
const PAGES_VOLATILE: usize = 6;
const PAGES_SCANNED: usize = 7;
const FULL_SCANS: usize = 8;
const MERGE_EAGERLY: usize = 9;
const PASS_MILLISECS: usize = 10;
const SMART_SCAN: usize = 11;
const PAGES_SKIPPED: usize = 12;
const GENERAL_PROFIT: usize = 13;

impl Directory for Engine {
    const NAME: &'static CStr = c"rksm";

    // In the order of the constants above.
    const KNOBS: &'static [Knob] = &[
        Knob::rw(c"run"),
        Knob::rw(c"pages_to_scan"),
        Knob::rw(c"sleep_millisecs"),
        Knob::ro(c"pages_shared"),
        Knob::ro(c"pages_sharing"),
        Knob::ro(c"pages_unshared"),
        Knob::ro(c"pages_volatile"),
        Knob::ro(c"pages_scanned"),
        Knob::ro(c"full_scans"),
        // In-tree KSM has no such files.
        Knob::rw(c"merge_eagerly"),
        Knob::rw(c"pass_millisecs"),
        Knob::rw(c"smart_scan"),
        Knob::ro(c"pages_skipped"),
        Knob::ro(c"general_profit"),
    ];

    fn show(&self, knob: usize, out: &mut Output<'_>) -> Result {
        let value = match knob {
            GENERAL_PROFIT => {
                return writeln!(out, "{}", self.stats.profit()).map_err(|_| EINVAL);
            }
            RUN => u64::from(self.run()),
            PAGES_TO_SCAN => u64::from(self.pages_to_scan.load(Relaxed)),
            SLEEP_MILLISECS => u64::from(self.sleep_millisecs.load(Relaxed)),
            PAGES_SHARED => self.stats.shared.load(Relaxed),
            PAGES_SHARING => self.stats.sharing.load(Relaxed),
            PAGES_UNSHARED => self.stats.unshared.load(Relaxed),
            PAGES_VOLATILE => self.stats.volatile.load(Relaxed),
            PAGES_SCANNED => self.stats.scanned.load(Relaxed),
            FULL_SCANS => self.stats.full_scans.load(Relaxed),
            MERGE_EAGERLY => u64::from(self.merge_eagerly.load(Relaxed)),
            PASS_MILLISECS => u64::from(self.pass_millisecs.load(Relaxed)),
            SMART_SCAN => u64::from(self.smart_scan.load(Relaxed)),
            PAGES_SKIPPED => self.stats.skipped.load(Relaxed),
            _ => return Err(EINVAL),
        };
        writeln!(out, "{value}").map_err(|_| EINVAL)
    }

    fn store(&self, knob: usize, input: Input<'_>) -> Result {
        let set = |to: &Atomic<u32>| -> Result {
            to.store(input.parse_u32()?, Relaxed);
            Ok(())
        };
        match knob {
            RUN => self.set_run(input.parse_u32()?),
            PAGES_TO_SCAN => set(&self.pages_to_scan),
            SLEEP_MILLISECS => {
                set(&self.sleep_millisecs)?;
                self.wake();
                Ok(())
            }
            PASS_MILLISECS => {
                set(&self.pass_millisecs)?;
                self.wake();
                Ok(())
            }
            SMART_SCAN => {
                let on = input.parse_bool()?;
                self.smart_scan.store(on.into(), Relaxed);
                Ok(())
            }
            MERGE_EAGERLY => match input.parse_u32()? {
                eager @ 0..=1 => {
                    self.merge_eagerly.store(eager, Relaxed);
                    Ok(())
                }
                _ => Err(EINVAL),
            },
            _ => Err(EINVAL),
        }
    }
}

impl Engine {
    /// What a write to `run` does. Unmerging ends when everything is unmerged, or with `ENOMEM`,
    /// or with `ERESTARTSYS` when the writer has a signal pending; `run` is 0 then.
    fn set_run(&self, to: u32) -> Result {
        if to > run::UNMERGE {
            return Err(EINVAL);
        }
        let mut state = self.state.lock();
        // Unmerging again makes sense as long as something is left.
        let again = to == run::UNMERGE && !state.core.index.has_no_nodes();
        if self.run() == to && !again {
            return Ok(());
        }
        self.run.store(to, Relaxed);
        if to == run::UNMERGE {
            // Copies are about to be made: if memory runs out, blame the one who asked.
            let _origin = OomOrigin::current();
            self.unmerge_all(&mut state)
                .inspect_err(|_| self.run.store(run::STOP, Relaxed))?;
        }
        drop(state);
        self.wake();
        Ok(())
    }
}
