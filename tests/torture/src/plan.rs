// SPDX-License-Identifier: GPL-2.0
//! The sequence of operations, which depends only on the seed and on the process.

use rand::Rng;
use rand_chacha::rand_core::SeedableRng;
use rand_chacha::ChaCha8Rng;

macro_rules! ops {
    ($($op:ident $name:literal $weight:literal $child:literal,)*) => {
        /// All counted operations. Workers do those with a weight.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u8)]
        pub enum Op { $($op,)* }

        impl Op {
            pub const ALL: &'static [Self] = &[$(Self::$op,)*];

            pub fn name(self) -> &'static str {
                match self { $(Self::$op => $name,)* }
            }

            /// How often a worker does it, relative to the others.
            pub fn weight(self) -> u32 {
                match self { $(Self::$op => $weight,)* }
            }

            /// Whether forked children do it as well.
            fn for_children(self) -> bool {
                match self { $(Self::$op => $child,)* }
            }
        }
    };
}

// Name on the command line, weight, whether children do it as well.
ops! {
    Map "map" 10 true,
    Unmap "munmap" 10 true,
    Write "write" 90 true,
    Own "write-own" 30 true,
    Stamp "stamp" 60 true,
    Verify "verify" 40 true,
    Rest "rest" 30 true,
    Fork "fork" 12 false,
    Exit "exit" 1 false,
    BigExit "big-exit" 2 false,
    Mergeable "mergeable" 40 true,
    Unmergeable "unmergeable" 6 true,
    PrctlOn "prctl-on" 3 true,
    PrctlOff "prctl-off" 2 true,
    Grow "mremap-grow" 8 true,
    Shrink "mremap-shrink" 8 true,
    Move "mremap-move" 10 true,
    MoveOver "mremap-fixed" 12 true,
    Protect "mprotect" 12 true,
    DontNeed "dontneed" 12 true,
    Free "free" 12 true,
    PageOut "pageout" 14 true,
    Huge "hugepage" 6 true,
    NoHuge "nohugepage" 4 true,
    Collapse "collapse" 6 true,
    Direct "o-direct" 10 true,
    Vmsplice "vmsplice" 10 true,
    VmWrite "vm-writev" 14 true,
    Uffd "uffd-wp" 8 true,
    UffdServed "uffd-wp-served" 3 false,
    Rwp "uffd-rwp" 8 true,
    SoftDirty "soft-dirty" 4 true,
    PagemapScan "pagemap-scan" 4 true,
    NoAccess "prot-none" 5 true,
    Mlock "mlock" 5 true,
    Munlock "munlock" 5 true,
    MovePages "move-pages" 8 true,
    MigratePages "migrate-pages" 2 true,
    // The ends of children.
    ChildExit "child-exit" 0 true,
    ChildExec "child-exec" 0 true,
    ChildKilled "child-killed" 0 true,
    // The operations of control tasks.
    Kill "kill" 0 false,
    Knob "knob" 0 false,
    BadKnob "knob-bad" 0 false,
    ReadKnobs "knob-read" 0 false,
    Run0 "run-0" 0 false,
    Run1 "run-1" 0 false,
    Run2 "run-2" 0 false,
    Unload "unload" 0 false,
    Load "load" 0 false,
    Reclaim "reclaim" 0 false,
    Compact "compact" 0 false,
    DropCaches "drop-caches" 0 false,
    SwapOff "swapoff" 0 false,
    SwapOn "swapon" 0 false,
    Oom "oom-kill" 0 false,
    CpuOff "cpu-offline" 0 false,
    CpuOn "cpu-online" 0 false,
    MemOff "memory-offline" 0 false,
    MemOn "memory-online" 0 false,
}

impl Op {
    pub fn from_code(code: u8) -> Option<Self> {
        Self::ALL.get(code as usize).copied()
    }

    pub fn by_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|op| op.name() == name)
    }
}

/// The allowed operations, one bit each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allowed(pub u64);

impl Allowed {
    pub const ALL: Self = Self(u64::MAX);

    /// All that `only` names, or all if it is empty, except those that `not` names.
    pub fn new(only: &str, not: &str) -> Result<Self, String> {
        let bits = |list: &str| -> Result<u64, String> {
            list.split(',')
                .filter(|name| !name.is_empty())
                .map(|name| {
                    let op = Op::by_name(name).ok_or(format!("no operation {name}"))?;
                    Ok(1u64 << op as u8)
                })
                .try_fold(0, |all, bit: Result<u64, String>| Ok(all | bit?))
        };
        let only = bits(only)?;
        let all = if only == 0 { u64::MAX } else { only };
        Ok(Self(all & !bits(not)?))
    }

    pub fn has(self, op: Op) -> bool {
        self.0 & (1 << op as u8) != 0
    }
}

