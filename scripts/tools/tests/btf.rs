// SPDX-License-Identifier: GPL-2.0
//! Tests of the BTF reader, of signatures and of the check at load.

mod common;

use common::{small_kernel, Maker};
use proptest::prelude::*;
use rksm_tools::abi::btf::{Blob, Btf, Budget, Error, Type};
use rksm_tools::abi::signature::{
    self, check, Entry, Mismatch, Part, ENTRIES_MAX, KIND_CONSTANT, KIND_ENUM, KIND_FUNC,
    KIND_STRUCT, NAME_MAX,
};
use rksm_tools::layout::Types;
use std::fmt::Write as _;

/// Find an interface by its name.
fn find<'a>(btf: &Btf<'a>, kind: u8, name: &str) -> (Type<'a>, Part) {
    let mut found = None;
    for id in 1..=btf.last_id() {
        let ty = btf.get(id).unwrap();
        signature::for_each_interface(btf, &ty, &mut |its_kind, its_name, part| {
            if (its_kind, its_name) == (kind, name.as_bytes()) {
                found.get_or_insert((ty, part));
            }
            Ok(())
        })
        .unwrap();
    }
    found.unwrap()
}

fn signature_of(data: &[u8], kind: u8, name: &str) -> u64 {
    let types = Types::parse(data).unwrap();
    let btf = types.btf();
    let (ty, part) = find(&btf, kind, name);
    signature::signature(&btf, &ty, part).unwrap()
}

fn describe(data: &[u8], kind: u8, name: &str) -> String {
    let types = Types::parse(data).unwrap();
    let btf = types.btf();
    let (ty, part) = find(&btf, kind, name);
    let mut text = String::new();
    signature::describe(&btf, &ty, part, &mut text).unwrap();
    text
}

fn mismatches(data: &[u8], expected: &[Entry]) -> Result<Vec<(String, Mismatch)>, Error> {
    let types = Types::parse(data)?;
    let mut found = Vec::new();
    let count = check(&types.btf(), expected, &mut |entry, mismatch| {
        found.push((entry.name_text().to_string(), mismatch));
    })?;
    assert_eq!(count, found.len());
    Ok(found)
}

fn expected_of_small_kernel() -> Vec<Entry> {
    let data = small_kernel().finish();
    let entry = |kind, name| Entry::new(kind, name, signature_of(&data, kind, name));
    vec![
        entry(KIND_STRUCT, "all"),
        entry(KIND_STRUCT, "bits"),
        entry(KIND_STRUCT, "ksm_rmap_item"),
        entry(KIND_STRUCT, "mm_struct"),
        entry(KIND_FUNC, "drain"),
        entry(KIND_FUNC, "walk"),
        entry(KIND_ENUM, "color"),
        entry(KIND_ENUM, "wide"),
        entry(KIND_CONSTANT, "EIGHT"),
        entry(KIND_CONSTANT, "MINUS"),
    ]
}

