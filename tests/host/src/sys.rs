// SPDX-License-Identifier: GPL-2.0

//! Stands in for the module's `sys`.

pub(crate) mod module_pin {
    //! A pin that keeps nothing loaded.

    use kernel::prelude::*;

    pub(crate) struct Pin(());

    #[allow(dead_code)]
    impl Pin {
        pub(crate) fn new(_: &'static ThisModule) -> Self {
            Self(())
        }

        pub(crate) fn unpin(&mut self) {}
    }
}
