//! Slices whose parts are written by different threads.

#![expect(unsafe_code, reason = "threads write disjoint parts of one slice")]

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

/// A slice that threads write in disjoint parts.
#[derive(Clone, Copy)]
pub(super) struct Shared<'a, T> {
    start: *mut T,
    len: usize,
    slice: PhantomData<&'a mut [T]>,
}

// SAFETY: parts are handed out by an unsafe function whose callers keep them disjoint.
unsafe impl<T: Send> Sync for Shared<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    /// The whole of `slice`, which stays borrowed.
    pub(super) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), slice: PhantomData }
    }

    /// The whole of `slice`, whose elements are numbers of which nobody reads one before it is written; NaN in debug builds.
    pub(super) fn unwritten(slice: &'a mut [MaybeUninit<T>]) -> Self
    where
        T: From<f32>,
    {
        if cfg!(debug_assertions) {
            slice.fill_with(|| MaybeUninit::new(f32::NAN.into()));
        }
        Self { start: slice.as_mut_ptr().cast(), len: slice.len(), slice: PhantomData }
    }

    /// Elements `range`.
    ///
    /// # Safety
    /// Nobody else may use any of them while the result lives.
    ///
    /// # Panics
    /// When the range does not lie in the slice.
    #[expect(clippy::mut_from_ref, reason = "the caller keeps parts disjoint")]
    pub(super) unsafe fn part(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} lies in {} elements", self.len);
        // SAFETY: in bounds, and unique by the caller's contract.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }

    /// Where element `index` lies; `index` may be the length.
    pub(super) fn at(&self, index: usize) -> *mut T {
        assert!(index <= self.len, "{index} lies in {} elements", self.len);
        self.start.wrapping_add(index)
    }

    /// Number of elements.
    pub(super) fn len(&self) -> usize {
        self.len
    }
}
