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

/// One file of the directory of a `T`. The functions that read and write it may sleep.
pub(crate) struct Attribute<T> {
    name: &'static CStr,
    show: Show<T>,
    store: Option<Store<T>>,
}

/// Writes the content of a file to the output.
type Show<T> = fn(&T, &mut Output<'_>) -> Result;
/// Handles a write to a file.
type Store<T> = fn(&T, Input<'_>) -> Result;

impl<T> Attribute<T> {
    /// Describes a file with mode 0644.
    pub(crate) const fn rw(name: &'static CStr, show: Show<T>, store: Store<T>) -> Self {
        Self {
            name,
            show,
            store: Some(store),
        }
    }

    /// Describes a file with mode 0444.
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

/// An object with a directory in `/sys/kernel/mm/`.
pub(crate) trait Directory: Send + Sync + Sized + 'static {
    /// The name of the directory.
    const NAME: &'static CStr;
    /// The files in the directory.
    const ATTRIBUTES: &'static [Attribute<Self>];
}

/// The content of a file that is being read, up to one page.
pub(crate) struct Output<'a> {
    buf: &'a mut [u8],
    len: usize,
}

impl Output<'_> {
    /// Appends a line.
    ///
    /// # Errors
    ///
    /// Returns `EINVAL` if the page has no room for it.
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

/// The text that was written to a file.
///
/// Numbers are in base 10. The errors are those of the kernel's own functions: `EINVAL` for text that is not a
/// number, and `ERANGE` for a number that does not fit. [`only_einval`] turns both into `EINVAL`.
pub(crate) struct Input<'a>(&'a CStr);

impl Input<'_> {
    /// Parses the text as `kstrtouint()` does.
    pub(crate) fn parse_u32(&self) -> Result<u32> {
        let mut value = 0;
        // SAFETY: The text is a C string, and `value` has room for the result.
        to_result(unsafe { bindings::kstrtouint(self.0.as_char_ptr(), 10, &raw mut value) })?;
        Ok(value)
    }

    /// Parses the text as `kstrtoint()` does.
    pub(crate) fn parse_i32(&self) -> Result<i32> {
        let mut value = 0;
        // SAFETY: The text is a C string, and `value` has room for the result.
        to_result(unsafe { bindings::kstrtoint(self.0.as_char_ptr(), 10, &raw mut value) })?;
        Ok(value)
    }

    /// Parses the text as `kstrtoull()` does.
    pub(crate) fn parse_u64(&self) -> Result<u64> {
        let mut value = 0;
        // SAFETY: The text is a C string, and `value` has room for the result.
        to_result(unsafe { bindings::kstrtoull(self.0.as_char_ptr(), 10, &raw mut value) })?;
        Ok(value)
    }

    /// Parses the text as `kstrtobool()` does: "1", "y", "on" and the like are true.
    pub(crate) fn parse_bool(&self) -> Result<bool> {
        let mut value = false;
        // SAFETY: The text is a C string, and `value` has room for the result.
        to_result(unsafe { bindings::kstrtobool(self.0.as_char_ptr(), &raw mut value) })?;
        Ok(value)
    }

    /// Returns whether the text is `word`, with or without a newline.
    pub(crate) fn is(&self, word: &CStr) -> bool {
        // SAFETY: Both arguments are C strings.
        unsafe { bindings::sysfs_streq(self.0.as_char_ptr(), word.as_char_ptr()) }
    }
}

/// Turns any error into `EINVAL`, for files that refuse all bad input with it.
pub(crate) fn only_einval(_: Error) -> Error {
    EINVAL
}

/// Returns the kobject of `/sys/kernel/mm`, which is never freed.
pub(crate) fn mm_kobj() -> *mut bindings::kobject {
    // SAFETY: The call reads a variable that is set at boot and never changes.
    unsafe { ffi::rksm_mm_kobj() }
}

/// Returns the attribute of `/sys/kernel/mm/<group>/<file>`, or `None` if there is no such file. May sleep.
///
/// The file must be one that shows a `kobj_attribute`. No reference keeps the attribute.
pub(crate) fn find_mm_attribute(
    group: &CStr,
    file: &CStr,
) -> Option<NonNull<bindings::kobj_attribute>> {
    /// An owned reference on a node of sysfs.
    struct Node(NonNull<bindings::kernfs_node>);

    impl Node {
        /// Returns the node called `name` in `parent`.
        ///
        /// # Safety
        ///
        /// `parent` is valid.
        unsafe fn find(parent: *mut bindings::kernfs_node, name: &CStr) -> Option<Self> {
            // SAFETY: By the caller's promise `parent` is valid, and `name` is a C string.
            let node = unsafe {
                bindings::kernfs_find_and_get_ns(parent, name.as_char_ptr(), ptr::null())
            };
            NonNull::new(node).map(Self)
        }
    }

    impl Drop for Node {
        fn drop(&mut self) {
            // SAFETY: The object owns the reference that was taken in `find`.
            unsafe { bindings::kernfs_put(self.0.as_ptr()) };
        }
    }

    // SAFETY: The kobject of /sys/kernel/mm is never freed, and nor is its node.
    let group = unsafe { Node::find((*mm_kobj()).sd, group)? };
    // SAFETY: The reference keeps the node of the group.
    let file = unsafe { Node::find(group.0.as_ptr(), file)? };
    // The node of a sysfs file points at its attribute, which is the first member of a kobj_attribute.
    // SAFETY: The reference keeps the node of the file.
    let attribute = unsafe { (*file.0.as_ptr()).priv_ };
    NonNull::new(attribute.cast())
}

