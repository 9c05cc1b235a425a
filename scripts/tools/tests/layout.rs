// SPDX-License-Identifier: GPL-2.0
//! Tests of the generated file.

mod common;
#[path = "common/notes.rs"]
mod notes;

use common::{small_kernel, Maker, STRUCT};
use notes::note;
use rksm_tools::layout::{find_btf, find_build_id, generate, Generated, Types};
use rksm_tools::list::{parse_interfaces, Symbol};

fn run(data: &[u8], symbols: &[&str], interfaces: &[&str]) -> anyhow::Result<Generated> {
    let types = Types::parse(data)?;
    let symbols: Vec<_> = symbols
        .iter()
        .map(|name| Symbol {
            optional: false,
            name: name.to_string(),
            sympos: 0,
        })
        .collect();
    let interfaces = parse_interfaces(&interfaces.join("\n"))?;
    generate(&types.btf(), Some(&[0xab, 0x0c]), &symbols, &interfaces)
}

fn error(data: &[u8], symbols: &[&str], structs: &[&str]) -> String {
    match run(data, symbols, structs) {
        Ok(_) => panic!("was accepted"),
        Err(error) => format!("{error:#}"),
    }
}

#[test]
fn constants_and_table() {
    let made = run(
        &small_kernel().finish(),
        &["walk", "jiffies", "drain"],
        &["constant EIGHT", "enum color", "mm_struct"],
    )
    .unwrap();
    for line in [
        "pub const KSM_STABLE_NODE_SIZE: usize = 56;",
        "pub const KSM_STABLE_NODE_ALIGN: usize = 8;",
        "pub const KSM_STABLE_NODE_NODE: usize = 0;",
        "pub const KSM_STABLE_NODE_HLIST_DUP: usize = 8;",
        "pub const KSM_STABLE_NODE_LIST: usize = 24;",
        "pub const KSM_STABLE_NODE_HLIST: usize = 40;",
        "pub const KSM_STABLE_NODE_KPFN: usize = 48;",
        "pub const KSM_STABLE_NODE_CHAIN_PRUNE_TIME: usize = 48;",
        "pub const KSM_RMAP_ITEM_ADDRESS: usize = 16;",
        "pub const KSM_RMAP_ITEM_AGE: usize = 28;",
        "pub const KSM_RMAP_ITEM_LINEAR_PAGE_INDEX: usize = 24;",
        "pub const KSM_RMAP_ITEM_HLIST: usize = 32;",
        "pub const KSM_MM_SLOT_SLOT: usize = 0;",
        "pub static EXPECTED: Table<5> = Table {",
        "// Not checked, no function in BTF: jiffies",
        "/// Build id of the image: ab0c.",
        "pub static BUILD_ID: Record = Record::new(&[0xab, 0x0c]);",
    ] {
        assert!(
            made.text.lines().any(|l| l == line),
            "no line {line}\n{}",
            made.text
        );
    }
    let entries: Vec<_> = made
        .text
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Entry::new("))
        .map(|line| line.split(", 0x").next().unwrap())
        .collect();
    assert_eq!(
        entries,
        [
            "KIND_STRUCT, \"mm_struct\"",
            "KIND_FUNC, \"drain\"",
            "KIND_FUNC, \"walk\"",
            "KIND_ENUM, \"color\"",
            "KIND_CONSTANT, \"EIGHT\""
        ]
    );
    assert_eq!(made.signatures, 5);
    assert_eq!(made.notes.len(), 1);
    assert!(made.notes[0].ends_with(": jiffies"), "{:?}", made.notes);
}

#[test]
fn the_same_input_makes_the_same_file() {
    let data = small_kernel().finish();
    let one = run(&data, &["walk", "drain"], &["mm_struct", "all"]).unwrap();
    let other = run(&data, &["drain"], &["func walk", "all", "mm_struct"]).unwrap();
    assert_eq!(one.text, other.text);
}

#[test]
fn several_structures_of_one_name() {
    let mut m = small_kernel();
    let long = m.int("long unsigned int", 8);
    m.aggregate(STRUCT, "mm_struct", 32, &[("other", long, 0)]);
    let made = run(&m.finish(), &[], &["mm_struct"]).unwrap();
    assert_eq!(made.text.matches("\"mm_struct\"").count(), 2);
    assert_eq!(made.signatures, 2);
}

#[test]
fn what_is_missing_is_told() {
    let data = small_kernel().finish();
    let says = error(&data, &[], &["no_such_struct"]);
    assert!(
        says.contains("struct no_such_struct is listed, but not in"),
        "{says}"
    );

    let says = error(&data, &[], &["func mm_struct"]);
    assert!(
        says.contains("function mm_struct is listed, but not in"),
        "{says}"
    );

    for (listed, says) in [
        ("enum mm_struct", "enum mm_struct is listed, but not in"),
        ("constant ONE", "constant ONE is listed, but not in"),
    ] {
        let error = error(&data, &[], &[listed]);
        assert!(error.contains(says), "{error}");
    }
    // It is accepted if it may be missing.
    assert_eq!(run(&data, &[], &["no_such_struct?"]).unwrap().signatures, 0);

    let empty = Maker::new().finish();
    let says = error(&empty, &[], &[]);
    assert!(says.contains("struct ksm_stable_node is not in"), "{says}");

    // A stable node without the members that the kernel accesses.
    let mut m = Maker::new();
    let long = m.int("long unsigned int", 8);
    m.aggregate(STRUCT, "ksm_stable_node", 8, &[("hlist", long, 0)]);
    let says = error(&m.finish(), &[], &[]);
    assert!(
        says.contains("struct ksm_stable_node of this kernel lacks kpfn"),
        "{says}"
    );

    // Two different ones are ambiguous.
    let mut m = small_kernel();
    m.aggregate(STRUCT, "ksm_rmap_item", 8, &[("hlist", 1, 0)]);
    let says = error(&m.finish(), &[], &[]);
    assert!(
        says.contains("several different struct ksm_rmap_item"),
        "{says}"
    );

    let says = error(&data, &["f".repeat(63).as_str()], &[]);
    assert!(says.contains("longer than 62"), "{says}");
}

/// An ELF file with one section.
fn elf_with(section: &str, content: &[u8]) -> Vec<u8> {
    use object::write::Object;
    use object::{Architecture, BinaryFormat, Endianness, SectionKind};

    let mut elf = Object::new(BinaryFormat::Elf, Architecture::X86_64, Endianness::Little);
    let section = elf.add_section(Vec::new(), section.into(), SectionKind::ReadOnlyData);
    elf.append_section_data(section, content, 8);
    elf.write().unwrap()
}

#[test]
fn image_without_build_id() {
    let types = small_kernel().finish();
    let types = Types::parse(&types).unwrap();
    let made = generate(&types.btf(), None, &[], &[]).unwrap();
    let line = "pub static BUILD_ID: Record = Record::new(&[]);";
    assert!(made.text.lines().any(|l| l == line), "{}", made.text);
}

#[test]
fn build_id_is_found_in_elf() {
    let notes = [note("Linux", 0x101, b"x"), note("GNU", 3, &[7; 20])].concat();
    let image = elf_with(".notes", &notes);
    assert_eq!(find_build_id(&image).unwrap(), Some(&[7; 20][..]));
    assert_eq!(find_build_id(&elf_with(".other", &notes)).unwrap(), None);
    let others = elf_with(".notes", &note("Linux", 3, &[7; 20]));
    assert_eq!(find_build_id(&others).unwrap(), None);

    let says = |image: &[u8]| find_build_id(image).unwrap_err().to_string();
    assert!(says(&small_kernel().finish()).starts_with("raw BTF does not say"));
    let long = says(&elf_with(".notes", &note("GNU", 3, &[7; 65])));
    assert_eq!(long, "the build id has 65 bytes, more than 64");
}

#[test]
fn btf_is_found_in_elf() {
    let btf = small_kernel().finish();
    assert_eq!(find_btf(&btf).unwrap(), btf);

    assert_eq!(find_btf(&elf_with(".BTF", &btf)).unwrap(), btf);
    let says = find_btf(&elf_with(".not.BTF", &btf))
        .unwrap_err()
        .to_string();
    assert!(says.contains("no .BTF section"), "{says}");
}
