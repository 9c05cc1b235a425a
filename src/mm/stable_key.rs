// SPDX-License-Identifier: GPL-2.0

//! The key under which the engine finds a stable node.

use crate::hash::Checksum;

/// The key of a stable node. Nodes with the same checksum (different content, or more sharers than
/// one node takes) differ in `nth`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct StableKey {
    /// The checksum of the page, or as much of it as is known, which was looked at once more when nobody could write
    /// to the page any more. (A page that was moved to another memory node has another sample, until its node gets
    /// another key; one in broken memory has any.)
    pub(crate) sum: Checksum,
    /// Numbers all nodes ever made, downwards: the newest is found first, as it is the one that most
    /// likely takes another page.
    pub(crate) nth: u64,
}
