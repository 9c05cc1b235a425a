// SPDX-License-Identifier: GPL-2.0
//! Turn references to unexported symbols of the kernel into livepatch relocations.
//!
//! The module loader of a kernel with livepatch support resolves such references by itself, see
//! `Documentation/livepatch/module-elf-format.rst` in the kernel's source. It expects:
//!
//! - `livepatch=...` in `.modinfo`,
//! - the symbol named `.klp.sym.vmlinux.<name>,<position>`, with section index `SHN_LIVEPATCH`,
//! - relocations against such symbols, and no others, in sections named `.klp.rela.vmlinux.<target
//!   section>` that carry `SHF_RELA_LIVEPATCH` and `SHF_ALLOC`.
//!
//! The loader processes the relocation sections of both kinds in one pass, before any special section (jump
//! labels, static calls, alternatives, exception tables, initialisation code, ...). So all target sections
//! are treated alike. Relocations of sections that are not loaded (debug information) are never applied and
//! stay where they are.

use crate::exports::{Access, Exports};
use crate::list::Symbol;
use crate::symtab::KernelSymbols;
use anyhow::{ensure, Context, Result};
use object::build::elf::{Builder, Relocation, SectionData, SectionId, SymbolId};
use object::read::elf::FileHeader;
use object::{elf, Endianness};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;

/// Section flag of livepatch relocations.
pub const SHF_RELA_LIVEPATCH: u32 = 0x0010_0000;
/// Section index of livepatch symbols.
pub const SHN_LIVEPATCH: u16 = 0xff20;
/// Prefix of the names of livepatch relocation sections for the kernel proper.
pub const SECTION_PREFIX: &str = ".klp.rela.vmlinux.";
/// Prefix of the names of livepatch symbols of the kernel proper.
pub const SYMBOL_PREFIX: &str = ".klp.sym.vmlinux.";

/// Size and alignment of an `Elf64_Rela`.
const RELA_SIZE: u64 = 24;
const RELA_ALIGN: u64 = 8;

/// The relocations that the x86-64 module loader knows.
const KNOWN_RELOCATIONS: [u32; 7] = [
    elf::R_X86_64_NONE,
    elf::R_X86_64_64,
    elf::R_X86_64_32,
    elf::R_X86_64_32S,
    elf::R_X86_64_PC32,
    elf::R_X86_64_PLT32,
    elf::R_X86_64_PC64,
];

/// What the tool knows about the kernel.
pub struct Kernel<'a> {
    /// The unexported symbols that the module is allowed to use.
    pub list: &'a [Symbol],
    /// The exported symbols.
    pub exports: &'a Exports,
    /// All symbols, if they are known.
    pub symbols: Option<&'a KernelSymbols>,
}

/// All the reasons why a module was refused.
#[derive(Debug)]
pub struct Refused(pub Vec<String>);

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the module is refused")?;
        self.0.iter().try_for_each(|fault| write!(f, "\n{fault}"))
    }
}

impl std::error::Error for Refused {}

/// A module that the loader will accept.
pub struct Linked {
    /// The new file.
    pub module: Vec<u8>,
    /// The number of symbols that became livepatch symbols.
    pub symbols: usize,
    /// The number of relocations that were moved.
    pub relocations: usize,
    /// Notes for the user, one line each.
    pub notes: Vec<String>,
}

/// Rewrite a module.
pub fn postlink(module: &[u8], kernel: &Kernel<'_>) -> Result<Linked> {
    check_input(module)?;
    let mut elf = Builder::read64(module).context("cannot take the file apart")?;

    let mut info = ModInfo::read(&elf)?;
    let mut notes = Vec::new();
    let used = classify(&elf, &info, kernel, &mut notes)?;
    let moved = move_relocations(&mut elf, &used)?;
    rename_symbols(&mut elf, &used);
    info.add_livepatch(&mut elf);

    let mut module = Vec::new();
    elf.write(&mut module)
        .context("cannot lay out the new file")?;
    Ok(Linked {
        module,
        symbols: used.len(),
        relocations: moved,
        notes,
    })
}

