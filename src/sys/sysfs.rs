// SPDX-License-Identifier: GPL-2.0

//! A directory of attributes in `/sys/kernel/mm/`.

use crate::mm::ffi;
use core::{
    fmt::{self, Write},
    ptr::{self, NonNull},
};
use kernel::{
    bindings, error::to_result, ffi::c_char, page::PAGE_SIZE, prelude::*, str::CStr, sync::Arc,
};

/// One file of a directory that belongs to a `T`, with what reading and writing it does. Both may sleep.
pub(crate) struct Attribute<T> {
    name: &'static CStr,
    show: Show<T>,
    store: Option<Store<T>>,
}

/// Writes what a file holds to the output.
type Show<T> = fn(&T, &mut Output<'_>) -> Result;
/// Takes what was written to a file.
type Store<T> = fn(&T, Input<'_>) -> Result;

impl<T> Attribute<T> {
    /// A file that everybody may read and root may write.
    pub(crate) const fn rw(name: &'static CStr, show: Show<T>, store: Store<T>) -> Self {
        Self {
            name,
            show,
            store: Some(store),
        }
    }

    /// A file that everybody may read.
    pub(crate) const fn ro(name: &'static CStr, show: Show<T>) -> Self {
        Self {
            name,
            show,
            store: None,
        }
    }

    fn mode(&self) -> u16 {
        match self.store {
            Some(_) => 0o644,
            None => 0o444,
        }
    }
}

/// What has a directory.
pub(crate) trait Directory: Send + Sync + Sized + 'static {
    /// The directory's name.
    const NAME: &'static CStr;
    /// Its files.
    const ATTRIBUTES: &'static [Attribute<Self>];
}

/// The content of a file that is being read: one page at most.
pub(crate) struct Output<'a> {
    buf: &'a mut [u8],
    len: usize,
}

impl Output<'_> {
    /// Writes a line. `EINVAL` if there is no room for it.
    pub(crate) fn line(&mut self, line: impl fmt::Display) -> Result {
        writeln!(self, "{line}").map_err(|_| EINVAL)
    }
}

impl fmt::Write for Output<'_> {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        let end = self.len.checked_add(s.len()).ok_or(fmt::Error)?;
        let room = self.buf.get_mut(self.len..end).ok_or(fmt::Error)?;
        room.copy_from_slice(s.as_bytes());
        self.len = end;
        Ok(())
    }
}

/// What was written to a file.
///
/// Numbers are in base 10. The errors are those of the kernel's own functions: `EINVAL` for what is no
/// number, `ERANGE` for one that does not fit; see [`only_einval`].
pub(crate) struct Input<'a>(&'a CStr);

impl Input<'_> {
    /// The number that it is, as `kstrtouint()` takes it.
    pub(crate) fn parse_u32(&self) -> Result<u32> {
        let mut value = 0;
        // SAFETY: a C string, and a place for the result.
        to_result(unsafe { bindings::kstrtouint(self.0.as_char_ptr(), 10, &raw mut value) })?;
        Ok(value)
    }

    /// The number that it is, as `kstrtoint()` takes it.
    pub(crate) fn parse_i32(&self) -> Result<i32> {
        let mut value = 0;
        // SAFETY: a C string, and a place for the result.
        to_result(unsafe { bindings::kstrtoint(self.0.as_char_ptr(), 10, &raw mut value) })?;
        Ok(value)
    }

    /// The number that it is, as `kstrtoul()` takes it.
    pub(crate) fn parse_u64(&self) -> Result<u64> {
        let mut value = 0;
        // SAFETY: a C string, and a place for the result.
        to_result(unsafe { bindings::kstrtoull(self.0.as_char_ptr(), 10, &raw mut value) })?;
        Ok(value)
    }

    /// Whether it says yes or no, as `kstrtobool()` takes it.
    pub(crate) fn parse_bool(&self) -> Result<bool> {
        let mut value = false;
        // SAFETY: a C string, and a place for the result.
        to_result(unsafe { bindings::kstrtobool(self.0.as_char_ptr(), &raw mut value) })?;
        Ok(value)
    }

    /// Whether it is this word, with or without an end of line.
    pub(crate) fn is(&self, word: &CStr) -> bool {
        // SAFETY: two C strings.
        unsafe { bindings::sysfs_streq(self.0.as_char_ptr(), word.as_char_ptr()) }
    }
}

/// For files that say `EINVAL` to everything they do not take.
pub(crate) fn only_einval(_: Error) -> Error {
    EINVAL
}

/// The kobject of `/sys/kernel/mm`.
pub(crate) fn mm_kobj() -> *mut bindings::kobject {
    // SAFETY: set at boot and never changed.
    unsafe { ffi::rksm_mm_kobj() }
}

/// The attribute behind `/sys/kernel/mm/<group>/<file>`, made by `kobj_attribute`.
pub(crate) fn find_mm_attribute(
    group: &CStr,
    file: &CStr,
) -> Option<NonNull<bindings::kobj_attribute>> {
    /// A reference on a node of sysfs.
    struct Node(NonNull<bindings::kernfs_node>);

    impl Node {
        /// # Safety
        ///
        /// `parent` is valid.
        unsafe fn find(parent: *mut bindings::kernfs_node, name: &CStr) -> Option<Self> {
            // SAFETY: the caller's promise.
            let node = unsafe {
                bindings::kernfs_find_and_get_ns(parent, name.as_char_ptr(), ptr::null())
            };
            NonNull::new(node).map(Self)
        }
    }

    impl Drop for Node {
        fn drop(&mut self) {
            // SAFETY: got in `find`.
            unsafe { bindings::kernfs_put(self.0.as_ptr()) };
        }
    }

    // SAFETY: /sys/kernel/mm exists for ever, and the group is kept by a reference.
    unsafe {
        let group = Node::find((*mm_kobj()).sd, group)?;
        let file = Node::find(group.0.as_ptr(), file)?;
        // A sysfs file's node points at its attribute, the first member of a kobj_attribute.
        let attribute = (*file.0.as_ptr()).priv_;
        NonNull::new(attribute.cast())
    }
}

