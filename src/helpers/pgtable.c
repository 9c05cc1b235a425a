// SPDX-License-Identifier: GPL-2.0

#include <linux/ksm.h>
#include <linux/leafops.h>
#include <linux/pagewalk.h>
#include <asm/tlbflush.h>

/* mm/internal.h: Kbuild adds -I$(srctree)/mm. */
#include "internal.h"

#include "shim.h"

/* Page tables. */

/* rksm_walk_pmd() and rksm_walk_pud() are defined in src/mm/walk.rs. */
int rksm_walk_pmd(void *ctx, struct vm_area_struct *vma, pmd_t *pmd,
		  unsigned long addr, unsigned long end);

static int rksm_pmd_entry(pmd_t *pmd, unsigned long addr, unsigned long end,
			  struct mm_walk *walk)
{
	return rksm_walk_pmd(walk->private, walk->vma, pmd, addr, end);
}

int rksm_walk_pud(void *ctx, unsigned long addr);

static int rksm_pud_entry(pud_t *pud, unsigned long addr, unsigned long end,
			  struct mm_walk *walk)
{
	return rksm_walk_pud(walk->private, addr);
}

static const struct mm_walk_ops rksm_walk_ops = {
	.pud_entry = rksm_pud_entry,
	.pmd_entry = rksm_pmd_entry,
	.walk_lock = PGWALK_RDLOCK,
};

int rksm_walk_vma(struct vm_area_struct *vma, unsigned long start, unsigned long end, void *ctx)
{
	return walk_page_range_vma(vma, start, end, &rksm_walk_ops, ctx);
}

/*
 * Return whether the entry maps an anonymous page, and fill in *mapped if so.
 * The scan calls this for every entry, so it is one function.
 *
 * A special entry never maps an anonymous page.  The page of any other present
 * entry can be found without the VMA, as in gup_fast_pte_range().
 */
bool rksm_entry_anon(pte_t *ptep, struct rksm_mapped *mapped)
{
	const pte_t pte = ptep_get(ptep);
	const struct folio *folio;
	const struct page *page;

	if (!pte_present(pte) || pte_special(pte))
		return false;
	page = pfn_to_page(pte_pfn(pte));
	folio = page_folio(page);
	mapped->mapping = (unsigned long)READ_ONCE(folio->mapping);
	mapped->content = page_address(page);
	/*
	 * Do not read poisoned memory.  A poisoned KSM page must keep its rmap
	 * items, by which memory_failure() unmaps it, and the scan does not
	 * read KSM pages.
	 */
	if (unlikely(PageHWPoison(page)) &&
	    (mapped->mapping & FOLIO_MAPPING_FLAGS) != FOLIO_MAPPING_KSM)
		return false;
	return (mapped->mapping & FOLIO_MAPPING_ANON) && !folio_is_zone_device(folio);
}

/* Return whether the entry stands for a page that is swapped out or being migrated. */
bool rksm_entry_away(pte_t *ptep)
{
	const pte_t pte = ptep_get(ptep);
	softleaf_t entry;

	if (pte_none(pte) || pte_present(pte))
		return false;
	entry = softleaf_from_pte(pte);
	return softleaf_is_swap(entry) || softleaf_is_migration(entry);
}

pmd_t rksm_pmd_lockless(pmd_t *pmd)
{
	return pmdp_get_lockless(pmd);
}

bool rksm_pmd_present(pmd_t pmd)
{
	return pmd_present(pmd);
}

bool rksm_pmd_leaf(pmd_t pmd)
{
	return pmd_leaf(pmd);
}

bool rksm_pmd_uffd(pmd_t pmd)
{
	return pmd_uffd(pmd);
}

/* Return NULL if no PMD table covers addr.  The PMD itself may be empty. */
pmd_t *rksm_find_pmd(struct mm_struct *mm, unsigned long addr)
{
	return mm_find_pmd(mm, addr);
}

spinlock_t *rksm_pmd_lock(struct mm_struct *mm, pmd_t *pmd)
{
	return pmd_lock(mm, pmd);
}

void rksm_ptl_unlock(spinlock_t *ptl)
{
	spin_unlock(ptl);
}

pte_t *rksm_pte_lock(struct mm_struct *mm, pmd_t *pmd, unsigned long addr, spinlock_t **ptl)
{
	return pte_offset_map_lock(mm, pmd, addr, ptl);
}

pte_t *rksm_pte_lock_addr(struct mm_struct *mm, unsigned long addr, spinlock_t **ptl)
{
	pmd_t *pmd = mm_find_pmd(mm, addr);

	return pmd ? pte_offset_map_lock(mm, pmd, addr, ptl) : NULL;
}

void rksm_pte_unlock(pte_t *pte, spinlock_t *ptl)
{
	pte_unmap_unlock(pte, ptl);
}

pte_t rksm_ptep_get(pte_t *pte)
{
	return ptep_get(pte);
}

bool rksm_pte_present(pte_t pte)
{
	return pte_present(pte);
}

bool rksm_pte_none(pte_t pte)
{
	return pte_none(pte);
}

bool rksm_pte_write(pte_t pte)
{
	return pte_write(pte);
}

bool rksm_pte_dirty(pte_t pte)
{
	return pte_dirty(pte);
}

bool rksm_pte_uffd(pte_t pte)
{
	return pte_uffd(pte);
}

pte_t rksm_pte_clean_wrprotect(pte_t pte)
{
	pte = pte_mkclean(pte);
	return pte_write(pte) ? pte_wrprotect(pte) : pte;
}

/* Keep the soft-dirty bit, or a checkpointing tool would miss the page. */
pte_t rksm_mk_shared_pte(struct page *page, struct vm_area_struct *vma, pte_t old)
{
	pte_t pte = mk_pte(page, vma->vm_page_prot);

	return pte_soft_dirty(old) ? pte_mksoft_dirty(pte) : pte;
}

pte_t rksm_ptep_clear_flush(struct vm_area_struct *vma, unsigned long addr, pte_t *pte)
{
	flush_cache_page(vma, addr, pte_pfn(ptep_get(pte)));
	return ptep_clear_flush(vma, addr, pte);
}

void rksm_set_pte(struct mm_struct *mm, unsigned long addr, pte_t *pte, pte_t val)
{
	set_pte_at(mm, addr, pte, val);
}

struct page *rksm_normal_page(struct vm_area_struct *vma, unsigned long addr, pte_t pte)
{
	return vm_normal_page(vma, addr, pte);
}

struct page *rksm_normal_page_pmd(struct vm_area_struct *vma, unsigned long addr, pmd_t pmd)
{
	return vm_normal_page_pmd(vma, addr, pmd);
}

struct folio *rksm_migration_folio(pte_t pte)
{
	const softleaf_t entry = softleaf_from_pte(pte);

	return softleaf_is_migration(entry) ? softleaf_to_folio(entry) : NULL;
}

bool rksm_is_ksm_zero_pte(pte_t pte)
{
	return is_ksm_zero_pte(pte);
}

/*
 * The dirty bit marks a zero page that replaced a merged page, as opposed to one
 * that a read fault mapped.  pte_mkdirty() also sets the soft-dirty bit, which
 * must stay as it was: nothing was written.
 */
pte_t rksm_mk_zero_pte(struct vm_area_struct *vma, unsigned long addr, pte_t old)
{
	pte_t pte = pte_mkdirty(pte_mkspecial(pfn_pte(zero_pfn(addr), vma->vm_page_prot)));

	return pte_soft_dirty(old) ? pte : pte_clear_soft_dirty(pte);
}
