// SPDX-License-Identifier: GPL-2.0

//! Coexistence with in-tree KSM.
//!
//! Processes register with in-tree KSM, and the module takes over these registrations: those that exist at load
//! ([`for_each_registered`]), and later ones through tracepoints ([`Probes`]).
//!
//! The in-tree engine must not run while the module is loaded ([`KsmdDisabled`]), because each engine would take
//! the other's stable nodes for its own.

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

/// Receives notifications of address spaces that register and unregister.
///
/// The methods are called with preemption disabled or a spinlock held, and must not sleep.
pub(crate) trait Listener: Send + Sync {
    /// `mm` was registered. A fork may still be copying it.
    fn enter(&self, mm: ARef<Mm>);

    /// `mm` was unregistered: it is about to be torn down, or it belongs to a program that `execve()` failed to
    /// start.
    fn exit(&self, mm: &Mm);
}

// helpers/intree.c walks the list of in-tree registrations by their first member.
const _: () = assert!(crate::abi::layout::KSM_MM_SLOT_SLOT == 0);

/// Calls `enter` for each address space that is registered with in-tree KSM.
///
/// `enter` is called under `ksm_mmlist_lock`, and must not sleep. Each address space that it is called for passes
/// the `ksm_exit` tracepoint afterwards: in-tree KSM first takes it off the list, under the same lock.
pub(crate) fn for_each_registered<F: Fn(&Mm)>(enter: F) {
    /// # Safety
    ///
    /// `data` points at an `F`. `mm` is valid during the call, since the in-tree registration keeps it.
    unsafe extern "C" fn call<F: Fn(&Mm)>(data: *mut c_void, mm: *mut bindings::mm_struct) {
        // SAFETY: By the caller's promise `data` points at an `F`.
        let enter = unsafe { &*data.cast::<F>() };
        // SAFETY: By the caller's promise `mm` is valid during the call.
        let mm = unsafe { Mm::from_raw(mm) };
        enter(mm);
    }
    // SAFETY: `call` expects a pointer to an `F`, and `enter` lives until the function returns.
    unsafe {
        ffi::rksm_intree_each_mm(Some(call::<F>), (&raw const enter).cast_mut().cast());
    }
}

/// A registered probe of one tracepoint.
struct Probe {
    tracepoint: NonNull<bindings::tracepoint>,
    function: *mut c_void,
}

/// The probes of the `ksm_enter` and `ksm_exit` tracepoints. Dropping it removes them, and waits until neither
/// runs any more.
pub(crate) struct Probes<T: Listener + 'static> {
    enter: Option<Probe>,
    exit: Option<Probe>,
    listener: Arc<T>,
}

// SAFETY: Any task may unregister a probe. Both tracepoints are built in, so they are never freed.
unsafe impl<T: Listener> Send for Probes<T> {}
// SAFETY: A shared reference gives access to nothing.
unsafe impl<T: Listener> Sync for Probes<T> {}

impl<T: Listener + 'static> Probes<T> {
    /// Registers the probes, which call `listener`. May sleep.
    ///
    /// # Errors
    ///
    /// Returns `ENOENT`, and logs the name, if the kernel lacks one of the tracepoints. Returns `ENOMEM` if there
    /// is no memory.
    pub(crate) fn register(listener: Arc<T>) -> Result<Self> {
        let mut this = Self {
            enter: None,
            exit: None,
            listener,
        };
        // Register `exit` first: no address space may enter whose exit would be missed. A failure drops `this`.
        this.exit = Some(this.attach(c"ksm_exit", on_exit::<T> as *mut c_void)?);
        this.enter = Some(this.attach(c"ksm_enter", on_enter::<T> as *mut c_void)?);
        Ok(this)
    }

    /// Returns the argument that the probes are called with.
    fn data(&self) -> *mut c_void {
        (&raw const *self.listener).cast_mut().cast()
    }

    /// Registers one probe.
    fn attach(&self, name: &CStr, function: *mut c_void) -> Result<Probe> {
        let tracepoint = find_tracepoint(name).ok_or(ENOENT).inspect_err(|_| {
            pr_err!("this kernel has no tracepoint {}\n", Text(name));
        })?;
        // SAFETY: `function` has the prototype of the tracepoint, which the module checks at load. The listener
        // outlives the registration, as it is dropped after the probes are removed.
        to_result(unsafe {
            bindings::tracepoint_probe_register(tracepoint.as_ptr(), function, self.data())
        })?;
        Ok(Probe {
            tracepoint,
            function,
        })
    }

    /// Unregisters one probe. It may still run until the caller has waited for that.
    fn detach(&self, probe: Option<Probe>) {
        let Some(probe) = probe else {
            return;
        };
        // SAFETY: The probe was registered with the same arguments.
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
        // SAFETY: The module is being unloaded or fails to load: the task holds no lock and may sleep.
        unsafe { ffi::rksm_tracepoint_synchronize_unregister() };
    }
}