/// The kernel's view of one file, with the way back to its owner.
#[repr(C)]
struct KernelAttribute<T: 'static> {
    kernel: bindings::kobj_attribute,
    owner: *const T,
    attribute: &'static Attribute<T>,
}

/// A directory that is shown. Dropping it removes the files and waits for whoever is using one.
///
/// # Invariants
///
/// `group` is registered; it and all it points at, `owner` included, stay where they are until it is
/// removed.
pub(crate) struct SysfsGroup<T: Directory> {
    group: KBox<bindings::attribute_group>,
    _attributes: KVec<KernelAttribute<T>>,
    _pointers: KVec<*mut bindings::attribute>,
    _owner: Arc<T>,
}

// SAFETY: sysfs serialises what it does with the group; the rest is not used before the drop.
unsafe impl<T: Directory> Send for SysfsGroup<T> {}
// SAFETY: nothing can be done with a shared reference.
unsafe impl<T: Directory> Sync for SysfsGroup<T> {}

impl<T: Directory> SysfsGroup<T> {
    /// Makes the directory.
    pub(crate) fn new(owner: Arc<T>) -> Result<Self> {
        let mut attributes = KVec::with_capacity(T::ATTRIBUTES.len(), GFP_KERNEL)?;
        let mut pointers = KVec::with_capacity(T::ATTRIBUTES.len().saturating_add(1), GFP_KERNEL)?;
        for attribute in T::ATTRIBUTES {
            let mut kernel: bindings::kobj_attribute = pin_init::zeroed();
            // SAFETY: an attribute that nobody else knows yet.
            unsafe { ffi::rksm_attribute_init(&raw mut kernel.attr) };
            kernel.attr.name = attribute.name.as_char_ptr();
            kernel.attr.mode = attribute.mode();
            kernel.__bindgen_anon_1.show = Some(show::<T>);
            kernel.__bindgen_anon_2.store = Some(store::<T>);
            attributes.push(
                KernelAttribute {
                    kernel,
                    owner: &raw const *owner,
                    attribute,
                },
                GFP_KERNEL,
            )?;
        }
        for attribute in &mut attributes {
            pointers.push(&raw mut attribute.kernel.attr, GFP_KERNEL)?;
        }
        pointers.push(ptr::null_mut(), GFP_KERNEL)?;
        let mut group: bindings::attribute_group = pin_init::zeroed();
        group.name = T::NAME.as_char_ptr();
        group.__bindgen_anon_2.attrs = pointers.as_mut_ptr();
        let group = KBox::new(group, GFP_KERNEL)?;
        // SAFETY: the group and all it points at live in allocations that are not touched until
        // `drop` removed it.
        to_result(unsafe { bindings::sysfs_create_group(mm_kobj(), &*group) })?;
        // INVARIANT: just registered.
        Ok(Self {
            group,
            _attributes: attributes,
            _pointers: pointers,
            _owner: owner,
        })
    }
}

impl<T: Directory> Drop for SysfsGroup<T> {
    fn drop(&mut self) {
        // SAFETY: registered by the type invariant; this waits for all users of the files.
        unsafe { bindings::sysfs_remove_group(mm_kobj(), &*self.group) };
    }
}

/// # Safety
///
/// Called by sysfs for an attribute made by [`SysfsGroup::new`], with a page to write to.
unsafe extern "C" fn show<T: Directory>(
    _kobj: *mut bindings::kobject,
    attr: *mut bindings::kobj_attribute,
    buf: *mut c_char,
) -> isize {
    // SAFETY: the attribute is the first member of ours, which outlives its use by sysfs; the buffer
    // is one page and nobody else's.
    let (attribute, buf) = unsafe {
        (
            &*attr.cast::<KernelAttribute<T>>(),
            core::slice::from_raw_parts_mut(buf.cast::<u8>(), PAGE_SIZE),
        )
    };
    let mut out = Output { buf, len: 0 };
    // SAFETY: `SysfsGroup` keeps the owner as long as the file exists.
    match (attribute.attribute.show)(unsafe { &*attribute.owner }, &mut out) {
        Ok(()) => out.len as isize,
        Err(err) => err.to_errno() as isize,
    }
}

/// # Safety
///
/// Called by sysfs for an attribute made by [`SysfsGroup::new`], with a C string.
unsafe extern "C" fn store<T: Directory>(
    _kobj: *mut bindings::kobject,
    attr: *mut bindings::kobj_attribute,
    buf: *const c_char,
    count: usize,
) -> isize {
    // SAFETY: as in `show`; sysfs ends what was written with a NUL.
    let (attribute, input) = unsafe {
        (
            &*attr.cast::<KernelAttribute<T>>(),
            CStr::from_char_ptr(buf),
        )
    };
    // sysfs writes only to files with the mode for it.
    let Some(store) = attribute.attribute.store else {
        return EIO.to_errno() as isize;
    };
    // SAFETY: `SysfsGroup` keeps the owner as long as the file exists.
    match store(unsafe { &*attribute.owner }, Input(input)) {
        Ok(()) => count as isize,
        Err(err) => err.to_errno() as isize,
    }
}
