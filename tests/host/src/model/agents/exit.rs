// SPDX-License-Identifier: GPL-2.0

//! The exit of B.

use crate::model::{Entry, State, B};

/// B exits. Its users are not pinned, but the scan may hold its `mmap_lock`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Exit {
    /// Unmap the page, with `mmap_lock` held for reading, which the scan may hold at the same time.
    Zap,
    /// Take `mmap_lock` for writing and free the page table.
    Free,
    Done,
}

pub(super) fn exit(s: &mut State) -> Exit {
    if s.exit != Exit::Zap {
        return Exit::Done;
    }
    if let Entry::Maps { frame, .. } = s.processes[B].entry {
        s.unmap(frame);
    }
    s.processes[B].entry = Entry::None;
    s.processes[B].tlb = None;
    s.processes[B].expected = None;
    Exit::Free
}
