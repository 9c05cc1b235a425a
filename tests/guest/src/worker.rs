// SPDX-License-Identifier: GPL-2.0
//! A process that holds one region and obeys commands, one per line.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};

use crate::cgroup::Group;
use crate::inject::Nth;
use crate::pageflags::Span;
use crate::region::{Region, HUGE, PAGE};
use crate::sys::{self, Ended, Forked};
use crate::timeout::scaled;

/// How long a single command may take, even on an emulated CPU.
const REPLY_LIMIT: Duration = Duration::from_secs(40);

/// The parent's handle on a worker. Dropping it kills and reaps the worker.
pub struct Worker {
    pid: libc::pid_t,
    stream: BufReader<UnixStream>,
    region: Option<(usize, usize)>,
    gone: bool,
}

impl Worker {
    /// Start a worker without a region.
    pub fn new() -> Result<Self> {
        Self::start(None)
    }

    /// Start a worker that inherits `region` over the fork.
    pub fn inheriting(region: &mut Region) -> Result<Self> {
        Self::start(Some(region))
    }

    fn start(region: Option<&mut Region>) -> Result<Self> {
        let (ours, theirs) = UnixStream::pair().context("socketpair")?;
        match sys::fork().context("fork")? {
            Forked::Child => {
                drop(ours);
                let status = serve(theirs, region);
                sys::exit_now(status);
            }
            Forked::Parent(pid) => {
                drop(theirs);
                ours.set_read_timeout(Some(scaled(REPLY_LIMIT)))?;
                Ok(Self {
                    pid,
                    stream: BufReader::new(ours),
                    region: region.map(|r| (r.addr(), r.pages())),
                    gone: false,
                })
            }
        }
    }

    /// Start a worker with `pages` pages, mapped but not yet filled.
    pub fn with_pages(pages: usize) -> Result<Self> {
        let mut worker = Self::new()?;
        worker.map(pages)?;
        Ok(worker)
    }

    /// Start a worker whose page `k` holds the content of `seed + k`, open to merging.
    pub fn mergeable(pages: usize, seed: u64) -> Result<Self> {
        let mut worker = Self::with_pages(pages)?;
        worker.fill(0, pages, seed, 1)?;
        worker.advise(0, pages, libc::MADV_MERGEABLE)?;
        Ok(worker)
    }

    /// Start such a worker in a group, with small pages only, so that each page is charged there.
    pub fn mergeable_in(group: &Group, pages: usize, seed: u64) -> Result<Self> {
        let mut worker = Self::new()?;
        group.enter(worker.pid())?;
        worker.map(pages)?;
        worker.advise(0, pages, libc::MADV_NOHUGEPAGE)?;
        worker.fill(0, pages, seed, 1)?;
        worker.advise(0, pages, libc::MADV_MERGEABLE)?;
        Ok(worker)
    }

    pub fn pid(&self) -> u32 {
        self.pid as u32
    }

    /// The span of the worker's region.
    pub fn span(&self) -> Span {
        let (addr, pages) = self.region.expect("a region");
        Span {
            pid: self.pid(),
            addr,
            pages,
        }
    }

    /// The first page of its region at which a huge page, and a page table, could begin.
    pub fn first_aligned(&self) -> usize {
        let addr = self.span().addr;
        (addr.next_multiple_of(HUGE) - addr) / PAGE
    }

    /// Count the merged pages of its region.
    pub fn merged(&self) -> Result<usize> {
        crate::pageflags::merged(self.span())
    }

    fn send(&mut self, line: &str) -> Result<()> {
        writeln!(self.stream.get_mut(), "{line}")
            .with_context(|| format!("sending {line:?} to a worker"))
    }

    fn call(&mut self, line: &str) -> Result<String> {
        self.send(line)?;
        let mut reply = String::new();
        let pid = self.pid;
        let n = self
            .stream
            .read_line(&mut reply)
            .with_context(|| format!("worker {pid}: {line}"))?;
        if n == 0 {
            bail!("worker {pid} died at {line:?}");
        }
        match reply.trim_end_matches('\n').split_once(' ') {
            Some(("ok", value)) => Ok(value.to_string()),
            Some(("err", what)) => bail!("worker {pid}: {line}: {what}"),
            _ => bail!("worker {pid} answers {reply:?} to {line:?}"),
        }
    }

    fn place(&mut self, line: &str) -> Result<()> {
        let reply = self.call(line)?;
        let (addr, pages) = reply.split_once(' ').context("address and size")?;
        self.region = Some((addr.parse()?, pages.parse()?));
        Ok(())
    }

    pub fn map(&mut self, pages: usize) -> Result<()> {
        self.place(&format!("map {pages}"))
    }

    pub fn relocate(&mut self) -> Result<()> {
        self.place("relocate")
    }

    pub fn truncate(&mut self, keep: usize) -> Result<()> {
        self.place(&format!("truncate {keep}"))
    }

    pub fn fill(&mut self, i: usize, n: usize, seed: u64, step: u64) -> Result<()> {
        self.call(&format!("fill {i} {n} {seed} {step}")).map(drop)
    }

