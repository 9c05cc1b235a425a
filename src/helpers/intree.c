// SPDX-License-Identifier: GPL-2.0

#include <linux/ksm.h>

/* mm/mm_slot.h: Kbuild adds -I$(srctree)/mm. */
#include "mm_slot.h"

#include "shim.h"

/* In-tree KSM.  The data is static in mm/ksm.c, and listed in src/abi/symbols.klp. */

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

/* Bit 1 is KSM_RUN_UNMERGE of mm/ksm.c. */
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

void rksm_intree_each_mm(rksm_mm_fn fn, void *data)
{
	struct mm_slot *slot;

	spin_lock(&ksm_mmlist_lock);
	list_for_each_entry(slot, &ksm_mm_head.mm_node, mm_node) {
		/*
		 * An mm without users is exiting, and may have passed
		 * ksm_exit() already: in-tree KSM leaves the slot that its
		 * scan stopped at on the list.
		 */
		if (atomic_read(&slot->mm->mm_users))
			fn(data, slot->mm);
	}
	spin_unlock(&ksm_mmlist_lock);
}
