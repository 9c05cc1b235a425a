// SPDX-License-Identifier: GPL-2.0
//! Small KVM guests that know what their memory contains. `rksm-vmm` (tests/kvm) runs each of them.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};

use crate::pageflags::Span;
use crate::sys;
use crate::timeout::scaled;

const PAGE: usize = 4096;

/// How long a guest may take for an order. After a merge, the first access to each page is a fault through two
/// levels of page tables, and all guests share one or two emulated CPUs.
pub const LIMIT: Duration = Duration::from_secs(240);

/// A guest to be started.
#[derive(Clone, Debug)]
pub struct Config {
    /// The number of the guest. Guests with different numbers have the common pages at different places.
    pub number: u32,
    pub mib: usize,
    /// The shares of pages that all guests have, of zeroes, and of pages that the guest has many times, in
    /// percent. All others are unique.
    pub common: u32,
    pub zero: u32,
    pub repeated: u32,
    /// More options for the monitor.
    pub options: Vec<&'static str>,
}

impl Config {
    /// A guest with three quarters of pages that have equals.
    pub fn new(number: u32, mib: usize) -> Self {
        Self {
            number,
            mib,
            common: 60,
            zero: 10,
            repeated: 5,
            options: Vec::new(),
        }
    }
}

/// A running guest. It is killed when it is dropped.
pub struct Guest {
    child: Child,
    number: u32,
    unread: Vec<u8>,
    answers: VecDeque<String>,
    /// The number of orders that were not answered yet.
    orders: usize,
}

/// The monitor: `RKSM_VMM`, or beside the running program.
fn monitor() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("RKSM_VMM") {
        return Ok(path.into());
    }
    let me = std::env::current_exe().context("the running program")?;
    Ok(me.with_file_name("rksm-vmm"))
}

/// Whether this machine can run KVM guests.
pub fn available() -> bool {
    Path::new("/dev/kvm").exists()
}

impl Guest {
    /// Start a guest. It begins to fill its memory, see [`Self::filled`].
    pub fn start(config: &Config) -> Result<Self> {
        let Config {
            number,
            mib,
            common,
            zero,
            repeated,
            options,
        } = config;
        let child = Command::new(monitor()?)
            .args(["--mib", &mib.to_string(), "--append"])
            .arg(format!(
                "guest={number} common={common} zero={zero} repeated={repeated}"
            ))
            .args(options)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("starting rksm-vmm")?;
        Ok(Self {
            child,
            number: *number,
            unread: Vec::new(),
            answers: VecDeque::new(),
            orders: 1,
        })
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Wait until the guest has filled its memory.
    pub fn filled(&mut self) -> Result<()> {
        self.answered("fill").map(drop)
    }

    /// Give an order, and do not wait for the answer.
    pub fn order(&mut self, order: &str) -> Result<()> {
        let number = self.number;
        let input = self.child.stdin.as_mut().context("standard input")?;
        writeln!(input, "{order}").with_context(|| format!("guest {number} has ended"))?;
        self.orders += 1;
        Ok(())
    }

    /// Wait for the answer to the oldest order, of which `name` is the first word. Return the rest of it.
    pub fn answered(&mut self, name: &str) -> Result<String> {
        ensure!(
            self.orders != 0,
            "no order was given to guest {}",
            self.number
        );
        let line = self.next_line(scaled(LIMIT))?;
        self.orders -= 1;
        let words = line
            .strip_prefix("ok ")
            .and_then(|line| line.strip_prefix(name));
        match words {
            Some(rest) => Ok(rest.trim().to_string()),
            None => bail!("guest {} says: {line}", self.number),
        }
    }

    /// Give an order, and wait for the answer.
    pub fn obey(&mut self, order: &str) -> Result<String> {
        self.order(order)?;
        self.answered(order.split(' ').next().unwrap_or(""))
    }

    /// The guest's memory, in the address space of its monitor. Page 512 is the first one that the guest fills.
    pub fn span(&mut self, mib: usize) -> Result<Span> {
        let addr = self.obey("!memory")?.parse().context("!memory")?;
        Ok(Span {
            pid: self.pid(),
            addr,
            pages: (mib << 20) / PAGE,
        })
    }

    fn next_line(&mut self, limit: Duration) -> Result<String> {
        let end = Instant::now() + limit;
        loop {
            if let Some(line) = self.answers.pop_front() {
                return Ok(line);
            }
            let output = self.child.stdout.as_mut().context("standard output")?;
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || !sys::poll_in(output.as_raw_fd(), left)? {
                bail!("guest {} does not answer within {limit:?}", self.number);
            }
            let mut part = [0; 4096];
            let n = output.read(&mut part).context("reading")?;
            ensure!(n != 0, "guest {} has ended", self.number);
            self.unread.extend_from_slice(&part[..n]);
            while let Some(at) = self.unread.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.unread.drain(..=at).collect();
                let line = String::from_utf8_lossy(&line).trim_end().to_string();
                self.answers.push_back(line);
            }
        }
    }

    /// End the guest as SIGKILL does, and reap it.
    pub fn kill(mut self) -> Result<()> {
        self.child.kill().context("kill")?;
        self.child.wait().context("wait").map(drop)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Give an order to all guests at once, and wait until all have obeyed.
pub fn all_obey(guests: &mut [Guest], order: &str) -> Result<()> {
    for guest in guests.iter_mut() {
        guest.order(order)?;
    }
    let name = order.split(' ').next().unwrap_or("");
    for guest in guests {
        guest.answered(name)?;
    }
    Ok(())
}
