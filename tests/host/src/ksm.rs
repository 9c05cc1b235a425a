// SPDX-License-Identifier: GPL-2.0

//! The module's `ksm`, as far as it is pure logic.

// Only the rest of the module uses many items. The module's build finds unused ones, and its own clippy
// checks the style, by the kernel's settings.
#![allow(dead_code, clippy::style, clippy::precedence)]

#[path = "../../../src/ksm/advisor.rs"]
pub(crate) mod advisor;
#[path = "../../../src/ksm/candidate.rs"]
pub(crate) mod candidate;
#[path = "../../../src/ksm/cursor.rs"]
pub(crate) mod cursor;
#[path = "../../../src/ksm/deferred.rs"]
pub(crate) mod deferred;
#[path = "../../../src/ksm/entry.rs"]
pub(crate) mod entry;
#[path = "../../../src/ksm/filter.rs"]
pub(crate) mod filter;
#[path = "../../../src/ksm/forget.rs"]
pub(crate) mod forget;
#[path = "../../../src/ksm/index.rs"]
pub(crate) mod index;
#[path = "../../../src/ksm/metadata.rs"]
pub(crate) mod metadata;
#[path = "../../../src/ksm/mms.rs"]
pub(crate) mod mms;
#[path = "../../../src/ksm/numa.rs"]
pub(crate) mod numa;
#[path = "../../../src/ksm/page.rs"]
pub(crate) mod page;
#[path = "../../../src/ksm/page_map/mod.rs"]
pub(crate) mod page_map;
#[path = "../../../src/ksm/probation.rs"]
pub(crate) mod probation;
#[path = "../../../src/ksm/settings.rs"]
pub(crate) mod settings;
#[path = "../../../src/ksm/stable_tree.rs"]
pub(crate) mod stable_tree;
#[path = "../../../src/ksm/state.rs"]
pub(crate) mod state;
#[path = "../../../src/ksm/unlisted.rs"]
pub(crate) mod unlisted;
#[path = "../../../src/ksm/unstable_tree.rs"]
pub(crate) mod unstable_tree;

// The tests of files whose items only `ksm` can see. A bench takes this file in, too, but no tests.
#[cfg(test)]
#[allow(unused_imports)]
#[path = "tests/state/mod.rs"]
mod tests;
