//! Memory for what steps read from one end to the other: packed weights, the base's and those of adapters.
//!
//! It lies in huge pages, which spare most of the address translation and let the processor fetch ahead farther than to
//! the end of a small page. Allocations follow each other in large mappings, so that matrices of some kilobytes get such
//! pages too. An address is used once; a huge page goes back to the system when nothing in it is in use any more.

#![expect(unsafe_code, reason = "views parts of a mapping as slices")]

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut, Range};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use memmap2::MmapMut;

use super::packed::Line;

/// Bytes of a huge page.
const PAGE: usize = 2 << 20;
/// Bytes of address space that are mapped at a time.
const CHUNK_BYTES: usize = 64 << 20;
/// Less than this is not worth a place in a mapping.
const MAPPED_BYTES_MIN: usize = 4 << 10;

/// Elements that memory consists of.
///
/// # Safety
/// Every bit pattern, all zeros included, is a value; the alignment divides a line's, and there is no padding.
pub(super) unsafe trait Plain: Copy + Default + Send + Sync + 'static {}

// SAFETY: plain numbers.
unsafe impl Plain for u16 {}
// SAFETY: as above.
unsafe impl Plain for u32 {}
// SAFETY: as above.
unsafe impl Plain for f32 {}
// SAFETY: eight plain numbers.
unsafe impl Plain for [u32; 8] {}
// SAFETY: sixteen plain numbers.
unsafe impl Plain for Line {}

/// Elements that start on a cache line.
pub(super) struct Memory<T: Plain> {
    at: NonNull<T>,
    len: usize,
    /// Keeps what `at` points to.
    _place: Place,
    _elements: PhantomData<T>,
}

enum Place {
    Mapped { _span: Span },
    Lines { _lines: Vec<Line> },
}

// SAFETY: memory is owned, and its elements are plain numbers.
unsafe impl<T: Plain> Send for Memory<T> {}
// SAFETY: as above; it is changed through unique borrows only.
unsafe impl<T: Plain> Sync for Memory<T> {}

impl<T: Plain> Memory<T> {
    /// `len` zeros.
    ///
    /// # Errors
    /// When the memory cannot be had.
    pub(super) fn zeros(len: usize) -> std::io::Result<Self> {
        let bytes = (len * size_of::<T>()).next_multiple_of(size_of::<Line>());
        let (at, place) = if bytes < MAPPED_BYTES_MIN || cfg!(miri) {
            let mut lines = vec![Line([0; 16]); bytes / size_of::<Line>()];
            (NonNull::from(lines.as_mut_slice()).cast(), Place::Lines { _lines: lines })
        } else {
            let span = Span::new(bytes)?;
            (span.start().cast(), Place::Mapped { _span: span })
        };
        Ok(Self { at, len, _place: place, _elements: PhantomData })
    }

    /// A copy.
    ///
    /// # Panics
    /// When the memory cannot be had.
    pub(super) fn copy_of(elements: &[T]) -> Self {
        let mut memory = Self::zeros(elements.len()).expect("memory for an adapter");
        memory.copy_from_slice(elements);
        memory
    }
}

impl<T: Plain> Deref for Memory<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: the place is as long, aligned to a line, and this value's own; every bit pattern is an element.
        unsafe { std::slice::from_raw_parts(self.at.as_ptr(), self.len) }
    }
}

impl<T: Plain> DerefMut for Memory<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and the mutable borrow makes the view unique.
        unsafe { std::slice::from_raw_parts_mut(self.at.as_ptr(), self.len) }
    }
}

impl<T: Plain> Clone for Memory<T> {
    fn clone(&self) -> Self {
        Self::copy_of(self)
    }
}

impl<T: Plain + std::fmt::Debug> std::fmt::Debug for Memory<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.deref().fmt(f)
    }
}

/// Part of a chunk, in use as long as this lives.
struct Span {
    chunk: Arc<Chunk>,
    /// Bytes from the chunk's start on.
    bytes: Range<usize>,
}

/// A mapping in whole huge pages.
struct Chunk {
    map: MmapMut,
    /// Bytes of the mapping before the first huge page.
    skipped: usize,
    len: usize,
    /// Spans in each page.
    used: Mutex<Vec<usize>>,
}

/// The chunk that spans are taken from, and its first byte that none has had.
static OPEN: Mutex<Option<(Arc<Chunk>, usize)>> = Mutex::new(None);

