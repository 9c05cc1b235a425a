// SPDX-License-Identifier: GPL-2.0
//! Tests of post-linking: small modules made here are read back with the plain ELF reader.

use object::read::elf::{FileHeader, SectionHeader, Sym};
use object::write::{Object, Relocation, StandardSection, Symbol, SymbolSection};
use object::{elf, Architecture, BinaryFormat, Endianness, RelocationFlags, SectionFlags};
use object::{SectionKind, SymbolFlags, SymbolKind, SymbolScope};
use rksm_tools::exports::Exports;
use rksm_tools::list::parse_symbols;
use rksm_tools::postlink::{postlink, Kernel, Linked};
use rksm_tools::postlink::{SECTION_PREFIX, SHF_RELA_LIVEPATCH, SHN_LIVEPATCH, SYMBOL_PREFIX};
use rksm_tools::symtab::KernelSymbols;
use std::collections::{BTreeMap, HashMap};
use std::process::Command;

const SYMVERS: &str = "0x0\t_printk\tvmlinux\tEXPORT_SYMBOL\t\n\
                       0x0\tonly_kvm\tvmlinux\tEXPORT_SYMBOL_GPL\tmodule:kvm\n";

/// A module under construction.
struct Module {
    object: Object<'static>,
    undefined: HashMap<String, object::write::SymbolId>,
}

impl Module {
    fn new() -> Self {
        Self::with_info(b"license=GPL\0name=test\0")
    }

    fn with_info(info: &[u8]) -> Self {
        let mut module = Module {
            object: Object::new(BinaryFormat::Elf, Architecture::X86_64, Endianness::Little),
            undefined: HashMap::new(),
        };
        let section =
            module
                .object
                .add_section(Vec::new(), b".modinfo".to_vec(), SectionKind::ReadOnlyData);
        module.object.append_section_data(section, info, 1);
        module
    }

    fn undefined(&mut self, name: &str, weak: bool) -> object::write::SymbolId {
        let add = || {
            self.object.add_symbol(Symbol {
                name: name.as_bytes().to_vec(),
                value: 0,
                size: 0,
                kind: SymbolKind::Unknown,
                scope: SymbolScope::Unknown,
                weak,
                section: SymbolSection::Undefined,
                flags: SymbolFlags::None,
            })
        };
        *self.undefined.entry(name.to_string()).or_insert_with(add)
    }

    fn refer_from(&mut self, section: object::write::SectionId, to: &str, r_type: u32) {
        let symbol = self.undefined(to, false);
        let offset = self.object.append_section_data(section, &[0; 8], 8);
        let relocation = Relocation {
            offset,
            symbol,
            addend: -4,
            flags: RelocationFlags::Elf { r_type },
        };
        self.object.add_relocation(section, relocation).unwrap();
    }

    /// Add a call in `.text`.
    fn call(&mut self, to: &str) {
        let text = self.object.section_id(StandardSection::Text);
        self.refer_from(text, to, elf::R_X86_64_PLT32);
    }

    /// Add a reference from a section of this name.
    fn refer(&mut self, section: &str, to: &str, r_type: u32) {
        let kind = match section.starts_with(".debug") {
            true => SectionKind::Debug,
            false => SectionKind::ReadOnlyData,
        };
        let section = self
            .object
            .add_section(Vec::new(), section.as_bytes().to_vec(), kind);
        self.refer_from(section, to, r_type);
    }

    fn link(&self, list: &str) -> anyhow::Result<Linked> {
        link(&self.object.write().unwrap(), list, None)
    }

    fn faults(&self, list: &str) -> Vec<String> {
        faults(self.link(list))
    }
}

fn link(module: &[u8], list: &str, symbols: Option<&KernelSymbols>) -> anyhow::Result<Linked> {
    let list = parse_symbols(list).unwrap();
    let exports = Exports::parse(SYMVERS).unwrap();
    postlink(
        module,
        &Kernel {
            list: &list,
            exports: &exports,
            symbols,
        },
    )
}

fn faults(result: anyhow::Result<Linked>) -> Vec<String> {
    match result {
        Ok(_) => panic!("was accepted"),
        Err(error) => format!("{error:#}")
            .lines()
            .skip(1)
            .map(Into::into)
            .collect(),
    }
}

/// The contents of a section header, without positions in the file.
#[derive(Clone, Debug, PartialEq)]
struct Header {
    sh_type: u32,
    flags: u64,
    link: String,
    info: String,
    align: u64,
    entsize: u64,
}

