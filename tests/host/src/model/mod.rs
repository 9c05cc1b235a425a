// SPDX-License-Identifier: GPL-2.0

//! The merge protocol as a small model, every interleaving of which is looked at.
//!
//! Two processes with one page each, of equal content at first; A may fork a child C. The agents are the
//! scan, which publishes B's page and joins A's to it, or publishes C's and joins B's, and whoever else may come by at any moment: a
//! processor that stores through what it has in its TLB, the fault that follows when it may not, fork,
//! exit, a device that writes to a page that `get_user_pages_fast()` gave it, and migration. One step of
//! an agent is what nobody can see the middle of; what a lock protects from some of the others is still
//! several steps for the rest.
//!
//! | step | in the module |
//! | --- | --- |
//! | `Scan::Relatives` | `LockedPage::check_fork_sharing` (src/mm/rmap.rs) |
//! | `Scan::Get` … `Scan::Publish` | `MergeableVma::make_ksm_page` (src/mm/replace.rs), `NodeBox::set_page` (src/mm/stable_node.rs) |
//! | `Scan::Find`, `Scan::LockMerged` | `NodeBox::page`, `PageRef::try_lock` |
//! | `Scan::Join…` | `MergeableVma::replace_page`, `PteLock::clear_unless` (src/mm/pte.rs), `NodeBox::add_rmap_item` |
//! | `Scan::Prune` | freeing a node that no folio points at |
//!
//! The scan only tries locks. Where it holds nothing, trying again later is the same as waiting, so the model
//! waits there; where it holds something, it gives up.
//!
//! The rest is the kernel's: `do_wp_page`, `copy_page_range`, `gup_fast_pte_range`, `migrate_pages`,
//! `rmap_walk_ksm`, `exit_mmap`.
//!
//! The model in [`life`] is about what becomes of a merged page after that, over many passes.

mod agents;
mod life;
mod tests;

use stateright::{Model, Property};

/// Pages of memory: two at first, copies for three processes, one to migrate to, one more in flight.
pub(crate) const FRAMES: usize = 7;
/// A, B, and A's child C.
pub(crate) const PROCESSES: usize = 3;
pub(crate) const A: usize = 0;
pub(crate) const B: usize = 1;
pub(crate) const C: usize = 2;

/// What both pages hold at first, and what a device writes. A process writes its number and one.
pub(crate) const EQUAL: u8 = 0;
pub(crate) const DEVICE: u8 = 9;

/// A page frame, with its folio.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Frame {
    pub(crate) content: u8,
    /// All references; 0: free.
    pub(crate) refs: u8,
    /// Those of them that are mappings.
    pub(crate) maps: u8,
    /// `PageAnonExclusive`.
    pub(crate) exclusive: bool,
    /// Whether `folio->mapping` points at the node.
    pub(crate) ksm: bool,
    /// Who holds the folio lock.
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

/// A process, with what a processor has of its page table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Process {
    pub(crate) entry: Entry,
    /// Frame and whether it may be written to.
    pub(crate) tlb: Option<(usize, bool)>,
    /// The page-table lock.
    pub(crate) ptl: Option<Agent>,
    /// How many hold `mmap_lock` for reading, and whether somebody does for writing.
    pub(crate) readers: u8,
    pub(crate) writer: bool,
    /// What the process must read; `None`: there is no such process.
    pub(crate) expected: Option<u8>,
}

/// The stable node, and whose mappings are listed with it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Node {
    pub(crate) alive: bool,
    pub(crate) freed: bool,
    /// `kpfn`.
    pub(crate) frame: usize,
    pub(crate) listed: [bool; PROCESSES],
    /// Whether the first item leads to all who got the page by a fork, and not to whom it is for and his
    /// children only.
    pub(crate) to_relatives: bool,
}

impl Node {
    /// Whether a walk finds the mapping of a process: an item leads to who is listed and his children, and
    /// the first one, perhaps, to all who got the page by a fork.
    pub(crate) fn leads_to(&self, process: usize) -> bool {
        match process {
            A => self.listed[A] || (self.listed[C] && self.to_relatives),
            C => self.listed[C] || self.listed[A],
            other => self.listed[other],
        }
    }
}

/// Who takes a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Agent {
    Scan,
    /// The thread of this process that stores.
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

/// What is done wrong on purpose, to see that it is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mutation {
    /// Nothing.
    None,
    /// References of others are not looked at before a page is replaced.
    IgnoreHolders,
    /// They are looked at before the entry is cleared.
    HoldersFirst,
    /// Contents are compared before the entry is cleared.
    CompareFirst,
    /// The entry is cleared, but TLBs keep it.
    NoFlush,
    /// The published page stays writable where it is mapped.
    StaysWritable,
    /// A joined mapping is listed after the merged page's lock was given up.
    ListLate,
    /// A node is freed as soon as nobody maps its page, which still points at it.
    FreeEarly,
    /// A page is published while somebody who maps it forks, and has not flushed his TLBs.
    PublishDuringFork,
    /// The first item of a node leads to the process and its children only.
    OwnRelativesOnly,
    /// It does so if one mapping is left when the page is published, whoever's that is.
    CountLate,
    /// The page that a node names is taken for its page without asking whether it points back.
    TrustNode,
}

/// Which agents there are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Protocol {
    pub(crate) mutation: Mutation,
    /// Whose page is published, and whose is joined to it: B's and A's, or C's and B's.
    pub(crate) merges: (usize, usize),
    pub(crate) store: [bool; PROCESSES],
    pub(crate) fork: bool,
    pub(crate) exit: bool,
    pub(crate) device: bool,
    /// Whose page is migrated.
    pub(crate) migrate: Option<usize>,
}

impl State {
    pub(crate) fn free_frame(&self) -> Option<usize> {
        self.frames.iter().position(|frame| frame.refs == 0)
    }

    /// A new page of one's own, with one reference.
    pub(crate) fn allocate(&mut self, content: u8) -> usize {
        let n = self.free_frame().expect("FRAMES is too small");
        self.frames[n] = Frame {
            content,
            refs: 1,
            ..Frame::default()
        };
        n
    }

    /// Drops a reference; the last one frees the page, whose mapping is forgotten then.
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

    /// Drops a mapping of a page and its reference.
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
            Property::always("nobody may write to a merged page", |_, s: &State| {
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
            Property::always(
                "an address space that is gone maps nothing",
                |_, s: &State| {
                    s.processes
                        .iter()
                        .all(|p| p.expected.is_some() || p.entry == Entry::None)
                },
            ),
            Property::always("nobody waits for ever", |model: &Self, s: &State| {
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
            // The model would prove little if none of this happened.
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
