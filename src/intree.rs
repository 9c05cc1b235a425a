// SPDX-License-Identifier: GPL-2.0

//! Living beside in-tree KSM: its registrations are ours too, and its engine stays off while we are
//! loaded, because each engine would take the other's stable nodes for its own.

use crate::{
    mm::ffi,
    sys::{patch, sysfs, tracepoint::find_tracepoint},
};
use core::ptr::NonNull;
use kernel::{
    bindings,
    error::to_result,
    ffi::{c_char, c_uint, c_void},
    mm::Mm,
    prelude::*,
    str::CStr,
    sync::{
        aref::ARef,
        atomic::{Atomic, Relaxed},
        Arc,
    },
    time::{delay::fsleep, Delta},
};

/// Learns which address spaces come and go.
///
/// Called with preemption disabled or a spinlock held: must not sleep.
pub(crate) trait Listener: Send + Sync {
    /// `mm` has mergeable memory from now on. It may still be under construction by fork.
    fn enter(&self, mm: ARef<Mm>);

    /// `mm` has nothing mergeable any more: it is about to be torn down, or is that of a new program that
    /// failed to start.
    fn exit(&self, mm: &Mm);
}

// helpers/intree.c walks the in-tree registrations as a list of their first member.
const _: () = assert!(crate::abi::layout::KSM_MM_SLOT_SLOT == 0);

/// Calls `enter` for every address space that in-tree KSM has registered. It must not sleep.
///
/// One that `enter` was called for goes through the `ksm_exit` tracepoint later, as in-tree KSM takes
/// it off its list first, under the lock that is held here.
pub(crate) fn for_each_registered<F: Fn(&Mm)>(enter: F) {
    /// # Safety
    ///
    /// `data` is an `F`, `mm` is kept by the in-tree registration.
    unsafe extern "C" fn call<F: Fn(&Mm)>(data: *mut c_void, mm: *mut bindings::mm_struct) {
        // SAFETY: the caller's promise.
        let (enter, mm) = unsafe { (&*data.cast::<F>(), Mm::from_raw(mm)) };
        enter(mm);
    }
    // SAFETY: `call` takes what it is given; `enter` lives until the call returns.
    unsafe {
        ffi::rksm_intree_for_each_mm(Some(call::<F>), (&raw const enter).cast_mut().cast());
    }
}

/// One probe on one tracepoint.
struct Probe {
    tracepoint: NonNull<bindings::tracepoint>,
    function: *mut c_void,
}

/// The probes on the `ksm_enter` and `ksm_exit` tracepoints. Dropping it removes them and waits until
/// none is running.
pub(crate) struct Probes<T: Listener + 'static> {
    enter: Option<Probe>,
    exit: Option<Probe>,
    listener: Arc<T>,
}

// SAFETY: tracepoints are never freed (these are built in), and registering is locked by the kernel.
unsafe impl<T: Listener> Send for Probes<T> {}
// SAFETY: nothing can be done with a shared reference.
unsafe impl<T: Listener> Sync for Probes<T> {}

impl<T: Listener + 'static> Probes<T> {
    /// Starts listening.
    pub(crate) fn register(listener: Arc<T>) -> Result<Self> {
        let mut this = Self {
            enter: None,
            exit: None,
            listener,
        };
        // `exit` first: whoever is entered must be able to leave. A failure drops `this`.
        this.exit = Some(this.attach(c"ksm_exit", on_exit::<T> as *mut c_void)?);
        this.enter = Some(this.attach(c"ksm_enter", on_enter::<T> as *mut c_void)?);
        Ok(this)
    }

    fn data(&self) -> *mut c_void {
        (&raw const *self.listener).cast_mut().cast()
    }

    fn attach(&self, name: &CStr, function: *mut c_void) -> Result<Probe> {
        let tracepoint = find_tracepoint(name).ok_or(ENOENT).inspect_err(|_| {
            pr_err!("this kernel has no tracepoint {}\n", Text(name));
        })?;
        // SAFETY: `function` has the signature of the tracepoint (checked at load by BTF), and what
        // `data` points at outlives the registration.
        to_result(unsafe {
            bindings::tracepoint_probe_register(tracepoint.as_ptr(), function, self.data())
        })?;
        Ok(Probe {
            tracepoint,
            function,
        })
    }

    fn detach(&self, probe: Option<Probe>) {
        let Some(probe) = probe else {
            return;
        };
        // SAFETY: registered with the same arguments.
        let ret = unsafe {
            bindings::tracepoint_probe_unregister(
                probe.tracepoint.as_ptr(),
                probe.function,
                self.data(),
            )
        };
        if ret != 0 {
            pr_err!("a probe could not be removed: {ret}\n");
        }
    }
}

