// SPDX-License-Identifier: GPL-2.0

//! Stands in for what the module's build reads from the kernel's image.

pub(crate) mod layout {
    //! The layout of `struct ksm_rmap_item` in a kernel of ours.

    pub(crate) const KSM_RMAP_ITEM_RMAP_LIST: usize = 0;
    pub(crate) const KSM_RMAP_ITEM_ANON_VMA: usize = 8;
    pub(crate) const KSM_RMAP_ITEM_MM: usize = 16;
    pub(crate) const KSM_RMAP_ITEM_ADDRESS: usize = 24;
    pub(crate) const KSM_RMAP_ITEM_LINEAR_PAGE_INDEX: usize = 32;
    pub(crate) const KSM_RMAP_ITEM_HEAD: usize = 40;
    pub(crate) const KSM_RMAP_ITEM_HLIST: usize = 48;
    pub(crate) const KSM_RMAP_ITEM_SIZE: usize = 64;
}
