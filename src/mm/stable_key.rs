// SPDX-License-Identifier: GPL-2.0

//! The key under which the engine finds a stable node.

use crate::hash::Checksum;

/// The key of a stable node. Nodes with the same checksum differ in `serial`: their content differs, or has more
/// sharers than one node can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct StableKey {
    /// The checksum of the page, as much of it as is known. It was checked again when the page was
    /// write-protected.
    ///
    /// There are two exceptions. A page that migrates to another NUMA node may have another sample, until its
    /// node gets a new key. And the key of a page in poisoned memory may be any.
    pub(crate) sum: Checksum,
    /// Numbers all nodes ever made, downwards. So the newest one comes first: it is the most likely to have
    /// room.
    pub(crate) serial: u64,
}
