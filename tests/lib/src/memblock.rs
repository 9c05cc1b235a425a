// SPDX-License-Identifier: GPL-2.0
//! Memory blocks, and memory that can be unplugged.
//!
//! tests/run gives the guest a DIMM that is offline at first, so it is empty. A test brings it online as
//! movable and binds its processes to its node, so that they allocate there. Then it takes the DIMM offline
//! again.

use std::fs;
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::background::Background;
use crate::numa;
use crate::pageflags::{frames, Span};
use crate::region::PAGE;

const MEMORY: &str = "/sys/devices/system/memory";

/// A memory block: the unit that goes online and offline.
#[derive(Clone, Debug)]
pub struct Block {
    pub dir: PathBuf,
    first: u64,
    frames: u64,
    node: u32,
}

impl Block {
    fn all() -> Result<Vec<Self>> {
        let size = fs::read_to_string(format!("{MEMORY}/block_size_bytes"))?;
        let frames = u64::from_str_radix(size.trim(), 16).context("block size")? / PAGE as u64;
        let mut all = Vec::new();
        for entry in fs::read_dir(MEMORY).context(MEMORY)? {
            let dir = entry?.path();
            let Some(number) = number_in(&dir, "memory") else {
                continue;
            };
            let node = fs::read_dir(&dir)?
                .filter_map(|e| number_in(&e.ok()?.path(), "node"))
                .next();
            all.push(Self {
                first: number * frames,
                frames,
                node: node.context("a memory block of no node")? as u32,
                dir,
            });
        }
        all.sort_by_key(|block| block.first);
        Ok(all)
    }

    pub fn state(&self) -> Result<String> {
        let state = fs::read_to_string(self.dir.join("state")).context("state")?;
        Ok(state.trim_end().to_string())
    }

    pub fn set(&self, state: &str) -> Result<()> {
        fs::write(self.dir.join("state"), state)
            .with_context(|| format!("{}: {state}", self.dir.display()))
    }

    /// Return whether frame `pfn` is in the block.
    pub fn holds(&self, pfn: u64) -> bool {
        (self.first..self.first + self.frames).contains(&pfn)
    }
}

/// Return the memory blocks that are plugged in and offline.
pub fn offline_blocks() -> Result<Vec<Block>> {
    let mut blocks = Vec::new();
    for block in Block::all()? {
        if block.state()? == "offline" {
            blocks.push(block);
        }
    }
    Ok(blocks)
}

fn number_in(path: &Path, prefix: &str) -> Option<u64> {
    path.file_name()?
        .to_str()?
        .strip_prefix(prefix)?
        .parse()
        .ok()
}

/// Memory that a test takes offline. It is online and movable until dropped.
pub struct Plugged {
    pub blocks: Vec<Block>,
}

impl Plugged {
    /// Bring the memory online. `None` if the guest has none.
    pub fn new() -> Result<Option<Self>> {
        let mut blocks = offline_blocks()?;
        let Some(node) = blocks.first().map(|block| block.node) else {
            return Ok(None);
        };
        blocks.retain(|block| block.node == node);
        let this = Self { blocks };
        this.online()?;
        numa::bind(Some(node))?;
        Ok(Some(this))
    }

    pub fn online(&self) -> Result<()> {
        self.blocks
            .iter()
            .try_for_each(|b| match b.state()?.as_str() {
                "offline" => b.set("online_movable"),
                _ => Ok(()),
            })
    }

    pub fn offline(&self) -> Result<()> {
        self.blocks.iter().try_for_each(|b| b.set("offline"))
    }

    /// Compact the node once.
    pub fn compact(&self) -> Result<()> {
        let node = self.blocks.first().context("a block")?.node;
        let file = format!("/sys/devices/system/node/node{node}/compact");
        fs::write(&file, "1").context(file)
    }

    /// Compact the node again and again in the background.
    pub fn compacting(&self) -> Result<Background> {
        let memory = self.again();
        Background::repeat(move || memory.compact())
    }

    /// Return another handle, which does not take the memory offline when dropped.
    pub fn again(&self) -> ManuallyDrop<Self> {
        ManuallyDrop::new(Self {
            blocks: self.blocks.clone(),
        })
    }

    pub fn holds(&self, pfn: u64) -> bool {
        self.blocks.iter().any(|block| block.holds(pfn))
    }

    /// Count the pages of `spans` that lie in this memory.
    pub fn pages_of(&self, spans: &[Span]) -> Result<usize> {
        let mut count = 0;
        for &span in spans {
            let there = frames(span)?;
            count += there
                .into_iter()
                .flatten()
                .filter(|&f| self.holds(f))
                .count();
        }
        Ok(count)
    }
}

impl Drop for Plugged {
    fn drop(&mut self) {
        for block in &self.blocks {
            if block.state().is_ok_and(|state| state != "offline") {
                if let Err(e) = block.set("offline") {
                    println!("{e:#}");
                }
            }
        }
    }
}

/// Why a test that needs such memory is skipped.
pub const NO_DIMM: &str = "the machine has no memory block that is offline";
