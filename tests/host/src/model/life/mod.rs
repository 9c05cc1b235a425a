// SPDX-License-Identifier: GPL-2.0

//! A merged page's life, from pass to pass, as a small model. The checker visits every interleaving.
//!
//! The model of the merge protocol (the parent module) has one merge in many steps. This one has merges in
//! few steps, and the scan makes pass after pass until all other agents are done. Its subject is the list of
//! a stable node. Every mapping of a merged page in a registered process is on it after at most one pass. The
//! engine remembers each item on it. The node stays as long as a registered process maps its page.
//!
//! There are two unrelated processes A and B, and A's child C, each with one page, all of equal content.
//! There is one stable node, and its page is the merged one.
//!
//! | step | in the module |
//! | --- | --- |
//! | `Scan::Turn`, `Scan::Look` | `Engine::step_mm`, `State::update_tracked` (src/ksm/scan.rs) |
//! | `Scan::Drop` | `Core::release_item` (src/ksm/page.rs), `ItemBox::detach` (src/mm/rmap_item.rs) |
//! | `Scan::List` | `State::stable_tree_append` (src/ksm/merge.rs) |
//! | `Scan::CheckSharing`, `Scan::MakeKsmPage`, `Scan::Join` | `State::merge_into_first` |
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

/// The state of a process's only address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Entry {
    Empty,
    /// A page of its own.
    Own,
    /// The page that A and C share by the fork, not merged.
    Family,
    /// The page of the node.
    Merged,
    /// A KSM page without a node.
    Orphan,
    /// A migration entry of the node's page.
    Moving,
    /// A swap entry of the node's page, which is in the swap cache.
    Swapped,
}

/// The engine's record of a process's page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Word {
    Nothing,
    Seen,
    /// The record has the item, which is on the node's list until the node is freed.
    Merged,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Process {
    pub(crate) entry: Entry,
    /// `UFFDIO_RWPROTECT`: an unshare fault fails.
    pub(crate) protected: bool,
    /// `VM_MERGEABLE`.
    pub(crate) mergeable: bool,
    /// Whether the process itself uses its address space, and how many other users there are.
    pub(crate) alive: bool,
    pub(crate) pins: u8,
    /// Whether the engine knows of it: from registration until the notification of its exit.
    pub(crate) registered: bool,
    /// `mmap_lock`.
    pub(crate) readers: u8,
    pub(crate) writer: bool,
    /// Whether a device holds a reference to its page. Such a page can be write-protected, but not replaced.
    pub(crate) pinned: bool,
    pub(crate) word: Word,
    /// What `smart_scan` knows of its leaf: whether the last pass was without events, and how many of the
    /// next passes skip it.
    pub(crate) quiet: bool,
    pub(crate) skips: u8,
    /// Whether it has had an unlisted mapping since the pass began.
    pub(crate) due: bool,
    /// Whether it has been listed without a mapping since the pass began.
    pub(crate) outdated: bool,
    /// Whether a lock was not available in this pass.
    pub(crate) blocked: bool,
}

impl Process {
    /// Return whether the engine must list its mapping.
    pub(crate) fn counts(&self) -> bool {
        self.registered && self.alive
    }
}

/// The stable node and its page. The page exists as long as an entry of some kind refers to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Node {
    /// Whether the node exists.
    pub(crate) alive: bool,
    /// Whether its page exists.
    pub(crate) page: bool,
    /// The holder of the page's folio lock.
    pub(crate) lock: Option<Agent>,
    /// The processes that have an item on the list.
    pub(crate) items: [bool; PROCESSES],
}

/// The agents, which take the steps.
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
    /// Whether swap-in makes copies: `run=2` is being written.
    pub(crate) copying: bool,
    /// Whether the next pass must not skip anything, and whether this pass must not.
    pub(crate) owed: bool,
    pub(crate) thorough: bool,
    /// Whether all other agents were done when the pass began, with no change since.
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

/// Errors in a step that do not show in the state after it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Wrong {
    /// A pass ended with a mapping still not listed.
    pub(crate) overdue: bool,
    /// A pass ended with an item still without a mapping.
    pub(crate) outdated: bool,
    /// An item was taken off after a fault that did not remove the mapping.
    pub(crate) dropped: bool,
    /// `run=2` reported success, and a registered process has merged pages.
    pub(crate) lied: bool,
    /// An address space was freed with a page mapped.
    pub(crate) leaked: bool,
    /// An item was taken off while another agent had the lock that protects the list.
    pub(crate) torn: bool,
}