#[test]
fn canonical_text() {
    let data = small_kernel().finish();
    assert_eq!(
        describe(&data, KIND_STRUCT, "ksm_rmap_item"),
        "struct ksm_rmap_item [48]\
         \n anon_vma @0:0 [8] struct mm_struct *\
         \n mm @64:0 [8] struct mm_struct *\
         \n address @128:0 [8] long unsigned int\
         \n oldchecksum @192:0 [4] int\
         \n age @224:0 [1] rmap_age_t\
         \n linear_page_index @192:0 [8] long unsigned int\
         \n hlist @256:0 [16] struct list_head"
    );
    assert_eq!(
        describe(&data, KIND_STRUCT, "all"),
        "struct all [72]\
         \n restricted @0:0 [8] struct mm_struct *\
         \n tagged @64:0 [8] struct mm_struct *\
         \n counts @128:0 [24] volatile long unsigned int[3]\
         \n color @320:0 [4] enum color\
         \n wide @384:0 [8] enum wide\
         \n real @448:0 [8] double\
         \n callback @512:0 [8] [4] int ([8] struct elsewhere *, ) *"
    );
    assert_eq!(
        describe(&data, KIND_STRUCT, "bits"),
        "struct bits [8]\n low @0:3 [4] int\n high @3:29 [4] int\n rest @32:0 [4] int"
    );
    assert_eq!(
        describe(&data, KIND_FUNC, "walk"),
        "[4] int walk([8] const struct mm_struct *, [8] long unsigned int, [0] void, )"
    );
    assert_eq!(describe(&data, KIND_FUNC, "drain"), "[0] void drain()");
    assert_eq!(
        describe(&data, KIND_ENUM, "color"),
        "enum color [4]\n ONE = 1"
    );
    assert_eq!(
        describe(&data, KIND_ENUM, "wide"),
        "enum wide [8]\n ONE = 4294967297"
    );
    assert_eq!(
        describe(&data, KIND_CONSTANT, "EIGHT"),
        "constant EIGHT [4] = 8"
    );
    assert_eq!(
        describe(&data, KIND_CONSTANT, "MINUS"),
        "constant MINUS [4] = -1"
    );
}

#[test]
fn hash_is_fnv1a() {
    // Published test vectors of the 64-bit FNV-1a hash.
    for (text, hash) in [
        ("", 0xcbf2_9ce4_8422_2325),
        ("a", 0xaf63_dc4c_8601_ec8c),
        ("foobar", 0x8594_4171_f739_67e8),
    ] {
        let mut fnv = signature::Fnv1a::new();
        fnv.write_str(text).unwrap();
        assert_eq!(fnv.finish(), hash);
    }
}

#[test]
fn same_kernel_passes() {
    let data = small_kernel().finish();
    assert_eq!(mismatches(&data, &expected_of_small_kernel()), Ok(vec![]));
}

#[test]
fn types_in_another_order_pass() {
    let mut other = Maker::new();
    other.int("padding of ids", 2);
    let void_ptr = other.ptr(0);
    other.func("unrelated", void_ptr, &[]);
    let long = other.int("long unsigned int", 8);
    let members = [("a", long, 0), ("b", long, 64)];
    other.aggregate(common::STRUCT, "mm_struct", 16, &members);
    other.func("drain", 0, &[]);
    let expected: Vec<_> = expected_of_small_kernel()
        .into_iter()
        .filter(|entry| ["mm_struct", "drain"].contains(&entry.name_text()))
        .collect();
    assert_eq!(expected.len(), 2);
    assert_eq!(mismatches(&other.finish(), &expected), Ok(vec![]));
}

/// The check notices every flipped bit of every signature, and reports the right name.
#[test]
fn each_flipped_signature_is_reported() {
    let data = small_kernel().finish();
    let good = expected_of_small_kernel();
    for i in 0..good.len() {
        for bit in 0..64 {
            let mut bad = good.clone();
            bad[i].signature ^= 1 << bit;
            let expected = vec![(good[i].name_text().to_string(), Mismatch::Different)];
            assert_eq!(mismatches(&data, &bad), Ok(expected));
        }
    }
}

#[test]
fn absent_names_are_reported() {
    let data = small_kernel().finish();
    let expected = [
        Entry::new(KIND_STRUCT, "absent", 1),
        // There is a function of that name, but no structure.
        Entry::new(KIND_STRUCT, "drain", 1),
        Entry::new(KIND_FUNC, "mm_struct", 1),
        // A constant of a named enumeration, and a declaration of one.
        Entry::new(KIND_ENUM, "declared", 1),
        Entry::new(KIND_CONSTANT, "ONE", 1),
    ];
    let missing = |name: &str| (name.to_string(), Mismatch::Missing);
    assert_eq!(
        mismatches(&data, &expected),
        Ok(vec![
            missing("absent"),
            missing("drain"),
            missing("mm_struct"),
            missing("declared"),
            missing("ONE")
        ])
    );
}

