"""How glibc's malloc serves torch's tensors on a CPU, and how many bytes of the process that keeps resident.

torch allocates with posix_memalign at 64 bytes (c10/core/impl/alloc_cpu.cpp), glibc serves it from malloc's own pieces.
Source of the rules and sizes: malloc/malloc.c of glibc 2.26 to 2.37 (_int_malloc, _int_memalign, _int_free, sysmalloc,
systrim, munmap_chunk) and mallopt(3).
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

_KIB = 1024
_MIB = 2**20
_PAGE = 4096
_HEADER = 8
"""Bytes of a chunk that its owner cannot use: the size of the chunk."""
_UNIT = 16
"""Chunks are multiples of this, and so are their addresses."""
_MIN_CHUNK = 32
_ALIGNMENT = 64
"""What torch asks for; vector instructions and cache lines want it."""
_LARGE = 1024
"""Requests from here on join fast chunks first."""
_FAST_CHUNK = 128
_CACHED_CHUNK = 1040
_CACHED_PER_SIZE = 7
_TRIM_FROM = 64 * _KIB
"""Only a freed piece of at least this size makes malloc join fast chunks and look at the top."""
_TOP_PAD = 128 * _KIB
_MMAP_THRESHOLD = 128 * _KIB
_MMAP_THRESHOLD_MAX = 32 * _MIB

COMPANIONS = (24, 40, 56, 72, 88, 104)
"""Bytes of the small objects that come with a tensor: version counter, sizes, saved variables, nodes, storage.

