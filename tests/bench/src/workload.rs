// SPDX-License-Identifier: GPL-2.0
//! The workloads: the content of each page of each process. A plan is a pure function of the workload's name
//! and a scale, so the expected sharing can be counted in advance.

use std::collections::HashMap;

use crate::content::{mix, Content};

/// The number of pages in 64 MiB.
const FULL: usize = 16384;
const PER_HUGE: usize = 512;
/// One in this many pages of `volatile` is rewritten between passes.
const VOLATILE_EVERY: usize = 10;

/// Return the number of a content. Different classes never have equal numbers.
fn number(class: u64, owner: usize, index: usize) -> u64 {
    (class << 56) | ((owner as u64) << 40) | index as u64
}

fn same(index: usize) -> Content {
    Content::Random(number(1, 0, index))
}

fn own(owner: usize, index: usize) -> Content {
    Content::Random(number(2, owner, index))
}

/// A mapping and the content of its pages. Page `k` with content is the mapping's page `k * stride`; the
/// others are never touched.
#[derive(Clone, Debug, PartialEq)]
pub struct Area {
    pub contents: Vec<Content>,
    pub stride: usize,
    /// The number of pages of the mapping.
    pub span: usize,
    pub huge: bool,
    /// Whether only the pages with content stay mapped, so that each becomes a VMA.
    pub split: bool,
    /// Indices in `contents` of pages that are rewritten between passes.
    pub volatile: Vec<usize>,
}

impl Area {
    fn plain(contents: Vec<Content>) -> Self {
        Self {
            span: contents.len(),
            contents,
            stride: 1,
            huge: false,
            split: false,
            volatile: Vec::new(),
        }
    }

    fn spread(contents: Vec<Content>, span: usize) -> Self {
        Self {
            stride: span / contents.len(),
            span,
            ..Self::plain(contents)
        }
    }

    /// Return the content of volatile page `place` in `round`. Every second one is the same in all processes,
    /// so a merge of it would soon break.
    pub fn rewritten(&self, owner: usize, place: usize, round: u64) -> Content {
        let index = (place << 20) | round as usize;
        if place % 2 == 0 {
            Content::Random(number(3, 0, index))
        } else {
            Content::Random(number(4, owner, index))
        }
    }
}