/// The identity of a process, which determines its sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Who {
    pub seed: u64,
    /// The number of the worker or control task.
    pub number: u32,
    /// How often it was started before.
    pub life: u32,
    /// The number of the forked child, from 1; 0 for the worker itself.
    pub child: u32,
}

impl Who {
    pub fn rng(self) -> ChaCha8Rng {
        let mut key = [0u8; 32];
        key[..8].copy_from_slice(&self.seed.to_le_bytes());
        key[8..12].copy_from_slice(&self.number.to_le_bytes());
        key[12..16].copy_from_slice(&self.life.to_le_bytes());
        key[16..20].copy_from_slice(&self.child.to_le_bytes());
        ChaCha8Rng::from_seed(key)
    }
}

/// One operation, in numbers that the process applies to its state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    pub op: Op,
    /// A slot, and a second one.
    pub slot: u8,
    pub other: u8,
    /// The first page.
    pub at: u16,
    /// The number of pages, from 1.
    pub len: u16,
    /// All other choices.
    pub arg: u32,
}

/// An endless sequence of steps.
pub struct Plan {
    rng: ChaCha8Rng,
    child: bool,
    allowed: Allowed,
    total: u32,
}

impl Plan {
    pub fn new(who: Who, allowed: Allowed) -> Self {
        let child = who.child != 0;
        let total = Op::ALL.iter().map(|&op| Self::weight(op, child)).sum();
        Self {
            rng: who.rng(),
            child,
            allowed,
            total,
        }
    }

    fn weight(op: Op, child: bool) -> u32 {
        if child && !op.for_children() {
            0
        } else {
            op.weight()
        }
    }

    fn op(&mut self) -> Op {
        let mut at = self.rng.random_range(0..self.total);
        for &op in Op::ALL {
            let weight = Self::weight(op, self.child);
            if at < weight {
                return op;
            }
            at -= weight;
        }
        Op::Verify
    }

    /// Return the next step, allowed or not. So excluding an operation leaves the other steps unchanged.
    fn any(&mut self) -> Step {
        let op = self.op();
        let long = self.rng.random_range(0..16) == 0;
        Step {
            op,
            slot: self.rng.random(),
            other: self.rng.random(),
            at: self.rng.random(),
            len: self.rng.random_range(1..=if long { 128 } else { 16 }),
            arg: self.rng.random(),
        }
    }
}

impl Iterator for Plan {
    type Item = Step;

    fn next(&mut self) -> Option<Step> {
        let allowed = self.allowed;
        // It may be that no operation is allowed.
        (0..100_000)
            .map(|_| self.any())
            .find(|step| allowed.has(step.op))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHO: Who = Who {
        seed: 7,
        number: 3,
        life: 1,
        child: 0,
    };

    fn steps(who: Who, allowed: Allowed, n: usize) -> Vec<Step> {
        Plan::new(who, allowed).take(n).collect()
    }

    #[test]
    fn a_sequence_replays() {
        assert_eq!(
            steps(WHO, Allowed::ALL, 5000),
            steps(WHO, Allowed::ALL, 5000)
        );
    }

    #[test]
    fn everybody_has_another_sequence() {
        let mine = steps(WHO, Allowed::ALL, 20);
        for other in [
            Who { seed: 8, ..WHO },
            Who { number: 4, ..WHO },
            Who { life: 2, ..WHO },
            Who { child: 1, ..WHO },
        ] {
            assert_ne!(mine, steps(other, Allowed::ALL, 20), "{other:?}");
        }
    }

    #[test]
    fn leaving_out_an_operation_leaves_the_rest() {
        let not = Allowed::new("", "fork,free").unwrap();
        let all = steps(WHO, Allowed::ALL, 4000);
        let rest: Vec<Step> = all.into_iter().filter(|s| not.has(s.op)).collect();
        assert!(rest.len() < 4000 && rest.len() > 3000);
        assert_eq!(steps(WHO, not, rest.len()), rest);
        let only = Allowed::new("write,verify", "verify").unwrap();
        assert!(steps(WHO, only, 100).iter().all(|s| s.op == Op::Write));
        assert!(Allowed::new("nonsense", "").is_err());
    }

    #[test]
    fn every_operation_of_a_worker_comes_up() {
        let seen = steps(WHO, Allowed::ALL, 50_000);
        for &op in Op::ALL {
            let there = seen.iter().any(|s| s.op == op);
            assert_eq!(there, op.weight() > 0, "{op:?}");
        }
        let child = steps(Who { child: 1, ..WHO }, Allowed::ALL, 50_000);
        assert!(child.iter().all(|s| s.op.for_children()));
    }

    #[test]
    fn names_and_codes_are_unique() {
        for (i, &op) in Op::ALL.iter().enumerate() {
            assert_eq!(Op::from_code(i as u8), Some(op));
            assert_eq!(Op::by_name(op.name()), Some(op));
        }
        // One bit each in `Allowed`.
        assert!(Op::ALL.len() <= 64);
    }
}
