// SPDX-License-Identifier: GPL-2.0

//! The tests, a file for each file of the module.

mod advisor;
mod counted;
mod cursor;
mod deferred;
mod filter;
mod hash;
mod index;
mod mappers;
mod mms;
mod page_map;
mod probation;
mod standin;
mod unlisted;

/// Run `count` cases of a property; only two under Miri, which is a thousand times slower.
pub(crate) fn cases(count: u32) -> proptest::test_runner::Config {
    proptest::test_runner::Config::with_cases(if cfg!(miri) { 2 } else { count })
}
