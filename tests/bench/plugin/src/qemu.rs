// SPDX-License-Identifier: GPL-2.0
//! The part of QEMU's plugin interface (version 4) that the plugin needs, with safe wrappers. All callbacks
//! run on the only virtual CPU's thread.

use std::ffi::{c_char, c_int, c_uint, c_void, CStr};

pub type Id = u64;

#[repr(C)]
pub struct Info {
    pub target_name: *const c_char,
    pub min_version: c_int,
    pub version: c_int,
    pub system_emulation: bool,
    pub cpus: c_int,
    pub max_cpus: c_int,
}

#[repr(C)]
struct GArray {
    data: *mut u8,
    len: c_uint,
}

#[repr(C)]
struct RegDescriptor {
    handle: *mut c_void,
    name: *const c_char,
    feature: *const c_char,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct U64 {
    score: *mut c_void,
    offset: usize,
}

#[repr(C)]
pub struct Tb {
    _opaque: [u8; 0],
}

#[repr(C)]
pub struct Insn {
    _opaque: [u8; 0],
}

pub type Udata = extern "C" fn(c_uint, *mut c_void);
type VcpuInit = extern "C" fn(Id, c_uint);
type Trans = extern "C" fn(Id, *mut Tb);
type AtExit = extern "C" fn(Id, *mut c_void);

const COND_EQ: c_int = 2;
const CB_R_REGS: c_int = 1;
const ADD_U64: c_int = 0;

extern "C" {
    fn qemu_plugin_register_vcpu_init_cb(id: Id, cb: VcpuInit);
    fn qemu_plugin_register_vcpu_tb_trans_cb(id: Id, cb: Trans);
    fn qemu_plugin_register_atexit_cb(id: Id, cb: AtExit, data: *mut c_void);
    fn qemu_plugin_register_vcpu_tb_exec_cond_cb(
        tb: *mut Tb,
        cb: Udata,
        flags: c_int,
        cond: c_int,
        entry: U64,
        imm: u64,
        data: *mut c_void,
    );
    fn qemu_plugin_register_vcpu_tb_exec_inline_per_vcpu(
        tb: *mut Tb,
        op: c_int,
        entry: U64,
        imm: u64,
    );
    fn qemu_plugin_register_vcpu_insn_exec_cb(
        insn: *mut Insn,
        cb: Udata,
        flags: c_int,
        data: *mut c_void,
    );
    fn qemu_plugin_tb_n_insns(tb: *const Tb) -> usize;
    fn qemu_plugin_tb_vaddr(tb: *const Tb) -> u64;
    fn qemu_plugin_tb_get_insn(tb: *const Tb, index: usize) -> *mut Insn;
    fn qemu_plugin_insn_data(insn: *const Insn, to: *mut c_void, len: usize) -> usize;
    fn qemu_plugin_scoreboard_new(size: usize) -> *mut c_void;
    fn qemu_plugin_u64_get(entry: U64, cpu: c_uint) -> u64;
    fn qemu_plugin_u64_set(entry: U64, cpu: c_uint, value: u64);
    fn qemu_plugin_get_registers() -> *mut GArray;
    fn qemu_plugin_read_register(handle: *mut c_void, to: *mut GArray) -> c_int;
    fn qemu_plugin_read_memory_vaddr(addr: u64, to: *mut GArray, len: usize) -> bool;
    // Functions of GLib, with which QEMU is linked.
    fn g_byte_array_new() -> *mut GArray;
    fn g_byte_array_set_size(array: *mut GArray, len: c_uint) -> *mut GArray;
    fn g_array_free(array: *mut GArray, free_segment: c_int) -> *mut c_char;
}

/// A number that translated code can add to and compare with.
#[derive(Clone, Copy)]
pub struct Counter(U64);

// SAFETY: The scoreboard behind it lives forever, and any thread of QEMU may call the accessors.
unsafe impl Send for Counter {}
// SAFETY: Any thread of QEMU may call the accessors, also at the same time.
unsafe impl Sync for Counter {}

impl Counter {
    pub fn new() -> Self {
        // SAFETY: The function takes a size only, and the scoreboard is never freed.
        let score = unsafe { qemu_plugin_scoreboard_new(8) };
        Self(U64 { score, offset: 0 })
    }

    pub fn get(self) -> u64 {
        // SAFETY: `self` is a scoreboard of one u64, and there is a CPU 0.
        unsafe { qemu_plugin_u64_get(self.0, 0) }
    }

    pub fn set(self, value: u64) {
        // SAFETY: `self` is a scoreboard of one u64, and there is a CPU 0.
        unsafe { qemu_plugin_u64_set(self.0, 0, value) }
    }
}

/// A translation block that is being translated.
pub struct Block(*mut Tb);

impl Block {
    /// `tb` must be what QEMU passed to the callback that is running.
    pub fn new(tb: *mut Tb) -> Self {
        Self(tb)
    }

    pub fn addr(&self) -> u64 {
        // SAFETY: The block is valid during the callback (see `new`).
        unsafe { qemu_plugin_tb_vaddr(self.0) }
    }

    pub fn len(&self) -> usize {
        // SAFETY: The block is valid during the callback (see `new`).
        unsafe { qemu_plugin_tb_n_insns(self.0) }
    }

