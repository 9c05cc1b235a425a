// SPDX-License-Identifier: GPL-2.0

//! Safe abstractions over the kernel interfaces that have nothing to do with page merging itself: threads, sysfs,
//! notifiers, tracepoints and module unloading.

pub(crate) mod kthread;
pub(crate) mod memory_notifier;
pub(crate) mod module_pin;
pub(crate) mod oom;
pub(crate) mod patch;
pub(crate) mod sysfs;
pub(crate) mod tracepoint;
