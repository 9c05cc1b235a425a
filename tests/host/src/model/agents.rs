// SPDX-License-Identifier: GPL-2.0

//! The next step of each agent of the model, and whether the agent can take it.

mod device;
mod exit;
mod fork;
mod migrate;
mod scan;
mod store;

use super::{Agent, Entry, Protocol, State, A, B, C};
pub(crate) use device::Device;
pub(crate) use exit::Exit;
pub(crate) use fork::Fork;
pub(crate) use migrate::Migrate;
pub(crate) use scan::Scan;
pub(crate) use store::Store;

/// Return whether an agent has a step that it need not wait for.
pub(crate) fn can_step(model: &Protocol, s: &State, agent: Agent) -> bool {
    let ptl_free = |p: usize| s.processes[p].ptl.is_none();
    let (first, second) = model.merges;
    match agent {
        Agent::Scan => match s.scan {
            Scan::Done => false,
            // A child is scanned once it exists, though the fork may still be in progress.
            Scan::Get if first == C && s.processes[C].expected.is_none() => false,
            Scan::Get => !s.processes[first].writer && ptl_free(first),
            Scan::Protect { .. } => ptl_free(first),
            Scan::Find => !s.processes[second].writer,
            Scan::JoinGet { .. } | Scan::JoinPtl { .. } => ptl_free(second),
            // A node in use stays, and the scan has nothing more to do.
            Scan::Prune => true,
            _ => true,
        },
        Agent::Store(p) => {
            let process = &s.processes[p];
            let alive = process.expected.is_some();
            match s.stores[p] {
                Store::Done => false,
                // A child runs when the fork is over, if it exists at all.
                Store::Try if p == C && s.fork != Fork::Done => false,
                Store::Try if !alive => true,
                Store::Try => process.tlb.is_some_and(|(_, w)| w) || !process.writer,
                Store::Fault => ptl_free(p) && !matches!(process.entry, Entry::Moving { .. }),
                Store::Replace { .. } => ptl_free(p),
                Store::Copy { .. } | Store::Set { .. } => true,
            }
        }
        Agent::Fork => match s.fork {
            Fork::Done => false,
            Fork::Lock => s.processes[A].readers == 0,
            Fork::Copy => ptl_free(A),
            Fork::Flush => true,
        },
        Agent::Exit => match s.exit {
            Exit::Done => false,
            // A thread in a fault is a user.
            Exit::Zap => matches!(s.stores[B], Store::Try | Store::Done) && ptl_free(B),
            Exit::Free => s.processes[B].readers == 0,
        },
        Agent::Device => s.device != Device::Done,
        Agent::Migrate => match s.migrate {
            Migrate::Done => false,
            Migrate::Isolate => model.migrate.is_some_and(ptl_free),
            Migrate::Unmap { process, .. } | Migrate::Remap { process, .. } => ptl_free(process),
            _ => true,
        },
    }
}

pub(crate) fn step(model: &Protocol, s: &mut State, agent: Agent) {
    match agent {
        Agent::Scan => s.scan = scan::scan(model, s),
        Agent::Store(p) => s.stores[p] = store::store(s, p),
        Agent::Fork => s.fork = fork::fork(s),
        Agent::Exit => s.exit = exit::exit(s),
        Agent::Device => s.device = device::device(s),
        Agent::Migrate => s.migrate = migrate::migrate(model, s),
    }
}

impl State {
    fn maps(&self, p: usize, page: usize) -> Option<bool> {
        match self.processes[p].entry {
            Entry::Maps { frame, writable } if frame == page => Some(writable),
            _ => None,
        }
    }

    /// References other than mappings and the scan's own.
    fn held(&self, page: usize) -> bool {
        self.frames[page].refs != self.frames[page].maps + 1
    }

    fn set(&mut self, p: usize, frame: usize, writable: bool) {
        self.processes[p].entry = Entry::Maps { frame, writable };
    }

    /// Give up B's `mmap_lock` and pages that may be locked. Return the next step.
    fn give_up(&mut self, process: usize, pages: &[(usize, bool)], next: Scan) -> Scan {
        for &(page, locked) in pages {
            if locked {
                self.frames[page].lock = None;
            }
            self.put(page);
        }
        self.processes[process].readers -= 1;
        next
    }
}
