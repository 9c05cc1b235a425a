// SPDX-License-Identifier: GPL-2.0

//! A read of a page that is swapped out.

use crate::model::life::{Agent, Entry, State};

/// A process reads the page while it is swapped out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum SwapIn {
    /// Wait for the lock of the page, which is in the swap cache.
    Fault,
    /// Decide whether it has to be copied.
    Decide,
    Map {
        copy: bool,
    },
    Done,
}

pub(super) fn swap_in(s: &mut State, p: usize) -> SwapIn {
    match s.swap_in {
        SwapIn::Fault if s.processes[p].entry == Entry::Swapped => {
            s.node.lock = Some(Agent::SwapIn);
            s.processes[p].readers += 1;
            SwapIn::Decide
        }
        SwapIn::Decide => SwapIn::Map { copy: s.copying },
        SwapIn::Map { copy } => {
            s.processes[p].entry = if copy { Entry::Own } else { Entry::Merged };
            s.node.lock = None;
            s.unlock_mmap(p);
            SwapIn::Done
        }
        _ => SwapIn::Done,
    }
}
