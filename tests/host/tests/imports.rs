// SPDX-License-Identifier: GPL-2.0

//! Check which files of the module import which.
//!
//! A file never imports one that imports it, directly or indirectly, and no layer imports one above it: see
//! [`LAYERS`]. Every `use` counts, and every path through a module of the crate, also in the arguments of
//! macros. Method calls and `mod` lines do not count.

#[allow(dead_code)]
#[path = "../build.rs"]
mod build;

use petgraph::{algo::tarjan_scc, graphmap::DiGraphMap};
use proc_macro2::{TokenStream, TokenTree};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};
use syn::{visit::Visit, UseTree};

/// The parts of the module (files or directories in `src/`), and what each may import.
const LAYERS: &[(&str, &[&str])] = &[
    ("hash.rs", &[]),
    // The layout of the kernel's structures is for mm/. The code that checks it calls mm/, and the top calls
    // that.
    ("abi", &["mm"]),
    ("mm", &["hash.rs", "abi"]),
    ("sys", &["mm"]),
    ("intree.rs", &["abi", "mm", "sys"]),
    ("ksm", &["hash.rs", "mm", "sys", "intree.rs"]),
    (
        "rksm_main.rs",
        &["hash.rs", "abi", "mm", "sys", "intree.rs", "ksm"],
    ),
];

/// The path of a module, from the crate's root.
type ModPath = Vec<String>;

/// Files by their paths in the source directory, on disk or made up.
type Files = BTreeMap<PathBuf, String>;

/// The files that each file imports.
type Imports = BTreeMap<PathBuf, BTreeSet<PathBuf>>;

/// The modules of a file, and what they refer to.
#[derive(Default)]
struct Found {
    /// Modules in files of their own: `mod x;`.
    outside: Vec<ModPath>,
    /// Modules with a body here.
    inside: Vec<ModPath>,
    /// The paths in use, with the module that uses them.
    paths: Vec<(ModPath, Vec<String>)>,
    module: ModPath,
}

impl Found {
    fn add_path(&mut self, path: Vec<String>) {
        self.paths.push((self.module.clone(), path));
    }

    fn add_use(&mut self, tree: &UseTree, mut path: Vec<String>) {
        match tree {
            UseTree::Path(tree) => {
                path.push(tree.ident.to_string());
                self.add_use(&tree.tree, path);
            }
            UseTree::Name(tree) => {
                path.push(tree.ident.to_string());
                self.add_path(path);
            }
            UseTree::Rename(tree) => {
                path.push(tree.ident.to_string());
                self.add_path(path);
            }
            UseTree::Glob(_) => self.add_path(path),
            UseTree::Group(group) => {
                for tree in &group.items {
                    self.add_use(tree, path.clone());
                }
            }
        }
    }

    /// Add the paths among the arguments of a macro, which need not have Rust's syntax.
    fn add_tokens(&mut self, tokens: TokenStream) {
        let mut path: Vec<String> = Vec::new();
        let mut colons = 0;
        for token in tokens {
            match token {
                TokenTree::Ident(ident) => {
                    let ident = ident.to_string();
                    if colons != 2 {
                        self.add_long(std::mem::take(&mut path));
                    }
                    path.push(ident);
                    colons = 0;
                }
                TokenTree::Punct(punct) if punct.as_char() == ':' => colons += 1,
                other => {
                    self.add_long(std::mem::take(&mut path));
                    colons = 0;
                    if let TokenTree::Group(group) = other {
                        self.add_tokens(group.stream());
                    }
                }
            }
        }
        self.add_long(path);
    }

    /// Add a path, unless it is a single name, which some `use` has brought in.
    fn add_long(&mut self, path: Vec<String>) {
        if path.len() > 1 {
            self.add_path(path);
        }
    }
}

impl<'ast> Visit<'ast> for Found {
    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        if item.leading_colon.is_none() {
            self.add_use(&item.tree, Vec::new());
        }
    }

    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        self.module.push(item.ident.to_string());
        match item.content {
            Some(_) => {
                self.inside.push(self.module.clone());
                syn::visit::visit_item_mod(self, item);
            }
            None => self.outside.push(self.module.clone()),
        }
        self.module.pop();
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let segments = path.segments.iter().map(|part| part.ident.to_string());
        self.add_long(segments.collect());
        syn::visit::visit_path(self, path);
    }

    // Skip `pub(in crate::x)`, which imports nothing.
    fn visit_visibility(&mut self, _: &'ast syn::Visibility) {}

    fn visit_macro(&mut self, item: &'ast syn::Macro) {
        self.add_tokens(item.tokens.clone());
    }
}

/// Read the crate with the root file `root`.
fn imports(files: &Files, root: &str) -> Imports {
    let mut modules: BTreeMap<ModPath, PathBuf> = BTreeMap::new();
    let mut paths = Vec::new();
    let mut open = vec![(ModPath::new(), PathBuf::from(root))];
    while let Some((module, file)) = open.pop() {
        let text = &files[&file];
        let parsed =
            syn::parse_file(text).unwrap_or_else(|err| panic!("{}: {err}", file.display()));
        let mut found = Found {
            module: module.clone(),
            ..Found::default()
        };
        found.visit_file(&parsed);
        modules.insert(module, file.clone());
        for module in found.inside {
            modules.insert(module, file.clone());
        }
        for module in found.outside {
            let dir: PathBuf = module.iter().collect();
            let candidates = [dir.with_extension("rs"), dir.join("mod.rs")];
            let file = candidates.into_iter().find(|file| files.contains_key(file));
            let file = file.unwrap_or_else(|| panic!("no file for module {}", module.join("::")));
            open.push((module, file));
        }
        let here = found.paths.into_iter();
        paths.extend(here.map(|(module, path)| (file.clone(), module, path)));
    }
    let mut imports: Imports = modules
        .values()
        .map(|file| (file.clone(), BTreeSet::new()))
        .collect();
    for (file, module, path) in paths {
        if let Some(target) = resolve(&modules, &module, &path) {
            if *target != file {
                imports.entry(file).or_default().insert(target.clone());
            }
        }
    }
    imports
}

