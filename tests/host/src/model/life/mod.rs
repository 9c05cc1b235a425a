// SPDX-License-Identifier: GPL-2.0

//! What becomes of a merged page, from pass to pass, as a small model, every interleaving of which is looked at.
//!
//! The model of the merge protocol (the parent module) has one merge in many steps. This one has merging in few
//! steps, and the scan makes pass after pass until all else is over. It is about the list of a stable node:
//! every mapping of a merged page in a registered process is on it after at most one pass, the engine remembers
//! each item on it, and the node stays as long as a registered process maps its page.
//!
//! There are two unrelated processes A and B, and A's child C, with one page each, all of equal content; and one
//! stable node, whose page is the merged one.
//!
//! | step | in the module |
//! | --- | --- |
//! | `Scan::Turn`, `Scan::Look` | `Engine::step_mm`, `State::update_tracked` (src/ksm/scan.rs) |
//! | `Scan::Drop` | `Core::release_item` (src/ksm/page.rs), `ItemBox::detach` (src/mm/rmap_item.rs) |
//! | `Scan::List` | `State::stable_tree_append` (src/ksm/merge.rs) |
//! | `Scan::Relatives`, `Scan::Publish`, `Scan::Join` | `State::merge_into_first` |
//! | `Scan::Undo` … `Scan::UndoLook` | `Engine::break_cow_pending`, `State::cow_broken` |
//! | `RunTwo` | `Engine::unmerge_all` |
//!
//! The rest is the kernel's: `dup_mmap`, `exit_mmap`, `ksm_madvise`, `handle_userfault`, `do_swap_page`,
//! `try_to_unmap`, `migrate_pages`.

mod agents;
mod tests;

use stateright::{Model, Property};

pub(crate) const PROCESSES: usize = 3;
pub(crate) const A: usize = 0;
pub(crate) const B: usize = 1;
/// A's child.
pub(crate) const C: usize = 2;

/// What a process has at its only address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Entry {
    Empty,
    /// A page of its own.
    Own,
    /// The page that A and C share since the fork, not merged.
    Family,
    /// The page of the node.
    Merged,
    /// A KSM page that belongs to no node any more.
    Orphan,
    /// A migration entry of the node's page.
    Moving,
    /// A swap entry of the node's page, which is in the swap cache.
    Swapped,
}

/// What the engine remembers of the page of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Word {
    Nothing,
    Seen,
    /// With the item, which is on the node's list as long as the node is not freed.
    Merged,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Process {
    pub(crate) entry: Entry,
    /// `UFFDIO_RWPROTECT`: an unshare fault fails.
    pub(crate) protected: bool,
    /// `VM_MERGEABLE`.
    pub(crate) mergeable: bool,
    /// Whether the process itself is a user of its address space, and how many others are.
    pub(crate) alive: bool,
    pub(crate) pins: u8,
    /// Whether the engine was told of it, and not yet that it is gone.
    pub(crate) registered: bool,
    /// `mmap_lock`.
    pub(crate) readers: u8,
    pub(crate) writer: bool,
    /// Whether a device holds a reference on its page: it can be write-protected, but no other page takes its
    /// place.
    pub(crate) pinned: bool,
    pub(crate) word: Word,
    /// What `smart_scan` knows of its leaf: whether nothing happened in the last pass, and how many of the next ones skip it.
    pub(crate) quiet: bool,
    pub(crate) skips: u8,
    /// Whether it had a mapping that was not listed when the pass began, and has it still.
    pub(crate) due: bool,
    /// Whether it was listed without a mapping then, and is still.
    pub(crate) outdated: bool,
    /// Whether a lock could not be had in this pass.
    pub(crate) blocked: bool,
}

impl Process {
    /// Whether the engine owes it an item.
    pub(crate) fn counts(&self) -> bool {
        self.registered && self.alive
    }
}

