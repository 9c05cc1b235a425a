// SPDX-License-Identifier: GPL-2.0

//! VMAs that may hold merged pages, and the pages in them.

use super::{
    ffi,
    folio::{LockedPage, PageRef},
    mmap_lock::MmapLock,
    pte::{self, NotifierRange, PteLock},
    stable::{ItemBox, NodeBox, NodeId},
    trace,
    walk::{self, Search},
};
use core::ptr::{self, NonNull};
use kernel::{
    bindings,
    mm::{virt::VmaRef, Mm, MmWithUser},
    page::PAGE_SIZE,
    prelude::*,
};

/// A VMA that may hold merged pages, under `mmap_lock` held for reading: it has an `anon_vma`, and most
/// often `VM_MERGEABLE`, see [`Which`].
///
/// # Invariants
///
/// The VMA has an `anon_vma`, and the `mmap_lock` of `mm`, to which it belongs, is held for reading for
/// `'a`. (So neither its bounds, its flags nor its `anon_vma` change.)
#[derive(Clone, Copy)]
pub(crate) struct MergeableVma<'a> {
    vma: NonNull<bindings::vm_area_struct>,
    mm: &'a Mm,
    is_mergeable: bool,
}

/// Which VMAs to look at.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Which {
    /// Those with `VM_MERGEABLE`.
    Mergeable,
    /// All that may hold KSM pages. `MADV_UNMERGEABLE` takes the flag away even if pages of the VMA could
    /// not be unshared.
    MayBeMerged,
}

/// The most VMAs that are looked at under one hold of `mmap_lock`, as none of them may be mergeable.
pub(crate) const HOLD_VMAS: usize = 512;

/// The most pages that are unmerged under one hold of `mmap_lock`.
const HOLD_UNMERGES: usize = 64;

/// What [`MergeableVma::next`] found.
pub(crate) enum Next<'a> {
    /// A mergeable VMA.
    Vma(MergeableVma<'a>),
    /// None up to this address; how it is behind that was not looked at.
    GoOn(usize),
    /// None at all.
    None,
}

/// Whether nothing but the caller's reference keeps an address space. It is about to be torn down, so there
/// is no point in doing anything to it, least of all in allocating memory for it.
pub(crate) fn is_abandoned(mm: &MmWithUser) -> bool {
    // SAFETY: the mm is kept.
    unsafe { ffi::rksm_mm_users(mm.as_raw()) <= 1 }
}

/// What [`MergeableVma::unmerge`] came to.
pub(crate) struct Unmerged {
    /// From where on it has looked: what it has come by and is not [`Self::unserved`] is not merged any more.
    pub(crate) from: usize,
    /// Where to go on: nothing before this address is left, but the pages that could not be served.
    pub(crate) reached: usize,
    /// Why it stopped there, if it was not for having done enough under one hold of `mmap_lock`: `ENOMEM`
    /// without memory for a copy, `ERESTARTSYS` when the calling task has a signal pending.
    pub(crate) result: Result,
    /// The addresses of pages that are still merged, as the fault did not serve them.
    unserved: [usize; HOLD_UNMERGES],
    count: usize,
}

impl Unmerged {
    fn new(from: usize) -> Self {
        Self {
            from,
            reached: from,
            result: Ok(()),
            unserved: [0; HOLD_UNMERGES],
            count: 0,
        }
    }

    /// Nothing was to be done before `reached`.
    pub(crate) fn nothing(reached: usize) -> Self {
        Self::new(reached)
    }

    fn push_unserved(&mut self, addr: usize) {
        if let Some(slot) = self.unserved.get_mut(self.count) {
            *slot = addr;
            self.count = self.count.saturating_add(1);
        }
    }

    /// The pages that are still merged, in the order of their addresses.
    pub(crate) fn unserved(&self) -> &[usize] {
        self.unserved.get(..self.count).unwrap_or(&[])
    }
}

/// How often to try again, when a fault leaves a page merged without an error: as when it had to wait for a migration,
/// of which there is one after the other while memory goes offline. Fewer than [`HOLD_UNMERGES`].
const UNSHARE_ATTEMPTS: usize = 48;

/// What is known of the other mappings of a page that [`MergeableVma::publish`] made a merged page.
pub(crate) struct Published {
    /// The page is shared over a fork, and so may be mapped at the same address elsewhere, without an item.
    pub(crate) shared: bool,
    /// A process that shares it may have opted out meanwhile: its mapping stays merged then, in a VMA that is
    /// not mergeable any more.
    pub(crate) strays: bool,
}

