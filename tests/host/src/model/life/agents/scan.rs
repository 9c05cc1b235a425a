// SPDX-License-Identifier: GPL-2.0

//! The scanning thread.

use super::SKIPS;
use crate::model::life::{Entry, Mutation, Protocol, State, Word, A, C, PROCESSES};

/// The scanning thread: pass after pass, until all other agents are done and a pass changes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Scan {
    /// Begin a pass; free a node whose page is gone.
    Begin,
    /// Try the `mmap_lock` of a process, unless its leaf is skipped.
    Turn(usize),
    /// Compare its entry, and release the lock.
    Look(usize),
    /// Take the item of a page that is no longer merged off its node, if the lock of the node's page is free.
    Drop(usize),
    /// List a mapping that is not listed, under both locks.
    List(usize),
    /// Try to merge the page of the first with that of the second: check that the fork-shared mappings of the
    /// first allow it.
    CheckSharing(usize, usize),
    /// Make the first's page the node's page, and list its mapping.
    MakeKsmPage(usize, usize),
    /// Map the merged page instead of the page of the first. If that fails, undo the second's merge.
    Join(usize, Option<usize>),
    /// Pin the users of a process and try its `mmap_lock`.
    Undo(usize),
    /// Take the unshare fault.
    UndoFault(usize),
    /// Check the entry again, take the item off if the page is no longer merged, and release all.
    UndoLook(usize),
    /// End the pass.
    End,
    Done,
}

pub(super) fn scan(model: &Protocol, s: &mut State) -> Scan {
    let wrong = model.mutation;
    match s.scan {
        Scan::Begin => {
            if s.node.alive && !s.node.page {
                s.release();
            }
            s.thorough = s.owed;
            s.owed = false;
            s.still = s.others_done() && !s.thorough;
            for p in 0..PROCESSES {
                s.processes[p].due = s.is_unlisted(p);
                s.processes[p].outdated = s.is_listed_in_vain(p);
                s.processes[p].blocked = false;
            }
            Scan::Turn(A)
        }
        Scan::Turn(PROCESSES) => Scan::End,
        Scan::Turn(p) => {
            let process = &mut s.processes[p];
            let next = Scan::Turn(p + 1);
            if !process.registered {
                return match process.word {
                    Word::Nothing => next,
                    _ => Scan::Drop(p),
                };
            }
            // It is exiting, and the engine will be notified.
            if !process.alive {
                s.still = false;
                return next;
            }
            if process.skips != 0 && !s.thorough {
                process.skips -= 1;
                s.still = false;
                return next;
            }
            if process.writer {
                process.blocked = true;
                s.owed |= s.thorough && wrong != Mutation::ForgetOwed;
                return next;
            }
            process.readers += 1;
            Scan::Look(p)
        }
        Scan::Look(p) => {
            s.unlock_mmap(p);
            look(s, wrong, p)
        }
        Scan::Drop(p) => {
            let gone = !s.processes[p].registered;
            if s.detach(wrong, p) {
                let word = if gone { Word::Nothing } else { Word::Seen };
                s.set_word(p, word);
            } else {
                s.processes[p].blocked = true;
                s.still = false;
            }
            Scan::Turn(p + 1)
        }
        Scan::List(p) => {
            if s.processes[p].writer || s.node.lock.is_some() {
                s.processes[p].blocked = true;
                s.still = false;
                // The next pass retries, so it must not skip the leaf.
                if wrong != Mutation::ForgetOwed {
                    s.note_change(p);
                }
            } else if s.processes[p].entry == Entry::Merged && s.node.page {
                s.node.items[p] = true;
                s.set_word(p, Word::Merged);
            }
            Scan::Turn(p + 1)
        }
        Scan::CheckSharing(p, other) => {
            let sharer = match p {
                A => Some(C),
                C => Some(A),
                _ => None,
            };
            let process = &s.processes[p];
            let allowed = sharer.is_none_or(|r| {
                let sharer = &s.processes[r];
                process.entry != Entry::Family
                    || sharer.registered && sharer.mergeable && !sharer.writer
            });
            if process.writer || !allowed || !s.is_candidate(p) {
                s.still = false;
                return Scan::Turn(p + 1);
            }
            s.processes[p].readers += 1;
            Scan::MakeKsmPage(p, other)
        }
        Scan::MakeKsmPage(p, other) => {
            s.unlock_mmap(p);
            if !s.is_candidate(p) || s.node.alive {
                return Scan::Turn(p + 1);
            }
            if s.processes[p].entry == Entry::Family {
                // The other process that shares the page by a fork maps a merged page from now on.
                for p in [A, C] {
                    s.processes[p].entry = Entry::Merged;
                }
                s.owed |= wrong != Mutation::SkipSharers;
            }
            s.processes[p].entry = Entry::Merged;
            s.node.alive = true;
            s.node.page = true;
            s.node.items[p] = true;
            s.set_word(p, Word::Merged);
            Scan::Join(other, Some(p))
        }
        Scan::Join(p, undo) => {
            let process = &s.processes[p];
            let fits = s.is_candidate(p)
                && !process.writer
                && !process.pinned
                && s.node.page
                && s.node.lock.is_none();
            if fits {
                s.processes[p].entry = Entry::Merged;
                s.node.items[p] = true;
                let skips = s.processes[p].skips;
                s.set_word(p, Word::Merged);
                if wrong == Mutation::SkipMerged {
                    s.processes[p].skips = skips;
                }
            } else {
                s.still = false;
            }
            match undo {
                Some(first) if !fits => Scan::Undo(first),
                Some(first) => Scan::Turn(first + 1),
                None => Scan::Turn(p + 1),
            }
        }
        Scan::Undo(p) => {
            let process = &mut s.processes[p];
            let pinned = process.alive || wrong == Mutation::UndoUnpinned;
            if !pinned || process.writer {
                // The page stays merged, and listed.
                return Scan::Turn(p + 1);
            }
            if wrong != Mutation::UndoUnpinned {
                process.pins += 1;
            }
            process.readers += 1;
            Scan::UndoFault(p)
        }
        Scan::UndoFault(p) => {
            s.unshare(p);
            Scan::UndoLook(p)
        }
        Scan::UndoLook(p) => {
            let merged = s.processes[p].entry == Entry::Merged;
            if !merged || wrong == Mutation::UndoTrustsFault {
                s.wrong.dropped |= merged;
                if s.detach(wrong, p) {
                    s.set_word(p, Word::Seen);
                }
            }
            s.unlock_mmap(p);
            if wrong != Mutation::UndoUnpinned {
                s.processes[p].pins -= 1;
            }
            Scan::Turn(p + 1)
        }
        Scan::End => {
            for p in 0..PROCESSES {
                let process = &s.processes[p];
                s.wrong.overdue |= process.due && !process.blocked;
                s.wrong.outdated |= process.outdated && !process.blocked;
            }
            if s.still && s.others_done() {
                Scan::Done
            } else {
                Scan::Begin
            }
        }
        Scan::Done => Scan::Done,
    }
}

