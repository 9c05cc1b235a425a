// SPDX-License-Identifier: GPL-2.0

//! Errors.

use crate::alloc::AllocError;
use std::{fmt, num::NonZeroI32};

/// An errno, negative as in the kernel.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Error(NonZeroI32);

/// A result whose error is an errno by default.
pub type Result<T = (), E = Error> = core::result::Result<T, E>;

const MAX_ERRNO: i32 = 4095;

impl Error {
    const fn try_from_errno(errno: i32) -> Option<Self> {
        if errno < -MAX_ERRNO || errno >= 0 {
            return None;
        }
        match NonZeroI32::new(errno) {
            Some(errno) => Some(Self(errno)),
            None => None,
        }
    }

    /// Create the error with this (negative) errno; `EINVAL` if there is no such errno.
    pub fn from_errno(errno: i32) -> Self {
        Self::try_from_errno(errno).unwrap_or(code::EINVAL)
    }

    /// Return the errno, negative.
    pub fn to_errno(self) -> i32 {
        self.0.get()
    }
}

impl From<AllocError> for Error {
    fn from(_: AllocError) -> Self {
        code::ENOMEM
    }
}

macro_rules! errnos {
    ($($name:ident = $number:literal,)*) => {
        /// Error codes.
        pub mod code {
            use super::Error;
            $(
                #[doc = stringify!($name)]
                pub const $name: Error = match Error::try_from_errno(-$number) {
                    Some(error) => error,
                    None => panic!("not an errno"),
                };
            )*
        }

        impl fmt::Debug for Error {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match *self {
                    $(code::$name => f.write_str(stringify!($name)),)*
                    _ => f.debug_tuple("Error").field(&-self.to_errno()).finish(),
                }
            }
        }
    };
}

errnos! {
    EPERM = 1,
    ENOENT = 2,
    ESRCH = 3,
    EINTR = 4,
    EIO = 5,
    E2BIG = 7,
    EBADF = 9,
    EAGAIN = 11,
    ENOMEM = 12,
    EACCES = 13,
    EFAULT = 14,
    EBUSY = 16,
    EEXIST = 17,
    ENODEV = 19,
    EINVAL = 22,
    ENOSPC = 28,
    ERANGE = 34,
    EOVERFLOW = 75,
}
