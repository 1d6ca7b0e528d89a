"""The model of CUDA's caching allocator against its rules worked out by hand, and what must hold for any trace."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memfit.memory.allocator import CachingAllocator, SimulatedOutOfMemoryError, replay

KIB, MIB = 2**10, 2**20


def holding(*sizes: int) -> CachingAllocator:
    allocator = CachingAllocator()
    for size in sizes:
        allocator.malloc(size)
    return allocator


@pytest.mark.parametrize(("wanted", "taken"), [(1, 512), (512, 512), (513, 1024), (5000, 5120), (MIB, MIB)])
def test_requests_are_rounded_up_to_512_bytes(wanted, taken):
    assert holding(wanted).allocated == taken


@pytest.mark.parametrize(
    ("wanted", "segment"),
    [
        (1, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 1, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB - 511, 10 * MIB),  # rounded to 10 MiB before the choice
        (10 * MIB, 10 * MIB),
        (10 * MIB + 1, 12 * MIB),
        (33 * MIB, 34 * MIB),
    ],
)
def test_segments_are_sized_by_the_request(wanted, segment):
    assert holding(wanted).reserved == segment


def test_small_requests_share_segments_of_2_mib_and_never_touch_large_ones():
    assert holding(MIB, MIB).reserved == 2 * MIB
    assert holding(MIB, MIB, 1).reserved == 4 * MIB
    assert holding(5 * MIB, 1).reserved == 22 * MIB


def test_requests_below_10_mib_share_segments_of_20_mib():
    assert holding(9 * MIB, 9 * MIB, 2 * MIB).reserved == 20 * MIB
    assert holding(9 * MIB, 9 * MIB, 2 * MIB + 1).reserved == 40 * MIB


def test_a_small_block_is_split_as_soon_as_512_bytes_remain():
    allocator = holding(2 * MIB // 4 - 512)
    assert allocator.malloc(512) == 2 * MIB // 4 - 512
    assert allocator.reserved == 2 * MIB


@pytest.mark.parametrize(("wanted", "taken"), [(11 * MIB, 12 * MIB), (11 * MIB - 512, 11 * MIB - 512)])
def test_a_large_block_is_split_only_if_more_than_1_mib_remains(wanted, taken):
    allocator = holding(wanted)
    assert allocator.reserved == 12 * MIB
    assert allocator.allocated == taken
    allocator.malloc(MIB + 512)
    assert allocator.reserved == (12 if taken < 12 * MIB else 32) * MIB


def test_the_smallest_free_block_that_is_large_enough_is_taken():
    allocator = CachingAllocator()
    blocks = [allocator.malloc(size) for size in (4 * KIB, 512, 2 * KIB, 512, 3 * KIB, 512)]
    for gap in (blocks[0], blocks[2], blocks[4]):
        allocator.release(gap)
    assert allocator.malloc(2 * KIB + 512) == blocks[4]
    assert allocator.malloc(2 * KIB) == blocks[2]
    assert allocator.malloc(KIB) == blocks[0]


def test_of_equal_blocks_the_first_is_taken():
    allocator = CachingAllocator()
    blocks = [allocator.malloc(512) for _ in range(5)]
    for gap in (blocks[3], blocks[1]):
        allocator.release(gap)
    assert allocator.malloc(512) == blocks[1]


@pytest.mark.parametrize("order", [(0, 2, 1), (0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_free_neighbours_on_both_sides_are_joined(order):
    allocator = CachingAllocator()
    blocks = [allocator.malloc(512 * KIB) for _ in range(4)]
    for index in order:
        allocator.release(blocks[index])
    assert allocator.malloc(MIB) == blocks[0]
    assert allocator.malloc(512 * KIB) == blocks[2]
    assert allocator.reserved == 2 * MIB


def test_freed_memory_stays_reserved():
    allocator = CachingAllocator()
    allocator.release(allocator.malloc(30 * MIB))
    assert (allocator.allocated, allocator.reserved) == (0, 30 * MIB)
    assert (allocator.peak_allocated, allocator.peak_reserved) == (30 * MIB, 30 * MIB)


def test_whole_cached_segments_are_given_back_before_memory_runs_out():
    allocator = CachingAllocator(capacity=40 * MIB)
    allocator.release(allocator.malloc(30 * MIB))
    allocator.malloc(32 * MIB)
    assert (allocator.num_retries, allocator.reserved, allocator.peak_reserved) == (1, 32 * MIB, 32 * MIB)


def test_a_segment_in_which_something_lives_is_not_given_back():
    allocator = CachingAllocator(capacity=40 * MIB)
    first, _second = allocator.malloc(5 * MIB), allocator.malloc(5 * MIB)
    allocator.release(first)
    with pytest.raises(SimulatedOutOfMemoryError, match="reserved of"):
        allocator.malloc(22 * MIB)
    assert (allocator.num_retries, allocator.reserved) == (1, 20 * MIB)


def test_segments_of_both_pools_are_given_back():
    allocator = CachingAllocator(capacity=24 * MIB)
    for address in [allocator.malloc(MIB), allocator.malloc(5 * MIB)]:
        allocator.release(address)
    assert allocator.reserved == 22 * MIB
    allocator.malloc(24 * MIB)
    assert allocator.reserved == 24 * MIB


def test_a_request_beyond_the_capacity_fails():
    with pytest.raises(SimulatedOutOfMemoryError):
        CachingAllocator(capacity=20 * MIB).malloc(21 * MIB)


def test_expandable_segments_grow_in_place():
    allocator = CachingAllocator(expandable_segments=True)
    first = allocator.malloc(30 * MIB)
    assert allocator.reserved == 40 * MIB
    allocator.release(first)
    assert allocator.malloc(50 * MIB) == first
    assert allocator.reserved == 60 * MIB
    plain = CachingAllocator()
    plain.release(plain.malloc(30 * MIB))
    plain.malloc(50 * MIB)
    assert plain.reserved == 80 * MIB


def test_expandable_segments_keep_the_pools_apart_and_obey_the_capacity():
    allocator = CachingAllocator(capacity=40 * MIB, expandable_segments=True)
    small, large = allocator.malloc(512), allocator.malloc(15 * MIB)
    assert allocator.reserved == 22 * MIB
    assert abs(small - large) > 2**40
    with pytest.raises(SimulatedOutOfMemoryError):
        allocator.malloc(20 * MIB)


def test_replay_serves_births_and_deaths_in_order():
    served = replay([0, 1, ~0, 2, ~1, ~2], [MIB, 3 * MIB, 512], CachingAllocator())
    assert (served.allocated, served.peak_allocated, served.reserved) == (0, 4 * MIB, 22 * MIB)


def test_replay_passes_over_what_has_no_bytes():
    served = replay([0, ~0], [0], CachingAllocator())
    assert served.peak_reserved == 0


sizes = st.one_of(
    st.integers(1, 4 * KIB), st.integers(1, 3 * MIB), st.integers(9 * MIB, 11 * MIB), st.integers(1, 64 * MIB)
)


@st.composite
def traces(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Make births in order and deaths at any later time; some live on to the end."""
    wanted = draw(st.lists(sizes, max_size=60))
    events: list[int] = []
    alive: list[int] = []
    for number in range(len(wanted)):
        events.append(number)
        alive.append(number)
        for _ in range(draw(st.integers(0, min(2, len(alive))))):
            events.append(~alive.pop(draw(st.integers(0, len(alive) - 1))))
    return events, wanted