/// The stable node and its page. The page is there as long as an entry of some kind refers to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Node {
    /// Whether there is a node.
    pub(crate) alive: bool,
    /// Whether its page is there.
    pub(crate) page: bool,
    /// The holder of the page's folio lock.
    pub(crate) lock: Option<Agent>,
    /// The processes that have an item on the list.
    pub(crate) items: [bool; PROCESSES],
}

/// What takes a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Agent {
    Scan,
    RunTwo,
    Fork,
    Exit,
    Write,
    Protect,
    OptOut,
    Migrate,
    Reclaim,
    SwapIn,
    Hold,
    Pin,
}

use agents::{Exit, Fork, Hold, Migrate, OptOut, Protect, Reclaim, RunTwo, Scan, SwapIn};

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct State {
    pub(crate) processes: [Process; PROCESSES],
    pub(crate) node: Node,
    /// Whether the scan may merge: `run` is 1.
    pub(crate) merging: bool,
    /// Whether the swap-in path hands out copies: `run=2` is being written.
    pub(crate) copying: bool,
    /// Whether the next pass must not skip anything, and whether this one must not.
    pub(crate) owed: bool,
    pub(crate) thorough: bool,
    /// Whether all else was over when the pass began, and nothing changed since.
    pub(crate) still: bool,
    pub(crate) scan: Scan,
    pub(crate) run_two: RunTwo,
    pub(crate) fork: Fork,
    pub(crate) exit: Exit,
    pub(crate) write: Option<usize>,
    pub(crate) protect: Protect,
    pub(crate) opt_out: OptOut,
    pub(crate) migrate: Migrate,
    pub(crate) reclaim: Reclaim,
    pub(crate) swap_in: SwapIn,
    pub(crate) hold: Hold,
    pub(crate) pin: Option<usize>,
    pub(crate) wrong: Wrong,
}

/// What went wrong in one step, and cannot be told from the state after it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Wrong {
    /// A pass went by a mapping that is not listed.
    pub(crate) overdue: bool,
    /// A pass went by an item without a mapping.
    pub(crate) outdated: bool,
    /// An item was taken off after a fault that did not take the mapping away.
    pub(crate) dropped: bool,
    /// `run=2` reported success, and a registered process has merged pages.
    pub(crate) lied: bool,
    /// An address space was freed with a page mapped.
    pub(crate) leaked: bool,
    /// An item was taken off while another agent had the lock that protects the list.
    pub(crate) torn: bool,
}

/// What is done wrong on purpose, to see that it is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mutation {
    /// Nothing.
    None,
    /// Undoing a merge takes the page for unmerged after a fault that failed.
    UndoTrustsFault,
    /// `run=2` does.
    RunTwoTrustsFault,
    /// Only VMAs that are mergeable are walked by the scan.
    ScanMergeableOnly,
    /// In other VMAs the scan looks at listed pages only.
    ScanKeepsListed,
    /// Only VMAs that are mergeable are unmerged by `run=2`.
    RunTwoMergeableOnly,
    /// Swapping in that has begun before `run=2` is not waited for.
    RunTwoIgnoresSwapIn,
    /// The thread frees nodes by force while `run=2` is going on.
    ForceMeanwhile,
    /// A leaf is skipped in a pass before which a relative's page was published.
    SkipRelatives,
    /// A leaf is skipped in a pass after one that could not list what it had to, for want of a lock.
    ForgetOwed,
    /// A leaf with swapped pages is skipped.
    SkipSwapped,
    /// A leaf is still skipped after one of its pages was merged with a page of another leaf.
    SkipMerged,
    /// When the lock of the merged page cannot be had, the page is forgotten all the same.
    LoseItem,
    /// When it cannot be had, the item is taken off without it.
    UnlinkUnlocked,
    /// The scan waits for an `mmap_lock`.
    WaitForMmap,
    /// The fault that undoes a merge is taken without users pinned.
    UndoUnpinned,
    /// The fault of `run=2` is.
    RunTwoUnpinned,
}

