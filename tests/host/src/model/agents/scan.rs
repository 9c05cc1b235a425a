// SPDX-License-Identifier: GPL-2.0

//! The scan.

use crate::model::{Agent, Entry, Mutation, Protocol, State, PROCESSES};

/// The scan. It makes the first one's page a KSM page, merges the second one's with it (see
/// [`Protocol::merges`]), and frees the node when it is stale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Scan {
    /// Take the first one's `mmap_lock` for reading, and a reference on its page.
    Get,
    /// Try to lock it.
    Lock {
        page: usize,
    },
    /// Check whether a process that maps the page is in the middle of a fork.
    CheckSharing {
        page: usize,
    },
    /// Take the page-table lock.
    Protect {
        page: usize,
    },
    /// Check whether the page is still there. Clear the entry, unless it is write-protected already.
    Clear {
        page: usize,
    },
    /// Flush the cleared entry.
    Flush {
        page: usize,
        was: bool,
    },
    /// Count references. Put the entry back, write-protected if the count is right.
    Count {
        page: usize,
        was: bool,
    },
    /// Link node and item, point the page to the node, unlock.
    MakeKsmPage {
        page: usize,
    },
    /// Take the second one's `mmap_lock` for reading; find the node's page and take a reference.
    Find,
    /// Try to lock it, and check whether it still points to the node.
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
    /// Drop the other page's mapping, release the page-table lock.
    JoinDrop {
        merged: usize,
        page: usize,
    },
    /// List the mapping; unlock both.
    JoinList {
        merged: usize,
        page: usize,
    },
    /// List the mapping now ([`Mutation::ListLate`]).
    JoinListLate,
    /// Free the node if it is stale; otherwise wait.
    Prune,
    Done,
}

/// Results that a mutation computed too early: whether the page has other references, and whether it differs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Early {
    held: bool,
    differs: bool,
}

pub(super) fn scan(model: &Protocol, s: &mut State) -> Scan {
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
            Scan::CheckSharing { page }
        }
        Scan::CheckSharing { page } => {
            let frame = s.frames[page];
            let forking = |p: usize| {
                let mapped = s.maps(p, page).is_some();
                p != first && mapped && s.processes[p].writer
            };
            let shared = !frame.exclusive && frame.maps != 1;
            if shared && wrong != Mutation::MergeDuringFork && (0..PROCESSES).any(forking) {
                return s.give_up(first, &[(page, true)], Scan::Done);
            }
            // If no process but `first` has the page, no other can get it from here on.
            s.node.to_sharers = shared && wrong != Mutation::OwnSharersOnly;
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
                return Scan::MakeKsmPage { page };
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
            Scan::MakeKsmPage { page }
        }
        Scan::MakeKsmPage { page } => {
            s.node.alive = true;
            s.node.frame = page;
            s.node.listed[first] = true;
            if wrong == Mutation::CountLate {
                s.node.to_sharers = s.frames[page].maps != 1;
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
            // It may have been migrated since, or be under migration.
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

/// Leave the page that was to be replaced as it was.
fn put_back(s: &mut State, second: usize, merged: usize, page: usize, was: bool) -> Scan {
    s.set(second, page, was);
    s.processes[second].ptl = None;
    s.give_up(second, &[(page, true), (merged, true)], Scan::Prune)
}