    /// Write `value` at `offset` of pages `i..i + n`.
    pub fn poke(&mut self, i: usize, n: usize, offset: usize, value: u8) -> Result<()> {
        self.call(&format!("poke {i} {n} {offset} {value}"))
            .map(drop)
    }

    /// Write `value` to each page, at an offset that differs from page to page.
    pub fn poke_scattered(&mut self, value: u8) -> Result<()> {
        self.call(&format!("scatter {value}")).map(drop)
    }

    /// Tell the worker that another process wrote to its page `i`.
    pub fn note_poke(&mut self, i: usize, offset: usize, value: u8) -> Result<()> {
        self.call(&format!("note {i} {offset} {value}")).map(drop)
    }

    /// Let the worker compare every byte of its region.
    pub fn verify(&mut self) -> Result<()> {
        self.call("verify").map(drop)
    }

    /// Let it compare pages `i..i + n`.
    pub fn verify_range(&mut self, i: usize, n: usize) -> Result<()> {
        self.call(&format!("verify {i} {n}")).map(drop)
    }

    pub fn advise(&mut self, i: usize, n: usize, advice: libc::c_int) -> Result<()> {
        self.call(&format!("advise {i} {n} {advice}")).map(drop)
    }

    pub fn dontneed(&mut self, i: usize, n: usize) -> Result<()> {
        self.call(&format!("dontneed {i} {n}")).map(drop)
    }

    pub fn protect(&mut self, i: usize, n: usize, prot: libc::c_int) -> Result<()> {
        self.call(&format!("protect {i} {n} {prot}")).map(drop)
    }

    /// Call `prctl(PR_SET_MEMORY_MERGE)` in the worker.
    pub fn set_memory_merge(&mut self, on: bool) -> Result<()> {
        self.call(&format!("prctl {}", u8::from(on))).map(drop)
    }

    pub fn memory_merge(&mut self) -> Result<bool> {
        Ok(self.call("getprctl")? == "1")
    }

    /// Let the worker fork a child that keeps the worker's present memory until the worker ends.
    pub fn fork(&mut self) -> Result<()> {
        self.call("fork").map(drop)
    }

    /// Let the child of [`Self::fork`] compare every byte.
    pub fn verify_child(&mut self) -> Result<()> {
        self.call("child verify").map(drop)
    }

    /// Replace the worker's program by a fresh one, which has no region.
    pub fn exec(&mut self) -> Result<()> {
        self.region = None;
        // The new program answers.
        self.call("exec").map(drop)
    }

    /// Let the worker run `command` with its `n`-th allocation failing. Return whether there was such an
    /// allocation, and the result of the command.
    pub fn failing(&mut self, n: u32, command: &str) -> Result<(bool, Result<String>)> {
        let reply = self.call(&format!("failing {n} {command}"))?;
        let (injected, outcome) = reply.split_once(' ').context("outcome")?;
        let outcome = match outcome.split_once(' ') {
            Some(("ok", value)) => Ok(value.to_string()),
            Some((_, what)) => Err(anyhow::anyhow!("{what}")),
            None => bail!("worker answers {reply:?}"),
        };
        Ok((injected == "true", outcome))
    }

    /// Let the worker exit by itself.
    pub fn exit(mut self) -> Result<()> {
        self.send("exit")?;
        match self.reap()? {
            Ended::Exit(0) => Ok(()),
            other => bail!("worker ended by {other:?}"),
        }
    }

    /// Wait until the worker has ended by itself.
    pub fn end(mut self) -> Result<Ended> {
        self.reap()
    }

    /// End the worker by SIGKILL.
    pub fn kill(mut self) -> Result<()> {
        sys::kill(self.pid, libc::SIGKILL).context("kill")?;
        match self.reap()? {
            Ended::Signal(libc::SIGKILL) => Ok(()),
            other => bail!("worker ended by {other:?}"),
        }
    }

