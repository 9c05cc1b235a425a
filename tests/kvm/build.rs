// SPDX-License-Identifier: GPL-2.0
//! Builds the payload, a freestanding program that `rksm-vmm` has in it.

use std::path::Path;
use std::process::Command;
use std::{env, fs};

fn main() {
    for file in [
        "payload/main.rs",
        "payload/head.S",
        "payload/payload.ld",
        "src/content.rs",
    ] {
        println!("cargo:rerun-if-changed={file}");
    }
    println!("cargo:rerun-if-changed=build.rs");
    let out = Path::new(&env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("payload");
    let script = fs::canonicalize("payload/payload.ld").expect("payload.ld");
    let rustc = env::var_os("RUSTC").expect("cargo sets RUSTC");
    // It is loaded at a fixed address, and has no C library and no unwinding.
    let status = Command::new(rustc)
        .args([
            "--edition",
            "2021",
            "--crate-type",
            "bin",
            "--crate-name",
            "payload",
        ])
        .args([
            "-C",
            "opt-level=2",
            "-C",
            "panic=abort",
            "-C",
            "relocation-model=static",
        ])
        .args([
            "-C",
            "strip=symbols",
            "-C",
            "force-unwind-tables=no",
            "-C",
            "default-linker-libraries=no",
        ])
        .args([
            "-C",
            "link-arg=-nostartfiles",
            "-C",
            "link-arg=-static",
            "-C",
            "link-arg=-no-pie",
        ])
        .args([
            "-C",
            "link-arg=-Wl,--gc-sections,--build-id=none,-z,noexecstack,-z,max-page-size=4096",
        ])
        .arg("-C")
        .arg(format!("link-arg=-Wl,-T,{}", script.display()))
        .arg("-o")
        .arg(&out)
        .arg("payload/main.rs")
        .status()
        .expect("rustc runs");
    assert!(status.success(), "building the payload failed");
}
