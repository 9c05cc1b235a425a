// SPDX-License-Identifier: GPL-2.0
//! A small virtual machine monitor: one KVM guest with one CPU, whose memory is mergeable and whose program is
//! the payload (`payload/main.rs`). It has neither devices nor firmware, so it is up in a tenth of a second and
//! costs next to nothing besides the guest's memory.
//!
//! Standard input has commands, one on each line, and standard output the answers. Commands that begin with `!`
//! are for the monitor, which serves them while the guest works. All others are for the payload.
//!
//! | command | answer |
//! | --- | --- |
//! | `!dirty on`, `!dirty off` | `ok !dirty`: KVM logs which pages the guest writes to |
//! | `!dirty get` | `ok !dirty N`: the number of pages written to since the last time |
//! | `!memory` | `ok !memory ADDR`: where the guest's memory lies in the monitor |

use std::collections::VecDeque;
use std::env;
use std::io::{self, BufRead, Cursor, Write};
use std::process::ExitCode;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use anyhow::{bail, ensure, Context, Result};
use kvm_bindings::{
    kvm_segment, kvm_userspace_memory_region, KVM_MAX_CPUID_ENTRIES, KVM_MEM_LOG_DIRTY_PAGES,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use linux_loader::cmdline::Cmdline;
use linux_loader::loader::elf::{start_info::hvm_start_info, Elf, PvhBootCapability};
use linux_loader::loader::{load_cmdline, KernelLoader};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion};

const USAGE: &str = "\
usage: rksm-vmm --mib N --append LINE [--unmergeable] [--locked] [--thp always|never]
Run a guest with N MiB of memory, and the payload with this command line in it.
  --unmergeable   without MADV_MERGEABLE
  --locked        with mlock()
  --thp WHEN      with huge pages, or without";

static PAYLOAD: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/payload"));

/// Where the start information and the command line of the PVH protocol lie, below the payload.
const START_INFO: GuestAddress = GuestAddress(0x6000);
const COMMAND_LINE: GuestAddress = GuestAddress(0x7000);
const START_MAGIC: u32 = 0x336e_c578;

/// The ports of the payload, see there.
const CONSOLE: u16 = 0x500;
const PENDING: u16 = 0x501;
const COMMAND: u16 = 0x504;

struct Options {
    mib: usize,
    append: String,
    mergeable: bool,
    locked: bool,
    thp: Option<libc::c_int>,
}

fn options() -> Result<Options> {
    let mut options = Options {
        mib: 0,
        append: String::new(),
        mergeable: true,
        locked: false,
        thp: None,
    };
    let mut args = env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} wants a value"));
        match arg.as_str() {
            "--mib" => options.mib = value()?.parse().context("--mib")?,
            "--append" => options.append = value()?,
            "--unmergeable" => options.mergeable = false,
            "--locked" => options.locked = true,
            "--thp" => {
                options.thp = match value()?.as_str() {
                    "always" => Some(libc::MADV_HUGEPAGE),
                    "never" => Some(libc::MADV_NOHUGEPAGE),
                    other => bail!("--thp is always or never, not {other}"),
                }
            }
            _ => bail!("unknown option {arg}\n{USAGE}"),
        }
    }
    ensure!(
        (4..=2048).contains(&options.mib),
        "--mib is 4 to 2048\n{USAGE}"
    );
    Ok(options)
}

/// The bytes of commands for the payload, which it reads one at a time.
#[derive(Default)]
struct Commands {
    bytes: Mutex<(VecDeque<u8>, bool)>,
    arrived: Condvar,
}

impl Commands {
    fn bytes(&self) -> MutexGuard<'_, (VecDeque<u8>, bool)> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, line: &str) {
        let mut bytes = self.bytes();
        bytes.0.extend(line.bytes());
        bytes.0.push_back(b'\n');
        self.arrived.notify_one();
    }

    fn end(&self) {
        self.bytes().1 = true;
        self.arrived.notify_one();
    }

    fn pending(&self) -> bool {
        let bytes = self.bytes();
        !bytes.0.is_empty() || bytes.1
    }

    /// Wait for the next byte; `None` after the last command.
    fn pop(&self) -> Option<u8> {
        let waiting = |bytes: &mut (VecDeque<u8>, bool)| bytes.0.is_empty() && !bytes.1;
        let bytes = self.arrived.wait_while(self.bytes(), waiting);
        bytes.unwrap_or_else(PoisonError::into_inner).0.pop_front()
    }
}

/// Call madvise() or mlock() for all memory of the guest.
fn advise(memory: &GuestMemoryMmap, options: &Options) -> Result<()> {
    let region = memory.iter().next().context("no memory")?;
    let (addr, len) = (region.as_ptr().cast(), region.len() as usize);
    let check = |what: &str, ret| match ret {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()).context(what.to_string()),
    };
    if let Some(advice) = options.thp {
        // SAFETY: The range is the mapping of the region, and the advice does not change its content.
        check("madvise(huge pages)", unsafe {
            libc::madvise(addr, len, advice)
        })?;
    }
    if options.mergeable {
        // SAFETY: As above.
        let ret = unsafe { libc::madvise(addr, len, libc::MADV_MERGEABLE) };
        check("madvise(MADV_MERGEABLE)", ret)?;
    }
    if options.locked {
        // SAFETY: As above.
        check("mlock", unsafe { libc::mlock(addr, len) })?;
    }
    Ok(())
}

/// The virtual machine, with its memory in slot 0.
struct Machine {
    vm: VmFd,
    memory: GuestMemoryMmap,
}

