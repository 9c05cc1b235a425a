// SPDX-License-Identifier: GPL-2.0

#include <linux/rmap.h>
#include <linux/sched/mm.h>

/* mm/internal.h: Kbuild adds -I$(srctree)/mm. */
#include "internal.h"

#include "shim.h"

/* Reverse mapping. */

struct anon_vma *rksm_vma_get_anon_vma(struct vm_area_struct *vma)
{
	get_anon_vma(vma->anon_vma);
	return vma->anon_vma;
}

/* The folio must be anonymous, locked and mapped, and must not be a KSM page. */
struct anon_vma *rksm_folio_get_anon_vma(struct folio *folio)
{
	unsigned long mapping = (unsigned long)folio->mapping;
	struct anon_vma *anon_vma = (void *)(mapping & ~FOLIO_MAPPING_FLAGS);

	get_anon_vma(anon_vma);
	return anon_vma;
}

void rksm_put_anon_vma(struct anon_vma *anon_vma)
{
	put_anon_vma(anon_vma);
}

struct rksm_mapper_walk {
	struct page *page;
	struct mm_struct *mm;
	unsigned long addr;
	/* How many more VMAs the walk may look at. */
	int left;
	/* How many VMAs of other processes map the folio. */
	int others;
	int result;
};

/*
 * Check a VMA of another process that maps the page.
 *
 * Return 0 if the process and the VMA are registered.  A later scan then adds an
 * rmap item for this mapping.  Until then, rmap walks find it by the rmap item
 * of the process that is being scanned.  The flags are read without a lock and
 * may change at any time.
 *
 * Return -EMLINK if either is not registered.
 *
 * Return -EBUSY if dup_mmap() may be copying this mm.  It unlocks the child
 * before it flushes writable translations from the TLBs of the parent, but
 * unlocks the parent only afterwards.
 */
static int rksm_check_mapper(struct vm_area_struct *vma)
{
	struct mm_struct *mm = vma->vm_mm;

	if (!(vma->vm_flags & VM_MERGEABLE) || !mm_flags_test(MMF_VM_MERGEABLE, mm))
		return -EMLINK;
	if (!mmap_read_trylock(mm))
		return -EBUSY;
	mmap_read_unlock(mm);
	return 0;
}

/* Return whether the VMA maps the page, which may be part of a large folio, at another address. */
static bool rksm_page_elsewhere(struct page *page, struct vm_area_struct *vma, unsigned long addr)
{
	struct page_vma_mapped_walk walk = {
		.pfn = page_to_pfn(page),
		.nr_pages = 1,
		.pgoff = page_pgoff(page_folio(page), page),
		.vma = vma,
		.flags = PVMW_SYNC,
		.pgoff_is_anon = true,
	};

	walk.address = vma_anon_address(vma, walk.pgoff, 1);
	if (walk.address == -EFAULT || walk.address == addr || !page_vma_mapped_walk(&walk))
		return false;
	page_vma_mapped_walk_done(&walk);
	return true;
}

static bool rksm_find_unregistered(struct folio *folio, struct vm_area_struct *vma,
				   unsigned long addr, void *arg)
{
	/* PVMW_SYNC: do not miss an entry that is clear for a moment, as in mprotect(). */
	DEFINE_FOLIO_VMA_WALK(walk, folio, vma, addr, PVMW_SYNC);
	struct rksm_mapper_walk *mappers = arg;

	if (mappers->left-- <= 0) {
		mappers->result = -EMLINK;
		return false;
	}
	if (vma->vm_mm == mappers->mm || !page_vma_mapped_walk(&walk))
		return true;
	page_vma_mapped_walk_done(&walk);
	mappers->others++;
	if (rksm_page_elsewhere(mappers->page, vma, mappers->addr))
		mappers->result = -EMLINK;
	else
		mappers->result = rksm_check_mapper(vma);
	return !mappers->result;
}

/*
 * Check all processes that map the folio of an anonymous page.  mm maps the page
 * at addr.  The caller holds the lock of the folio and the mmap_lock of mm.
 *
 * Return 0 if each other mapper of the folio is registered, and maps the page at
 * no other address.
 *
 * Return -EMLINK if a mapper is not registered, or maps the page at an address
 * where a walk by the rmap item for addr does not look; or if there are more
 * than max VMAs to look at.
 *
 * Return -EBUSY for a state that may be over in a moment.
 */
int rksm_page_mapped_by_unregistered(struct page *page, struct mm_struct *mm,
				     unsigned long addr, int max)
{
	struct folio *folio = page_folio(page);
	struct rksm_mapper_walk mappers = { .page = page, .mm = mm, .addr = addr, .left = max };
	struct rmap_walk_control control = {
		.rmap_one = rksm_find_unregistered,
		.arg = &mappers,
	};

	rmap_walk(folio, &control);
	/*
	 * More mappings than the rmap walk found: some mapper is not reachable
	 * from this anon_vma.
	 */
	if (!mappers.result && !folio_test_large(folio) &&
	    folio_mapcount(folio) > mappers.others + 1)
		return -EBUSY;
	return mappers.result;
}

/* Lists that the core kernel walks. */

void rksm_hlist_add_head(struct hlist_node *node, struct hlist_head *head)
{
	hlist_add_head(node, head);
}

void rksm_hlist_del(struct hlist_node *node)
{
	hlist_del_init(node);
}
