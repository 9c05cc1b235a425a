// SPDX-License-Identifier: GPL-2.0
//! Command line of the build tools.

use anyhow::{bail, ensure, Context, Result};
use pico_args::Arguments;
use rksm_tools::abi::signature;
use rksm_tools::exports::Exports;
use rksm_tools::layout::{self, Types};
use rksm_tools::postlink::{self, Kernel};
use rksm_tools::symtab::KernelSymbols;
use rksm_tools::{compare, conformance, dwarf, ktap, list, log_check, output};
use std::collections::BTreeSet;
use std::env;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

const USAGE: &str = "\
usage: rksm-tools layout --vmlinux FILE --list FILE --structs FILE --out FILE
       rksm-tools compare --vmlinux FILE --structs FILE MODULE.ko
       rksm-tools describe --vmlinux FILE NAME...
       rksm-tools postlink --list FILE --symvers FILE [--vmlinux FILE] [--system-map FILE] IN.ko OUT.ko
       rksm-tools ktap-sum STAGE TALLY COMMAND...
       rksm-tools ktap-sum --total TALLY
       rksm-tools log-check FILE
       rksm-tools conformance DIR
";

fn main() -> ExitCode {
    let args: Vec<OsString> = env::args_os().skip(1).collect();
    let rest = args.get(1..).unwrap_or_default();
    // pico_args cannot parse this: the command after ktap-sum has options of its own.
    match args.first().and_then(|word| word.to_str()) {
        Some("ktap-sum") => verdict(ktap_sum(rest)),
        Some("log-check") => verdict(log_check(rest)),
        Some("conformance") => verdict(conformance(rest)),
        _ => match run(Arguments::from_env()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => failure(&error, 1),
        },
    }
}

/// Return the status of a parser: 1 if its input shows a failure, 2 if it cannot read it.
fn verdict(good: Result<bool>) -> ExitCode {
    match good {
        Ok(good) => ExitCode::from(u8::from(!good)),
        Err(error) => failure(&error, 2),
    }
}

fn failure(error: &anyhow::Error, status: u8) -> ExitCode {
    for line in format!("{error:#}").lines() {
        eprintln!("rksm-tools: {line}");
    }
    ExitCode::from(status)
}

fn run(mut args: Arguments) -> Result<()> {
    if args.contains(["-h", "--help"]) {
        print!("{USAGE}");
        return Ok(());
    }
    match args.subcommand()?.as_deref() {
        Some("layout") => layout(args),
        Some("compare") => compare(args),
        Some("describe") => describe(args),
        Some("postlink") => postlink(args),
        Some(other) => bail!("no command '{other}'\n{USAGE}"),
        None => bail!("no command\n{USAGE}"),
    }
}

fn ktap_sum(args: &[OsString]) -> Result<bool> {
    let out = &mut io::stdout().lock();
    match args {
        [option, tally] if option == "--total" => {
            let (text, good) = ktap::total(&read(Path::new(tally))?);
            writeln!(out, "{text}")?;
            Ok(good)
        }
        [stage, tally, command @ ..] if !command.is_empty() && stage != "--total" => {
            ktap::run(stage, Path::new(tally), command, out)
        }
        _ => bail!("expected STAGE TALLY COMMAND..., or --total TALLY\n{USAGE}"),
    }
}

fn log_check(args: &[OsString]) -> Result<bool> {
    let [log] = args else {
        bail!("expected one FILE\n{USAGE}");
    };
    let log = Path::new(log);
    File::open(log)
        .and_then(|log| log_check::is_clean(BufReader::new(log), &mut io::stdout().lock()))
        .with_context(|| format!("cannot check {}", log.display()))
}

fn conformance(args: &[OsString]) -> Result<bool> {
    let [dir] = args else {
        bail!("expected one DIR\n{USAGE}");
    };
    conformance::run(Path::new(dir), &mut io::stdout().lock())
}

fn layout(mut args: Arguments) -> Result<()> {
    let vmlinux = path(&mut args, "--vmlinux")?;
    let symbols = path(&mut args, "--list")?;
    let structs = path(&mut args, "--structs")?;
    let out = path(&mut args, "--out")?;
    let [] = rest(args, [])?;

    let symbols = parsed(&symbols, list::parse_symbols)?;
    let structs = parsed(&structs, list::parse_interfaces)?;
    let image = read(&vmlinux)?;
    let build_id = layout::find_build_id(&image).with_context(|| vmlinux.display().to_string())?;
    let generated = layout::find_btf(&image)
        .and_then(|btf| Ok(Types::parse(btf)?))
        .and_then(|types| layout::generate(&types.btf(), build_id, &symbols, &structs))
        .with_context(|| vmlinux.display().to_string())?;
    let build_id = build_id.map(layout::hex);
    if build_id.is_none() {
        eprintln!(
            "rksm-tools: warning: {} has no build id: the module will load on any kernel without one \
             that has the same interfaces, and on no other",
            vmlinux.display()
        );
    }
    for note in &generated.notes {
        eprintln!("rksm-tools: note: {note}");
    }
    let state = match output::replace_if_changed(&out, generated.text.as_bytes())? {
        true => "written",
        false => "is current",
    };
    eprintln!(
        "rksm-tools: {} {state}: {} signatures, build id {}",
        out.display(),
        generated.signatures,
        build_id.as_deref().unwrap_or("none")
    );
    Ok(())
}

