// SPDX-License-Identifier: GPL-2.0

//! What each agent of the model does next, and whether it can.

use super::{Agent, Entry, Mutation, Protocol, State, A, B, C, DEVICE, PROCESSES};

/// The scan: publishes the first one's page, joins the second one's to it (of [`Protocol::merges`]), and frees the node when it is stale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Scan {
    /// Take the first one's `mmap_lock` for reading, and a reference on its page.
    Get,
    /// Try to lock it.
    Lock {
        page: usize,
    },
    /// See whether somebody who maps the page is in the middle of a fork.
    Relatives {
        page: usize,
    },
    /// Take the page-table lock.
    Protect {
        page: usize,
    },
    /// See whether the page is still there; clear the entry, or leave it as it is protected already.
    Clear {
        page: usize,
    },
    /// Flush what is cleared.
    Flush {
        page: usize,
        was: bool,
    },
    /// Count references; put the entry back, write-protected if all is well.
    Count {
        page: usize,
        was: bool,
    },
    /// Link node and item, point the page at the node, unlock.
    Publish {
        page: usize,
    },
    /// Take the second one's `mmap_lock` for reading; find the node's page and take a reference.
    Find,
    /// Try to lock it, and see whether it still points at the node.
    LockMerged {
        merged: usize,
    },
    /// Take a reference on the second one's page.
    JoinGet {
        merged: usize,
    },
    /// Try to lock it.
    JoinLock {
        merged: usize,
        page: usize,
    },
    /// Take the page-table lock.
    JoinPtl {
        merged: usize,
        page: usize,
    },
    /// Clear the entry, if it still maps the page.
    JoinClear {
        merged: usize,
        page: usize,
        early: Early,
    },
    /// Flush it.
    JoinFlush {
        merged: usize,
        page: usize,
        was: bool,
        early: Early,
    },
    /// Count references.
    JoinCount {
        merged: usize,
        page: usize,
        was: bool,
        early: Early,
    },
    /// Compare.
    JoinCompare {
        merged: usize,
        page: usize,
        was: bool,
        early: Early,
    },
    /// Map the merged page.
    JoinMap {
        merged: usize,
        page: usize,
    },
    /// Drop the other one's mapping, give up the page-table lock.
    JoinDrop {
        merged: usize,
        page: usize,
    },
    /// List the mapping; unlock both.
    JoinList {
        merged: usize,
        page: usize,
    },
    /// [`Mutation::ListLate`]: list it now.
    JoinListLate,
    /// Free the node, if it is stale; wait while it is not.
    Prune,
    Done,
}

/// What a mutation found out too early: whether somebody holds the page, and whether it differs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Early {
    held: bool,
    differs: bool,
}

/// A store by a thread of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Store {
    /// Store through the TLB, fill it, or fault.
    Try,
    /// In the fault: look at the entry, under the page-table lock.
    Fault,
    /// Copy the page, of which a reference is held.
    Copy {
        page: usize,
    },
    /// Put the copy in its place, if it is still there.
    Replace {
        page: usize,
        copy: usize,
    },
    /// Flushed, now set.
    Set {
        page: usize,
        copy: usize,
    },
    Done,
}

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

/// B exits. Its users are not pinned, but the scan may hold its `mmap_lock`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Exit {
    /// Unmap the page, with `mmap_lock` held for reading, which the scan may hold at the same time.
    Zap,
    /// Take `mmap_lock` for writing and free the page table.
    Free,
    Done,
}

/// A device writes to A's page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Device {
    /// Read the entry without a lock.
    Look,
    /// Take a reference on what it maps.
    Get {
        page: usize,
    },
    /// See whether the entry is the same.
    Again {
        page: usize,
    },
    /// Write.
    Write {
        page: usize,
    },
    /// Drop the reference.
    Put {
        page: usize,
    },
    Done,
}

/// Migration of one process's page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Migrate {
    /// Take a reference.
    Isolate,
    /// Try to lock it.
    Lock {
        page: usize,
    },
    /// Replace its mapping in this process by a migration entry, if it is known to have one.
    Unmap {
        page: usize,
        process: usize,
    },
    /// Count references; copy.
    Move {
        page: usize,
    },
    /// Replace the migration entries by mappings of the copy (or of the page, when that failed).
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

