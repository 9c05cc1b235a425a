// SPDX-License-Identifier: GPL-2.0
//! `Module.symvers`: what the kernel exports to modules.

use anyhow::{Context, Result};
use std::collections::HashMap;

/// Exported symbols, each with the namespace that it is exported to (mostly none).
#[derive(Debug, Default)]
pub struct Exports(HashMap<String, String>);

/// Whether a module may use a symbol.
#[derive(Debug, PartialEq, Eq)]
pub enum Access<'a> {
    /// The loader will resolve it.
    Granted,
    /// It is exported, but only to this namespace, which the module does not import.
    OtherNamespace(&'a str),
    /// It is not exported.
    None,
}

impl Exports {
    /// Parse the text of a `Module.symvers`: checksum, name, owner, kind and namespace, separated
    /// by tabs.
    pub fn parse(text: &str) -> Result<Self> {
        let mut exports = HashMap::new();
        for (number, line) in (1..).zip(text.lines()) {
            let mut fields = line.split('\t');
            let name = fields
                .nth(1)
                .filter(|name| !name.is_empty())
                .with_context(|| format!("line {number}: no symbol name"))?;
            exports.insert(name.to_string(), fields.nth(2).unwrap_or("").to_string());
        }
        Ok(Exports(exports))
    }

    /// Return whether the module of this name, which imports these namespaces, may use the symbol.
    pub fn access(&self, symbol: &str, module: &str, imports: &[String]) -> Access<'_> {
        match self.0.get(symbol) {
            None => Access::None,
            Some(namespace)
                if namespace.is_empty()
                    || imports.contains(namespace)
                    || names_module(namespace, module) =>
            {
                Access::Granted
            }
            Some(namespace) => Access::OtherNamespace(namespace),
        }
    }
}

/// Return whether a namespace has the form `module:NAME,PREFIX*,…` and includes the module.
fn names_module(namespace: &str, module: &str) -> bool {
    // The kernel treats '-' and '_' alike in module names.
    let plain = |name: &str| name.replace('-', "_");
    let module = plain(module);
    namespace.strip_prefix("module:").is_some_and(|patterns| {
        patterns
            .split(',')
            .any(|pattern| match pattern.strip_suffix('*') {
                Some(prefix) => module.starts_with(&plain(prefix)),
                None => module == plain(pattern),
            })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn namespaces() {
        let exports = Exports::parse(
            "0x0\tplain\tvmlinux\tEXPORT_SYMBOL\t\n\
             0x0\tspaced\tvmlinux\tEXPORT_SYMBOL_GPL\tCRYPTO\n\
             0x0\tfor_kvm\tvmlinux\tEXPORT_SYMBOL_GPL\tmodule:kvm,kvm-*\n",
        )
        .unwrap();
        assert_eq!(exports.access("plain", "rksm", &[]), Access::Granted);
        assert_eq!(exports.access("absent", "rksm", &[]), Access::None);
        assert_eq!(
            exports.access("spaced", "rksm", &[]),
            Access::OtherNamespace("CRYPTO")
        );
        assert_eq!(
            exports.access("spaced", "rksm", &["CRYPTO".into()]),
            Access::Granted
        );
        assert_eq!(
            exports.access("for_kvm", "rksm", &[]),
            Access::OtherNamespace("module:kvm,kvm-*")
        );
        for module in ["kvm", "kvm_intel", "kvm-amd"] {
            assert_eq!(exports.access("for_kvm", module, &[]), Access::Granted);
        }
    }

    #[test]
    fn malformed() {
        let error = Exports::parse("0x0\tok\tvmlinux\tEXPORT_SYMBOL\t\njunk\n").unwrap_err();
        assert_eq!(error.to_string(), "line 2: no symbol name");
    }
}
