// SPDX-License-Identifier: GPL-2.0
//! Small KVM guests that check their own memory.
pub mod content;
