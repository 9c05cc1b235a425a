// SPDX-License-Identifier: GPL-2.0

#include <linux/kthread.h>
#include <linux/oom.h>
#include <linux/sched/cputime.h>

#include "shim.h"

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
