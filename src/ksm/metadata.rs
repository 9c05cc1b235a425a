// SPDX-License-Identifier: GPL-2.0

//! Memory for metadata, and which memory cgroup is charged for it.
//!
//! Memory per mapping (rmap items, page maps) is charged to the group of the process that maps the page. A
//! process can have any number of mappings, and once they are merged they cost it next to no other memory.
//!
//! Memory per content (stable nodes, queued pages, the filter) is charged to no group. A stable node outlives
//! the process that it was made for, and serves all groups that map its page. It takes a bounded number of
//! bytes for each page frame, and page frames are charged.

use super::{
    probation::MergeInfo,
    state::{Core, GFP_SCAN},
};
use crate::hash::Sample;
use crate::mm::{
    memcg::{accounted, charge},
    rmap_item::ItemBox,
};
use kernel::{
    alloc::{flags, Flags},
    mm::Mm,
    prelude::*,
};

/// Returns the flags for memory per mapping. Allocate within [`charge`] for the address space.
#[inline]
pub(super) fn gfp_mapping() -> Flags {
    accounted(GFP_SCAN)
}

/// Like [`gfp_mapping`], for a mapping of a merged page that a fork has made already.
///
/// If such a mapping were not listed, the page could be neither migrated nor swapped out, whichever groups
/// share it. So the charge may exceed the limit. The group makes up for it when it is charged next.
#[inline]
pub(super) fn gfp_inherited() -> Flags {
    accounted(flags::GFP_ATOMIC | flags::__GFP_NOWARN)
}

impl Core {
    /// Allocates an rmap item for the address space that this step scans.
    ///
    /// Fails without trying if the step ran out of memory before: a group at its limit counts, and reports to
    /// its watchers, each charge that it refuses.
    pub(super) fn new_item(&self, sample: Sample) -> Result<ItemBox> {
        if self.starved.get() {
            return Err(ENOMEM);
        }
        let item = self.try_new_item(sample, gfp_mapping());
        self.starved.set(item.is_err());
        item
    }

    /// Allocates an rmap item for `mm`, which need not be the address space that this step scans.
    pub(super) fn item_for(&self, mm: &Mm, sample: Sample) -> Result<ItemBox> {
        charge(mm, || self.try_new_item(sample, gfp_mapping()))
    }

    /// Allocates an rmap item for a page without strikes that is merged now.
    pub(super) fn try_new_item(&self, sample: Sample, flags: Flags) -> Result<ItemBox> {
        ItemBox::new(sample, MergeInfo::now(&self.clock).get(), flags)
    }
}
