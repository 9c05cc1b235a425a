// SPDX-License-Identifier: GPL-2.0

//! A process that writes 2 to `run`.

use super::{abandon, Scan};
use crate::model::life::{Entry, Mutation, Protocol, State, Word, A, PROCESSES};

/// A process writes 2 to `run`, and 1 when that is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum RunTwo {
    /// Stop the scan between two of its steps, and let swap-in make copies from now on.
    Start,
    /// Wait for a swap-in that has already decided not to copy the page.
    Flush,
    /// Pin the users of a process and take its `mmap_lock`. The flag: all were unmerged so far.
    Lock(usize, bool),
    /// Take the unshare fault.
    Fault(usize, bool),
    /// Check the entry again, and release both.
    Look(usize, bool),
    /// Take the item off, under the lock of the node's page.
    Drop(usize, bool),
    /// If all were unmerged, free the node by force; report.
    Finish(bool),
    Done,
}

pub(super) fn run_two(model: &Protocol, s: &mut State) -> RunTwo {
    let wrong = model.mutation;
    let pins = wrong != Mutation::RunTwoUnpinned;
    match s.run_two {
        RunTwo::Start => {
            s.merging = false;
            s.copying = true;
            match wrong {
                Mutation::RunTwoIgnoresSwapIn => RunTwo::Lock(A, true),
                _ => RunTwo::Flush,
            }
        }
        RunTwo::Flush => RunTwo::Lock(A, true),
        RunTwo::Lock(PROCESSES, served) => RunTwo::Finish(served),
        RunTwo::Lock(p, served) => {
            let process = &mut s.processes[p];
            // Children that are forked meanwhile come later. Exiting processes need no unmerging.
            if !process.registered || !process.alive && pins {
                return RunTwo::Lock(p + 1, served);
            }
            if !process.mergeable && wrong == Mutation::RunTwoMergeableOnly {
                return RunTwo::Drop(p, served);
            }
            process.pins += u8::from(pins);
            process.readers += 1;
            match process.entry {
                Entry::Merged | Entry::Moving => RunTwo::Fault(p, served),
                _ => RunTwo::Look(p, served),
            }
        }
        RunTwo::Fault(p, served) => {
            s.unshare(p);
            RunTwo::Look(p, served)
        }
        RunTwo::Look(p, served) => {
            s.unlock_mmap(p);
            s.processes[p].pins -= u8::from(pins);
            let merged = s.processes[p].entry == Entry::Merged;
            if merged && wrong != Mutation::RunTwoTrustsFault {
                // It stays listed.
                return RunTwo::Lock(p + 1, false);
            }
            RunTwo::Drop(p, served)
        }
        RunTwo::Drop(p, served) => {
            let process = &s.processes[p];
            s.wrong.dropped |= process.counts() && process.entry == Entry::Merged;
            if s.detach(wrong, p) {
                s.set_word(p, Word::Nothing);
            }
            RunTwo::Lock(p + 1, served)
        }
        RunTwo::Finish(served) => {
            if served && s.node.alive && s.node.items == [false; PROCESSES] {
                abandon(s);
            }
            s.wrong.lied |= served
                && s.processes.iter().any(|p| {
                    p.counts() && matches!(p.entry, Entry::Merged | Entry::Orphan | Entry::Moving)
                });
            s.copying = false;
            s.merging = true;
            // The scan starts again.
            s.scan = Scan::Begin;
            RunTwo::Done
        }
        RunTwo::Done => RunTwo::Done,
    }
}
