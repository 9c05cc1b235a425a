// SPDX-License-Identifier: GPL-2.0
//! Small guests under QEMU. They are booted and saved outside, and restored, paused, inside the benchmark's
//! guest.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use serde_json::{json, Value};

/// The line that a small guest prints when it is ready.
const READY: &str = "guest: ready";
const LIMIT: Duration = Duration::from_secs(300);

/// A QEMU process with a 64 MiB guest.
pub struct Guest {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Guest {
    /// Start QEMU with the kernel and the initramfs in `dir`, as guest `number`. A saved guest has to be
    /// restored with the same arguments.
    fn start(dir: &Path, number: usize, more: &[&str]) -> Result<Self> {
        let mut child = Command::new("qemu-system-x86_64")
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-machine", "pc,accel=tcg,mem-merge=on", "-cpu", "qemu64"])
            .args(["-m", "64M", "-qmp", "stdio"])
            .arg("-kernel")
            .arg(dir.join("bzImage"))
            .arg("-initrd")
            .arg(dir.join("initramfs"))
            .args(["-append", &format!("console=ttyS0 quiet guest={number}")])
            .args(more)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("starting QEMU")?;
        let stdin = child.stdin.take().context("stdin")?;
        let stdout = BufReader::new(child.stdout.take().context("stdout")?);
        let mut guest = Self {
            child,
            stdin,
            stdout,
        };
        guest.command("qmp_capabilities", json!({}))?;
        Ok(guest)
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Run one QMP command and return its result. Events are skipped.
    fn command(&mut self, name: &str, arguments: Value) -> Result<Value> {
        let command = json!({ "execute": name, "arguments": arguments });
        writeln!(self.stdin, "{command}")?;
        loop {
            let mut line = String::new();
            ensure!(self.stdout.read_line(&mut line)? > 0, "QEMU ended");
            let mut answer: Value = serde_json::from_str(&line).context("QMP")?;
            if let Some(error) = answer.get("error") {
                bail!("QEMU says to {name}: {error}");
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
        }
    }

    fn wait(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> Result<bool>) -> Result<()> {
        let end = Instant::now() + LIMIT;
        while !done(self)? {
            ensure!(Instant::now() < end, "no {what} within {LIMIT:?}");
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    /// Restore guest `number` from `dir`, and leave it paused.
    pub fn restore(dir: &Path, number: usize) -> Result<Self> {
        let from = format!("file:{}", saved(dir, number).display());
        let mut guest = Self::start(dir, number, &["-S", "-serial", "null", "-incoming", &from])?;
        guest.wait("restored guest", |guest| {
            let status = guest.command("query-status", json!({}))?;
            match status["status"].as_str() {
                Some("inmigrate") => Ok(false),
                Some("paused" | "prelaunch" | "postmigrate") => Ok(true),
                other => bail!("the restored guest is {other:?}"),
            }
        })?;
        Ok(guest)
    }

    /// Boot guest `number` and save it to `dir` when it is ready.
    pub fn save(dir: &Path, number: usize) -> Result<()> {
        let log = dir.join(format!("guest-{number}.log"));
        let serial = format!("file:{}", log.display());
        let mut guest = Self::start(dir, number, &["-serial", &serial])?;
        guest.wait("ready guest", |_| {
            let text = fs::read(&log).unwrap_or_default();
            Ok(String::from_utf8_lossy(&text).contains(READY))
        })?;
        guest.command("stop", json!({}))?;
        let file = saved(dir, number);
        guest.command(
            "migrate",
            json!({ "uri": format!("file:{}", file.display()) }),
        )?;
        guest.wait("saved guest", |guest| {
            let state = guest.command("query-migrate", json!({}))?;
            match state["status"].as_str() {
                Some("completed") => Ok(true),
                Some("failed" | "cancelled") => bail!("QEMU could not save: {state}"),
                _ => Ok(false),
            }
        })
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // If this fails, the process is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Return the file in which guest `number` is saved.
fn saved(dir: &Path, number: usize) -> PathBuf {
    dir.join(format!("guest-{number}"))
}
