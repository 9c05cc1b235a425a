// SPDX-License-Identifier: GPL-2.0
//! What the guest tests, the torture test and the benchmark share: access to the engine's files, memory with
//! known content, the kernel's own view of pages, and helpers around them.

pub mod background;
pub mod cgroup;
pub mod disk;
pub mod engine;
pub mod kvm;
pub mod memblock;
pub mod module;
pub mod numa;
pub mod pageflags;
pub mod prng;
pub mod proc;
pub mod region;
pub mod swap;
pub mod sys;
pub mod timeout;
pub mod uffd;
