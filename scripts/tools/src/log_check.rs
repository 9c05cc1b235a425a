// SPDX-License-Identifier: GPL-2.0
//! Search a kernel log for reports of trouble.

use crate::text::{contains, for_each_line, split_digits, strip_cr, trim_start};
use std::collections::VecDeque;
use std::io::{self, BufRead, Write};

/// Messages of the kernel about errors, as patterns of [`matches`].
const TROUBLE: &[&str] = &[
    "WARNING: ",
    "^BUG:",
    "^BUG ",
    "kernel BUG at",
    "Oops:",
    "Oops ",
    "general protection fault",
    "unable to handle",
    // lockdep
    "possible circular locking",
    "possible recursive locking",
    "possible irq lock inversion",
    "possible deadlock",
    "INFO: possible ",
    "INFO: trying to register non-static key",
    "inconsistent lock state",
    "lock held when returning to user space",
    "bad unlock balance",
    "held lock freed",
    "suspicious RCU usage",
    "Invalid wait context",
    // stalls
    "INFO: rcu*detected",
    "rcu*detected stall",
    "rcu*detected expedited stall",
    "detected stall on",
    "detected stalls on",
    "kthread starved for",
    "soft lockup",
    "hard LOCKUP",
    "blocked for more than %d seconds",
    // memory
    "Bad rss-counter",
    "Bad page ",
    "Bad swap",
    "refcount_t: ",
    "list_add corruption",
    "list_del corruption",
    "page allocation failure",
    "KASAN: ",
    "KCSAN: ",
    "KFENCE: ",
    "KMSAN: ",
    "UBSAN: ",
    "kmemleak: %d new suspected",
    "Objects remaining",
    "still has objects",
    // scheduling
    "bad: scheduling",
    "sleeping function called from invalid",
    // the end
    "Kernel panic",
    "Call Trace:",
    "invalid opcode:",
    "stack segment:",
    "double fault",
];

/// Reports end in a call trace, so more of the first lines would help little.
const LINES_BEFORE: usize = 2;
const LINES_AFTER: u64 = 12;
const REPORTS_MAX: u32 = 20;

/// The largest number of lines to hold back until a report of the OOM killer ends.
const HELD_MAX: usize = 400;

/// The largest number of lines before the first function of a call trace.
const TRACE_MAX: usize = 40;

/// Return whether `text` contains the pattern: `^` is the start of the line, `*` any bytes, and `%d` a
/// decimal number.
fn matches(pattern: &str, text: &[u8]) -> bool {
    let anchored = pattern.strip_prefix('^');
    let mut anywhere = anchored.is_none();
    let mut rest = text;
    for piece in anchored.unwrap_or(pattern).split('*') {
        let found = match anywhere {
            true => find(piece, rest),
            false => after(piece, rest),
        };
        match found {
            Some(text) => rest = text,
            None => return false,
        }
        anywhere = true;
    }
    true
}

/// Return the text after the first `piece` in `text`.
fn find<'a>(piece: &str, text: &'a [u8]) -> Option<&'a [u8]> {
    // One byte rules out nearly all places.
    let first = piece.bytes().next().filter(|byte| *byte != b'%');
    (0..=text.len()).find_map(|at| {
        let text = text.get(at..)?;
        match first {
            Some(first) if text.first() != Some(&first) => None,
            _ => after(piece, text),
        }
    })
}

/// Return the text after `piece`, which may contain `%d`, at the start of `text`.
fn after<'a>(piece: &str, text: &'a [u8]) -> Option<&'a [u8]> {
    let mut literals = piece.split("%d");
    let mut rest = text.strip_prefix(literals.next()?.as_bytes())?;
    for literal in literals {
        match split_digits(rest) {
            ([], _) => return None,
            (_, text) => rest = text.strip_prefix(literal.as_bytes())?,
        }
    }
    Some(rest)
}

/// Return whether one line, without its time stamp, is trouble.
fn is_trouble(text: &[u8]) -> bool {
    // A match in "watchdog: BUG: ", but not in "DEBUG: ".
    let is_bug = |window: &[u8]| match window {
        [before, b'B', b'U', b'G', b':', b' '] => !before.is_ascii_uppercase() && *before != b'_',
        _ => false,
    };
    text.windows(6).any(is_bug) || TROUBLE.iter().any(|pattern| matches(pattern, text))
}

