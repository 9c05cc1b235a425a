// SPDX-License-Identifier: GPL-2.0

//! The next step of each agent of the model, and whether the agent can take it.

mod exit;
mod fork;
mod migrate;
mod opt_out;
mod reclaim;
mod run_two;
mod scan;
mod swap_in;

use super::{Agent, Entry, Mutation, Protocol, State, Word, A, B, C, PROCESSES};
pub(crate) use exit::Exit;
pub(crate) use fork::Fork;
pub(crate) use migrate::Migrate;
pub(crate) use opt_out::OptOut;
pub(crate) use reclaim::Reclaim;
pub(crate) use run_two::RunTwo;
pub(crate) use scan::Scan;
pub(crate) use swap_in::SwapIn;

/// For how many passes a leaf is skipped after a pass without any event in it.
pub(crate) const SKIPS: u8 = 2;

/// A process protects its page by userfaultfd, and lifts the protection again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Protect {
    On,
    Off,
    Done,
}

/// A process holds its own `mmap_lock` for writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Hold {
    Lock,
    Unlock,
    /// It never releases the lock.
    ForEver,
    Done,
}

/// Return whether an agent has a step that it need not wait for.
pub(crate) fn can_step(model: &Protocol, s: &State, agent: Agent) -> bool {
    let free = |p: usize| !s.processes[p].writer;
    let unused = |p: usize| free(p) && s.processes[p].readers == 0;
    let unlocked = s.node.lock.is_none();
    match agent {
        Agent::Scan => match s.scan {
            Scan::Done => false,
            // The thread merges nothing, but does deferred work.
            Scan::Begin | Scan::Turn(_) | Scan::End if !s.merging => has_deferred(model, s),
            Scan::Turn(p) if p < PROCESSES && model.mutation == Mutation::WaitForMmap => free(p),
            Scan::UndoFault(p) => s.processes[p].entry != Entry::Moving,
            _ => true,
        },
        Agent::RunTwo => match s.run_two {
            RunTwo::Done => false,
            // A holder keeps the engine's lock for one step.
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
            // Its threads have ended.
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

/// Return whether a process may fault. Faults wait for a migration, and for the lock of a page in the swap
/// cache.
fn may_fault(s: &State, p: usize) -> bool {
    match s.processes[p].entry {
        Entry::Moving => false,
        Entry::Swapped => s.node.lock.is_none(),
        _ => true,
    }
}

/// Return whether the thread has deferred work while `run` is not 1.
fn has_deferred(model: &Protocol, s: &State) -> bool {
    let dead = |p: usize| !s.processes[p].registered && s.processes[p].word != Word::Nothing;
    let stale = s.node.alive && !s.node.page;
    (0..PROCESSES).any(dead) && s.node.lock.is_none() || stale || has_force(model, s)
}

pub(crate) fn step(model: &Protocol, s: &mut State, agent: Agent) {
    match agent {
        Agent::Scan if !s.merging && matches!(s.scan, Scan::Begin | Scan::Turn(_) | Scan::End) => {
            run_deferred(model, s)
        }
        Agent::Scan => {
            s.scan = scan::scan(model, s);
        }
        Agent::RunTwo => s.run_two = run_two::run_two(model, s),
        Agent::Fork => s.fork = fork::fork(s),
        Agent::Exit => {
            if let Some(p) = model.exit {
                s.exit = exit::exit(s, p);
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
                s.opt_out = opt_out::opt_out(s, p);
            }
        }
        Agent::Migrate => s.migrate = migrate::migrate(s),
        Agent::Reclaim => s.reclaim = reclaim::reclaim(s),
        Agent::SwapIn => {
            if let Some(p) = model.swap_in {
                s.swap_in = swap_in::swap_in(s, p);
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
    /// Note that something happened to the page of a process.
    fn note_change(&mut self, p: usize) {
        self.processes[p].quiet = false;
        self.processes[p].skips = 0;
        self.still = false;
    }

    fn set_word(&mut self, p: usize, word: Word) {
        self.processes[p].word = word;
        self.note_change(p);
    }

    /// Return whether its page can merge with another one.
    fn is_candidate(&self, p: usize) -> bool {
        let process = &self.processes[p];
        process.mergeable
            && !process.protected
            && matches!(process.entry, Entry::Own | Entry::Family)
    }

    /// Free the node, whose page is gone or was released, and with it all items.
    fn release(&mut self) {
        self.node.alive = false;
        self.node.items = [false; PROCESSES];
        self.still = false;
    }

    /// Take an item off the node. Return whether it is off.
    fn detach(&mut self, wrong: Mutation, p: usize) -> bool {
        if !self.node.items[p] {
            return true;
        }
        if !self.node.page {
            self.release();
            return true;
        }
        if self.node.lock.is_some() {
            // The next scan of the page retries this.
            match wrong {
                Mutation::UnlinkUnlocked => self.wrong.torn = true,
                Mutation::LoseItem => return true,
                _ => return false,
            }
        }
        self.node.items[p] = false;
        true
    }

    /// Take the fault that replaces a merged page by a copy. If nothing is mapped, it maps a new page.
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

    /// Return whether a walk of the node's list finds the mapping of a process.
    fn is_found(&self, p: usize) -> bool {
        match p {
            B => self.node.items[B],
            _ => self.node.items[A] || self.node.items[C],
        }
    }
}

fn run_deferred(model: &Protocol, s: &mut State) {
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

/// Return whether the thread is to free the node by force, which is wrong.
fn has_force(model: &Protocol, s: &State) -> bool {
    model.mutation == Mutation::ForceMeanwhile
        && s.node.alive
        && s.node.items == [false; PROCESSES]
        && s.node.lock.is_none()
}

/// Take the node off its page and free it.
fn abandon(s: &mut State) {
    for process in &mut s.processes {
        match process.entry {
            Entry::Merged => process.entry = Entry::Orphan,
            // It is copied when it is swapped in.
            Entry::Swapped => process.entry = Entry::Own,
            _ => {}
        }
    }
    s.node.page = false;
    s.release();
}
