// SPDX-License-Identifier: GPL-2.0

//! rksm: merges equal anonymous pages of processes that ask for it.
//!
//! The module does what in-tree KSM does, with the kernel's own KSM pages, beside an in-tree engine
//! that stays off. See `Documentation/architecture.md`.

pub mod abi;
mod hash;
mod ksm;
mod mm;

use kernel::prelude::*;
use ksm::Engine;
use mm::{hotplug, intree, kthread::Kthread, lru, sysfs::Shown, unload};

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
    _knobs: Shown<Engine>,
    _probes: intree::Probes<Engine>,
    _thread: Kthread<Engine>,
    _drains: lru::Drains,
    _hotplug: hotplug::Registration<Engine>,
    _explainer: Option<unload::Explainer>,
    _blocked: intree::Blocked,
}

impl kernel::Module for Rksm {
    fn init(module: &'static ThisModule) -> Result<Self> {
        mm::abi::check_build()?;
        mm::abi::check()?;
        mm::check_writable(module)?;
        let blocked = intree::Blocked::new()?;
        let engine = Engine::new(module)?;
        let hotplug = hotplug::Registration::new(engine.clone())?;
        let drains = lru::Drains::new();
        let thread = Kthread::spawn(engine.clone())?;
        engine.set_waker(thread.waker());
        let probes = intree::Probes::register(engine.clone())?;
        engine.enter_registered()?;
        let knobs = Shown::new(engine)?;
        pr_info!("loaded\n");
        Ok(Self {
            _knobs: knobs,
            _probes: probes,
            _thread: thread,
            _drains: drains,
            _hotplug: hotplug,
            _explainer: unload::Explainer::new(),
            _blocked: blocked,
        })
    }
}
