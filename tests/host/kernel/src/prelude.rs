// SPDX-License-Identifier: GPL-2.0

//! The items that `use kernel::prelude::*` brings in.

pub use crate::{
    alloc::{flags::*, Box, KBox, KVBox, KVVec, KVec, VBox, VVec, Vec},
    error::{code::*, Error, Result},
    pr_err, ThisModule,
};
pub use core::{
    mem::{align_of, align_of_val, size_of, size_of_val},
    pin::Pin,
};
