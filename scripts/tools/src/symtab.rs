// SPDX-License-Identifier: GPL-2.0
//! The kernel's own symbol table, if there is one.
//!
//! A distribution's unpacked vmlinuz has none, and its System.map may be a placeholder. Then only the module
//! loader can check names.

use anyhow::{Context, Result};
use object::read::elf::{FileHeader, Sym};
use object::{elf, Endianness};
use std::collections::HashMap;

/// How often each name occurs in the kernel's symbol table.
pub struct KernelSymbols(HashMap<String, u32>);

impl KernelSymbols {
    fn count<'a>(names: impl Iterator<Item = &'a str>) -> Option<Self> {
        let mut counts = HashMap::new();
        for name in names {
            *counts.entry(name.to_string()).or_insert(0) += 1;
        }
        // A few lines are a placeholder, as a kernel has tens of thousands.
        (counts.len() >= 1000).then_some(KernelSymbols(counts))
    }

    /// Read a `System.map`. `None` if it is only a placeholder.
    pub fn from_system_map(text: &str) -> Option<Self> {
        Self::count(
            text.lines()
                .filter_map(|line| line.split_ascii_whitespace().nth(2)),
        )
    }

    /// Read the symbol table of an uncompressed kernel image. `None` if it has none.
    pub fn from_elf(data: &[u8]) -> Result<Option<Self>> {
        let header =
            elf::FileHeader64::<Endianness>::parse(data).context("not a 64-bit ELF file")?;
        let endian = header.endian()?;
        let symbols = header
            .sections(endian, data)?
            .symbols(endian, data, elf::SHT_SYMTAB)?;
        let strings = symbols.strings();
        Ok(Self::count(
            symbols
                .iter()
                .filter(|symbol| symbol.st_shndx(endian) != elf::SHN_UNDEF)
                .filter_map(|symbol| std::str::from_utf8(symbol.name(endian, strings).ok()?).ok()),
        ))
    }

    /// Return the reason why the loader would refuse this symbol, if it would.
    pub fn objection(&self, name: &str, sympos: u32) -> Option<String> {
        match (self.0.get(name).copied().unwrap_or(0), sympos) {
            (0, _) => Some(format!("{name}: the kernel has no symbol of this name")),
            (count, 0) if count > 1 => Some(format!(
                "{name}: the kernel has {count} symbols of this name, so the list must say which (name,position)"
            )),
            (count, sympos) if sympos > count => Some(format!(
                "{name},{sympos}: the kernel has only {count} of this name"
            )),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn system_map() {
        assert!(KernelSymbols::from_system_map(
            "ffffffffffffffff B The real System.map is elsewhere\n"
        )
        .is_none());

        let mut map = String::from("01 t twice\n02 t twice\n03 D once\n");
        for i in 0..1000 {
            map.push_str(&format!("ff T filler{i}\n"));
        }
        let symbols = KernelSymbols::from_system_map(&map).unwrap();
        assert_eq!(symbols.objection("once", 0), None);
        assert_eq!(symbols.objection("once", 1), None);
        assert_eq!(symbols.objection("twice", 2), None);
        for (name, sympos, says) in [
            ("never", 0, "no symbol"),
            ("twice", 0, "must say which"),
            ("twice", 3, "only 2"),
        ] {
            let objection = symbols.objection(name, sympos).unwrap();
            assert!(objection.contains(says), "{objection}");
        }
    }
}
