// SPDX-License-Identifier: GPL-2.0

//! A freezable kernel thread that runs a method of an object.

use crate::mm::ffi;
use core::ptr::NonNull;
use kernel::{
    bindings,
    ffi::{c_int, c_long, c_void},
    prelude::*,
    sync::aref::ARef,
    task::Task,
};

/// The timeout of a sleep that only a wake-up ends, in jiffies.
const MAX_SCHEDULE_TIMEOUT: c_long = c_long::MAX;

/// The body of a kernel thread, with the data that only the thread uses.
pub(crate) trait ThreadFn: Send {
    /// Runs in the thread, and returns soon after [`KthreadContext::should_stop`] becomes true. May sleep.
    fn main(&mut self, current: &KthreadContext);
}

/// The context of the current kernel thread.
///
/// Only [`ThreadFn::main`] gets one, so each holder runs in a kernel thread.
pub(crate) struct KthreadContext(());

impl KthreadContext {
    /// Returns whether the thread was asked to end.
    pub(crate) fn should_stop(&self) -> bool {
        // SAFETY: The current task is a kthread, since only kthreads have a `KthreadContext`.
        unsafe { ffi::rksm_kthread_should_stop() }
    }

    /// Returns the CPU time that the thread has used, in nanoseconds.
    pub(crate) fn cpu_nanos(&self) -> u64 {
        // SAFETY: The call reads the time of the current task, which holds no run queue lock.
        unsafe { ffi::rksm_cpu_time() }
    }

    /// Returns whether the thread is asked to freeze, as before the system suspends.
    pub(crate) fn is_freezing(&self) -> bool {
        // SAFETY: The call reads flags of the current task.
        unsafe { ffi::rksm_freezing() }
    }

    /// Sleeps until `ready` returns true, the thread is asked to end, or `millis` milliseconds have passed.
    ///
    /// `None` stands for no limit. After a change that makes `ready` true, call `wake_up` of
    /// [`Kthread::waker`]. The sleep is freezable. The caller must hold no lock.
    pub(crate) fn sleep(&self, millis: Option<u32>, ready: impl Fn() -> bool) {
        let mut left = match millis {
            // SAFETY: The call only computes.
            Some(ms) => c_long::try_from(unsafe { ffi::rksm_msecs_to_jiffies(ms) })
                .unwrap_or(MAX_SCHEDULE_TIMEOUT),
            None => MAX_SCHEDULE_TIMEOUT,
        };
        while left > 0 {
            // Set the state before checking the condition, so that a wake-up in between is not lost.
            // SAFETY: The call only sets the state of the current task.
            unsafe { ffi::rksm_set_sleeping() };
            if ready() || self.should_stop() {
                break;
            }
            // SAFETY: The task may sleep: its state was set, and it holds no lock.
            left = unsafe { bindings::schedule_timeout(left) };
        }
        // SAFETY: The call only sets the state of the current task.
        unsafe { ffi::rksm_set_running() };
        // SAFETY: The current task is a kthread that was made freezable in `run`, and holds no lock.
        unsafe { ffi::rksm_try_to_freeze() };
        // Let other tasks run even if the timeout is 0.
        self.cond_resched();
    }

    /// Lets other tasks run, if any waits for this CPU. The caller must hold no spinlock.
    pub(crate) fn cond_resched(&self) {
        // SAFETY: The current task is a kthread that holds no spinlock.
        unsafe { ffi::rksm_cond_resched() };
    }
}

/// A running kernel thread. Dropping it asks the thread to end and waits until it has.
///
/// # Invariants
///
/// `task` is a kthread that was not stopped yet, and this object owns a reference on it. `body` was
/// leaked by a `KBox`. Until the thread has ended, only the thread uses what it points at.
pub(crate) struct Kthread<T: ThreadFn + 'static> {
    task: NonNull<bindings::task_struct>,
    body: NonNull<T>,
}

// SAFETY: Any task may stop a kthread, and `T` may be dropped by any task.
unsafe impl<T: ThreadFn> Send for Kthread<T> {}
// SAFETY: A shared reference only gives access to `waker`, which any task may call.
unsafe impl<T: ThreadFn> Sync for Kthread<T> {}

impl<T: ThreadFn + 'static> Kthread<T> {
    /// Starts the thread `rksmd` with nice value 5. May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM` if there is no memory, and other errors of `kthread_create()`.
    pub(crate) fn spawn(body: T) -> Result<Self> {
        let body = NonNull::from(KBox::leak(KBox::new(body, GFP_KERNEL)?));
        // SAFETY: `run` expects a pointer to a `T` that no other task uses. `drop` frees that one after it has
        // stopped the thread.
        let task = unsafe { ffi::rksm_kthread_create(Some(run::<T>), body.as_ptr().cast()) };
        let task =
            kernel::error::from_err_ptr(task).and_then(|task| NonNull::new(task).ok_or(ENOMEM));
        let task = task.inspect_err(|_| {
            // SAFETY: `body` is what a box leaked above. No thread was created, so it has no user.
            drop(unsafe { KBox::from_raw(body.as_ptr()) });
        })?;
        // SAFETY: A new kthread does not end before it is woken up, so the task is valid.
        unsafe { bindings::get_task_struct(task.as_ptr()) };
        // SAFETY: The reference that was just taken keeps the task.
        unsafe { ffi::rksm_set_nice(task.as_ptr(), 5) };
        // SAFETY: The reference keeps the task.
        unsafe { bindings::wake_up_process(task.as_ptr()) };
        // INVARIANT: The thread was created above, with what a box leaked. The reference moves into the object.
        Ok(Self { task, body })
    }

    /// Returns the task, to wake the thread with.
    pub(crate) fn waker(&self) -> ARef<Task> {
        // SAFETY: `Task` is transparent over `task_struct`, and by the type invariant a reference keeps the task.
        unsafe { self.task.cast::<Task>().as_ref() }.into()
    }
}

impl<T: ThreadFn + 'static> Drop for Kthread<T> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant the thread was not stopped yet, and the object owns the reference that
        // the call gives up. A thread that never ran ends without running.
        unsafe { ffi::rksm_kthread_stop(self.task.as_ptr()) };
        // SAFETY: By the type invariant a box leaked `body`. The thread has ended, so it does not
        // use it any more.
        drop(unsafe { KBox::from_raw(self.body.as_ptr()) });
    }
}

/// The entry point of the thread.
///
/// # Safety
///
/// The current task is a new kthread. `data` points at a `T` that outlives it and that no other task uses.
unsafe extern "C" fn run<T: ThreadFn>(data: *mut c_void) -> c_int {
    // SAFETY: The current task is a kthread that holds no lock, and the call changes its flags only.
    unsafe { ffi::rksm_set_freezable() };
    // SAFETY: By the caller's promise `data` points at a `T` that outlives the thread, which is its only user.
    let body = unsafe { &mut *data.cast::<T>() };
    body.main(&KthreadContext(()));
    0
}
