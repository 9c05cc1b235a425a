// SPDX-License-Identifier: GPL-2.0
//! Many more KVM guests than there is memory for, with in-tree KSM and with rksm.
//!
//! Guests are started one after the other, as soon as there is room for the next one. Each verifies its memory
//! when all are running and merged, while a tenth of all pages is rewritten, and at the end.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};
use std::{env, fs, io, ptr};

use anyhow::{bail, ensure, Context, Result};
use rksm_test_lib::kvm::{self, all_obey, Config, Guest};
use rksm_test_lib::{engine, module, proc};

const USAGE: &str = "\
usage: rksm-overcommit [OPTION…]
  --guests N      guests to run (52)
  --mib N         memory of each, in MiB (64)
  --factor F      memory of all guests by the memory that there is for them (3.25)
  --engine WHICH  ksm, rksm or both (both)
  --until-full    start guests until there is no room for another one
  --curve FILE    write the memory in use after each guest, as CSV";

/// The shares of a guest's pages, in percent: common to all guests, zeroes, and repeated in the guest.
const COMMON: u32 = 70;
const ZERO: u32 = 8;
const REPEATED: u32 = 5;

/// The engines' pace, the same for both: it lets ksmd use a core. rksm keeps its pause between passes.
const PAGES_TO_SCAN: u32 = 20_000;
const SLEEP_MILLISECS: u32 = 10;

/// Memory that stays free, so that neither the host nor a monitor runs out of it.
const RESERVE_MIB: i64 = 24;
/// How long to wait for room for one guest.
const ROOM_LIMIT: Duration = Duration::from_secs(240);
/// Merging has settled when it does not progress for this long.
const STILL: Duration = Duration::from_secs(8);
const SETTLE_LIMIT: Duration = Duration::from_secs(400);

#[derive(Clone)]
struct Options {
    guests: u32,
    mib: usize,
    factor: f64,
    engine: String,
    until_full: bool,
    curve: Option<PathBuf>,
    /// Whether this is the process that measures the engine, see [`measure`].
    worker: bool,
}

fn options() -> Result<Options> {
    let mut options = Options {
        guests: 52,
        mib: 64,
        factor: 3.25,
        engine: "both".into(),
        until_full: false,
        curve: None,
        worker: false,
    };
    let mut args = env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} wants a value"));
        match arg.as_str() {
            "--guests" => options.guests = value()?.parse().context("--guests")?,
            "--mib" => options.mib = value()?.parse().context("--mib")?,
            "--factor" => options.factor = value()?.parse().context("--factor")?,
            "--engine" => options.engine = value()?,
            "--until-full" => options.until_full = true,
            "--curve" => options.curve = Some(value()?.into()),
            "--worker" => options.worker = true,
            _ => bail!("unknown option {arg}\n{USAGE}"),
        }
    }
    ensure!(options.guests >= 2 && options.factor > 0.0, "{USAGE}");
    Ok(options)
}

fn available_mib() -> Result<i64> {
    Ok(proc::meminfo("MemAvailable")? / 1024)
}

/// Locked memory that nobody else can use, so that the guests have as little as they should.
struct Ballast;

impl Ballast {
    fn hold(mib: i64) -> Result<Self> {
        let bytes = usize::try_from(mib).unwrap_or(0) << 20;
        if bytes == 0 {
            return Ok(Self);
        }
        // SAFETY: A new mapping, at an address that the kernel chooses. It stays until the process exits.
        let addr = unsafe {
            libc::mmap(
                ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE,
                -1,
                0,
            )
        };
        ensure!(
            addr != libc::MAP_FAILED,
            "mmap: {}",
            io::Error::last_os_error()
        );
        // SAFETY: The range is the mapping made above.
        let ret = unsafe { libc::mlock(addr, bytes) };
        ensure!(ret == 0, "mlock: {}", io::Error::last_os_error());
        Ok(Self)
    }
}

/// Pages that are merged, zeroes included: these are mappings that take no memory of their own.
fn saved_pages() -> Result<u64> {
    Ok(engine::read("pages_sharing")? + engine::read("ksm_zero_pages")?)
}

/// One engine with its guests.
struct Run {
    began: Instant,
    options: Options,
    guests: Vec<Guest>,
    thread: u32,
    /// Available before the first guest.
    available: i64,
    curve: String,
}

impl Run {
    fn say(&self, what: &str) -> Result<()> {
        println!(
            "{:6.1} s: {what}; {} MiB in use, {} pages saved, {:.1} s of {}",
            self.began.elapsed().as_secs_f64(),
            self.used()?,
            saved_pages()?,
            self.cpu()?,
            engine::thread_name(),
        );
        Ok(())
    }

    fn used(&self) -> Result<i64> {
        Ok(self.available - available_mib()?)
    }

    fn cpu(&self) -> Result<f64> {
        Ok(proc::cpu_time(self.thread)?.as_secs_f64())
    }