/// Refuse any file that is not a freshly linked module.
fn check_input(module: &[u8]) -> Result<()> {
    let header = elf::FileHeader64::<Endianness>::parse(module).context("not a 64-bit ELF file")?;
    let endian = header.endian()?;
    ensure!(
        header.e_machine(endian) == elf::EM_X86_64 && header.e_type(endian) == elf::ET_REL,
        "not a kernel module for x86-64"
    );
    let sections = header.sections(endian, module)?;
    for section in sections.iter() {
        let name = sections.section_name(endian, section)?;
        ensure!(
            !name.starts_with(b".klp."),
            "post-linked already: it has a section {}",
            String::from_utf8_lossy(name)
        );
    }
    Ok(())
}

/// The contents of `.modinfo`.
struct ModInfo {
    section: SectionId,
    name: String,
    imports: Vec<String>,
    livepatch: bool,
}

impl ModInfo {
    fn read(elf: &Builder<'_>) -> Result<Self> {
        let section = elf
            .sections
            .iter()
            .find(|section| section.name.as_slice() == b".modinfo")
            .context("no .modinfo section: not a kernel module")?;
        let SectionData::Data(data) = &section.data else {
            anyhow::bail!(".modinfo has no data");
        };
        let mut info = ModInfo {
            section: section.id(),
            name: String::new(),
            imports: Vec::new(),
            livepatch: false,
        };
        for entry in data.split(|&byte| byte == 0) {
            let entry = String::from_utf8_lossy(entry);
            match entry.split_once('=') {
                Some(("name", name)) => info.name = name.to_string(),
                Some(("import_ns", namespace)) => info.imports.push(namespace.to_string()),
                Some(("livepatch", _)) => info.livepatch = true,
                _ => {}
            }
        }
        Ok(info)
    }

    fn add_livepatch(&mut self, elf: &mut Builder<'_>) {
        if self.livepatch {
            return;
        }
        if let SectionData::Data(data) = &mut elf.sections.get_mut(self.section).data {
            let data = data.to_mut();
            if data.last().is_some_and(|&byte| byte != 0) {
                data.push(0);
            }
            data.extend_from_slice(b"livepatch=Y\0");
        }
        self.livepatch = true;
    }
}

/// Decide for each undefined symbol how it will be resolved. Return those that become livepatch symbols.
fn classify(
    elf: &Builder<'_>,
    info: &ModInfo,
    kernel: &Kernel<'_>,
    notes: &mut Vec<String>,
) -> Result<HashMap<usize, Symbol>> {
    use object::build::Id;

    let listed: HashMap<&[u8], &Symbol> = kernel
        .list
        .iter()
        .map(|symbol| (symbol.name.as_bytes(), symbol))
        .collect();
    let mut used = HashMap::new();
    let mut used_names = HashSet::new();
    let mut faults = Vec::new();

    for symbol in &elf.symbols {
        if symbol.section.is_some() || symbol.st_shndx != elf::SHN_UNDEF || symbol.name.is_empty() {
            continue;
        }
        let name = String::from_utf8_lossy(&symbol.name);
        let access = kernel.exports.access(&name, &info.name, &info.imports);
        match (listed.get(symbol.name.as_slice()), access) {
            (Some(_), Access::Granted) => {
                // It is not moved, but counts as used: one fault is enough.
                used_names.insert(name.to_string());
                faults.push(format!(
                    "{name}: is exported, so it must not be on the list"
                ));
            }
            (Some(&entry), _) => {
                used_names.insert(name.to_string());
                used.insert(symbol.id().index(), entry.clone());
            }
            (None, Access::Granted) => {}
            // The loader ignores this one as well.
            (None, _) if name == "_GLOBAL_OFFSET_TABLE_" => {}
            (None, _) if symbol.st_bind() == elf::STB_WEAK => {
                notes.push(format!("{name}: weak, and nothing will define it"));
            }
            (None, Access::OtherNamespace(namespace)) => faults.push(format!(
                "{name}: is exported only to namespace {namespace}, and not on the list"
            )),
            (None, Access::None) => {
                faults.push(format!("{name}: is neither exported nor on the list"));
            }
        }
    }

    for entry in kernel.list {
        if !entry.optional && !used_names.contains(&entry.name) {
            faults.push(format!(
                "{}: is on the list, but the module does not use it",
                entry.name
            ));
        } else if let Some(symbols) = kernel.symbols {
            faults.extend(symbols.objection(&entry.name, entry.sympos));
        }
    }
    if kernel.symbols.is_none() && !kernel.list.is_empty() {
        notes.push(
            "no symbol table of the kernel at hand: the loader will check the names".to_string(),
        );
    }
    if !faults.is_empty() {
        faults.sort();
        return Err(Refused(faults).into());
    }
    Ok(used)
}

