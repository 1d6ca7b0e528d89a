"""The search on made-up costs: whatever they are, it climbs, stops, and never trusts what did not fit."""

import math
from dataclasses import asdict, dataclass, replace

import hypothesis
import pytest
from hypothesis import strategies as st

from memfit.memory.plan import Candidate, Probe
from memfit.memory.search import (
    BETWEEN,
    FORECAST_SLACK,
    NOISE,
    PATIENCE_SECONDS,
    RECOMPUTING_COSTS,
    TIE,
    candidates,
    confirm,
    contenders,
    grid,
    memory_bound,
    mildest,
    ranking,
    rungs_of,
    savings,
    sweep,
    worth_recomputing,
)

BUDGET = 1000


def given(**strategies):
    """Draw examples without a deadline for each: the machine may be busy."""
    return lambda test: hypothesis.settings(deadline=None)(hypothesis.given(**strategies)(test))


@dataclass(frozen=True)
class Cost:
    """A made-up device: bytes = base + slope * micro-batch, throughput saturating at `cap`."""

    base: int
    slope: float
    cap: float
    noise: tuple[float, ...] = (1.0,)
    half: float = 4.0
    """Micro-batch at which half the cap is reached."""

    def peak(self, candidate: Candidate) -> int:
        share = 0.25 if candidate.checkpointing == "blocks" else 1.0
        return int(self.base + self.slope * share * candidate.micro_batch_size)

    def rate(self, candidate: Candidate) -> float:
        micro, costs = candidate.micro_batch_size, RECOMPUTING_COSTS if candidate.checkpointing == "blocks" else 1.0
        return self.cap * micro / (micro + self.half) * self.noise[micro % len(self.noise)] / costs

    def probe(self, candidate: Candidate) -> Probe:
        peak, rate = self.peak(candidate), self.rate(candidate)
        outcome = "oom" if peak > 1.2 * BUDGET else "over_budget" if peak > BUDGET else "fits"
        measured = {"peak_bytes": peak, "step_seconds": 1 / rate, "samples_per_second": rate} if peak <= BUDGET else {}
        return Probe(**asdict(candidate), outcome=outcome, **measured)


costs = st.builds(
    Cost,
    base=st.integers(0, 1500),
    slope=st.floats(0, 200),
    cap=st.floats(1, 1e4),
    noise=st.lists(st.floats(0.5, 2.0), min_size=1, max_size=7).map(tuple),
)
steady_costs = st.builds(
    Cost,
    base=st.integers(0, 1100),
    slope=st.integers(0, 50).map(lambda quarter: 4 * quarter),
    cap=st.floats(1, 1e4),
    half=st.floats(0, 64),
)
"""Memory in whole bytes, throughput without noise: as devices are, physically."""
sizes = st.integers(1, 300)


def ladder_of(global_batch_size: int, minimum: int = 1, checkpointing: str = "none") -> list[Candidate]:
    return candidates(
        global_batch_size,
        precision="fp32",
        checkpointing=checkpointing,
        variant=None,
        seq_len=128,
        min_micro_batch_size=minimum,
    )


def micro_sizes(probes) -> list[int]:
    return [probe.micro_batch_size for probe in probes]


def line_at(probes, micro: int) -> float:
    """The line through the peaks of the last two probes."""
    (n1, y1), (n2, y2) = ((probe.micro_batch_size, probe.peak_bytes) for probe in probes[-2:])
    return y2 + max(y2 - y1, 0) / (n2 - n1) * (micro - n2)


