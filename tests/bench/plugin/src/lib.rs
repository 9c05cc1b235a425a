// SPDX-License-Identifier: GPL-2.0
//! A QEMU plugin that watches the engine's thread from outside the guest. So watching costs the guest
//! nothing, and every figure is exact:
//!
//! - the longest that the thread holds a page-table lock and an mmap_lock,
//!   in instructions of its own (interrupts and other tasks not counted);
//! - with `profile=on`, how often it executes each translation block.
//!
//! The guest divides time into phases by an instruction that does nothing: `nopl` with an otherwise unused
//! displacement, with the phase in RDI. Phase 0 is not recorded.
//!
//! Arguments: `out` (the directory for the figures), `syms` (lines of /proc/kallsyms of the same kernel
//! without KASLR), and the offsets `comm`, `mm` (in task_struct) and `mmap_lock` (in mm_struct).

mod qemu;

use std::collections::HashMap;
use std::ffi::{c_char, c_int, c_uint, c_void};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};

use qemu::{Block, Counter, Register};
use rksm_bench::holds::Holds;

#[no_mangle]
pub static qemu_plugin_version: c_int = 4;

/// `nopl 0x726b736d(%rax)`.
const PHASE: [u8; 7] = [0x0f, 0x1f, 0x80, 0x6d, 0x73, 0x6b, 0x72];
/// `mov %rsp, disp32(%rdi)` and `mov disp32(%rsi), %rsp`: the exchange of stacks in __switch_to_asm.
const SAVE_STACK: [u8; 3] = [0x48, 0x89, 0xa7];
const LOAD_STACK: [u8; 3] = [0x48, 0x8b, 0xa6];
/// `iretq`.
const IRET: [u8; 2] = [0x48, 0xcf];
const KERNEL: u64 = 1 << 63;
const ENGINES: [&[u8]; 2] = [b"ksmd\0", b"rksmd\0"];

/// The effect of a watched function.
#[derive(Clone, Copy, PartialEq)]
enum Hook {
    Lock,
    Unlock,
    Interrupt,
}

struct Config {
    out: String,
    profile: bool,
    comm: u64,
    mm: u64,
    mmap_lock: u64,
    hooks: HashMap<u64, Hook>,
    vmemmap_base: u64,
}

/// The registers that the plugin reads.
#[derive(Clone, Copy)]
struct Registers {
    rdi: Register,
    rsi: Register,
    rsp: Register,
}

/// A translation block in the profile.
struct Counted {
    addr: u64,
    insns: u64,
    execs: AtomicU64,
}

struct State {
    regs: Option<Registers>,
    holds: Holds,
    phase: u64,
    blocks: Vec<&'static Counted>,
    out: BufWriter<File>,
}

static CONFIG: OnceLock<Config> = OnceLock::new();
static STATE: Mutex<Option<State>> = Mutex::new(None);
/// The number of executed instructions, and whether the engine's thread runs.
static CLOCK: OnceLock<Counter> = OnceLock::new();
static ACTIVE: OnceLock<Counter> = OnceLock::new();

/// Run `f` with the state of the callbacks. Do nothing before start-up is complete.
fn with(f: impl FnOnce(&Config, &mut State, Counter, Counter)) {
    let (Some(config), Some(&clock), Some(&active)) = (CONFIG.get(), CLOCK.get(), ACTIVE.get())
    else {
        return;
    };
    let Ok(mut state) = STATE.lock() else { return };
    if let Some(state) = state.as_mut() {
        f(config, state, clock, active);
    }
}