/// The actions of a forked child on its copy of the first VMA.
#[derive(Clone, Debug, PartialEq)]
pub struct Child {
    /// Its parent: 0 is the first process, n the n-th child.
    pub parent: usize,
    /// The places that it writes, with the content.
    pub writes: Vec<(usize, Content)>,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Process {
    pub areas: Vec<Area>,
    /// A tree of children, all forked before any of them writes.
    pub children: Vec<Child>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    pub processes: Vec<Process>,
    pub use_zero_pages: bool,
}

/// The suffix of workloads that run with `merge_eagerly` set: the same pages, on engines that have this file.
const EAGER: &str = "_eager";

/// Return whether a workload of this name wants `merge_eagerly`.
pub fn is_eager(name: &str) -> bool {
    name.ends_with(EAGER)
}

/// All generated workloads, in the order of the report. `real` comes from real programs instead.
pub const GENERATED: [&str; 13] = [
    "dup50",
    "dup50_eager",
    "unique",
    "equal",
    "zero",
    "zero_use_zero_pages",
    "tail",
    "volatile",
    "volatile_eager",
    "thp",
    "sparse",
    "vmas",
    "fork",
];

/// Shuffle in a way that depends only on `seed`.
fn shuffled<T>(mut list: Vec<T>, seed: u64) -> Vec<T> {
    let mut x = mix(seed);
    for i in (1..list.len()).rev() {
        x = mix(x);
        list.swap(i, (x % (i as u64 + 1)) as usize);
    }
    list
}

/// Half of the pages are equal across all processes, the others unique, in an order that differs between the
/// processes.
fn half_equal(owner: usize, pages: usize) -> Vec<Content> {
    let content = |i| {
        if i % 2 == 0 {
            same(i)
        } else {
            own(owner, i)
        }
    };
    shuffled((0..pages).map(content).collect(), 7 + owner as u64)
}

fn each(processes: usize, area: impl Fn(usize) -> Area) -> Plan {
    let process = |owner| Process {
        areas: vec![area(owner)],
        children: Vec::new(),
    };
    Plan {
        processes: (0..processes).map(process).collect(),
        use_zero_pages: false,
    }
}

/// Return the plan of workload `name`, with its number of pages divided by `shrink` (1 for a measurement,
/// more in tests). `None` if there is no such workload.
pub fn plan(name: &str, shrink: usize) -> Option<Plan> {
    let pages = FULL / shrink;
    let plan = match name.strip_suffix(EAGER).unwrap_or(name) {
        "dup50" => each(4, |p| Area::plain(half_equal(p, pages))),
        "unique" => each(4, |p| Area::plain((0..pages).map(|i| own(p, i)).collect())),
        "equal" => each(4, |_| Area::plain(vec![same(0); pages])),
        "zero" => zero(pages / 2),
        "zero_use_zero_pages" => Plan {
            use_zero_pages: true,
            ..zero(pages / 2)
        },
        "tail" => each(4, |p| Area::plain(tail(p, pages / 2))),
        "volatile" => each(4, |p| Area {
            volatile: (0..pages).step_by(VOLATILE_EVERY).collect(),
            ..Area::plain(half_equal(p, pages))
        }),
        "thp" => each(4, |p| thp(p, pages)),
        "sparse" => Plan {
            processes: (0..2).map(|p| sparse(p, pages / 4)).collect(),
            use_zero_pages: false,
        },
        "vmas" => each(2, |p| Area {
            split: true,
            ..Area::spread(half_equal(p, 20_000 / shrink), 40_000 / shrink)
        }),
        "fork" => fork(pages / 4),
        _ => return None,
    };
    Some(plan)
}

/// Half of the pages are zero, the others unique.
fn zero(pages: usize) -> Plan {
    each(4, |p| {
        let content = |i| {
            if i % 2 == 0 {
                Content::Zero
            } else {
                own(p, i)
            }
        };
        Area::plain(shuffled((0..pages).map(content).collect(), 7 + p as u64))
    })
}

/// Of eight pages, three differ in the last eight bytes only, and three have their first half in common. Two
/// are equal across the processes, though similar to the first three.
fn tail(owner: usize, pages: usize) -> Vec<Content> {
    let content = |i| match i % 8 {
        0..3 => Content::Tail {
            base: 1,
            tail: number(5, owner, i),
        },
        3..6 => Content::Head {
            head: 1,
            rest: number(6, owner, i),
        },
        _ => Content::Tail {
            base: 1,
            tail: number(7, 0, i),
        },
    };
    shuffled((0..pages).map(content).collect(), 7 + owner as u64)
}

/// Every fourth huge page has an eighth that is equal across the processes.
fn thp(owner: usize, pages: usize) -> Area {
    let content = |i: usize| {
        let with_equal = (i / PER_HUGE) % 4 == 0;
        if with_equal && i % PER_HUGE < PER_HUGE / 8 {
            same(i)
        } else {
            own(owner, i)
        }
    };
    Area {
        huge: true,
        ..Area::plain((0..pages).map(content).collect())
    }
}

/// One page in every 512, and very few in 32 TiB.
fn sparse(owner: usize, pages: usize) -> Process {
    let few = pages / 16;
    let far = (0..few).map(|i| own(owner, i + (1 << 30))).collect();
    Process {
        areas: vec![
            Area::spread(half_equal(owner, pages), pages * PER_HUGE),
            Area::spread(far, 32 << (40 - 12)),
        ],
        children: Vec::new(),
    }
}

/// There are sixteen children, of which twelve are grandchildren. Each writes a quarter of its pages, half of
/// that with the same content as its siblings.
fn fork(pages: usize) -> Plan {
    let places = shuffled((0..pages).collect(), 3);
    let writes = |child: usize| {
        let content = |(n, &place): (usize, &usize)| {
            let what = if n % 2 == 0 {
                same(place)
            } else {
                own(child, place)
            };
            (place, what)
        };
        places[..pages / 4]
            .iter()
            .enumerate()
            .map(content)
            .collect()
    };
    let children = (1..=16)
        .map(|n| Child {
            parent: if n <= 4 { 0 } else { (n - 5) / 3 + 1 },
            writes: writes(n),
        })
        .collect();
    Plan {
        processes: vec![Process {
            areas: vec![Area::plain((0..pages).map(|i| own(0, i)).collect())],
            children,
        }],
        use_zero_pages: false,
    }
}

impl Plan {
    /// Return the number of pages with content, once for each process that maps them.
    pub fn pages(&self) -> u64 {
        self.processes
            .iter()
            .map(|p| {
                let own: usize = p.areas.iter().map(|a| a.contents.len()).sum();
                (own * (1 + p.children.len())) as u64
            })
            .sum()
    }