/// Changes to a structure that its users would notice. Each of them must change the signature.
#[test]
fn changed_structures_are_noticed() {
    let make = |size, members: &[(&str, u32, u32)]| {
        let mut m = Maker::new();
        let long = m.int("long unsigned int", 8);
        let int = m.int("int", 4);
        let ptr = m.ptr(long);
        assert_eq!((long, int, ptr), (1, 2, 3));
        m.aggregate(common::STRUCT, "s", size, members);
        signature_of(&m.finish(), KIND_STRUCT, "s")
    };
    let all = [
        make(16, &[("a", 1, 0), ("b", 1, 64)]),
        make(24, &[("a", 1, 0), ("b", 1, 64)]),
        make(16, &[("a", 1, 64), ("b", 1, 0)]),
        make(16, &[("a", 1, 0), ("c", 1, 64)]),
        make(16, &[("a", 1, 0), ("b", 2, 64)]),
        make(16, &[("a", 1, 0), ("b", 3, 64)]),
        make(16, &[("a", 1, 0)]),
        make(16, &[]),
    ];
    for (i, one) in all.iter().enumerate() {
        assert!(!all[i + 1..].contains(one), "{i}");
    }
}

/// Changes to an enumeration. Each of them must change the signature.
#[test]
fn changed_enumerations_are_noticed() {
    let make = |flag, size, enumerators: &[(&str, u32)]| {
        let mut m = Maker::new();
        m.enumeration("e", flag, size, enumerators);
        signature_of(&m.finish(), KIND_ENUM, "e")
    };
    let all = [
        make(false, 4, &[("A", 0), ("B", 1)]),
        make(false, 8, &[("A", 0), ("B", 1)]),
        make(false, 4, &[("A", 0), ("B", 2)]),
        make(false, 4, &[("A", 0), ("C", 1)]),
        make(false, 4, &[("B", 1), ("A", 0)]),
        make(false, 4, &[("A", 0)]),
        make(false, 4, &[("A", 0), ("B", 1), ("C", 2)]),
        make(false, 4, &[("A", u32::MAX)]),
        make(true, 4, &[("A", u32::MAX)]),
    ];
    for (i, one) in all.iter().enumerate() {
        assert!(!all[i + 1..].contains(one), "{i}");
    }
}

/// One enumerator of a nameless enumeration may be listed, whatever happens to the others.
#[test]
fn constants_of_nameless_enumerations() {
    let make = |enumerators: &[(&str, u32)]| {
        let mut m = Maker::new();
        m.enumeration("", false, 4, enumerators);
        m.finish()
    };
    let old = make(&[("A", 0), ("B", 1)]);
    let expected = [Entry::new(
        KIND_CONSTANT,
        "B",
        signature_of(&old, KIND_CONSTANT, "B"),
    )];
    let outcome = |enumerators: &[(&str, u32)]| mismatches(&make(enumerators), &expected).unwrap();
    assert_eq!(outcome(&[("A", 0), ("B", 1)]), []);
    assert_eq!(outcome(&[("B", 1), ("C", 7)]), []);
    let differs = |how| vec![("B".to_string(), how)];
    assert_eq!(outcome(&[("A", 0), ("B", 2)]), differs(Mismatch::Different));
    assert_eq!(outcome(&[("A", 1)]), differs(Mismatch::Missing));
}

/// A typedef keeps its name while the type behind it grows.
#[test]
fn size_behind_a_typedef_is_noticed() {
    let make = |size| {
        let mut m = Maker::new();
        let int = m.int("int", size);
        let alias = m.refer("alias_t", common::TYPEDEF, int);
        m.func("f", 0, &[alias]);
        signature_of(&m.finish(), KIND_FUNC, "f")
    };
    assert_ne!(make(4), make(8));
}