@settings(deadline=None)
@given(trace=traces(), expandable=st.booleans())
def test_live_blocks_never_overlap_and_lie_within_what_is_reserved(trace, expandable):
    events, wanted = trace
    allocator, alive = CachingAllocator(expandable_segments=expandable), {}
    for event in events:
        if event >= 0:
            alive[event] = allocator.malloc(wanted[event])
        else:
            allocator.release(alive.pop(~event))
        spans = sorted((address, address + wanted[number]) for number, address in alive.items())
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
        assert sum(wanted[number] for number in alive) <= allocator.allocated <= allocator.reserved
        assert allocator.reserved <= allocator.peak_reserved
        assert allocator.allocated <= allocator.peak_allocated
    for address in alive.values():
        allocator.release(address)
    assert allocator.allocated == 0


@settings(deadline=None)
@given(trace=traces(), expandable=st.booleans())
def test_a_replay_repeated_gives_the_same(trace, expandable):
    def peaks() -> tuple[int, int, int]:
        served = replay(*trace, CachingAllocator(expandable_segments=expandable))
        return served.peak_reserved, served.peak_allocated, served.reserved

    assert peaks() == peaks()


@settings(deadline=None)
@given(trace=traces(), capacity=st.integers(2 * MIB, 400 * MIB))
def test_a_limit_is_kept_or_reported_and_one_above_the_peak_changes_nothing(trace, capacity):
    free = replay(*trace, CachingAllocator())
    try:
        served = replay(*trace, CachingAllocator(capacity=capacity))
    except SimulatedOutOfMemoryError:
        assert free.peak_reserved > capacity
        return
    assert served.peak_reserved <= capacity
    if free.peak_reserved <= capacity:
        assert (served.peak_reserved, served.num_retries) == (free.peak_reserved, 0)


@settings(deadline=None)
@given(trace=traces())
def test_everything_freed_can_be_given_back_as_a_whole(trace):
    events, wanted = trace
    alive = {event for event in events if event >= 0} - {~event for event in events if event < 0}
    served = replay([*events, *(~number for number in alive)], wanted, CachingAllocator())
    assert served.allocated == 0
    served.capacity = max(served.reserved, 20 * MIB)
    served.malloc(served.capacity)
    assert served.reserved == served.capacity