/// Return a line without level, time stamp and caller: `<4>[    3.141592][  T123] `.
fn without_stamp(line: &[u8]) -> &[u8] {
    let stamp = || {
        let rest = after("<%d>", line).unwrap_or(line);
        let rest = bracketed(rest, b" .0123456789")?;
        let rest = bracketed(rest, b" CT0123456789").unwrap_or(rest);
        Some(rest.strip_prefix(b" ").unwrap_or(rest))
    };
    stamp().unwrap_or(line)
}

/// Return the text after a pair of brackets that contains only `bytes`.
fn bracketed<'a>(text: &'a [u8], bytes: &[u8]) -> Option<&'a [u8]> {
    let text = text.strip_prefix(b"[")?;
    let rest = trim_start(text, bytes);
    if rest.len() == text.len() {
        return None;
    }
    rest.strip_prefix(b"]")
}

/// The kernel's further messages about a fault that a test has injected. Only an injected fault makes such
/// small allocations fail. vmalloc reports that with a trace, kprobes with a warning and a trace.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Injected {
    Nothing,
    Trace,
    WarningAndTrace,
}

/// Which report is held back.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ReportKind {
    /// Of the OOM killer. It is no trouble if a test has run that group out of memory (rksm-oom), or if all memory
    /// is gone and the victim is of the group that is there for it (rksm-oom-all).
    Oom,
    /// Of a page-table entry that the kernel's own checks find wrong ([`BAD_ENTRY`]). It is no trouble if the
    /// innermost function that is certain in its trace is that of [`BAD_ENTRY_OF`].
    BadEntry,
}

impl ReportKind {
    /// Which report begins with this line.
    fn beginning_with(text: &[u8]) -> Option<Self> {
        if contains(text, b"invoked oom-killer: ") {
            return Some(Self::Oom);
        }
        text.starts_with(BAD_ENTRY).then_some(Self::BadEntry)
    }

    /// How many lines are held back at most.
    fn lines_max(self) -> usize {
        match self {
            Self::Oom => HELD_MAX,
            Self::BadEntry => TRACE_MAX,
        }
    }
}

/// A report that is held back until a line says what it is about.
struct Held {
    kind: ReportKind,
    lines: Vec<Vec<u8>>,
    /// Whether the report names the group rksm-oom.
    of_group: bool,
}

impl Held {
    fn new(kind: ReportKind) -> Self {
        Self {
            kind,
            lines: Vec::new(),
            of_group: false,
        }
    }

    /// Hold one more line. Returns whether to pardon the report, as soon as that is certain.
    fn push(&mut self, line: &[u8]) -> Option<bool> {
        let text = without_stamp(line);
        let pardoned = match self.kind {
            ReportKind::Oom => self.pardon_oom(text),
            ReportKind::BadEntry => self.pardon_bad_entry(text),
        };
        self.lines.push(line.to_vec());
        pardoned.or_else(|| (self.lines.len() > self.kind.lines_max()).then_some(false))
    }

    fn pardon_oom(&mut self, text: &[u8]) -> Option<bool> {
        if text.starts_with(b"Memory cgroup stats for ") {
            self.of_group = contains(text, b"for /rksm-oom:");
        }
        if text.starts_with(b"oom-kill:constraint=") {
            // Another message may have come in the middle of this line.
            let pardoned = self.of_group && matches("constraint=CONSTRAINT_MEMCG,", text)
                || matches("constraint=CONSTRAINT_MEMCG,*oom_memcg=/rksm-oom,", text)
                || matches(
                    "constraint=CONSTRAINT_NONE,*task_memcg=/rksm-oom-all,",
                    text,
                );
            return Some(pardoned);
        }
        text.starts_with(b"Out of memory and no killable processes")
            .then_some(self.of_group)
    }

