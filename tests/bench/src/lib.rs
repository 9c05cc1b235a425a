// SPDX-License-Identifier: GPL-2.0
//! The benchmark: both engines on the same workloads in the same boot.
//!
//! `content` and `workload` are the generator; `worker` and `workers` are the
//! processes that hold what it makes; `engine` drives an engine pass by pass;
//! `exact` and `wall` measure; `phase` tells QEMU's plugin (in plugin/) what is being
//! measured, and `holds` is its bookkeeping of locks; `results`,
//! `table`, `report`, `targets` and `plot` are what comes out.

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
