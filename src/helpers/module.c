// SPDX-License-Identifier: GPL-2.0

#include <linux/capability.h>
#include <linux/kprobes.h>
#include <linux/module.h>
#include <linux/uaccess.h>

#include "shim.h"

/* Data of the kernel image. */

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

/* Give lockdep a static key, since the attribute itself is not static. */
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

/* Store a word at once, like WRITE_ONCE(), but return -EFAULT instead of an oops. */
int rksm_store_word(unsigned long *at, unsigned long value)
{
	return copy_to_kernel_nofault(at, &value, sizeof(value));
}

/* The module itself. */

extern struct mutex module_mutex;

/* The exit function of a pinned module.  Protected by module_mutex. */
static void (*rksm_module_exit)(void);

static int rksm_module_set_exit(struct module *mod, void (*exit)(void))
{
	return rksm_store_word((unsigned long *)&mod->exit, (unsigned long)exit);
}

/*
 * Return whether mod->exit will be writable once the module is live.  The loader
 * makes some data read-only after initialisation, during which this is called.
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

/* delete_module(2) returns EBUSY for a live module without an exit function. */
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

/* Defined in src/sys/module_pin.rs. */
void rksm_unload_attempt(unsigned long name);

/* Leave no audit record: the system call itself decides and audits. */
static bool rksm_may_unload(void)
{
	return capable_noaudit(CAP_SYS_MODULE);
}

static int rksm_before_delete_module(struct kprobe *kp, struct pt_regs *regs)
{
	const struct pt_regs *args = (void *)regs_get_kernel_argument(regs, 0);

	/* The system call has not checked the capability yet. */
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
	 * Disarming a probe allocates memory, to remove the function from the
	 * filter of ftrace.  If that failed in unregister_kprobe(), it would
	 * return silently and leave our probe in the kernel's tables.  So
	 * disarm the probe first.
	 *
	 * When disable_kprobe() fails, the probe is disarmed, except that the
	 * filter still has the function.  That does no harm.  Set the flag, so
	 * that unregister_kprobe() does not disarm the probe again: its use
	 * would be counted down twice.  If another user has disabled a probe at
	 * the same address, the next probe there is not armed.
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
 * Rust uses the values of these enumerations as plain constants, so its debug
 * information does not describe them.  These variables put both types into that
 * of C, where rksm-tools compares them with the types of the kernel image.
 */
static const enum vm_fault_reason rksm_fault_reason __used;
static const enum memory_block_state rksm_memory_block_state __used;