    /// Return the contents of all pages that are not rewritten. A page that processes share since a fork
    /// counts once.
    pub fn steady(&self) -> Vec<Content> {
        let mut all = Vec::new();
        for process in &self.processes {
            for area in &process.areas {
                let mut volatile = vec![false; area.contents.len()];
                for &place in &area.volatile {
                    volatile[place] = true;
                }
                let held = area.contents.iter().zip(volatile);
                all.extend(held.filter(|(_, v)| !v).map(|(c, _)| *c));
            }
            for child in &process.children {
                all.extend(child.writes.iter().map(|(_, c)| *c));
            }
        }
        all
    }

    /// Return the expected growth of `pages_sharing` (and of `ksm_zero_pages`, with zero pages in use): all
    /// but one of the pages of every content.
    pub fn expected_sharing(&self) -> u64 {
        let mut count: HashMap<Content, u64> = HashMap::new();
        for content in self.steady() {
            *count.entry(content).or_default() += 1;
        }
        count
            .iter()
            .map(|(content, n)| {
                if self.use_zero_pages && *content == Content::Zero {
                    *n
                } else {
                    n - 1
                }
            })
            .sum()
    }

    pub fn is_volatile(&self) -> bool {
        self.processes
            .iter()
            .any(|p| p.areas.iter().any(|a| !a.volatile.is_empty()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::content::{fill, PAGE};
    use std::collections::HashSet;

    const SHRINK: usize = 16;

    fn small(name: &str) -> Plan {
        plan(name, SHRINK).unwrap()
    }

    /// Return the same count as `expected_sharing`, from the bytes themselves.
    fn sharing_by_bytes(plan: &Plan) -> u64 {
        let mut pages = HashSet::new();
        let mut sharing = 0;
        let mut page = vec![0; PAGE];
        for content in plan.steady() {
            fill(content, 1, &mut page);
            let new = pages.insert(page.clone());
            let zero = plan.use_zero_pages && page.iter().all(|&b| b == 0);
            sharing += u64::from(!new || zero);
        }
        sharing
    }

    #[test]
    fn what_is_promised_is_in_the_bytes() {
        for name in GENERATED {
            let plan = small(name);
            assert_eq!(sharing_by_bytes(&plan), plan.expected_sharing(), "{name}");
        }
    }

    #[test]
    fn sizes_in_earnest() {
        let pages = |name| plan(name, 1).unwrap().pages();
        for name in ["dup50", "unique", "equal", "volatile", "thp"] {
            assert_eq!(pages(name), 4 * 64 * 256, "{name}");
        }
        for name in ["zero", "zero_use_zero_pages", "tail"] {
            assert_eq!(pages(name), 4 * 32 * 256, "{name}");
        }
        assert_eq!(pages("vmas"), 40_000);
        assert_eq!(pages("fork"), 17 * 4096);
        assert_eq!(pages("sparse"), 2 * (4096 + 256));
    }

    #[test]
    fn sharing_in_earnest() {
        let sharing = |name| plan(name, 1).unwrap().expected_sharing();
        assert_eq!(sharing("dup50"), 8192 * 3);
        assert_eq!(sharing("unique"), 0);
        assert_eq!(sharing("equal"), 65535);
        assert_eq!(sharing("zero"), 16384 - 1);
        assert_eq!(sharing("zero_use_zero_pages"), 16384);
        assert_eq!(sharing("tail"), 2048 * 3);
        assert_eq!(sharing("thp"), 8 * 64 * 3);
        assert_eq!(sharing("sparse"), 2048);
        assert_eq!(sharing("vmas"), 10_000);
        assert_eq!(sharing("fork"), 512 * 15);
    }

    #[test]
    fn half_of_dup50_is_in_every_process_in_another_order() {
        let plan = small("dup50");
        let sets: Vec<HashSet<Content>> = plan
            .processes
            .iter()
            .map(|p| p.areas[0].contents.iter().copied().collect())
            .collect();
        let everywhere = sets[0]
            .iter()
            .filter(|c| sets.iter().all(|s| s.contains(c)))
            .count();
        assert_eq!(everywhere * 2, sets[0].len());
        assert_ne!(plan.processes[0], plan.processes[1]);
    }

    #[test]
    fn a_tenth_is_volatile_and_new_in_every_round() {
        let plan = small("volatile");
        let area = &plan.processes[0].areas[0];
        assert_eq!(area.volatile.len(), area.contents.len().div_ceil(10));
        let mut seen: HashSet<Content> = plan.steady().into_iter().collect();
        for round in 1..4 {
            for &place in &area.volatile {
                assert!(seen.insert(area.rewritten(0, place, round)));
            }
        }
        // One of two places is rewritten alike in all processes.
        assert_eq!(area.rewritten(0, 20, 1), area.rewritten(1, 20, 1));
        assert_ne!(area.rewritten(0, 25, 1), area.rewritten(1, 25, 1));
    }

    #[test]
    fn tails_and_heads_are_there() {
        let all = small("tail").steady();
        let heads = all.iter().filter(|c| matches!(c, Content::Head { .. }));
        let tails = all.iter().filter(|c| matches!(c, Content::Tail { .. }));
        assert_eq!(heads.count() * 8, all.len() * 3);
        assert_eq!(tails.count() * 8, all.len() * 5);
    }

    #[test]
    fn a_quarter_of_the_huge_pages_has_equal_parts() {
        let plan = plan("thp", 1).unwrap();
        let (a, b) = (&plan.processes[0].areas[0], &plan.processes[1].areas[0]);
        assert!(a.huge);
        let with = a
            .contents
            .chunks(PER_HUGE)
            .zip(b.contents.chunks(PER_HUGE))
            .filter(|(a, b)| a.iter().zip(*b).any(|(a, b)| a == b))
            .count();
        assert_eq!(with, 8);
    }

    #[test]
    fn sparse_spans() {
        let plan = plan("sparse", 1).unwrap();
        let areas = &plan.processes[0].areas;
        assert_eq!(areas[0].stride, 512);
        assert_eq!(areas[1].span * PAGE, 32 << 40);
    }

    #[test]
    fn the_tree_of_children() {
        let plan = small("fork");
        let children = &plan.processes[0].children;
        assert_eq!(children.len(), 16);
        for (n, child) in children.iter().enumerate() {
            assert!(child.parent <= n, "a parent comes before its children");
        }
        for parent in 1..=4 {
            assert_eq!(children.iter().filter(|c| c.parent == parent).count(), 3);
        }
        assert_eq!(children[0].writes.len() * 4, 16384 / 4 / SHRINK);
    }

    #[test]
    fn eager_workloads_are_the_same_pages() {
        assert_eq!(small("volatile_eager"), small("volatile"));
        assert!(is_eager("dup50_eager") && !is_eager("dup50"));
    }

    #[test]
    fn unknown_names_have_no_plan() {
        assert!(plan("real", 1).is_none());
    }
}