/// Move the relocations against the used symbols into sections of their own. Return their number.
fn move_relocations(elf: &mut Builder<'_>, used: &HashMap<usize, Symbol>) -> Result<usize> {
    use object::build::Id;

    let is_used = |symbol: Option<SymbolId>| symbol.and_then(|id| used.get(&id.index()));
    let loaded: HashMap<usize, Vec<u8>> = elf
        .sections
        .iter()
        .filter(|section| section.is_alloc())
        .map(|section| (section.id().index(), section.name.to_vec()))
        .collect();
    let mut faults = Vec::new();
    let mut moved: BTreeMap<usize, (SectionId, Vec<Relocation>)> = BTreeMap::new();
    let mut symtab = None;

    for section in &mut elf.sections {
        let name = String::from_utf8_lossy(&section.name).into_owned();
        let relocations = match &mut section.data {
            SectionData::Symbol => {
                symtab = Some(section.id());
                continue;
            }
            SectionData::Relocation(relocations) => relocations,
            _ => continue,
        };
        let Some(target) = section.sh_info_section else {
            faults.push(format!("{name}: does not say which section it relocates"));
            continue;
        };
        if !loaded.contains_key(&target.index()) {
            continue;
        }
        for relocation in relocations.iter() {
            let Some(symbol) = is_used(relocation.symbol) else {
                continue;
            };
            if section.sh_type != elf::SHT_RELA {
                faults.push(format!(
                    "{name}: refers to {} without an explicit addend",
                    symbol.name
                ));
            }
            if !KNOWN_RELOCATIONS.contains(&relocation.r_type) {
                faults.push(format!(
                    "{name}: relocation type {} against {} at {:#x} is unknown to the module loader",
                    relocation.r_type, symbol.name, relocation.r_offset
                ));
            }
        }
        let (ours, theirs): (Vec<_>, Vec<_>) = relocations
            .drain(..)
            .partition(|relocation| is_used(relocation.symbol).is_some());
        // An empty section would do no harm, but some readers of ELF files reject it.
        section.delete = theirs.is_empty() && !ours.is_empty();
        *relocations = theirs;
        if !ours.is_empty() {
            let entry = moved.entry(target.index()).or_insert((target, Vec::new()));
            entry.1.extend(ours);
        }
    }
    if !faults.is_empty() {
        return Err(Refused(faults).into());
    }

    let mut count = 0;
    for (index, (target, relocations)) in moved {
        count += relocations.len();
        let mut name = SECTION_PREFIX.as_bytes().to_vec();
        name.extend_from_slice(&loaded[&index]);
        let section = elf.sections.add();
        section.name = name.into();
        section.sh_type = elf::SHT_RELA;
        section.sh_flags = u64::from(SHF_RELA_LIVEPATCH | elf::SHF_ALLOC | elf::SHF_INFO_LINK);
        section.sh_link_section = symtab;
        section.sh_info_section = Some(target);
        section.sh_addralign = RELA_ALIGN;
        section.sh_entsize = RELA_SIZE;
        section.data = SectionData::Relocation(relocations);
    }
    Ok(count)
}

/// Turn the used symbols into livepatch symbols.
fn rename_symbols(elf: &mut Builder<'_>, used: &HashMap<usize, Symbol>) {
    use object::build::Id;

    for symbol in &mut elf.symbols {
        if let Some(entry) = used.get(&symbol.id().index()) {
            let name = format!("{SYMBOL_PREFIX}{},{}", entry.name, entry.sympos);
            symbol.name = name.into_bytes().into();
            symbol.st_shndx = SHN_LIVEPATCH;
            // A livepatch symbol is found or the load fails, so it cannot be weak.
            symbol.set_st_info(elf::STB_GLOBAL, symbol.st_type());
        }
    }
}
