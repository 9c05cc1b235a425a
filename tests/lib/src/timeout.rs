// SPDX-License-Identifier: GPL-2.0
//! How long to wait before something counts as stuck.

use std::sync::LazyLock;
use std::time::Duration;

/// How many times slower than the stock kernel the guest's kernel is (`RKSM_SLOW`).
static SLOW: LazyLock<u32> = LazyLock::new(|| {
    std::env::var("RKSM_SLOW")
        .ok()
        .and_then(|s| s.parse().ok())
        .unwrap_or(1)
});

/// Scale `limit`, which is meant for the stock kernel, to the kernel under test.
pub fn scaled(limit: Duration) -> Duration {
    limit.saturating_mul(*SLOW)
}
