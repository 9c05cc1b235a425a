// SPDX-License-Identifier: GPL-2.0

//! rksm: merges equal anonymous pages of processes that ask for it.
//!
//! The module replaces the engine of in-tree KSM, which stays off, and makes the kernel's own KSM pages.
//! `Documentation/architecture.md` says how it works.
//!
//! | module | contents |
//! | --- | --- |
//! | `ksm` | the engine: what to scan, compare and merge, without unsafe code |
//! | `mm` | memory management: page tables, folios, rmap |
//! | `sys` | other kernel interfaces: the thread, sysfs, notifiers |
//! | `intree` | coexistence with in-tree KSM |
//! | `abi` | the check that the running kernel is the one that the module was built for |
//! | `hash` | samples and checksums of pages |

pub mod abi;
mod hash;
mod intree;
mod ksm;
mod mm;
mod sys;

use kernel::prelude::*;
use ksm::{thread::Rksmd, Engine};
use mm::lru;
use sys::{kthread::Kthread, memory_notifier, module_pin, sysfs::SysfsGroup};

module! {
    type: Rksm,
    name: "rksm",
    authors: ["rksm developers"],
    description: "Merges equal anonymous pages",
    license: "GPL",
}

/// The loaded module.
///
/// Fields are dropped in the order of their declaration, and the order matters: first remove the files, then the
/// probes, then stop the thread, and last let in-tree KSM run again.
struct Rksm {
    _sysfs: SysfsGroup<Engine>,
    _probes: intree::Probes<Engine>,
    _thread: Kthread<Rksmd>,
    _drains: lru::Drains,
    _memory_notifier: memory_notifier::Registration<Engine>,
    _delete_module_probe: Option<module_pin::DeleteModuleProbe>,
    _ksmd_disabled: intree::KsmdDisabled,
}

/// Checks that the static data that the module will change is writable.
///
/// Call this while the module is being initialised. May sleep.
///
/// # Errors
///
/// Logs the name of all data that is read-only, and returns `ENOEXEC`. Returns `ENOENT` if the kernel has no
/// in-tree KSM.
fn check_writable(module: &'static ThisModule) -> Result {
    let (intree, unload) = (intree::check_writable(), module_pin::check_writable(module));
    intree.and(unload)
}

impl kernel::Module for Rksm {
    fn init(module: &'static ThisModule) -> Result<Self> {
        abi::check::check_build()?;
        abi::check::check()?;
        check_writable(module)?;
        let ksmd_disabled = intree::KsmdDisabled::new()?;
        let engine = Engine::new(module)?;
        let memory_notifier = memory_notifier::Registration::new(engine.clone())?;
        let drains = lru::Drains::new();
        let thread = Kthread::spawn(Rksmd::new(engine.clone())?)?;
        engine.set_waker(thread.waker());
        let probes = intree::Probes::register(engine.clone())?;
        engine.enter_registered()?;
        let sysfs = SysfsGroup::new(engine)?;
        pr_info!("loaded\n");
        Ok(Self {
            _sysfs: sysfs,
            _probes: probes,
            _thread: thread,
            _drains: drains,
            _memory_notifier: memory_notifier,
            _delete_module_probe: module_pin::DeleteModuleProbe::new(),
            _ksmd_disabled: ksmd_disabled,
        })
    }
}

/// Logs why unloading is refused, see [`module_pin::log_refusal`].
///
/// The probe in helpers/module.c calls this at the start of `delete_module(2)`, with preemption disabled.
/// `name` is the argument of that call.
#[no_mangle]
extern "C" fn rksm_unload_attempt(name: usize) {
    module_pin::log_refusal(kernel::module::this_module::<LocalModule>(), name);
}