    fn pardon_bad_entry(&self, text: &[u8]) -> Option<bool> {
        // Those with a question mark are what the stack happens to contain.
        let guess = |text: &[u8]| text.starts_with(b" ? ");
        let mut before = self.lines.iter().rev().map(|line| without_stamp(line));
        let innermost = before.find(|text| !guess(text))? == b" <TASK>";
        (innermost && !guess(text)).then(|| text.starts_with(BAD_ENTRY_OF))
    }
}

/// PAGEMAP_SCAN with write protection leaves an entry writable if its page is being migrated.
/// make_uffd_wp_pte() in fs/proc/task_mmu.c sets the mark, but leaves the migration entry writable, which
/// CONFIG_PAGE_TABLE_CHECK reports once. Seen with 7.3.4, without the module, while one thread scanned and
/// another moved the pages.
const BAD_ENTRY: &[u8] = b"WARNING: at __page_table_check_ptes_set+";
const BAD_ENTRY_OF: &[u8] = b" make_uffd_wp_pte+";

struct Checker<'a, W> {
    out: &'a mut W,
    /// Number of the current line.
    number: u64,
    /// Number of the last line to show of the current report.
    until: u64,
    reports: u32,
    found: bool,
    /// The last lines with their numbers.
    before: VecDeque<(u64, Vec<u8>)>,
    injected: Injected,
    held: Option<Held>,
}

impl<W: Write> Checker<'_, W> {
    fn line(&mut self, line: &[u8]) -> io::Result<()> {
        if self.held.is_none() {
            self.held = ReportKind::beginning_with(without_stamp(line)).map(Held::new);
        }
        let Some(held) = &mut self.held else {
            return self.check(line);
        };
        match held.push(line) {
            Some(pardoned) => self.release(pardoned),
            None => Ok(()),
        }
    }

    /// Check the lines that are held back. An accepted report may have its call trace.
    fn release(&mut self, pardoned: bool) -> io::Result<()> {
        let lines = self.held.take().map_or(Vec::new(), |held| held.lines);
        for (at, line) in lines.iter().enumerate() {
            let text = without_stamp(line);
            let expected =
                text.starts_with(b"Call Trace:") || at == 0 && text.starts_with(BAD_ENTRY);
            if !pardoned || !expected {
                self.check(line)?;
            }
        }
        Ok(())
    }

    fn check(&mut self, line: &[u8]) -> io::Result<()> {
        self.number += 1;
        if self.is_report(without_stamp(line)) {
            self.begin_report()?;
        }
        if self.number <= self.until && self.reports <= REPORTS_MAX {
            self.show(line)?;
        }
        self.before.push_back((self.number, line.to_vec()));
        if self.before.len() > LINES_BEFORE {
            self.before.pop_front();
        }
        Ok(())
    }

    fn is_report(&mut self, text: &[u8]) -> bool {
        if matches("vmalloc error: * vm_struct allocation failed", text) {
            self.injected = Injected::Trace;
        }
        let disarm = "^Failed to disarm kprobe-ftrace at __x64_sys_delete_module* (error -12)";
        if matches(disarm, text) {
            self.injected = Injected::WarningAndTrace;
        }
        let warning = "^WARNING: *at disarm_kprobe_ftrace";
        match self.injected {
            Injected::WarningAndTrace if matches(warning, text) => {
                self.injected = Injected::Trace;
                false
            }
            Injected::Trace if text.starts_with(b"Call Trace:") => {
                self.injected = Injected::Nothing;
                false
            }
            _ => is_trouble(text),
        }
    }

    fn begin_report(&mut self) -> io::Result<()> {
        if !self.found {
            self.found = true;
            self.out.write_all(b"kernel log of the guest:\n")?;
        }
        if self.until < self.number {
            self.reports = self.reports.saturating_add(1);
            if self.reports > REPORTS_MAX {
                return Ok(());
            }
            self.show(b"---")?;
            let before = std::mem::take(&mut self.before);
            for (number, line) in &before {
                if *number > self.until {
                    self.show(line)?;
                }
            }
            self.before = before;
        }
        self.until = self.number.saturating_add(LINES_AFTER);
        Ok(())
    }

    fn show(&mut self, line: &[u8]) -> io::Result<()> {
        self.out.write_all(&[b"  ", line, b"\n"].concat())
    }
}

