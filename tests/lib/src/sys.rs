// SPDX-License-Identifier: GPL-2.0
//! The system calls that the standard library does not offer.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;

/// Not in every version of the libc crate; the values are kernel ABI.
const PR_SET_MEMORY_MERGE: libc::c_int = 67;
const PR_GET_MEMORY_MERGE: libc::c_int = 68;

fn check(ret: libc::c_long) -> io::Result<libc::c_long> {
    if ret < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(ret)
}

/// Open (or close) all memory of this process to merging.
pub fn set_memory_merge(on: bool) -> io::Result<()> {
    let zero: libc::c_ulong = 0;
    // SAFETY: This prctl takes integers only.
    let ret = unsafe {
        libc::prctl(
            PR_SET_MEMORY_MERGE,
            libc::c_ulong::from(on),
            zero,
            zero,
            zero,
        )
    };
    check(ret.into()).map(drop)
}

/// Return whether all memory of this process is open to merging.
pub fn memory_merge() -> io::Result<bool> {
    let zero: libc::c_ulong = 0;
    // SAFETY: This prctl takes integers only.
    let ret = unsafe { libc::prctl(PR_GET_MEMORY_MERGE, zero, zero, zero, zero) };
    Ok(check(ret.into())? != 0)
}

/// The side of a fork.
pub enum Forked {
    Child,
    Parent(libc::pid_t),
}

/// Fork. The test programs have a single thread, so the child may use all that the parent could.
pub fn fork() -> io::Result<Forked> {
    // SAFETY: getpid takes no arguments.
    let me = unsafe { libc::getpid() };
    // SAFETY: The process has a single thread (see the function's documentation).
    match check(unsafe { libc::fork() }.into())? {
        0 => {
            PARENT.store(me, Ordering::Relaxed);
            Ok(Forked::Child)
        }
        pid => Ok(Forked::Parent(pid as libc::pid_t)),
    }
}

/// Exit at once, without running destructors of values that were inherited over a fork.
pub fn exit_now(status: i32) -> ! {
    // SAFETY: _exit takes an integer and does not return.
    unsafe { libc::_exit(status) }
}

/// Send `signal` to `pid`, or to the process group `-pid`.
pub fn kill(pid: libc::pid_t, signal: libc::c_int) -> io::Result<()> {
    // SAFETY: kill takes integers only.
    check(unsafe { libc::kill(pid, signal) }.into()).map(drop)
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    Exit(i32),
    Signal(i32),
}

/// Reap child `pid`, or any child in the group `-pid`. `None` while it runs.
pub fn try_wait(pid: libc::pid_t) -> io::Result<Option<(libc::pid_t, Ended)>> {
    let mut status = 0;
    // SAFETY: `status` outlives the call.
    let got = check(unsafe { libc::waitpid(pid, &mut status, libc::WNOHANG) }.into())?;
    if got == 0 {
        return Ok(None);
    }
    let ended = if libc::WIFSIGNALED(status) {
        Ended::Signal(libc::WTERMSIG(status))
    } else {
        Ended::Exit(libc::WEXITSTATUS(status))
    };
    Ok(Some((got as libc::pid_t, ended)))
}

/// Return how child `pid` ended, without reaping it. `None` while it runs.
pub fn has_ended(pid: u32) -> io::Result<Option<Ended>> {
    // SAFETY: All zeroes are a valid value of this type.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let options = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    // SAFETY: `info` outlives the call.
    check(unsafe { libc::waitid(libc::P_PID, pid, &mut info, options) }.into())?;
    // SAFETY: waitid() has filled in these fields, or left them zero.
    let (found, status) = unsafe { (info.si_pid(), info.si_status()) };
    Ok((found != 0).then_some(match info.si_code {
        libc::CLD_EXITED => Ended::Exit(status),
        _ => Ended::Signal(status),
    }))
}

/// The pid of the process that forked this one; 0 if [`fork`] did not create it.
static PARENT: AtomicI32 = AtomicI32::new(0);