    /// The first bytes of instruction `index`, up to eight, the rest zero.
    pub fn bytes(&self, index: usize) -> [u8; 8] {
        let mut bytes = [0; 8];
        assert!(index < self.len());
        // SAFETY: The index is in range, and `bytes` has room for the requested number.
        unsafe {
            let insn = qemu_plugin_tb_get_insn(self.0, index);
            qemu_plugin_insn_data(insn, bytes.as_mut_ptr().cast(), bytes.len());
        }
        bytes
    }

    /// Call `cb` whenever the block begins while `flag` is 1.
    pub fn on_exec_if(&self, flag: Counter, cb: Udata, data: u64) {
        // SAFETY: `cb` is a function, the scoreboard lives forever, and `data` is a number or a leaked
        // reference to `cb`.
        unsafe {
            qemu_plugin_register_vcpu_tb_exec_cond_cb(
                self.0,
                cb,
                CB_R_REGS,
                COND_EQ,
                flag.0,
                1,
                data as *mut c_void,
            );
        }
    }

    /// Add `n` to `counter` whenever the block begins.
    pub fn add_on_exec(&self, counter: Counter, n: u64) {
        // SAFETY: The scoreboard lives forever.
        unsafe { qemu_plugin_register_vcpu_tb_exec_inline_per_vcpu(self.0, ADD_U64, counter.0, n) }
    }

    /// Call `cb` whenever instruction `index` begins.
    pub fn on_insn(&self, index: usize, cb: Udata) {
        assert!(index < self.len());
        // SAFETY: The index is in range, and `cb` ignores its data.
        unsafe {
            let insn = qemu_plugin_tb_get_insn(self.0, index);
            qemu_plugin_register_vcpu_insn_exec_cb(insn, cb, CB_R_REGS, std::ptr::null_mut());
        }
    }
}

/// A byte array of GLib, for QEMU's results.
struct Bytes(*mut GArray);

impl Bytes {
    fn new() -> Self {
        // SAFETY: The function has no preconditions.
        Self(unsafe { g_byte_array_new() })
    }

    fn to_vec(&self) -> Vec<u8> {
        // SAFETY: GLib keeps `len` bytes at `data`; null only when empty.
        unsafe {
            let array = &*self.0;
            if array.len == 0 {
                return Vec::new();
            }
            std::slice::from_raw_parts(array.data, array.len as usize).to_vec()
        }
    }
}

impl Drop for Bytes {
    fn drop(&mut self) {
        // SAFETY: The array is ours, and not used any more. A byte array is an array.
        unsafe { g_array_free(self.0, 1) };
    }
}

fn number(bytes: &[u8]) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(..8)?.try_into().ok()?))
}

/// A register of the guest.
#[derive(Clone, Copy)]
pub struct Register(*mut c_void);

// SAFETY: QEMU never invalidates the handle, and it is used on its CPU thread.
unsafe impl Send for Register {}

impl Register {
    /// Find the register `name`. Only allowed in the callback of a CPU's start.
    pub fn find(name: &str) -> Option<Self> {
        // SAFETY: QEMU returns an array of descriptors with C strings that
        // live as long as the CPU.
        unsafe {
            let array = qemu_plugin_get_registers();
            let list = std::slice::from_raw_parts(
                (*array).data.cast::<RegDescriptor>(),
                (*array).len as usize,
            );
            let found = list
                .iter()
                .find(|r| CStr::from_ptr(r.name).to_bytes() == name.as_bytes())
                .map(|r| Self(r.handle));
            g_array_free(array, 1);
            found
        }
    }

    /// Read the register. Only allowed in the callbacks registered above, which request access to registers.
    pub fn read(self) -> Option<u64> {
        let bytes = Bytes::new();
        // SAFETY: The handle is QEMU's and the array is ours.
        let n = unsafe { qemu_plugin_read_register(self.0, bytes.0) };
        if n < 8 {
            return None;
        }
        number(&bytes.to_vec())
    }
}

/// Read the guest's memory at `addr`, as the CPU sees it.
pub fn memory(addr: u64, len: usize) -> Option<Vec<u8>> {
    let bytes = Bytes::new();
    // SAFETY: The array is ours, and large enough.
    let ok = unsafe {
        g_byte_array_set_size(bytes.0, len as c_uint);
        qemu_plugin_read_memory_vaddr(addr, bytes.0, len)
    };
    ok.then(|| bytes.to_vec())
}

pub fn memory_u64(addr: u64) -> Option<u64> {
    number(&memory(addr, 8)?)
}

/// Register the plugin's callbacks.
pub fn register(id: Id, init: VcpuInit, trans: Trans, exit: AtExit) {
    // SAFETY: `id` is what QEMU gave us, and all three are functions.
    unsafe {
        qemu_plugin_register_vcpu_init_cb(id, init);
        qemu_plugin_register_vcpu_tb_trans_cb(id, trans);
        qemu_plugin_register_atexit_cb(id, exit, std::ptr::null_mut());
    }
}

/// The plugin's arguments, as `name=value`.
///
/// # Safety
///
/// `argv` must be `argc` C strings.
pub unsafe fn arguments(argc: c_int, argv: *const *const c_char) -> Vec<(String, String)> {
    (0..argc as usize)
        .filter_map(|i| {
            // SAFETY: The index is in range, and the entry is a C string by the contract.
            let arg = unsafe { CStr::from_ptr(*argv.add(i)) };
            let (name, value) = arg.to_str().ok()?.split_once('=')?;
            Some((name.to_string(), value.to_string()))
        })
        .collect()
}
