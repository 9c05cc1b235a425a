// SPDX-License-Identifier: GPL-2.0
//! On which memory node pages are, and moving them to another one.

use std::io;
use std::path::Path;

use anyhow::{bail, ensure, Context, Result};

use crate::pageflags::Span;
use crate::region::PAGE;

const MPOL_MF_MOVE: libc::c_int = 1 << 1;
const MPOL_MF_MOVE_ALL: libc::c_int = 1 << 2;

/// Whether the machine has nodes 0 and 1.
pub fn has_two_nodes() -> bool {
    (0..2).all(|node| Path::new(&format!("/sys/devices/system/node/node{node}")).exists())
}

/// The system call: moves pages to `node`, or only asks where they are. What
/// it says of each page: its node, or an error number below zero.
fn move_pages(span: Span, node: Option<i32>, flags: libc::c_int) -> Result<Vec<i32>> {
    let pages: Vec<usize> = (0..span.pages).map(|i| span.addr + i * PAGE).collect();
    let nodes = vec![node.unwrap_or(0); span.pages];
    let mut status = vec![i32::MIN; span.pages];
    let to = node.map_or(std::ptr::null(), |_| nodes.as_ptr());
    // SAFETY: the arrays have as many elements as the call is told and outlive it.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_move_pages,
            span.pid as libc::pid_t,
            span.pages,
            pages.as_ptr(),
            to,
            status.as_mut_ptr(),
            flags,
        )
    };
    if ret < 0 {
        return Err(io::Error::last_os_error()).context("move_pages");
    }
    Ok(status)
}

/// The node of each page.
pub fn nodes(span: Span) -> Result<Vec<i32>> {
    move_pages(span, None, 0)
}

/// Checks that all pages are on `node`.
pub fn ensure_on(span: Span, node: i32) -> Result<()> {
    let nodes = nodes(span)?;
    ensure!(
        nodes.iter().all(|&n| n == node),
        "not all on node {node}: {nodes:?}"
    );
    Ok(())
}

/// Moves all pages to `node`, also those that others map.
pub fn move_to(span: Span, node: i32) -> Result<()> {
    // Somebody may hold a page for a moment.
    for _ in 0..50 {
        move_pages(span, Some(node), MPOL_MF_MOVE | MPOL_MF_MOVE_ALL)?;
        if ensure_on(span, node).is_ok() {
            return Ok(());
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    bail!("cannot be moved to node {node}: {:?}", nodes(span)?);
}
