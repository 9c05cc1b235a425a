// SPDX-License-Identifier: GPL-2.0

//! The exit of a process.

use crate::model::life::{Entry, State};

/// A process exits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Exit {
    /// Stop using the address space.
    Leave,
    /// The last user is gone: tell the engine.
    Tell,
    /// Unmap the page, with `mmap_lock` held for reading.
    Zap,
    /// Take `mmap_lock` for writing and free the page table.
    Free,
    Done,
}

pub(super) fn exit(s: &mut State, p: usize) -> Exit {
    let process = &mut s.processes[p];
    match s.exit {
        Exit::Leave => {
            process.alive = false;
            Exit::Tell
        }
        Exit::Tell => {
            process.registered = false;
            Exit::Zap
        }
        Exit::Zap => {
            process.entry = Entry::Empty;
            Exit::Free
        }
        Exit::Free => {
            s.wrong.leaked |= process.entry != Entry::Empty;
            Exit::Done
        }
        Exit::Done => Exit::Done,
    }
}
