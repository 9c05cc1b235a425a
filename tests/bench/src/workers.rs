// SPDX-License-Identifier: GPL-2.0
//! The processes of a running workload, controlled from outside.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{bail, ensure, Context, Result};

use crate::pages::Survey;
use crate::qmp::Guest;
use crate::workload::plan;

pub const SEED: u64 = 0x6b73_6d20;
/// The name of the workload of real programs.
pub const REAL: &str = "real";
const PYTHONS: usize = 8;
pub const GUESTS: usize = 4;

/// Return the directory in `variable`, which scripts/bench sets for the workload `real`.
fn path_of(variable: &str) -> Result<PathBuf> {
    std::env::var_os(variable)
        .map(PathBuf::from)
        .with_context(|| format!("{variable} is not set: scripts/bench does that"))
}

/// A process that answers each command with a line.
struct Worker {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Worker {
    fn start(command: &mut Command) -> Result<Self> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {:?}", command.get_program()))?;
        let stdin = child.stdin.take().context("stdin")?;
        let stdout = BufReader::new(child.stdout.take().context("stdout")?);
        Ok(Self {
            child,
            stdin,
            stdout,
        })
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        ensure!(
            self.stdout.read_line(&mut line)? > 0,
            "a process of the workload ended"
        );
        Ok(line.trim_end().to_string())
    }

    /// Wait for a line that begins with `word`, and return the next word.
    fn expect(&mut self, word: &str) -> Result<String> {
        let line = self.line()?;
        let mut words = line.split(' ');
        ensure!(
            words.next() == Some(word),
            "a process of the workload said {line:?} instead of {word:?}"
        );
        Ok(words.next().unwrap_or("").to_string())
    }

    fn ask(&mut self, command: &str, answer: &str) -> Result<()> {
        writeln!(self.stdin, "{command}")?;
        self.expect(answer).map(drop)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // If this fails, the process is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Facts about a workload, known before the engine starts.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    pub pages: u64,
    pub expected: u64,
    pub use_zero_pages: bool,
    pub is_volatile: bool,
}

/// The processes of a workload. They end when this is dropped.
pub struct Workers {
    workers: Vec<Worker>,
    guests: Vec<Guest>,
    pids: Vec<u32>,
    facts: Facts,
    round: u64,
    /// The digest of the small guests' memory at the start.
    digest: Option<u64>,
}

impl Workers {
    /// Start the processes of workload `name`. Return when all pages are filled and registered, and all
    /// processes sleep.
    pub fn start(name: &str) -> Result<Self> {
        if name == REAL {
            Self::real()
        } else {
            Self::generated(name)
        }
    }

    fn generated(name: &str) -> Result<Self> {
        let plan = plan(name, 1).with_context(|| format!("there is no workload {name}"))?;
        let mut this = Self {
            workers: Vec::new(),
            guests: Vec::new(),
            pids: Vec::new(),
            facts: Facts {
                pages: plan.pages(),
                expected: plan.expected_sharing(),
                use_zero_pages: plan.use_zero_pages,
                is_volatile: plan.is_volatile(),
            },
            round: 0,
            digest: None,
        };
        for (index, process) in plan.processes.iter().enumerate() {
            let mut command = Command::new(std::env::current_exe()?);
            command.args(["worker", name, &index.to_string(), &SEED.to_string()]);
            let mut worker = Worker::start(&mut command)?;
            for _ in 0..=process.children.len() {
                this.pids.push(worker.expect("ready")?.parse()?);
            }
            this.workers.push(worker);
        }
        Ok(this)
    }

    /// Start Python processes that hold their library's text, and restore saved guests.
    fn real() -> Result<Self> {
        let holder = path_of("RKSM_BENCH_HOLDER")?;
        let guests_dir = path_of("RKSM_BENCH_GUESTS")?;
        let launcher = std::env::current_exe()?.with_file_name("mergeable-exec");
        let mut workers = Vec::new();
        for number in 0..PYTHONS {
            let mut command = Command::new(&launcher);
            command
                .arg("python3")
                .arg(&holder)
                .arg(number.to_string())
                // Otherwise the same strings hash to different places in each process.
                .env("PYTHONHASHSEED", "0");
            workers.push(Worker::start(&mut command)?);
        }
        for worker in &mut workers {
            worker.expect("ready")?;
        }
        let guests = restore_all(&guests_dir)?;
        let mut pids: Vec<u32> = workers.iter().map(|w| w.child.id()).collect();
        pids.extend(guests.iter().map(Guest::pid));
        let survey = Survey::take(&pids)?;
        let mut this = Self {
            workers,
            guests,
            pids,
            facts: Facts {
                pages: survey.pages(),
                expected: survey.expected_sharing(),
                use_zero_pages: false,
                is_volatile: false,
            },
            round: 0,
            digest: None,
        };
        this.digest = Some(this.guests_digest()?);
        Ok(this)
    }

    fn guests_digest(&self) -> Result<u64> {
        let pids: Vec<u32> = self.guests.iter().map(Guest::pid).collect();
        Ok(Survey::take(&pids)?.digest())
    }

    pub fn pids(&self) -> &[u32] {
        &self.pids
    }

    pub fn facts(&self) -> Facts {
        self.facts
    }

    /// Let the workers rewrite the volatile pages.
    pub fn rewrite(&mut self) -> Result<()> {
        self.round += 1;
        for worker in &mut self.workers {
            worker.ask(&format!("rewrite {}", self.round), "rewritten")?;
        }
        Ok(())
    }

    /// Let all processes compare every page with what was written last.
    pub fn verify(&mut self) -> Result<()> {
        for worker in &mut self.workers {
            worker.ask("verify", "verified")?;
        }
        if let Some(before) = self.digest {
            if self.guests_digest()? != before {
                bail!("the memory of a paused guest has changed");
            }
        }
        Ok(())
    }
}

fn restore_all(dir: &Path) -> Result<Vec<Guest>> {
    (1..=GUESTS).map(|n| Guest::restore(dir, n)).collect()
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.workers.clear();
        self.guests.clear();
        // Forked children die with their first process; wait until they have.
        for pid in &self.pids {
            let path = format!("/proc/{pid}");
            for _ in 0..1000 {
                if !Path::new(&path).exists() {
                    break;
                }
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
        }
    }
}
