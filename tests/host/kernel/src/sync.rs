// SPDX-License-Identifier: GPL-2.0

//! References.

pub mod aref;