/// The probe of the `ksm_enter` tracepoint.
///
/// # Safety
///
/// `data` points at the `T` that the probe was registered with. `mm` points at a valid `mm_struct`.
unsafe extern "C" fn on_enter<T: Listener>(data: *mut c_void, mm: *mut c_void) {
    // SAFETY: By the caller's promise `data` points at a `T`.
    let listener = unsafe { &*data.cast::<T>() };
    // SAFETY: By the caller's promise `mm` is valid during the call.
    let mm = unsafe { Mm::from_raw(mm.cast()) };
    listener.enter(mm.into());
}

/// The probe of the `ksm_exit` tracepoint.
///
/// # Safety
///
/// `data` points at the `T` that the probe was registered with. `mm` points at a valid `mm_struct`.
unsafe extern "C" fn on_exit<T: Listener>(data: *mut c_void, mm: *mut c_void) {
    // SAFETY: By the caller's promise `data` points at a `T`.
    let listener = unsafe { &*data.cast::<T>() };
    // SAFETY: By the caller's promise `mm` is valid during the call.
    let mm = unsafe { Mm::from_raw(mm.cast()) };
    listener.exit(mm);
}

/// Formats a C string for the log.
struct Text<'a>(&'a CStr);

impl kernel::fmt::Display for Text<'_> {
    fn fmt(&self, f: &mut kernel::fmt::Formatter<'_>) -> kernel::fmt::Result {
        f.write_str(self.0.to_str().unwrap_or("?"))
    }
}

/// A guard of `ksm_thread_mutex`, which serialises the in-tree engine.
struct EngineLock;

impl EngineLock {
    /// Takes the mutex. May sleep. The caller must hold no lock of the engine.
    fn lock() -> Self {
        // SAFETY: All callers run in process context and hold no lock that nests inside this one.
        unsafe { ffi::rksm_intree_lock() };
        Self
    }
}

impl Drop for EngineLock {
    fn drop(&mut self) {
        // SAFETY: The task took the mutex in `lock`.
        unsafe { ffi::rksm_intree_unlock() };
    }
}

/// The bit of the in-tree `run` that is set while the engine merges: `KSM_RUN_MERGE`.
const RUN_MERGE: usize = 1;