/// Two files of a kernel may have different private structures of one name.
#[test]
fn several_types_of_one_name() {
    let make = |sizes: &[u32]| {
        let mut m = Maker::new();
        let long = m.int("long unsigned int", 8);
        for &size in sizes {
            m.aggregate(common::STRUCT, "s", size, &[("a", long, 0)]);
        }
        m.finish()
    };
    let entry = |size| {
        Entry::new(
            KIND_STRUCT,
            "s",
            signature_of(&make(&[size]), KIND_STRUCT, "s"),
        )
    };
    let expected = [entry(8), entry(16)];
    assert_eq!(mismatches(&make(&[8, 16]), &expected), Ok(vec![]));
    assert_eq!(mismatches(&make(&[16, 24, 8]), &expected), Ok(vec![]));
    let different = vec![("s".to_string(), Mismatch::Different)];
    assert_eq!(mismatches(&make(&[8, 24]), &expected), Ok(different));
}

#[test]
fn unusable_tables_are_refused() {
    let data = small_kernel().finish();
    let mut unsorted = expected_of_small_kernel();
    unsorted.swap(0, 1);
    assert_eq!(mismatches(&data, &unsorted), Err(Error::BadIndex));

    let many = vec![Entry::new(KIND_FUNC, "walk", 0); ENTRIES_MAX + 1];
    assert_eq!(mismatches(&data, &many), Err(Error::TooLong));
    let most = &many[1..];
    assert_eq!(mismatches(&data, most).unwrap().len(), ENTRIES_MAX);
}

#[test]
fn long_names_match_nothing() {
    let name = "n".repeat(NAME_MAX + 1);
    let entry = Entry::new(KIND_FUNC, &name, 0);
    assert_eq!(entry.name(), &name.as_bytes()[..NAME_MAX]);
}

#[test]
fn circles_and_fans_end() {
    // typedef that refers to itself
    let mut m = Maker::new();
    let alias = m.refer("loop_t", common::TYPEDEF, 1);
    m.func("f", alias, &[]);
    let data = m.finish();
    assert_eq!(
        mismatches(&data, &[Entry::new(KIND_FUNC, "f", 0)]),
        Err(Error::TooDeep)
    );

    // pointer to itself
    let mut m = Maker::new();
    m.ptr(1);
    m.func("f", 1, &[]);
    let data = m.finish();
    assert_eq!(
        mismatches(&data, &[Entry::new(KIND_FUNC, "f", 0)]),
        Err(Error::TooDeep)
    );

    // a nameless structure that has itself as a nameless member, many times
    let mut m = Maker::new();
    let fan: Vec<_> = (0..100).map(|_| ("", 1, 0)).collect();
    m.aggregate(common::STRUCT, "", 8, &fan);
    m.aggregate(common::STRUCT, "s", 8, &[("", 1, 0)]);
    let data = m.finish();
    assert_eq!(
        mismatches(&data, &[Entry::new(KIND_STRUCT, "s", 0)]),
        Err(Error::TooDeep)
    );

    // a prototype with many parameters of its own type: wide before it is deep
    let mut m = Maker::new();
    m.ptr(2);
    m.proto(0, &[1; 100]);
    m.func("f", 1, &[1]);
    let data = m.finish();
    let ended = mismatches(&data, &[Entry::new(KIND_FUNC, "f", 0)]);
    assert!(
        matches!(ended, Err(Error::TooDeep | Error::TooLong)),
        "{ended:?}"
    );

    // a fan that stays within the allowed depth, but has far too many leaves
    let mut m = Maker::new();
    let mut inner = m.int("int", 4);
    for _ in 0..6 {
        let fan: Vec<_> = (0..100).map(|_| ("", inner, 0)).collect();
        inner = m.aggregate(common::STRUCT, "", 8, &fan);
    }
    m.aggregate(common::STRUCT, "s", 8, &[("", inner, 0)]);
    let data = m.finish();
    assert_eq!(
        mismatches(&data, &[Entry::new(KIND_STRUCT, "s", 0)]),
        Err(Error::TooLong)
    );
}