fn compare(mut args: Arguments) -> Result<()> {
    let vmlinux = path(&mut args, "--vmlinux")?;
    let structs = path(&mut args, "--structs")?;
    let [module] = rest(args, ["MODULE.ko"])?;

    let structs = parsed(&structs, list::parse_interfaces)?;
    let known = dwarf::types(&read(&module)?).with_context(|| module.display().to_string())?;
    let image = read(&vmlinux)?;
    let types = layout::find_btf(&image)
        .and_then(|btf| Ok(Types::parse(btf)?))
        .with_context(|| vmlinux.display().to_string())?;
    let compared = compare::compare(&types.btf(), &known, &structs)
        .with_context(|| format!("{} and {}", module.display(), vmlinux.display()))?;
    if !compared.unknown.is_empty() {
        eprintln!(
            "rksm-tools: note: not in the module's debug information, so not compared: {}",
            compared.unknown.join(" ")
        );
    }
    eprintln!(
        "rksm-tools: note: {}: {} types from C and {} from Rust are as in the image",
        module.display(),
        compared.c,
        compared.rust
    );
    Ok(())
}

fn describe(mut args: Arguments) -> Result<()> {
    let vmlinux = path(&mut args, "--vmlinux")?;
    let names = args
        .finish()
        .into_iter()
        .map(|name| name.into_string().ok().context("not a name"))
        .collect::<Result<Vec<_>>>()?;
    ensure!(!names.is_empty(), "no name given\n{USAGE}");

    let image = read(&vmlinux)?;
    let types = Types::parse(layout::find_btf(&image)?)?;
    let btf = types.btf();
    let mut unknown: BTreeSet<&str> = names.iter().map(String::as_str).collect();
    for id in 1..=btf.last_id() {
        let ty = btf.get(id)?;
        let mut found = Vec::new();
        signature::for_each_interface(&btf, &ty, &mut |_, name, part| {
            if let Some(name) = names.iter().find(|wanted| wanted.as_bytes() == name) {
                unknown.remove(name.as_str());
                found.push(part);
            }
            Ok(())
        })?;
        for part in found {
            let mut text = String::new();
            signature::describe(&btf, &ty, part, &mut text)?;
            println!("{:016x} {text}\n", signature::signature(&btf, &ty, part)?);
        }
    }
    ensure!(unknown.is_empty(), "not in BTF: {unknown:?}");
    Ok(())
}

fn postlink(mut args: Arguments) -> Result<()> {
    let list = path(&mut args, "--list")?;
    let symvers = path(&mut args, "--symvers")?;
    let vmlinux = optional_path(&mut args, "--vmlinux")?;
    let system_map = optional_path(&mut args, "--system-map")?;
    let [input, out] = rest(args, ["IN.ko", "OUT.ko"])?;

    let list = parsed(&list, list::parse_symbols)?;
    let exports = parsed(&symvers, Exports::parse)?;
    let symbols = kernel_symbols(vmlinux.as_deref(), system_map.as_deref())?;
    let kernel = Kernel {
        list: &list,
        exports: &exports,
        symbols: symbols.as_ref(),
    };
    let linked =
        postlink::postlink(&read(&input)?, &kernel).with_context(|| input.display().to_string())?;
    for note in &linked.notes {
        eprintln!("rksm-tools: note: {note}");
    }
    output::replace(&out, &linked.module)?;
    eprintln!(
        "rksm-tools: {} written: {} livepatch symbols, {} relocations",
        out.display(),
        linked.symbols,
        linked.relocations
    );
    Ok(())
}

/// Read the symbol table of whichever file has one.
fn kernel_symbols(
    vmlinux: Option<&Path>,
    system_map: Option<&Path>,
) -> Result<Option<KernelSymbols>> {
    if let Some(path) = system_map {
        if let Some(symbols) =
            KernelSymbols::from_system_map(&String::from_utf8_lossy(&read(path)?))
        {
            return Ok(Some(symbols));
        }
    }
    match vmlinux {
        None => Ok(None),
        Some(path) => {
            KernelSymbols::from_elf(&read(path)?).with_context(|| path.display().to_string())
        }
    }
}

fn path(args: &mut Arguments, option: &'static str) -> Result<PathBuf> {
    optional_path(args, option)?.with_context(|| format!("{option} is missing\n{USAGE}"))
}

fn optional_path(args: &mut Arguments, option: &'static str) -> Result<Option<PathBuf>> {
    Ok(args.opt_value_from_os_str(option, |value| {
        Ok::<_, std::convert::Infallible>(PathBuf::from(value))
    })?)
}

/// Return the positional arguments, exactly as many as there are names.
fn rest<const N: usize>(args: Arguments, names: [&str; N]) -> Result<[PathBuf; N]> {
    let rest: Vec<OsString> = args.finish();
    let rest: Vec<PathBuf> = rest.into_iter().map(PathBuf::from).collect();
    rest.try_into().map_err(|rest| {
        anyhow::anyhow!("expected {names:?} after the options, not {rest:?}\n{USAGE}")
    })
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

fn parsed<T>(path: &Path, parse: impl FnOnce(&str) -> Result<T>) -> Result<T> {
    let text =
        fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    parse(&text).with_context(|| path.display().to_string())
}
