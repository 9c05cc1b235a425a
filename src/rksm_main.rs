// SPDX-License-Identifier: GPL-2.0

//! rksm: merges equal anonymous pages of processes that ask for it.
//!
//! The module does what in-tree KSM does, with the kernel's own KSM pages, beside an in-tree engine
//! that stays off. See `Documentation/architecture.md`.

pub mod abi;
mod hash;
mod intree;
mod ksm;
mod mm;
mod sys;

use kernel::prelude::*;
use ksm::Engine;
use mm::lru;
use sys::{kthread::Kthread, memory_notifier, module_pin, sysfs::SysfsGroup};

module! {
    type: Rksm,
    name: "rksm",
    authors: ["rksm developers"],
    description: "Merges equal anonymous pages",
    license: "GPL",
}

/// The loaded module. Its parts are dropped in this order: nobody can ask for anything any more, then
/// nobody reports anything, then nothing runs, and only then may in-tree KSM run again.
struct Rksm {
    _knobs: SysfsGroup<Engine>,
    _probes: intree::Probes<Engine>,
    _thread: Kthread<Engine>,
    _drains: lru::Drains,
    _hotplug: memory_notifier::Registration<Engine>,
    _explainer: Option<module_pin::DeleteModuleProbe>,
    _blocked: intree::KsmdDisabled,
}

/// Checks, while the module is being initialised, that the static data that it will change is not
/// read-only. What is gets named in the log.
///
/// Fails with `ENOEXEC`.
fn check_writable(module: &'static ThisModule) -> Result {
    let (intree, unload) = (intree::check_writable(), module_pin::check_writable(module));
    intree.and(unload)
}

impl kernel::Module for Rksm {
    fn init(module: &'static ThisModule) -> Result<Self> {
        abi::check::check_build()?;
        abi::check::check()?;
        check_writable(module)?;
        let blocked = intree::KsmdDisabled::new()?;
        let engine = Engine::new(module)?;
        let hotplug = memory_notifier::Registration::new(engine.clone())?;
        let drains = lru::Drains::new();
        let thread = Kthread::spawn(engine.clone())?;
        engine.set_waker(thread.waker());
        let probes = intree::Probes::register(engine.clone())?;
        engine.enter_registered()?;
        let knobs = SysfsGroup::new(engine)?;
        pr_info!("loaded\n");
        Ok(Self {
            _knobs: knobs,
            _probes: probes,
            _thread: thread,
            _drains: drains,
            _hotplug: hotplug,
            _explainer: module_pin::DeleteModuleProbe::new(),
            _blocked: blocked,
        })
    }
}
