// SPDX-License-Identifier: GPL-2.0

//! The fork of A.

use crate::model::{Entry, State, A, C};

/// A forks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Fork {
    /// Take A's `mmap_lock` for writing.
    Lock,
    /// Copy the entry, write-protect both.
    Copy,
    /// Flush A, and let both run.
    Flush,
    Done,
}

pub(super) fn fork(s: &mut State) -> Fork {
    match s.fork {
        Fork::Lock => {
            s.processes[A].writer = true;
            Fork::Copy
        }
        Fork::Copy => {
            match s.processes[A].entry {
                Entry::Maps { frame, .. } => {
                    let pinned = s.frames[frame].refs > s.frames[frame].maps;
                    if s.frames[frame].exclusive && pinned {
                        // The child gets a copy, so that the parent keeps what a device knows.
                        let copy = s.allocate(s.frames[frame].content);
                        s.frames[copy].exclusive = true;
                        s.frames[copy].maps = 1;
                        s.set(C, copy, true);
                    } else {
                        s.map(frame);
                        s.frames[frame].exclusive = false;
                        s.set(A, frame, false);
                        s.set(C, frame, false);
                    }
                }
                Entry::Moving { frame, .. } => {
                    let entry = Entry::Moving {
                        frame,
                        writable: false,
                    };
                    s.processes[A].entry = entry;
                    s.processes[C].entry = entry;
                }
                Entry::None => {}
            }
            s.processes[C].expected = s.processes[A].expected;
            Fork::Flush
        }
        Fork::Flush => {
            s.processes[A].tlb = None;
            s.processes[A].writer = false;
            Fork::Done
        }
        Fork::Done => Fork::Done,
    }
}