    /// Wait until there is room for `mib` MiB. Return whether there is.
    fn room_for(&self, mib: i64) -> Result<bool> {
        let began = Instant::now();
        while available_mib()? < mib + RESERVE_MIB {
            if began.elapsed() > ROOM_LIMIT {
                return Ok(false);
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        Ok(true)
    }

    fn start_guests(&mut self) -> Result<()> {
        let Options {
            guests,
            mib,
            until_full,
            ..
        } = self.options;
        while until_full || self.guests.len() < guests as usize {
            let number = self.guests.len() as u32 + 1;
            if !self.room_for(mib as i64)? {
                self.say(&format!("no room for guest {number}"))?;
                ensure!(
                    until_full,
                    "there is no room for guest {number} of {guests}"
                );
                break;
            }
            let mut guest = Guest::start(&Config {
                common: COMMON,
                zero: ZERO,
                repeated: REPEATED,
                ..Config::new(number, mib)
            })?;
            guest.filled()?;
            self.guests.push(guest);
            let at = self.began.elapsed().as_secs_f64();
            self.curve += &format!("{number},{at:.1},{},{}\n", self.used()?, saved_pages()?);
            if number % self.options.guests.div_ceil(8) == 0 {
                self.say(&format!("{number} guests"))?;
            }
        }
        Ok(())
    }

    /// Wait until merging makes no progress any more. Return when it made the last.
    fn settle(&self) -> Result<Instant> {
        let began = Instant::now();
        let (mut last, mut since) = (saved_pages()?, began);
        while since.elapsed() < STILL {
            ensure!(began.elapsed() < SETTLE_LIMIT, "merging does not settle");
            std::thread::sleep(Duration::from_millis(500));
            let now = saved_pages()?;
            if now.abs_diff(last) > 16.max(now / 500) {
                (last, since) = (now, Instant::now());
            }
        }
        Ok(since)
    }

    /// Have a tenth of all pages rewritten, by as many guests at a time as there is room for. Others verify
    /// meanwhile.
    fn rewrite(&mut self) -> Result<()> {
        let each = self.options.mib as i64 / 10 + 1;
        let mut at = 0;
        while at < self.guests.len() {
            ensure!(self.room_for(each)?, "there is no room to write to pages");
            let room = ((available_mib()? - RESERVE_MIB) / each).clamp(1, 8) as usize;
            let end = self.guests.len().min(at + room);
            // One guest that does not write verifies meanwhile, if there is any.
            let (before, rest) = self.guests.split_at_mut(at);
            let (writes, after) = rest.split_at_mut(end - at);
            let mut other = after.first_mut().or(before.first_mut());
            if let Some(other) = &mut other {
                other.order("verify")?;
            }
            all_obey(writes, "rewrite 10")?;
            if let Some(other) = &mut other {
                other.answered("verify")?;
            }
            at = end;
        }
        Ok(())
    }

    fn results(&mut self) -> Result<BTreeMap<&'static str, String>> {
        let mut results = BTreeMap::new();
        let mut note = |name, value: String| {
            results.insert(name, value);
        };
        self.start_guests()?;
        let count = self.guests.len();
        let up = self.began.elapsed();
        self.say(&format!("all {count} guests are running"))?;
        let settled = self.settle()?.duration_since(self.began).as_secs_f64();
        self.say("settled")?;
        note("guests", count.to_string());
        note("offered_mib", (count * self.options.mib).to_string());
        note("available_mib", self.available.to_string());
        note("up_secs", format!("{:.1}", up.as_secs_f64()));
        note("settled_secs", format!("{settled:.1}"));
        note("cpu_secs", format!("{:.1}", self.cpu()?));
        note("used_mib", self.used()?.to_string());
        note("pages_shared", engine::read("pages_shared")?.to_string());
        note("pages_sharing", engine::read("pages_sharing")?.to_string());
        note("saved_mib", (saved_pages()? / 256).to_string());
        let mut pss = Vec::new();
        for guest in &self.guests {
            pss.push(pss_kib(guest.pid())? as f64 / 1024.0);
        }
        note("pss_mib_sum", format!("{:.0}", pss.iter().sum::<f64>()));
        note(
            "pss_mib_max",
            format!("{:.1}", pss.iter().fold(0.0, |a: f64, &b| a.max(b))),
        );

        let began = Instant::now();
        all_obey(&mut self.guests, "verify")?;
        note(
            "verify_secs",
            format!("{:.1}", began.elapsed().as_secs_f64()),
        );
        self.say("all have verified their memory")?;
        let began = Instant::now();
        self.rewrite()?;
        note(
            "rewrite_secs",
            format!("{:.1}", began.elapsed().as_secs_f64()),
        );
        self.say("a tenth of all pages is rewritten")?;
        self.settle()?;
        self.say("settled again")?;
        note("used_again_mib", self.used()?.to_string());
        all_obey(&mut self.guests, "verify")?;
        self.say("all have verified their memory")?;
        note("verified", count.to_string());
        Ok(results)
    }
}

/// The memory of a process, with its part of shared pages.
fn pss_kib(pid: u32) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).context("smaps_rollup")?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("Pss:"))
        .context("Pss")?;
    line.trim().trim_end_matches(" kB").parse().context("Pss")
}

