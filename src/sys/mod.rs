// SPDX-License-Identifier: GPL-2.0

//! Safe abstractions over what the module uses of the kernel besides its memory management.

pub(crate) mod kthread;
pub(crate) mod memory_notifier;
pub(crate) mod module_pin;
pub(crate) mod oom;
pub(crate) mod patch;
pub(crate) mod sysfs;
pub(crate) mod tracepoint;
