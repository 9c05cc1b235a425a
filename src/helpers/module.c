// SPDX-License-Identifier: GPL-2.0

#include <linux/capability.h>
#include <linux/kprobes.h>
#include <linux/module.h>
#include <linux/uaccess.h>

#include "shim.h"

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
