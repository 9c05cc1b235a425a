// SPDX-License-Identifier: GPL-2.0
//! Helpers that make BTF from scratch.

pub const INT: u32 = 1;
pub const PTR: u32 = 2;
pub const ARRAY: u32 = 3;
pub const STRUCT: u32 = 4;
pub const UNION: u32 = 5;
pub const ENUM: u32 = 6;
pub const FWD: u32 = 7;
pub const TYPEDEF: u32 = 8;
pub const VOLATILE: u32 = 9;
pub const CONST: u32 = 10;
pub const RESTRICT: u32 = 11;
pub const FUNC: u32 = 12;
pub const FUNC_PROTO: u32 = 13;
pub const VAR: u32 = 14;
pub const DATASEC: u32 = 15;
pub const FLOAT: u32 = 16;
pub const DECL_TAG: u32 = 17;
pub const TYPE_TAG: u32 = 18;
pub const ENUM64: u32 = 19;

const FLAG: u32 = 1 << 31;

/// BTF under construction.
#[derive(Default)]
pub struct Maker {
    types: Vec<u8>,
    strings: Vec<u8>,
    last_id: u32,
}

impl Maker {
    pub fn new() -> Self {
        Maker {
            strings: vec![0],
            ..Self::default()
        }
    }

    pub fn string(&mut self, text: &str) -> u32 {
        if text.is_empty() {
            return 0;
        }
        let off = self.strings.len() as u32;
        self.strings.extend_from_slice(text.as_bytes());
        self.strings.push(0);
        off
    }

    /// Add a record: name, kind and flag, number of elements, size or type, and the words that follow.
    pub fn record(
        &mut self,
        name: &str,
        kind: u32,
        vlen: u32,
        size_or_type: u32,
        extra: &[u32],
    ) -> u32 {
        let name = self.string(name);
        for word in [name, (kind << 24) | vlen, size_or_type]
            .iter()
            .chain(extra)
        {
            self.types.extend_from_slice(&word.to_le_bytes());
        }
        self.last_id += 1;
        self.last_id
    }

    pub fn int(&mut self, name: &str, size: u32) -> u32 {
        self.record(name, INT, 0, size, &[size * 8])
    }

    pub fn ptr(&mut self, to: u32) -> u32 {
        self.record("", PTR, 0, to, &[])
    }

    /// Add a record that has a name and refers to one other type.
    pub fn refer(&mut self, name: &str, kind: u32, to: u32) -> u32 {
        self.record(name, kind, 0, to, &[])
    }

    pub fn array(&mut self, of: u32, count: u32) -> u32 {
        self.record("", ARRAY, 0, 0, &[of, of, count])
    }

    /// Add a structure or union with members (name, type, offset in bits).
    pub fn aggregate(
        &mut self,
        kind: u32,
        name: &str,
        size: u32,
        members: &[(&str, u32, u32)],
    ) -> u32 {
        let mut extra = Vec::new();
        for (name, ty, offset) in members {
            extra.extend([self.string(name), *ty, *offset]);
        }
        self.record(name, kind, members.len() as u32, size, &extra)
    }

    /// Add a structure with bitfields (name, type, offset in bits, width).
    pub fn bitfields(&mut self, name: &str, size: u32, members: &[(&str, u32, u32, u32)]) -> u32 {
        let mut extra = Vec::new();
        for (name, ty, offset, width) in members {
            extra.extend([self.string(name), *ty, (width << 24) | offset]);
        }
        let vlen = members.len() as u32;
        self.record(name, STRUCT, vlen | FLAG, size, &extra)
    }

    /// Add an enumeration of up to 32 bits (name, bits of the value).
    pub fn enumeration(
        &mut self,
        name: &str,
        signed: bool,
        size: u32,
        enumerators: &[(&str, u32)],
    ) -> u32 {
        let mut extra = Vec::new();
        for (name, value) in enumerators {
            extra.extend([self.string(name), *value]);
        }
        let flag = if signed { FLAG } else { 0 };
        let vlen = enumerators.len() as u32;
        self.record(name, ENUM, vlen | flag, size, &extra)
    }

    pub fn proto(&mut self, ret: u32, params: &[u32]) -> u32 {
        let mut extra = Vec::new();
        for ty in params {
            extra.extend([0, *ty]);
        }
        self.record("", FUNC_PROTO, params.len() as u32, ret, &extra)
    }

    pub fn func(&mut self, name: &str, ret: u32, params: &[u32]) -> u32 {
        let proto = self.proto(ret, params);
        self.refer(name, FUNC, proto)
    }

