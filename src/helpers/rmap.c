// SPDX-License-Identifier: GPL-2.0

#include <linux/rmap.h>

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

void rksm_rmap_walk(struct folio *folio, rksm_rmap_one_fn rmap_one, void *arg)
{
	struct rmap_walk_control control = { .rmap_one = rmap_one, .arg = arg };

	rmap_walk(folio, &control);
}

static bool rksm_mapped(struct page_vma_mapped_walk *walk)
{
	if (!page_vma_mapped_walk(walk))
		return false;
	page_vma_mapped_walk_done(walk);
	return true;
}

/* PVMW_SYNC: do not miss an entry that is clear for a moment, as in mprotect(). */
bool rksm_folio_mapped_at(struct folio *folio, struct vm_area_struct *vma, unsigned long addr)
{
	DEFINE_FOLIO_VMA_WALK(walk, folio, vma, addr, PVMW_SYNC);

	return rksm_mapped(&walk);
}

/* The page may be part of a large folio. */
bool rksm_page_mapped_at(struct page *page, struct vm_area_struct *vma, unsigned long addr)
{
	struct page_vma_mapped_walk walk = {
		.pfn = page_to_pfn(page),
		.nr_pages = 1,
		.pgoff = page_pgoff(page_folio(page), page),
		.vma = vma,
		.address = addr,
		.flags = PVMW_SYNC,
		.pgoff_is_anon = true,
	};

	return rksm_mapped(&walk);
}

/* Return where the VMA has the anonymous page if it maps it, or -EFAULT if that is outside. */
unsigned long rksm_page_address_in_vma(struct page *page, struct vm_area_struct *vma)
{
	return vma_anon_address(vma, page_pgoff(page_folio(page), page), 1);
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
