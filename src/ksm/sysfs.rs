// SPDX-License-Identifier: GPL-2.0

//! The files in `/sys/kernel/mm/rksm/`.
//!
//! Names, modes, formats, defaults and errors are those of the files of the same name in `/sys/kernel/mm/ksm/`.
//! Only `merge_eagerly` and `pass_millisecs` are rksm's own.

use super::{run, Engine};
use crate::sys::{
    oom::OomOrigin,
    sysfs::{only_einval, Attribute, Directory, Input},
};
use kernel::{
    prelude::*,
    sync::atomic::{Atomic, Relaxed},
};

impl Directory for Engine {
    const NAME: &'static CStr = c"rksm";

    const ATTRIBUTES: &'static [Attribute<Self>] = &[
        // What to do, and how fast.
        Attribute::rw(
            c"run",
            |engine, out| out.line(engine.run()),
            |engine, input| engine.set_run(input.parse_u32().map_err(only_einval)?),
        ),
        Attribute::rw(
            c"pages_to_scan",
            |engine, out| out.line(engine.settings.pages_to_scan.load(Relaxed)),
            |engine, input| engine.set_pages_to_scan(&input),
        ),
        Attribute::rw(
            c"sleep_millisecs",
            |engine, out| out.line(engine.settings.sleep_millisecs.load(Relaxed)),
            |engine, input| {
                set(&engine.settings.sleep_millisecs, &input)?;
                engine.wake();
                Ok(())
            },
        ),
        Attribute::rw(
            c"smart_scan",
            |engine, out| out.line(engine.settings.smart_scan.load(Relaxed)),
            |engine, input| {
                let on = input.parse_bool().map_err(only_einval)?;
                engine.settings.smart_scan.store(on.into(), Relaxed);
                Ok(())
            },
        ),
        // What may be merged.
        Attribute::rw(
            c"use_zero_pages",
            |engine, out| out.line(engine.settings.use_zero_pages.load(Relaxed)),
            |engine, input| {
                engine.set_use_zero_pages(input.parse_bool().map_err(only_einval)?);
                Ok(())
            },
        ),
        Attribute::rw(
            c"max_page_sharing",
            |engine, out| out.line(engine.settings.max_page_sharing.load(Relaxed)),
            |engine, input| {
                let max = u32::try_from(input.parse_i32()?).map_err(|_| EINVAL)?;
                engine.set_max_page_sharing(max)
            },
        ),
        Attribute::rw(
            c"stable_node_chains_prune_millisecs",
            |engine, out| {
                out.line(
                    engine
                        .settings
                        .stable_node_chains_prune_millisecs
                        .load(Relaxed),
                )
            },
            |engine, input| set(&engine.settings.stable_node_chains_prune_millisecs, &input),
        ),
        Attribute::rw(
            c"merge_across_nodes",
            |engine, out| out.line(engine.settings.merge_across_nodes.load(Relaxed)),
            |engine, input| match input.parse_u64()? {
                across @ 0..=1 => engine.set_merge_across_nodes(across != 0),
                _ => Err(EINVAL),
            },
        ),
        // The advisor, which sets `pages_to_scan`.
        Attribute::rw(
            c"advisor_mode",
            |engine, out| {
                out.line(if engine.advisor.lock().is_on() {
                    "none [scan-time]"
                } else {
                    "[none] scan-time"
                })
            },
            |engine, input| engine.set_advisor_mode(&input),
        ),
        Attribute::rw(
            c"advisor_max_cpu",
            |engine, out| out.line(engine.advisor.lock().limits.max_cpu),
            |engine, input| {
                // As in-tree: cut off higher bits.
                let value = input.parse_u64().map_err(only_einval)? as u32;
                engine.advisor.lock().limits.max_cpu = value;
                Ok(())
            },
        ),
        Attribute::rw(
            c"advisor_min_pages_to_scan",
            |engine, out| out.line(engine.advisor.lock().limits.min_pages),
            |engine, input| {
                let value = input.parse_u64().map_err(only_einval)?;
                engine.advisor.lock().limits.min_pages = value;
                Ok(())
            },
        ),
        Attribute::rw(
            c"advisor_max_pages_to_scan",
            |engine, out| out.line(engine.advisor.lock().limits.max_pages),
            |engine, input| {
                let value = input.parse_u64().map_err(only_einval)?;
                engine.advisor.lock().limits.max_pages = value;
                Ok(())
            },
        ),
        Attribute::rw(
            c"advisor_target_scan_time",
            |engine, out| out.line(engine.advisor.lock().limits.target_secs),
            |engine, input| match input.parse_u64() {
                Ok(value @ 1..) => {
                    engine.advisor.lock().limits.target_secs = value;
                    Ok(())
                }
                _ => Err(EINVAL),
            },
        ),
        // Statistics.
        Attribute::ro(c"pages_shared", |engine, out| {
            out.line(engine.stats.shared.load(Relaxed))
        }),
        Attribute::ro(c"pages_sharing", |engine, out| {
            out.line(engine.stats.sharing.load(Relaxed))
        }),
        Attribute::ro(c"pages_unshared", |engine, out| {
            out.line(engine.stats.unshared.load(Relaxed))
        }),
        Attribute::ro(c"pages_volatile", |engine, out| {
            out.line(engine.stats.volatile.load(Relaxed))
        }),
        Attribute::ro(c"pages_scanned", |engine, out| {
            out.line(engine.stats.scanned.load(Relaxed))
        }),
        Attribute::ro(c"ksm_zero_pages", |_, out| {
            out.line(crate::mm::zero_pages())
        }),
        Attribute::ro(c"stable_node_chains", |engine, out| {
            out.line(engine.stats.chains.load(Relaxed))
        }),
        Attribute::ro(c"stable_node_dups", |engine, out| {
            out.line(engine.stats.dups.load(Relaxed))
        }),
        Attribute::ro(c"pages_skipped", |engine, out| {
            out.line(engine.stats.skipped.load(Relaxed))
        }),
        Attribute::ro(c"full_scans", |engine, out| {
            out.line(engine.stats.full_scans.load(Relaxed))
        }),
        Attribute::ro(c"general_profit", |engine, out| {
            out.line(engine.stats.profit())
        }),
        // These files are rksm's own.
        Attribute::rw(
            c"merge_eagerly",
            |engine, out| out.line(engine.settings.merge_eagerly.load(Relaxed)),
            |engine, input| match input.parse_u32() {
                Ok(eager @ 0..=1) => {
                    engine.settings.merge_eagerly.store(eager, Relaxed);
                    Ok(())
                }
                _ => Err(EINVAL),
            },
        ),
        Attribute::rw(
            c"pass_millisecs",
            |engine, out| out.line(engine.settings.pass_millisecs.load(Relaxed)),
            |engine, input| {
                set(&engine.settings.pass_millisecs, &input)?;
                engine.wake();
                Ok(())
            },
        ),
    ];
}

