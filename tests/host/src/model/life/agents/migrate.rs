// SPDX-License-Identifier: GPL-2.0

//! Migration.

use crate::model::life::{Agent, Entry, State, PROCESSES};

/// Migration: all mappings that a walk finds become migration entries, and mappings again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Migrate {
    Lock,
    Unmap,
    Remap,
    Done,
}

pub(super) fn migrate(s: &mut State) -> Migrate {
    match s.migrate {
        Migrate::Lock if s.node.page && s.node.lock.is_none() => {
            s.node.lock = Some(Agent::Migrate);
            Migrate::Unmap
        }
        Migrate::Unmap => {
            for p in 0..PROCESSES {
                if s.processes[p].entry == Entry::Merged && s.is_found(p) {
                    s.processes[p].entry = Entry::Moving;
                }
            }
            Migrate::Remap
        }
        Migrate::Remap => {
            for process in &mut s.processes {
                if process.entry == Entry::Moving {
                    process.entry = Entry::Merged;
                }
            }
            s.node.lock = None;
            Migrate::Done
        }
        _ => Migrate::Done,
    }
}