impl Config {
    fn new(args: &[(String, String)]) -> Result<Self, String> {
        let value = |name: &str| {
            args.iter()
                .find(|(n, _)| n == name)
                .map(|(_, v)| v.clone())
                .ok_or(format!("no {name}="))
        };
        let offset = |name: &str| {
            let text = value(name)?;
            let digits = text.strip_prefix("0x").unwrap_or(&text);
            u64::from_str_radix(digits, 16).map_err(|e| format!("{name}={text}: {e}"))
        };
        let syms = value("syms")?;
        let text = std::fs::read_to_string(&syms).map_err(|e| format!("{syms}: {e}"))?;
        let mut hooks = HashMap::new();
        let mut vmemmap_base = 0;
        for line in text.lines() {
            let mut words = line.split_whitespace();
            let (Some(addr), _, Some(name)) = (words.next(), words.next(), words.next()) else {
                continue;
            };
            let addr = u64::from_str_radix(addr, 16).map_err(|e| format!("{line}: {e}"))?;
            match hook(name) {
                Some(hook) => drop(hooks.insert(addr, hook)),
                None if name == "vmemmap_base" => vmemmap_base = addr,
                None => {}
            }
        }
        if vmemmap_base == 0 || !hooks.values().any(|&h| h == Hook::Lock) {
            return Err(format!("{syms} lacks what is needed"));
        }
        Ok(Self {
            out: value("out")?,
            profile: value("profile").is_ok_and(|v| v == "on"),
            comm: offset("comm")?,
            mm: offset("mm")?,
            mmap_lock: offset("mmap_lock")?,
            hooks,
            vmemmap_base,
        })
    }
}

/// Return the watched function `name`. A trylock counts from the attempt: if it fails, no unlock follows, and
/// the next attempt starts again.
fn hook(name: &str) -> Option<Hook> {
    match name {
        "_raw_spin_lock"
        | "_raw_spin_trylock"
        | "down_read"
        | "down_read_trylock"
        | "down_read_killable"
        | "down_write"
        | "down_write_trylock"
        | "down_write_killable" => Some(Hook::Lock),
        "_raw_spin_unlock" | "up_read" | "up_write" => Some(Hook::Unlock),
        "asm_common_interrupt" => Some(Hook::Interrupt),
        _ if name.starts_with("asm_sysvec_") => Some(Hook::Interrupt),
        _ => None,
    }
}

/// # Safety
///
/// Only QEMU may call this, with valid arguments.
#[no_mangle]
pub unsafe extern "C" fn qemu_plugin_install(
    id: qemu::Id,
    info: *const qemu::Info,
    argc: c_int,
    argv: *const *const c_char,
) -> c_int {
    // SAFETY: QEMU passes a valid description, and its own arguments.
    let (cpus, args) = unsafe { ((*info).cpus, qemu::arguments(argc, argv)) };
    match install(id, cpus, &args) {
        Ok(()) => 0,
        Err(e) => {
            eprintln!("rksm-bench-plugin: {e}");
            1
        }
    }
}

fn install(id: qemu::Id, cpus: c_int, args: &[(String, String)]) -> Result<(), String> {
    if cpus != 1 {
        return Err("works with one CPU only".into());
    }
    let config = Config::new(args)?;
    let out = File::create(&config.out).map_err(|e| format!("{}: {e}", config.out))?;
    let state = State {
        regs: None,
        holds: Holds::default(),
        phase: 0,
        blocks: Vec::new(),
        out: BufWriter::new(out),
    };
    *STATE.lock().map_err(|e| e.to_string())? = Some(state);
    let _ = CONFIG.set(config);
    let _ = CLOCK.set(Counter::new());
    let _ = ACTIVE.set(Counter::new());
    qemu::register(id, cpu_started, translated, ending);
    Ok(())
}

extern "C" fn cpu_started(_id: qemu::Id, _cpu: c_uint) {
    with(|_, state, _, _| {
        let (rdi, rsi, rsp) = (
            Register::find("rdi"),
            Register::find("rsi"),
            Register::find("rsp"),
        );
        if let (Some(rdi), Some(rsi), Some(rsp)) = (rdi, rsi, rsp) {
            state.regs = Some(Registers { rdi, rsi, rsp });
        } else {
            eprintln!("rksm-bench-plugin: the CPU has no registers of the expected names");
        }
    });
}

extern "C" fn translated(_id: qemu::Id, tb: *mut qemu::Tb) {
    let block = Block::new(tb);
    let addr = block.addr();
    with(|config, state, clock, active| {
        if addr < KERNEL {
            for index in 0..block.len() {
                if block.bytes(index).starts_with(&PHASE) {
                    block.on_insn(index, phase_began);
                }
            }
            return;
        }
        if config.hooks.contains_key(&addr) {
            block.on_exec_if(active, hook_reached, addr);
        }
        if config.profile {
            let counted: &'static Counted = Box::leak(Box::new(Counted {
                addr,
                insns: block.len() as u64,
                execs: AtomicU64::new(0),
            }));
            state.blocks.push(counted);
            block.on_exec_if(active, counted_ran, counted as *const Counted as u64);
        }
        block.add_on_exec(clock, block.len() as u64);
        for index in 0..block.len() {
            let bytes = block.bytes(index);
            if bytes.starts_with(&IRET) {
                block.on_insn(index, interrupt_over);
            } else if bytes.starts_with(&SAVE_STACK) && index + 1 < block.len() {
                let next = block.bytes(index + 1);
                if next.starts_with(&LOAD_STACK) && next[3..7] == bytes[3..7] {
                    block.on_insn(index, switched);
                }
            }
        }
    });
}

