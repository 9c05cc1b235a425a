// SPDX-License-Identifier: GPL-2.0

//! Migration.

use crate::model::{Agent, Entry, Protocol, State, A, B, C, PROCESSES};

/// Migration of one process's page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Migrate {
    /// Take a reference.
    Isolate,
    /// Try to lock it.
    Lock {
        page: usize,
    },
    /// Replace its mapping in this process by a migration entry, if the walk finds it.
    Unmap {
        page: usize,
        process: usize,
    },
    /// Count references; copy.
    Move {
        page: usize,
    },
    /// Replace the migration entries by mappings of the copy, or of the page if the move failed.
    Remap {
        page: usize,
        to: usize,
        process: usize,
    },
    /// Unlock, drop references.
    Finish {
        page: usize,
        to: usize,
    },
    Done,
}

pub(super) fn migrate(model: &Protocol, s: &mut State) -> Migrate {
    match s.migrate {
        Migrate::Isolate => {
            let whose = model.migrate.unwrap_or(B);
            let Entry::Maps { frame: page, .. } = s.processes[whose].entry else {
                return Migrate::Done;
            };
            s.frames[page].refs += 1;
            Migrate::Lock { page }
        }
        Migrate::Lock { page } => {
            if s.frames[page].lock.is_some() {
                s.put(page);
                return Migrate::Done;
            }
            s.frames[page].lock = Some(Agent::Migrate);
            Migrate::Unmap {
                page,
                process: WALK[0],
            }
        }
        Migrate::Unmap { page, process } => {
            let known = !s.frames[page].ksm || s.node.leads_to(process);
            if let (true, Some(writable)) = (known, s.maps(process, page)) {
                let writable = writable && s.frames[page].exclusive;
                s.processes[process].tlb = None;
                s.processes[process].entry = Entry::Moving {
                    frame: page,
                    writable,
                };
                s.unmap(page);
            }
            match next_of(process) {
                Some(process) => Migrate::Unmap { page, process },
                None => Migrate::Move { page },
            }
        }
        Migrate::Move { page } => {
            let frame = s.frames[page];
            s.missed |= frame.ksm && frame.maps != 0;
            let mut to = page;
            if frame.refs == 1 {
                to = s.allocate(frame.content);
                s.frames[to].lock = Some(Agent::Migrate);
                s.frames[to].exclusive = frame.exclusive;
                if frame.ksm {
                    s.node.frame = to;
                    s.frames[to].ksm = true;
                    s.frames[page].ksm = false;
                }
            }
            Migrate::Remap {
                page,
                to,
                process: WALK[0],
            }
        }
        Migrate::Remap { page, to, process } => {
            if let Entry::Moving { frame, writable } = s.processes[process].entry {
                if frame == page {
                    s.map(to);
                    s.frames[to].exclusive &= writable;
                    s.set(process, to, writable);
                }
            }
            match next_of(process) {
                Some(process) => Migrate::Remap { page, to, process },
                None => Migrate::Finish { page, to },
            }
        }
        Migrate::Finish { page, to } => {
            s.frames[page].lock = None;
            s.frames[to].lock = None;
            if to != page {
                s.put(to);
            }
            s.put(page);
            Migrate::Done
        }
        Migrate::Done => Migrate::Done,
    }
}

/// The order of an rmap walk: parents before their children.
const WALK: [usize; PROCESSES] = [A, C, B];

fn next_of(process: usize) -> Option<usize> {
    let at = WALK.iter().position(|&p| p == process)?;
    WALK.get(at + 1).copied()
}