/// Return the file of the innermost module in a path; `None` if the path leads into another crate.
fn resolve<'a>(
    modules: &'a BTreeMap<ModPath, PathBuf>,
    module: &[String],
    path: &[String],
) -> Option<&'a PathBuf> {
    let mut at = module.to_vec();
    let mut rest = path;
    match rest.first()?.as_str() {
        "crate" => at.clear(),
        "self" => {}
        "super" => {
            at.pop();
        }
        first => {
            at.push(first.to_string());
            modules.get(&at)?;
        }
    }
    rest = &rest[1..];
    for part in rest {
        if part == "super" {
            at.pop();
            continue;
        }
        at.push(part.clone());
        if !modules.contains_key(&at) {
            at.pop();
            break;
        }
    }
    modules.get(&at)
}

/// Return the files of each cycle.
fn circles(imports: &Imports) -> Vec<Vec<String>> {
    let mut graph: DiGraphMap<&Path, ()> = DiGraphMap::new();
    for (file, others) in imports {
        for other in others {
            graph.add_edge(file, other, ());
        }
    }
    let parts = tarjan_scc(&graph).into_iter();
    let circles = parts.filter(|part| part.len() > 1);
    let named = circles.map(|part| {
        let mut names: Vec<_> = part.iter().map(|file| file.display().to_string()).collect();
        names.sort();
        names
    });
    named.collect()
}

/// Return the imports of a layer above.
fn upward(imports: &Imports) -> Vec<String> {
    let layer = |file: &Path| {
        let top = file.iter().next().and_then(|name| name.to_str());
        let found = LAYERS.iter().find(|(name, _)| Some(*name) == top);
        found.unwrap_or_else(|| panic!("{} is in no layer", file.display()))
    };
    let mut found = Vec::new();
    for (file, others) in imports {
        let (name, below) = layer(file);
        for other in others {
            let (other_name, _) = layer(other);
            if name != other_name && !below.contains(other_name) {
                found.push(format!("{} imports {}", file.display(), other.display()));
            }
        }
    }
    found
}

/// The module's own files.
fn module_files() -> Files {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../src");
    let mut paths = Vec::new();
    build::add_files(&src, &mut paths).expect("src/ can be read");
    let read = |path: PathBuf| {
        let text = fs::read_to_string(&path).expect("the file can be read");
        let name = path.strip_prefix(&src).expect("the file is in src/");
        (name.to_path_buf(), text)
    };
    paths.into_iter().map(read).collect()
}

fn made_up(files: &[(&str, &str)]) -> Imports {
    let files = files.iter();
    let files = files.map(|(name, text)| (PathBuf::from(name), text.to_string()));
    imports(&files.collect(), "rksm_main.rs")
}

#[test]
fn no_files_of_the_module_import_each_other() {
    let circles = circles(&imports(&module_files(), "rksm_main.rs"));
    assert_eq!(
        circles,
        Vec::<Vec<String>>::new(),
        "these import each other"
    );
}

#[test]
fn no_layer_of_the_module_imports_one_above_it() {
    let upward = upward(&imports(&module_files(), "rksm_main.rs"));
    assert!(upward.is_empty(), "against the order of layers: {upward:?}");
}

#[test]
fn every_file_is_read() {
    let files = module_files();
    let read = imports(&files, "rksm_main.rs");
    let unread: Vec<_> = files
        .keys()
        .filter(|file| !read.contains_key(*file))
        .collect();
    assert!(unread.is_empty(), "in no module: {unread:?}");
}

#[test]
fn a_planted_circle_is_found() {
    let imports = made_up(&[
        ("rksm_main.rs", "mod ksm;"),
        ("ksm/mod.rs", "mod a; mod b; mod c; fn f() -> a::A {}"),
        ("ksm/a.rs", "use super::b::{self, B}; fn f() {}"),
        ("ksm/b.rs", "fn f() { m!(x, [super::c::g()]) }"),
        ("ksm/c.rs", "fn g(_: crate::ksm::a::A) {}"),
    ]);
    assert_eq!(circles(&imports), [["ksm/a.rs", "ksm/b.rs", "ksm/c.rs"]]);
    assert!(upward(&imports).is_empty());
}

#[test]
fn a_planted_circle_with_the_parent_is_found() {
    let imports = made_up(&[
        ("rksm_main.rs", "mod ksm;"),
        ("ksm/mod.rs", "mod a; use a::A; struct Engine(A);"),
        ("ksm/a.rs", "use super::Engine;"),
    ]);
    assert_eq!(circles(&imports), [["ksm/a.rs", "ksm/mod.rs"]]);
}

#[test]
fn a_planted_upward_import_is_found() {
    let imports = made_up(&[
        (
            "rksm_main.rs",
            "mod hash; mod ksm; mod mm; use ksm::Engine;",
        ),
        ("hash.rs", "fn f() {}"),
        ("ksm/mod.rs", "use crate::{hash::f, mm::folio};"),
        ("mm/mod.rs", "mod folio; mod entry;"),
        (
            "mm/folio.rs",
            "use crate::hash; fn f() { let x = 1; x.ksm(); }",
        ),
        (
            "mm/entry.rs",
            "mod inner { fn f() { super::super::super::ksm::g() } }",
        ),
    ]);
    assert!(circles(&imports).is_empty());
    assert_eq!(upward(&imports), ["mm/entry.rs imports ksm/mod.rs"]);
}