    fn reap(&mut self) -> Result<Ended> {
        let end = Instant::now() + scaled(REPLY_LIMIT);
        loop {
            if let Some((_, how)) = sys::try_wait(self.pid).context("wait")? {
                self.gone = true;
                return Ok(how);
            }
            if Instant::now() > end {
                bail!("worker {} does not end", self.pid);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if !self.gone {
            let _ = sys::kill(self.pid, libc::SIGKILL);
            let _ = self.reap();
        }
    }
}

/// Verify every worker in turn.
pub fn verify_all(workers: &mut [Worker]) -> Result<()> {
    workers.iter_mut().try_for_each(Worker::verify)
}

/// Run the worker's side after an exec, talking over descriptor `fd`.
pub fn serve_inherited(fd: RawFd) -> i32 {
    // SAFETY: `exec_self` left the descriptor open for us, and nothing else uses it.
    let mut stream = unsafe { UnixStream::from_raw_fd(fd) };
    if writeln!(stream, "ok ready").is_err() {
        return 1;
    }
    serve(stream, None)
}

fn serve(stream: UnixStream, inherited: Option<&mut Region>) -> i32 {
    if sys::die_with_parent().is_err() {
        return 1;
    }
    let mut own = None;
    let mut child: Option<Worker> = None;
    let mut region = inherited;
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    loop {
        line.clear();
        match reader.read_line(&mut line) {
            Ok(n) if n > 0 => {}
            // The parent is gone.
            _ => return 0,
        }
        let mut words: Vec<&str> = line.split_whitespace().collect();
        let mut failing = None;
        if let ["failing", n, ..] = words[..] {
            failing = n.parse().ok().zip(Nth::own().ok());
            if failing.is_none() {
                return 1;
            }
            words.drain(..2);
        }
        if let Some((n, nth)) = &failing {
            if nth.set(*n).is_err() {
                return 1;
            }
        }
        let result = match words[..] {
            ["exit"] => return 0,
            ["exec"] => exec_self(reader.get_ref()),
            ["map", pages] => map(pages).map(|new| {
                own = Some(new);
                region = None;
                place(own.as_ref().expect("just set"))
            }),
            ["fork"] => match region.as_deref_mut().or(own.as_mut()) {
                Some(region) => Worker::inheriting(region).map(|new| {
                    child = Some(new);
                    String::new()
                }),
                None => Err(anyhow::anyhow!("no region")),
            },
            ["child", command] => match &mut child {
                Some(child) => child.call(command),
                None => Err(anyhow::anyhow!("no child")),
            },
            _ => obey(region.as_deref_mut().or(own.as_mut()), &words),
        };
        let injected = match failing.map(|(_, nth)| nth.end()) {
            None => None,
            Some(Ok(injected)) => Some(injected),
            Some(Err(_)) => return 1,
        };
        let mut reply = match result {
            Ok(value) => format!("ok {value}"),
            Err(e) => format!("err {e:#}"),
        };
        if let Some(injected) = injected {
            reply = format!("ok {injected} {reply}");
        }
        if writeln!(reader.get_mut(), "{reply}").is_err() {
            return 1;
        }
    }
}

fn exec_self(stream: &UnixStream) -> Result<String> {
    sys::keep_over_exec(stream)?;
    let error = Command::new("/proc/self/exe")
        .arg("worker")
        .arg(stream.as_raw_fd().to_string())
        .exec();
    Err(error).context("exec")
}

fn map(pages: &str) -> Result<Region> {
    Region::new(pages.parse()?)
}

fn place(region: &Region) -> String {
    format!("{} {}", region.addr(), region.pages())
}

/// Run one command, about the process or about `region`.
fn obey(region: Option<&mut Region>, words: &[&str]) -> Result<String> {
    match *words {
        ["prctl", on] => {
            sys::set_memory_merge(on == "1").context("PR_SET_MEMORY_MERGE")?;
            return Ok(String::new());
        }
        ["getprctl"] => return Ok(u8::from(sys::memory_merge()?).to_string()),
        _ => {}
    }
    let region = region.context("no region")?;
    match *words {
        ["fill", i, n, seed, step] => {
            region.fill(i.parse()?, n.parse()?, seed.parse()?, step.parse()?);
        }
        ["poke", i, n, offset, value] => {
            let (i, n): (usize, usize) = (i.parse()?, n.parse()?);
            let (offset, value) = (offset.parse()?, value.parse()?);
            (i..i + n).for_each(|k| region.poke(k, offset, value));
        }
        ["scatter", value] => region.poke_scattered(value.parse()?),
        ["note", i, offset, value] => {
            region.note_poke(i.parse()?, offset.parse()?, value.parse()?);
        }
        ["verify"] => region.verify()?,
        ["verify", i, n] => region.verify_range(i.parse()?, n.parse()?)?,
        ["advise", i, n, advice] => region.advise(i.parse()?, n.parse()?, advice.parse()?)?,
        ["dontneed", i, n] => region.dontneed(i.parse()?, n.parse()?)?,
        ["protect", i, n, prot] => region.protect(i.parse()?, n.parse()?, prot.parse()?)?,
        ["relocate"] => {
            region.relocate()?;
            return Ok(place(region));
        }
        ["truncate", keep] => {
            region.truncate(keep.parse()?)?;
            return Ok(place(region));
        }
        _ => bail!("not understood"),
    }
    Ok(String::new())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_obeys_and_reports_errors() {
        let mut worker = Worker::with_pages(2).unwrap();
        worker.fill(0, 2, 3, 1).unwrap();
        worker.poke(0, 2, 9, 1).unwrap();
        worker.verify().unwrap();
        worker.note_poke(1, 0, 0).unwrap();
        worker.note_poke(1, 1, 0).unwrap();
        assert!(worker.verify().is_err());
        assert!(worker.call("dance").is_err());
        worker.exit().unwrap();
    }

    #[test]
    fn a_child_holds_what_its_parent_held() {
        let mut region = Region::new(2).unwrap();
        region.fill(0, 2, 11, 1);
        let mut worker = Worker::inheriting(&mut region).unwrap();
        worker.verify().unwrap();
        worker.poke(0, 1, 0, 1).unwrap();
        worker.verify().unwrap();
        region.verify().unwrap();
        worker.kill().unwrap();
    }
}