/// The attribute that sysfs knows, with pointers to the owner of the directory and to our description.
#[repr(C)]
struct KernelAttribute<T: 'static> {
    kernel: bindings::kobj_attribute,
    owner: *const T,
    attribute: &'static Attribute<T>,
}

/// A directory in sysfs. Dropping it removes the files, and waits for all reads and writes that are under way.
///
/// # Invariants
///
/// `group` is registered until the drop. It and all that it points at, including `_owner`, do not move and are
/// not freed before.
pub(crate) struct SysfsGroup<T: Directory> {
    group: KBox<bindings::attribute_group>,
    _attributes: KVec<KernelAttribute<T>>,
    _pointers: KVec<*mut bindings::attribute>,
    _owner: Arc<T>,
}

// SAFETY: Any task may remove a group, and the object uses its members for nothing else.
unsafe impl<T: Directory> Send for SysfsGroup<T> {}
// SAFETY: A shared reference gives access to nothing.
unsafe impl<T: Directory> Sync for SysfsGroup<T> {}

impl<T: Directory> SysfsGroup<T> {
    /// Creates the directory. May sleep.
    ///
    /// # Errors
    ///
    /// Returns `ENOMEM`, or the error of `sysfs_create_group()`.
    pub(crate) fn new(owner: Arc<T>) -> Result<Self> {
        let mut attributes = KVec::with_capacity(T::ATTRIBUTES.len(), GFP_KERNEL)?;
        let mut pointers = KVec::with_capacity(T::ATTRIBUTES.len().saturating_add(1), GFP_KERNEL)?;
        for attribute in T::ATTRIBUTES {
            let mut kernel: bindings::kobj_attribute = pin_init::zeroed();
            // SAFETY: The attribute is local, so nothing else uses it.
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
        // SAFETY: The group and all that it points at are in allocations that are neither changed nor freed
        // before `drop` has removed the group.
        to_result(unsafe { bindings::sysfs_create_group(mm_kobj(), &*group) })?;
        // INVARIANT: The group was registered just now. Its allocations move into the object as they are.
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
        // SAFETY: By the type invariant the group is registered. The call waits for all users of its files.
        unsafe { bindings::sysfs_remove_group(mm_kobj(), &*self.group) };
    }
}

/// Reads a file of a [`SysfsGroup`].
///
/// # Safety
///
/// Only sysfs may call this. `attr` is an attribute made by [`SysfsGroup::new`], and `buf` is a page to write to.
unsafe extern "C" fn show<T: Directory>(
    _kobj: *mut bindings::kobject,
    attr: *mut bindings::kobj_attribute,
    buf: *mut c_char,
) -> isize {
    // SAFETY: `attr` is the first member of a `KernelAttribute`, which `SysfsGroup` keeps while the file exists.
    let attribute = unsafe { &*attr.cast::<KernelAttribute<T>>() };
    // SAFETY: By the caller's promise `buf` is a page. Only this call uses it until it returns.
    let buf = unsafe { core::slice::from_raw_parts_mut(buf.cast::<u8>(), PAGE_SIZE) };
    let mut out = Output { buf, len: 0 };
    // SAFETY: `SysfsGroup` keeps the owner while the file exists.
    match (attribute.attribute.show)(unsafe { &*attribute.owner }, &mut out) {
        Ok(()) => out.len as isize,
        Err(err) => err.to_errno() as isize,
    }
}

/// Writes to a file of a [`SysfsGroup`].
///
/// # Safety
///
/// Only sysfs may call this. `attr` is an attribute made by [`SysfsGroup::new`], and `buf` is a C string: sysfs
/// appends a NUL to the text.
unsafe extern "C" fn store<T: Directory>(
    _kobj: *mut bindings::kobject,
    attr: *mut bindings::kobj_attribute,
    buf: *const c_char,
    count: usize,
) -> isize {
    // SAFETY: `attr` is the first member of a `KernelAttribute`, which `SysfsGroup` keeps while the file exists.
    let attribute = unsafe { &*attr.cast::<KernelAttribute<T>>() };
    // SAFETY: By the caller's promise `buf` is a C string. It does not change before the call returns.
    let input = unsafe { CStr::from_char_ptr(buf) };
    // Not expected, since sysfs only writes to files with a mode that allows it.
    let Some(store) = attribute.attribute.store else {
        return EIO.to_errno() as isize;
    };
    // SAFETY: `SysfsGroup` keeps the owner while the file exists.
    match store(unsafe { &*attribute.owner }, Input(input)) {
        Ok(()) => count as isize,
        Err(err) => err.to_errno() as isize,
    }
}
