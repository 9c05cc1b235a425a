// SPDX-License-Identifier: GPL-2.0
//! The kernel's breakpoints in merged pages.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::Path;

use anyhow::{ensure, Context, Result};

use super::tests;
use crate::background::Background;
use crate::engine;
use crate::harness::{skip, Module, Outcome, Suite, PASS};
use crate::pageflags::{merged_frames, Span};
use crate::region::PAGE;
use crate::scan;
use crate::sys::Ended;

pub const SUITE: Suite = Suite {
    name: "uprobe",
    about: "uprobes come and go in merged private file pages",
    module: Module::Loaded,
    tests: tests![
        ("probe-in-merged-code", 90, in_merged),
        ("pages-with-probes-merge", 90, merge_with_probe),
        ("probes-come-and-go-while-merging", 120, come_and_go),
    ],
};

const EVENTS: &str = "/sys/kernel/tracing/uprobe_events";
const GROUP: &str = "rksm_test";
const FILE: &str = "/dev/shm/rksm-uprobe";
/// The number of pages, each with the function at its beginning.
const N: usize = 4;
/// How often probes are inserted and removed.
const FLIPS: usize = 25;
/// The return value of the function.
const ANSWER: u32 = 42;
/// The machine code of: mov $42, %eax; ret
const CODE: [u8; 6] = [0xb8, ANSWER as u8, 0, 0, 0, 0xc3];
const BREAKPOINT: u8 = 0xcc;

/// Executable pages, mapped privately from a file.
struct Code {
    addr: usize,
}

impl Code {
    /// Map one page more than the file has. Otherwise two mappings of the file could be neighbours, and
    /// become one.
    fn map(file: &File) -> Result<Self> {
        // SAFETY: This is a new mapping at an address that the kernel chooses. The page beyond the end of the
        // file is never accessed.
        let addr = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                (N + 1) * PAGE,
                libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
                libc::MAP_PRIVATE,
                file.as_raw_fd(),
                0,
            )
        };
        ensure!(
            addr != libc::MAP_FAILED,
            "mmap: {}",
            io::Error::last_os_error()
        );
        let code = Self {
            addr: addr as usize,
        };
        // Only anonymous pages merge, so make each page anonymous, with content that differs from the file's.
        // The kernel maps the file's page again when it removes a breakpoint from an equal one.
        for i in 0..N {
            // SAFETY: The byte lies in our mapping.
            unsafe {
                let at = (code.page(i) as *mut u8).add(PAGE - 1);
                at.write_volatile(!at.read_volatile());
            }
        }
        // The kernel inserts no probes into writable mappings.
        // SAFETY: The mapping is ours, and nothing writes to it any more.
        let ret = unsafe { libc::mprotect(addr, N * PAGE, libc::PROT_READ | libc::PROT_EXEC) };
        ensure!(ret == 0, "mprotect: {}", io::Error::last_os_error());
        // SAFETY: The mapping is ours.
        let ret = unsafe { libc::madvise(addr, N * PAGE, libc::MADV_MERGEABLE) };
        ensure!(ret == 0, "madvise: {}", io::Error::last_os_error());
        Ok(code)
    }

    fn page(&self, i: usize) -> usize {
        self.addr + i * PAGE
    }

    /// Call the function in page `i`.
    fn call(&self, i: usize) -> u32 {
        // SAFETY: The page begins with CODE, or with CODE and a breakpoint that the kernel handles. The code
        // takes no arguments and returns a number in a register.
        let function: extern "C" fn() -> u32 = unsafe { std::mem::transmute(self.page(i)) };
        function()
    }

    fn call_all(&self) -> Result<()> {
        for i in 0..N {
            let answer = self.call(i);
            ensure!(answer == ANSWER, "page {i} answers {answer}");
        }
        Ok(())
    }

    /// Return the first byte of page `i`.
    fn first(&self, i: usize) -> u8 {
        // SAFETY: The byte lies in our mapping.
        unsafe { (self.page(i) as *const u8).read_volatile() }
    }

    fn expect_first(&self, want: u8) -> Result<()> {
        for i in 0..N {
            let first = self.first(i);
            ensure!(
                first == want,
                "page {i} begins with {first:#x}, not {want:#x}"
            );
        }
        Ok(())
    }

    fn frames(&self) -> Result<Vec<Option<u64>>> {
        merged_frames(Span {
            pid: std::process::id(),
            addr: self.addr,
            pages: N,
        })
    }
}

impl Drop for Code {
    fn drop(&mut self) {
        // SAFETY: The mapping is ours, and nothing calls into it any more.
        unsafe { libc::munmap(self.addr as *mut libc::c_void, (N + 1) * PAGE) };
    }
}

/// Create a file of code. All its pages differ, so that two mappings of it merge page by page.
fn code_file() -> Result<File> {
    let mut file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(FILE)
        .context(FILE)?;
    for i in 0..N {
        let mut page = [i as u8 + 1; PAGE];
        page[..CODE.len()].copy_from_slice(&CODE);
        file.write_all(&page).context(FILE)?;
    }
    Ok(file)
}

/// Probes on each function in the file; removed when dropped.
struct Probes(());