/// Print each report in a kernel log, with some lines around it. Return whether there is none.
pub fn is_clean(log: impl BufRead, out: &mut impl Write) -> io::Result<bool> {
    let mut checker = Checker {
        out,
        number: 0,
        until: 0,
        reports: 0,
        found: false,
        before: VecDeque::new(),
        injected: Injected::Nothing,
        held: None,
    };
    for_each_line(log, |line| checker.line(strip_cr(line)))?;
    checker.release(false)?;
    checker.out.flush()?;
    Ok(!checker.found)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Check `log` between the usual first and last lines. Return the output.
    fn check(log: &str) -> Option<String> {
        let log = format!(
            "[    0.000000] Linux version 7.3.4\n\
             [    0.1] rcu: \tRCU event tracing is enabled.\n\
             {log}\n\
             [   10.000000] reboot: Power down\n"
        );
        let mut out = Vec::new();
        let clean = is_clean(log.as_bytes(), &mut out).unwrap();
        assert_eq!(clean, out.is_empty());
        (!clean).then(|| String::from_utf8(out).unwrap())
    }

    fn passes(log: &str) {
        assert_eq!(check(log), None);
    }

    fn is_found(log: &str) {
        assert!(check(log).is_some(), "{log}");
    }

    #[test]
    fn an_ordinary_boot_passes() {
        passes(
            "\
[    0.017653] Kernel command line: console=ttyS0 panic=-1 oops=panic
[    0.1] NMI watchdog: Perf NMI watchdog permanently disabled
[    0.2] RAS: Correctable Errors collector initialized.
[    0.3] Spectre V2 : Mitigation: Retpolines
[    0.4] kmemleak: Kernel memory leak detector disabled
[    0.5] rksm: loaded; in-tree KSM cannot be started while it is
[    0.6] clocksource: Watchdog remote CPU 1 read timed out",
        );
    }

    /// Return the kernel's report about a group that is out of memory.
    fn oom_report(constraint: &str, line: &str) -> String {
        format!(
            "\
[   20.000001] rksm-torture invoked oom-killer: gfp_mask=0xcc0(GFP_KERNEL), order=0, oom_score_adj=0
[   20.000002] CPU: 1 UID: 0 PID: 99 Comm: rksm-torture Not tainted 7.3.4 #1
[   20.000003] Call Trace:
[   20.000004]  <TASK>
[   20.000005]  dump_stack_lvl+0x5d/0x80
[   20.000006] {line}
[   20.000007] oom-kill:constraint={constraint},task=rksm-torture,pid=99,uid=0
[   20.000008] Memory cgroup out of memory: Killed process 99 (rksm-torture)"
        )
    }

    const USAGE: &str = "memory: usage 10240kB, limit 10240kB, failcnt 26";
    const VICTIMS: &str = "CONSTRAINT_MEMCG,nodemask=(null),cpuset=/,mems_allowed=0,\
        oom_memcg=/rksm-oom,task_memcg=/rksm-oom";
    const EVERYTHING: &str =
        "CONSTRAINT_NONE,nodemask=(null),cpuset=/,mems_allowed=0,global_oom,task_memcg=/";
    const CUT: &str = "CONSTRAINT_MEMCG,nodemask=(null),cpuset=";

    #[test]
    fn a_group_that_is_to_run_out_of_memory_passes() {
        passes(&oom_report(VICTIMS, USAGE));
    }

    #[test]
    fn trouble_within_that_report_is_found() {
        is_found(&oom_report(VICTIMS, "BUG: Bad page state in process x"));
    }

    #[test]
    fn running_out_of_all_memory_is_found() {
        is_found(&oom_report(EVERYTHING, USAGE));
    }

    #[test]
    fn running_out_of_all_memory_passes_with_a_victim_of_the_group_for_it() {
        passes(&oom_report(&format!("{EVERYTHING}rksm-oom-all"), USAGE));
    }

    #[test]
    fn running_out_of_memory_in_another_group_is_found() {
        is_found(&oom_report(&VICTIMS.replace("rksm-oom", "other"), USAGE));
    }

    #[test]
    fn a_report_that_another_message_cuts_passes() {
        passes(&oom_report(CUT, "Memory cgroup stats for /rksm-oom:"));
    }

    #[test]
    fn a_report_that_is_cut_and_about_another_group_is_found() {
        is_found(&oom_report(CUT, "Memory cgroup stats for /other:"));
    }

    #[test]
    fn a_report_without_an_end_is_found() {
        let report = oom_report(VICTIMS, USAGE);
        let (cut, _) = report.split_once("[   20.000007]").unwrap();
        is_found(cut);
        let more = "[   21.0] and so on\n".repeat(HELD_MAX);
        is_found(&format!("{cut}{more}"));
    }

    const NOBODY_TO_KILL: &str = "\
[   20.1] test invoked oom-killer: gfp_mask=0xcc0(GFP_KERNEL), order=0, oom_score_adj=0
[   20.2] Call Trace:
[   20.3] Memory cgroup stats for /rksm-oom:
[   20.4] Out of memory and no killable processes...";

    #[test]
    fn a_group_with_nobody_to_kill_passes() {
        passes(NOBODY_TO_KILL);
        is_found(&NOBODY_TO_KILL.replace("/rksm-oom:", "/other:"));
        is_found(&format!("{NOBODY_TO_KILL}\n[   20.5] Call Trace:"));
    }

    const VMALLOC: &str = "\
[    3.1] test: vmalloc error: size 32768, vm_struct allocation failed, mode:0xdc0
[    3.1] Call Trace:";
    const DISARM: &str = "\
[    3.1] Failed to disarm kprobe-ftrace at __x64_sys_delete_module+0x0/0x460 (error -12)
[    3.1] WARNING: at disarm_kprobe_ftrace+0x126/0x1e0, CPU#0: test/2831
[    3.1] Call Trace:";

    #[test]
    fn a_fault_that_was_injected_into_vmalloc_passes() {
        passes(VMALLOC);
    }

    #[test]
    fn a_fault_that_was_injected_into_kprobes_passes() {
        passes(DISARM);
    }

    #[test]
    fn another_warning_is_found() {
        is_found(&DISARM.replace("at disarm_kprobe_ftrace", "at elsewhere"));
    }

    #[test]
    fn a_warning_behind_that_is_found() {
        is_found(&format!(
            "{DISARM}\n[    3.2] WARNING: at disarm_kprobe_ftrace+0x1/0x2"
        ));
    }

    #[test]
    fn another_reason_for_that_is_found() {
        is_found(&DISARM.replace("error -12", "error -22"));
    }

    #[test]
    fn a_trace_behind_that_is_found() {
        is_found(&format!("{VMALLOC}\n[    3.2] Call Trace:"));
    }

    const BAD_ENTRY_REPORT: &str = "\
[   58.007414] ------------[ cut here ]------------
[   58.008115] WARNING: at __page_table_check_ptes_set+0x9f/0x170, CPU#0: wp/107
[   58.013217] Modules linked in:
[   58.037745] CPU: 0 UID: 0 PID: 107 Comm: wp Not tainted 7.3.4-rksm-debug #1 PREEMPT(lazy)
[   58.053433] RIP: 0010:__page_table_check_ptes_set+0x9f/0x170
[   58.054356] Code: 48 21 c2 48 b8 00 00
[   58.085000] Call Trace:
[   58.085100]  <TASK>
[   58.085200]  make_uffd_wp_pte+0x25e/0x370
[   58.085300]  pagemap_scan_pmd_entry+0x1f86/0x24d0";

    #[test]
    fn a_bad_entry_of_the_kernels_own_making_passes() {
        passes(BAD_ENTRY_REPORT);
    }

    #[test]
    fn guesses_in_its_trace_do_not_matter() {
        let guess = "<TASK>\n[   58.085150]  ? _raw_spin_lock+0x4a/0x80";
        passes(&BAD_ENTRY_REPORT.replace("<TASK>", guess));
    }

    #[test]
    fn a_bad_entry_of_another_making_is_found() {
        is_found(&BAD_ENTRY_REPORT.replace("make_uffd_wp_pte", "rksm_set_pte"));
        is_found(&BAD_ENTRY_REPORT.replace(" make_uffd", " ? make_uffd"));
        is_found(&BAD_ENTRY_REPORT.replace("check_ptes_set", "check_set"));
    }

    #[test]
    fn trouble_within_or_behind_that_report_is_found() {
        is_found(&BAD_ENTRY_REPORT.replace("Modules linked in:", "BUG: Bad page state"));
        is_found(&format!("{BAD_ENTRY_REPORT}\n[   58.1] Call Trace:"));
        is_found(&format!(
            "{BAD_ENTRY_REPORT}\n[   58.1] WARNING: at x+0x1/0x2"
        ));
    }

    #[test]
    fn a_bad_entry_without_a_trace_is_found() {
        let (cut, _) = BAD_ENTRY_REPORT.split_once("[   58.085000]").unwrap();
        is_found(cut);
        let more = "[   59.0] and so on\n".repeat(TRACE_MAX);
        is_found(&format!("{cut}{more}"));
    }

    /// Each kind of trouble, with its name.
    const KINDS: &[(&str, &str)] = &[
        ("WARN", "WARNING: mm/ksm.c:123 at rksm_scan+0x12/0x34, CPU#1: rksmd/77"),
        ("old WARN", "WARNING: CPU: 1 PID: 77 at mm/ksm.c:123 rksm_scan+0x12/0x34"),
        ("kernel BUG", "kernel BUG at mm/rmap.c:1234!"),
        ("null pointer", "BUG: kernel NULL pointer dereference, address: 0000000000000028"),
        ("page fault", "BUG: unable to handle page fault for address: ffffffffc0000000"),
        ("Oops", "Oops: Oops: 0000 [#1] SMP NOPTI"),
        (
            "general protection fault",
            "Oops: general protection fault, probably for non-canonical address 0xdead",
        ),
        ("lockdep circle", "WARNING: possible circular locking dependency detected"),
        ("lockdep recursion", "WARNING: possible recursive locking detected"),
        ("lockdep irq", "WARNING: inconsistent lock state"),
        ("lockdep INFO", "INFO: possible irq lock inversion dependency detected"),
        ("lockdep key", "INFO: trying to register non-static key."),
        ("lock kept", "WARNING: lock held when returning to user space!"),
        ("RCU usage", "WARNING: suspicious RCU usage"),
        ("RCU stall", "rcu: INFO: rcu_preempt self-detected stall on CPU"),
        ("RCU stall of others", "rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:"),
        (
            "RCU expedited stall",
            "rcu: INFO: rcu_preempt detected expedited stalls on CPUs/tasks: { 1-... }",
        ),
        ("soft lockup", "watchdog: BUG: soft lockup - CPU#0 stuck for 22s! [rksmd:77]"),
        ("hard lockup", "watchdog: Watchdog detected hard LOCKUP on cpu 1"),
        ("hung task", "INFO: task rksmd:77 blocked for more than 60 seconds."),
        (
            "rss counter",
            "BUG: Bad rss-counter state mm:00000000a1 type:MM_ANONPAGES val:-1",
        ),
        ("bad page", "BUG: Bad page state in process rksmd  pfn:12345"),
        ("bad page map", "BUG: Bad page map in process python3  pte:8000 pmd:1234"),
        ("refcount", "refcount_t: underflow; use-after-free."),
        (
            "list corruption",
            "list_add corruption. prev->next should be next (ff00), but was ff01.",
        ),
        ("sleeping", "BUG: sleeping function called from invalid context at mm/ksm.c:1"),
        ("scheduling", "BUG: scheduling while atomic: rksmd/77/0x00000002"),
        ("KASAN", "BUG: KASAN: slab-use-after-free in rksm_scan+0x12/0x34"),
        ("UBSAN", "UBSAN: array-index-out-of-bounds in mm/ksm.c:1:2"),
        ("KFENCE", "BUG: KFENCE: use-after-free read in rksm_scan+0x12/0x34"),
        (
            "kmemleak",
            "kmemleak: 3 new suspected memory leaks (see /sys/kernel/debug/kmemleak)",
        ),
        (
            "slab objects",
            "BUG rksm_node (Tainted: G           O       ): Objects remaining on __kmem_cache_shutdown()",
        ),
        ("panic", "Kernel panic - not syncing: Fatal exception"),
        ("call trace", "Call Trace:"),
    ];

    #[test]
    fn each_kind_is_found_and_shown() {
        for (kind, line) in KINDS {
            let line = format!("[    3.123456] {line}");
            let shown = check(&line).unwrap_or_else(|| panic!("{kind} is not found"));
            assert!(shown.contains(&line), "{kind} is not shown: {shown}");
        }
    }

    /// Every pattern in the list is needed: each finds a line made from it.
    #[test]
    fn each_pattern_is_found() {
        for pattern in TROUBLE {
            let line = pattern.replace("%d", "12").replace('*', " x ");
            is_found(&format!("[    3.1] {}", line.trim_start_matches('^')));
        }
    }

    #[test]
    fn a_line_that_begins_with_a_level_is_found() {
        is_found("<4>[    3.1] BUG: Bad page state in process x");
    }

    #[test]
    fn a_line_with_the_id_of_a_caller_is_found() {
        is_found("[    3.1][  T123] WARNING: kernel/x.c:1 at y+0x1/0x2");
    }

    #[test]
    fn what_only_looks_alike_passes() {
        passes(
            "\
[    3.1] DEBUG: all is well
[    3.1] CONFIG_BUG: y
[    3.1] a BUG in the text
[    3.1] rcu: detected nothing
[    3.1] blocked for more than some seconds
[    3.1] kmemleak: new suspected",
        );
    }

    #[test]
    fn stamps() {
        for (line, text) in [
            ("[    3.141592] a", "a"),
            ("[    3.141592]a", "a"),
            ("[    3.141592]  a", " a"),
            ("<4>[    3.141592] a", "a"),
            ("[    3.141592][    C1] a", "a"),
            ("[    3.141592][ a] b", "[ a] b"),
            ("<4>a", "<4>a"),
            ("<x>[    3.141592] a", "<x>[    3.141592] a"),
            ("[] a", "[] a"),
            ("[ 3.1", "[ 3.1"),
            ("[a] b", "[a] b"),
            ("", ""),
        ] {
            let found = without_stamp(line.as_bytes());
            assert_eq!(String::from_utf8_lossy(found), text, "{line:?}");
        }
    }

    #[test]
    fn patterns() {
        for (pattern, text, expected) in [
            ("a*b%d", "xaxbb1", true),
            ("a*b%d", "xaxbb", false),
            ("a*b", "ba", false),
            ("ab*bc", "abc", false),
            ("^a*c", "abc", true),
            ("^a*c", "xabc", false),
            ("%d s", "1 2 s", true),
            ("%d s", "12s", false),
        ] {
            assert_eq!(
                matches(pattern, text.as_bytes()),
                expected,
                "{pattern} {text}"
            );
        }
    }

    /// Show two lines before a report and twelve after it, and no line twice.
    #[test]
    fn lines_around_a_report() {
        let mut log: Vec<String> = (1..=60).map(|n| format!("[    1.0] line {n}")).collect();
        for number in [10, 16, 30] {
            log[number - 1] = format!("[    1.0] WARNING: {number}");
        }
        let shown = |from: usize, to: usize| log[from - 1..to].join("\n  ");
        let expected = format!(
            "kernel log of the guest:\n  ---\n  {}\n  ---\n  {}\n",
            shown(8, 28),
            shown(29, 42)
        );
        let mut out = Vec::new();
        assert!(!is_clean(log.join("\r\n").as_bytes(), &mut out).unwrap());
        assert_eq!(String::from_utf8(out).unwrap(), expected);
    }

    #[test]
    fn no_more_than_twenty_reports() {
        let one = format!("[    1.0] WARNING: here\n{}", "[    1.0] text\n".repeat(20));
        let mut out = Vec::new();
        assert!(!is_clean(one.repeat(30).as_bytes(), &mut out).unwrap());
        let text = String::from_utf8(out).unwrap();
        assert_eq!(text.matches("  ---\n").count(), 20);
        assert_eq!(text.lines().count(), 1 + 20 * (1 + 2 + 1 + 12) - 2);
    }
}
