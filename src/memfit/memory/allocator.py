"""How CUDA's caching allocator serves a trace: rounding, pools, splitting, coalescing, release when memory runs out.

Source of the rules and sizes: c10/cuda/CUDACachingAllocator.cpp of PyTorch 2.x.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

MIB = 2**20
_ROUNDING = 512
_SMALL_REQUEST = 1 * MIB
_SMALL_SEGMENT = 2 * MIB
_MIDDLE_REQUEST = 10 * MIB
_MIDDLE_SEGMENT = 20 * MIB
_SEGMENT_ROUNDING = 2 * MIB


class SimulatedOutOfMemoryError(Exception):
    """The trace does not fit, even after all cached segments were given back."""


@dataclass(slots=True, eq=False)
class _Block:
    address: int
    size: int
    small: bool
    free: bool = True
    before: "_Block | None" = None
    after: "_Block | None" = None

    def key(self) -> tuple[int, int]:
        return self.size, self.address


@dataclass
class CachingAllocator:
    """A model of the allocator on one stream. Sizes are bytes; addresses only order the blocks."""

    capacity: int | None = None
    """Bytes that segments may take; None is without limit."""
    expandable_segments: bool = False
    reserved: int = 0
    allocated: int = 0
    peak_reserved: int = 0
    peak_allocated: int = 0
    num_retries: int = 0
    """How often cached segments had to be given back to go on."""
    _free: dict[bool, list[tuple[int, int]]] = field(default_factory=lambda: {True: [], False: []})
    _at: dict[int, _Block] = field(default_factory=dict)
    _next_address: int = 0
    _expandable: dict[bool, list[int]] = field(default_factory=lambda: {True: [], False: []})

    def malloc(self, num_bytes: int) -> int:
        """Allocate; return the block's address.

        Raises: SimulatedOutOfMemoryError.
        """
        size = max(_ROUNDING, -(-num_bytes // _ROUNDING) * _ROUNDING)
        small = size <= _SMALL_REQUEST
        block = self._best_fit(size, small) or self._new_segment(size, small)
        self._split(block, size)
        block.free = False
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block.address

    def release(self, address: int) -> None:
        """Give a block back to its pool, joined with its free neighbours."""
        block = self._at[address]
        self.allocated -= block.size
        block.free = True
        for neighbour in (block.before, block.after):
            if neighbour is not None and neighbour.free:
                block = self._join(block, neighbour)
        insort(self._free[block.small], block.key())

    def _best_fit(self, size: int, small: bool) -> _Block | None:
        pool = self._free[small]
        index = bisect_left(pool, (size, -1))
        return self._at[pool.pop(index)[1]] if index < len(pool) else None

    def _new_segment(self, size: int, small: bool) -> _Block:
        if self.expandable_segments:
            return self._expand(size, small)
        segment = _segment_size(size, small)
        if self.capacity is not None and self.reserved + segment > self.capacity:
            self._give_back()
            if self.reserved + segment > self.capacity:
                raise SimulatedOutOfMemoryError(f"{segment} more than {self.reserved} reserved of {self.capacity}")
        return self._grow(segment, small, None)

    def _grow(self, segment: int, small: bool, before: "_Block | None") -> _Block:
        block = _Block(self._next_address, segment, small, before=before)
        if before is not None:
            before.after = block
        self._next_address += segment
        self._at[block.address] = block
        self.reserved += segment
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return block

    def _expand(self, size: int, small: bool) -> _Block:
        """Map more pages behind the pool's last block, which is used too if it is free."""
        page = _SMALL_SEGMENT if small else _MIDDLE_SEGMENT
        base = 2**50 if small else 0
        tail = self._at.get(self._expandable[small][-1]) if self._expandable[small] else None
        while tail is not None and tail.after is not None:
            tail = tail.after
        usable = tail.size if tail is not None and tail.free else 0
        extra = -(-(size - usable) // page) * page
        if self.capacity is not None and self.reserved + extra > self.capacity:
            raise SimulatedOutOfMemoryError(f"{extra} more than {self.reserved} reserved of {self.capacity}")
        saved, self._next_address = self._next_address, base if tail is None else tail.address + tail.size
        block = self._grow(extra, small, tail)
        self._next_address = saved
        if tail is None:
            self._expandable[small].append(block.address)
        elif tail.free:
            self._free[small].remove(tail.key())
            block = self._merge(tail, block)
        return block

    def _split(self, block: _Block, size: int) -> None:
        left = block.size - size
        if left < _ROUNDING if block.small or self.expandable_segments else left <= _SMALL_REQUEST:
            return
        rest = _Block(block.address + size, left, block.small, before=block, after=block.after)
        if rest.after is not None:
            rest.after.before = rest
        block.after, block.size = rest, size
        self._at[rest.address] = rest
        insort(self._free[rest.small], rest.key())

    def _join(self, block: _Block, neighbour: _Block) -> _Block:
        pool = self._free[neighbour.small]
        del pool[bisect_left(pool, neighbour.key())]
        first, second = (neighbour, block) if neighbour.address < block.address else (block, neighbour)
        return self._merge(first, second)

    def _merge(self, first: _Block, second: _Block) -> _Block:
        first.size += second.size
        first.after = second.after
        if first.after is not None:
            first.after.before = first
        del self._at[second.address]
        return first

    def _give_back(self) -> None:
        """Release every segment that nothing lives in, as the allocator does before it gives up."""
        self.num_retries += 1
        for small, pool in self._free.items():
            whole = [key for key in pool if self._at[key[1]].before is None and self._at[key[1]].after is None]
            for size, address in whole:
                del self._at[address]
                self.reserved -= size
            self._free[small] = [key for key in pool if key not in set(whole)]


def _segment_size(size: int, small: bool) -> int:
    if small:
        return _SMALL_SEGMENT
    if size < _MIDDLE_REQUEST:
        return _MIDDLE_SEGMENT
    return -(-size // _SEGMENT_ROUNDING) * _SEGMENT_ROUNDING


def replay(events: Iterable[int], sizes: Sequence[int], allocator: CachingAllocator) -> CachingAllocator:
    """Serve a trace: event i allocates `sizes[i]` bytes, ~i frees them. Returns the allocator, for its peaks."""
    addresses: dict[int, int] = {}
    for event in events:
        if event >= 0:
            if sizes[event]:
                addresses[event] = allocator.malloc(sizes[event])
        elif ~event in addresses:
            allocator.release(addresses.pop(~event))
    return allocator