/// Make this process die with its parent. Die at once if the parent is gone already.
pub fn die_with_parent() -> io::Result<()> {
    // SAFETY: This prctl takes integers only.
    check(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong) }.into())?;
    let parent = PARENT.load(Ordering::Relaxed);
    // SAFETY: getppid takes no arguments.
    if parent != 0 && parent != unsafe { libc::getppid() } {
        // SAFETY: kill and getpid take integers at most.
        unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
    }
    Ok(())
}

/// Set the nice value of a task.
pub fn set_nice(pid: u32, nice: i32) -> io::Result<()> {
    // SAFETY: setpriority takes integers only.
    let ret = unsafe { libc::setpriority(libc::PRIO_PROCESS, pid, nice) };
    check(ret.into()).map(drop)
}

/// Restrict this process, and its future children, to one CPU.
pub fn run_on(cpu: usize) -> io::Result<()> {
    let mut set = [0u64; 16];
    set[cpu / 64] |= 1 << (cpu % 64);
    // SAFETY: The set has the stated size and outlives the call.
    let ret =
        unsafe { libc::sched_setaffinity(0, std::mem::size_of_val(&set), set.as_ptr().cast()) };
    check(ret.into()).map(drop)
}

/// Make orphaned descendants children of this process.
pub fn become_subreaper() -> io::Result<()> {
    let on: libc::c_ulong = 1;
    // SAFETY: This prctl takes integers only.
    check(unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, on) }.into()).map(drop)
}

/// Put this process into a process group of its own.
pub fn own_group() -> io::Result<()> {
    // SAFETY: setpgid takes integers only.
    check(unsafe { libc::setpgid(0, 0) }.into()).map(drop)
}

/// Let the kernel kill this process by SIGALRM after `limit`.
pub fn alarm(limit: Duration) {
    // SAFETY: alarm takes an integer only.
    unsafe { libc::alarm(limit.as_secs() as libc::c_uint) };
}

/// Reset `signal` to its default action. Rust's own handler of SIGBUS, which looks for stack overflows,
/// swallows the first one.
pub fn default_action(signal: libc::c_int) -> io::Result<()> {
    // SAFETY: SIG_DFL installs no handler.
    if unsafe { libc::signal(signal, libc::SIG_DFL) } == libc::SIG_ERR {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Make descriptor `to` a copy of `from`.
pub fn dup_onto(from: RawFd, to: RawFd) -> io::Result<()> {
    // SAFETY: dup2 takes integers only.
    check(unsafe { libc::dup2(from, to) }.into()).map(drop)
}

/// Keep `fd` open over an exec.
pub fn keep_over_exec(fd: &impl AsRawFd) -> io::Result<()> {
    // SAFETY: F_SETFD takes an integer.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, 0) }.into()).map(drop)
}

/// A pipe: reading end, writing end.
pub fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [0; 2];
    // SAFETY: `fds` has room for two descriptors.
    check(unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) }.into())?;
    // SAFETY: The call succeeded, so both are open, and nothing else owns them.
    Ok(unsafe { (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) })
}

/// Wait until `fd` can be read or `limit` has passed. Return whether it can be read.
pub fn poll_in(fd: RawFd, limit: Duration) -> io::Result<bool> {
    let mut pfd = libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: `pfd` is one entry and outlives the call.
    let n = unsafe { libc::poll(&mut pfd, 1, limit.as_millis() as libc::c_int) };
    Ok(check(n.into())? > 0)
}

/// Load the module image in `file`.
pub fn finit_module(file: &impl AsRawFd, params: &str) -> io::Result<()> {
    let params = CString::new(params)?;
    // SAFETY: `params` is a C string that outlives the call.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_finit_module,
            file.as_raw_fd(),
            params.as_ptr(),
            0 as libc::c_int,
        )
    };
    check(ret).map(drop)
}

/// Unload a module without waiting for it to become unused.
pub fn delete_module(name: &str) -> io::Result<()> {
    let name = CString::new(name)?;
    // SAFETY: `name` is a C string that outlives the call.
    let ret = unsafe { libc::syscall(libc::SYS_delete_module, name.as_ptr(), libc::O_NONBLOCK) };
    check(ret).map(drop)
}