/// An ELF file in a comparable form.
#[derive(Debug, Default)]
struct Content {
    /// Names in order.
    order: Vec<String>,
    headers: BTreeMap<String, Header>,
    data: BTreeMap<String, Vec<u8>>,
    /// Relocations by target section: offset, type, name of the symbol, addend.
    relocations: BTreeMap<String, Vec<(u64, u32, String, i64)>>,
    /// Name, section index or name, value, size, info, in order.
    symbols: Vec<(String, String, u64, u64, u8)>,
}

fn content(file: &[u8]) -> Content {
    let header = elf::FileHeader64::<Endianness>::parse(file).unwrap();
    let endian = header.endian().unwrap();
    let sections = header.sections(endian, file).unwrap();
    let symbols = sections.symbols(endian, file, elf::SHT_SYMTAB).unwrap();
    let strings = symbols.strings();
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    let section_name = |index: u32| match index {
        0 => String::new(),
        index => {
            let index = object::SectionIndex(index as usize);
            let section = sections.section(index).unwrap();
            text(sections.section_name(endian, section).unwrap())
        }
    };

    let mut content = Content::default();
    for symbol in symbols.iter() {
        // The name of a section symbol is that of its section.
        let name = match symbol.st_type() {
            elf::STT_SECTION => section_name(symbol.st_shndx(endian).into()),
            _ => text(symbol.name(endian, strings).unwrap()),
        };
        content.symbols.push((
            name,
            match symbol.st_shndx(endian) {
                index if index < elf::SHN_LORESERVE => section_name(index.into()),
                index => format!("{index:#x}"),
            },
            symbol.st_value(endian),
            symbol.st_size(endian),
            symbol.st_info(),
        ));
    }
    for section in sections.iter().skip(1) {
        let name = text(sections.section_name(endian, section).unwrap());
        let has_section_info = section.sh_flags(endian) & u64::from(elf::SHF_INFO_LINK) != 0;
        let info = match has_section_info {
            true => section_name(section.sh_info(endian)),
            false => section.sh_info(endian).to_string(),
        };
        content.order.push(name.clone());
        let fresh = content.headers.insert(
            name.clone(),
            Header {
                sh_type: section.sh_type(endian),
                flags: section.sh_flags(endian),
                link: section_name(section.sh_link(endian)),
                info: info.clone(),
                align: section.sh_addralign(endian),
                entsize: section.sh_entsize(endian),
            },
        );
        assert!(
            fresh.is_none(),
            "two sections {name}: cannot compare by name"
        );
        match section.sh_type(endian) {
            elf::SHT_RELA => {
                let (relas, _) = section.rela(endian, file).unwrap().unwrap();
                let relocations = relas.iter().map(|rela| {
                    let symbol = &content.symbols[rela.r_sym(endian, false) as usize];
                    (
                        rela.r_offset.get(endian),
                        rela.r_type(endian, false),
                        symbol.0.clone(),
                        rela.r_addend.get(endian),
                    )
                });
                let relocations: Vec<_> = relocations.collect();
                content.relocations.insert(name, relocations);
            }
            // The tables of names and symbols are compared by their contents.
            elf::SHT_STRTAB | elf::SHT_SYMTAB => {}
            elf::SHT_NOBITS => {
                let size = section.sh_size(endian).to_string();
                content.data.insert(name, size.into_bytes());
            }
            _ => {
                let data = section.data(endian, file).unwrap();
                content.data.insert(name, data.to_vec());
            }
        }
    }
    content
}

