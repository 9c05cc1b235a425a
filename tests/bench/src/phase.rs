// SPDX-License-Identifier: GPL-2.0
//! What is being measured right now, for QEMU's plugin: it sees a number in a
//! register, and a file says what the numbers stand for.

use std::sync::Mutex;

use serde::{Deserialize, Serialize};

/// A stretch of time that the plugin keeps apart from others.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Phase {
    pub number: u64,
    pub workload: String,
    pub engine: String,
    /// Such as `first 1`: a pass, and which one.
    pub what: String,
    pub pages: u64,
    /// The thread's CPU time in it.
    pub cpu: u64,
}

static PHASES: Mutex<Vec<Phase>> = Mutex::new(Vec::new());

/// Tells the plugin, if there is one: to the CPU it is an instruction that
/// does nothing.
fn tell(number: u64) {
    // SAFETY: nopl 0x726b736d(%rax) reads and writes nothing.
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

/// Begins a phase; only one is under way at a time.
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

/// Ends the phase, in which the thread used `cpu`.
pub fn end(cpu: u64) {
    tell(0);
    if let Some(phase) = phases().last_mut() {
        phase.cpu = cpu;
    }
}

/// All phases so far.
pub fn all() -> Vec<Phase> {
    phases().clone()
}
