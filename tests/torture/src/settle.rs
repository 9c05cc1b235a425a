// SPDX-License-Identifier: GPL-2.0
//! The state before a round, and the check that nothing is left after it.

use std::fs;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{ensure, Context, Result};
use rksm_test_lib::engine::{self, read_from, wait_for, RKSM};
use rksm_test_lib::swap::Zram;
use rksm_test_lib::{module, numa, proc, sys};

use crate::arena::Arena;
use crate::control::{Task, TASKS};
use crate::disk;
use crate::ops::tracking;
use crate::page::PAGE;
use crate::plan::Op;
use crate::raw::uffd::{NoAccess, Uffd};
use crate::raw::{self, Mem};

/// Size of the swap space, in MiB.
const SWAP_MIB: usize = 256;

/// The abilities of the guest.
pub struct Machine {
    pub tasks: Vec<&'static Task>,
    /// The operations that are not possible, with the reason.
    pub absent: Vec<(Op, &'static str)>,
    _swap: Option<Zram>,
}

impl Machine {
    /// Find out what is possible here, and prepare it.
    pub fn probe(arena: &Arena) -> Result<Self> {
        // khugepaged copies whole huge pages while page tables are kept from being freed. At its nice value
        // of 19, on one CPU with all these processes, that may take so long that RCU complains.
        if let Some(pid) = proc::kernel_thread("khugepaged")? {
            sys::set_nice(pid, 0).context("khugepaged")?;
        }
        let mut this = Self {
            tasks: Vec::new(),
            absent: Vec::new(),
            _swap: Zram::new(SWAP_MIB)?,
        };
        for task in TASKS {
            match (task.absent)() {
                None => this.tasks.push(task),
                Some(why) => this.absent.extend(task.ops.iter().map(|&op| (op, why))),
            }
        }
        if !disk::prepare(arena)? {
            this.absent.push((Op::Direct, "no disk to read from"));
        }
        if numa::two_nodes()?.is_none() {
            this.absent.push((Op::MigratePages, "one NUMA node only"));
        }
        for (op, by_itself) in [(Op::Uffd, true), (Op::UffdServed, false)] {
            if Uffd::new(by_itself).is_err() {
                this.absent
                    .push((op, "no userfaultfd that protects from writing"));
            }
        }
        let mem = Mem::new(1)?;
        if NoAccess::new(mem.addr(), PAGE, false).is_ok() {
            arena.has_rwp.store(1, Ordering::Relaxed);
        } else {
            let why = "no userfaultfd that protects from all access";
            this.absent.push((Op::Rwp, why));
        }
        if let Some(why) = tracking::no_soft_dirty() {
            this.absent.push((Op::SoftDirty, why));
        }
        Ok(this)
    }
}

/// Counters that are zero when no process is registered and no page merged.
const ZERO: [&str; 6] = [
    "pages_shared",
    "pages_sharing",
    "pages_unshared",
    "pages_volatile",
    "stable_node_chains",
    "stable_node_dups",
];

/// Check the counters after all processes are gone. Merged pages go with them. The engine's metadata of them
/// goes when it is asked to unmerge, at the latest.
pub fn counters(slow: u64, forks: u64) -> Result<()> {
    module::ensure_loaded(true)?;
    let dir = Path::new(RKSM);
    let left = || -> Result<Vec<(&str, u64)>> {
        let all = ZERO.map(|name| Ok((name, read_from(dir, name)?)));
        let all: Vec<(&str, u64)> = all.into_iter().collect::<Result<_>>()?;
        Ok(all.into_iter().filter(|&(_, n)| n != 0).collect())
    };
    raw::say(&format!(
        "# left after the end of all processes: {:?}\n",
        left()?
    ));
    engine::write("run", 0)?;
    engine::write("run", 2)?;
    let waited = wait_for("zero", Duration::from_secs(60 * slow), || {
        Ok(left()?.is_empty())
    });
    let (left, profit) = (left()?, fs::read_to_string(dir.join("general_profit"))?);
    raw::say(&format!("# general_profit {}\n", profit.trim()));
    ensure!(waited.is_ok() && left.is_empty(), "not zero: {left:?}");
    zero_pages(forks)
}

/// Check the kernel's own count of zero pages. `ksm_fork()` adds the parent's count as of the copy of its
/// `mm_struct`, which precedes the mmap_lock of the fork. If another thread, or the engine, makes or splits
/// such pages between the two, the count stays off by their number, with in-tree KSM as well. The engine
/// makes up to 16 under one hold of that lock. The count starts at boot, so `forks` includes those of all
/// rounds and failed ones, but not those that serve a userfaultfd.
fn zero_pages(forks: u64) -> Result<()> {
    let text = fs::read_to_string(Path::new(RKSM).join("ksm_zero_pages"))?;
    let off: i64 = text.trim().parse().context("ksm_zero_pages")?;
    let may = 128 + forks / 8;
    raw::say(&format!(
        "# ksm_zero_pages {off} in the end; at most {may} off after {forks} forks\n"
    ));
    ensure!(
        off.unsigned_abs() <= may,
        "ksm_zero_pages is {off} in the end"
    );
    Ok(())
}

/// Unmerge, unload, and let the kernel free what it can.
pub fn settle(slow: u64) -> Result<()> {
    if module::loaded() {
        engine::reset()?;
        module::unload_soon(Duration::from_secs(60 * slow))?;
    }
    // The memory of processes that were killed last is freed in the background.
    for _ in 0..5 {
        fs::write("/proc/sys/vm/drop_caches", "3").context("drop_caches")?;
        std::thread::sleep(Duration::from_millis(200));
    }
    let _ = fs::write("/proc/sys/vm/compact_memory", "1");
    Ok(())
}

/// Free memory in KiB while the module is not loaded.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    free: i64,
    slab: i64,
    page_tables: i64,
    anon: i64,
    swap: i64,
}

