// SPDX-License-Identifier: GPL-2.0

//! What each agent of the model does next, and whether it can.

use super::{Agent, Entry, Mutation, Protocol, State, Word, A, B, C, PROCESSES};

/// For how many passes a leaf is skipped of which nothing came in the pass before.
pub(crate) const SKIPS: u8 = 2;

/// The scanning thread: pass after pass, until all else is over and a pass changes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Scan {
    /// Begin a pass; free a node whose page is gone.
    Begin,
    /// Try the `mmap_lock` of a process, unless its leaf is skipped.
    Turn(usize),
    /// Look at its entry, and give the lock back.
    Look(usize),
    /// Take the item of a page that is not merged any more off its node, if the lock of the node's page can be had.
    Drop(usize),
    /// List a mapping that is not listed, under both locks.
    List(usize),
    /// Try to merge the page of the first with that of the second: see whether the first's relatives allow it.
    Relatives(usize, usize),
    /// Make the first's page the node's page, and list its mapping.
    Publish(usize, usize),
    /// Map the merged page in place of the page of the first. If that fails, undo the second's merge.
    Join(usize, Option<usize>),
    /// Pin the users of a process and try its `mmap_lock`.
    Undo(usize),
    /// Take the unshare fault.
    UndoFault(usize),
    /// Look at the entry again, take the item off if it is not merged any more, and give all back.
    UndoLook(usize),
    /// End the pass.
    End,
    Done,
}

/// An administrator writes 2 to `run`, and 1 when that is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum RunTwo {
    /// Stop the scan, which is between two steps, and have copies swapped in from now on.
    Start,
    /// Wait for a swap-in that has found before that the page need not be copied.
    Flush,
    /// Pin the users of a process and take its `mmap_lock`. Whether all were served so far.
    Lock(usize, bool),
    /// Take the unshare fault.
    Fault(usize, bool),
    /// Look at the entry again, and give all back.
    Look(usize, bool),
    /// Take the item off, under the lock of the node's page.
    Drop(usize, bool),
    /// Free the node by force, if all were served, and report.
    Finish(bool),
    Done,
}

/// A forks C.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Fork {
    Lock,
    Copy,
    Unlock,
    Done,
}

/// A process exits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Exit {
    /// Stop using the address space.
    Leave,
    /// The last user is gone: tell the engine.
    Tell,
    /// Unmap the page, with `mmap_lock` held for reading.
    Zap,
    /// Take `mmap_lock` for writing and free the page table.
    Free,
    Done,
}

/// A process protects its page by userfaultfd, and gives it free again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Protect {
    On,
    Off,
    Done,
}

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

/// Migration: all mappings that are found become migration entries, and mappings again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Migrate {
    Lock,
    Unmap,
    Remap,
    Done,
}

/// All mappings that are found become swap entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Reclaim {
    Lock,
    Unmap,
    Done,
}

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

/// A process holds its own `mmap_lock` for writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Hold {
    Lock,
    Unlock,
    /// It never gives it back.
    ForEver,
    Done,
}

