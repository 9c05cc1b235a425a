// SPDX-License-Identifier: GPL-2.0

//! A freezable kernel thread that works for a shared object.

use crate::mm::ffi;
use core::ptr::NonNull;
use kernel::{
    bindings,
    ffi::{c_int, c_long, c_void},
    prelude::*,
    sync::{aref::ARef, Arc},
    task::Task,
};

/// The longest sleep there is, in jiffies: until woken.
const MAX_SCHEDULE_TIMEOUT: c_long = c_long::MAX;

/// The body of a kernel thread.
pub(crate) trait ThreadFn: Send + Sync {
    /// Runs until [`KthreadContext::should_stop`].
    fn main(&self, current: &KthreadContext);
}

/// The running kernel thread, as it sees itself.
pub(crate) struct KthreadContext(());

impl KthreadContext {
    /// Whether the thread was asked to end.
    pub(crate) fn should_stop(&self) -> bool {
        // SAFETY: called by a kthread, which only kthreads can, for want of a `KthreadContext` elsewhere.
        unsafe { ffi::rksm_kthread_should_stop() }
    }

    /// The CPU time that the thread has used, in nanoseconds.
    pub(crate) fn cpu_nanos(&self) -> u64 {
        // SAFETY: looks at the current task, which has no run queue locked.
        unsafe { ffi::rksm_cpu_time() }
    }

    /// Whether the system is being frozen.
    pub(crate) fn is_freezing(&self) -> bool {
        // SAFETY: looks at the current task.
        unsafe { ffi::rksm_freezing() }
    }

    /// Sleeps until `ready` says so, the thread is asked to end, or `millis` have passed (`None`: no
    /// limit). Whoever makes `ready` true calls [`Kthread::waker`]'s `wake_up` afterwards. Freezable.
    pub(crate) fn sleep(&self, millis: Option<u32>, ready: impl Fn() -> bool) {
        let mut left = match millis {
            // SAFETY: pure arithmetic.
            Some(ms) => c_long::try_from(unsafe { ffi::rksm_msecs_to_jiffies(ms) })
                .unwrap_or(MAX_SCHEDULE_TIMEOUT),
            None => MAX_SCHEDULE_TIMEOUT,
        };
        while left > 0 {
            // SAFETY: sets the state of the current task, before the condition is looked at, so that
            // a wake-up in between is not lost.
            unsafe { ffi::rksm_set_sleeping() };
            if ready() || self.should_stop() {
                break;
            }
            // SAFETY: the state was set; no lock is held.
            left = unsafe { bindings::schedule_timeout(left) };
        }
        // SAFETY: concerns the current task only; no lock is held. (A sleep of no time at all must
        // still let others run.)
        unsafe {
            ffi::rksm_set_running();
            ffi::rksm_try_to_freeze();
            ffi::rksm_cond_resched();
        }
    }

    /// Lets others run.
    pub(crate) fn cond_resched(&self) {
        // SAFETY: no lock is held by a kthread's main function that calls this.
        unsafe { ffi::rksm_cond_resched() };
    }
}

/// A running kernel thread; dropping it asks the thread to end and waits.
///
/// # Invariants
///
/// `task` is a kthread that was not stopped yet, with a reference of ours on it. It uses `owner`
/// until it ends.
pub(crate) struct Kthread<T: ThreadFn + 'static> {
    task: NonNull<bindings::task_struct>,
    owner: Arc<T>,
}

// SAFETY: a kthread can be stopped from any task.
unsafe impl<T: ThreadFn> Send for Kthread<T> {}
// SAFETY: nothing can be done with a shared reference but waking the thread.
unsafe impl<T: ThreadFn> Sync for Kthread<T> {}

impl<T: ThreadFn + 'static> Kthread<T> {
    /// Starts `rksmd`, at nice 5.
    pub(crate) fn spawn(owner: Arc<T>) -> Result<Self> {
        let data = (&raw const *owner).cast_mut().cast::<c_void>();
        // SAFETY: `run` takes what `data` is; `owner` outlives the thread, see `drop`.
        let task = unsafe { ffi::rksm_kthread_create(Some(run::<T>), data) };
        let task = kernel::error::from_err_ptr(task)?;
        let task = NonNull::new(task).ok_or(ENOMEM)?;
        // SAFETY: a new kthread does not end before it was woken, so it is valid; the reference is
        // dropped in `drop`.
        unsafe {
            bindings::get_task_struct(task.as_ptr());
            ffi::rksm_set_nice(task.as_ptr(), 5);
            bindings::wake_up_process(task.as_ptr());
        }
        // INVARIANT: created above, with the reference just taken.
        Ok(Self { task, owner })
    }

    /// A handle to wake the thread with.
    pub(crate) fn waker(&self) -> ARef<Task> {
        // SAFETY: `Task` is transparent over `task_struct`, and we hold a reference on it.
        unsafe { self.task.cast::<Task>().as_ref() }.into()
    }
}

impl<T: ThreadFn + 'static> Drop for Kthread<T> {
    fn drop(&mut self) {
        // SAFETY: by the type invariant the thread was not stopped yet and we have a reference,
        // which this gives up. (A thread that never ran ends without running.)
        unsafe { ffi::rksm_kthread_stop(self.task.as_ptr()) };
        // The thread is gone: nobody but us uses `owner` through it any more.
        let _ = &self.owner;
    }
}

/// # Safety
///
/// `data` points at a `T` that outlives the thread.
unsafe extern "C" fn run<T: ThreadFn>(data: *mut c_void) -> c_int {
    // SAFETY: concerns the current task only.
    unsafe { ffi::rksm_set_freezable() };
    // SAFETY: the caller's promise.
    let owner = unsafe { &*data.cast::<T>() };
    owner.main(&KthreadContext(()));
    0
}