impl Machine {
    fn new(kvm: &Kvm, options: &Options) -> Result<Self> {
        let size = options.mib << 20;
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), size)]).context("memory")?;
        advise(&memory, options)?;
        let vm = kvm.create_vm().context("KVM_CREATE_VM")?;
        let machine = Self { vm, memory };
        machine.log_dirty(false)?;
        Ok(machine)
    }

    fn log_dirty(&self, on: bool) -> Result<()> {
        let region = self.memory.iter().next().context("no memory")?;
        let slot = kvm_userspace_memory_region {
            slot: 0,
            flags: if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
            guest_phys_addr: 0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: The region is mapped as long as the machine exists.
        unsafe { self.vm.set_user_memory_region(slot) }.context("KVM_SET_USER_MEMORY_REGION")
    }

    fn count_dirty(&self) -> Result<u32> {
        let region = self.memory.iter().next().context("no memory")?;
        let bits = self
            .vm
            .get_dirty_log(0, region.len() as usize)
            .context("KVM_GET_DIRTY_LOG")?;
        Ok(bits.iter().map(|word| word.count_ones()).sum())
    }

    /// Load the payload. Return the address at which it begins.
    fn load(&self, append: &str) -> Result<u64> {
        let mut image = Cursor::new(PAYLOAD);
        let loaded = Elf::load(&self.memory, None, &mut image, None).context("the payload")?;
        let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
            bail!("the payload has no entry point of the PVH protocol");
        };
        let mut line = Cmdline::new(1024).context("command line")?;
        line.insert_str(append).context("command line")?;
        load_cmdline(&self.memory, COMMAND_LINE, &line).context("command line")?;
        let info = hvm_start_info {
            magic: START_MAGIC,
            version: 1,
            cmdline_paddr: COMMAND_LINE.0,
            ..Default::default()
        };
        self.memory
            .write_obj(info, START_INFO)
            .context("start information")?;
        Ok(entry.0)
    }

    /// Create the CPU, in the state that the PVH protocol demands: 32-bit protected mode with flat segments.
    fn create_cpu(&self, kvm: &Kvm, entry: u64) -> Result<VcpuFd> {
        let cpu = self.vm.create_vcpu(0).context("KVM_CREATE_VCPU")?;
        let features = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .context("CPUID")?;
        cpu.set_cpuid2(&features).context("KVM_SET_CPUID2")?;
        let data = kvm_segment {
            base: 0,
            limit: u32::MAX,
            selector: 0x10,
            type_: 3,
            present: 1,
            s: 1,
            db: 1,
            g: 1,
            ..Default::default()
        };
        let mut special = cpu.get_sregs().context("KVM_GET_SREGS")?;
        special.cs = kvm_segment {
            selector: 8,
            type_: 11,
            ..data
        };
        for segment in [
            &mut special.ds,
            &mut special.es,
            &mut special.fs,
            &mut special.gs,
            &mut special.ss,
        ] {
            *segment = data;
        }
        special.cr0 |= 1;
        cpu.set_sregs(&special).context("KVM_SET_SREGS")?;
        let mut regs = cpu.get_regs().context("KVM_GET_REGS")?;
        regs.rip = entry;
        regs.rbx = START_INFO.0;
        regs.rflags = 2;
        cpu.set_regs(&regs).context("KVM_SET_REGS")?;
        Ok(cpu)
    }
}

/// Run the guest until its last command.
fn run(mut cpu: VcpuFd, commands: &Commands) -> Result<()> {
    let mut line = Vec::new();
    loop {
        match cpu.run() {
            Ok(VcpuExit::IoOut(CONSOLE, bytes)) => {
                line.extend_from_slice(bytes);
                if line.ends_with(b"\n") {
                    io::stdout().write_all(&line).context("standard output")?;
                    io::stdout().flush().context("standard output")?;
                    line.clear();
                }
            }
            Ok(VcpuExit::IoIn(PENDING, bytes)) => bytes.fill(commands.pending().into()),
            Ok(VcpuExit::IoIn(COMMAND, bytes)) => match commands.pop() {
                Some(byte) => bytes.fill(byte),
                None => return Ok(()),
            },
            Ok(other) => bail!("the guest has ended: {other:?}"),
            Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => {}
            Err(e) => return Err(e).context("KVM_RUN"),
        }
    }
}

fn serve(machine: &Machine, command: &str) -> Result<String> {
    match command {
        "!dirty on" | "!dirty off" => {
            machine.log_dirty(command.ends_with("on"))?;
            Ok("ok !dirty".into())
        }
        "!memory" => {
            let region = machine.memory.iter().next().context("no memory")?;
            Ok(format!("ok !memory {}", region.as_ptr() as usize))
        }
        "!dirty get" => Ok(format!("ok !dirty {}", machine.count_dirty()?)),
        _ => Ok(format!("bad command {command}")),
    }
}

fn vmm() -> Result<()> {
    let options = options()?;
    let kvm = Kvm::new().context("/dev/kvm")?;
    let machine = Machine::new(&kvm, &options)?;
    let entry = machine.load(&format!("mib={} {}", options.mib, options.append))?;
    let cpu = machine.create_cpu(&kvm, entry)?;
    let commands = Arc::new(Commands::default());
    let vcpu = thread::spawn({
        let commands = commands.clone();
        // The monitor ends with its guest, even if it waits for a command.
        move || match run(cpu, &commands) {
            Ok(()) => {}
            Err(e) => {
                println!("bad guest: {e:#}");
                std::process::exit(1);
            }
        }
    });
    for line in io::stdin().lock().lines() {
        let line = line.context("standard input")?;
        if line.starts_with('!') {
            println!("{}", serve(&machine, &line)?);
        } else {
            commands.push(&line);
        }
    }
    commands.end();
    let _ = vcpu.join();
    Ok(())
}

fn main() -> ExitCode {
    match vmm() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("rksm-vmm: {e:#}");
            ExitCode::FAILURE
        }
    }
}