/// Checks that the in-tree engine is not in use. May sleep.
///
/// # Errors
///
/// Logs the reason and returns `EBUSY` if the engine merges, or holds merged pages.
fn check_idle() -> Result {
    let _lock = EngineLock::lock();
    // SAFETY: The mutex is held.
    let run = unsafe { ffi::rksm_intree_run() };
    // SAFETY: The mutex is held.
    let shared = unsafe { ffi::rksm_intree_pages_shared() };
    // SAFETY: The mutex is held, so the trees do not change.
    let nodes = unsafe { ffi::rksm_intree_has_nodes() };
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

/// Returns the attribute of `/sys/kernel/mm/ksm/run`. May sleep.
///
/// # Errors
///
/// Logs the reason and returns `ENOENT` if there is no such file.
fn run_attribute() -> Result<NonNull<bindings::kobj_attribute>> {
    sysfs::find_mm_attribute(GROUP, c"run")
        .ok_or(ENOENT)
        .inspect_err(|_| {
            pr_err!("/sys/kernel/mm/ksm/run is not there\n");
        })
}

/// Checks that the words can be written that keep the in-tree engine from running. May sleep.
///
/// # Errors
///
/// Logs the name of each that cannot be written, and returns `ENOEXEC`. Returns `ENOENT` if the kernel has no
/// in-tree KSM.
pub(crate) fn check_writable() -> Result {
    let attr = run_attribute()?;
    // SAFETY: The attribute is static data of the kernel. Only `KsmdDisabled` changes its handlers, and there is
    // none yet.
    let handler = unsafe { patch::is_writable(store_word(attr)) };
    let run = {
        let _lock = EngineLock::lock();
        // SAFETY: The variable is static data of the kernel, and only changes under the mutex, which is held.
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

/// Returns whether the in-tree `run` is 0. May sleep.
fn is_stopped() -> bool {
    let _lock = EngineLock::lock();
    // SAFETY: The mutex is held.
    unsafe { ffi::rksm_intree_run() == 0 }
}

/// Returns whether the in-tree engine still has rmap items or stable nodes of an earlier run. May sleep.
fn has_leftovers() -> bool {
    let _lock = EngineLock::lock();
    // SAFETY: The mutex is held.
    let items = unsafe { ffi::rksm_intree_rmap_items() };
    // SAFETY: The mutex is held, so the trees do not change.
    items != 0 || unsafe { ffi::rksm_intree_has_nodes() }
}

/// Makes each swap-in of a merged page hand out a copy while this object lives.
///
/// In-tree KSM does the same while it unmerges everything: `ksm_might_need_to_copy()` copies while the in-tree
/// `run` is 2. So this sets that bit of the variable. The in-tree engine does not react, as it only unmerges in
/// the write to its file.
pub(crate) struct UnmergeMode(());

impl UnmergeMode {
    /// Starts copying. Takes `ksm_thread_mutex` for a moment; may sleep.
    pub(crate) fn new() -> Self {
        let _lock = EngineLock::lock();
        // SAFETY: The mutex is held, under which alone the variable changes.
        unsafe { ffi::rksm_intree_set_unmerge(true) };
        Self(())
    }
}

impl Drop for UnmergeMode {
    fn drop(&mut self) {
        let _lock = EngineLock::lock();
        // SAFETY: The mutex is held, under which alone the variable changes.
        unsafe { ffi::rksm_intree_set_unmerge(false) };
    }
}

/// The store function of a `kobj_attribute`.
type StoreFn = unsafe extern "C" fn(
    *mut bindings::kobject,
    *mut bindings::kobj_attribute,
    *const c_char,
    usize,
) -> isize;

/// Keeps the in-tree engine from being started.
///
/// While this object lives, `/sys/kernel/mm/ksm/run` only accepts 0. The file is removed from its directory while
/// its store function is exchanged, as the removal waits for each write that is under way. So no write gets past
/// the check at load, and none runs code of this module after it is unloaded.
///
/// The file comes back with the owner, mode and label that it had after boot. A file descriptor that was open
/// reads `ENODEV`.
///
/// # Invariants
///
/// `attr` is the attribute of the in-tree file. `store` is its own store function, and [`refuse_to_run`] is in its
/// place until the drop.
pub(crate) struct KsmdDisabled {
    attr: NonNull<bindings::kobj_attribute>,
    store: StoreFn,
}

// SAFETY: The attribute is static data of the kernel, which any task may use.
unsafe impl Send for KsmdDisabled {}
// SAFETY: A shared reference gives access to nothing.
unsafe impl Sync for KsmdDisabled {}

/// The name of the directory of in-tree KSM in `/sys/kernel/mm`.
const GROUP: &CStr = c"ksm";

/// Returns the address of an attribute's store function, as that of a word.
fn store_word(attr: NonNull<bindings::kobj_attribute>) -> *mut usize {
    // A function pointer is a word.
    const _: () = assert!(size_of::<Option<StoreFn>>() == size_of::<usize>());
    // SAFETY: The address of a member is computed, and nothing is accessed. All callers pass an attribute of the
    // kernel, so the result lies within an object.
    unsafe { (&raw mut (*attr.as_ptr()).__bindgen_anon_2).cast() }
}

/// How often to try again to put the file back.
const PUT_BACK_ATTEMPTS: u32 = 100;

/// The time before each of these attempts, in milliseconds.
const PUT_BACK_MS: i64 = 10;

impl KsmdDisabled {
    /// Stops the in-tree engine and keeps it from being started. May sleep.
    ///
    /// The in-tree engine also forgets the pages that it remembers from an earlier run.
    ///
    /// # Errors
    ///
    /// Returns `EBUSY` if the engine is in use, `ENOENT` if the kernel has no in-tree KSM, and the errors of
    /// [`Self::exchange`]. The log has the reason.
    pub(crate) fn new() -> Result<Self> {
        check_idle()?;
        let attr = run_attribute()?;
        // SAFETY: The attribute is static data of the kernel, and its handlers do not change meanwhile.
        let store = unsafe { (*attr.as_ptr()).__bindgen_anon_2.store }.ok_or(ENOENT)?;
        // INVARIANT: The next line exchanges the store function. If that fails, the drop puts the old one back.
        let this = Self { attr, store };
        this.exchange(refuse_to_run)?;
        check_idle()?;
        // Reset a `run` of 2, with which each swap-in of a merged page would make a copy. If the in-tree engine
        // still has rmap items, have it free them: they would stay accounted to their processes.
        let inputs: &[&CStr] = match (is_stopped(), !has_leftovers()) {
            (true, true) => &[],
            (false, true) => &[c"0"],
            (_, false) => &[c"0", c"2", c"0"],
        };
        for input in inputs {
            // SAFETY: A write to the file makes the same call. The input is a C string, and no other write runs,
            // as the file has another store function now.
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

    /// Makes `store` the store function, with the file out of its directory. May sleep.
    ///
    /// # Errors
    ///
    /// * `EFAULT`: the store function is read-only. The file comes back only if it has its own store function.
    /// * Any other: the file could not be put back, even after [`PUT_BACK_ATTEMPTS`] if memory was short.
    fn exchange(&self, store: StoreFn) -> Result {
        let file = self.file();
        // SAFETY: `file` is in the directory `GROUP` of the kobject, and nothing else removes it.
        unsafe {
            bindings::sysfs_remove_file_from_group(sysfs::mm_kobj(), file, GROUP.as_char_ptr());
        }
        // SAFETY: The word is static data of the kernel, and is not used while the file is not in the directory.
        let written = unsafe { patch::write(store_word(self.attr), store as usize) };
        if written.is_err() {
            // SAFETY: The word is static data of the kernel.
            let there = unsafe { store_word(self.attr).read() };
            if there != self.store as usize {
                // The store function is in this module. Do not put the file back: a write would call it after
                // the module is freed.
                pr_err!("/sys/kernel/mm/ksm/run became read-only and is taken away\n");
                return written;
            }
        }
        let mut result = self.put_back();
        // Do not lose the file for lack of memory: retry for a while.
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

    /// Puts the file back into its directory. May sleep.
    fn put_back(&self) -> Result {
        let file = self.file();
        // SAFETY: `file` is static data of the kernel, and is not in the directory `GROUP` of the kobject.
        to_result(unsafe {
            bindings::sysfs_add_file_to_group(sysfs::mm_kobj(), file, GROUP.as_char_ptr())
        })
    }

    /// Returns the attribute as sysfs knows it.
    fn file(&self) -> *const bindings::attribute {
        // SAFETY: The address of a member is computed, and by the type invariant `attr` points at an attribute.
        unsafe { &raw const (*self.attr.as_ptr()).attr }
    }
}

impl Drop for KsmdDisabled {
    fn drop(&mut self) {
        // Ignore an error: it is in the log, and no write can call the store function of this module afterwards.
        let _ = self.exchange(self.store);
    }
}

/// The store function of `/sys/kernel/mm/ksm/run` while the module is loaded: refuses everything but 0.
///
/// # Safety
///
/// `buf` is a C string, as sysfs passes it.
unsafe extern "C" fn refuse_to_run(
    _kobj: *mut bindings::kobject,
    _attr: *mut bindings::kobj_attribute,
    buf: *const c_char,
    count: usize,
) -> isize {
    let mut value: c_uint = 0;
    // SAFETY: By the caller's promise `buf` is a C string, and `value` has room for the result.
    let ret = unsafe { bindings::kstrtouint(buf, 10, &raw mut value) };
    let refusal = match value {
        _ if ret != 0 => EINVAL,
        0 => return isize::try_from(count).unwrap_or(isize::MAX),
        1 | 2 => EBUSY,
        _ => EINVAL,
    };
    // Log it only once: ksmtuned writes every minute.
    static SAID: Atomic<bool> = Atomic::new(false);
    if refusal == EBUSY && !SAID.load(Relaxed) {
        SAID.store(true, Relaxed);
        pr_info!("in-tree KSM cannot run while rksm is loaded\n");
    }
    refusal.to_errno() as isize
}