/// Measure the engine that the environment names, and print the results.
fn measure(options: Options) -> Result<()> {
    let wanted = f64::from(options.guests) * options.mib as f64 / options.factor;
    module::ensure_loaded(!engine::is_in_tree())?;
    engine::reset()?;
    let too_much = available_mib()? - wanted as i64;
    ensure!(
        too_much >= 0,
        "{wanted:.0} MiB are to be available, {too_much} more than there are"
    );
    let _ballast = Ballast::hold(too_much)?;
    engine::write("pages_to_scan", PAGES_TO_SCAN)?;
    engine::write("sleep_millisecs", SLEEP_MILLISECS)?;
    if !engine::is_in_tree() {
        engine::write("pass_millisecs", 1000)?;
    }
    let thread = proc::kernel_thread(engine::thread_name())?.context("no scanning thread")?;
    let curve = options.curve.clone();
    let mut run = Run {
        began: Instant::now(),
        options,
        guests: Vec::new(),
        thread,
        available: available_mib()?,
        curve: "guests,seconds,used_mib,saved_pages\n".into(),
    };
    println!("{} MiB are available for guests", run.available);
    engine::write("run", 1)?;
    let results = run.results()?;
    if let Some(file) = curve {
        fs::write(&file, &run.curve).with_context(|| file.display().to_string())?;
    }
    drop(run);
    engine::reset()?;
    engine::check_clean()?;
    for (name, value) in results {
        println!("result {name} {value}");
    }
    Ok(())
}

/// Measure one engine in a process of its own, and show what it prints. Return the results.
fn measured(options: &Options, name: &str) -> Result<BTreeMap<String, String>> {
    println!("== {name}");
    let mut command = Command::new(env::current_exe().context("the running program")?);
    command
        .arg("--worker")
        .env("RKSM_ENGINE", name)
        .stdout(Stdio::piped());
    command.args([
        "--guests",
        &options.guests.to_string(),
        "--mib",
        &options.mib.to_string(),
    ]);
    command.args(["--factor", &options.factor.to_string()]);
    if options.until_full {
        command.arg("--until-full");
    }
    if let Some(file) = &options.curve {
        command
            .arg("--curve")
            .arg(file.with_extension(format!("{name}.csv")));
    }
    let mut child = command.spawn().context("starting a measurement")?;
    let output = BufReader::new(child.stdout.take().context("standard output")?);
    let mut results = BTreeMap::new();
    for line in output.lines() {
        let line = line.context("reading")?;
        match line
            .strip_prefix("result ")
            .and_then(|rest| rest.split_once(' '))
        {
            Some((name, value)) => {
                results.insert(name.to_string(), value.to_string());
            }
            None => println!("{line}"),
        }
    }
    ensure!(child.wait().context("wait")?.success(), "{name} failed");
    Ok(results)
}

/// The rows of the table: the name of a result, and what it is.
const ROWS: [(&str, &str); 14] = [
    ("guests", "guests running"),
    ("offered_mib", "memory offered to guests (MiB)"),
    ("available_mib", "memory available for them (MiB)"),
    ("used_mib", "memory used, settled (MiB)"),
    ("pss_mib_sum", "PSS of all guests (MiB)"),
    ("pss_mib_max", "PSS of the largest guest (MiB)"),
    ("saved_mib", "memory saved (MiB)"),
    ("pages_shared", "pages_shared"),
    ("pages_sharing", "pages_sharing"),
    ("up_secs", "from start to all running (s)"),
    ("settled_secs", "from start to settled (s)"),
    ("cpu_secs", "CPU of the engine's thread until then (s)"),
    ("verify_secs", "all verify all their memory (s)"),
    ("rewrite_secs", "a tenth of all pages is rewritten (s)"),
];

fn overcommit() -> Result<()> {
    let options = options()?;
    ensure!(
        kvm::available(),
        "there is no /dev/kvm: guests cannot run here"
    );
    if options.worker {
        return measure(options);
    }
    let engines: &[&str] = match options.engine.as_str() {
        "both" => &["ksm", "rksm"],
        "ksm" => &["ksm"],
        "rksm" => &["rksm"],
        other => bail!("--engine is ksm, rksm or both, not {other}"),
    };
    let mut all = Vec::new();
    for name in engines {
        all.push(measured(&options, name)?);
    }
    println!();
    print!("{:<44}", "");
    engines.iter().for_each(|name| print!("{name:>12}"));
    println!();
    for (name, what) in ROWS {
        print!("{what:<44}");
        for results in &all {
            print!("{:>12}", results.get(name).map_or("-", String::as_str));
        }
        println!();
    }
    let last = all.last().context("no engine")?;
    let get = |name: &str| last.get(name).with_context(|| format!("no {name}"));
    let number = |name: &str| get(name)?.parse::<f64>().context("a number");
    println!(
        "\novercommit: OK guests={} factor={:.2} saved_mib={} verified={}",
        get("guests")?,
        number("offered_mib")? / number("available_mib")?,
        get("saved_mib")?,
        get("verified")?
    );
    Ok(())
}

fn main() -> ExitCode {
    match overcommit() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            println!("overcommit: FAILED: {e:#}");
            ExitCode::FAILURE
        }
    }
}
