// SPDX-License-Identifier: GPL-2.0

//! The module's `engine`, as far as it is pure logic.

// Much is used only by the rest of the module: what nobody uses is found when the module is built.
// And it is the module's own clippy that judges its style, by the kernel's settings.
#![allow(dead_code, clippy::style, clippy::precedence)]

#[path = "../../../src/engine/advisor.rs"]
pub(crate) mod advisor;
#[path = "../../../src/engine/checksum.rs"]
pub(crate) mod checksum;
#[path = "../../../src/engine/deferred.rs"]
pub(crate) mod deferred;
#[path = "../../../src/engine/filter.rs"]
pub(crate) mod filter;
#[path = "../../../src/engine/index.rs"]
pub(crate) mod index;
#[path = "../../../src/engine/pagemap/mod.rs"]
pub(crate) mod pagemap;
#[path = "../../../src/engine/position.rs"]
pub(crate) mod position;
#[path = "../../../src/engine/probation.rs"]
pub(crate) mod probation;
#[path = "../../../src/engine/registry.rs"]
pub(crate) mod registry;
#[path = "../../../src/engine/unlisted.rs"]
pub(crate) mod unlisted;
