// SPDX-License-Identifier: GPL-2.0
//! Tests of the comparison of compiled types with an image's BTF. Real compilers make the debug information,
//! and pahole makes the image's BTF, as for a kernel.

use rksm_tools::compare::{compare, Differs};
use rksm_tools::dwarf::{self, Known};
use rksm_tools::layout::Types;
use rksm_tools::list::parse_interfaces;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

/// All kinds of members. The macros add or change members as another configuration might.
const HEADER: &str = "
#ifndef COUNT
#define COUNT 2
#endif
#ifndef GREEN_VALUE
#define GREEN_VALUE 5
#endif
#ifndef FIRST_VALUE
#define FIRST_VALUE 3
#endif
#ifndef WIDTH
#define WIDTH 3
#endif
#ifndef INNER
#define INNER int
#endif
typedef struct { INNER counter; } atomic_like;
enum color { RED, GREEN = GREEN_VALUE, MINUS = -1 };
enum wide { SMALL = 1, LARGE = 0x123456789 };
enum { FIRST = FIRST_VALUE, SECOND };
struct declared;
struct named { int a; };
struct all {
	unsigned int low : WIDTH, high : 5;
	union { long number; struct { short one, two; }; };
#ifdef FIELD
	int field;
#endif
	struct { int x; char y[3]; } inner[COUNT];
	atomic_like count;
	struct named named;
	int type;
	void (*call)(int);
	const volatile char *text;
	enum color color;
	enum wide wide;
	int matrix[2][3];
	struct declared *declared;
	_Bool flag : 1;
#ifdef BIT
	_Bool bit : 1;
#endif
#ifdef PADDING
	char padding;
#endif
	unsigned char tail[];
};
";

const C: &str = "
long use(struct all *all, int x)
{
	return all->number + (enum color)x + (x == SECOND) + all->count.counter;
}
";