impl<T: Listener + 'static> Drop for Probes<T> {
    fn drop(&mut self) {
        let (enter, exit) = (self.enter.take(), self.exit.take());
        self.detach(enter);
        self.detach(exit);
        // SAFETY: called from process context with no locks held.
        unsafe { ffi::rksm_tracepoint_synchronize_unregister() };
    }
}

/// # Safety
///
/// `data` is the `T` the probe was registered with; `mm` is a valid mm.
unsafe extern "C" fn on_enter<T: Listener>(data: *mut c_void, mm: *mut c_void) {
    // SAFETY: the caller's promise.
    let (listener, mm) = unsafe { (&*data.cast::<T>(), Mm::from_raw(mm.cast())) };
    listener.enter(mm.into());
}

/// # Safety
///
/// As for [`on_enter`].
unsafe extern "C" fn on_exit<T: Listener>(data: *mut c_void, mm: *mut c_void) {
    // SAFETY: the caller's promise.
    let (listener, mm) = unsafe { (&*data.cast::<T>(), Mm::from_raw(mm.cast())) };
    listener.exit(mm);
}

/// A C string for a log line.
struct Text<'a>(&'a CStr);

impl kernel::fmt::Display for Text<'_> {
    fn fmt(&self, f: &mut kernel::fmt::Formatter<'_>) -> kernel::fmt::Result {
        f.write_str(self.0.to_str().unwrap_or("?"))
    }
}

/// The lock that serialises the in-tree engine.
struct EngineLock;

impl EngineLock {
    fn lock() -> Self {
        // SAFETY: called from process context without other locks of KSM.
        unsafe { ffi::rksm_intree_lock() };
        Self
    }
}

impl Drop for EngineLock {
    fn drop(&mut self) {
        // SAFETY: locked in `lock`.
        unsafe { ffi::rksm_intree_unlock() };
    }
}

const RUN_MERGE: usize = 1;

/// Whether the in-tree engine merges or holds merged pages, which makes `EBUSY`.
fn check_idle() -> Result {
    let _lock = EngineLock::lock();
    // SAFETY: the lock is held.
    let (run, shared, nodes) = unsafe {
        (
            ffi::rksm_intree_run(),
            ffi::rksm_intree_pages_shared(),
            ffi::rksm_intree_has_nodes(),
        )
    };
    if run & RUN_MERGE != 0 {
        pr_err!("in-tree KSM is merging: write 2 to /sys/kernel/mm/ksm/run first\n");
        return Err(EBUSY);
    }
    if shared != 0 || nodes {
        pr_err!("in-tree KSM holds merged pages: write 2 to /sys/kernel/mm/ksm/run first\n");
        return Err(EBUSY);
    }
    Ok(())
}

/// The attribute behind `/sys/kernel/mm/ksm/run`.
fn run_attribute() -> Result<NonNull<bindings::kobj_attribute>> {
    sysfs::find_mm_attribute(GROUP, c"run")
        .ok_or(ENOENT)
        .inspect_err(|_| {
            pr_err!("/sys/kernel/mm/ksm/run is not there\n");
        })
}