/// Handle the switch to another task.
extern "C" fn switched(_cpu: c_uint, _data: *mut c_void) {
    with(|config, state, clock, active| {
        let Some(next) = state.regs.and_then(|r| r.rsi.read()) else {
            return;
        };
        if let Some(mm) = qemu::memory_u64(next + config.mm).filter(|&mm| mm != 0) {
            state.holds.know_mmap_lock(mm + config.mmap_lock);
        }
        let comm = qemu::memory(next + config.comm, 16).unwrap_or_default();
        let engine = ENGINES.iter().any(|name| comm.starts_with(name));
        state.holds.run(clock.get(), engine);
        active.set(u64::from(engine));
    });
}

extern "C" fn hook_reached(_cpu: c_uint, data: *mut c_void) {
    with(|config, state, clock, _| {
        let (Some(hook), Some(regs)) = (config.hooks.get(&(data as u64)), state.regs) else {
            return;
        };
        let now = clock.get();
        if *hook == Hook::Interrupt {
            state.holds.interrupt(now);
            return;
        }
        let Some(lock) = regs.rdi.read() else { return };
        if *hook == Hook::Unlock {
            state.holds.unlock(now, lock);
            return;
        }
        let vmemmap = qemu::memory_u64(config.vmemmap_base).unwrap_or(u64::MAX);
        let caller = regs.rsp.read().and_then(qemu::memory_u64).unwrap_or(0);
        state.holds.lock(now, lock, vmemmap, caller);
    });
}

extern "C" fn interrupt_over(_cpu: c_uint, _data: *mut c_void) {
    with(|_, state, clock, active| {
        if active.get() == 1 {
            state.holds.interrupt_over(clock.get());
        }
    });
}

extern "C" fn counted_ran(_cpu: c_uint, data: *mut c_void) {
    // SAFETY: `data` is the leaked reference that was registered with the callback.
    let counted = unsafe { &*(data as *const Counted) };
    counted.execs.fetch_add(1, Ordering::Relaxed);
}

extern "C" fn phase_began(_cpu: c_uint, _data: *mut c_void) {
    with(|_, state, _, _| {
        let Some(phase) = state.regs.and_then(|r| r.rdi.read()) else {
            return;
        };
        if let Err(e) = state.finish_phase(phase) {
            eprintln!("rksm-bench-plugin: {e}");
        }
    });
}

extern "C" fn ending(_id: qemu::Id, _data: *mut c_void) {
    with(|_, state, _, _| {
        if let Err(e) = state.finish_phase(0) {
            eprintln!("rksm-bench-plugin: {e}");
        }
    });
}

impl State {
    /// Record the phase that ends, and begin `next`.
    fn finish_phase(&mut self, next: u64) -> std::io::Result<()> {
        let phase = std::mem::replace(&mut self.phase, next);
        let holds = self.holds.take();
        let mut blocks: HashMap<u64, (u64, u64)> = HashMap::new();
        for block in &self.blocks {
            let execs = block.execs.swap(0, Ordering::Relaxed);
            if execs > 0 {
                // A block may have been translated more than once, with different lengths.
                let entry = blocks.entry(block.addr).or_default();
                entry.0 += execs;
                entry.1 += execs * block.insns;
            }
        }
        if phase == 0 {
            return Ok(());
        }
        for (kind, hold) in holds {
            writeln!(
                self.out,
                "hold {phase} {kind} {} {} {:x}",
                hold.count, hold.max, hold.caller
            )?;
        }
        for (addr, (execs, insns)) in blocks {
            writeln!(self.out, "block {phase} {addr:x} {execs} {insns}")?;
        }
        self.out.flush()
    }
}
