// SPDX-License-Identifier: GPL-2.0
/*
 * The bodies for shim.h, of a line or two each where nothing forces more.
 * The exception is who maps a page over a fork (rksm_relative() and its kin).
 *
 * One object, a file for each subsystem, as in rust/helpers of the kernel.
 */
#include <linux/module.h>

/* Asks the module loader to resolve the relocations that rksm-tools made. */
MODULE_INFO(livepatch, "Y");

/* Cargo.toml has it, see Kbuild. */
MODULE_VERSION(RKSM_VERSION);

#include "folio.c"
#include "pgtable.c"
#include "mm.c"
#include "rmap.c"
#include "kthread.c"
#include "trace.c"
#include "intree.c"
#include "module.c"