/// Decides whether huge pages are split for a part that merges.
pub(crate) trait SplitPolicy {
    /// Whether the huge page may be split. Nothing else is known to be in the way.
    fn may_split(&mut self) -> bool;

    /// Notes that it was.
    fn was_split(&mut self);
}

/// Outcomes of a fault after which trying again is no use.
const HOPELESS: u32 = bindings::vm_fault_reason_VM_FAULT_SIGBUS
    | bindings::vm_fault_reason_VM_FAULT_SIGSEGV
    | bindings::vm_fault_reason_VM_FAULT_HWPOISON
    | bindings::vm_fault_reason_VM_FAULT_HWPOISON_LARGE;

impl<'a> MergeableVma<'a> {
    /// # Safety
    ///
    /// `vma` is a VMA of `mm`, whose `mmap_lock` is held for reading for `'a`.
    unsafe fn new(
        vma: NonNull<bindings::vm_area_struct>,
        mm: &'a Mm,
        which: Which,
    ) -> Option<Self> {
        // SAFETY: `vma` is valid and its flags are stable, as `mmap_lock` is held.
        let is_mergeable = unsafe { ffi::rksm_vma_mergeable(vma.as_ptr()) };
        let found = is_mergeable
            || which == Which::MayBeMerged
                // SAFETY: As for the flags above: `mmap_lock` is held.
                && unsafe { ffi::rksm_vma_may_be_merged(vma.as_ptr()) };
        // INVARIANT: Both tests include the anon_vma; the rest is the caller's promise.
        found.then_some(Self {
            vma,
            mm,
            is_mergeable,
        })
    }

    /// The mergeable VMA that holds `addr`.
    pub(crate) fn at(lock: &'a MmapLock<'_>, addr: usize) -> Option<Self> {
        Self::find(lock, addr, Which::Mergeable)
    }

    /// The VMA that holds `addr`, if it is one of these.
    pub(crate) fn find(lock: &'a MmapLock<'_>, addr: usize, which: Which) -> Option<Self> {
        let mm = lock.mm();
        // SAFETY: `mmap_lock` is held for reading by the type of `lock`.
        let vma = NonNull::new(unsafe { bindings::vma_lookup(mm.as_raw(), addr) })?;
        // SAFETY: The VMA was found under `lock`, which is held for 'a.
        unsafe { Self::new(vma, mm, which) }
    }

