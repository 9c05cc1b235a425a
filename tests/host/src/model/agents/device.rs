// SPDX-License-Identifier: GPL-2.0

//! A device that writes to a page.

use crate::model::{Entry, State, A, DEVICE};

/// A device writes to A's page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Device {
    /// Read the entry without a lock.
    Look,
    /// Take a reference on what it maps.
    Get {
        page: usize,
    },
    /// Check whether the entry is still the same.
    Again {
        page: usize,
    },
    /// Write.
    Write {
        page: usize,
    },
    /// Drop the reference.
    Put {
        page: usize,
    },
    Done,
}

pub(super) fn device(s: &mut State) -> Device {
    let writable = |s: &State, page| s.maps(A, page) == Some(true);
    match s.device {
        Device::Look => match s.processes[A].entry {
            Entry::Maps {
                frame: page,
                writable: true,
            } => Device::Get { page },
            // A device would have to fault first.
            _ => Device::Done,
        },
        Device::Get { page } => {
            if s.frames[page].refs == 0 {
                return Device::Done;
            }
            s.frames[page].refs += 1;
            Device::Again { page }
        }
        Device::Again { page } if writable(s, page) && s.frames[page].exclusive => {
            Device::Write { page }
        }
        Device::Again { page } => Device::Put { page },
        Device::Write { page } => {
            s.frames[page].content = DEVICE;
            s.processes[A].expected = Some(DEVICE);
            Device::Put { page }
        }
        Device::Put { page } => {
            s.put(page);
            Device::Done
        }
        Device::Done => Device::Done,
    }
}