/// Check that the new module is the old one except for the required changes, and that these are well formed.
fn assert_only_moved(old: &[u8], new: &[u8], listed: &[&str]) -> Content {
    let (old, new) = (content(old), content(new));
    let renamed = |name: &str| match listed.contains(&name) {
        true => format!("{SYMBOL_PREFIX}{name},0"),
        false => name.to_string(),
    };

    // Every relocation still exists once: with the others, or in the livepatch section. A section that lost
    // all of them is gone.
    let mut emptied = Vec::new();
    for (name, old_relocations) in &old.relocations {
        let target = &old.headers[name].info;
        let loaded = old.headers[target].flags & u64::from(elf::SHF_ALLOC) != 0;
        let (moved, kept): (Vec<_>, Vec<_>) = old_relocations
            .iter()
            .cloned()
            .map(|(offset, r_type, symbol, addend)| (offset, r_type, renamed(&symbol), addend))
            .partition(|relocation| loaded && relocation.2.starts_with(SYMBOL_PREFIX));
        if kept.is_empty() {
            emptied.push(name);
        }
        assert_eq!(new.relocations.get(name).unwrap_or(&Vec::new()), &kept);
        let section = format!("{SECTION_PREFIX}{target}");
        assert_eq!(new.relocations.get(&section).unwrap_or(&Vec::new()), &moved);
    }

    // All other sections exist, in the old order, with the old headers. The new ones follow.
    let stays = |name: &&String| !emptied.contains(name);
    let stayed: Vec<_> = old.order.iter().filter(stays).cloned().collect();
    assert_eq!(new.order[..stayed.len()], stayed);
    for name in &stayed {
        assert_eq!(new.headers[name], old.headers[name], "{name}");
    }
    for (name, data) in &old.data {
        let mut expected = data.clone();
        if name == ".modinfo" && !String::from_utf8_lossy(data).contains("livepatch=") {
            expected.extend_from_slice(b"livepatch=Y\0");
        }
        assert_eq!(new.data[name], expected, "{name}");
    }

    // Symbols keep their order, as relocations refer to it.
    assert_eq!(new.symbols.len(), old.symbols.len());
    for (old, new) in old.symbols.iter().zip(&new.symbols) {
        assert_eq!(new.0, renamed(&old.0));
        if listed.contains(&old.0.as_str()) {
            assert_eq!(new.1, format!("{SHN_LIVEPATCH:#x}"));
            assert_eq!(new.4 >> 4, elf::STB_GLOBAL);
        } else {
            assert_eq!((&new.1, new.2, new.3, new.4), (&old.1, old.2, old.3, old.4));
        }
    }

    for name in &new.order[stayed.len()..] {
        let target = name.strip_prefix(SECTION_PREFIX).unwrap();
        let flags = SHF_RELA_LIVEPATCH | elf::SHF_ALLOC | elf::SHF_INFO_LINK;
        let expected = Header {
            sh_type: elf::SHT_RELA,
            flags: flags.into(),
            link: ".symtab".into(),
            info: target.into(),
            align: 8,
            entsize: 24,
        };
        assert_eq!(new.headers[name], expected, "{name}");
        assert!(!new.relocations[name].is_empty(), "{name}");
    }
    new
}

#[test]
fn calls_are_moved() {
    let mut module = Module::new();
    module.call("_printk");
    module.call("mm_find_pmd");
    module.call("lru_add_drain_all");
    module.call("mm_find_pmd");
    let old = module.object.write().unwrap();
    let linked = module.link("mm_find_pmd\nlru_add_drain_all\n").unwrap();
    assert_eq!((linked.symbols, linked.relocations), (2, 3));

    let new = assert_only_moved(&old, &linked.module, &["mm_find_pmd", "lru_add_drain_all"]);
    let section = ".klp.rela.vmlinux..text";
    assert_eq!(new.order.last().unwrap(), section);
    let find = ".klp.sym.vmlinux.mm_find_pmd,0".to_string();
    let drain = ".klp.sym.vmlinux.lru_add_drain_all,0".to_string();
    assert_eq!(
        new.relocations[section],
        [
            (8, elf::R_X86_64_PLT32, find.clone(), -4),
            (16, elf::R_X86_64_PLT32, drain, -4),
            (24, elf::R_X86_64_PLT32, find, -4),
        ]
    );
    assert_eq!(new.relocations[".rela.text"].len(), 1);
}

#[test]
fn every_loaded_section_has_its_own() {
    let sections = [
        ".init.text",
        ".rodata",
        "__jump_table",
        "__ex_table",
        ".altinstructions",
    ];
    let mut module = Module::new();
    for section in sections {
        module.refer(section, "f", elf::R_X86_64_PC32);
    }
    module.refer(".debug_info", "f", elf::R_X86_64_64);
    let old = module.object.write().unwrap();
    let linked = module.link("f").unwrap();
    assert_eq!(linked.relocations, sections.len());
    let new = assert_only_moved(&old, &linked.module, &["f"]);
    for section in sections {
        assert_eq!(
            new.relocations[&format!("{SECTION_PREFIX}{section}")].len(),
            1
        );
    }
    assert_eq!(new.relocations[".rela.debug_info"].len(), 1);
}

#[test]
fn position_goes_into_the_name() {
    let mut module = Module::new();
    module.call("twice");
    let linked = module.link("twice,2").unwrap();
    let new = content(&linked.module);
    assert!(new
        .symbols
        .iter()
        .any(|s| s.0 == ".klp.sym.vmlinux.twice,2"));
}