@given(size=sizes, minimum=st.integers(1, 32))
def test_ladders_rise_to_the_whole_batch_at_a_fixed_global_batch(size, minimum):
    ladder = ladder_of(size, minimum)
    micro = micro_sizes(ladder)
    assert micro == sorted(set(micro))
    assert ladder[-1].micro_batch_size == size
    assert ladder[-1].accumulation_steps == 1
    assert all(c.micro_batch_size == math.ceil(size / c.accumulation_steps) for c in ladder)
    assert all(c.accumulation_steps == 1 or math.ceil(size / (c.accumulation_steps - 1)) > c.micro_batch_size
               for c in ladder)  # fmt: skip
    assert all(size // c.accumulation_steps >= min(minimum, size) for c in ladder)
    assert {c.ladder for c in ladder} == {("fp32", "none", None, 128, False, True)}


@given(size=sizes)
def test_a_ladder_begins_with_single_samples(size):
    assert ladder_of(size)[0].micro_batch_size == 1


@given(size=sizes, minimum=st.integers(1, 32))
def test_a_grid_holds_every_size_of_its_ladder_at_the_fewest_steps(size, minimum):
    ladder = ladder_of(size, minimum)
    layouts = grid(ladder)
    micro = micro_sizes(layouts)
    assert micro == sorted(set(micro))
    assert set(micro) >= set(micro_sizes(ladder))
    assert (micro[0], micro[-1]) == (ladder[0].micro_batch_size, size)
    for layout in layouts:
        assert layout.micro_batch_size == math.ceil(size / layout.accumulation_steps)
        assert layout.accumulation_steps == 1 or math.ceil(size / (layout.accumulation_steps - 1)) > (
            layout.micro_batch_size
        )
        assert size // layout.accumulation_steps >= min(minimum, size)
        assert layout.ladder == ladder[0].ladder


def test_the_grid_of_twelve():
    assert [(c.micro_batch_size, c.accumulation_steps) for c in grid(ladder_of(12))] == [
        (1, 12), (2, 6), (3, 4), (4, 3), (6, 2), (12, 1),
    ]  # fmt: skip


@given(cost=costs, size=sizes)
def test_a_sweep_climbs_rung_by_rung_and_stops_at_what_does_not_fit(cost, size):
    ladder = ladder_of(size)
    probes = list(sweep(ladder, cost.probe, BUDGET))
    climbed = rungs_of(ladder, probes)
    assert 1 <= len(climbed) <= len(ladder)
    assert micro_sizes(climbed) == micro_sizes(ladder[: len(climbed)])
    assert probes[: len(climbed)] == climbed
    assert len(probes) <= len(climbed) + 1
    assert all(probe.outcome == "fits" for probe in probes[:-1])


@given(cost=costs, size=sizes)
def test_a_sweep_that_ends_early_has_a_reason(cost, size):
    ladder = ladder_of(size)
    probes = rungs_of(ladder, sweep(ladder, cost.probe, BUDGET))
    if len(probes) == len(ladder) or probes[-1].outcome != "fits":
        return
    rates = [probe.samples_per_second for probe in probes]
    no_faster = max(rates[-2:]) <= max(rates[:-2], default=0)
    assert no_faster or cost.base + cost.slope * ladder[len(probes)].micro_batch_size > BUDGET - 2


def test_a_sweep_does_not_run_a_rung_that_the_line_through_the_last_peaks_forbids():
    tried = []
    cost = Cost(base=100, slope=50, cap=100)

    def measure(candidate):
        tried.append(candidate.micro_batch_size)
        return cost.probe(candidate)

    list(sweep(ladder_of(64), measure, BUDGET))
    assert tried == [1, 2, 4, 8, 16]


def test_where_predictions_are_known_they_say_how_far_the_next_peak_rises():
    """Measured peaks are uneven: the line through the last two would leave out the third."""
    cost, peaks = Cost(base=0, slope=0, cap=100), {1: 300, 2: 600, 3: 650, 4: 700, 8: 900}

    def measure(candidate):
        return replace(cost.probe(candidate), peak_bytes=peaks[candidate.micro_batch_size])

    assert micro_sizes(sweep(ladder_of(8), measure, BUDGET)) == [1, 2, 3]
    foreseen = {1: 300, 2: 400, 4: 600, 8: 950}
    found = sweep(ladder_of(8)[:3], measure, BUDGET, lambda candidate: foreseen[candidate.micro_batch_size])
    assert micro_sizes(found) == [1, 2, 4]


def test_what_fits_between_the_last_rung_and_the_one_left_out_is_run_last():
    cost = Cost(base=100, slope=40, cap=100)
    probes = list(sweep(ladder_of(64), cost.probe, BUDGET))
    assert micro_sizes(probes) == [1, 2, 4, 8, 16, 22]
    assert (probes[-1].accumulation_steps, probes[-1].peak_bytes) == (3, 980)


def test_nothing_between_two_rungs_is_run_where_larger_ones_were_no_faster():
    cost = Cost(base=100, slope=40, cap=100, half=0.1)
    assert cost.probe(ladder_of(64)[4]).samples_per_second < 1.03 * cost.probe(ladder_of(64)[3]).samples_per_second
    assert micro_sizes(sweep(ladder_of(64), cost.probe, BUDGET)) == [1, 2, 4, 8, 16]


@given(cost=costs, size=sizes)
def test_the_edge_is_tried_where_rates_still_rise_and_is_the_largest_that_fits_by_the_line(cost, size):
    ladder = ladder_of(size)
    probes = list(sweep(ladder, cost.probe, BUDGET))
    climbed = rungs_of(ladder, probes)
    left_out = [c.micro_batch_size for c in ladder[len(climbed) :]]
    if len(climbed) < 2 or climbed[-1].outcome != "fits" or not left_out:
        assert probes == climbed
        return
    rates = [probe.samples_per_second for probe in climbed]
    stalled = len(rates) > 3 and max(rates[-2:]) < max(rates[:-2]) * (1 - NOISE)
    rising = rates[-1] > rates[-2] * (1 + TIE)
    inside = [n for n in micro_sizes(grid(ladder)) if climbed[-1].micro_batch_size < n < left_out[0]]
    fitting = [n for n in inside if line_at(climbed, n) <= BUDGET * (1 - BETWEEN)]
    ended_by_memory = not stalled and line_at(climbed, left_out[0]) > BUDGET
    assert micro_sizes(probes[len(climbed) :]) == (fitting[-1:] if rising and ended_by_memory else [])


@given(cost=costs, size=sizes, error=st.floats(0.5, 2.0))
def test_a_rung_far_beyond_the_budget_by_prediction_is_not_run_but_the_first_always_is(cost, size, error):
    ladder = ladder_of(size)

    def predict(candidate):
        return int(cost.peak(candidate) * error)

    probes = list(sweep(ladder, cost.probe, BUDGET, predict))
    foreseen = [rung for rung in ladder if 0 < predict(rung) <= BUDGET]
    began = ladder[max(0, len(foreseen) - 3)]
    assert probes[0].micro_batch_size == began.micro_batch_size
    rungs = [probe.candidate for probe in rungs_of(ladder, probes) if probe.candidate != began]
    assert all(predict(rung) <= BUDGET * (1 + FORECAST_SLACK) for rung in rungs)


def test_a_climb_goes_down_from_where_it_began_as_long_as_smaller_is_faster():
    cost = Cost(base=0, slope=1.0, cap=100)

    def climbed(rates, peak=lambda candidate: candidate.micro_batch_size):
        def measure(candidate):
            rate = float(rates[candidate.micro_batch_size.bit_length() - 1])
            return replace(cost.probe(candidate), samples_per_second=rate, peak_bytes=peak(candidate))

        return micro_sizes(sweep(ladder_of(64), measure, BUDGET, lambda candidate: candidate.micro_batch_size))

    assert climbed([1, 2, 3, 4, 5, 6, 7]) == [16, 32, 64]
    assert climbed([1, 2, 9, 8, 7, 6, 5]) == [16, 32, 64, 8, 4, 2]
    assert climbed([9, 8, 7, 6, 5, 4, 3]) == [16, 32, 64, 8, 4, 2, 1]


def test_nothing_is_run_below_a_climb_that_ran_out_of_memory():
    cost = Cost(base=0, slope=2 * BUDGET / 64, cap=100)
    probes = list(sweep(ladder_of(64), cost.probe, BUDGET, lambda candidate: candidate.micro_batch_size))
    assert [(probe.micro_batch_size, probe.outcome) for probe in probes] == [(16, "fits"), (32, "fits")]
    probes = list(sweep(ladder_of(64), replace(cost, slope=BUDGET / 10).probe, BUDGET, lambda c: c.micro_batch_size))
    assert [(probe.micro_batch_size, probe.outcome) for probe in probes] == [(16, "oom")]


@pytest.mark.parametrize(("predicted", "tried"), [(1150, [1, 2, 4, 8]), (1151, [1, 2, 4])])
def test_a_rung_is_left_out_only_beyond_the_slack_of_a_prediction(predicted, tried):
    cost = Cost(base=0, slope=1, cap=100)
    probes = sweep(ladder_of(8), cost.probe, BUDGET, lambda c: predicted if c.micro_batch_size == 8 else 0)
    assert micro_sizes(rungs_of(ladder_of(8), probes)) == tried


def test_a_first_rung_that_nobody_believes_in_is_run():
    probes = list(sweep(ladder_of(8), Cost(base=0, slope=1, cap=100).probe, BUDGET, lambda _: 10 * BUDGET))
    assert micro_sizes(probes) == [1]
    assert probes[0].outcome == "fits"


def test_a_sweep_stops_when_two_rungs_in_a_row_are_no_faster():
    cost = Cost(base=0, slope=0.0, cap=100, noise=(1.0,))

    def climbed(rates, seconds=0.01):
        def measure(candidate):
            rate = float(rates[candidate.micro_batch_size.bit_length() - 1])
            return replace(cost.probe(candidate), samples_per_second=rate, micro_seconds=seconds)

        return micro_sizes(sweep(ladder_of(64), measure, BUDGET))

    assert climbed([10, 20, 40, 29, 28, 100, 200]) == [1, 2, 4, 8, 16]
    assert climbed([10, 20, 40, 39, 38, 100, 200]) == [1, 2, 4, 8, 16, 32, 64]  # it may be noise
    assert climbed([10, 20, 40, 39, 38, 100, 200], seconds=PATIENCE_SECONDS) == [1, 2, 4, 8, 16]


def test_contenders_are_the_fastest_that_noise_may_have_put_in_order():
    def probe(micro, rate, outcome="fits"):
        return Probe(micro, 1, "fp32", "none", None, outcome, 100, samples_per_second=rate)

    close = [probe(1, 76.0), probe(2, 100.0), probe(3, 90.0), probe(4, 74.0), probe(5, 99.0, "over_budget")]
    assert micro_sizes(contenders(close)) == [2, 3, 1]
    assert contenders([probe(1, 74.0), probe(2, 100.0)]) == []
    assert contenders([]) == []


def test_levers_come_in_the_order_of_their_cost_each_with_those_before_it():
    def found(*usable):
        return [(s["checkpointing"], s["chunked_loss"], s["foreach"]) for s in savings(("none", "blocks"), usable)]

    assert found() == [("none", False, True), ("blocks", False, True)]
    assert found("foreach", "chunked_loss") == [
        ("none", False, True), ("none", True, True), ("none", True, False), ("blocks", True, False),
    ]  # fmt: skip


def test_the_mildest_failure_is_of_the_smallest_micro_batch_and_of_those_the_smallest_peak():
    failed = [Probe(n, 1, "fp32", "none", None, "oom", peak) for n, peak in ((2, 10), (1, 30), (1, 20))]
    fits = Probe(1, 1, "fp32", "none", None, "fits", 5)
    assert mildest([fits, *failed]) == failed[2]
    assert mildest([fits]) is None


@given(cost=costs, size=sizes, error=st.floats(0.8, 1.3))
def test_a_climb_is_bound_by_memory_where_the_next_rung_would_not_fit(cost, size, error):
    ladder = ladder_of(size)
    predicted = [int(cost.peak(candidate) * error) for candidate in ladder]
    foreseen = dict(zip(ladder, predicted, strict=True))
    probes = list(sweep(ladder, cost.probe, BUDGET, lambda candidate: foreseen.get(candidate, 0)))
    climbed = rungs_of(ladder, probes)
    bound = memory_bound(probes, ladder, predicted, BUDGET)
    if climbed[-1].outcome != "fits":
        assert bound
        return
    above = [place for place, rung in enumerate(ladder) if rung.micro_batch_size > climbed[-1].micro_batch_size]
    if not above:
        assert not bound
        return
    hopeless = predicted[above[0]] > BUDGET * (1 + FORECAST_SLACK)
    last = [rung.micro_batch_size for rung in ladder].index(climbed[-1].micro_batch_size)
    expected = climbed[-1].peak_bytes + predicted[above[0]] - predicted[last]
    if not predicted[last]:  # nothing is known of it
        expected = line_at(climbed, ladder[above[0]].micro_batch_size) if len(climbed) > 1 else 0
    assert bound == (hopeless or expected > BUDGET)


def test_a_climb_that_hung_is_not_bound_by_memory():
    hung = Probe(**asdict(ladder_of(8)[0]), outcome="timeout")
    assert not memory_bound([hung], ladder_of(8), [], BUDGET)


def climbed_at(*rates: float, size: int = 16) -> list[Probe]:
    return [
        Probe(**asdict(candidate), outcome="fits", peak_bytes=1, samples_per_second=rate)
        for candidate, rate in zip(ladder_of(size), rates, strict=False)
    ]


@pytest.mark.parametrize(
    ("rates", "worth"),
    [
        ((), True),  # nothing is known
        ((100.0,), True),  # of one rung, no gain is known
        ((50.0, 100.0), True),
        ((100.0, 120.0, 130.0), False),  # two doublings more at 130/120 each give 153, less than 130 x 4/3
        ((100.0, 115.0), True),  # three more at 1.15 each give 175, and 115 x 4/3 is 153
        ((100.0, 110.0), False),  # 146 and 147
        ((100.0, 90.0), False),
        ((50.0, 100.0, 110.0, 118.0, 125.0), False),  # the ladder ends here
    ],
)
def test_recomputing_is_worth_it_where_the_last_gain_would_pay_for_it(rates, worth):
    assert worth_recomputing(climbed_at(*rates), ladder_of(16)) is worth


@given(cost=steady_costs, size=sizes)
def test_where_recomputing_is_said_not_to_be_worth_it_it_is_not(cost, size):
    plain, recomputed = ladder_of(size), ladder_of(size, checkpointing="blocks")
    probes = list(sweep(plain, cost.probe, BUDGET))
    if probes[-1].outcome != "fits" or worth_recomputing(probes, plain):
        return
    best = ranking(probes)[0].samples_per_second
    assert all(cost.rate(c) <= best / (1 - TIE) * (1 + 1e-9) for c in recomputed)


def search(cost: Cost, size: int, budget: int) -> tuple[list[Probe], Probe | None]:
    """All of the search, as the planner puts it together."""

    def measure(candidate):
        peak = cost.peak(candidate)
        outcome = "fits" if peak <= budget else "over_budget"
        return Probe(**asdict(candidate), outcome=outcome, peak_bytes=peak, samples_per_second=cost.rate(candidate))

    tried = []
    for checkpointing in ("none", "blocks"):
        ladder = ladder_of(size, checkpointing=checkpointing)
        probes = list(sweep(ladder, measure, budget, cost.peak))
        tried += probes
        bound = memory_bound(probes, ladder, [cost.peak(c) for c in ladder], budget)
        if not (bound and worth_recomputing(probes, ladder)):
            break
    confirmed = list(confirm(tried, measure))
    return tried, confirmed[-1] if confirmed and confirmed[-1].outcome == "fits" else None


@given(cost=steady_costs, size=sizes, budgets=st.tuples(st.integers(1, 20000), st.integers(1, 20000)))
def test_more_budget_never_gives_a_slower_plan_beyond_the_tie(cost, size, budgets):
    _, small = search(cost, size, min(budgets))
    _, large = search(cost, size, max(budgets))
    if small is not None:
        assert large is not None
        assert large.samples_per_second >= small.samples_per_second * (1 - TIE) * (1 - 1e-9)


@given(cost=steady_costs, size=sizes, budget=st.integers(1, 20000))
def test_what_is_chosen_was_run_fits_and_is_nearly_the_best_of_all(cost, size, budget):
    tried, chosen = search(cost, size, budget)
    layouts = [*grid(ladder_of(size)), *grid(ladder_of(size, checkpointing="blocks"))]
    fitting = [layout for layout in layouts if cost.peak(layout) <= budget]
    if chosen is None:
        assert not fitting
        return
    assert chosen.verifying
    assert chosen.candidate in [probe.candidate for probe in tried]
    assert chosen.peak_bytes <= budget
    rungs = [*ladder_of(size), *ladder_of(size, checkpointing="blocks")]
    safe = [layout for layout in fitting if layout in rungs or cost.peak(layout) <= budget * (1 - BETWEEN)]
    best = max(cost.rate(layout) for layout in safe)
    assert chosen.samples_per_second >= best * (1 - TIE) / (1 + TIE) * (1 - 1e-9)  # a tie, and an edge not looked at
    assert search(cost, size, budget) == (tried, chosen)


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


def test_where_a_cut_changes_the_result_the_fewest_cuts_win_over_speed():
    fast = Probe(1, 4, "fp32", "none", None, "fits", 100, 1.0, 200.0)
    whole = Probe(4, 1, "fp32", "blocks", None, "fits", 900, 1.0, 50.0)
    faster_whole = replace(whole, precision="bf16", samples_per_second=60.0)
    assert ranking([fast, whole, faster_whole], fewest_cuts=True) == [faster_whole, whole, fast]
    assert next(confirm([fast, whole], Cost(base=0, slope=1, cap=100).probe, fewest_cuts=True)).micro_batch_size == 4


def test_a_sweep_for_the_fewest_cuts_climbs_though_it_gets_slower():
    def measure(candidate):
        return replace(
            Cost(base=0, slope=1, cap=100).probe(candidate), samples_per_second=1 / candidate.micro_batch_size
        )

    assert micro_sizes(sweep(ladder_of(64), measure, BUDGET))[-1] < 64
    assert micro_sizes(sweep(ladder_of(64), measure, BUDGET, insist=lambda: True))[-1] == 64


def test_predictions_are_ranked_like_measurements():
    small = Probe(1, 2, "fp32", "none", None, "predicted", samples_per_second=98.0, predicted_bytes=100)
    fast = Probe(2, 1, "fp32", "none", None, "predicted", samples_per_second=100.0, predicted_bytes=900)
    assert ranking([fast, small]) == [small, fast]


def test_where_no_speed_is_known_what_recomputes_and_accumulates_least_comes_first():
    layouts = [*ladder_of(4), *ladder_of(4, checkpointing="blocks")]
    probes = [Probe(**asdict(c), outcome="predicted", predicted_bytes=c.micro_batch_size) for c in layouts]
    ranked = [(probe.checkpointing, probe.micro_batch_size) for probe in ranking(probes)]
    assert ranked == [("none", 4), ("none", 2), ("none", 1), ("blocks", 4), ("blocks", 2), ("blocks", 1)]


@given(cost=costs, size=sizes)
def test_what_is_confirmed_was_run_again_and_fits(cost, size):
    probes = list(sweep(ladder_of(size), cost.probe, BUDGET))
    verified = list(confirm(probes, cost.probe))
    assert all(probe.verifying for probe in verified)
    assert bool(verified) == any(probe.outcome == "fits" for probe in probes)
    assert all(probe.peak_bytes <= BUDGET for probe in verified)


def test_a_confirmation_that_fails_falls_back_to_the_next_best():
    cost = Cost(base=0, slope=10, cap=100)
    probes = list(sweep(ladder_of(16), cost.probe, BUDGET))

    def tighter(candidate):
        outcome = "fits" if candidate.micro_batch_size <= 4 else "over_budget"
        return Probe(**asdict(candidate), outcome=outcome, peak_bytes=1)

    tried = list(confirm(probes, tighter))
    assert micro_sizes(tried) == [16, 8, 4]
    assert [probe.outcome for probe in tried] == ["over_budget", "over_budget", "fits"]
    assert {probe.seq_len for probe in tried} == {128}