impl Probes {
    /// Insert the probes. `None` if the kernel has no uprobes.
    fn new() -> Result<Option<Self>> {
        if !Path::new(EVENTS).exists() {
            return Ok(None);
        }
        let this = Self(());
        for i in 0..N {
            append(&format!("p:{GROUP}/f{i} {FILE}:{:#x}", i * PAGE))?;
        }
        Ok(Some(this))
    }

    fn enable(&self, on: bool) -> Result<()> {
        enable(on)
    }

    /// Return how often the functions were entered with the probes enabled.
    fn hits(&self) -> Result<u64> {
        let text = fs::read_to_string("/sys/kernel/tracing/uprobe_profile")?;
        let mut sum = 0;
        for line in text.lines().filter(|l| l.contains(FILE)) {
            let hits = line.split_whitespace().last().context("uprobe_profile")?;
            sum += hits.parse::<u64>().context("uprobe_profile")?;
        }
        Ok(sum)
    }
}

fn append(line: &str) -> Result<()> {
    let mut file = File::options().append(true).open(EVENTS).context(EVENTS)?;
    file.write_all(line.as_bytes())
        .with_context(|| line.to_string())
}

fn enable(on: bool) -> Result<()> {
    let file = format!("/sys/kernel/tracing/events/{GROUP}/enable");
    fs::write(&file, if on { "1" } else { "0" }).context(file)
}

impl Drop for Probes {
    fn drop(&mut self) {
        let _ = enable(false);
        for i in 0..N {
            let _ = append(&format!("-:{GROUP}/f{i}"));
        }
        let path = CString::new(FILE).unwrap_or_default();
        // SAFETY: The path is a C string that outlives the call.
        unsafe { libc::unlink(path.as_ptr()) };
    }
}

const NO_PROBES: &str = "the kernel has no uprobe events";

/// Scan until each page `i` of `a` and `b` is in one frame.
fn merge(a: &Code, b: &Code) -> Result<()> {
    scan::until_still("merged code", || {
        let frames = a.frames()?;
        Ok(frames.iter().all(Option::is_some) && frames == b.frames()?)
    })
}

fn in_merged() -> Outcome {
    let file = code_file()?;
    let Some(probes) = Probes::new()? else {
        return skip(NO_PROBES);
    };
    let (a, b) = (Code::map(&file)?, Code::map(&file)?);
    a.call_all()?;
    merge(&a, &b)?;
    a.call_all()?;
    scan::stop()?;
    for round in 1..=3 {
        probes.enable(true)?;
        a.expect_first(BREAKPOINT)?;
        b.expect_first(BREAKPOINT)?;
        let before = probes.hits()?;
        a.call_all()?;
        b.call_all()?;
        let hits = probes.hits()? - before;
        ensure!(hits == 2 * N as u64, "{hits} hits in round {round}");
        probes.enable(false)?;
        a.expect_first(CODE[0])?;
        b.expect_first(CODE[0])?;
        a.call_all()?;
        b.call_all()?;
        merge(&a, &b)?;
        scan::stop()?;
    }
    PASS
}

fn merge_with_probe() -> Outcome {
    let file = code_file()?;
    let Some(probes) = Probes::new()? else {
        return skip(NO_PROBES);
    };
    let (a, b) = (Code::map(&file)?, Code::map(&file)?);
    probes.enable(true)?;
    a.expect_first(BREAKPOINT)?;
    // Pages with the same breakpoint are equal.
    merge(&a, &b)?;
    let before = probes.hits()?;
    a.call_all()?;
    b.call_all()?;
    ensure!(probes.hits()? - before == 2 * N as u64);
    // The kernel removes the breakpoint from a merged page in each process separately.
    scan::stop()?;
    probes.enable(false)?;
    a.expect_first(CODE[0])?;
    b.expect_first(CODE[0])?;
    a.call_all()?;
    b.call_all()?;
    merge(&a, &b)?;
    engine::write("run", 2)?;
    a.call_all()?;
    b.call_all()?;
    PASS
}

fn come_and_go() -> Outcome {
    let file = code_file()?;
    let Some(probes) = Probes::new()? else {
        return skip(NO_PROBES);
    };
    let (a, b) = (Code::map(&file)?, Code::map(&file)?);
    scan::start()?;
    // This process must not be killed: the kernel leaves breakpoints behind if the task that removes them is.
    let mut flipping = Background::once(|| {
        for _ in 0..FLIPS {
            enable(true)?;
            std::thread::sleep(std::time::Duration::from_millis(15));
            enable(false)?;
            std::thread::sleep(std::time::Duration::from_millis(15));
        }
        Ok(())
    })?;
    let how = loop {
        scan::passes(1)?;
        a.call_all()?;
        b.call_all()?;
        if let Some(how) = flipping.ended()? {
            break how;
        }
    };
    ensure!(how == Ended::Exit(0), "flipping ended by {how:?}");
    println!("{} hits", probes.hits()?);
    ensure!(probes.hits()? > 0, "no probe was ever hit");
    a.expect_first(CODE[0])?;
    merge(&a, &b)?;
    a.call_all()?;
    b.call_all()?;
    PASS
}
