// SPDX-License-Identifier: GPL-2.0
/*
 * The bodies for shim.h, of a line or two each where nothing forces more.
 * The exception is who maps a page over a fork (rksm_relative() and its kin).
 */
#include <linux/capability.h>
#include <linux/ksm.h>
#include <linux/kprobes.h>
#include <linux/kthread.h>
#include <linux/leafops.h>
#include <linux/memory_hotplug.h>
#include <linux/module.h>
#include <linux/oom.h>
#include <linux/pagewalk.h>
#include <linux/rmap.h>
#include <linux/sched/cputime.h>
#include <linux/sched/isolation.h>
#include <linux/sched/mm.h>
#include <linux/tracepoint.h>
#include <linux/uaccess.h>
#include <linux/userfaultfd_k.h>
#include <linux/wait.h>
#include <linux/workqueue.h>
#include <asm/tlbflush.h>
#include <trace/events/ksm.h>

/* mm/internal.h and mm/mm_slot.h: -I$(srctree)/mm, see Kbuild. */
#include "internal.h"
#include "mm_slot.h"

#include "shim.h"

/* Asks the module loader to resolve the relocations that rksm-tools made. */
MODULE_INFO(livepatch, "Y");

/* Folios and pages. */

struct folio *rksm_page_folio(struct page *page)
{
	return page_folio(page);
}

/* NULL for a frame that is not in the memory map (any more). */
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

/* -1 for a frame that is not in the memory map (any more). */
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

/* Whether a reference too many may be that of a per-CPU batch, and not a pin. */
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

/* Reclaim frees a clean folio without dirty ptes; a merged one must be swapped. */
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
 * 0 if no swap entry, nor the swap cache, has the locked folio any more; -EBUSY
 * while it is being written.
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

/* x86-64 has no highmem: what kmap_local_page() would return, and for ever. */
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
 * lru_add_drain_all() waits for every CPU, isolated or not, for as long as a
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
		/* Still queued since the last time: counted already. */
		if (!queue_work_on(cpu, system_percpu_wq, per_cpu_ptr(&rksm_lru_work, cpu)))
			atomic_dec(&rksm_lru_left);
	}
	wait_event_idle_timeout(rksm_lru_wait, !atomic_read(&rksm_lru_left),
				msecs_to_jiffies(wait_ms));
}

/* Page tables. */

/* src/mm/walk.rs */
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
 * More than a line, since the scan calls this for every entry: whether it maps
 * an anonymous page.  A special entry never does, and others need no look at
 * the VMA to find their page, as in gup_fast_pte_range().
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
	 * Broken memory must not be read.  A KSM page is not read anyway, and
	 * must stay listed: whoever is about to unmap it finds it by that.
	 */
	if (unlikely(PageHWPoison(page)) &&
	    (mapped->mapping & FOLIO_MAPPING_FLAGS) != FOLIO_MAPPING_KSM)
		return false;
	return (mapped->mapping & FOLIO_MAPPING_ANON) && !folio_is_zone_device(folio);
}

/* Whether an entry is that of a page which is swapped out or being moved. */
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

/* NULL if there is no table that could have the entry.  It may be an empty one. */
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

/* The soft-dirty bit stays: a checkpointing tool must not miss the page. */
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
 * The dirty bit tells it from a zero page that was there by a read fault.  It is
 * no sign of a write: pte_mkdirty() sets the soft-dirty bit as well, which has
 * to stay as it was.
 */
pte_t rksm_mk_zero_pte(struct vm_area_struct *vma, unsigned long addr, pte_t old)
{
	pte_t pte = pte_mkdirty(pte_mkspecial(pfn_pte(zero_pfn(addr), vma->vm_page_prot)));

	return pte_soft_dirty(old) ? pte : pte_clear_soft_dirty(pte);
}

/* Address spaces and VMAs. */

unsigned long rksm_mm_anon_pages(struct mm_struct *mm)
{
	return get_mm_counter(mm, MM_ANONPAGES);
}

/* An anonymous page became a zero page, which is none. */
void rksm_mm_count_zero_page(struct mm_struct *mm)
{
	ksm_map_zero_page(mm);
	dec_mm_counter(mm, MM_ANONPAGES);
}

long rksm_zero_pages(void)
{
	return atomic_long_read(&ksm_zero_pages);
}

int rksm_mmap_read_lock_killable(struct mm_struct *mm)
{
	return mmap_read_lock_killable(mm);
}

