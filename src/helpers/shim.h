/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Functions for the parts of the kernel that its own bindgen run does not reach:
 * static inlines, macros, and symbols that are not exported.  The rules for
 * calling each are those of the function that it wraps.  The Rust caller states
 * them.
 *
 * bindgen makes the Rust declarations (src/mm/ffi.rs) from this file, so they
 * always agree with these prototypes.
 */
#ifndef _RKSM_SHIM_H
#define _RKSM_SHIM_H

#include <linux/freezer.h>
#include <linux/memcontrol.h>
#include <linux/memory.h>
#include <linux/mm.h>
#include <linux/mm_types.h>
#include <linux/mmu_notifier.h>
#include <linux/pagemap.h>
#include <linux/rmap.h>
#include <linux/swap.h>

/* Folios and pages. */
struct folio *rksm_page_folio(struct page *page);
struct folio *rksm_pfn_folio(unsigned long pfn);
unsigned long rksm_page_pfn(const struct page *page);
unsigned int rksm_page_nid(const struct page *page);
unsigned int rksm_content_nid(const void *content);
int rksm_pfn_nid(unsigned long pfn);
unsigned int rksm_nr_nodes(void);
struct page *rksm_nth_page(struct page *page, unsigned long n);
void *rksm_folio_mapping(const struct folio *folio);
void rksm_folio_set_ksm_node(struct folio *folio, void *node);
bool rksm_folio_test_ksm(const struct folio *folio);
bool rksm_folio_test_plain_anon(const struct folio *folio);
bool rksm_folio_maybe_batched(struct folio *folio);
bool rksm_folio_test_large(const struct folio *folio);
bool rksm_folio_test_swapcache(const struct folio *folio);
bool rksm_folio_test_locked(const struct folio *folio);
bool rksm_page_test_hwpoison(const struct page *page);
bool rksm_folio_mapped(const struct folio *folio);
int rksm_folio_mapcount(const struct folio *folio);
int rksm_folio_expected_refs(const struct folio *folio);
int rksm_folio_ref_count(const struct folio *folio);
void rksm_folio_get(struct folio *folio);
bool rksm_folio_try_get(struct folio *folio);
void rksm_folio_put(struct folio *folio);
bool rksm_folio_trylock(struct folio *folio);
void rksm_folio_unlock(struct folio *folio);
void rksm_folio_keep_dirty(struct folio *folio);
void rksm_folio_set_dirty(struct folio *folio);
bool rksm_folio_maybe_mapped_shared(struct folio *folio);
int rksm_folio_leave_swap(struct folio *folio);
void rksm_folio_drop_swap(struct folio *folio);
bool rksm_page_anon_exclusive(const struct page *page);
int rksm_page_try_share(struct page *page);
int rksm_split_huge_page(struct page *page);
void rksm_page_add_rmap(struct page *page, struct vm_area_struct *vma, unsigned long addr);
void rksm_page_remove_rmap(struct page *page, struct vm_area_struct *vma);
const void *rksm_page_content(const struct page *page);
const void *rksm_zero_content(void);
unsigned long rksm_zero_pfn(void);
void rksm_lru_init(void);
void rksm_lru_exit(void);
void rksm_lru_drain(unsigned int wait_ms);

/* The anonymous page that an entry maps. */
struct rksm_mapped {
	/* folio->mapping, including its flags. */
	unsigned long mapping;
	/* The kernel address of the page's content. */
	const void *content;
};

/* Page tables. */
bool rksm_entry_anon(pte_t *pte, struct rksm_mapped *mapped);
bool rksm_entry_away(pte_t *pte);
int rksm_walk_vma(struct vm_area_struct *vma, unsigned long start, unsigned long end, void *ctx);
pmd_t rksm_pmd_lockless(pmd_t *pmd);
bool rksm_pmd_present(pmd_t pmd);
bool rksm_pmd_leaf(pmd_t pmd);
bool rksm_pmd_uffd(pmd_t pmd);
pmd_t *rksm_find_pmd(struct mm_struct *mm, unsigned long addr);
spinlock_t *rksm_pmd_lock(struct mm_struct *mm, pmd_t *pmd);
void rksm_ptl_unlock(spinlock_t *ptl);
pte_t *rksm_pte_lock(struct mm_struct *mm, pmd_t *pmd, unsigned long addr, spinlock_t **ptl);
pte_t *rksm_pte_lock_addr(struct mm_struct *mm, unsigned long addr, spinlock_t **ptl);
void rksm_pte_unlock(pte_t *pte, spinlock_t *ptl);
pte_t rksm_ptep_get(pte_t *pte);
bool rksm_pte_present(pte_t pte);
bool rksm_pte_none(pte_t pte);
bool rksm_pte_write(pte_t pte);
bool rksm_pte_dirty(pte_t pte);
bool rksm_pte_uffd(pte_t pte);
pte_t rksm_pte_clean_wrprotect(pte_t pte);
pte_t rksm_mk_shared_pte(struct page *page, struct vm_area_struct *vma, pte_t old);
pte_t rksm_ptep_clear_flush(struct vm_area_struct *vma, unsigned long addr, pte_t *pte);
void rksm_set_pte(struct mm_struct *mm, unsigned long addr, pte_t *pte, pte_t val);
struct page *rksm_normal_page(struct vm_area_struct *vma, unsigned long addr, pte_t pte);
struct page *rksm_normal_page_pmd(struct vm_area_struct *vma, unsigned long addr, pmd_t pmd);
struct folio *rksm_migration_folio(pte_t pte);
bool rksm_is_ksm_zero_pte(pte_t pte);
pte_t rksm_mk_zero_pte(struct vm_area_struct *vma, unsigned long addr, pte_t old);