One of each size that the pieces left by alignment have: they settle in those pieces, and keep the blocks beside them
from being joined, or from serving the next request of the same size (glibc bug 14581). In recorded runs the objects of
up to 128 bytes raised the peak by up to 80 %; larger ones did not matter.
"""
SHARES = (2, 3)
"""How many tensors there are for one whose companions outlive the moment: it depends on the run, so both are tried."""
_AGAIN = 1.08
"""How far above the expected one run of the same step may peak: runs of one case lay up to 1.2 apart."""


@dataclass(slots=True)
class ProcessHeap:
    """A model of malloc's main arena and of its mapped blocks. Sizes are bytes; addresses only order the blocks.

    Every block is taken as written all over, and a page as resident from its first use until it is given back.
    """

    mmap_threshold: int = _MMAP_THRESHOLD
    """Blocks from here on are mapped one by one; the first time that one is freed, its size becomes the threshold."""
    trim_threshold: int = _MMAP_THRESHOLD
    """Free bytes at the heap's end from which on they are given back."""
    mapped: int = 0
    peak_resident: int = 0
    _top: int = 0
    _end: int = 0
    """Where the heap ends: the program break."""
    _touched: int = 0
    """Up to here pages are resident."""
    _sizes: dict[int, int] = field(default_factory=dict)
    """Chunks in use, by address."""
    _mapped_sizes: dict[int, int] = field(default_factory=dict)
    _next_mapping: int = -_PAGE
    _free: list[tuple[int, int]] = field(default_factory=list)
    """(size, address) of joined free chunks, for the best fit."""
    _free_at: dict[int, int] = field(default_factory=dict)
    _free_before: dict[int, int] = field(default_factory=dict)
    """Address of the free chunk that ends there."""
    _cached: dict[int, list[int]] = field(default_factory=dict)
    _fast: dict[int, list[int]] = field(default_factory=dict)

    @property
    def resident(self) -> int:
        """Bytes that are resident now."""
        return self.mapped + self._touched

    def malloc(self, num_bytes: int, alignment: int = _ALIGNMENT) -> int:
        """Allocate; return the block's address. Below 32 bytes of alignment this is plain malloc."""
        size = _chunk_size(num_bytes)
        address = self._aligned(size, alignment) if alignment > _UNIT else self._plain(size)
        if address >= 0:
            self._touched = max(self._touched, address + self._sizes[address])
        self.peak_resident = max(self.peak_resident, self.mapped + self._touched)
        return address

    def release(self, address: int) -> None:
        """Free a block: unmap it, or give it back to the heap, and the heap's end to the system."""
        if address < 0:
            size = self._mapped_sizes.pop(address)
            self.mapped -= size
            if self.mmap_threshold < size <= _MMAP_THRESHOLD_MAX:
                self.mmap_threshold, self.trim_threshold = size, 2 * size
            return
        self._put(address, self._sizes.pop(address))

    def _plain(self, size: int) -> int:
        cached = self._cached.get(size)
        if cached:
            address = cached.pop()
            self._sizes[address] = size
            return address
        return self._take(size)

    def _aligned(self, size: int, alignment: int) -> int:
        """Take a chunk with room to move in, and free what lies before and behind the aligned part."""
        address = self._take(size + alignment + _MIN_CHUNK)
        if address < 0:
            return address
        taken = self._sizes.pop(address)
        lead = -(address + 2 * _HEADER) % alignment
        if 0 < lead < _MIN_CHUNK:
            lead += alignment
        if taken - lead - size > _MIN_CHUNK:
            behind, taken = taken - lead - size, size + lead
        else:
            behind = 0
        self._sizes[address + lead] = taken - lead
        if lead:
            self._put(address, lead)
        if behind:
            self._put(address + taken, behind)
        return address + lead

    def _take(self, size: int) -> int:
        """Find a chunk: fast, best fit, top, and then what the system gives."""
        if size <= _FAST_CHUNK and self._fast.get(size):
            address = self._fast[size].pop()
            self._sizes[address] = size
            return address
        if size >= _LARGE:
            self._join_fast()
        address = self._best_fit(size)
        if address < 0 and self._end - self._top < size + _MIN_CHUNK and self._fast:
            self._join_fast()
            address = self._best_fit(size)
        if address >= 0:
            return address
        if self._end - self._top < size + _MIN_CHUNK:
            if size >= self.mmap_threshold:
                return self._map(size)
            self._end = self._top + -(-(size + _TOP_PAD + _MIN_CHUNK) // _PAGE) * _PAGE
        address, self._top = self._top, self._top + size
        self._sizes[address] = size
        return address

    def _map(self, size: int) -> int:
        address = self._next_mapping
        self._next_mapping -= _PAGE
        self._mapped_sizes[address] = -(-(size + _HEADER) // _PAGE) * _PAGE
        self.mapped += self._mapped_sizes[address]
        return address

    def _best_fit(self, size: int) -> int:
        index = bisect_left(self._free, (size, -1))
        if index == len(self._free):
            return -1
        found, address = self._free.pop(index)
        del self._free_at[address], self._free_before[address + found]
        if found - size >= _MIN_CHUNK:
            self._keep(address + size, found - size)
            found = size
        self._sizes[address] = found
        return address

    def _keep(self, address: int, size: int) -> None:
        insort(self._free, (size, address))
        self._free_at[address] = size
        self._free_before[address + size] = address

    def _put(self, address: int, size: int) -> None:
        """Free a chunk: to the thread's cache, to the fast ones, or joined with its neighbours."""
        if size <= _CACHED_CHUNK:
            cached = self._cached.setdefault(size, [])
            if len(cached) < _CACHED_PER_SIZE:
                cached.append(address)
                return
            if size <= _FAST_CHUNK:
                self._fast.setdefault(size, []).append(address)
                return
        if self._join(address, size) >= _TRIM_FROM:
            self._join_fast()
            if self._end - self._top >= self.trim_threshold:
                self._trim()

    def _join(self, address: int, size: int) -> int:
        """Join a chunk with its free neighbours, or with the top; return how large it became."""
        before = self._free_before.pop(address, None)
        if before is not None:
            size += self._forget(before)
            address = before
        if address + size in self._free_at:
            behind = address + size
            size += self._forget(behind)
            del self._free_before[address + size]
        if address + size == self._top:
            self._top = address
            return self._end - address
        self._keep(address, size)
        return size

    def _forget(self, address: int) -> int:
        size = self._free_at.pop(address)
        del self._free[bisect_left(self._free, (size, address))]
        return size

    def _join_fast(self) -> None:
        if self._fast:
            fast, self._fast = self._fast, {}
            for size, addresses in fast.items():
                for address in addresses:
                    self._join(address, size)

    def _trim(self) -> None:
        """Give back the heap's end, but for the pad."""
        spare = self._end - self._top - _MIN_CHUNK - 1 - _TOP_PAD
        if spare >= _PAGE:
            self._end -= spare // _PAGE * _PAGE
            self._touched = min(self._touched, self._end)


def _chunk_size(num_bytes: int) -> int:
    return max(_MIN_CHUNK, -(-(num_bytes + _HEADER) // _UNIT) * _UNIT)


def replay(events: Iterable[int], sizes: Sequence[int], heap: ProcessHeap, *, share: int | None = None) -> ProcessHeap:
    """Serve a trace: event i allocates `sizes[i]` bytes, ~i frees them. Returns the heap, for its peak.

    With a `share`, one tensor of so many comes with `COMPANIONS`, which are made before it and freed after it.
    """
    blocks: dict[int, list[int]] = {}
    malloc, release, count = heap.malloc, heap.release, 0
    for event in events:
        if event >= 0:
            if sizes[event]:
                count += 1
                small = [malloc(size, _UNIT) for size in COMPANIONS] if share and not count % share else []
                blocks[event] = [malloc(sizes[event]), *small]
        elif ~event in blocks:
            for address in blocks.pop(~event):
                release(address)
    return heap


def resident_peaks(events: Sequence[int], sizes: Sequence[int]) -> tuple[int, int]:
    """Return the most bytes that are resident at once: expected, and at the upper end of what chance does."""
    peaks = [replay(events, sizes, ProcessHeap(), share=share).peak_resident for share in SHARES]
    return sum(peaks) // len(peaks), int(max(peaks) * _AGAIN)
