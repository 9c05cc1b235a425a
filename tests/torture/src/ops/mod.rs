// SPDX-License-Identifier: GPL-2.0
//! What players do.

pub mod io;
pub mod memory;
pub mod place;
pub mod process;
pub mod rwp;
pub mod tracking;

use crate::plan::{Op, Step};
use crate::player::{Act, Player, Stop};

/// Does one step. When it ends early the ledger is right all the same.
pub fn act(player: &mut Player, step: &Step) -> Act {
    match step.op {
        Op::Fork => process::fork(player, step),
        Op::Exit => {
            player.leaving = true;
            Ok(())
        }
        Op::PrctlOn => Ok(rksm_test_lib::sys::set_memory_merge(true)?),
        Op::PrctlOff => {
            rksm_test_lib::sys::set_memory_merge(false)?;
            player.verify_all()
        }
        Op::Rest => {
            std::thread::sleep(std::time::Duration::from_millis(u64::from(step.arg % 25)));
            Ok(())
        }
        Op::Direct | Op::Vmsplice | Op::VmWrite => io::act(player, step),
        Op::MovePages | Op::MigratePages | Op::Uffd | Op::UffdServed => place::act(player, step),
        Op::Rwp => rwp::rwp(player, step),
        Op::SoftDirty | Op::PagemapScan => tracking::act(player, step),
        Op::BigExit => process::big_exit(player, step),
        op if memory::does(op) => memory::act(player, step),
        op => Err(Stop::Fault(format!(
            "{} is nothing for a player",
            op.name()
        ))),
    }
}
