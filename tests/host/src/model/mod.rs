// SPDX-License-Identifier: GPL-2.0

//! The merge protocol as a small model. The checker visits every interleaving.
//!
//! There are two processes with one page each, of equal content at first; A may fork a child C. The scan
//! makes B's page a KSM page and merges A's with it, or makes C's a KSM page and merges B's. Other agents may
//! act at any moment: a processor that stores through an entry in its TLB, the fault that follows if it may
//! not, fork, exit, a device that writes to a page from `get_user_pages_fast()`, and migration. One step of
//! an agent is atomic to all others. A sequence under a lock that excludes only some of them is several
//! steps.
//!
//! | step | in `src/mm/` |
//! | --- | --- |
//! | `Scan::CheckSharing` | `LockedPage::check_fork_sharing` (rmap.rs) |
//! | `Scan::Get` … `Scan::MakeKsmPage` | `MergeableVma::make_ksm_page` (replace.rs), `NodeBox::set_page` |
//! | `Scan::Find`, `Scan::LockMerged` | `NodeBox::page`, `PageRef::try_lock` |
//! | `Scan::Join…` | `MergeableVma::replace_page`, `PteLock::clear_unless` (pte.rs), `NodeBox::add_rmap_item` |
//! | `Scan::Prune` | freeing a node that no folio points at |
//!
//! The scan only tries locks. Where it holds nothing, retrying later is the same as waiting, so the model
//! waits there. Where it holds something, it gives up.
//!
//! The rest is the kernel's: `do_wp_page`, `copy_page_range`, `gup_fast_pte_range`, `migrate_pages`,
//! `rmap_walk_ksm`, `exit_mmap`.
//!
//! The model in [`life`] follows a merged page after that, over many passes.

mod agents;
mod life;
mod tests;

use stateright::{Model, Property};

/// Pages of memory: two at first, copies for three processes, one as a migration target, one more in flight.
pub(crate) const FRAMES: usize = 7;
/// A, B, and A's child C.
pub(crate) const PROCESSES: usize = 3;
pub(crate) const A: usize = 0;
pub(crate) const B: usize = 1;
pub(crate) const C: usize = 2;

/// The content of both pages at first, and that written by a device. A process writes its number plus one.
pub(crate) const EQUAL: u8 = 0;
pub(crate) const DEVICE: u8 = 9;

/// A page frame, with its folio.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Frame {
    pub(crate) content: u8,
    /// All references; 0 if it is free.
    pub(crate) refs: u8,
    /// The references that are mappings.
    pub(crate) maps: u8,
    /// `PageAnonExclusive`.
    pub(crate) exclusive: bool,
    /// Whether `folio->mapping` points to the node.
    pub(crate) ksm: bool,
    /// The holder of the folio lock.
    pub(crate) lock: Option<Agent>,
}

/// A page-table entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Entry {
    None,
    Maps {
        frame: usize,
        writable: bool,
    },
    /// A migration entry.
    Moving {
        frame: usize,
        writable: bool,
    },
}

/// A process, and a processor's TLB entry for its page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Process {
    pub(crate) entry: Entry,
    /// The frame and whether it is writable.
    pub(crate) tlb: Option<(usize, bool)>,
    /// The page-table lock.
    pub(crate) ptl: Option<Agent>,
    /// The readers of `mmap_lock`, and whether there is a writer.
    pub(crate) readers: u8,
    pub(crate) writer: bool,
    /// The content that the process must read; `None` if the process does not exist.
    pub(crate) expected: Option<u8>,
}

/// The stable node, and the processes whose mappings it lists.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Node {
    pub(crate) alive: bool,
    pub(crate) freed: bool,
    /// `kpfn`.
    pub(crate) frame: usize,
    pub(crate) listed: [bool; PROCESSES],
    /// Whether the first item leads to all processes that share the page by a fork, rather than to its own
    /// process and the children of that only.
    pub(crate) to_sharers: bool,
}

impl Node {
    /// Return whether a walk finds the mapping of a process. An item leads to the listed process and its
    /// children. The first one may lead to all processes that share the page by a fork.
    pub(crate) fn leads_to(&self, process: usize) -> bool {
        match process {
            A => self.listed[A] || (self.listed[C] && self.to_sharers),
            C => self.listed[C] || self.listed[A],
            other => self.listed[other],
        }
    }
}