/// Whether an agent has something to do that it need not wait for.
pub(crate) fn can_step(model: &Protocol, s: &State, agent: Agent) -> bool {
    let free = |p: usize| !s.processes[p].writer;
    let unused = |p: usize| free(p) && s.processes[p].readers == 0;
    let unlocked = s.node.lock.is_none();
    match agent {
        Agent::Scan => match s.scan {
            Scan::Done => false,
            // Nothing is merged, but what was left is seen to.
            Scan::Begin | Scan::Turn(_) | Scan::End if !s.merging => has_chores(model, s),
            Scan::Turn(p) if p < PROCESSES && model.mutation == Mutation::WaitForMmap => free(p),
            Scan::UndoFault(p) => s.processes[p].entry != Entry::Moving,
            _ => true,
        },
        Agent::RunTwo => match s.run_two {
            RunTwo::Done => false,
            // The engine's lock is held for a step at a time.
            RunTwo::Start => matches!(s.scan, Scan::Begin | Scan::Turn(_) | Scan::End | Scan::Done),
            RunTwo::Flush => unlocked,
            RunTwo::Lock(p, _) => p == PROCESSES || free(p),
            RunTwo::Fault(p, _) => s.processes[p].entry != Entry::Moving,
            RunTwo::Look(..) => true,
            RunTwo::Drop(..) | RunTwo::Finish(_) => unlocked,
        },
        Agent::Fork => match s.fork {
            Fork::Done => false,
            Fork::Lock => unused(A),
            Fork::Copy | Fork::Unlock => true,
        },
        Agent::Exit => model.exit.is_some_and(|p| match s.exit {
            Exit::Done => false,
            // Its threads have come to their ends.
            Exit::Leave => {
                let protects = model.protect == Some(p) && s.protect != Protect::Done;
                let opts_out = model.opt_out == Some(p) && s.opt_out != OptOut::Done;
                let reads = model.swap_in == Some(p) && s.swap_in != SwapIn::Done;
                s.processes[p].alive && !protects && !opts_out && !reads && s.write != Some(p)
            }
            Exit::Tell => s.processes[p].pins == 0,
            Exit::Zap => free(p),
            Exit::Free => unused(p),
        }),
        Agent::Write => s.write.is_some_and(|p| {
            let process = &s.processes[p];
            free(p) && !process.protected && may_fault(s, p)
        }),
        Agent::Protect => model.protect.is_some_and(|p| match s.protect {
            Protect::Done => false,
            Protect::On => free(p) && s.processes[p].alive,
            Protect::Off => free(p),
        }),
        Agent::OptOut => model.opt_out.is_some_and(|p| match s.opt_out {
            OptOut::Done => false,
            OptOut::Lock => unused(p) && s.processes[p].alive,
            OptOut::Walk => s.processes[p].entry != Entry::Moving,
            OptOut::Clear => true,
        }),
        Agent::Migrate => match s.migrate {
            Migrate::Done => false,
            // Whether there is a merged page by then or not.
            Migrate::Lock => unlocked,
            Migrate::Unmap | Migrate::Remap => true,
        },
        Agent::Reclaim => match s.reclaim {
            Reclaim::Done => false,
            Reclaim::Lock => unlocked,
            Reclaim::Unmap => true,
        },
        Agent::SwapIn => model.swap_in.is_some_and(|p| match s.swap_in {
            SwapIn::Done => false,
            SwapIn::Fault if s.processes[p].entry == Entry::Swapped => free(p) && unlocked,
            SwapIn::Fault => true,
            SwapIn::Decide | SwapIn::Map { .. } => true,
        }),
        Agent::Hold => model.hold.is_some_and(|(p, _)| match s.hold {
            Hold::Done | Hold::ForEver => false,
            Hold::Lock => unused(p),
            Hold::Unlock => true,
        }),
        Agent::Pin => s.pin.is_some(),
    }
}

/// A fault waits for a migration, and for the lock of a page in the swap cache.
fn may_fault(s: &State, p: usize) -> bool {
    match s.processes[p].entry {
        Entry::Moving => false,
        Entry::Swapped => s.node.lock.is_none(),
        _ => true,
    }
}

/// Whether the thread has something to see to while `run` is not 1.
fn has_chores(model: &Protocol, s: &State) -> bool {
    let dead = |p: usize| !s.processes[p].registered && s.processes[p].word != Word::Nothing;
    let stale = s.node.alive && !s.node.page;
    (0..PROCESSES).any(dead) && s.node.lock.is_none() || stale || has_force(model, s)
}