/// Checks that what keeps the in-tree engine off can be written. What cannot is named in the log.
///
/// Fails with `ENOEXEC`, and `ENOENT` without in-tree KSM.
pub(crate) fn check_writable() -> Result {
    let attr = run_attribute()?;
    // SAFETY: The attribute is static data of the kernel, and nobody but `KsmdDisabled` changes its handlers.
    let handler = unsafe { patch::is_writable(store_word(attr)) };
    let run = {
        let _lock = EngineLock::lock();
        // SAFETY: The variable is static data of the kernel, and changed under the lock only.
        unsafe { patch::is_writable(ffi::rksm_intree_run_ptr()) }
    };
    for (what, writable) in [
        ("the handler of /sys/kernel/mm/ksm/run", handler),
        ("ksm_run", run),
    ] {
        if !writable {
            pr_err!("this kernel keeps {what} read-only, so in-tree KSM could not be kept off\n");
        }
    }
    (handler && run).then_some(()).ok_or(ENOEXEC)
}

/// Whether the in-tree engine's `run` is 0.
fn is_stopped() -> bool {
    let _lock = EngineLock::lock();
    // SAFETY: the lock is held.
    unsafe { ffi::rksm_intree_run() == 0 }
}

/// Whether the in-tree engine, though idle, remembers pages.
fn has_leftovers() -> bool {
    let _lock = EngineLock::lock();
    // SAFETY: the lock is held.
    unsafe { ffi::rksm_intree_rmap_items() != 0 || ffi::rksm_intree_has_nodes() }
}

/// While this lives, faulting in a merged page from the swap cache makes a copy, as it does while
/// in-tree KSM unmerges everything. (`ksm_might_need_to_copy()` looks at the in-tree `run`, which reads
/// as 2 meanwhile. The in-tree engine itself acts on that only when it is written.)
pub(crate) struct UnmergeMode(());

impl UnmergeMode {
    /// Starts making copies. Takes the lock of the in-tree engine for a moment.
    pub(crate) fn new() -> Self {
        let _lock = EngineLock::lock();
        // SAFETY: the lock is held.
        unsafe { ffi::rksm_intree_set_unmerge(true) };
        Self(())
    }
}

impl Drop for UnmergeMode {
    fn drop(&mut self) {
        let _lock = EngineLock::lock();
        // SAFETY: the lock is held.
        unsafe { ffi::rksm_intree_set_unmerge(false) };
    }
}

type StoreFn = unsafe extern "C" fn(
    *mut bindings::kobject,
    *mut bindings::kobj_attribute,
    *const c_char,
    usize,
) -> isize;

/// Keeps the in-tree engine from being started.
///
/// While this lives, `/sys/kernel/mm/ksm/run` takes nothing but 0. The file is taken out of the
/// directory while its handler is exchanged: that waits for every write in progress, so no write gets
/// past the check, and none is left in this module's code when it is unloaded. (It comes back with the
/// owner, mode and label that it had after boot; who has it open reads `ENODEV`.)
///
/// # Invariants
///
/// `attr` is the in-tree attribute; its store function is ours, and `store` what it was.
pub(crate) struct KsmdDisabled {
    attr: NonNull<bindings::kobj_attribute>,
    store: StoreFn,
}

// SAFETY: the attribute is static data of the kernel, and nothing of it is used until the drop.
unsafe impl Send for KsmdDisabled {}
// SAFETY: as above.
unsafe impl Sync for KsmdDisabled {}

const GROUP: &CStr = c"ksm";

/// Where the store function of an attribute is, as a word.
fn store_word(attr: NonNull<bindings::kobj_attribute>) -> *mut usize {
    // A function pointer is a word.
    const _: () = assert!(size_of::<Option<StoreFn>>() == size_of::<usize>());
    // SAFETY: The pointer is only computed, within the attribute.
    unsafe { (&raw mut (*attr.as_ptr()).__bindgen_anon_2).cast() }
}

/// How often, and after how long each time, to try again to put the file back.
const PUT_BACK_ATTEMPTS: u32 = 100;
const PUT_BACK_MS: i64 = 10;