/// What there is besides the scan.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Protocol {
    pub(crate) mutation: Mutation,
    /// Whether the leaves of A and B are skipped at first, for nothing has happened there for long.
    pub(crate) old: bool,
    /// Whether C was forked before the model begins, and shares A's page; or is forked later, or never.
    pub(crate) born: bool,
    pub(crate) fork: bool,
    pub(crate) run_two: bool,
    pub(crate) exit: Option<usize>,
    pub(crate) write: Option<usize>,
    pub(crate) protect: Option<usize>,
    pub(crate) opt_out: Option<usize>,
    pub(crate) migrate: bool,
    pub(crate) reclaim: bool,
    /// The process that reads the page back in.
    pub(crate) swap_in: Option<usize>,
    /// The process that holds its `mmap_lock` for writing for a while, or for ever.
    pub(crate) hold: Option<(usize, bool)>,
    /// The process with a page that a device holds for a while.
    pub(crate) pin: Option<usize>,
}

impl State {
    /// Whether some entry refers to the node's page.
    fn is_referred_to(&self) -> bool {
        self.processes
            .iter()
            .any(|p| matches!(p.entry, Entry::Merged | Entry::Moving | Entry::Swapped))
    }

    /// What follows from any step at once.
    fn settle(&mut self) {
        if !self.is_referred_to() && self.node.lock.is_none() {
            self.node.page = false;
        }
        let shared = [A, C].map(|p| self.processes[p].entry == Entry::Family);
        if shared != [true, true] {
            for p in [A, C] {
                if self.processes[p].entry == Entry::Family {
                    self.processes[p].entry = Entry::Own;
                }
            }
        }
        for p in 0..PROCESSES {
            self.processes[p].due &= self.is_unlisted(p);
            self.processes[p].outdated &= self.is_listed_in_vain(p);
        }
    }

    /// Whether a registered process maps the merged page without an item.
    pub(crate) fn is_unlisted(&self, p: usize) -> bool {
        let process = &self.processes[p];
        process.counts() && process.entry == Entry::Merged && !self.node.items[p]
    }

    /// Whether there is an item for a process that has another page, or none.
    pub(crate) fn is_listed_in_vain(&self, p: usize) -> bool {
        let process = &self.processes[p];
        let other = matches!(process.entry, Entry::Own | Entry::Family | Entry::Empty);
        process.counts() && other && self.node.items[p]
    }

    /// Whether all but the scan have come to an end; a lock that is held for ever is no end of its own.
    pub(crate) fn others_done(&self) -> bool {
        self.run_two == RunTwo::Done
            && self.fork == Fork::Done
            && self.exit == Exit::Done
            && self.write.is_none()
            && self.protect == Protect::Done
            && self.opt_out == OptOut::Done
            && self.migrate == Migrate::Done
            && self.reclaim == Reclaim::Done
            && self.swap_in == SwapIn::Done
            && matches!(self.hold, Hold::Done | Hold::ForEver)
            && self.pin.is_none()
    }

    fn done(&self) -> bool {
        self.scan == Scan::Done && self.others_done()
    }
}

impl Model for Protocol {
    type State = State;
    type Action = Agent;

