// SPDX-License-Identifier: GPL-2.0

//! The module's `mm`: its own files as far as they are pure logic, and stand-ins for the others.

#![allow(dead_code, clippy::style, clippy::precedence)]

#[path = "mm/folio.rs"]
pub(crate) mod folio;
#[path = "../../../src/mm/mappers.rs"]
pub(crate) mod mappers;
#[path = "mm/memcg.rs"]
pub(crate) mod memcg;
#[path = "../../../src/mm/rmap_item.rs"]
pub(crate) mod rmap_item;
#[path = "../../../src/mm/seen.rs"]
pub(crate) mod seen;
#[path = "../../../src/mm/stable_key.rs"]
pub(crate) mod stable_key;
#[path = "mm/stable_node.rs"]
pub(crate) mod stable_node;

use kernel::mm::Mm;

pub(crate) fn cond_resched() {}

pub(crate) fn merging_pages(_: &Mm) -> usize {
    0
}

pub(crate) fn report_metadata(_: &Mm, _: usize) {}