    /// The first of these VMAs that ends after `addr`. `left` is how many VMAs may still be looked at under
    /// this hold of the lock, at first [`HOLD_VMAS`].
    pub(crate) fn next(
        lock: &'a MmapLock<'_>,
        addr: usize,
        which: Which,
        left: &mut usize,
    ) -> Next<'a> {
        let mm = lock.mm();
        let mut from = addr;
        while *left != 0 {
            *left = left.wrapping_sub(1);
            // SAFETY: `mmap_lock` is held for reading by the type of `lock`.
            let Some(vma) = NonNull::new(unsafe { bindings::find_vma(mm.as_raw(), from) }) else {
                return Next::None;
            };
            // SAFETY: The VMA was found under `lock`, which is held for 'a.
            if let Some(found) = unsafe { Self::new(vma, mm, which) } {
                return Next::Vma(found);
            }
            // SAFETY: The VMA is valid while `lock` is held.
            from = unsafe { VmaRef::from_raw(vma.as_ptr()) }.end();
        }
        Next::GoOn(from)
    }

    pub(super) fn as_ptr(&self) -> *mut bindings::vm_area_struct {
        self.vma.as_ptr()
    }

    /// The address space.
    pub(crate) fn mm(&self) -> &'a Mm {
        self.mm
    }

    /// Whether it has `VM_MERGEABLE`. If not, nothing of it may be merged, but it may have merged pages.
    #[inline]
    pub(crate) fn is_mergeable(&self) -> bool {
        self.is_mergeable
    }

    /// The first address.
    #[inline]
    pub(crate) fn start(&self) -> usize {
        // SAFETY: The VMA is valid, and its lock held, by the type invariants.
        unsafe { VmaRef::from_raw(self.as_ptr()) }.start()
    }

    /// The first address behind it.
    #[inline]
    pub(crate) fn end(&self) -> usize {
        // SAFETY: The VMA is valid, and its lock held, by the type invariants.
        unsafe { VmaRef::from_raw(self.as_ptr()) }.end()
    }

    /// Whether the page at `addr` is a KSM page of this node, also while it is being migrated.
    pub(crate) fn maps(&self, addr: usize, node: NodeId) -> bool {
        PteLock::new(self, addr).is_some_and(|pte| pte.node_id() == Some(node))
    }

    /// The anonymous page at `addr`, with a reference.
    pub(crate) fn page_at(&self, addr: usize) -> Option<PageRef> {
        match PteLock::new(self, addr) {
            Some(pte) => pte.anon_page(),
            // No page table: there may be a huge page.
            None => walk::page_at(self, addr),
        }
    }

    /// Whether `page` is mapped at `addr`, without a userfaultfd mark that forbids to merge it.
    ///
    /// A hint, for what is to be known before a step that cannot be undone.
    pub(crate) fn maps_unmarked(&self, addr: usize, page: &PageRef) -> bool {
        pte::maps_unmarked(self, addr, page)
    }

    /// Splits the folio of `page`, which is mapped at `addr`, if it is a large one, after everything that can be
    /// known to keep the page from being merged: `fits` says what else there is, and `splits` has the last
    /// word (`E2BIG`).
    ///
    /// A split cannot be undone, and khugepaged may take long to put the parts together again.
    fn make_small(
        &self,
        addr: usize,
        page: &LockedPage,
        fits: impl FnOnce() -> Result,
        splits: &mut dyn SplitPolicy,
    ) -> Result {
        if !page.is_large() {
            return Ok(());
        }
        if page.is_held_by_others() || !self.maps_unmarked(addr, page) {
            return Err(EBUSY);
        }
        fits()?;
        if !splits.may_split() {
            return Err(E2BIG);
        }
        page.split()?;
        splits.was_split();
        Ok(())
    }

    /// Makes the page at `addr` the page of `node`, with `item` as the first place that maps it.
    ///
    /// The page is split off its huge page if need be, write-protected, and left alone with
    /// `EBUSY` if somebody else holds a reference on it (GUP, O_DIRECT) or has it locked, or if it is
    /// not there any more; with `E2BIG` if it is part of a huge page that `splits` wants whole. Of a page that
    /// is shared over a fork, see [`LockedPage::refuse_strangers`] for `EMLINK` and `EBUSY`. When nobody can write
    /// to it any more, it has to be what it `is_still` thought to be, or else the result is `EAGAIN`; a part of a
    /// huge page is asked before that is split, too. Takes the folio lock and a page-table lock.
    pub(crate) fn publish(
        &self,
        addr: usize,
        page: PageRef,
        node: &NodeBox,
        item: &mut ItemBox,
        is_still: impl Fn(&PageRef) -> bool,
        splits: &mut dyn SplitPolicy,
    ) -> Result<Published> {
        let pfn = page.pfn();
        let result = self.try_publish(addr, page, node, item, is_still, splits);
        trace::merge_with_ksm_page(true, pfn, ptr::null_mut(), item, self.mm(), &result);
        result
    }

    fn try_publish(
        &self,
        addr: usize,
        page: PageRef,
        node: &NodeBox,
        item: &mut ItemBox,
        is_still: impl Fn(&PageRef) -> bool,
        splits: &mut dyn SplitPolicy,
    ) -> Result<Published> {
        let page = lock_plain(page)?;
        let fits = || match is_still(&page) {
            true => page.refuse_strangers(self, addr).map(drop),
            false => Err(EAGAIN),
        };
        self.make_small(addr, &page, fits, splits)?;
        // Asked before `write_protect` sees the page mapped here: at any time after that we may give it up, and
        // the only mapping be a relative's.
        let shared = page.refuse_strangers(self, addr)?;
        self.write_protect(addr, &page)?;
        // Who writes to it from here on gets a copy, as its lock is held. (The caller knew it by what was read
        // some time ago.)
        if !is_still(&page) {
            return Err(EAGAIN);
        }
        // SAFETY: `write_protect` found the page mapped here and left it mapped writable nowhere:
        // it is either mapped here only, or shared by a fork that is over, and so write-protected
        // everywhere, and known to be so by all CPUs.
        unsafe { node.publish(&page, item, self, addr, shared) };
        // What opts out from here on finds a KSM page, and unshares it.
        let strays = shared && page.may_have_strays(self, addr);
        Ok(Published { shared, strays })
    }

    /// Maps `kpage`, the page of `node`, at `addr` in place of `page`, if both have the same
    /// content, and lists `item` with the node.
    ///
    /// Nobody can reach `page` through this mapping from before the comparison to the end, as the entry
    /// is cleared meanwhile; and `kpage` is write-protected wherever it is mapped. If they differ,
    /// the entry is put back as it was, and the result is `EAGAIN`. Other errors are as in
    /// [`Self::publish`]. A part of a huge page is compared before that is split, too.
    pub(crate) fn join(
        &self,
        addr: usize,
        page: PageRef,
        kpage: &LockedPage,
        node: &NodeBox,
        item: &mut ItemBox,
        splits: &mut dyn SplitPolicy,
    ) -> Result {
        let result = self.try_join(addr, page, kpage, node, item, splits);
        trace::merge_with_ksm_page(false, kpage.pfn(), kpage.as_ptr(), item, self.mm(), &result);
        result
    }

    fn try_join(
        &self,
        addr: usize,
        page: PageRef,
        kpage: &LockedPage,
        node: &NodeBox,
        item: &mut ItemBox,
        splits: &mut dyn SplitPolicy,
    ) -> Result {
        if kpage.node_id() != node.id() {
            return Err(EBUSY);
        }
        let page = lock_plain(page)?;
        let fits = || match page.differs_from(kpage) {
            true => Err(EAGAIN),
            false => Ok(()),
        };
        self.make_small(addr, &page, fits, splits)?;
        if page.is_large() {
            return Err(EBUSY);
        }
        {
            let _range = NotifierRange::start(self.mm(), addr);
            let mut pte = PteLock::new(self, addr).ok_or(EBUSY)?;
            let entry = pte.clear_unless(&page, || page.differs_from(kpage))?;
            // SAFETY: both folios are locked and kept by references of ours. The entry mapped
            // `page` until we cleared it under the lock that is held, so the mapping's reference
            // and rmap of `page` are ours to drop; those of `kpage` are taken before the entry
            // shows it.
            unsafe {
                ffi::rksm_folio_get(kpage.folio());
                ffi::rksm_page_add_rmap(kpage.as_ptr(), self.as_ptr(), addr);
                // Its last owner may have given it up (MADV_FREE), and reclaim would free it
                // under us: not now that somebody wants it. From two mappings on it cannot be
                // given up, and until then its lock, which we hold, is needed for that.
                ffi::rksm_folio_keep_dirty(kpage.folio());
                pte.set(ffi::rksm_mk_shared_pte(
                    kpage.as_ptr(),
                    self.as_ptr(),
                    entry,
                ));
                ffi::rksm_page_remove_rmap(page.as_ptr(), self.as_ptr());
                ffi::rksm_folio_drop_swap(page.folio());
                ffi::rksm_folio_put(page.folio());
            }
        }
        node.attach(kpage, item, self, addr)
    }

    /// Maps the kernel's zero page at `addr` in place of `page`, if that is all zeroes; with the mark that
    /// tells such a zero page from others. Counts it with the address space and overall.
    ///
    /// Locks and errors are as in [`Self::join`].
    pub(crate) fn join_zero(
        &self,
        addr: usize,
        page: PageRef,
        splits: &mut dyn SplitPolicy,
    ) -> Result {
        let result = self.try_join_zero(addr, page, splits);
        trace::merge_with_zero_page(self.mm(), &result);
        result
    }

    fn try_join_zero(&self, addr: usize, page: PageRef, splits: &mut dyn SplitPolicy) -> Result {
        let page = lock_plain(page)?;
        let fits = || match page.is_zero() {
            true => Ok(()),
            false => Err(EAGAIN),
        };
        self.make_small(addr, &page, fits, splits)?;
        if page.is_large() {
            return Err(EBUSY);
        }
        let _range = NotifierRange::start(self.mm(), addr);
        let mut pte = PteLock::new(self, addr).ok_or(EBUSY)?;
        let entry = pte.clear_unless(&page, || !page.is_zero())?;
        // SAFETY: the folio is locked and kept by a reference of ours. The entry mapped `page` until we
        // cleared it under the lock that is held, so the mapping's reference and rmap of `page` are
        // ours to drop. The zero page is neither counted nor ever freed. That the address space has
        // it is counted before the lock is given up, and so before anybody can unmap it.
        unsafe {
            pte.set(ffi::rksm_mk_zero_pte(self.as_ptr(), addr, entry));
            ffi::rksm_mm_count_zero_page(self.mm().as_raw());
            ffi::rksm_page_remove_rmap(page.as_ptr(), self.as_ptr());
            ffi::rksm_folio_drop_swap(page.folio());
            ffi::rksm_folio_put(page.folio());
        }
        Ok(())
    }

    /// Write-protects the page at `addr`, and checks that nobody can still write to it by another way.
    ///
    /// The order of the checks is that of `write_protect_page()` in mm/ksm.c, and so are the reasons.
    fn write_protect(&self, addr: usize, page: &LockedPage) -> Result {
        if page.is_large() {
            return Err(EBUSY);
        }
        let _range = NotifierRange::start(self.mm(), addr);
        let mut pte = PteLock::new(self, addr).ok_or(EBUSY)?;
        // SAFETY: looks at the page that we keep, and at a counter of the mm.
        let (exclusive, flushing) = unsafe {
            (
                ffi::rksm_page_anon_exclusive(page.as_ptr()),
                ffi::rksm_mm_tlb_flush_pending(self.mm().as_raw()),
            )
        };
        if !exclusive && !flushing && pte.is_protected(page)? {
            return Ok(());
        }
        let entry = pte.clear_mergeable(page)?;
        // SAFETY: the entry is cleared and flushed, as trying to share demands.
        let cannot_share = || unsafe { ffi::rksm_page_try_share(page.as_ptr()) } != 0;
        // Trying to share changes the page, so it comes last.
        let busy = page.is_held_by_others() || (exclusive && cannot_share());
        if busy {
            pte.set(entry);
            return Err(EBUSY);
        }
        if pte.is_dirty(entry) {
            // SAFETY: the folio is locked and kept.
            unsafe { ffi::rksm_folio_set_dirty(page.folio()) };
        }
        // SAFETY: looks at a value only.
        pte.set(unsafe { ffi::rksm_pte_clean_wrprotect(entry) });
        Ok(())
    }

    /// Replaces KSM pages in `start..end` by ordinary pages of the process, by the kernel's own unshare
    /// fault: as many as one hold of `mmap_lock` is good for. Sleeps for memory, so no lock of the module may
    /// be held.
    ///
    /// `user` is the address space: pages are faulted in, which must not be done while it is torn down.
    pub(crate) fn unmerge(&self, user: &MmWithUser, start: usize, end: usize) -> Unmerged {
        let mut from = start.max(self.start());
        let end = end.min(self.end());
        let mut done = Unmerged::new(from);
        if !ptr::eq::<Mm>(&**user, self.mm) {
            // Another address space's reference keeps this one from nothing.
            done.result = Err(EINVAL);
            return done;
        }
        let mut attempts = (from, 0);
        for _ in 0..HOLD_UNMERGES {
            // SAFETY: no precondition but being allowed to sleep.
            unsafe { ffi::rksm_cond_resched() };
            if kernel::current!().signal_pending() {
                done.result = Err(ERESTARTSYS);
                break;
            }
            if from >= end || is_abandoned(user) {
                break;
            }
            let addr = match walk::next_ksm_page(self, from, end) {
                Search::Found(addr) => addr,
                Search::Nothing(reached) => {
                    from = reached;
                    break;
                }
            };
            from = addr;
            attempts = match attempts {
                (last, count) if last == addr => (addr, count + 1),
                _ => (addr, 0),
            };
            let behind = addr.saturating_add(PAGE_SIZE);
            if attempts.1 >= UNSHARE_ATTEMPTS || self.is_unservable(addr) {
                done.push_unserved(addr);
                from = behind;
                continue;
            }
            // SAFETY: `mmap_lock` is held by the type invariant and `addr` lies in the VMA; `user` keeps the
            // address space from being torn down. Without FAULT_FLAG_ALLOW_RETRY the fault does not drop the
            // lock.
            let ret = unsafe { ffi::rksm_unshare(self.as_ptr(), addr) } as u32;
            if ret & bindings::vm_fault_reason_VM_FAULT_OOM != 0 {
                done.result = Err(ENOMEM);
                break;
            }
            if let Some(mut pte) = PteLock::new(self, addr) {
                pte.keep_copy();
            }
            if ret & HOPELESS != 0 {
                // The backing file was truncated and its private pages went with it; or the fault was for a
                // userfaultfd monitor, or the memory of the page is broken, and the page is still there.
                if let Search::Found(_) = walk::next_ksm_page(self, addr, behind) {
                    done.push_unserved(addr);
                }
                from = behind;
            }
            // Else again from the same address: the fault may back out, e.g. when another one raced.
        }
        if done.result.is_err() {
            // The page at which it stopped may have been served.
            from = match walk::next_ksm_page(self, from, end) {
                Search::Found(addr) | Search::Nothing(addr) => addr,
            };
        }
        done.reached = from;
        done
    }

    /// Whether an unshare fault at `addr` is certain not to be served.
    fn is_unservable(&self, addr: usize) -> bool {
        PteLock::new(self, addr).is_some_and(|pte| pte.is_unservable())
    }
}

/// Locks a page that can be merged.
fn lock_plain(page: PageRef) -> Result<LockedPage> {
    // Do not wait: whoever has the lock is busy with the page, and there are other pages.
    let page = page.try_lock().map_err(|_| EBUSY)?;
    if !page.is_plain_anon() || page.is_poisoned() {
        return Err(EBUSY);
    }
    Ok(page)
}
