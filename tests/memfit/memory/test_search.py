"""The search on made-up costs: whatever they are, it climbs, stops, and never trusts what did not fit."""

import math
from dataclasses import asdict, dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfit.memory.plan import Candidate, Probe
from memfit.memory.search import TIE, candidates, confirm, ranking, sweep

BUDGET = 1000


@dataclass(frozen=True)
class Cost:
    """A made-up device: bytes = base + slope * micro-batch, throughput saturating at `cap`."""

    base: int
    slope: float
    cap: float
    noise: tuple[float, ...] = (1.0,)

    def probe(self, candidate: Candidate, verifying: bool = False) -> Probe:
        micro = candidate.micro_batch_size
        peak = int(self.base + self.slope * micro)
        rate = self.cap * micro / (micro + 4) * self.noise[micro % len(self.noise)]
        outcome = "oom" if peak > 1.2 * BUDGET else "over_budget" if peak > BUDGET else "fits"
        measured = {"peak_bytes": peak, "step_seconds": 1 / rate, "samples_per_second": rate} if peak <= BUDGET else {}
        return Probe(**asdict(candidate), outcome=outcome, verifying=verifying, **measured)

    def measure(self, ladder, verifying):
        for candidate in ladder:
            yield self.probe(candidate, verifying)


costs = st.builds(
    Cost,
    base=st.integers(0, 1500),
    slope=st.floats(0, 200),
    cap=st.floats(1, 1e4),
    noise=st.lists(st.floats(0.5, 2.0), min_size=1, max_size=7).map(tuple),
)
sizes = st.integers(1, 300)


def ladder_of(global_batch_size: int, minimum: int = 1) -> list[Candidate]:
    return candidates(
        global_batch_size, precision="fp32", checkpointing="none", variant=None, min_micro_batch_size=minimum
    )


@given(size=sizes, minimum=st.integers(1, 32))
def test_ladders_rise_to_the_whole_batch_at_a_fixed_global_batch(size, minimum):
    ladder = ladder_of(size, minimum)
    micro = [candidate.micro_batch_size for candidate in ladder]
    assert micro == sorted(micro)
    assert ladder[-1].micro_batch_size == size
    assert ladder[-1].accumulation_steps == 1
    assert all(c.micro_batch_size == math.ceil(size / c.accumulation_steps) for c in ladder)
    assert all(size // c.accumulation_steps >= min(minimum, size) for c in ladder)


@given(size=sizes)
def test_a_ladder_begins_with_single_samples(size):
    assert ladder_of(size)[0].micro_batch_size == 1


@given(cost=costs, size=sizes)
def test_a_sweep_climbs_rung_by_rung_and_stops_at_what_does_not_fit(cost, size):
    ladder = ladder_of(size)
    probes = list(sweep(ladder, cost.measure, BUDGET))
    assert 1 <= len(probes) <= len(ladder)
    assert [probe.micro_batch_size for probe in probes] == [c.micro_batch_size for c in ladder[: len(probes)]]
    assert all(probe.outcome == "fits" for probe in probes[:-1])


@given(cost=costs, size=sizes)
def test_a_sweep_that_ends_early_has_a_reason(cost, size):
    ladder = ladder_of(size)
    probes = list(sweep(ladder, cost.measure, BUDGET))
    if len(probes) == len(ladder) or probes[-1].outcome != "fits":
        return
    rates = [probe.samples_per_second for probe in probes]
    no_faster = max(rates[-2:]) <= max(rates[:-2], default=0)
    assert no_faster or cost.base + cost.slope * ladder[len(probes)].micro_batch_size > BUDGET - 2


def test_a_sweep_does_not_run_a_rung_that_the_line_through_the_last_peaks_forbids():
    tried = []
    cost = Cost(base=100, slope=50, cap=100)

    def measure(ladder, verifying):
        for candidate in ladder:
            tried.append(candidate.micro_batch_size)
            yield cost.probe(candidate)

    list(sweep(ladder_of(64), measure, BUDGET))
    assert tried == [1, 2, 4, 8, 16]


def test_a_sweep_stops_when_two_rungs_in_a_row_are_no_faster():
    cost = Cost(base=0, slope=0.0, cap=100, noise=(1.0,))
    slow = {1: 10, 2: 20, 4: 40, 8: 39, 16: 38, 32: 100, 64: 200}

    def measure(ladder, verifying):
        for candidate in ladder:
            probe = cost.probe(candidate)
            yield Probe(**{**asdict(probe), "samples_per_second": float(slow[candidate.micro_batch_size])})

    assert [probe.micro_batch_size for probe in sweep(ladder_of(64), measure, BUDGET)] == [1, 2, 4, 8, 16]


outcomes = st.sampled_from(["fits", "oom", "over_budget", "timeout"])
probes_drawn = st.lists(
    st.builds(
        lambda micro, outcome, rate, peak: Probe(
            micro, 1, "fp32", "none", None, outcome, peak, 1 / rate, rate if outcome == "fits" else None
        ),
        st.integers(1, 64),
        outcomes,
        st.floats(1, 1e4),
        st.integers(1, BUDGET),
    ),
    max_size=12,
)


@given(probes=probes_drawn)
def test_ranks_only_what_fits_and_all_of_it(probes):
    ranked = ranking(probes)
    fitting = [probe for probe in probes if probe.outcome == "fits"]
    assert sorted(ranked, key=repr) == sorted(fitting, key=repr)
    assert ranking(probes) == ranked


@given(probes=probes_drawn)
def test_the_first_is_fastest_within_three_percent_and_the_smallest_of_those(probes):
    ranked = ranking(probes)
    if not ranked:
        return
    best = max(probe.samples_per_second for probe in ranked)
    tied = [probe for probe in ranked if probe.samples_per_second >= best * (1 - TIE)]
    assert ranked[0] in tied
    assert ranked[0].peak_bytes == min(probe.peak_bytes for probe in tied)


@pytest.mark.parametrize(("rate", "winner"), [(97.5, 1), (96.5, 2)])
def test_within_three_percent_the_smaller_peak_wins(rate, winner):
    small = Probe(1, 2, "fp32", "none", None, "fits", 100, 1.0, rate)
    fast = Probe(2, 1, "fp32", "none", None, "fits", 900, 1.0, 100.0)
    assert ranking([fast, small])[0].micro_batch_size == winner


@given(cost=costs, size=sizes)
def test_what_is_confirmed_was_run_again_and_fits(cost, size):
    probes = list(sweep(ladder_of(size), cost.measure, BUDGET))
    verified = list(confirm(probes, cost.measure))
    assert all(probe.verifying for probe in verified)
    assert bool(verified) == any(probe.outcome == "fits" for probe in probes)
    assert all(probe.peak_bytes <= BUDGET for probe in verified)


def test_a_confirmation_that_fails_falls_back_to_the_next_best():
    cost = Cost(base=0, slope=10, cap=100)
    probes = list(sweep(ladder_of(16), cost.measure, BUDGET))

    def tighter(ladder, verifying):
        for candidate in ladder:
            outcome = "fits" if candidate.micro_batch_size <= 4 else "over_budget"
            yield Probe(**asdict(candidate), outcome=outcome, peak_bytes=1)

    tried = list(confirm(probes, tighter))
    assert [probe.micro_batch_size for probe in tried] == [16, 8, 4]
    assert [probe.outcome for probe in tried] == ["over_budget", "over_budget", "fits"]
