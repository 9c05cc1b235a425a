// SPDX-License-Identifier: GPL-2.0
//! The operations of workers.

pub mod io;
pub mod memory;
pub mod place;
pub mod process;
pub mod rwp;
pub mod tracking;

use crate::plan::{Op, Step};
use crate::worker::{Act, Stop, Worker};

/// Do one step. The ledger is right even if the step ends early.
pub fn act(worker: &mut Worker, step: &Step) -> Act {
    match step.op {
        Op::Fork => process::fork(worker, step),
        Op::Exit => {
            worker.leaving = true;
            Ok(())
        }
        Op::PrctlOn => Ok(rksm_test_lib::sys::set_memory_merge(true)?),
        Op::PrctlOff => {
            rksm_test_lib::sys::set_memory_merge(false)?;
            worker.verify_all()
        }
        Op::Rest => {
            std::thread::sleep(std::time::Duration::from_millis(u64::from(step.arg % 25)));
            Ok(())
        }
        Op::Direct | Op::Vmsplice | Op::VmWrite => io::act(worker, step),
        Op::MovePages | Op::MigratePages | Op::Uffd | Op::UffdServed => place::act(worker, step),
        Op::Rwp => rwp::rwp(worker, step),
        Op::SoftDirty | Op::PagemapScan => tracking::act(worker, step),
        Op::BigExit => process::big_exit(worker, step),
        op if memory::does(op) => memory::act(worker, step),
        op => Err(Stop::Fault(format!(
            "{} is no operation of a worker",
            op.name()
        ))),
    }
}