int rksm_mm_users(struct mm_struct *mm)
{
	return atomic_read(&mm->mm_users);
}

bool rksm_mm_tlb_flush_pending(struct mm_struct *mm)
{
	return mm_tlb_flush_pending(mm);
}

void rksm_notify_start(struct mmu_notifier_range *range, struct mm_struct *mm,
		       unsigned long start, unsigned long end)
{
	mmu_notifier_range_init(range, MMU_NOTIFY_CLEAR, 0, mm, start, end);
	mmu_notifier_invalidate_range_start(range);
}

void rksm_notify_end(struct mmu_notifier_range *range)
{
	mmu_notifier_invalidate_range_end(range);
}

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

bool rksm_vma_mergeable(struct vm_area_struct *vma)
{
	return (vma->vm_flags & VM_MERGEABLE) && vma->anon_vma;
}

/* VM_MERGEABLE can be lost while pages stay merged, but none of these is gained. */
bool rksm_vma_may_be_merged(struct vm_area_struct *vma)
{
	return vma->anon_vma && !(vma->vm_flags & (VM_SPECIAL | VM_HUGETLB));
}

/*
 * An unshare fault there would be handed to a userfaultfd monitor, which cannot
 * be waited for: it would fail (and, with CONFIG_DEBUG_VM, say so in the log).
 */
