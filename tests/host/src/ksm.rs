// SPDX-License-Identifier: GPL-2.0

//! The module's `ksm`, as far as it is pure logic.

// Only the rest of the module uses many items. The module's build finds unused ones, and its own clippy
// checks the style, by the kernel's settings.
#![allow(dead_code, clippy::style, clippy::precedence)]

#[path = "../../../src/ksm/advisor.rs"]
pub(crate) mod advisor;
#[path = "../../../src/ksm/cursor.rs"]
pub(crate) mod cursor;
#[path = "../../../src/ksm/deferred.rs"]
pub(crate) mod deferred;
#[path = "../../../src/ksm/filter.rs"]
pub(crate) mod filter;
#[path = "../../../src/ksm/index.rs"]
pub(crate) mod index;
#[path = "../../../src/ksm/mms.rs"]
pub(crate) mod mms;
#[path = "../../../src/ksm/page_map/mod.rs"]
pub(crate) mod page_map;
#[path = "../../../src/ksm/probation.rs"]
pub(crate) mod probation;
#[path = "../../../src/ksm/unlisted.rs"]
pub(crate) mod unlisted;