    pub fn finish(&self) -> Vec<u8> {
        let mut data = vec![0x9f, 0xeb, 1, 0];
        let types = self.types.len() as u32;
        let strings = self.strings.len() as u32;
        for word in [24, 0, types, types, strings] {
            data.extend_from_slice(&u32::to_le_bytes(word));
        }
        data.extend_from_slice(&self.types);
        data.extend_from_slice(&self.strings);
        data
    }
}

/// Return a small kernel: every kind of record, and the structures that `layout` needs.
pub fn small_kernel() -> Maker {
    let mut m = Maker::new();
    let int = m.int("int", 4);
    let long = m.int("long unsigned int", 8);
    let byte = m.int("unsigned char", 1);
    let age = m.refer("rmap_age_t", TYPEDEF, byte);
    let mm = m.aggregate(STRUCT, "mm_struct", 16, &[("a", long, 0), ("b", long, 64)]);
    let mm_ptr = m.ptr(mm);
    let list = m.aggregate(
        STRUCT,
        "list_head",
        16,
        &[("next", mm_ptr, 0), ("prev", mm_ptr, 64)],
    );

    // The union's larger arm moves `hlist` to byte 40, as in the real one.
    let inner = m.aggregate(
        STRUCT,
        "",
        32,
        &[("hlist_dup", list, 0), ("list", list, 128)],
    );
    let arm = m.aggregate(STRUCT, "", 40, &[("head", mm_ptr, 0), ("", inner, 64)]);
    let node = m.aggregate(STRUCT, "rb_node", 24, &[("left", mm_ptr, 0)]);
    let links = m.aggregate(UNION, "", 40, &[("node", node, 0), ("", arm, 0)]);
    let pfn = m.aggregate(
        UNION,
        "",
        8,
        &[("kpfn", long, 0), ("chain_prune_time", long, 0)],
    );
    m.aggregate(
        STRUCT,
        "ksm_stable_node",
        56,
        &[("", links, 0), ("hlist", mm_ptr, 320), ("", pfn, 384)],
    );
    let sums = m.aggregate(STRUCT, "", 8, &[("oldchecksum", int, 0), ("age", age, 32)]);
    let index = m.aggregate(
        UNION,
        "",
        8,
        &[("", sums, 0), ("linear_page_index", long, 0)],
    );
    m.aggregate(
        STRUCT,
        "ksm_rmap_item",
        48,
        &[
            ("anon_vma", mm_ptr, 0),
            ("mm", mm_ptr, 64),
            ("address", long, 128),
            ("", index, 192),
            ("hlist", list, 256),
        ],
    );

    m.aggregate(
        STRUCT,
        "ksm_mm_slot",
        16,
        &[("slot", mm_ptr, 0), ("rmap_list", mm_ptr, 64)],
    );

    let constant = m.refer("", CONST, mm);
    let constant_ptr = m.ptr(constant);
    m.func("walk", int, &[constant_ptr, long, 0]);
    m.func("drain", 0, &[]);

    // One of every remaining kind.
    let volatile = m.refer("", VOLATILE, long);
    let restrict = m.refer("", RESTRICT, mm_ptr);
    let tag = m.refer("rcu", TYPE_TAG, mm);
    let tag_ptr = m.ptr(tag);
    let array = m.array(volatile, 3);
    let name = m.string("ONE");
    let small = m.record("color", ENUM, 1, 4, &[name, 1]);
    let large = m.record("wide", ENUM64, 1, 8, &[name, 1, 1]);
    let real = m.record("double", FLOAT, 0, 8, &[]);
    let forward = m.record("elsewhere", FWD, 0, 0, &[]);
    let forward_ptr = m.ptr(forward);
    let callback = m.proto(int, &[forward_ptr]);
    let callback_ptr = m.ptr(callback);
    let var = m.record("jiffies", VAR, 0, long, &[1]);
    m.record(".data..percpu", DATASEC, 1, 8, &[var, 0, 8]);
    m.record("note", DECL_TAG, 0, mm, &[u32::MAX]);
    let all = [
        ("restricted", restrict, 0),
        ("tagged", tag_ptr, 64),
        ("counts", array, 128),
        ("color", small, 320),
        ("wide", large, 384),
        ("real", real, 448),
        ("callback", callback_ptr, 512),
    ];
    m.aggregate(STRUCT, "all", 72, &all);
    m.enumeration("", false, 4, &[("SEVEN", 7), ("EIGHT", 8)]);
    m.enumeration("", true, 4, &[("MINUS", u32::MAX)]);
    m.enumeration("declared", false, 4, &[]);
    m.bitfields(
        "bits",
        8,
        &[
            ("low", int, 0, 3),
            ("high", int, 3, 29),
            ("rest", int, 32, 0),
        ],
    );
    m
}