bool rksm_pte_unservable(struct vm_area_struct *vma, pte_t pte)
{
	return pte_present(pte) && userfaultfd_pte_rwp(vma, pte) && pte_protnone(pte) &&
	       vma_is_accessible(vma) && !userfaultfd_rwp_async(vma);
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

unsigned long rksm_vma_page_index(struct vm_area_struct *vma, unsigned long addr)
{
	return linear_anon_page_index(vma, addr);
}

/* Both counters are plain longs with one writer: whoever runs the engine. */
void rksm_mm_add_merging(struct mm_struct *mm, long n)
{
	mm->ksm_merging_pages += n;
}

void rksm_mm_set_rmap_items(struct mm_struct *mm, unsigned long n)
{
	mm->ksm_rmap_items = n;
}

int rksm_unshare(struct vm_area_struct *vma, unsigned long addr)
{
	return handle_mm_fault(vma, addr, FAULT_FLAG_UNSHARE | FAULT_FLAG_REMOTE, NULL);
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

/* The scanning thread. */

struct task_struct *rksm_kthread_create(int (*fn)(void *), void *data)
{
	return kthread_create(fn, data, "rksmd");
}

void rksm_kthread_stop(struct task_struct *task)
{
	kthread_stop_put(task);
}

bool rksm_kthread_should_stop(void)
{
	return kthread_should_stop();
}

u64 rksm_cpu_time(void)
{
	return task_sched_runtime(current);
}

void rksm_set_nice(struct task_struct *task, long nice)
{
	set_user_nice(task, nice);
}

void rksm_set_freezable(void)
{
	set_freezable();
}

void rksm_set_sleeping(void)
{
	set_current_state(TASK_INTERRUPTIBLE | TASK_FREEZABLE);
}

void rksm_set_running(void)
{
	__set_current_state(TASK_RUNNING);
}

bool rksm_freezing(void)
{
	return freezing(current);
}

bool rksm_try_to_freeze(void)
{
	return try_to_freeze();
}

unsigned long rksm_msecs_to_jiffies(unsigned int ms)
{
	return msecs_to_jiffies(ms);
}

void rksm_cond_resched(void)
{
	cond_resched();
}

void rksm_set_oom_origin(bool on)
{
	if (on)
		set_current_oom_origin();
	else
		clear_current_oom_origin();
}

/* Memory cgroups. */

/* With a reference.  NULL without memory cgroups. */
struct mem_cgroup *rksm_get_memcg(struct mm_struct *mm)
{
	return get_mem_cgroup_from_mm(mm);
}

void rksm_put_memcg(struct mem_cgroup *memcg)
{
	mem_cgroup_put(memcg);
}

struct mem_cgroup *rksm_set_active_memcg(struct mem_cgroup *memcg)
{
	return set_active_memcg(memcg);
}

/* What is there since boot. */

/* Bounds of the .BTF section, declared as in kernel/bpf. */
extern char __start_BTF[];
extern char __stop_BTF[];

/* Bounds of the .notes section, see kernel/ksysfs.c. */
extern const char __start_notes[];
extern const char __stop_notes[];

struct kobject *rksm_mm_kobj(void)
{
	return mm_kobj;
}

/* Gives lockdep a static key: the attribute itself is not. */
void rksm_attribute_init(struct attribute *attr)
{
	sysfs_attr_init(attr);
}

const void *rksm_btf(unsigned long *len)
{
	*len = __stop_BTF - __start_BTF;
	return __start_BTF;
}

const void *rksm_notes(unsigned long *len)
{
	*len = __stop_notes - __start_notes;
	return __start_notes;
}

/* As one word, like WRITE_ONCE(), but -EFAULT where that would be an oops. */
int rksm_store_word(unsigned long *at, unsigned long value)
{
	return copy_to_kernel_nofault(at, &value, sizeof(value));
}

/* Tracepoints. */

void rksm_tracepoint_synchronize_unregister(void)
{
	tracepoint_synchronize_unregister();
}

/*
 * The events of mm/ksm.c.  What trace_…() does, less the patching of code: its
 * static branches and calls are for the tracepoints that a module can see.
 */
#define rksm_trace(name, ...)						\
	do {								\
		if (static_key_enabled(&__tracepoint_##name.key)) {	\
			guard(srcu_fast_notrace)(&tracepoint_srcu);	\
			__traceiter_##name(NULL, __VA_ARGS__);		\
		}							\
	} while (0)

void rksm_trace_start_scan(int seq, u32 rmap_entries)
{
	rksm_trace(ksm_start_scan, seq, rmap_entries);
}

void rksm_trace_stop_scan(int seq, u32 rmap_entries)
{
	rksm_trace(ksm_stop_scan, seq, rmap_entries);
}

void rksm_trace_merge_one_page(unsigned long pfn, void *item, struct mm_struct *mm, int err)
{
	rksm_trace(ksm_merge_one_page, pfn, item, mm, err);
}

void rksm_trace_merge_with_ksm_page(void *kpage, unsigned long pfn, void *item,
				    struct mm_struct *mm, int err)
{
	rksm_trace(ksm_merge_with_ksm_page, kpage, pfn, item, mm, err);
}

void rksm_trace_remove_ksm_page(unsigned long pfn)
{
	rksm_trace(ksm_remove_ksm_page, pfn);
}

void rksm_trace_remove_rmap_item(unsigned long pfn, void *item, struct mm_struct *mm)
{
	rksm_trace(ksm_remove_rmap_item, pfn, item, mm);
}

void rksm_trace_advisor(s64 scan_time, unsigned long pages_to_scan, unsigned int cpu_percent)
{
	rksm_trace(ksm_advisor, scan_time, pages_to_scan, cpu_percent);
}

/* Memory that goes offline. */

/* At the priority of the in-tree engine. */
int rksm_register_memory_notifier(struct notifier_block *nb)
{
	nb->priority = KSM_CALLBACK_PRI;
	return register_memory_notifier(nb);
}

void rksm_unregister_memory_notifier(struct notifier_block *nb)
{
	unregister_memory_notifier(nb);
}

/* The in-tree engine: static data of mm/ksm.c, see symbols.klp. */

extern struct mutex ksm_thread_mutex;
extern spinlock_t ksm_mmlist_lock;
extern struct mm_slot ksm_mm_head;
extern unsigned long ksm_run;
extern unsigned long ksm_pages_shared;
extern unsigned long ksm_rmap_items;
extern struct rb_root *root_stable_tree;
extern int ksm_nr_node_ids;
extern struct list_head migrate_nodes;

void rksm_intree_lock(void)
{
	mutex_lock(&ksm_thread_mutex);
}

void rksm_intree_unlock(void)
{
	mutex_unlock(&ksm_thread_mutex);
}

unsigned long rksm_intree_run(void)
{
	return READ_ONCE(ksm_run);
}

unsigned long *rksm_intree_run_ptr(void)
{
	return &ksm_run;
}

/* KSM_RUN_UNMERGE of mm/ksm.c. */
void rksm_intree_set_unmerge(bool on)
{
	WRITE_ONCE(ksm_run, on ? ksm_run | 2 : ksm_run & ~2UL);
}

unsigned long rksm_intree_pages_shared(void)
{
	return READ_ONCE(ksm_pages_shared);
}

unsigned long rksm_intree_rmap_items(void)
{
	return READ_ONCE(ksm_rmap_items);
}

bool rksm_intree_has_nodes(void)
{
	bool found = !list_empty(&migrate_nodes);
	int nid;

	for (nid = 0; nid < ksm_nr_node_ids; nid++)
		found |= !RB_EMPTY_ROOT(&root_stable_tree[nid]);
	return found;
}

void rksm_intree_for_each_mm(rksm_mm_fn fn, void *data)
{
	struct mm_slot *slot;

	spin_lock(&ksm_mmlist_lock);
	list_for_each_entry(slot, &ksm_mm_head.mm_node, mm_node) {
		/*
		 * One without users is exiting, and may have been through
		 * ksm_exit() already: the in-tree engine leaves the slot that
		 * its scan stopped at listed.
		 */
		if (atomic_read(&slot->mm->mm_users))
			fn(data, slot->mm);
	}
	spin_unlock(&ksm_mmlist_lock);
}

/* The module itself. */

extern struct mutex module_mutex;

/* Written and read under module_mutex. */
static void (*rksm_module_exit)(void);

static int rksm_module_set_exit(struct module *mod, void (*exit)(void))
{
	return rksm_store_word((unsigned long *)&mod->exit, (unsigned long)exit);
}

/*
 * Called while the module is being initialised: what becomes read-only only
 * after that counts as read-only.
 */
bool rksm_module_can_pin(struct module *mod)
{
	const unsigned long at = (unsigned long)&mod->exit;
	bool writable;

	if (within_module_mem_type(at, mod, MOD_RODATA) ||
	    within_module_mem_type(at, mod, MOD_RO_AFTER_INIT))
		return false;
	mutex_lock(&module_mutex);
	writable = !rksm_module_set_exit(mod, mod->exit);
	mutex_unlock(&module_mutex);
	return writable;
}

/* A live module without an exit function is refused by delete_module(2) with EBUSY. */
int rksm_module_pin(struct module *mod)
{
	int ret = -EBUSY;

	mutex_lock(&module_mutex);
	if (mod->state == MODULE_STATE_LIVE) {
		ret = 0;
		if (mod->exit) {
			rksm_module_exit = mod->exit;
			ret = rksm_module_set_exit(mod, NULL);
		}
	}
	mutex_unlock(&module_mutex);
	return ret;
}

int rksm_module_unpin(struct module *mod)
{
	int ret;

	mutex_lock(&module_mutex);
	ret = rksm_module_set_exit(mod, rksm_module_exit);
	mutex_unlock(&module_mutex);
	return ret;
}

bool rksm_module_pinned(struct module *mod)
{
	return !READ_ONCE(mod->exit);
}

/* src/sys/module_pin.rs */
void rksm_unload_attempt(unsigned long name);

/* Without a trace in the audit log: it is not we who decide. */
static bool rksm_may_unload(void)
{
	return capable_noaudit(CAP_SYS_MODULE);
}

static int rksm_before_delete_module(struct kprobe *kp, struct pt_regs *regs)
{
	const struct pt_regs *args = (void *)regs_get_kernel_argument(regs, 0);

	/* The system call has checked nothing yet. */
	if (rksm_may_unload())
		rksm_unload_attempt(regs_get_kernel_argument((struct pt_regs *)args, 0));
	return 0;
}

static struct kprobe rksm_delete_module_probe = {
	.symbol_name = "__x64_sys_delete_module",
	.pre_handler = rksm_before_delete_module,
};

int rksm_watch_unload(void)
{
	return register_kprobe(&rksm_delete_module_probe);
}

void rksm_unwatch_unload(void)
{
	/*
	 * Disarming allocates, to take the function out of a list.  Without
	 * memory unregister_kprobe() would say nothing and leave the probe,
	 * which is ours, in the kernel's tables.  By then it is disarmed in all
	 * respects but that list, where an entry too many does no harm; and
	 * doing it again would count it down twice.  (If somebody else has had a
	 * probe there, too, and disabled it, the next one there is not armed.)
	 */
	if (disable_kprobe(&rksm_delete_module_probe))
		rksm_delete_module_probe.flags |= KPROBE_FLAG_DISABLED;
	unregister_kprobe(&rksm_delete_module_probe);
}

long rksm_copy_user_nofault(void *to, unsigned long from, unsigned long len)
{
	return copy_from_user_nofault(to, (void __user *)from, len);
}

/*
 * Rust uses the values of these enumerations as plain constants, of which its
 * debug information has no trace.  Here they leave one, for rksm-tools to
 * compare with the image's.
 */
static const enum vm_fault_reason rksm_fault_reason __used;
static const enum memory_block_state rksm_memory_block_state __used;
