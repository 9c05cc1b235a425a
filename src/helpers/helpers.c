// SPDX-License-Identifier: GPL-2.0
/*
 * The functions that shim.h declares.  Each wraps one operation of the kernel,
 * mostly in a line or two.
 *
 * There is one file for each subsystem.  All are compiled into one object, as in
 * rust/helpers of the kernel.
 */
#include <linux/module.h>

/* Make the module loader resolve the relocations that rksm-tools has made. */
MODULE_INFO(livepatch, "Y");

/* Kbuild takes the version from Cargo.toml. */
MODULE_VERSION(RKSM_VERSION);

#include "folio.c"
#include "pgtable.c"
#include "mm.c"
#include "rmap.c"
#include "kthread.c"
#include "trace.c"
#include "intree.c"
#include "module.c"