#[test]
fn malformed_headers() {
    let good = small_kernel().finish();
    for len in 0..24 {
        assert!(Blob::parse(&good[..len]).is_err(), "{len}");
    }
    let with = |at: usize, bytes: &[u8]| {
        let mut data = good.clone();
        data[at..at + bytes.len()].copy_from_slice(bytes);
        data
    };
    let parse = |data: &[u8]| Blob::parse(data).err();
    assert_eq!(parse(&good), None);
    assert_eq!(parse(&with(0, &[0xeb, 0x9f])), Some(Error::BadHeader));
    assert_eq!(parse(&with(2, &[2])), Some(Error::BadHeader));
    assert_eq!(parse(&with(4, &[8, 0, 0, 0])), Some(Error::BadHeader));
    for at in [4, 8, 12, 16, 20] {
        assert_eq!(parse(&with(at, &[0xff; 4])), Some(Error::Truncated), "{at}");
    }
}

/// A header that is longer than the known one, as newer kernels append fields to it.
#[test]
fn longer_header() {
    let good = small_kernel().finish();
    let mut data = good[..24].to_vec();
    data[4] = 32;
    data.extend_from_slice(&[0xaa; 8]);
    data.extend_from_slice(&good[24..]);
    assert_eq!(mismatches(&data, &expected_of_small_kernel()), Ok(vec![]));
}

#[test]
fn unknown_kinds_are_errors() {
    for kind in [0, 20, 31, 32, 127] {
        let mut m = small_kernel();
        m.record("", kind, 0, 0, &[]);
        assert_eq!(
            Types::parse(&m.finish()).err(),
            Some(Error::BadKind),
            "{kind}"
        );
    }
}

#[test]
fn index_must_fit() {
    let data = small_kernel().finish();
    let blob = Blob::parse(&data).unwrap();
    let count = blob.count_types().unwrap() as usize;
    for len in [0, count - 1, count + 1] {
        assert_eq!(
            blob.fill_index(&mut vec![0; len]),
            Err(Error::BadIndex),
            "{len}"
        );
    }
    blob.fill_index(&mut vec![0; count]).unwrap();
}

/// Read all that can be read.
fn read_all(btf: &Btf<'_>) {
    for id in 0..=btf.last_id().saturating_add(1) {
        let _ = btf.size_of(id);
        let Ok(ty) = btf.get(id) else { continue };
        let _ = btf.name_text(&ty);
        let _ = ty.array();
        for i in [0, 1, ty.len().wrapping_sub(1), ty.len(), u32::MAX] {
            let _ = ty.member(i);
            let _ = ty.param(i);
            let _ = ty.enumerator(i);
        }
        let _ = btf.for_each_member(&ty, &mut Budget::new(1000, 8), &mut |_, _| Ok(()));
        for part in [Part::Whole, Part::Enumerator(0), Part::Enumerator(u32::MAX)] {
            let _ = signature::signature(btf, &ty, part);
        }
    }
}

fn read_damaged(data: &[u8], expected: &[Entry]) {
    let Ok(blob) = Blob::parse(data) else { return };
    let Ok(count) = blob.count_types() else {
        return;
    };
    let mut index = vec![0; count as usize];
    blob.fill_index(&mut index).unwrap();
    let btf = Btf::new(blob, &index);
    read_all(&btf);
    let _ = check(&btf, expected, &mut |_, _| ());
}

/// An id, a length or an offset, mostly a valid one.
fn word() -> impl Strategy<Value = u32> {
    prop_oneof![8 => 0_u32..12, 1 => any::<u32>()]
}

