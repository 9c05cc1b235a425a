// SPDX-License-Identifier: GPL-2.0
//! The machine that the figures were measured on.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    pub cpu: String,
    pub cpus: usize,
    pub memory_mib: u64,
    pub host_kernel: String,
    pub guest_kernel: String,
    pub qemu: String,
    pub exact: String,
    pub wall: String,
    pub runs: usize,
    pub revision: String,
}

/// Return the value of `key` in a text of `key : value` lines.
fn field<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        (name.trim() == key).then(|| value.trim())
    })
}

fn first_line(command: &str, args: &[&str]) -> Option<String> {
    let output = Command::new(command).args(args).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    Some(text.lines().next()?.to_string())
}

impl Machine {
    /// Describe this machine. The arguments are facts that only the caller knows.
    pub fn describe(guest_kernel: &str, accel: &str, runs: usize, revision: &str) -> Result<Self> {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").context("cpuinfo")?;
        let meminfo = fs::read_to_string("/proc/meminfo").context("meminfo")?;
        let kib: u64 = field(&meminfo, "MemTotal")
            .and_then(|v| v.split(' ').next()?.parse().ok())
            .context("MemTotal")?;
        Ok(Self {
            cpu: field(&cpuinfo, "model name").unwrap_or("unknown").into(),
            cpus: std::thread::available_parallelism()?.get(),
            memory_mib: kib / 1024,
            host_kernel: first_line("uname", &["-r"]).unwrap_or_default(),
            guest_kernel: guest_kernel.into(),
            qemu: first_line("qemu-system-x86_64", &["--version"]).unwrap_or_default(),
            exact: "TCG, -icount shift=0,sleep=off, 1 CPU".into(),
            wall: format!("{}, 2 CPUs", accel.to_uppercase()),
            runs,
            revision: revision.into(),
        })
    }

    pub fn load(file: &Path) -> Result<Self> {
        let text = fs::read_to_string(file).with_context(|| file.display().to_string())?;
        serde_json::from_str(&text).with_context(|| file.display().to_string())
    }

    pub fn save(&self, file: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self)? + "\n";
        fs::write(file, text).with_context(|| file.display().to_string())
    }

    pub fn markdown(&self) -> String {
        format!(
            "| | |\n| --- | --- |\n| CPU | {} ({} CPUs, {} MiB) |\n| host kernel | {} |\n\
             | guest kernel | {} |\n| QEMU | {} |\n| exact mode | {} |\n\
             | wall mode | {}; {} runs |\n| revision | {} |\n",
            self.cpu,
            self.cpus,
            self.memory_mib,
            self.host_kernel,
            self.guest_kernel,
            self.qemu,
            self.exact,
            self.wall,
            self.runs,
            self.revision
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let text = "model\t\t: 85\nmodel name\t: Some CPU @ 2 GHz\n";
        assert_eq!(field(text, "model name"), Some("Some CPU @ 2 GHz"));
        assert_eq!(field(text, "name"), None);
    }
}