    fn init_states(&self) -> Vec<State> {
        let seen = if self.old { Word::Seen } else { Word::Nothing };
        let process = Process {
            entry: Entry::Own,
            protected: false,
            mergeable: true,
            alive: true,
            pins: 0,
            registered: true,
            readers: 0,
            writer: false,
            pinned: false,
            word: seen,
            quiet: self.old,
            skips: if self.old { agents::SKIPS + 1 } else { 0 },
            due: false,
            outdated: false,
            blocked: false,
        };
        let unborn = Process {
            entry: Entry::Empty,
            alive: false,
            registered: false,
            word: Word::Nothing,
            quiet: false,
            skips: 0,
            ..process
        };
        let mut processes = [process, process, unborn];
        if self.born {
            processes[A].entry = Entry::Family;
            processes[C] = Process {
                entry: Entry::Family,
                word: Word::Nothing,
                quiet: false,
                skips: 0,
                ..process
            };
        }
        if let Some(p) = self.pin {
            processes[p].pinned = true;
        }
        vec![State {
            processes,
            node: Node::default(),
            merging: true,
            copying: false,
            owed: false,
            thorough: false,
            still: false,
            scan: Scan::Begin,
            run_two: if self.run_two {
                RunTwo::Start
            } else {
                RunTwo::Done
            },
            fork: if self.fork { Fork::Lock } else { Fork::Done },
            exit: self.exit.map_or(Exit::Done, |_| Exit::Leave),
            write: self.write,
            protect: self.protect.map_or(Protect::Done, |_| Protect::On),
            opt_out: self.opt_out.map_or(OptOut::Done, |_| OptOut::Lock),
            migrate: if self.migrate {
                Migrate::Lock
            } else {
                Migrate::Done
            },
            reclaim: if self.reclaim {
                Reclaim::Lock
            } else {
                Reclaim::Done
            },
            swap_in: self.swap_in.map_or(SwapIn::Done, |_| SwapIn::Fault),
            hold: self.hold.map_or(Hold::Done, |_| Hold::Lock),
            pin: self.pin,
            wrong: Wrong::default(),
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Agent>) {
        let all = [
            Agent::Scan,
            Agent::RunTwo,
            Agent::Fork,
            Agent::Exit,
            Agent::Write,
            Agent::Protect,
            Agent::OptOut,
            Agent::Migrate,
            Agent::Reclaim,
            Agent::SwapIn,
            Agent::Hold,
            Agent::Pin,
        ];
        actions.extend(
            all.into_iter()
                .filter(|&agent| agents::can_step(self, state, agent)),
        );
    }

    fn next_state(&self, state: &State, agent: Agent) -> Option<State> {
        let mut next = state.clone();
        agents::step(self, &mut next, agent);
        next.settle();
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("no node leaves a page that is mapped", |_, s: &State| {
                s.processes
                    .iter()
                    .all(|p| !(p.counts() && p.entry == Entry::Orphan))
            }),
            Property::always("a mapping is listed after a pass", |_, s: &State| {
                !s.wrong.overdue
            }),
            Property::always(
                "an item without a mapping goes after a pass",
                |_, s: &State| !s.wrong.outdated,
            ),
            Property::always(
                "what could not be unmerged keeps its item",
                |_, s: &State| !s.wrong.dropped,
            ),
            Property::always("every item is remembered", |_, s: &State| {
                let lost = |p: usize| s.node.items[p] && s.processes[p].word != Word::Merged;
                !(0..PROCESSES).any(lost)
            }),
            Property::always("run=2 tells the truth", |_, s: &State| !s.wrong.lied),
            Property::always("what is gone maps nothing", |_, s: &State| !s.wrong.leaked),
            Property::always("a list changes under its lock", |_, s: &State| {
                !s.wrong.torn
            }),
            Property::always("nothing waits for ever", |model: &Self, s: &State| {
                let mut actions = Vec::new();
                model.actions(s, &mut actions);
                !actions.is_empty() || s.done()
            }),
            Property::always(
                "in the end what is mapped is listed",
                |model: &Self, s: &State| {
                    let right = |p: usize| {
                        let process = &s.processes[p];
                        let mapped = process.counts() && process.entry == Entry::Merged;
                        model.hold == Some((p, true)) || s.node.items[p] == mapped
                    };
                    !s.done() || (0..PROCESSES).all(right)
                },
            ),
            // The model would prove little if none of this happened.
            Property::sometimes("pages merge", |_, s: &State| {
                let merged = |p: &&Process| p.entry == Entry::Merged;
                s.processes.iter().filter(merged).count() > 1
            }),
            Property::sometimes("nothing is merged in the end", |_, s: &State| {
                s.done() && !s.node.alive
            }),
        ]
    }
}