/// What a panicking thread leaves is whole: nothing panics half-way.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Span {
    /// `bytes` zeros, whole lines of them.
    fn new(bytes: usize) -> std::io::Result<Self> {
        let mut open = lock(&OPEN);
        if let Some((chunk, next)) = &mut *open
            && chunk.len - *next >= bytes
        {
            *next += bytes;
            return Ok(Self::count(chunk, *next - bytes..*next));
        }
        let chunk = Arc::new(Chunk::new(bytes.next_multiple_of(PAGE).max(CHUNK_BYTES))?);
        let left = |chunk: &Chunk, next: usize| chunk.len - next;
        let span = Self::count(&chunk, 0..bytes);
        // What has more room left goes on.
        if open.as_ref().is_none_or(|(open, next)| left(open, *next) < left(&chunk, bytes)) {
            *open = Some((chunk, bytes));
        }
        Ok(span)
    }

    fn count(chunk: &Arc<Chunk>, bytes: Range<usize>) -> Self {
        lock(&chunk.used)[pages(&bytes)].iter_mut().for_each(|used| *used += 1);
        Self { chunk: chunk.clone(), bytes }
    }

    fn start(&self) -> NonNull<u8> {
        let start = self.chunk.map.as_ptr().cast_mut().wrapping_add(self.chunk.skipped + self.bytes.start);
        NonNull::new(start).expect("a mapping is not at zero")
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        // Held meanwhile, so that nobody gets a part of a page that is going.
        let _open = lock(&OPEN);
        let mut used = lock(&self.chunk.used);
        for page in pages(&self.bytes) {
            used[page] -= 1;
            if used[page] == 0 {
                self.chunk.give_back(page);
            }
        }
    }
}

/// The huge pages that a part of a chunk lies in.
fn pages(bytes: &Range<usize>) -> Range<usize> {
    bytes.start / PAGE..bytes.end.div_ceil(PAGE)
}

impl Chunk {
    fn new(len: usize) -> std::io::Result<Self> {
        let map = MmapMut::map_anon(len + PAGE)?;
        let skipped = map.as_ptr().align_offset(PAGE);
        // A kernel that has no huge pages to give answers with an error that changes nothing.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        Ok(Self { map, skipped, len, used: Mutex::new(vec![0; len / PAGE]) })
    }

    /// Gives the memory of a page back, which nobody uses.
    fn give_back(&self, page: usize) {
        #[cfg(target_os = "linux")]
        // SAFETY: nobody uses the page, whose bounds are those of a huge one; it reads as zeros from now on. An error
        // means that it keeps its memory until the mapping ends.
        let _ = unsafe {
            let advice = memmap2::UncheckedAdvice::DontNeed;
            self.map.unchecked_advise_range(advice, self.skipped + page * PAGE, PAGE)
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_zero_aligned_and_its_own() {
        let mut all: Vec<Memory<u32>> = [1, 15, 16, 17, 1023, 1024, 5000, PAGE / 4, PAGE / 4 + 1, CHUNK_BYTES / 2]
            .map(|len| Memory::zeros(len).expect("memory"))
            .into();
        for (number, memory) in all.iter_mut().enumerate() {
            assert!(memory.as_ptr().addr().is_multiple_of(64));
            assert!(memory.iter().all(|word| *word == 0));
            memory.fill(number as u32 + 1);
        }
        for (number, memory) in all.iter().enumerate() {
            assert!(memory.iter().all(|word| *word == number as u32 + 1));
        }
        let copy = all[5].clone();
        all.clear();
        assert!(copy.len() == 1024 && copy.iter().all(|word| *word == 6));
    }

    #[test]
    fn no_elements_are_no_memory() {
        let memory: Memory<f32> = Memory::copy_of(&[]);
        assert!(memory.is_empty());
    }

    /// What is left of a page when its neighbours go and others come.
    #[test]
    fn pages_that_are_shared_stay() {
        let place = |value: u32| Memory::copy_of(&vec![value; PAGE / 16]);
        let mut kept = Vec::new();
        for value in 1..200 {
            let gone = place(0);
            kept.push((value, place(value)));
            drop(gone);
            if value % 3 == 0 {
                kept.remove(kept.len() / 2);
            }
        }
        for (value, memory) in &kept {
            assert!(memory.iter().all(|word| word == value));
        }
    }
}
