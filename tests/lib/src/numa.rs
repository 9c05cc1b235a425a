// SPDX-License-Identifier: GPL-2.0
//! NUMA nodes: where pages are, and moving them.

use std::fs;
use std::io;

use anyhow::{ensure, Context, Result};

use crate::pageflags::Span;
use crate::region::PAGE;

const MPOL_DEFAULT: libc::c_int = 0;
const MPOL_BIND: libc::c_int = 2;
const MPOL_MF_MOVE_ALL: libc::c_int = 4;
/// The number of bits in a node mask, plus one: the kernel subtracts it.
const MASK_BITS: libc::c_ulong = 65;

/// The nodes that have memory.
pub fn nodes() -> Result<Vec<u32>> {
    let text = fs::read_to_string("/sys/devices/system/node/has_memory").context("has_memory")?;
    parse_list(&text).with_context(|| format!("has_memory reads {text:?}"))
}

/// Parse a list such as `0-1,3`.
fn parse_list(text: &str) -> Option<Vec<u32>> {
    let mut all = Vec::new();
    for part in text.trim().split(',').filter(|part| !part.is_empty()) {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        all.extend(from.parse::<u32>().ok()?..=to.parse().ok()?);
    }
    Some(all)
}

fn check(what: &'static str, ret: libc::c_long) -> Result<libc::c_long> {
    if ret < 0 {
        return Err(io::Error::last_os_error()).context(what);
    }
    Ok(ret)
}

/// Restrict allocations of this process and of its future children to `node`. `None` lifts the restriction.
pub fn bind(node: Option<u32>) -> Result<()> {
    let (mode, mask) = match node {
        Some(node) => (MPOL_BIND, 1u64 << node),
        None => (MPOL_DEFAULT, 0),
    };
    let (mask, bits) = match node {
        Some(_) => (&raw const mask, MASK_BITS),
        None => (std::ptr::null(), 0),
    };
    // SAFETY: The mask has the stated number of bits and outlives the call.
    check("set_mempolicy", unsafe {
        libc::syscall(libc::SYS_set_mempolicy, mode, mask, bits)
    })
    .map(drop)
}

fn addresses(span: Span) -> Vec<*mut libc::c_void> {
    (0..span.pages)
        .map(|i| (span.addr + i * PAGE) as *mut libc::c_void)
        .collect()
}

/// Move the pages of `span` to `node`, also those that other processes map. Return for each page its node
/// afterwards, or a negative errno.
pub fn move_to(span: Span, node: u32) -> Result<Vec<i32>> {
    let wanted = vec![node as i32; span.pages];
    move_pages(span, Some(&wanted))
}

/// The node of each page of `span`, or a negative errno.
pub fn nodes_of(span: Span) -> Result<Vec<i32>> {
    move_pages(span, None)
}

/// Check that all pages are on `node`.
pub fn ensure_on(span: Span, node: u32) -> Result<()> {
    let nodes = nodes_of(span)?;
    ensure!(
        nodes.iter().all(|&at| at == node as i32),
        "not all on node {node}: {nodes:?}"
    );
    Ok(())
}

/// Move all pages to `node`. Retry, as a transient reference may block a page for a moment.
pub fn move_all_to(span: Span, node: u32) -> Result<()> {
    for _ in 0..50 {
        move_to(span, node)?;
        if ensure_on(span, node).is_ok() {
            return Ok(());
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    ensure_on(span, node)
}

fn move_pages(span: Span, wanted: Option<&[i32]>) -> Result<Vec<i32>> {
    let addresses = addresses(span);
    let mut status = vec![i32::MIN; span.pages];
    // SAFETY: All three arrays have the stated number of entries and outlive the call.
    check("move_pages", unsafe {
        libc::syscall(
            libc::SYS_move_pages,
            span.pid,
            span.pages as libc::c_ulong,
            addresses.as_ptr(),
            wanted.map_or(std::ptr::null(), <[i32]>::as_ptr),
            status.as_mut_ptr(),
            MPOL_MF_MOVE_ALL,
        )
    })?;
    Ok(status)
}

/// Move all pages of a process from one node to another. Return how many the kernel could not move.
pub fn migrate_process(pid: u32, from: u32, to: u32) -> Result<u64> {
    let (from, to) = (1u64 << from, 1u64 << to);
    // SAFETY: The masks have the stated number of bits and outlive the call.
    let left = check("migrate_pages", unsafe {
        libc::syscall(
            libc::SYS_migrate_pages,
            pid,
            MASK_BITS,
            &raw const from,
            &raw const to,
        )
    })?;
    Ok(left as u64)
}

/// Return two nodes with memory; `None` if the machine has fewer.
pub fn two_nodes() -> Result<Option<(u32, u32)>> {
    let nodes = nodes()?;
    ensure!(!nodes.is_empty(), "no node has memory");
    Ok(match nodes[..] {
        [a, b, ..] => Some((a, b)),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_nodes() {
        assert_eq!(parse_list("0-1,3\n").unwrap(), [0, 1, 3]);
        assert_eq!(parse_list("\n").unwrap(), [0u32; 0]);
        assert!(parse_list("x").is_none());
    }
}