#[test]
fn livepatch_mark_is_added_once() {
    for (before, after) in [
        (&b"license=GPL\0"[..], &b"license=GPL\0livepatch=Y\0"[..]),
        (b"license=GPL", b"license=GPL\0livepatch=Y\0"),
        (b"livepatch=Y\0license=GPL\0", b"livepatch=Y\0license=GPL\0"),
    ] {
        let mut module = Module::with_info(before);
        module.call("f");
        let linked = module.link("f").unwrap();
        assert_eq!(content(&linked.module).data[".modinfo"], after);
    }
}

#[test]
fn a_listed_weak_symbol_becomes_required() {
    let mut module = Module::new();
    module.undefined("f", true);
    module.call("f");
    let old = module.object.write().unwrap();
    let linked = module.link("f").unwrap();
    assert_only_moved(&old, &linked.module, &["f"]);
}

#[test]
fn an_unlisted_weak_symbol_stays() {
    let mut module = Module::new();
    module.undefined("maybe", true);
    module.call("maybe");
    module.call("_GLOBAL_OFFSET_TABLE_");
    let old = module.object.write().unwrap();
    let linked = module.link("").unwrap();
    assert_eq!(linked.notes, ["maybe: weak, and nothing will define it"]);
    assert_only_moved(&old, &linked.module, &[]);
}

#[test]
fn all_faults_are_told_at_once() {
    let mut module = Module::new();
    for name in ["unlisted", "another", "_printk", "only_kvm", "fine"] {
        module.call(name);
    }
    assert_eq!(
        module.faults("fine\n_printk\nunused\nunneeded?\n"),
        [
            "_printk: is exported, so it must not be on the list",
            "another: is neither exported nor on the list",
            "only_kvm: is exported only to namespace module:kvm, and not on the list",
            "unlisted: is neither exported nor on the list",
            "unused: is on the list, but the module does not use it",
        ]
    );
}

#[test]
fn a_namespace_of_others_can_be_listed() {
    let mut module = Module::new();
    module.call("only_kvm");
    assert_eq!(module.link("only_kvm").unwrap().symbols, 1);

    let mut module = Module::with_info(b"name=test\0import_ns=module:kvm\0");
    module.call("only_kvm");
    assert_eq!(
        module.faults("only_kvm"),
        ["only_kvm: is exported, so it must not be on the list"]
    );
}

#[test]
fn a_listed_name_that_the_module_defines_is_unused() {
    let mut module = Module::new();
    let text = module.object.section_id(StandardSection::Text);
    let symbol = module.object.add_symbol(Symbol {
        name: b"own".to_vec(),
        value: 0,
        size: 0,
        kind: SymbolKind::Text,
        scope: SymbolScope::Linkage,
        weak: false,
        section: SymbolSection::Undefined,
        flags: SymbolFlags::None,
    });
    module.object.add_symbol_data(symbol, text, &[0xc3], 1);
    assert_eq!(
        module.faults("own"),
        ["own: is on the list, but the module does not use it"]
    );
}

#[test]
fn names_are_looked_up_in_the_kernel() {
    let mut map = String::from("01 T once\n02 t twice\n03 t twice\n");
    for i in 0..1000 {
        map.push_str(&format!("04 T filler{i}\n"));
    }
    let symbols = KernelSymbols::from_system_map(&map);
    let mut module = Module::new();
    for name in ["once", "twice", "never"] {
        module.call(name);
    }
    let module = module.object.write().unwrap();
    assert_eq!(
        faults(link(&module, "once\ntwice\nnever\n", symbols.as_ref())),
        [
            "never: the kernel has no symbol of this name",
            "twice: the kernel has 2 symbols of this name, so the list must say which (name,position)",
        ]
    );
}

#[test]
fn unknown_relocations_are_refused() {
    let mut module = Module::new();
    let text = module.object.section_id(StandardSection::Text);
    module.refer_from(text, "f", elf::R_X86_64_GOTPCREL);
    let faults = module.faults("f");
    assert_eq!(faults.len(), 1);
    let says = ".rela.text: relocation type 9 against f at 0x0 is unknown";
    assert!(faults[0].starts_with(says), "{faults:?}");
}

