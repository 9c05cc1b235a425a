// SPDX-License-Identifier: GPL-2.0

//! Charging memory to memory cgroups.
//!
//! The scan runs in a kernel thread, so its allocations would be charged to the root group. What it remembers
//! of a process is charged to the group of that process instead. So a group cannot make the rest of the system
//! pay for the metadata of its pages.
//!
//! In-tree KSM allocates rmap items and stable nodes without `__GFP_ACCOUNT`, so no group is charged for them.

use super::ffi;
use kernel::{
    alloc::{flags, Flags},
    bindings,
    mm::Mm,
    types::NotThreadSafe,
};

/// Returns `flags` for an allocation that is charged to the group of the innermost [`charge`].
///
/// At the limit of the group, `GFP_NOWAIT` makes the allocation fail and `GFP_ATOMIC` exceeds the limit. Flags
/// that may sleep reclaim from the group, and may have one of its processes killed.
#[inline]
pub(crate) fn accounted(flags: Flags) -> Flags {
    flags | (flags::GFP_KERNEL_ACCOUNT & !flags::GFP_KERNEL)
}

/// Runs `work`, and charges its allocations with [`accounted`] flags to the memory cgroup of `mm`.
///
/// Calls nest. This is a function and no guard, since scopes must end in the reverse order of their beginnings.
///
/// # Examples
///
/// ```ignore
/// // Fails if the group is at its limit, and reclaims nothing.
/// let item = memcg::charge(mm, || ItemBox::new(sample, beat, memcg::accounted(GFP_NOWAIT)))?;
/// ```
pub(crate) fn charge<R>(mm: &Mm, work: impl FnOnce() -> R) -> R {
    let _scope = Scope::begin(mm);
    work()
}

/// A charging scope of the current task.
///
/// # Invariants
///
/// `group` is null or a group that this scope owns a reference on. It is the active group of the current task,
/// unless an inner scope has not ended. `outer` was the active group when the scope began. Scopes end in the
/// reverse order of their beginnings, as only [`charge`] makes them.
struct Scope {
    group: *mut bindings::mem_cgroup,
    outer: *mut bindings::mem_cgroup,
    /// The active group is a member of the task.
    _task: NotThreadSafe,
}

impl Scope {
    /// Makes the group of `mm` the active one of the current task.
    fn begin(mm: &Mm) -> Self {
        // SAFETY: The reference keeps the `mm_struct`, and the function asks for no more: it looks at the
        // owner under RCU, and copes with an owner that is gone.
        let group = unsafe { ffi::rksm_get_memcg(mm.as_raw()) };
        // SAFETY: The scope owns the reference on `group` that was just taken, and `drop` makes the group
        // inactive before it gives the reference up.
        let outer = unsafe { ffi::rksm_set_active_memcg(group) };
        // INVARIANT: `group` was made active just now, and its reference moves into the scope.
        Self {
            group,
            outer,
            _task: NotThreadSafe,
        }
    }
}

impl Drop for Scope {
    fn drop(&mut self) {
        // SAFETY: By the type invariant the scope that made `outer` active has not ended, so its reference
        // on that group exists.
        unsafe { ffi::rksm_set_active_memcg(self.outer) };
        // SAFETY: By the type invariant this scope owns the reference, and the group is not active any more.
        unsafe { ffi::rksm_put_memcg(self.group) };
    }
}
