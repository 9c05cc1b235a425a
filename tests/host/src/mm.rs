// SPDX-License-Identifier: GPL-2.0

//! The module's `mm`, as far as it is pure logic.

#[path = "../../../src/mm/stable_key.rs"]
pub(crate) mod stable_key;
