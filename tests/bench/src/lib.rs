// SPDX-License-Identifier: GPL-2.0
//! The benchmark: both engines on the same workloads in the same boot.
//!
//! `content` and `workload` generate workloads. `worker` is a process that holds one's pages, and `workers`
//! controls these processes. `engine` drives an engine pass by pass. `exact` and `wall` measure. `phase`
//! tells QEMU's plugin (in plugin/) what is being measured, and `holds` is its bookkeeping of locks.
//! `results`, `table`, `report`, `targets` and `plot` produce the output.

pub mod bystander;
pub mod content;
pub mod engine;
pub mod exact;
pub mod holds;
pub mod machine;
pub mod memory;
pub mod pages;
pub mod phase;
pub mod plot;
pub mod profile;
pub mod qmp;
pub mod report;
pub mod results;
pub mod session;
pub mod table;
pub mod targets;
pub mod trace;
pub mod wall;
pub mod worker;
pub mod workers;
pub mod workload;
