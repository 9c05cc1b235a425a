// SPDX-License-Identifier: GPL-2.0

//! The fork of A.

use crate::model::life::{Entry, State, A, C};

/// A forks C.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Fork {
    Lock,
    Copy,
    Unlock,
    Done,
}

pub(super) fn fork(s: &mut State) -> Fork {
    match s.fork {
        Fork::Lock => {
            s.processes[A].writer = true;
            Fork::Copy
        }
        Fork::Copy => {
            if s.processes[A].entry == Entry::Own {
                s.processes[A].entry = Entry::Family;
            }
            let parent = s.processes[A];
            let child = &mut s.processes[C];
            child.entry = parent.entry;
            child.mergeable = parent.mergeable;
            child.alive = true;
            child.registered = true;
            Fork::Unlock
        }
        Fork::Unlock => {
            s.processes[A].writer = false;
            Fork::Done
        }
        Fork::Done => Fork::Done,
    }
}
