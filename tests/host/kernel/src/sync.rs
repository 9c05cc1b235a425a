// SPDX-License-Identifier: GPL-2.0

//! References.

pub mod aref;
pub mod atomic;

use crate::alloc::{AllocError, Flags};
use std::ops::Deref;

/// A shared reference. Its memory is not counted, and its allocation does not fail.
pub struct Arc<T>(std::sync::Arc<T>);

impl<T> Arc<T> {
    /// Share a value.
    pub fn new(value: T, _: Flags) -> Result<Self, AllocError> {
        Ok(Self(std::sync::Arc::new(value)))
    }
}

impl<T> Clone for Arc<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> Deref for Arc<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}
