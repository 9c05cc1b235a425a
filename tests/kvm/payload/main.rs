// SPDX-License-Identifier: GPL-2.0
//! The payload: a guest that fills its memory with pages of known content, and obeys commands.
//!
//! It runs without an operating system, with interrupts off, in 64-bit mode (head.S). The monitor, `rksm-vmm`,
//! gives it the port [`CONSOLE`] to write to, [`PENDING`] to ask whether a command waits, and [`COMMAND`] to
//! wait for the next byte of one. A command is a line, and so is the answer, `ok COMMAND …` or `bad …`:
//!
//! | command | what it does |
//! | --- | --- |
//! | `verify` | compare each word of each page |
//! | `rewrite P` | verify P percent of the pages, and write new content to them |
//! | `touch P` | change a word in P percent of the pages, and change it back |
//! | `busy` | touch and verify until the next command arrives |
//! | `free P` | forget the content of P percent of the pages: they are zeroes from now on |
//!
//! The command line has `guest=`, `common=`, `zero=` and `repeated=`; the memory's size comes in `mib=`.
#![no_std]
#![no_main]

use core::arch::{asm, global_asm};
use core::fmt::{self, Write};

#[path = "../src/content.rs"]
#[allow(dead_code)] // the host needs more of it
mod content;

use content::{Kind, Pages, Shares};

global_asm!(include_str!("head.S"), options(att_syntax));

const CONSOLE: u16 = 0x500;
const PENDING: u16 = 0x501;
const COMMAND: u16 = 0x504;

/// Where the pages begin that are filled. The payload lies below.
const PAGES: usize = 2 << 20;
const PAGE: usize = 4096;
const WORDS: usize = PAGE / 8;

/// The largest number of pages: those of a guest of 2 GiB.
const MAX_PAGES: usize = 1 << 19;
/// The value in [`Memory::last`] of a page that was freed.
const FREED: u8 = u8::MAX;

fn outb(port: u16, byte: u8) {
    // SAFETY: The monitor serves the port, and memory is not affected.
    unsafe { asm!("out dx, al", in("dx") port, in("al") byte, options(nostack, preserves_flags)) };
}

fn inb(port: u16) -> u8 {
    let byte;
    // SAFETY: The monitor serves the port, and memory is not affected.
    unsafe { asm!("in al, dx", in("dx") port, out("al") byte, options(nostack, preserves_flags)) };
    byte
}

struct Console;

impl Write for Console {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        s.bytes().for_each(|byte| outb(CONSOLE, byte));
        Ok(())
    }
}

macro_rules! say {
    ($($arg:tt)*) => {{
        // The console does not fail.
        let _ = writeln!(Console, $($arg)*);
    }};
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    say!("bad panic: {info}");
    loop {
        // SAFETY: Without interrupts, this ends the virtual CPU.
        unsafe { asm!("cli", "hlt") };
    }
}

/// The rewrite that gave each page its content; [`FREED`] for none. It lies in the payload's own memory.
struct Last(core::cell::UnsafeCell<[u8; MAX_PAGES]>);

// SAFETY: There is one CPU, and no interrupt.
unsafe impl Sync for Last {}

static LAST: Last = Last(core::cell::UnsafeCell::new([0; MAX_PAGES]));

/// The memory that is filled.
struct Memory {
    pages: Pages,
    rewrites: u8,
    touches: u32,
}

impl Memory {
    fn last(&self, page: u32) -> &mut u8 {
        assert!((page as usize) < MAX_PAGES);
        // SAFETY: The index is in bounds. Each reference is gone before the next one is made.
        unsafe { &mut *LAST.0.get().cast::<u8>().add(page as usize) }
    }

    fn word(&self, page: u32, word: usize) -> *mut u64 {
        assert!(page < self.pages.count && word < WORDS);
        (PAGES + page as usize * PAGE + word * 8) as *mut u64
    }

    fn kind(&self, page: u32) -> Kind {
        match *self.last(page) {
            FREED => Kind::Zero,
            last => self.pages.kind(page, u32::from(last)),
        }
    }

    fn fill(&self, page: u32) {
        let mut words = self.kind(page).words();
        let first = self.word(page, 0);
        for i in 0..WORDS {
            // SAFETY: The page lies in the memory above the payload, which nothing else uses.
            unsafe { first.add(i).write_volatile(words.next_word()) };
        }
    }

    /// Compare a page with what it should be. Return 1 if it differs, and say where.
    fn check(&self, page: u32) -> u32 {
        let mut words = self.kind(page).words();
        let first = self.word(page, 0);
        for i in 0..WORDS {
            let expected = words.next_word();
            // SAFETY: As in `fill`.
            let found = unsafe { first.add(i).read_volatile() };
            if found != expected {
                say!("bad page {page} word {i}: {found:#018x} instead of {expected:#018x}");
                return 1;
            }
        }
        0
    }

    fn verify(&self) -> u32 {
        (0..self.pages.count).map(|page| self.check(page)).sum()
    }

    /// Verify and rewrite some pages. Each gets new content of its kind.
    fn rewrite(&mut self, percent: u32) -> u32 {
        self.rewrites += 1;
        assert!(self.rewrites < FREED, "too many rewrites");
        let rewrite = u32::from(self.rewrites);
        let mut bad = 0;
        for page in 0..self.pages.count {
            if self.pages.is_rewritten(page, rewrite, percent) {
                bad += self.check(page);
                *self.last(page) = self.rewrites;
                self.fill(page);
            }
        }
        bad
    }

