// SPDX-License-Identifier: GPL-2.0
//! The benchmark: both engines on the same workloads in the same boot.
//!
//! `content` and `workload` are the generator; `worker` and `crew` are the
//! processes that hold what it makes; `engine` drives an engine pass by pass;
//! `exact` measures; `phase` tells QEMU's plugin (in plugin/) what is being
//! measured, and `holds` is its bookkeeping of locks; `results` and `table` are
//! what comes out.

pub mod content;
pub mod crew;
pub mod engine;
pub mod exact;
pub mod holds;
pub mod memory;
pub mod phase;
pub mod profile;
pub mod results;
pub mod table;
pub mod trace;
pub mod worker;
pub mod workload;
