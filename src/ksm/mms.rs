// SPDX-License-Identifier: GPL-2.0

//! The address spaces that are registered for merging.
//!
//! Tracepoint probes for `ksm_enter` and `ksm_exit` report which address spaces come and go. They run under any
//! lock that the kernel holds there. So the [`Registry`] is under a spinlock, and its functions do not
//! allocate. Memory comes from a [`Reservation`] that is made before.

use kernel::{
    alloc::Flags,
    mm::Mm,
    prelude::*,
    rbtree::{RBTree, RBTreeNodeReservation},
    sync::aref::ARef,
};

/// The number of a registered address space. It is never used twice.
pub(crate) type MmId = u64;

/// The address of a page in one address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PageAddr {
    /// The number of the address space.
    pub(crate) mm_id: MmId,
    /// The page-aligned address.
    pub(crate) addr: usize,
}

/// A registered address space.
#[derive(Clone)]
pub(crate) struct Registered {
    pub(crate) mm: ARef<Mm>,
    /// Whether no pass has walked all of it yet.
    ///
    /// A fork has given it mappings of merged pages. Until they are listed, nothing leads to those in VMAs that
    /// have ceased to be mergeable.
    pub(crate) is_new: bool,
}

/// The registered address spaces, in the order of their registration.
pub(crate) struct Registry {
    /// Address spaces that have not exited, by number.
    live: RBTree<MmId, Registered>,
    /// The number of each of these, by the address of its `mm_struct`.
    by_mm: RBTree<usize, MmId>,
    /// Address spaces that went through `ksm_exit()`. The engine still has to forget their pages.
    dead: RBTree<MmId, Registered>,
    /// The number for the next address space. Numbers begin at 1.
    next_id: MmId,
    /// Whether an address space could not be registered for want of memory.
    missed: bool,
    /// Reservations for when the caller has none.
    spares: KVec<Reservation>,
}

/// The memory to register one address space.
pub(crate) struct Reservation {
    live: RBTreeNodeReservation<MmId, Registered>,
    by_mm: RBTreeNodeReservation<usize, MmId>,
}

impl Reservation {
    /// Allocates a reservation. `ENOMEM` if there is no memory; `flags` decide whether it may sleep.
    pub(crate) fn new(flags: Flags) -> Result<Self> {
        Ok(Self {
            live: RBTreeNodeReservation::new(flags)?,
            by_mm: RBTreeNodeReservation::new(flags)?,
        })
    }
}

impl Registry {
    /// Creates a registry without address spaces.
    pub(crate) fn new() -> Self {
        Self {
            live: RBTree::new(),
            by_mm: RBTree::new(),
            dead: RBTree::new(),
            next_id: 1,
            missed: false,
            spares: KVec::new(),
        }
    }

    /// Replaces the spare reservations. Returns the old ones, to be dropped without the lock.
    #[must_use]
    pub(crate) fn replace_spares(&mut self, spares: KVec<Reservation>) -> KVec<Reservation> {
        core::mem::replace(&mut self.spares, spares)
    }

    /// Registers `mm` with a spare reservation, unless it is registered already. If there is none, notes that
    /// an address space was missed. Neither allocates nor frees anything.
    pub(crate) fn enter_with_spare(&mut self, mm: &Mm) {
        if self.knows(mm) {
            return;
        }
        match self.spares.pop() {
            // There is nothing to free under the lock: `mm` is new, so the reservation is used.
            Some(spare) => drop(self.enter(mm.into(), Some(spare))),
            None => self.missed = true,
        }
    }

    /// Whether `mm` is registered.
    pub(crate) fn knows(&self, mm: &Mm) -> bool {
        self.by_mm.get(&(mm.as_raw() as usize)).is_some()
    }

    /// Registers `mm`, unless it is registered already. If there is neither a reservation nor a spare one,
    /// notes that an address space was missed.
    ///
    /// Returns what was not used, to be dropped without the lock.
    #[must_use]
    pub(crate) fn enter(
        &mut self,
        mm: ARef<Mm>,
        reservation: Option<Reservation>,
    ) -> Option<(ARef<Mm>, Option<Reservation>)> {
        let key = mm.as_raw() as usize;
        if self.by_mm.get(&key).is_some() {
            return Some((mm, reservation));
        }
        let Some(Reservation { live, by_mm }) = reservation.or_else(|| self.spares.pop()) else {
            self.missed = true;
            return Some((mm, None));
        };
        let id = self.next_id;
        self.next_id = id.wrapping_add(1);
        self.by_mm.insert(by_mm.into_node(key, id));
        let registered = Registered { mm, is_new: true };
        self.live.insert(live.into_node(id, registered));
        None
    }

    /// Notes that the address space `mm` is exiting. Returns whether it was registered.
    pub(crate) fn exit(&mut self, mm: *const kernel::bindings::mm_struct) -> bool {
        let Some(id) = self.by_mm.remove(&(mm as usize)) else {
            return false;
        };
        // Move the tree node as it is: nothing may be allocated here, and no reference dropped.
        if let Some(node) = self.live.remove_node(&id) {
            self.dead.insert(node);
        }
        true
    }

    /// Returns the first live address space with a number above `after`.
    pub(crate) fn next(&self, after: MmId) -> Option<(MmId, Registered)> {
        let cursor = self.live.cursor_lower_bound(&after.checked_add(1)?)?;
        let (id, registered) = cursor.current();
        Some((*id, registered.clone()))
    }

    /// Notes that a pass has walked all of a live address space.
    pub(crate) fn note_walked(&mut self, id: MmId) {
        if let Some(registered) = self.live.get_mut(&id) {
            registered.is_new = false;
        }
    }

    /// Returns the number of the newest live address space; 0 if there is none.
    pub(crate) fn last_id(&self) -> MmId {
        self.live.cursor_back().map_or(0, |last| *last.current().0)
    }

    /// Returns the number of the newest address space that was ever registered; 0 if there was none.
    pub(crate) fn newest(&self) -> MmId {
        self.next_id.saturating_sub(1)
    }

    /// Takes out an address space that has exited.
    pub(crate) fn take_dead(&mut self) -> Option<(MmId, ARef<Mm>)> {
        let id = *self.dead.cursor_front()?.current().0;
        let registered = self.dead.remove(&id)?;
        Some((id, registered.mm))
    }

    /// Whether there is an address space for [`Self::take_dead`].
    pub(crate) fn has_dead(&self) -> bool {
        !self.dead.is_empty()
    }

    /// Whether no live address space is registered.
    pub(crate) fn is_empty(&self) -> bool {
        self.live.is_empty()
    }

    /// Returns whether an address space was missed since the last call.
    pub(crate) fn take_missed(&mut self) -> bool {
        core::mem::take(&mut self.missed)
    }

    /// Whether an address space was missed since the last call of [`Self::take_missed`].
    pub(crate) fn has_missed(&self) -> bool {
        self.missed
    }
}
