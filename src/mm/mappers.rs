// SPDX-License-Identifier: GPL-2.0

//! Which mappings a page may have when it becomes a KSM page.
//!
//! [`MapperCheck`] judges the VMAs that an rmap walk comes by. How to find and look at them is for `rmap`.

/// The most VMAs that a check of fork sharing looks at. A page with more is left alone.
///
/// The kernel walks as many whenever it moves or reclaims such a page, but a scan does so for every page.
pub(crate) const MAX_FORK_VMAS: u32 = 1024;

/// Why a page must not become a KSM page.
///
/// An equal KSM page may still replace it in one process. Its other mappings stay as they are then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// A mapping could not be found after a merge, or there are too many VMAs to look at.
    ///
    /// The engine makes the equal page the KSM page, if that is possible.
    Lasting,
    /// A fork is going on, or the walk did not find all mappings. This may be over in a moment.
    ///
    /// The engine tries again in the next pass.
    Passing,
}

/// A VMA that may map the folio of the page.
///
/// The answers may change at any time. Each is asked for at most once, and only if those before it leave the
/// verdict open.
pub(crate) trait Mapper {
    /// Whether the VMA belongs to the process that the check is for.
    fn is_own(&self) -> bool;

    /// Whether it maps the folio, or a part of it.
    fn maps_folio(&self) -> bool;

    /// Whether it maps the page at an address where a walk by the rmap item of the process does not look.
    fn maps_elsewhere(&self) -> bool;

    /// Whether the process and the VMA are registered.
    fn is_registered(&self) -> bool;

    /// Whether the process may be in the middle of a fork.
    fn may_be_forking(&self) -> bool;
}

/// The check of all VMAs that may map a page.
pub(crate) struct MapperCheck {
    /// How many more VMAs the walk may look at.
    left: u32,
    /// How many VMAs of other processes map the folio.
    others: i32,
    verdict: Result<(), Refusal>,
}

impl MapperCheck {
    /// Begins a check that has seen no VMA.
    pub(crate) fn new() -> Self {
        Self {
            left: MAX_FORK_VMAS,
            others: 0,
            verdict: Ok(()),
        }
    }

    /// Looks at the next VMA. Returns whether to go on with the walk.
    pub(crate) fn visit(&mut self, vma: &impl Mapper) -> bool {
        let Some(left) = self.left.checked_sub(1) else {
            self.verdict = Err(Refusal::Lasting);
            return false;
        };
        self.left = left;
        if vma.is_own() || !vma.maps_folio() {
            return true;
        }
        self.others = self.others.saturating_add(1);
        self.verdict = judge(vma);
        self.verdict.is_ok()
    }

    /// Ends the check after the walk.
    ///
    /// `mapcount` is how many page-table entries map the folio, unless it is large.
    ///
    /// # Errors
    ///
    /// Says why the page must not become a KSM page.
    pub(crate) fn finish(self, mapcount: Option<i32>) -> Result<(), Refusal> {
        self.verdict?;
        match mapcount {
            // Some mapper is not reachable from the anon_vma that was walked.
            Some(count) if count > self.others.saturating_add(1) => Err(Refusal::Passing),
            _ => Ok(()),
        }
    }
}

/// Judges a VMA of another process that maps the folio.
///
/// If the process is registered, a later scan adds an rmap item for this mapping. Until then, rmap walks find it
/// by the rmap item of the process that is being scanned, if it has the page at the same address.
fn judge(vma: &impl Mapper) -> Result<(), Refusal> {
    if vma.maps_elsewhere() || !vma.is_registered() {
        Err(Refusal::Lasting)
    } else if vma.may_be_forking() {
        Err(Refusal::Passing)
    } else {
        Ok(())
    }
}