pub(crate) fn step(model: &Protocol, s: &mut State, agent: Agent) {
    match agent {
        Agent::Scan if !s.merging && matches!(s.scan, Scan::Begin | Scan::Turn(_) | Scan::End) => {
            chores(model, s)
        }
        Agent::Scan => {
            s.scan = scan(model, s);
        }
        Agent::RunTwo => s.run_two = run_two(model, s),
        Agent::Fork => s.fork = fork(s),
        Agent::Exit => {
            if let Some(p) = model.exit {
                s.exit = exit(s, p);
            }
        }
        Agent::Write => {
            if let Some(p) = s.write.take() {
                if !matches!(s.processes[p].entry, Entry::Empty) {
                    s.processes[p].entry = Entry::Own;
                }
            }
        }
        Agent::Protect => {
            if let Some(p) = model.protect {
                s.processes[p].protected = s.protect == Protect::On;
                s.protect = match s.protect {
                    Protect::On => Protect::Off,
                    _ => Protect::Done,
                };
            }
        }
        Agent::OptOut => {
            if let Some(p) = model.opt_out {
                s.opt_out = opt_out(s, p);
            }
        }
        Agent::Migrate => s.migrate = migrate(s),
        Agent::Reclaim => s.reclaim = reclaim(s),
        Agent::SwapIn => {
            if let Some(p) = model.swap_in {
                s.swap_in = swap_in(s, p);
            }
        }
        Agent::Hold => {
            if let Some((p, for_ever)) = model.hold {
                s.processes[p].writer = s.hold == Hold::Lock;
                s.hold = match s.hold {
                    Hold::Lock if for_ever => Hold::ForEver,
                    Hold::Lock => Hold::Unlock,
                    _ => Hold::Done,
                };
            }
        }
        Agent::Pin => {
            if let Some(p) = s.pin.take() {
                s.processes[p].pinned = false;
            }
        }
    }
}

impl State {
    /// Notes that something happened to the page of a process.
    fn note_change(&mut self, p: usize) {
        self.processes[p].quiet = false;
        self.processes[p].skips = 0;
        self.still = false;
    }

    fn set_word(&mut self, p: usize, word: Word) {
        self.processes[p].word = word;
        self.note_change(p);
    }

    /// Whether its page can be merged with another one.
    fn is_candidate(&self, p: usize) -> bool {
        let process = &self.processes[p];
        process.mergeable
            && !process.protected
            && matches!(process.entry, Entry::Own | Entry::Family)
    }

    /// Frees the node, whose page is gone or has been let go, and with it all items.
    fn release(&mut self) {
        self.node.alive = false;
        self.node.items = [false; PROCESSES];
        self.still = false;
    }

    /// Takes an item off the node. Returns whether it is off.
    fn detach(&mut self, wrong: Mutation, p: usize) -> bool {
        if !self.node.items[p] {
            return true;
        }
        if !self.node.page {
            self.release();
            return true;
        }
        if self.node.lock.is_some() {
            // Tried again when the page is looked at again.
            match wrong {
                Mutation::UnlinkUnlocked => self.wrong.torn = true,
                Mutation::LoseItem => return true,
                _ => return false,
            }
        }
        self.node.items[p] = false;
        true
    }

    /// The fault that replaces a merged page by a copy. Where nothing is mapped, it maps a new page.
    fn unshare(&mut self, p: usize) {
        let process = &mut self.processes[p];
        process.entry = match process.entry {
            Entry::Merged | Entry::Orphan if process.protected => process.entry,
            Entry::Merged | Entry::Orphan | Entry::Empty => Entry::Own,
            other => other,
        };
    }

    fn unlock_mmap(&mut self, p: usize) {
        self.processes[p].readers -= 1;
    }

    /// Whether a walk from the node's list comes by the mapping of a process.
    fn is_found(&self, p: usize) -> bool {
        match p {
            B => self.node.items[B],
            _ => self.node.items[A] || self.node.items[C],
        }
    }
}

fn chores(model: &Protocol, s: &mut State) {
    for p in 0..PROCESSES {
        if !s.processes[p].registered
            && s.processes[p].word != Word::Nothing
            && s.detach(model.mutation, p)
        {
            s.set_word(p, Word::Nothing);
        }
    }
    if s.node.alive && !s.node.page {
        s.release();
    } else if has_force(model, s) {
        abandon(s);
    }
}