/* Address spaces and VMAs. */
int rksm_mmap_read_lock_killable(struct mm_struct *mm);
int rksm_mm_users(struct mm_struct *mm);
unsigned long rksm_mm_anon_pages(struct mm_struct *mm);
void rksm_mm_count_zero_page(struct mm_struct *mm);
long rksm_zero_pages(void);
bool rksm_mm_tlb_flush_pending(struct mm_struct *mm);
void rksm_notify_start(struct mmu_notifier_range *range, struct mm_struct *mm,
		       unsigned long start, unsigned long end);
void rksm_notify_end(struct mmu_notifier_range *range);
struct anon_vma *rksm_vma_get_anon_vma(struct vm_area_struct *vma);
struct anon_vma *rksm_folio_get_anon_vma(struct folio *folio);
void rksm_put_anon_vma(struct anon_vma *anon_vma);
typedef bool (*rksm_rmap_one_fn)(struct folio *folio, struct vm_area_struct *vma,
				 unsigned long addr, void *arg);
void rksm_rmap_walk(struct folio *folio, rksm_rmap_one_fn rmap_one, void *arg);
bool rksm_folio_mapped_at(struct folio *folio, struct vm_area_struct *vma, unsigned long addr);
bool rksm_page_mapped_at(struct page *page, struct vm_area_struct *vma, unsigned long addr);
unsigned long rksm_page_address_in_vma(struct page *page, struct vm_area_struct *vma);
bool rksm_mm_mergeable(struct mm_struct *mm);
bool rksm_vma_mergeable(struct vm_area_struct *vma);
bool rksm_vma_may_be_merged(struct vm_area_struct *vma);
bool rksm_pte_unservable(struct vm_area_struct *vma, pte_t pte);
unsigned long rksm_vma_page_index(struct vm_area_struct *vma, unsigned long addr);
void rksm_mm_add_merging(struct mm_struct *mm, long n);
void rksm_mm_set_rmap_items(struct mm_struct *mm, unsigned long n);
int rksm_unshare(struct vm_area_struct *vma, unsigned long addr);

/* Lists that the core kernel walks. */
void rksm_hlist_add_head(struct hlist_node *node, struct hlist_head *head);
void rksm_hlist_del(struct hlist_node *node);

/* The scanning thread. */
struct task_struct *rksm_kthread_create(int (*fn)(void *), void *data);
void rksm_kthread_stop(struct task_struct *task);
bool rksm_kthread_should_stop(void);
u64 rksm_cpu_time(void);
void rksm_set_nice(struct task_struct *task, long nice);
void rksm_set_freezable(void);
void rksm_set_sleeping(void);
void rksm_set_running(void);
bool rksm_freezing(void);
bool rksm_try_to_freeze(void);
unsigned long rksm_msecs_to_jiffies(unsigned int ms);
void rksm_cond_resched(void);

void rksm_set_oom_origin(bool on);

/* Memory cgroups. */
struct mem_cgroup *rksm_get_memcg(struct mm_struct *mm);
void rksm_put_memcg(struct mem_cgroup *memcg);
struct mem_cgroup *rksm_set_active_memcg(struct mem_cgroup *memcg);

/* Data of the kernel image. */
struct kobject *rksm_mm_kobj(void);
void rksm_attribute_init(struct attribute *attr);
const void *rksm_btf(unsigned long *len);
const void *rksm_notes(unsigned long *len);
int rksm_store_word(unsigned long *at, unsigned long value);

/* Tracepoints. */
void rksm_tracepoint_synchronize_unregister(void);
void rksm_trace_start_scan(int seq, u32 rmap_entries);
void rksm_trace_stop_scan(int seq, u32 rmap_entries);
void rksm_trace_merge_one_page(unsigned long pfn, void *item, struct mm_struct *mm, int err);
void rksm_trace_merge_with_ksm_page(void *kpage, unsigned long pfn, void *item,
				    struct mm_struct *mm, int err);
void rksm_trace_remove_ksm_page(unsigned long pfn);
void rksm_trace_remove_rmap_item(unsigned long pfn, void *item, struct mm_struct *mm);
void rksm_trace_advisor(s64 scan_time, unsigned long pages_to_scan, unsigned int cpu_percent);

/* Memory hotplug. */
int rksm_register_memory_notifier(struct notifier_block *nb);
void rksm_unregister_memory_notifier(struct notifier_block *nb);

/* In-tree KSM. */
typedef void (*rksm_mm_fn)(void *data, struct mm_struct *mm);
void rksm_intree_lock(void);
void rksm_intree_unlock(void);
unsigned long rksm_intree_run(void);
unsigned long *rksm_intree_run_ptr(void);
void rksm_intree_set_unmerge(bool on);
unsigned long rksm_intree_pages_shared(void);
unsigned long rksm_intree_rmap_items(void);
bool rksm_intree_has_nodes(void);
void rksm_intree_each_mm(rksm_mm_fn fn, void *data);

/* The module itself. */
bool rksm_module_can_pin(struct module *mod);
int rksm_module_pin(struct module *mod);
int rksm_module_unpin(struct module *mod);
bool rksm_module_pinned(struct module *mod);
int rksm_watch_unload(void);
void rksm_unwatch_unload(void);
long rksm_copy_user_nofault(void *to, unsigned long from, unsigned long len);

#endif /* _RKSM_SHIM_H */