/// A record of any kind, followed by the right number of words, or nearly so.
fn any_record() -> impl Strategy<Value = (u32, u32, u32, Vec<u32>)> {
    let kind = prop_oneof![20 => 1_u32..20, 1 => any::<u32>()];
    let words = prop::collection::vec(word(), 13);
    let off_by = prop_oneof![20 => Just(0_i32), 1 => -3..3];
    let parts = (kind, 0_u32..4, any::<bool>(), word(), words, off_by);
    parts.prop_map(|(kind, vlen, flag, size_or_type, mut words, off_by)| {
        let len = match kind {
            common::INT | common::VAR | common::DECL_TAG => 1,
            common::ARRAY => 3,
            common::ENUM | common::FUNC_PROTO => vlen * 2,
            common::STRUCT | common::UNION | common::DATASEC | common::ENUM64 => vlen * 3,
            _ => 0,
        };
        words.truncate((len as i32 + off_by).max(0) as usize);
        (kind, vlen | (u32::from(flag) << 31), size_or_type, words)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Types that refer to each other at random, also in cycles.
    #[test]
    fn any_records_never_panic(
        records in prop::collection::vec(any_record(), 1..12),
        named in any::<u16>(),
    ) {
        let mut maker = Maker::new();
        for (i, (kind, vlen, size_or_type, words)) in records.iter().enumerate() {
            let name = if (named >> i) & 1 == 0 { "" } else { "walk" };
            maker.record(name, kind & 0x7f, *vlen, *size_or_type, words);
        }
        let expected = [
            Entry::new(KIND_STRUCT, "walk", 0),
            Entry::new(KIND_FUNC, "walk", 0),
            Entry::new(KIND_ENUM, "walk", 0),
        ];
        read_damaged(&maker.finish(), &expected);
    }

    #[test]
    fn damaged_bytes_never_panic(
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in any::<prop::sample::Index>(),
        cut_it in prop::bool::weighted(0.2),
    ) {
        let mut data = small_kernel().finish();
        for (at, byte) in damage {
            let at = at.index(data.len());
            data[at] = byte;
        }
        if cut_it {
            data.truncate(cut.index(data.len()));
        }
        read_damaged(&data, &expected_of_small_kernel());
    }

    #[test]
    fn damaged_words_never_panic(
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u32>(), 0u32..32), 1..5),
    ) {
        // Small numbers are ids, lengths and offsets that are valid elsewhere.
        let mut data = small_kernel().finish();
        for (at, value, shift) in damage {
            let at = at.index(data.len() / 4) * 4;
            data[at..at + 4].copy_from_slice(&(value >> shift).to_le_bytes());
        }
        read_damaged(&data, &expected_of_small_kernel());
    }

    #[test]
    fn any_bytes_never_panic(tail in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut data = vec![0x9f, 0xeb, 1, 0, 24, 0, 0, 0];
        data.extend_from_slice(&tail);
        read_damaged(&tail, &[]);
        read_damaged(&data, &[]);
    }

    #[test]
    fn any_index_never_panics(index in prop::collection::vec(any::<u32>(), 0..40)) {
        let data = small_kernel().finish();
        let btf = Btf::new(Blob::parse(&data).unwrap(), &index);
        read_all(&btf);
        let _ = check(&btf, &expected_of_small_kernel(), &mut |_, _| ());
    }
}

/// The BTF of the running kernel, if it has one: a real, large example.
#[test]
fn running_kernel() {
    let Ok(data) = std::fs::read("/sys/kernel/btf/vmlinux") else {
        eprintln!("this kernel shows no BTF: nothing to read");
        return;
    };
    let types = Types::parse(&data).unwrap();
    let btf = types.btf();
    let (mut structs, mut functions, mut enumerations, mut constants) = (0, 0, 0, 0);
    for id in 1..=btf.last_id() {
        let ty = btf.get(id).unwrap();
        signature::for_each_interface(&btf, &ty, &mut |kind, name, part| {
            if let Err(error) = signature::signature(&btf, &ty, part) {
                panic!("{}: {error}", String::from_utf8_lossy(name));
            }
            match kind {
                KIND_STRUCT => structs += 1,
                KIND_FUNC => functions += 1,
                KIND_ENUM => enumerations += 1,
                _ => constants += 1,
            }
            Ok(())
        })
        .unwrap();
    }
    assert!(structs > 1000, "{structs} structures");
    assert!(functions > 1000, "{functions} functions");
    assert!(enumerations > 100, "{enumerations} enumerations");
    assert!(constants > 100, "{constants} constants");
}