/// Stores a number in `to`. Any input but a `u32` is `EINVAL`.
fn set(to: &Atomic<u32>, input: &Input<'_>) -> Result {
    to.store(input.parse_u32().map_err(only_einval)?, Relaxed);
    Ok(())
}

impl Engine {
    /// Handles a write to `pages_to_scan`. `EINVAL` while the advisor is on.
    fn set_pages_to_scan(&self, input: &Input<'_>) -> Result {
        let advisor = self.advisor.lock();
        if advisor.is_on() {
            return Err(EINVAL);
        }
        set(&self.settings.pages_to_scan, input)
    }

    /// Handles a write to `advisor_mode`. `EINVAL` for an unknown mode.
    fn set_advisor_mode(&self, input: &Input<'_>) -> Result {
        let on = match input {
            _ if input.is(c"scan-time") => true,
            _ if input.is(c"none") => false,
            _ => return Err(EINVAL),
        };
        let mut advisor = self.advisor.lock();
        if let Some(pages) = advisor.switch(on) {
            self.settings.pages_to_scan.store(pages, Relaxed);
        }
        Ok(())
    }

    /// Handles a write to `run`. May sleep.
    ///
    /// A write of 2 returns when everything is unmerged. On failure `run` is 0 afterwards.
    ///
    /// # Errors
    ///
    /// * `EINVAL`: the value is none of [`run`].
    /// * `EBUSY`: a page could not be unshared, because of a userfaultfd monitor.
    /// * `ENOMEM`: there was no memory for the copies.
    /// * `ERESTARTSYS`: a signal arrived.
    fn set_run(&self, to: u32) -> Result {
        if to > run::UNMERGE {
            return Err(EINVAL);
        }
        let state = self.lock_idle()?;
        // Unmerge again even if `run` is 2 already, as long as nodes are left.
        let again = to == run::UNMERGE && !state.core.index.has_no_nodes();
        if self.run() == to && !again {
            return Ok(());
        }
        self.run.store(to, Relaxed);
        let mut result = Ok(());
        if to == run::UNMERGE {
            self.unmerging.store(true, Relaxed);
            drop(state);
            // Unmerging makes copies. If memory runs out, make the OOM killer blame the writer.
            let origin = OomOrigin::current();
            result = self.unmerge_all();
            drop(origin);
            let state = self.state.lock();
            if result.is_err() {
                self.run.store(run::STOP, Relaxed);
            }
            self.unmerging.store(false, Relaxed);
            drop(state);
            self.settled.notify_all();
        }
        // Wake the thread for deferred work that unmerging has left, too.
        self.wake();
        result
    }
}
