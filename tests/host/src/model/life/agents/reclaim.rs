// SPDX-License-Identifier: GPL-2.0

//! Reclaim.

use crate::model::life::{Agent, Entry, State, PROCESSES};

/// All mappings that a walk finds become swap entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Reclaim {
    Lock,
    Unmap,
    Done,
}

pub(super) fn reclaim(s: &mut State) -> Reclaim {
    match s.reclaim {
        Reclaim::Lock if s.node.page && s.node.lock.is_none() => {
            s.node.lock = Some(Agent::Reclaim);
            Reclaim::Unmap
        }
        Reclaim::Unmap => {
            for p in 0..PROCESSES {
                if s.processes[p].entry == Entry::Merged && s.is_found(p) {
                    s.processes[p].entry = Entry::Swapped;
                }
            }
            s.node.lock = None;
            Reclaim::Done
        }
        _ => Reclaim::Done,
    }
}