const RUST: &str = "
#![crate_type = \"lib\"]
#![no_std]
#![allow(warnings)]
mod bindings { include!(\"bindings.rs\"); }
mod other { pub struct named { pub a: u64 } }
#[no_mangle]
pub extern \"C\" fn touch(all: &bindings::all, other: &other::named) -> i32 {
    all.named.a + other.a as i32
}
";

/// A directory of its own, removed when dropped.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let next = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("rksm-compare-{}-{next}", std::process::id());
        let dir = std::env::temp_dir().join(name);
        fs::create_dir_all(&dir).unwrap();
        Scratch(dir)
    }

    fn run(&self, command: &str, args: &[&str]) {
        let output = Command::new(command)
            .args(args)
            .current_dir(&self.0)
            .output()
            .unwrap_or_else(|error| panic!("{command}: {error}"));
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{command} {args:?}: {stderr}");
    }

    fn read(&self, file: &str) -> Vec<u8> {
        fs::read(self.0.join(file)).unwrap()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Return whether all compilers are here, as in the root of scripts/enter. Without them there is nothing to
/// test.
fn has_compilers() -> bool {
    let found = |command| Command::new(command).arg("--version").output().is_ok();
    let all = ["gcc", "clang", "pahole", "bindgen", "rustc"]
        .into_iter()
        .all(found);
    assert!(all || !Path::new("/etc/rksm-root").exists());
    if !all {
        eprintln!("not all of the compilers are here: nothing to compare");
    }
    all
}

/// C and Rust compiled with some macros.
struct Built {
    object: Vec<u8>,
    rust: Vec<u8>,
    btf: Vec<u8>,
}

impl Built {
    fn new(compiler: &str, macros: &[&str]) -> Self {
        let dir = Scratch::new();
        fs::write(dir.0.join("all.h"), HEADER).unwrap();
        fs::write(dir.0.join("c.c"), format!("#include \"all.h\"\n{C}")).unwrap();
        fs::write(dir.0.join("rust.rs"), RUST).unwrap();
        let c = [&["-g", "-O2", "-c", "c.c", "-o", "c.o"], macros].concat();
        dir.run(compiler, &c);
        dir.run("pahole", &["-J", "--btf_encode_detached=c.btf", "c.o"]);
        let bindgen = ["all.h", "--use-core", "-o", "bindings.rs", "--"];
        dir.run("bindgen", &[&bindgen, macros].concat());
        dir.run(
            "rustc",
            &["-g", "-O", "--emit=obj=rust.o", "-Cpanic=abort", "rust.rs"],
        );
        Built {
            object: dir.read("c.o"),
            rust: dir.read("rust.o"),
            btf: dir.read("c.btf"),
        }
    }

    fn known(&self) -> Vec<Known> {
        let mut known = dwarf::types(&self.object).unwrap();
        known.extend(dwarf::types(&self.rust).unwrap());
        known
    }

    fn differences(&self, image: &Built) -> Vec<String> {
        let types = Types::parse(&image.btf).unwrap();
        match compare(&types.btf(), &self.known(), &[]) {
            Ok(_) => Vec::new(),
            Err(error) => match error.downcast::<Differs>() {
                Ok(Differs(lines)) => lines,
                Err(error) => panic!("{error:#}"),
            },
        }
    }
}

#[test]
fn another_configuration_is_noticed() {
    if !has_compilers() {
        return;
    }
    for compiler in ["gcc", "clang"] {
        let plain = Built::new(compiler, &[]);
        assert_eq!(plain.differences(&plain), [""; 0], "{compiler}");

        for (macros, says) in [
            (
                &["-DFIELD"][..],
                &[
                    "struct all, in C: has a member field, in the image it has none",
                    "struct all, in Rust: has a member field, in the image it has none",
                ][..],
            ),
            (
                &["-DCOUNT=3"],
                &[
                    "struct all, in C: has 128 bytes, in the image 120; \
                     inner has 192 bits, in the image 128",
                    "struct all, in Rust: has 128 bytes, in the image 120; \
                     inner has 192 bits, in the image 128",
                ],
            ),
            // The size is as before.
            (
                &["-DPADDING"],
                &[
                    "struct all, in C: has a member padding, in the image it has none",
                    "struct all, in Rust: has a member padding, in the image it has none",
                ],
            ),
            (
                &["-DINNER=char"],
                &[
                    "struct all, in C: count has 8 bits, in the image 32",
                    "struct all, in Rust: count has 8 bits, in the image 32",
                    "struct atomic_like, in Rust: has 1 bytes, in the image 4; \
                     counter has 8 bits, in the image 32",
                ],
            ),
            // Only C shows bitfields.
            (
                &["-DBIT"],
                &["struct all, in C: has a member bit, in the image it has none"],
            ),
            (
                &["-DWIDTH=4"],
                &["struct all, in C: low has 4 bits, in the image 3"],
            ),
            (
                &["-DGREEN_VALUE=6"],
                &["enum color, in C: GREEN is 6, in the image 5"],
            ),
            (
                &["-DFIRST_VALUE=0"],
                &[
                    "constant FIRST: is 0, in the image 3",
                    "constant SECOND: is 1, in the image 4",
                ],
            ),
        ] {
            // clang's debug information has other forms, but they do not matter for each change.
            if compiler == "clang" && !["-DFIELD", "-DBIT", "-DFIRST_VALUE=0"].contains(&macros[0])
            {
                continue;
            }
            let other = Built::new(compiler, macros);
            assert_eq!(other.differences(&other), [""; 0], "{compiler} {macros:?}");
            assert_eq!(other.differences(&plain), says, "{compiler} {macros:?}");
            // In the other direction, as many types differ.
            let back = plain.differences(&other);
            assert_eq!(back.len(), says.len(), "{compiler} {macros:?}: {back:?}");
        }
    }
}

#[test]
fn what_was_compared_is_told() {
    if !has_compilers() {
        return;
    }
    let built = Built::new("gcc", &[]);
    let types = Types::parse(&built.btf).unwrap();
    let list = "named\nall\nenum color\nconstant SECOND\nfunc use\n";
    let more = "named_not\nenum all\nconstant RED\n";
    let listed = parse_interfaces(&format!("{list}{more}")).unwrap();
    let compared = compare(&types.btf(), &built.known(), &listed).unwrap();
    assert_eq!(compared.unknown, ["named_not", "all", "RED"]);
    // all, named, color, wide; from Rust all, named, atomic_like.
    assert_eq!((compared.c, compared.rust), (4, 3));

    // If one of the two has no debug information, nothing is known about its types.
    for object in [&built.object, &built.rust] {
        let half = dwarf::types(object).unwrap();
        let says = compare(&types.btf(), &half, &[]).unwrap_err().to_string();
        assert!(says.contains("nothing can be said"), "{says}");
    }
}

/// Listed types are reported first, and not all types are reported.
#[test]
fn many_differences() {
    let lines = (0..25).map(|i| format!("struct s{i}, in C: differs"));
    let text = Differs(lines.collect()).to_string();
    assert_eq!(text.lines().count(), 1 + 20 + 1);
    assert!(text.lines().next().unwrap().contains("(25 differ)"));
    assert!(text.ends_with("\nand 5 more"), "{text}");
}

#[test]
fn objects_without_debug_information() {
    use object::write::Object;
    use object::{Architecture, BinaryFormat, Endianness};

    let elf = Object::new(BinaryFormat::Elf, Architecture::X86_64, Endianness::Little);
    let says = dwarf::types(&elf.write().unwrap()).unwrap_err().to_string();
    assert!(says.starts_with("no debug information"), "{says}");
    assert!(dwarf::types(b"not an object").is_err());
}
