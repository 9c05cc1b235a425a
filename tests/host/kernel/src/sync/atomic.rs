// SPDX-License-Identifier: GPL-2.0

//! Values that several tasks use without a lock.

use std::sync::RwLock;

/// No ordering.
pub struct Relaxed;

/// A value that is read and written as a whole.
pub struct Atomic<T>(RwLock<T>);

impl<T: Copy> Atomic<T> {
    /// Create it with this value.
    pub const fn new(value: T) -> Self {
        Self(RwLock::new(value))
    }

    /// Return the value.
    pub fn load(&self, _: Relaxed) -> T {
        *self.0.read().expect("no writer panics")
    }

    /// Set the value.
    pub fn store(&self, value: T, _: Relaxed) {
        *self.0.write().expect("no writer panics") = value;
    }
}
