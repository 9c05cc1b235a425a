// SPDX-License-Identifier: GPL-2.0

//! The tests, a file for each file of the module.

mod advisor;
mod checksum;
mod counted;
mod filter;
mod index;
mod pagemap;
mod registry;
mod standin;