/// The agents, which take the steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Agent {
    Scan,
    /// The storing thread of this process.
    Store(usize),
    Fork,
    Exit,
    Device,
    Migrate,
}

use agents::{Device, Exit, Fork, Migrate, Scan, Store};

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct State {
    pub(crate) frames: [Frame; FRAMES],
    pub(crate) processes: [Process; PROCESSES],
    pub(crate) node: Node,
    pub(crate) scan: Scan,
    pub(crate) stores: [Store; PROCESSES],
    pub(crate) fork: Fork,
    pub(crate) exit: Exit,
    pub(crate) device: Device,
    pub(crate) migrate: Migrate,
    /// A walk over the mappings of a merged page missed one.
    pub(crate) missed: bool,
}

/// Mutations: deliberate errors, which the checker must find.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mutation {
    /// No error.
    None,
    /// Other references are not checked before a page is replaced.
    IgnoreHolders,
    /// Other references are checked before the entry is cleared.
    HoldersFirst,
    /// Contents are compared before the entry is cleared.
    CompareFirst,
    /// The entry is cleared, but TLBs keep it.
    NoFlush,
    /// The KSM page stays writable where it is mapped.
    StaysWritable,
    /// A mapping is listed after the lock of the KSM page was released.
    ListLate,
    /// A node is freed as soon as its page is unmapped, although the page still points to it.
    FreeEarly,
    /// A page becomes a KSM page while a process that maps it is forking, and has not flushed its TLBs.
    MergeDuringFork,
    /// The first item of a node leads to its process and the children of that only.
    OwnSharersOnly,
    /// It does so if one mapping, of any process, is left when the page becomes a KSM page.
    CountLate,
    /// The page that a node names counts as its page without a check that it points back.
    TrustNode,
}

/// The agents in a run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Protocol {
    pub(crate) mutation: Mutation,
    /// The process whose page becomes a KSM page, and the one whose page merges with it: B and A, or C and B.
    pub(crate) merges: (usize, usize),
    pub(crate) store: [bool; PROCESSES],
    pub(crate) fork: bool,
    pub(crate) exit: bool,
    pub(crate) device: bool,
    /// The process whose page is migrated.
    pub(crate) migrate: Option<usize>,
}

impl State {
    pub(crate) fn free_frame(&self) -> Option<usize> {
        self.frames.iter().position(|frame| frame.refs == 0)
    }

    /// Allocate a new page with one reference.
    pub(crate) fn allocate(&mut self, content: u8) -> usize {
        let n = self.free_frame().expect("FRAMES is too small");
        self.frames[n] = Frame {
            content,
            refs: 1,
            ..Frame::default()
        };
        n
    }

    /// Drop a reference. The last one frees the page and clears its mapping field.
    pub(crate) fn put(&mut self, n: usize) {
        let frame = &mut self.frames[n];
        assert!(frame.refs > 0, "a reference too many was dropped");
        frame.refs -= 1;
        if frame.refs == 0 {
            assert!(frame.maps == 0, "a mapped page was freed");
            assert!(frame.lock.is_none(), "a locked page was freed");
            *frame = Frame::default();
        }
    }

    /// Drop a mapping of a page and its reference.
    pub(crate) fn unmap(&mut self, n: usize) {
        assert!(self.frames[n].maps > 0, "a mapping too many was dropped");
        self.frames[n].maps -= 1;
        self.put(n);
    }

    pub(crate) fn map(&mut self, n: usize) {
        self.frames[n].maps += 1;
        self.frames[n].refs += 1;
    }

    fn merged(&self, (first, second): (usize, usize)) -> bool {
        let frame = |p: usize| match self.processes[p].entry {
            Entry::Maps { frame, .. } => Some(frame),
            _ => None,
        };
        frame(first).is_some() && frame(first) == frame(second)
    }

    fn done(&self) -> bool {
        self.scan == Scan::Done
            && self.stores.iter().all(|store| *store == Store::Done)
            && self.fork == Fork::Done
            && self.exit == Exit::Done
            && self.device == Device::Done
            && self.migrate == Migrate::Done
    }
}

impl Model for Protocol {
    type State = State;
    type Action = Agent;

