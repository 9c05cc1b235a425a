// SPDX-License-Identifier: GPL-2.0
//! The kernel log from a given moment on.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;

use anyhow::{bail, Context, Result};

/// A reader of the messages that the kernel logs after its creation.
pub struct Log(File);

impl Log {
    pub fn from_now() -> Result<Self> {
        let mut file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/kmsg")
            .context("/dev/kmsg")?;
        file.seek(SeekFrom::End(0)).context("/dev/kmsg")?;
        Ok(Self(file))
    }

    /// Return the messages logged since, one line each.
    pub fn lines(&mut self) -> Result<Vec<String>> {
        let mut lines = Vec::new();
        let mut record = [0u8; 8192];
        loop {
            match self.0.read(&mut record) {
                Ok(0) => return Ok(lines),
                Ok(n) => lines.extend(message(&record[..n])),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(lines),
                // The kernel overwrote older messages before we read them.
                Err(e) if e.raw_os_error() == Some(libc::EPIPE) => continue,
                Err(e) => return Err(e).context("/dev/kmsg"),
            }
        }
    }

    /// Check that some message since contains all of `words`.
    pub fn expect(&mut self, words: &[&str]) -> Result<()> {
        let lines = self.lines()?;
        if lines.iter().any(|l| words.iter().all(|w| l.contains(w))) {
            return Ok(());
        }
        bail!("no message with {words:?} in the kernel log, only {lines:?}")
    }
}

/// Return the text of a record: the part between `;` and the first newline.
fn message(record: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(record);
    let (_, message) = text.split_once(';')?;
    message.lines().next().map(String::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_becomes_its_message() {
        let record = b"6,339,5140900,-;rksm: loaded\n SUBSYSTEM=x\n";
        assert_eq!(message(record).as_deref(), Some("rksm: loaded"));
    }
}