/// Whether an agent has something to do that it need not wait for.
pub(crate) fn can_step(model: &Protocol, s: &State, agent: Agent) -> bool {
    let ptl_free = |p: usize| s.processes[p].ptl.is_none();
    let (first, second) = model.merges;
    match agent {
        Agent::Scan => match s.scan {
            Scan::Done => false,
            // A child is scanned once it is born, though the fork may still be going on.
            Scan::Get if first == C && s.processes[C].expected.is_none() => false,
            Scan::Get => !s.processes[first].writer && ptl_free(first),
            Scan::Protect { .. } => ptl_free(first),
            Scan::Find => !s.processes[second].writer,
            Scan::JoinGet { .. } | Scan::JoinPtl { .. } => ptl_free(second),
            // A node that is in use stays; the scan has nothing more to do.
            Scan::Prune => true,
            _ => true,
        },
        Agent::Store(p) => {
            let process = &s.processes[p];
            let alive = process.expected.is_some();
            match s.stores[p] {
                Store::Done => false,
                // A child runs when the fork is over, if it was born at all.
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
        Agent::Scan => s.scan = scan(model, s),
        Agent::Store(p) => s.stores[p] = store(s, p),
        Agent::Fork => s.fork = fork(s),
        Agent::Exit => s.exit = exit(s),
        Agent::Device => s.device = device(s),
        Agent::Migrate => s.migrate = migrate(model, s),
    }
}

impl State {
    fn maps(&self, p: usize, page: usize) -> Option<bool> {
        match self.processes[p].entry {
            Entry::Maps { frame, writable } if frame == page => Some(writable),
            _ => None,
        }
    }

    /// References besides the mappings and our own one.
    fn held(&self, page: usize) -> bool {
        self.frames[page].refs != self.frames[page].maps + 1
    }

    fn set(&mut self, p: usize, frame: usize, writable: bool) {
        self.processes[p].entry = Entry::Maps { frame, writable };
    }

    /// Gives up a page that was locked, or not, and B's `mmap_lock`; and what to do then.
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

fn scan(model: &Protocol, s: &mut State) -> Scan {
    let wrong = model.mutation;
    let (first, second) = model.merges;
    match s.scan {
        Scan::Get => {
            let Entry::Maps { frame: page, .. } = s.processes[first].entry else {
                return Scan::Done;
            };
            s.processes[first].readers += 1;
            s.frames[page].refs += 1;
            Scan::Lock { page }
        }
        Scan::Lock { page } => {
            if s.frames[page].lock.is_some() {
                return s.give_up(first, &[(page, false)], Scan::Done);
            }
            s.frames[page].lock = Some(Agent::Scan);
            Scan::Relatives { page }
        }
        Scan::Relatives { page } => {
            let frame = s.frames[page];
            let forking = |p: usize| {
                let mapped = s.maps(p, page).is_some();
                p != first && mapped && s.processes[p].writer
            };
            let shared = !frame.exclusive && frame.maps != 1;
            if shared && wrong != Mutation::PublishDuringFork && (0..PROCESSES).any(forking) {
                return s.give_up(first, &[(page, true)], Scan::Done);
            }
            // Nobody but `first` can get the page from here on, if nobody has it.
            s.node.to_relatives = shared && wrong != Mutation::OwnRelativesOnly;
            Scan::Protect { page }
        }
        Scan::Protect { page } => {
            s.processes[first].ptl = Some(Agent::Scan);
            Scan::Clear { page }
        }
        Scan::Clear { page } => {
            let Some(was) = s.maps(first, page) else {
                s.processes[first].ptl = None;
                return s.give_up(first, &[(page, true)], Scan::Done);
            };
            if !was && !s.frames[page].exclusive {
                s.processes[first].ptl = None;
                return Scan::Publish { page };
            }
            s.processes[first].entry = Entry::None;
            Scan::Flush { page, was }
        }
        Scan::Flush { page, was } => {
            if wrong != Mutation::NoFlush {
                s.processes[first].tlb = None;
            }
            Scan::Count { page, was }
        }
        Scan::Count { page, was } => {
            s.processes[first].ptl = None;
            if s.held(page) {
                s.set(first, page, was);
                return s.give_up(first, &[(page, true)], Scan::Done);
            }
            s.frames[page].exclusive = false;
            s.set(first, page, was && wrong == Mutation::StaysWritable);
            Scan::Publish { page }
        }
        Scan::Publish { page } => {
            s.node.alive = true;
            s.node.frame = page;
            s.node.listed[first] = true;
            if wrong == Mutation::CountLate {
                s.node.to_relatives = s.frames[page].maps != 1;
            }
            s.frames[page].ksm = true;
            s.give_up(first, &[(page, true)], Scan::Find)
        }
        Scan::Find => {
            let merged = s.node.frame;
            let frame = s.frames[merged];
            if frame.refs == 0 || (!frame.ksm && wrong != Mutation::TrustNode) {
                return Scan::Prune;
            }
            s.processes[second].readers += 1;
            s.frames[merged].refs += 1;
            Scan::LockMerged { merged }
        }
        Scan::LockMerged { merged } => {
            // It may have been migrated since it was found, or be under migration.
            let frame = s.frames[merged];
            let stale = !frame.ksm && wrong != Mutation::TrustNode;
            if stale || frame.lock.is_some() {
                return s.give_up(second, &[(merged, false)], Scan::Prune);
            }
            s.frames[merged].lock = Some(Agent::Scan);
            Scan::JoinGet { merged }
        }
        Scan::JoinGet { merged } => match s.processes[second].entry {
            Entry::Maps { frame: page, .. } if page != merged => {
                s.frames[page].refs += 1;
                Scan::JoinLock { merged, page }
            }
            _ => s.give_up(second, &[(merged, true)], Scan::Prune),
        },
        Scan::JoinLock { merged, page } => {
            if s.frames[page].lock.is_some() || s.frames[page].ksm {
                return s.give_up(second, &[(page, false), (merged, true)], Scan::Prune);
            }
            s.frames[page].lock = Some(Agent::Scan);
            Scan::JoinPtl { merged, page }
        }
        Scan::JoinPtl { merged, page } => {
            s.processes[second].ptl = Some(Agent::Scan);
            let early = Early {
                held: wrong == Mutation::HoldersFirst && s.held(page),
                differs: wrong == Mutation::CompareFirst
                    && s.frames[page].content != s.frames[merged].content,
            };
            Scan::JoinClear {
                merged,
                page,
                early,
            }
        }
        Scan::JoinClear {
            merged,
            page,
            early,
        } => {
            let Some(was) = s.maps(second, page) else {
                s.processes[second].ptl = None;
                return s.give_up(second, &[(page, true), (merged, true)], Scan::Prune);
            };
            s.processes[second].entry = Entry::None;
            Scan::JoinFlush {
                merged,
                page,
                was,
                early,
            }
        }
        Scan::JoinFlush {
            merged,
            page,
            was,
            early,
        } => {
            if wrong != Mutation::NoFlush {
                s.processes[second].tlb = None;
            }
            Scan::JoinCount {
                merged,
                page,
                was,
                early,
            }
        }
        Scan::JoinCount {
            merged,
            page,
            was,
            early,
        } => {
            let held = match wrong {
                Mutation::IgnoreHolders => false,
                Mutation::HoldersFirst => early.held,
                _ => s.held(page),
            };
            if held {
                return put_back(s, second, merged, page, was);
            }
            Scan::JoinCompare {
                merged,
                page,
                was,
                early,
            }
        }
        Scan::JoinCompare {
            merged,
            page,
            was,
            early,
        } => {
            let differs = match wrong {
                Mutation::CompareFirst => early.differs,
                _ => s.frames[page].content != s.frames[merged].content,
            };
            if differs {
                return put_back(s, second, merged, page, was);
            }
            Scan::JoinMap { merged, page }
        }
        Scan::JoinMap { merged, page } => {
            s.map(merged);
            s.set(second, merged, false);
            Scan::JoinDrop { merged, page }
        }
        Scan::JoinDrop { merged, page } => {
            s.unmap(page);
            s.processes[second].ptl = None;
            Scan::JoinList { merged, page }
        }
        Scan::JoinList { merged, page } => {
            let next = if wrong == Mutation::ListLate {
                Scan::JoinListLate
            } else {
                s.node.listed[second] = true;
                Scan::Prune
            };
            s.give_up(second, &[(page, true), (merged, true)], next)
        }
        Scan::JoinListLate => {
            s.node.listed[second] = true;
            Scan::Prune
        }
        Scan::Prune => {
            let frame = s.frames[s.node.frame];
            let stale = match wrong {
                Mutation::FreeEarly => frame.maps == 0,
                _ => !frame.ksm,
            };
            if stale {
                s.node.freed = true;
                s.node.alive = false;
            }
            Scan::Done
        }
        Scan::Done => Scan::Done,
    }
}

/// Leaves the page that was to be joined as it was.
fn put_back(s: &mut State, second: usize, merged: usize, page: usize, was: bool) -> Scan {
    s.set(second, page, was);
    s.processes[second].ptl = None;
    s.give_up(second, &[(page, true), (merged, true)], Scan::Prune)
}

fn store(s: &mut State, p: usize) -> Store {
    match s.stores[p] {
        Store::Try => {
            if s.processes[p].expected.is_none() {
                return Store::Done;
            }
            if let Some((frame, true)) = s.processes[p].tlb {
                s.frames[frame].content = p as u8 + 1;
                s.processes[p].expected = Some(p as u8 + 1);
                // Another thread of a process that forks: until the flush, the child may get it too.
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
                // Zapped meanwhile.
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

fn fork(s: &mut State) -> Fork {
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

fn exit(s: &mut State) -> Exit {
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

fn device(s: &mut State) -> Device {
    let writable = |s: &State, page| s.maps(A, page) == Some(true);
    match s.device {
        Device::Look => match s.processes[A].entry {
            Entry::Maps {
                frame: page,
                writable: true,
            } => Device::Get { page },
            // It would be told to fault first.
            _ => Device::Done,
        },
        Device::Get { page } => {
            if s.frames[page].refs == 0 {
                return Device::Done;
            }
            s.frames[page].refs += 1;
            Device::Again { page }
        }
        Device::Again { page } if writable(s, page) && s.frames[page].exclusive => {
            Device::Write { page }
        }
        Device::Again { page } => Device::Put { page },
        Device::Write { page } => {
            s.frames[page].content = DEVICE;
            s.processes[A].expected = Some(DEVICE);
            Device::Put { page }
        }
        Device::Put { page } => {
            s.put(page);
            Device::Done
        }
        Device::Done => Device::Done,
    }
}

fn migrate(model: &Protocol, s: &mut State) -> Migrate {
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

/// The order in which a walk comes by: parents before their children.
const WALK: [usize; PROCESSES] = [A, C, B];

fn next_of(process: usize) -> Option<usize> {
    let at = WALK.iter().position(|&p| p == process)?;
    WALK.get(at + 1).copied()
}
