// SPDX-License-Identifier: GPL-2.0

#include <linux/ksm.h>
#include <linux/memory_hotplug.h>
#include <linux/sched/mm.h>
#include <linux/userfaultfd_k.h>

/* mm/internal.h: Kbuild adds -I$(srctree)/mm. */
#include "internal.h"

#include "shim.h"

/* Address spaces and VMAs. */

unsigned long rksm_mm_anon_pages(struct mm_struct *mm)
{
	return get_mm_counter(mm, MM_ANONPAGES);
}

/* Count a zero page that replaced an anonymous page: it is not anonymous itself. */
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

bool rksm_mm_mergeable(struct mm_struct *mm)
{
	return mm_flags_test(MMF_VM_MERGEABLE, mm);
}

bool rksm_vma_mergeable(struct vm_area_struct *vma)
{
	return (vma->vm_flags & VM_MERGEABLE) && vma->anon_vma;
}

/* Pages may stay merged when a VMA loses VM_MERGEABLE.  It never gains the flags below. */
bool rksm_vma_may_be_merged(struct vm_area_struct *vma)
{
	return vma->anon_vma && !(vma->vm_flags & (VM_SPECIAL | VM_HUGETLB));
}

/*
 * Return whether an unshare fault on the entry would go to a userfaultfd
 * monitor.  The module cannot wait for a monitor, so the fault would fail.  With
 * CONFIG_DEBUG_VM the kernel would also log a warning.
 */
bool rksm_pte_unservable(struct vm_area_struct *vma, pte_t pte)
{
	return pte_present(pte) && userfaultfd_pte_rwp(vma, pte) && pte_protnone(pte) &&
	       vma_is_accessible(vma) && !userfaultfd_rwp_async(vma);
}

unsigned long rksm_vma_page_index(struct vm_area_struct *vma, unsigned long addr)
{
	return linear_anon_page_index(vma, addr);
}

/* Both counters are plain longs.  Only the engine that runs writes them. */
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
	return (__force int)handle_mm_fault(vma, addr, FAULT_FLAG_UNSHARE | FAULT_FLAG_REMOTE, NULL);
}

/* Memory cgroups. */

/* Return a reference, or NULL if memory cgroups are disabled. */
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

/* Memory hotplug. */

/* Use the priority of in-tree KSM's notifier. */
int rksm_register_memory_notifier(struct notifier_block *nb)
{
	nb->priority = KSM_CALLBACK_PRI;
	return register_memory_notifier(nb);
}

void rksm_unregister_memory_notifier(struct notifier_block *nb)
{
	unregister_memory_notifier(nb);
}
