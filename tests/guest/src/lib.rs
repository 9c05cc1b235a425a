// SPDX-License-Identifier: GPL-2.0
//! The guest tests, and what only they need: a scripted worker process, ways to
//! inject faults, and a KTAP runner. The rest comes from tests/lib.
//!
//! Each test states what a merging engine must do, not how rksm does it. So the in-tree engine must pass
//! nearly all of them as well; `RKSM_ENGINE=ksm` runs them against it.

pub use rksm_test_lib::{
    background, cgroup, disk, engine, memblock, module, numa, pageflags, prng, proc, region, swap,
    sys, timeout, uffd,
};

pub mod harness;
pub mod hugepage;
pub mod inject;
pub mod kmemleak;
pub mod kmsg;
pub mod kprobe;
pub mod scan;
pub mod suites;
pub mod tracefs;
pub mod worker;