impl KsmdDisabled {
    /// Blocks the in-tree engine, or fails with `EBUSY` and a line in the log if it is in use.
    pub(crate) fn new() -> Result<Self> {
        check_idle()?;
        let attr = run_attribute()?;
        // SAFETY: The attribute is static data of the kernel, and nobody changes its handlers.
        let store = unsafe { (*attr.as_ptr()).__bindgen_anon_2.store }.ok_or(ENOENT)?;
        // INVARIANT: exchanged here, or the whole fails. From here on nobody else can write, and `drop` puts
        // the old handler back.
        let this = Self { attr, store };
        this.exchange(refuse_to_run)?;
        check_idle()?;
        // A `run` of 2 would make copies of merged pages at every swap-in. What the in-tree engine
        // remembers from an earlier run would be accounted to processes for ever: have it forget.
        let inputs: &[&CStr] = match (is_stopped(), !has_leftovers()) {
            (true, true) => &[],
            (false, true) => &[c"0"],
            (_, false) => &[c"0", c"2", c"0"],
        };
        for input in inputs {
            // SAFETY: this is what a write to the file does.
            let ret = unsafe {
                store(
                    sysfs::mm_kobj(),
                    attr.as_ptr(),
                    input.as_char_ptr(),
                    input.count_bytes(),
                )
            };
            if ret < 0 {
                pr_err!("in-tree KSM could not be emptied: {ret}\n");
                return Err(EBUSY);
            }
        }
        Ok(this)
    }

    fn exchange(&self, store: StoreFn) -> Result {
        let attr = self.attr.as_ptr();
        // SAFETY: The attribute is in the directory, and nobody else takes it out.
        unsafe {
            let file = &raw const (*attr).attr;
            bindings::sysfs_remove_file_from_group(sysfs::mm_kobj(), file, GROUP.as_char_ptr());
        }
        // SAFETY: With the file out of the directory nobody uses its handlers.
        let written = unsafe { patch::write(store_word(self.attr), store as usize) };
        if written.is_err() {
            // SAFETY: The attribute is static data of the kernel.
            let there = unsafe { store_word(self.attr).read() };
            if there != self.store as usize {
                // The handler would be called after this module is gone. Better no file.
                pr_err!("/sys/kernel/mm/ksm/run became read-only and is taken away\n");
                return written;
            }
        }
        let mut result = self.put_back();
        // Without memory for it the file would be gone for good: wait for some.
        for _ in 0..PUT_BACK_ATTEMPTS {
            if result != Err(ENOMEM) {
                break;
            }
            fsleep(Delta::from_millis(PUT_BACK_MS));
            result = self.put_back();
        }
        result.inspect_err(|_| pr_err!("/sys/kernel/mm/ksm/run could not be put back\n"))?;
        written
    }

    /// Puts the file into the directory, out of which it was taken. May sleep.
    fn put_back(&self) -> Result {
        // SAFETY: the attribute is static data of the kernel and its file is not in the directory.
        to_result(unsafe {
            let file = &raw const (*self.attr.as_ptr()).attr;
            bindings::sysfs_add_file_to_group(sysfs::mm_kobj(), file, GROUP.as_char_ptr())
        })
    }
}

impl Drop for KsmdDisabled {
    fn drop(&mut self) {
        // Whatever happens, the handler is not ours afterwards.
        let _ = self.exchange(self.store);
    }
}

/// Stands in for the handler of `/sys/kernel/mm/ksm/run`.
///
/// # Safety
///
/// Called by sysfs: `buf` is a C string.
unsafe extern "C" fn refuse_to_run(
    _kobj: *mut bindings::kobject,
    _attr: *mut bindings::kobj_attribute,
    buf: *const c_char,
    count: usize,
) -> isize {
    let mut value: c_uint = 0;
    // SAFETY: the caller's promise.
    let ret = unsafe { bindings::kstrtouint(buf, 10, &raw mut value) };
    let refusal = match value {
        _ if ret != 0 => EINVAL,
        0 => return isize::try_from(count).unwrap_or(isize::MAX),
        1 | 2 => EBUSY,
        _ => EINVAL,
    };
    // Once: ksmtuned would say it every minute.
    static SAID: Atomic<bool> = Atomic::new(false);
    if refusal == EBUSY && !SAID.load(Relaxed) {
        SAID.store(true, Relaxed);
        pr_info!("in-tree KSM cannot run while rksm is loaded\n");
    }
    refusal.to_errno() as isize
}
