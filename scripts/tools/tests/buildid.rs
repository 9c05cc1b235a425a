// SPDX-License-Identifier: GPL-2.0
//! Tests of the build id among notes, and of its record.

#[path = "common/notes.rs"]
mod notes;

use notes::note;
use proptest::prelude::*;
use rksm_tools::abi::buildid::{find, Record, ID_MAX};

#[test]
fn found_among_others() {
    let id: Vec<u8> = (0..20).collect();
    let gnu = note("GNU", 3, &id);
    let others = [
        note("Linux", 0x100, &[]),
        note("Linux", 0x101, b"7.3.4\0"),
        note("Xen", 3, &[1; 8]),
        note("GNU", 1, &[2; 16]),
        note("GNU", 3, &[]),
    ];
    for at in 0..=others.len() {
        let mut notes = others.to_vec();
        notes.insert(at, gnu.clone());
        assert_eq!(find(&notes.concat()), Some(&id[..]), "{at}");
    }
    assert_eq!(find(&others.concat()), None);
    assert_eq!(find(&[]), None);
}

/// Ids of any length; the last one's padding may be missing.
#[test]
fn any_length() {
    for len in 1..=ID_MAX {
        let id = vec![9; len];
        let notes = [note("Linux", 3, &vec![1; len]), note("GNU", 3, &id)].concat();
        assert_eq!(find(&notes), Some(&id[..]), "{len}");
        let unpadded = &notes[..notes.len() - (len.next_multiple_of(4) - len)];
        assert_eq!(find(unpadded), Some(&id[..]), "{len}");
        assert_eq!(find(&unpadded[..unpadded.len() - 1]), None, "{len}");
    }
}

#[test]
fn what_is_recorded_is_read() {
    static TWENTY: Record = Record::new(&[0xa5; 20]);
    static MOST: Record = Record::new(&[0x5a; ID_MAX]);
    static NONE: Record = Record::new(&[]);
    static MORE: Record = Record::new(&[1; ID_MAX + 1]);
    assert_eq!(TWENTY.id(), [0xa5; 20]);
    assert_eq!(MOST.id(), [0x5a; ID_MAX]);
    assert_eq!(NONE.id(), []);
    assert_eq!(MORE.id(), [1; ID_MAX]);
}

proptest! {
    #[test]
    fn any_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
        let _ = find(&bytes);
    }

    #[test]
    fn damaged_words_never_panic(at in 0usize..20, value: u32, shift in 0u32..32) {
        let mut notes = [note("Linux", 1, &[1; 5]), note("GNU", 3, &[2; 20])].concat();
        let at = at * 4 % notes.len();
        notes[at..at + 4].copy_from_slice(&(value >> shift).to_le_bytes());
        let _ = find(&notes);
    }
}
