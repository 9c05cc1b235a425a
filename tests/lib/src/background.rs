// SPDX-License-Identifier: GPL-2.0
//! A process that repeats an operation beside a test.

use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};

use crate::sys::{self, Ended, Forked};
use crate::timeout::scaled;

/// How long a background process may take to exit after SIGKILL.
const END_LIMIT: Duration = Duration::from_secs(30);

/// A process that works until it is stopped.
pub struct Background {
    pid: libc::pid_t,
    gone: bool,
}

impl Background {
    /// Repeats `work` until [`Self::stop`], or until it fails.
    pub fn repeat(mut work: impl FnMut() -> Result<()>) -> Result<Self> {
        Self::once(move || loop {
            work()?;
        })
    }

    /// Run `work` once in a background process.
    pub fn once(work: impl FnOnce() -> Result<()>) -> Result<Self> {
        match sys::fork().context("fork")? {
            Forked::Child => {
                if sys::die_with_parent().is_err() {
                    sys::exit_now(1);
                }
                let status = match work() {
                    Ok(()) => 0,
                    Err(e) => {
                        println!("in the background: {e:#}");
                        1
                    }
                };
                sys::exit_now(status);
            }
            Forked::Parent(pid) => Ok(Self { pid, gone: false }),
        }
    }

    pub fn pid(&self) -> u32 {
        self.pid as u32
    }

    /// Return how the process ended; `None` while it runs.
    pub fn ended(&mut self) -> Result<Option<Ended>> {
        let ended = sys::try_wait(self.pid).context("wait")?;
        self.gone |= ended.is_some();
        Ok(ended.map(|(_, how)| how))
    }

    /// Wait until the process ends by itself.
    pub fn join(mut self, limit: Duration) -> Result<Ended> {
        let end = Instant::now() + scaled(limit);
        loop {
            if let Some(how) = self.ended()? {
                return Ok(how);
            }
            if Instant::now() > end {
                bail!("the work in the background does not end");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Kill the process.
    pub fn kill(self) -> Result<()> {
        drop(self);
        Ok(())
    }

    /// End the process. Fail if it had already failed by itself.
    pub fn stop(mut self) -> Result<()> {
        if let Some(how) = self.ended()? {
            bail!("the work in the background ended by {how:?}");
        }
        sys::kill(self.pid, libc::SIGKILL).context("kill")?;
        match self.join(END_LIMIT)? {
            Ended::Signal(libc::SIGKILL) => Ok(()),
            how => bail!("the work in the background ended by {how:?}"),
        }
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if !self.gone {
            // It is reaped with the rest of the test's processes.
            let _ = sys::kill(self.pid, libc::SIGKILL);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_goes_on_until_stopped_and_failures_show() {
        let work = Background::repeat(|| {
            std::thread::sleep(Duration::from_millis(1));
            Ok(())
        });
        work.unwrap().stop().unwrap();
        let failing = Background::repeat(|| bail!("no"));
        assert_eq!(failing.unwrap().join(END_LIMIT).unwrap(), Ended::Exit(1));
    }
}
