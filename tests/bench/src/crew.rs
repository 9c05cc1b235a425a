// SPDX-License-Identifier: GPL-2.0
//! The processes of a running workload, from outside.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{bail, ensure, Context, Result};

use crate::workload::Plan;

pub const SEED: u64 = 0x6b73_6d20;

struct Worker {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Worker {
    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        ensure!(
            self.stdout.read_line(&mut line)? > 0,
            "a process of the workload ended"
        );
        Ok(line.trim_end().to_string())
    }

    fn ask(&mut self, command: &str) -> Result<()> {
        writeln!(self.stdin, "{command}")?;
        Ok(())
    }
}

/// The processes of a workload. They end when this is dropped.
pub struct Crew {
    workers: Vec<Worker>,
    pids: Vec<u32>,
    round: u64,
}

impl Crew {
    /// Starts the processes of workload `name`; returns when all pages are
    /// filled and registered, and everybody sleeps.
    pub fn start(name: &str, plan: &Plan) -> Result<Self> {
        let mut crew = Self {
            workers: Vec::new(),
            pids: Vec::new(),
            round: 0,
        };
        for (index, process) in plan.processes.iter().enumerate() {
            let mut child = Command::new(std::env::current_exe()?)
                .args(["worker", name, &index.to_string(), &SEED.to_string()])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .context("starting a worker")?;
            let stdin = child.stdin.take().context("stdin")?;
            let stdout = BufReader::new(child.stdout.take().context("stdout")?);
            let mut worker = Worker {
                child,
                stdin,
                stdout,
            };
            for _ in 0..=process.children.len() {
                let line = worker.line()?;
                let Some(("ready", pid)) = line.split_once(' ') else {
                    bail!("a worker said {line:?}");
                };
                crew.pids.push(pid.parse()?);
            }
            crew.workers.push(worker);
        }
        Ok(crew)
    }

    pub fn pids(&self) -> &[u32] {
        &self.pids
    }

    fn all(&mut self, command: &str, answer: &str) -> Result<()> {
        for worker in &mut self.workers {
            worker.ask(command)?;
            let line = worker.line()?;
            ensure!(line == answer, "a worker said {line:?} to {command:?}");
        }
        Ok(())
    }

    /// Has the volatile pages written anew.
    pub fn rewrite(&mut self) -> Result<()> {
        self.round += 1;
        self.all(&format!("rewrite {}", self.round), "rewritten")
    }

    /// Has everybody compare every page with what was written last.
    pub fn verify(&mut self) -> Result<()> {
        self.all("verify", "verified")
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        for worker in &mut self.workers {
            // Gone already, if that fails.
            let _ = worker.child.kill();
            let _ = worker.child.wait();
        }
        // Forked ones die with the first; wait until they have.
        for pid in &self.pids {
            let path = format!("/proc/{pid}");
            for _ in 0..1000 {
                if !std::path::Path::new(&path).exists() {
                    break;
                }
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
        }
    }
}
