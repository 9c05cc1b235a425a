// SPDX-License-Identifier: GPL-2.0

//! A store by a thread of a process.

use super::Fork;
use crate::model::{Agent, Entry, State, A, C};

/// A store by a thread of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Store {
    /// Store through the TLB, fill it, or fault.
    Try,
    /// In the fault: look at the entry, under the page-table lock.
    Fault,
    /// Copy the page, with a reference held.
    Copy {
        page: usize,
    },
    /// Map the copy instead, if the page is still there.
    Replace {
        page: usize,
        copy: usize,
    },
    /// Set the entry, which is flushed.
    Set {
        page: usize,
        copy: usize,
    },
    Done,
}

pub(super) fn store(s: &mut State, p: usize) -> Store {
    match s.stores[p] {
        Store::Try => {
            if s.processes[p].expected.is_none() {
                return Store::Done;
            }
            if let Some((frame, true)) = s.processes[p].tlb {
                s.frames[frame].content = p as u8 + 1;
                s.processes[p].expected = Some(p as u8 + 1);
                // Another thread of a forking process: until the flush, the child may see the store as well.
                if p == A && s.fork == Fork::Flush && s.maps(C, frame).is_some() {
                    s.processes[C].expected = s.processes[A].expected;
                }
                return Store::Done;
            }
            if let Entry::Maps {
                frame,
                writable: true,
            } = s.processes[p].entry
            {
                s.processes[p].tlb = Some((frame, true));
                return Store::Try;
            }
            s.processes[p].readers += 1;
            Store::Fault
        }
        Store::Fault => {
            let Entry::Maps {
                frame: page,
                writable,
            } = s.processes[p].entry
            else {
                // The entry was zapped meanwhile.
                s.processes[p].readers -= 1;
                return Store::Try;
            };
            let frame = &mut s.frames[page];
            let alone = !frame.ksm && frame.refs == 1 && frame.lock.is_none();
            if writable || frame.exclusive || alone {
                frame.exclusive = true;
                s.set(p, page, true);
                s.processes[p].tlb = None;
                s.processes[p].readers -= 1;
                return Store::Try;
            }
            frame.refs += 1;
            Store::Copy { page }
        }
        Store::Copy { page } => {
            let copy = s.allocate(s.frames[page].content);
            Store::Replace { page, copy }
        }
        Store::Replace { page, copy } => {
            if s.maps(p, page) != Some(false) {
                s.put(copy);
                s.put(page);
                s.processes[p].readers -= 1;
                return Store::Try;
            }
            s.processes[p].ptl = Some(Agent::Store(p));
            s.processes[p].entry = Entry::None;
            s.processes[p].tlb = None;
            Store::Set { page, copy }
        }
        Store::Set { page, copy } => {
            s.frames[copy].exclusive = true;
            s.map(copy);
            s.put(copy);
            s.set(p, copy, true);
            s.unmap(page);
            s.put(page);
            s.processes[p].ptl = None;
            s.processes[p].readers -= 1;
            Store::Try
        }
        Store::Done => Store::Done,
    }
}