/// Mutations: deliberate errors, which the checker must find.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mutation {
    /// No error.
    None,
    /// Undoing a merge treats the page as unmerged after a failed fault.
    UndoTrustsFault,
    /// `run=2` treats a page as unmerged after a failed fault.
    RunTwoTrustsFault,
    /// The scan visits only mergeable VMAs.
    ScanMergeableOnly,
    /// In other VMAs the scan visits only listed pages.
    ScanKeepsListed,
    /// `run=2` unmerges only mergeable VMAs.
    RunTwoMergeableOnly,
    /// `run=2` does not wait for a swap-in that began before it.
    RunTwoIgnoresSwapIn,
    /// The thread frees nodes by force during `run=2`.
    ForceMeanwhile,
    /// A pass skips a leaf whose process shares a page, by a fork, that became a KSM page before.
    SkipSharers,
    /// A pass skips a leaf after a pass that could not list a mapping because a lock was not available.
    ForgetOwed,
    /// A pass skips a leaf with swapped pages.
    SkipSwapped,
    /// A pass skips a leaf after one of its pages merged with a page of another leaf.
    SkipMerged,
    /// When the lock of the merged page is not available, the engine forgets the page all the same.
    LoseItem,
    /// When that lock is not available, the item is taken off without it.
    UnlinkUnlocked,
    /// The scan waits for an `mmap_lock`.
    WaitForMmap,
    /// The fault that undoes a merge is taken without users pinned.
    UndoUnpinned,
    /// The fault of `run=2` is taken without users pinned.
    RunTwoUnpinned,
}

/// The agents besides the scan.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Protocol {
    pub(crate) mutation: Mutation,
    /// Whether the first passes skip the leaves of A and B, as nothing has happened there for long.
    pub(crate) old: bool,
    /// Whether C exists at the start, and shares A's page. Otherwise it is forked later, or never.
    pub(crate) born: bool,
    pub(crate) fork: bool,
    pub(crate) run_two: bool,
    pub(crate) exit: Option<usize>,
    pub(crate) write: Option<usize>,
    pub(crate) protect: Option<usize>,
    pub(crate) opt_out: Option<usize>,
    pub(crate) migrate: bool,
    pub(crate) reclaim: bool,
    /// The process that swaps the page back in.
    pub(crate) swap_in: Option<usize>,
    /// The process that holds its `mmap_lock` for writing, for a while or forever.
    pub(crate) hold: Option<(usize, bool)>,
    /// The process with a page to which a device holds a reference for a while.
    pub(crate) pin: Option<usize>,
}

impl State {
    /// Return whether some entry refers to the node's page.
    fn is_referred_to(&self) -> bool {
        self.processes
            .iter()
            .any(|p| matches!(p.entry, Entry::Merged | Entry::Moving | Entry::Swapped))
    }

    /// Apply the immediate consequences of a step.
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

    /// Return whether a registered process maps the merged page without an item.
    pub(crate) fn is_unlisted(&self, p: usize) -> bool {
        let process = &self.processes[p];
        process.counts() && process.entry == Entry::Merged && !self.node.items[p]
    }

    /// Return whether there is an item for a process that has another page, or none.
    pub(crate) fn is_listed_in_vain(&self, p: usize) -> bool {
        let process = &self.processes[p];
        let other = matches!(process.entry, Entry::Own | Entry::Family | Entry::Empty);
        process.counts() && other && self.node.items[p]
    }

    /// Return whether all agents but the scan are done. A lock that is held forever does not count.
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
                "a page that could not be unmerged keeps its item",
                |_, s: &State| !s.wrong.dropped,
            ),
            Property::always("every item is remembered", |_, s: &State| {
                let lost = |p: usize| s.node.items[p] && s.processes[p].word != Word::Merged;
                !(0..PROCESSES).any(lost)
            }),
            Property::always("run=2 tells the truth", |_, s: &State| !s.wrong.lied),
            Property::always("an exited process maps nothing", |_, s: &State| {
                !s.wrong.leaked
            }),
            Property::always("a list changes under its lock", |_, s: &State| {
                !s.wrong.torn
            }),
            Property::always("no agent waits forever", |model: &Self, s: &State| {
                let mut actions = Vec::new();
                model.actions(s, &mut actions);
                !actions.is_empty() || s.done()
            }),
            Property::always(
                "in the end every mapping is listed",
                |model: &Self, s: &State| {
                    let right = |p: usize| {
                        let process = &s.processes[p];
                        let mapped = process.counts() && process.entry == Entry::Merged;
                        model.hold == Some((p, true)) || s.node.items[p] == mapped
                    };
                    !s.done() || (0..PROCESSES).all(right)
                },
            ),
            // The model would prove little if none of these happened.
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
