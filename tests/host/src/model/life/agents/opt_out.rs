// SPDX-License-Identifier: GPL-2.0

//! `MADV_UNMERGEABLE`.

use crate::model::life::{Entry, State};

/// `MADV_UNMERGEABLE`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum OptOut {
    Lock,
    /// Unshare the page, if it is merged.
    Walk,
    /// Clear the flag.
    Clear,
    Done,
}

pub(super) fn opt_out(s: &mut State, p: usize) -> OptOut {
    match s.opt_out {
        OptOut::Lock => {
            s.processes[p].writer = true;
            OptOut::Walk
        }
        OptOut::Walk => {
            // A fault that fails ends the call, with success.
            if s.processes[p].entry != Entry::Empty {
                s.unshare(p);
            }
            OptOut::Clear
        }
        OptOut::Clear => {
            s.processes[p].mergeable = false;
            s.processes[p].writer = false;
            OptOut::Done
        }
        OptOut::Done => OptOut::Done,
    }
}