#[test]
fn other_files_are_refused() {
    let mut module = Module::new();
    module.call("f");
    let once = module.link("f").unwrap().module;
    let no_info = Object::new(BinaryFormat::Elf, Architecture::X86_64, Endianness::Little);
    let arm = Object::new(BinaryFormat::Elf, Architecture::Aarch64, Endianness::Little);
    for (file, says) in [
        (once, "post-linked already"),
        (b"no ELF".to_vec(), "not a 64-bit ELF file"),
        (Vec::new(), "not a 64-bit ELF file"),
        (arm.write().unwrap(), "not a kernel module for x86-64"),
        (no_info.write().unwrap(), "no .modinfo section"),
    ] {
        let error = match link(&file, "f", None) {
            Ok(_) => panic!("was accepted, but {says}"),
            Err(error) => format!("{error:#}"),
        };
        assert!(error.contains(says), "{error}");
    }
}

#[test]
fn odd_alignment_and_flags_survive() {
    let mut module = Module::new();
    module.call("f");
    let this = module.object.add_section(
        Vec::new(),
        b".gnu.linkonce.this_module".to_vec(),
        SectionKind::Data,
    );
    module.object.append_section_data(this, &[7; 1280], 64);
    module.object.section_mut(this).flags = SectionFlags::Elf {
        sh_flags: u64::from(elf::SHF_ALLOC | elf::SHF_WRITE),
    };
    for (name, align) in [(".orc_unwind", 1), (".note.Linux", 4), ("__versions", 32)] {
        let kind = match name.starts_with(".note") {
            true => SectionKind::Note,
            false => SectionKind::ReadOnlyData,
        };
        let section = module.object.add_section(Vec::new(), name.into(), kind);
        module.object.append_section_data(section, &[9; 20], align);
    }
    let bss = module.object.section_id(StandardSection::UninitializedData);
    module.object.append_section_bss(bss, 4096, 64);
    let old = module.object.write().unwrap();
    let linked = module.link("f").unwrap();
    assert_only_moved(&old, &linked.module, &["f"]);
}

/// C code that compiles to debug information and special sections.
const SOURCE: &str = r#"
extern void drain(void); extern int exported(int); extern long counter; extern void *object;
static const char info[] __attribute__((section(".modinfo"), used, aligned(1))) = "license=GPL";
void (*const constant)(void) = drain;
void (*variable)(void) = drain;
long *pointer = &counter;
static int zeroes[100];
struct { long a[160]; } __this_module __attribute__((section(".gnu.linkonce.this_module"), aligned(64)));
__attribute__((section(".init.text"))) int init_module(void)
{
	drain();
	asm volatile(".pushsection __jump_table,\"aw\"\n.balign 8\n.quad counter - .\n.popsection");
	return exported(zeroes[3]) + counter + (object != 0);
}
__attribute__((section(".exit.text"))) void cleanup_module(void) { variable(); constant(); drain(); }
"#;

#[test]
fn compiled_code() {
    let Ok(version) = Command::new("gcc").arg("-dumpmachine").output() else {
        eprintln!("no gcc: nothing to compile");
        return;
    };
    if !version.stdout.starts_with(b"x86_64") {
        eprintln!("gcc is not one for x86-64");
        return;
    }
    let dir = std::path::Path::new(env!("CARGO_TARGET_TMPDIR"));
    let (source, object) = (dir.join("module.c"), dir.join("module.o"));
    std::fs::write(&source, SOURCE).unwrap();
    let status = Command::new("gcc")
        .args("-c -g -O2 -mcmodel=kernel -fno-pic -fcf-protection=branch -mno-red-zone".split(' '))
        .arg("-o")
        .args([&object, &source])
        .status()
        .unwrap();
    assert!(status.success());

    let old = std::fs::read(&object).unwrap();
    let list = parse_symbols("drain\ncounter\nobject\n").unwrap();
    let exports = Exports::parse("0x0\texported\tvmlinux\tEXPORT_SYMBOL\t\n").unwrap();
    let kernel = Kernel {
        list: &list,
        exports: &exports,
        symbols: None,
    };
    let linked = postlink(&old, &kernel).unwrap();
    let new = assert_only_moved(&old, &linked.module, &["drain", "counter", "object"]);
    for target in [
        ".init.text",
        ".exit.text",
        ".rodata",
        ".data",
        "__jump_table",
    ] {
        assert!(
            new.relocations.keys().any(|name| {
                name.strip_prefix(SECTION_PREFIX)
                    .is_some_and(|section| section.starts_with(target))
            }),
            "{target}: {:?}",
            new.relocations.keys()
        );
    }
}
