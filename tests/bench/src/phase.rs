// SPDX-License-Identifier: GPL-2.0
//! The current phase of the measurement, for QEMU's plugin. The plugin sees a number in a register, and a
//! file explains the numbers.

use std::sync::Mutex;

use serde::{Deserialize, Serialize};

/// A span of time that the plugin records separately.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Phase {
    pub number: u64,
    pub workload: String,
    pub engine: String,
    /// For example `first 1`: a kind of pass, and its number.
    pub what: String,
    pub pages: u64,
    /// The thread's CPU time in the phase.
    pub cpu: u64,
}

static PHASES: Mutex<Vec<Phase>> = Mutex::new(Vec::new());

/// Tell the plugin, if there is one. To the CPU, this is an instruction that does nothing.
fn tell(number: u64) {
    // SAFETY: The instruction nopl 0x726b736d(%rax) reads and writes nothing.
    unsafe {
        std::arch::asm!(
            ".byte 0x0f, 0x1f, 0x80, 0x6d, 0x73, 0x6b, 0x72",
            in("rdi") number,
            options(nomem, nostack, preserves_flags),
        );
    }
}

fn phases() -> std::sync::MutexGuard<'static, Vec<Phase>> {
    PHASES.lock().expect("no thread panics while it holds this")
}

/// Begin a phase. Only one is active at a time.
pub fn begin(engine: &str, workload: &str, what: &str, pages: u64) {
    let mut phases = phases();
    let number = phases.len() as u64 + 1;
    phases.push(Phase {
        number,
        workload: workload.into(),
        engine: engine.into(),
        what: what.into(),
        pages,
        cpu: 0,
    });
    tell(number);
}

/// End the phase, in which the thread used `cpu`.
pub fn end(cpu: u64) {
    tell(0);
    if let Some(phase) = phases().last_mut() {
        phase.cpu = cpu;
    }
}

/// Return all phases so far.
pub fn all() -> Vec<Phase> {
    phases().clone()
}
