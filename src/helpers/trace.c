// SPDX-License-Identifier: GPL-2.0

#include <linux/tracepoint.h>
#include <trace/events/ksm.h>

#include "shim.h"

/* Tracepoints. */

void rksm_tracepoint_synchronize_unregister(void)
{
	tracepoint_synchronize_unregister();
}

/*
 * Emit a trace event of mm/ksm.c, as trace_...() would.  The static branch and
 * the static call of trace_...() need a tracepoint that is exported to modules,
 * so test the key and call the iterator instead.
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
