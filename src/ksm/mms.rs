// SPDX-License-Identifier: GPL-2.0

//! The address spaces that have mergeable memory.

use super::index::MmId;
use kernel::{
    alloc::Flags,
    mm::Mm,
    prelude::*,
    rbtree::{RBTree, RBTreeNodeReservation},
    sync::aref::ARef,
};

/// The registered address spaces, in the order in which they came.
///
/// Held under a spinlock, since it is the kernel's tracepoints that report who comes and goes.
pub(crate) struct Registry {
    live: RBTree<MmId, ARef<Mm>>,
    by_mm: RBTree<usize, MmId>,
    /// Gone through `ksm_exit()`; what the engine knows of them is still to be freed.
    dead: RBTree<MmId, ARef<Mm>>,
    next_id: MmId,
    /// An address space was not entered for want of memory.
    missed: bool,
    /// Memory for more, to fall back on.
    spares: KVec<Reservation>,
}

/// The memory to enter one address space with.
pub(crate) struct Reservation {
    live: RBTreeNodeReservation<MmId, ARef<Mm>>,
    by_mm: RBTreeNodeReservation<usize, MmId>,
}

impl Reservation {
    /// Allocates it.
    pub(crate) fn new(flags: Flags) -> Result<Self> {
        Ok(Self {
            live: RBTreeNodeReservation::new(flags)?,
            by_mm: RBTreeNodeReservation::new(flags)?,
        })
    }
}

impl Registry {
    /// Nobody registered.
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

    /// Has other reservations to fall back on. Gives back those that it had.
    #[must_use]
    pub(crate) fn replace_spares(&mut self, spares: KVec<Reservation>) -> KVec<Reservation> {
        core::mem::replace(&mut self.spares, spares)
    }

    /// Enters `mm`, unless it is known, with a spare reservation. Without one it only remembers that somebody
    /// was missed. Neither allocates nor frees anything.
    pub(crate) fn enter_with_spare(&mut self, mm: &Mm) {
        if self.knows(mm) {
            return;
        }
        match self.spares.pop() {
            // It is given back nothing: the spare is used.
            Some(spare) => drop(self.enter(mm.into(), Some(spare))),
            None => self.missed = true,
        }
    }

    /// Whether `mm` is registered.
    pub(crate) fn knows(&self, mm: &Mm) -> bool {
        self.by_mm.get(&(mm.as_raw() as usize)).is_some()
    }

    /// Enters `mm`. Without a reservation or a spare it only remembers that somebody was missed.
    ///
    /// Gives back what it did not use, to be dropped without the lock.
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
        self.live.insert(live.into_node(id, mm));
        None
    }

    /// Notes that the address space `mm` is exiting. Returns whether it was registered.
    pub(crate) fn exit(&mut self, mm: *const kernel::bindings::mm_struct) -> bool {
        let Some(id) = self.by_mm.remove(&(mm as usize)) else {
            return false;
        };
        // Moved as it is: there is nothing to allocate here, nor may the reference be dropped.
        if let Some(node) = self.live.remove_node(&id) {
            self.dead.insert(node);
        }
        true
    }

    /// The first live address space behind `after`.
    pub(crate) fn next(&self, after: MmId) -> Option<(MmId, ARef<Mm>)> {
        let cursor = self.live.cursor_lower_bound(&after.checked_add(1)?)?;
        let (id, mm) = cursor.current();
        Some((*id, mm.clone()))
    }

    /// The number of the address space that came last.
    pub(crate) fn last_id(&self) -> MmId {
        self.live.cursor_back().map_or(0, |last| *last.current().0)
    }

    /// The number of the newest one that ever was.
    pub(crate) fn newest(&self) -> MmId {
        self.next_id.saturating_sub(1)
    }

    /// Takes one that is exiting.
    pub(crate) fn take_dead(&mut self) -> Option<(MmId, ARef<Mm>)> {
        let id = *self.dead.cursor_front()?.current().0;
        let mm = self.dead.remove(&id)?;
        Some((id, mm))
    }

    /// Whether [`Self::take_dead`] has something to give.
    pub(crate) fn has_dead(&self) -> bool {
        !self.dead.is_empty()
    }

    /// Whether nobody is registered.
    pub(crate) fn is_empty(&self) -> bool {
        self.live.is_empty()
    }

    /// Whether somebody was missed since this was asked last.
    pub(crate) fn take_missed(&mut self) -> bool {
        core::mem::take(&mut self.missed)
    }

    /// Whether somebody was missed.
    pub(crate) fn has_missed(&self) -> bool {
        self.missed
    }
}
