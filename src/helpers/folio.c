// SPDX-License-Identifier: GPL-2.0

#include <linux/leafops.h>
#include <linux/rmap.h>
#include <linux/sched/isolation.h>
#include <linux/wait.h>
#include <linux/workqueue.h>

/* mm/internal.h: Kbuild adds -I$(srctree)/mm. */
#include "internal.h"

#include "shim.h"

/* Folios and pages. */

struct folio *rksm_page_folio(struct page *page)
{
	return page_folio(page);
}

/* Return NULL if the memory of this pfn does not exist or is offline. */
struct folio *rksm_pfn_folio(unsigned long pfn)
{
	struct page *page = pfn_to_online_page(pfn);

	return page ? page_folio(page) : NULL;
}

unsigned long rksm_page_pfn(const struct page *page)
{
	return page_to_pfn(page);
}

unsigned int rksm_page_nid(const struct page *page)
{
	return page_to_nid(page);
}

unsigned int rksm_content_nid(const void *content)
{
	return page_to_nid(virt_to_page(content));
}

/* Return -1 if the memory of this pfn does not exist or is offline. */
int rksm_pfn_nid(unsigned long pfn)
{
	struct page *page = pfn_to_online_page(pfn);

	return page ? page_to_nid(page) : -1;
}

unsigned int rksm_nr_nodes(void)
{
	return nr_node_ids;
}

struct page *rksm_nth_page(struct page *page, unsigned long n)
{
	return page + n;
}

void *rksm_folio_mapping(const struct folio *folio)
{
	return READ_ONCE(folio->mapping);
}

void rksm_folio_set_ksm_node(struct folio *folio, void *node)
{
	WRITE_ONCE(folio->mapping, (void *)((unsigned long)node | FOLIO_MAPPING_KSM));
}

bool rksm_folio_test_ksm(const struct folio *folio)
{
	return folio_test_ksm(folio);
}

bool rksm_folio_test_plain_anon(const struct folio *folio)
{
	return folio_test_anon(folio) && !folio_test_ksm(folio) && !folio_is_zone_device(folio);
}

/* Return whether an unexpected reference may be that of a per-CPU LRU batch, not a pin. */
bool rksm_folio_maybe_batched(struct folio *folio)
{
	return !folio_test_lru(folio) || !folio_maybe_dma_pinned(folio);
}

bool rksm_folio_test_large(const struct folio *folio)
{
	return folio_test_large(folio);
}

bool rksm_folio_test_swapcache(const struct folio *folio)
{
	return folio_test_swapcache(folio);
}

bool rksm_folio_test_locked(const struct folio *folio)
{
	return folio_test_locked(folio);
}

bool rksm_page_test_hwpoison(const struct page *page)
{
	return PageHWPoison(page);
}

bool rksm_folio_mapped(const struct folio *folio)
{
	return folio_mapped(folio);
}

int rksm_folio_mapcount(const struct folio *folio)
{
	return folio_mapcount(folio);
}

int rksm_folio_expected_refs(const struct folio *folio)
{
	return folio_expected_ref_count(folio);
}

int rksm_folio_ref_count(const struct folio *folio)
{
	return folio_ref_count(folio);
}

void rksm_folio_get(struct folio *folio)
{
	folio_get(folio);
}

bool rksm_folio_try_get(struct folio *folio)
{
	return folio_try_get(folio);
}

void rksm_folio_put(struct folio *folio)
{
	folio_put(folio);
}

bool rksm_folio_trylock(struct folio *folio)
{
	return folio_trylock(folio);
}

void rksm_folio_unlock(struct folio *folio)
{
	folio_unlock(folio);
}

/* Reclaim frees a clean folio without dirty PTEs, but must swap out a KSM page. */
void rksm_folio_keep_dirty(struct folio *folio)
{
	folio_mark_accessed(folio);
	if (!folio_test_dirty(folio))
		folio_mark_dirty(folio);
}

void rksm_folio_set_dirty(struct folio *folio)
{
	folio_mark_dirty(folio);
}

bool rksm_folio_maybe_mapped_shared(struct folio *folio)
{
	return folio_maybe_mapped_shared(folio);
}

/*
 * Remove a locked folio from the swap cache, unless swap entries refer to it.
 * Return 0 if it is not in the swap cache afterwards, -EBUSY while it is being
 * written to swap, or else -EMLINK.
 */
int rksm_folio_leave_swap(struct folio *folio)
{
	if (!folio_test_swapcache(folio) || folio_free_swap(folio))
		return 0;
	return folio_test_writeback(folio) ? -EBUSY : -EMLINK;
}

void rksm_folio_drop_swap(struct folio *folio)
{
	if (!folio_mapped(folio))
		folio_free_swap(folio);
}

bool rksm_page_anon_exclusive(const struct page *page)
{
	return PageAnonExclusive(page);
}

int rksm_page_try_share(struct page *page)
{
	return folio_try_share_anon_rmap_pte(page_folio(page), page);
}

int rksm_split_huge_page(struct page *page)
{
	return split_huge_page(page);
}

void rksm_page_add_rmap(struct page *page, struct vm_area_struct *vma, unsigned long addr)
{
	folio_add_anon_rmap_pte(page_folio(page), page, vma, addr, RMAP_NONE);
}

void rksm_page_remove_rmap(struct page *page, struct vm_area_struct *vma)
{
	folio_remove_rmap_pte(page_folio(page), page, vma);
}

/* x86-64 has no highmem: this is what kmap_local_page() returns, but stays valid. */
const void *rksm_page_content(const struct page *page)
{
	return page_address(page);
}

const void *rksm_zero_content(void)
{
	return page_address(ZERO_PAGE(0));
}

unsigned long rksm_zero_pfn(void)
{
	return zero_pfn(0);
}

/*
 * Work to drain the LRU batches of CPUs that are not isolated.  Do not use
 * lru_add_drain_all(): it waits for isolated CPUs, too, and without a limit if a
 * task of higher priority keeps the work from running.
 */
static DEFINE_PER_CPU(struct work_struct, rksm_lru_work);
static DECLARE_WAIT_QUEUE_HEAD(rksm_lru_wait);
static atomic_t rksm_lru_left = ATOMIC_INIT(0);

static void rksm_lru_drain_cpu(struct work_struct *work)
{
	lru_add_drain();
	if (atomic_dec_and_test(&rksm_lru_left))
		wake_up(&rksm_lru_wait);
}

void rksm_lru_init(void)
{
	int cpu;

	for_each_possible_cpu(cpu)
		INIT_WORK(per_cpu_ptr(&rksm_lru_work, cpu), rksm_lru_drain_cpu);
}

void rksm_lru_exit(void)
{
	int cpu;

	for_each_possible_cpu(cpu)
		cancel_work_sync(per_cpu_ptr(&rksm_lru_work, cpu));
}

void rksm_lru_drain(unsigned int wait_ms)
{
	int cpu;

	lru_add_drain();
	for_each_online_cpu(cpu) {
		if (cpu_is_isolated(cpu) || !housekeeping_test_cpu(cpu, HK_TYPE_WQ))
			continue;
		atomic_inc(&rksm_lru_left);
		/* Work that is still queued from an earlier drain is counted already. */
		if (!queue_work_on(cpu, system_percpu_wq, per_cpu_ptr(&rksm_lru_work, cpu)))
			atomic_dec(&rksm_lru_left);
	}
	wait_event_idle_timeout(rksm_lru_wait, !atomic_read(&rksm_lru_left),
				msecs_to_jiffies(wait_ms));
}