/// Compare an entry with the engine's record of it.
fn look(s: &mut State, wrong: Mutation, p: usize) -> Scan {
    let process = s.processes[p];
    let next = Scan::Turn(p + 1);
    let walked = process.mergeable
        || match wrong {
            Mutation::ScanMergeableOnly => false,
            Mutation::ScanKeepsListed => process.word == Word::Merged,
            _ => true,
        };
    let listed = process.word == Word::Merged && s.node.items[p];
    match process.entry {
        _ if !walked => match process.word {
            Word::Nothing => next,
            _ => Scan::Drop(p),
        },
        Entry::Merged if listed => next,
        Entry::Merged => Scan::List(p),
        _ if process.word == Word::Merged => Scan::Drop(p),
        Entry::Own | Entry::Family if process.word == Word::Nothing => {
            s.set_word(p, Word::Seen);
            next
        }
        Entry::Own | Entry::Family if process.mergeable => {
            if let Some(step) = partner(s, p) {
                return step;
            }
            grow_old(s, wrong, p);
            next
        }
        Entry::Empty if process.word != Word::Nothing => {
            s.set_word(p, Word::Nothing);
            next
        }
        _ => {
            grow_old(s, wrong, p);
            next
        }
    }
}

/// Return what an unchanged page can merge with.
fn partner(s: &State, p: usize) -> Option<Scan> {
    if s.node.alive && s.node.page {
        return Some(Scan::Join(p, None));
    }
    let family = s.processes[p].entry == Entry::Family;
    let other = (0..PROCESSES).find(|&other| {
        let there = &s.processes[other];
        other != p
            && there.counts()
            && there.word == Word::Seen
            && !there.writer
            && s.is_candidate(other)
            && !(family && there.entry == Entry::Family)
    })?;
    (!s.node.alive).then_some(Scan::CheckSharing(p, other))
}

/// Note that a scan of the page had no effect.
fn grow_old(s: &mut State, wrong: Mutation, p: usize) {
    let process = &mut s.processes[p];
    // A page that is swapped out may come back merged at any time.
    let away = matches!(process.entry, Entry::Swapped | Entry::Moving);
    if away && wrong != Mutation::SkipSwapped {
        process.skips = 0;
    } else if process.quiet {
        process.skips = SKIPS;
    }
    process.quiet = true;
}
