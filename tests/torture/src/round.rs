// SPDX-License-Identifier: GPL-2.0
//! A round: workers and tasks run for a time, and then all end.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{bail, Result};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rksm_test_lib::cgroup::Group;
use rksm_test_lib::sys::{self, Ended, Forked};
use rksm_test_lib::{module, proc};

use crate::arena::{Arena, Phase, Stand};
use crate::control::{self, knobs, pressure, Control, Task};
use crate::plan::{Allowed, Op, Who};
use crate::raw;
use crate::still::{self, Findings};
use crate::watch::{self, Sums, Watch};
use crate::worker::{self, STATUS_WRONG};

/// The parameters of a round.
#[derive(Clone, Copy)]
pub struct Config {
    pub seed: u64,
    pub seconds: u64,
    pub workers: u32,
    pub allowed: Allowed,
    /// How many times slower than a stock kernel this one is, for detecting stuck processes.
    pub slow: u64,
    /// Whether the round only warms up caches.
    pub warm: bool,
}

/// The results of a round, besides the counts in the arena.
pub struct Outcome {
    pub sums: Sums,
    pub split: i64,
    pub findings: Findings,
}

#[derive(Clone, Copy)]
enum Member {
    Worker { number: u32, life: u32 },
    Task { name: &'static str, number: u32 },
}

struct Round {
    config: Config,
    arena: &'static Arena,
    members: BTreeMap<libc::pid_t, Member>,
    rng: ChaCha8Rng,
    kill_at: u64,
    group: Option<Group>,
    findings: Findings,
    /// Whether all are to stand still, and the workers to start again after that.
    standing: bool,
    waiting: Vec<(u32, u32)>,
}

/// The seconds between two stands. A short round has one stand. Each takes longer than this interval, so a
/// long round has at most [`MAX_STANDS`]. In the debug kernel one takes minutes, so they are rarer there, and
/// a warm-up round has none.
const STAND_EVERY: u64 = 10;
const STAND_EVERY_SLOW: u64 = 30;
const MAX_STANDS: u64 = 24;
/// After how many looks to report processes that have not reached a stand: a minute at least. At the fifth
/// report, the run fails.
const STAND_LOOKS: u64 = 12_000;

/// A process that all others wait for.
enum Missing {
    Owner(usize),
    Task(&'static str, u32),
}

/// Run a round. `findings` are those of the rounds before.
pub fn run(
    config: Config,
    arena: &'static Arena,
    tasks: &[&'static Task],
    findings: Findings,
) -> Result<Outcome> {
    arena.stop.store(0, Ordering::Relaxed);
    arena.set_stand(None);
    arena.seed.store(config.seed, Ordering::Relaxed);
    arena.workers.store(config.workers, Ordering::Relaxed);
    arena.allowed.store(config.allowed.0, Ordering::Relaxed);
    arena.clear_counts();
    module::ensure_loaded(true)?;
    knobs::calm();
    rksm_test_lib::engine::write("run", 1)?;
    let split = proc::vmstat("cow_ksm").unwrap_or(0);

    let who = Who {
        seed: config.seed,
        number: control::FIRST - 1,
        life: 0,
        child: 0,
    };
    let mut round = Round {
        config,
        arena,
        members: BTreeMap::new(),
        rng: who.rng(),
        kill_at: raw::now() + 1000,
        group: pressure::workers_group()?,
        findings,
        standing: false,
        waiting: Vec::new(),
    };
    for number in 0..config.workers {
        round.start_worker(number, 0)?;
    }
    for (i, task) in tasks.iter().enumerate() {
        round.start_task(task, control::FIRST + i as u32)?;
    }
    let sums = round.supervise();
    round.end_all();
    if let Some(group) = round.group.take() {
        group.remove()?;
    }
    Ok(Outcome {
        sums: sums?,
        split: proc::vmstat("cow_ksm").unwrap_or(0) - split,
        findings: round.findings,
    })
}

impl Round {
    fn who(&self, number: u32, life: u32) -> Who {
        Who {
            seed: self.config.seed,
            number,
            life,
            child: 0,
        }
    }

    fn start_worker(&mut self, number: u32, life: u32) -> Result<()> {
        let who = self.who(number, life);
        // The ledger is in use from now on, not only once the process gets to it.
        self.arena.blocks[number as usize].start();
        match sys::fork()? {
            Forked::Child => sys::exit_now(worker::main(self.arena, who, self.config.allowed)),
            Forked::Parent(pid) => {
                if let Some(group) = &self.group {
                    group.enter(pid as u32)?;
                }
                self.members.insert(pid, Member::Worker { number, life });
                Ok(())
            }
        }
    }

    fn start_task(&mut self, task: &'static Task, number: u32) -> Result<()> {
        let who = self.who(number, 0);
        match sys::fork()? {
            Forked::Child => {
                let mut control = Control::new(self.arena, who, self.config.allowed);
                let result = sys::die_with_parent()
                    .map_err(anyhow::Error::from)
                    .and_then(|()| (task.work)(&mut control));
                if let Err(e) = result {
                    self.arena.fail();
                    raw::say(&format!("# FAULT in task {}: {e:#}\n", task.name));
                    sys::exit_now(STATUS_WRONG);
                }
                sys::exit_now(0)
            }
            Forked::Parent(pid) => {
                let name = task.name;
                self.members.insert(pid, Member::Task { name, number });
                Ok(())
            }
        }
    }

    /// Supervise until the time is over and all processes have ended.
    fn supervise(&mut self) -> Result<Sums> {
        let mut end = raw::now() + self.config.seconds * 1000;
        let stands = self.stands();
        let pause = self.config.seconds * 1000 / (stands + 1);
        let mut stand_at = raw::now() + pause;
        let mut number = 0;
        let (mut watch, mut looks) = (Watch::new(self.arena), 0);
        let mut sums = Sums::default();
        let mut stopped = None;
        while !self.members.is_empty() {
            let now = raw::now();
            if now >= end || self.arena.failed() {
                self.arena.stop.store(1, Ordering::Relaxed);
                stopped.get_or_insert(now);
            }
            sums.sample();
            self.reap()?;
            if now >= self.kill_at && stopped.is_none() {
                self.kill_one();
            }
            self.look_for_stuck(&mut watch)?;
            if now >= stand_at && stopped.is_none() {
                number += 1;
                self.stand_still(number, &mut watch)?;
                sums.sample();
                // No process works in that time.
                let took = raw::now() - now;
                self.findings.millis += took;
                end += took;
                stand_at = raw::now() + pause;
            }
            if stopped.is_some() {
                looks += 1;
            }
            // At least ten minutes, and longer when this process gets little CPU time.
            if looks > 24_000 * self.config.slow {
                for pid in self.members.keys() {
                    raw::say(&format!(
                        "# STUCK at the end:\n{}",
                        watch::whereabouts(*pid as u32)
                    ));
                }
                bail!("{} processes do not end", self.members.len());
            }
            std::thread::sleep(Duration::from_millis(25));
        }
        Ok(sums)
    }

    /// Return the number of stands in the round.
    fn stands(&self) -> u64 {
        let Config {
            seconds,
            slow,
            warm,
            ..
        } = self.config;
        match (slow, warm) {
            (1, _) => (seconds / STAND_EVERY).clamp(1, MAX_STANDS),
            (_, true) => 0,
            (_, false) => (seconds / STAND_EVERY_SLOW).clamp(1, MAX_STANDS),
        }
    }

    fn look_for_stuck(&self, watch: &mut Watch) -> Result<()> {
        let stuck = watch.look(self.arena, self.config.slow);
        for who in &stuck {
            raw::say(&format!("# STUCK: {who}\n"));
        }
        if !stuck.is_empty() {
            bail!("{} processes are stuck", stuck.len());
        }
        Ok(())
    }

    /// Let all processes stand still, and check which pages are merged and listed.
    fn stand_still(&mut self, number: u32, watch: &mut Watch) -> Result<()> {
        self.standing = true;
        let (arena, slow) = (self.arena, self.config.slow);
        for phase in Phase::ALL {
            let stand = Stand { number, phase };
            arena.set_stand(Some(stand));
            self.wait_for_all(stand, watch)?;
            if !arena.failed() {
                still::look(arena, phase, slow, &mut self.findings)?;
            }
        }
        arena.set_stand(None);
        self.standing = false;
        for (number, life) in std::mem::take(&mut self.waiting) {
            self.start_worker(number, life)?;
        }
        Ok(())
    }

    /// Wait until all have reached a stand, unless the round fails.
    fn wait_for_all(&mut self, stand: Stand, watch: &mut Watch) -> Result<()> {
        let mut looks = 0;
        while !self.arena.failed() {
            let missing = self.missing(stand);
            if missing.is_empty() {
                break;
            }
            looks += 1;
            let many = looks % (STAND_LOOKS * self.config.slow) == 0;
            if many {
                for who in &missing {
                    raw::say(&format!("# NOT STANDING: {}", self.describe(who)));
                }
            }
            if many && looks > 4 * STAND_LOOKS * self.config.slow {
                bail!("{} processes do not reach a stand", missing.len());
            }
            self.reap()?;
            // As often as outside a stand.
            if looks % 5 == 0 {
                self.look_for_stuck(watch)?;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Return the processes that have neither reached the stand nor ended.
    fn missing(&self, stand: Stand) -> Vec<Missing> {
        let owners = self.arena.blocks.iter().enumerate().filter(|(_, block)| {
            let pid = block.pid.load(Ordering::Relaxed);
            block.in_use() && !block.has_come_to(stand) && !(pid != 0 && still::is_gone(pid))
        });
        let tasks = self.members.iter().filter_map(|(&pid, member)| {
            let Member::Task { name, number } = *member else {
                return None;
            };
            let task = (number - control::FIRST) as usize;
            let pid = pid as u32;
            let there = self.arena.task_has_come_to(task, stand) || still::is_gone(pid);
            (!there).then_some(Missing::Task(name, pid))
        });
        owners
            .map(|(id, _)| Missing::Owner(id))
            .chain(tasks)
            .collect()
    }

    fn describe(&self, who: &Missing) -> String {
        match *who {
            Missing::Owner(id) => {
                let block = &self.arena.blocks[id];
                let pid = block.pid.load(Ordering::Relaxed);
                let place = match pid {
                    0 => "#   there is no such process\n".to_string(),
                    pid => watch::whereabouts(pid),
                };
                format!(
                    "owner {id} (pid {pid}, child {}); its last steps: {}\n{place}",
                    block.child.load(Ordering::Relaxed),
                    block.last_steps(8)
                )
            }
            Missing::Task(name, pid) => {
                format!("task {name} (pid {pid})\n{}", watch::whereabouts(pid))
            }
        }
    }

    fn kill_one(&mut self) {
        let pause = self.rng.random_range(200..2500);
        self.kill_at = raw::now() + pause;
        let number = self.rng.random_range(0..self.config.workers);
        let pid = self.members.iter().find_map(|(&pid, m)| match m {
            Member::Worker { number: n, .. } if *n == number => Some(pid),
            _ => None,
        });
        if let Some(pid) = pid.filter(|_| self.config.allowed.has(Op::Kill)) {
            self.arena.blocks[number as usize]
                .doomed
                .store(1, Ordering::Relaxed);
            if sys::kill(pid, libc::SIGKILL).is_ok() {
                self.arena.count(Op::Kill, 0);
            }
        }
    }

    fn reap(&mut self) -> Result<()> {
        while let Ok(Some((pid, ended))) = sys::try_wait(-1) {
            match self.members.remove(&pid) {
                Some(Member::Worker { number, life }) => self.worker_ended(number, life, ended)?,
                Some(Member::Task { name, .. }) => {
                    if !matches!(ended, Ended::Exit(0 | STATUS_WRONG)) {
                        self.fault(&format!("task {name} ended by {ended:?}"));
                    }
                }
                None => self.orphan_ended(pid as u32, ended),
            }
        }
        Ok(())
    }

    fn worker_ended(&mut self, number: u32, life: u32, ended: Ended) -> Result<()> {
        let block = &self.arena.blocks[number as usize];
        let doomed = block.doomed.load(Ordering::Relaxed) != 0;
        self.arena.shared_pid[number as usize].store(0, Ordering::Release);
        match ended {
            Ended::Exit(0 | STATUS_WRONG) => {}
            Ended::Signal(libc::SIGKILL) if doomed => {}
            _ => self.fault(&format!(
                "process {number} life {life} ended by {ended:?}; its last steps: {}",
                block.last_steps(24)
            )),
        }
        self.arena
            .give_up_children(block.pid.load(Ordering::Relaxed));
        self.arena.bury(number as u8);
        if self.standing {
            self.waiting.push((number, life + 1));
        } else if !self.arena.stopping() {
            self.start_worker(number, life + 1)?;
        }
        Ok(())
    }

    /// Handle the end of a child whose parent is gone.
    fn orphan_ended(&self, pid: u32, ended: Ended) {
        let id = self.arena.block_of(pid);
        let (doomed, last) = id.map_or((false, String::new()), |id| {
            let block = &self.arena.blocks[id as usize];
            let doomed = block.doomed.load(Ordering::Relaxed) != 0;
            (doomed, block.last_steps(24))
        });
        match ended {
            Ended::Exit(0 | STATUS_WRONG) => {}
            // Orphans without a ledger serve a userfaultfd, and die with their parent.
            Ended::Signal(libc::SIGKILL) if doomed || id.is_none() => {}
            _ => self.fault(&format!(
                "orphan {pid} ended by {ended:?}; its last steps: {last}"
            )),
        }
        if let Some(id) = id {
            self.arena.bury(id);
        }
    }

    fn fault(&self, what: &str) {
        self.arena.fail();
        raw::say(&format!("# FAULT: {what}\n"));
    }

    /// Kill all remaining processes, and wait for orphans.
    fn end_all(&mut self) {
        self.arena.stop.store(1, Ordering::Relaxed);
        for &pid in self.members.keys() {
            let _ = sys::kill(pid, libc::SIGKILL);
        }
        for _ in 0..60_000 * self.config.slow {
            match sys::try_wait(-1) {
                Ok(Some((pid, ended))) => {
                    if self.members.remove(&pid).is_none() {
                        self.orphan_ended(pid as u32, ended);
                    }
                }
                Ok(None) => std::thread::sleep(Duration::from_millis(10)),
                Err(_) => return,
            }
        }
        for pid in proc::children().unwrap_or_default() {
            raw::say(&format!(
                "# LEFT: {pid}\n{}# its last steps: {}\n",
                watch::whereabouts(pid),
                self.arena.block_of(pid).map_or(String::new(), |id| {
                    self.arena.blocks[id as usize].last_steps(8)
                })
            ));
        }
        self.fault("processes are left that do not end");
    }
}
