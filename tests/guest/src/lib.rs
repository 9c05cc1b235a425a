// SPDX-License-Identifier: GPL-2.0
//! What the guest tests share: the engine's knobs, memory whose content is
//! known byte for byte, a scripted worker process, the kernel's own view of
//! pages, and a KTAP runner.
//!
//! Each test states what a merging engine must do, not how rksm does it; so
//! the in-tree engine must pass nearly all of them as well, and
//! `RKSM_ENGINE=ksm` runs them against it.

pub mod background;
pub mod cgroup;
pub mod disk;
pub mod engine;
pub mod harness;
pub mod inject;
pub mod kmemleak;
pub mod kmsg;
pub mod kprobe;
pub mod memblock;
pub mod module;
pub mod numa;
pub mod pageflags;
pub mod patience;
pub mod prng;
pub mod proc;
pub mod region;
pub mod rwp;
pub mod scan;
pub mod suites;
pub mod swap;
pub mod sys;
pub mod uffd;
pub mod worker;