    fn free(&mut self, percent: u32) -> u32 {
        self.touches += 1;
        let mut bad = 0;
        for page in 0..self.pages.count {
            if self.pages.is_rewritten(page, self.touches << 8, percent) {
                bad += self.check(page);
                *self.last(page) = FREED;
                self.fill(page);
            }
        }
        bad
    }

    /// Change one word in some pages, then change each back and verify the page.
    fn touch(&mut self, percent: u32) -> u32 {
        self.touches += 1;
        let (touch, guest) = (self.touches, u64::from(self.pages.guest));
        let flip = |page| {
            let word = self.word(page, touch as usize % WORDS);
            // SAFETY: As in `fill`.
            unsafe { word.write_volatile(word.read_volatile() ^ ((0x5a5a << 32) | (guest + 1))) };
        };
        let chosen = |page: &u32| self.pages.is_rewritten(*page, touch << 8, percent);
        (0..self.pages.count).filter(chosen).for_each(flip);
        let mut bad = 0;
        for page in (0..self.pages.count).filter(chosen) {
            flip(page);
            bad += self.check(page);
        }
        bad
    }

    fn busy(&mut self) -> u32 {
        loop {
            let bad = self.verify() + self.touch(10);
            if bad != 0 || inb(PENDING) != 0 {
                return bad;
            }
        }
    }
}

/// Return the number behind `name` in the command line.
fn argument(line: &str, name: &str) -> Option<u32> {
    let found = line
        .split(' ')
        .find_map(|word| word.strip_prefix(name)?.strip_prefix('='))?;
    found.parse().ok()
}

/// Read a line into `buffer`. Of one that is too long, the rest is lost.
fn read_command(buffer: &mut [u8; 64]) -> &str {
    let mut len = 0;
    loop {
        match inb(COMMAND) {
            b'\n' => break,
            byte if len < buffer.len() => {
                buffer[len] = byte;
                len += 1;
            }
            _ => {}
        }
    }
    core::str::from_utf8(&buffer[..len]).unwrap_or("")
}

/// The part of struct hvm_start_info (PVH) that matters here.
#[repr(C)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    modules: u32,
    modlist: u64,
    cmdline: u64,
}

/// # Safety
///
/// head.S calls this with the address that the loader gave it.
#[no_mangle]
unsafe extern "C" fn payload_main(info: *const StartInfo) -> ! {
    // SAFETY: By the PVH protocol, it is struct hvm_start_info.
    let at = unsafe { (*info).cmdline } as *const core::ffi::c_char;
    // SAFETY: By the PVH protocol, it is a string that ends with 0.
    let line = unsafe { core::ffi::CStr::from_ptr(at) }
        .to_str()
        .unwrap_or("");
    let get = |name| argument(line, name).unwrap_or(0);
    let end = (get("mib") as usize) << 20;
    let pages = Pages {
        guest: get("guest"),
        count: (end.saturating_sub(PAGES) / PAGE) as u32,
        shares: Shares {
            common: get("common"),
            zero: get("zero"),
            repeated: get("repeated"),
        },
    };
    let mut memory = Memory {
        pages,
        rewrites: 0,
        touches: 0,
    };
    (0..pages.count).for_each(|page| memory.fill(page));
    say!("ok fill {}", pages.count);
    let mut buffer = [0; 64];
    loop {
        let command = read_command(&mut buffer);
        let mut words = command.split(' ');
        let name = words.next().unwrap_or("");
        let percent = words.next().and_then(|word| word.parse().ok());
        let bad = match (name, percent) {
            ("verify", None) => memory.verify(),
            ("busy", None) => memory.busy(),
            ("rewrite", Some(percent)) => memory.rewrite(percent),
            ("touch", Some(percent)) => memory.touch(percent),
            ("free", Some(percent)) => memory.free(percent),
            _ => {
                say!("bad command {command}");
                continue;
            }
        };
        match bad {
            0 => say!("ok {name} {}", memory.rewrites),
            _ => say!("bad {name}: {bad} pages"),
        }
    }
}

// The compiler calls these. There is no C library.

/// # Safety
///
/// As memcpy(3).
#[no_mangle]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, n: usize) -> *mut u8 {
    // SAFETY: By the caller's promise both ranges are valid. The direction flag is clear.
    unsafe {
        asm!("rep movsb", inout("rdi") to => _, inout("rsi") from => _, inout("rcx") n => _,
            options(nostack, preserves_flags))
    };
    to
}

/// # Safety
///
/// As memset(3).
#[no_mangle]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, n: usize) -> *mut u8 {
    // SAFETY: By the caller's promise the range is valid. The direction flag is clear.
    unsafe {
        asm!("rep stosb", inout("rdi") to => _, inout("rcx") n => _, in("al") byte as u8,
            options(nostack, preserves_flags))
    };
    to
}

/// # Safety
///
/// As memcmp(3).
#[no_mangle]
unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
    for i in 0..n {
        // SAFETY: By the caller's promise both ranges are valid. A volatile read does not become a call of
        // this function.
        let (x, y) = unsafe { (a.add(i).read_volatile(), b.add(i).read_volatile()) };
        if x != y {
            return i32::from(x) - i32::from(y);
        }
    }
    0
}

/// # Safety
///
/// As bcmp(3).
#[no_mangle]
unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
    // SAFETY: By the caller's promise both ranges are valid.
    unsafe { memcmp(a, b, n) }
}

/// # Safety
///
/// As strlen(3).
#[no_mangle]
unsafe extern "C" fn strlen(s: *const u8) -> usize {
    let mut n = 0;
    // SAFETY: By the caller's promise the string ends with 0.
    while unsafe { s.add(n).read_volatile() } != 0 {
        n += 1;
    }
    n
}