    fn init_states(&self) -> Vec<State> {
        let process = |n: usize| Process {
            entry: Entry::Maps {
                frame: n,
                writable: true,
            },
            tlb: Some((n, true)),
            ptl: None,
            readers: 0,
            writer: false,
            expected: Some(EQUAL),
        };
        let mut frames = [Frame::default(); FRAMES];
        for frame in &mut frames[..2] {
            *frame = Frame {
                content: EQUAL,
                refs: 1,
                maps: 1,
                exclusive: true,
                ..Frame::default()
            };
        }
        let unborn = Process {
            entry: Entry::None,
            tlb: None,
            expected: None,
            ..process(C)
        };
        let if_wanted = |wanted, start, done| if wanted { start } else { done };
        let if_exits = if self.exit { Exit::Zap } else { Exit::Done };
        vec![State {
            frames,
            processes: [process(A), process(B), unborn],
            node: Node::default(),
            scan: Scan::Get,
            stores: self.store.map(|wanted| match wanted {
                true => Store::Try,
                false => Store::Done,
            }),
            fork: if self.fork { Fork::Lock } else { Fork::Done },
            exit: if_exits,
            device: if self.device {
                Device::Look
            } else {
                Device::Done
            },
            migrate: if_wanted(self.migrate.is_some(), Migrate::Isolate, Migrate::Done),
            missed: false,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Agent>) {
        let all = [
            Agent::Scan,
            Agent::Store(A),
            Agent::Store(B),
            Agent::Store(C),
            Agent::Fork,
            Agent::Exit,
            Agent::Device,
            Agent::Migrate,
        ];
        actions.extend(
            all.into_iter()
                .filter(|&agent| agents::can_step(self, state, agent)),
        );
    }

    fn next_state(&self, state: &State, agent: Agent) -> Option<State> {
        let mut next = state.clone();
        agents::step(self, &mut next, agent);
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("every process reads what it wrote last", |_, s: &State| {
                s.processes.iter().all(|p| {
                    let right = |frame: usize| {
                        s.frames[frame].refs > 0 && Some(s.frames[frame].content) == p.expected
                    };
                    let mapped = match p.entry {
                        Entry::Maps { frame, .. } => right(frame),
                        _ => true,
                    };
                    mapped && p.tlb.is_none_or(|(frame, _)| right(frame))
                })
            }),
            Property::always("no process may write to a merged page", |_, s: &State| {
                s.processes.iter().all(|p| {
                    let mapped = match p.entry {
                        Entry::Maps { frame, writable } => !(writable && s.frames[frame].ksm),
                        _ => true,
                    };
                    mapped && p.tlb.is_none_or(|(frame, w)| !(w && s.frames[frame].ksm))
                })
            }),
            Property::always(
                "a walk finds all mappings of a merged page",
                |_, s: &State| !s.missed,
            ),
            Property::always("no page points at a node that was freed", |_, s: &State| {
                !s.node.freed || s.frames.iter().all(|frame| !frame.ksm)
            }),
            Property::always("an exited address space maps nothing", |_, s: &State| {
                s.processes
                    .iter()
                    .all(|p| p.expected.is_some() || p.entry == Entry::None)
            }),
            Property::always("no agent waits forever", |model: &Self, s: &State| {
                let mut actions = Vec::new();
                model.actions(s, &mut actions);
                !actions.is_empty() || s.done()
            }),
            Property::always("references are mappings in the end", |_, s: &State| {
                let mappings = |n: usize| {
                    let maps =
                        |p: &&Process| matches!(p.entry, Entry::Maps { frame, .. } if frame == n);
                    s.processes.iter().filter(maps).count()
                };
                !s.done()
                    || s.frames.iter().enumerate().all(|(n, frame)| {
                        usize::from(frame.maps) == mappings(n)
                            && frame.refs == frame.maps
                            && frame.lock.is_none()
                    })
            }),
            // The model would prove little if none of these happened.
            Property::sometimes("the pages merge", |model: &Self, s: &State| {
                s.merged(model.merges)
            }),
            Property::sometimes(
                "the scan ends with nothing merged",
                |model: &Self, s: &State| s.scan == Scan::Done && !s.merged(model.merges),
            ),
        ]
    }
}
