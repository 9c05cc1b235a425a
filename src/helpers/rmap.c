// SPDX-License-Identifier: GPL-2.0

#include <linux/rmap.h>
#include <linux/sched/mm.h>

/* mm/internal.h: -I$(srctree)/mm, see Kbuild. */
#include "internal.h"

#include "shim.h"

/* Who maps a page, and who shares it over a fork. */

struct anon_vma *rksm_vma_get_anon_vma(struct vm_area_struct *vma)
{
	get_anon_vma(vma->anon_vma);
	return vma->anon_vma;
}

/* Of an anonymous folio, locked and mapped, and no KSM page (yet). */
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

struct rksm_strangers {
	struct page *page;
	struct mm_struct *mm;
	unsigned long addr;
	int left;
	int relatives;
	int result;
};

/*
 * 0 if the engine lists what this VMA of another address space maps, sooner or
 * later; rmap finds it by our item until then.  Their flags may change
 * meanwhile.
 *
 * -EBUSY while dup_mmap() may be going on: it lets others use the child before
 * it flushes what the parent's CPUs remember to be writable, and the lock of
 * the parent is held until after that.
 */
static int rksm_relative(struct vm_area_struct *vma)
{
	struct mm_struct *mm = vma->vm_mm;

	if (!(vma->vm_flags & VM_MERGEABLE) || !mm_flags_test(MMF_VM_MERGEABLE, mm))
		return -EMLINK;
	if (!mmap_read_trylock(mm))
		return -EBUSY;
	mmap_read_unlock(mm);
	return 0;
}

/* Whether the VMA maps the page, which may be part of a large folio, at another address. */
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

static bool rksm_look_for_strangers(struct folio *folio, struct vm_area_struct *vma,
				    unsigned long addr, void *arg)
{
	/* An entry that is empty for a moment, as in mprotect(), is one, too. */
	DEFINE_FOLIO_VMA_WALK(walk, folio, vma, addr, PVMW_SYNC);
	struct rksm_strangers *strangers = arg;

	if (strangers->left-- <= 0) {
		strangers->result = -EMLINK;
		return false;
	}
	if (vma->vm_mm == strangers->mm || !page_vma_mapped_walk(&walk))
		return true;
	page_vma_mapped_walk_done(&walk);
	strangers->relatives++;
	if (rksm_page_elsewhere(strangers->page, vma, strangers->addr))
		strangers->result = -EMLINK;
	else
		strangers->result = rksm_relative(vma);
	return !strangers->result;
}

/*
 * 0 if the folio of an anonymous page, which is locked and mapped at addr in mm
 * (whose mmap lock is held), is mapped by nobody but relatives.  -EMLINK if it
 * is mapped by somebody who did not ask for merging, or the page where the item
 * of a page at addr does not lead; or if there are more than so many VMAs to
 * look at.  -EBUSY if it may be otherwise in a moment.
 */
int rksm_page_mapped_by_strangers(struct page *page, struct mm_struct *mm,
				  unsigned long addr, int most)
{
	struct folio *folio = page_folio(page);
	struct rksm_strangers strangers = { .page = page, .mm = mm, .addr = addr, .left = most };
	struct rmap_walk_control control = {
		.rmap_one = rksm_look_for_strangers,
		.arg = &strangers,
	};

	rmap_walk(folio, &control);
	/* Whoever the walk did not come by is none that is known. */
	if (!strangers.result && !folio_test_large(folio) &&
	    folio_mapcount(folio) > strangers.relatives + 1)
		return -EBUSY;
	return strangers.result;
}

/* Lists whose heads the core kernel walks. */

void rksm_hlist_add_head(struct hlist_node *node, struct hlist_head *head)
{
	hlist_add_head(node, head);
}

void rksm_hlist_del(struct hlist_node *node)
{
	hlist_del_init(node);
}