/// Whether the thread is to free the node by force, which is wrong.
fn has_force(model: &Protocol, s: &State) -> bool {
    model.mutation == Mutation::ForceMeanwhile
        && s.node.alive
        && s.node.items == [false; PROCESSES]
        && s.node.lock.is_none()
}

/// Takes the node off its page and frees it.
fn abandon(s: &mut State) {
    for process in &mut s.processes {
        match process.entry {
            Entry::Merged => process.entry = Entry::Orphan,
            // Copied when it is swapped in.
            Entry::Swapped => process.entry = Entry::Own,
            _ => {}
        }
    }
    s.node.page = false;
    s.release();
}

fn scan(model: &Protocol, s: &mut State) -> Scan {
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
            // Exiting, and about to be reported.
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
                // The next pass tries again, so it must not skip the leaf.
                if wrong != Mutation::ForgetOwed {
                    s.note_change(p);
                }
            } else if s.processes[p].entry == Entry::Merged && s.node.page {
                s.node.items[p] = true;
                s.set_word(p, Word::Merged);
            }
            Scan::Turn(p + 1)
        }
        Scan::Relatives(p, other) => {
            let relative = match p {
                A => Some(C),
                C => Some(A),
                _ => None,
            };
            let process = &s.processes[p];
            let allowed = relative.is_none_or(|r| {
                let relative = &s.processes[r];
                process.entry != Entry::Family
                    || relative.registered && relative.mergeable && !relative.writer
            });
            if process.writer || !allowed || !s.is_candidate(p) {
                s.still = false;
                return Scan::Turn(p + 1);
            }
            s.processes[p].readers += 1;
            Scan::Publish(p, other)
        }
        Scan::Publish(p, other) => {
            s.unlock_mmap(p);
            if !s.is_candidate(p) || s.node.alive {
                return Scan::Turn(p + 1);
            }
            if s.processes[p].entry == Entry::Family {
                // The relative maps a merged page from now on.
                for p in [A, C] {
                    s.processes[p].entry = Entry::Merged;
                }
                s.owed |= wrong != Mutation::SkipRelatives;
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
                // It stays merged, and listed.
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

/// Compares an entry with what is remembered of it.
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

/// What to merge a page with that has not changed since it was seen.
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
    (!s.node.alive).then_some(Scan::Relatives(p, other))
}

/// Nothing came of looking at the page.
fn grow_old(s: &mut State, wrong: Mutation, p: usize) {
    let process = &mut s.processes[p];
    // What is swapped out may come back merged at any time.
    let away = matches!(process.entry, Entry::Swapped | Entry::Moving);
    if away && wrong != Mutation::SkipSwapped {
        process.skips = 0;
    } else if process.quiet {
        process.skips = SKIPS;
    }
    process.quiet = true;
}

fn run_two(model: &Protocol, s: &mut State) -> RunTwo {
    let wrong = model.mutation;
    let pins = wrong != Mutation::RunTwoUnpinned;
    match s.run_two {
        RunTwo::Start => {
            s.merging = false;
            s.copying = true;
            match wrong {
                Mutation::RunTwoIgnoresSwapIn => RunTwo::Lock(A, true),
                _ => RunTwo::Flush,
            }
        }
        RunTwo::Flush => RunTwo::Lock(A, true),
        RunTwo::Lock(PROCESSES, served) => RunTwo::Finish(served),
        RunTwo::Lock(p, served) => {
            let process = &mut s.processes[p];
            // Children that are forked meanwhile come later. What exits is done with.
            if !process.registered || !process.alive && pins {
                return RunTwo::Lock(p + 1, served);
            }
            if !process.mergeable && wrong == Mutation::RunTwoMergeableOnly {
                return RunTwo::Drop(p, served);
            }
            process.pins += u8::from(pins);
            process.readers += 1;
            match process.entry {
                Entry::Merged | Entry::Moving => RunTwo::Fault(p, served),
                _ => RunTwo::Look(p, served),
            }
        }
        RunTwo::Fault(p, served) => {
            s.unshare(p);
            RunTwo::Look(p, served)
        }
        RunTwo::Look(p, served) => {
            s.unlock_mmap(p);
            s.processes[p].pins -= u8::from(pins);
            let merged = s.processes[p].entry == Entry::Merged;
            if merged && wrong != Mutation::RunTwoTrustsFault {
                // It stays listed.
                return RunTwo::Lock(p + 1, false);
            }
            RunTwo::Drop(p, served)
        }
        RunTwo::Drop(p, served) => {
            let process = &s.processes[p];
            s.wrong.dropped |= process.counts() && process.entry == Entry::Merged;
            if s.detach(wrong, p) {
                s.set_word(p, Word::Nothing);
            }
            RunTwo::Lock(p + 1, served)
        }
        RunTwo::Finish(served) => {
            if served && s.node.alive && s.node.items == [false; PROCESSES] {
                abandon(s);
            }
            s.wrong.lied |= served
                && s.processes.iter().any(|p| {
                    p.counts() && matches!(p.entry, Entry::Merged | Entry::Orphan | Entry::Moving)
                });
            s.copying = false;
            s.merging = true;
            // The scan begins anew.
            s.scan = Scan::Begin;
            RunTwo::Done
        }
        RunTwo::Done => RunTwo::Done,
    }
}

fn fork(s: &mut State) -> Fork {
    match s.fork {
        Fork::Lock => {
            s.processes[A].writer = true;
            Fork::Copy
        }
        Fork::Copy => {
            if s.processes[A].entry == Entry::Own {
                s.processes[A].entry = Entry::Family;
            }
            let parent = s.processes[A];
            let child = &mut s.processes[C];
            child.entry = parent.entry;
            child.mergeable = parent.mergeable;
            child.alive = true;
            child.registered = true;
            Fork::Unlock
        }
        Fork::Unlock => {
            s.processes[A].writer = false;
            Fork::Done
        }
        Fork::Done => Fork::Done,
    }
}

fn exit(s: &mut State, p: usize) -> Exit {
    let process = &mut s.processes[p];
    match s.exit {
        Exit::Leave => {
            process.alive = false;
            Exit::Tell
        }
        Exit::Tell => {
            process.registered = false;
            Exit::Zap
        }
        Exit::Zap => {
            process.entry = Entry::Empty;
            Exit::Free
        }
        Exit::Free => {
            s.wrong.leaked |= process.entry != Entry::Empty;
            Exit::Done
        }
        Exit::Done => Exit::Done,
    }
}

fn opt_out(s: &mut State, p: usize) -> OptOut {
    match s.opt_out {
        OptOut::Lock => {
            s.processes[p].writer = true;
            OptOut::Walk
        }
        OptOut::Walk => {
            // A fault that fails ends it, with success.
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

fn migrate(s: &mut State) -> Migrate {
    match s.migrate {
        Migrate::Lock if s.node.page && s.node.lock.is_none() => {
            s.node.lock = Some(Agent::Migrate);
            Migrate::Unmap
        }
        Migrate::Unmap => {
            for p in 0..PROCESSES {
                if s.processes[p].entry == Entry::Merged && s.is_found(p) {
                    s.processes[p].entry = Entry::Moving;
                }
            }
            Migrate::Remap
        }
        Migrate::Remap => {
            for process in &mut s.processes {
                if process.entry == Entry::Moving {
                    process.entry = Entry::Merged;
                }
            }
            s.node.lock = None;
            Migrate::Done
        }
        _ => Migrate::Done,
    }
}

fn reclaim(s: &mut State) -> Reclaim {
    match s.reclaim {
        Reclaim::Lock if s.node.page && s.node.lock.is_none() => {
            s.node.lock = Some(Agent::Reclaim);
            Reclaim::Unmap
        }
        Reclaim::Unmap => {
            for p in 0..PROCESSES {
                if s.processes[p].entry == Entry::Merged && s.is_found(p) {
                    s.processes[p].entry = Entry::Swapped;
                }
            }
            s.node.lock = None;
            Reclaim::Done
        }
        _ => Reclaim::Done,
    }
}

fn swap_in(s: &mut State, p: usize) -> SwapIn {
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