impl Memory {
    pub fn now() -> Result<Self> {
        let this = Self {
            free: proc::free_kib()?,
            slab: proc::meminfo("SUnreclaim")?,
            page_tables: proc::meminfo("PageTables")?,
            anon: proc::meminfo("AnonPages")?,
            swap: proc::meminfo("SwapTotal")? - proc::meminfo("SwapFree")?,
        };
        raw::say(&format!("# memory: {this:?} KiB\n"));
        Ok(this)
    }

    /// Compare with the memory after two warm-up rounds. At most 8 MiB, and twice the difference between
    /// those two, may be missing.
    pub fn check(&self, first: Self, second: Self) -> Result<()> {
        let mut slack = 8 << 10;
        if has_quarantine() {
            // KASAN keeps freed objects, up to a limit, before they are used again.
            slack += proc::meminfo("MemTotal")? / 32;
        }
        let compare = |what, now: i64, first: i64, second: i64| {
            let may = slack + 2 * (first - second).abs();
            raw::say(&format!(
                "# {what}: {second} KiB, then {now} KiB; slack {may} KiB\n"
            ));
            ensure!(
                now <= second + may,
                "{what}: {second} KiB before, {now} KiB after"
            );
            Ok(())
        };
        compare("used", -self.free, -first.free, -second.free)?;
        compare("slab", self.slab, first.slab, second.slab)?;
        compare(
            "page tables",
            self.page_tables,
            first.page_tables,
            second.page_tables,
        )?;
        compare("anonymous", self.anon, first.anon, second.anon)?;
        compare("swap", self.swap, first.swap, second.swap)
    }
}

/// Apply [`Memory::check`] to the memory at the end. Retry for some time.
pub fn memory_is_back(slow: u64, first: Memory, second: Memory) -> Result<()> {
    for _ in 0..4 {
        if Memory::now()?.check(first, second).is_ok() {
            return Ok(());
        }
        settle(slow)?;
    }
    Memory::now()?.check(first, second)
}

fn has_quarantine() -> bool {
    fs::read_to_string("/proc/kallsyms").is_ok_and(|text| text.contains(" kasan_quarantine_put"))
}
