import numpy as np
import pytest

from memfit.data.splits import SPLITS, choose_targets, class_edges, classify, exceeds, first_target, required_rows
from memfit.errors import DataError


@pytest.mark.parametrize("context", [1, 8, 30])
def test_targets_are_split_by_time_and_cover_every_row_once(make_spec, context):
    spec = make_spec("a.csv", context=context)
    targets = choose_targets(spec, np.ones(106, np.bool_))
    start = max(context, 5)
    assert np.concatenate([targets.of(split) for split in SPLITS]).tolist() == list(range(start, 106))
    train, validation = (len(targets.of(split)) for split in SPLITS[:2])
    assert train == pytest.approx(0.7 * (106 - start), abs=1)
    assert validation == pytest.approx(0.15 * (106 - start), abs=1)
    assert targets.train_end == start + train


def test_rows_that_are_not_eligible_are_no_targets(make_spec):
    eligible = np.ones(60, np.bool_)
    eligible[[3, 20, 21, 59]] = False
    rows = choose_targets(make_spec("a.csv"), eligible).rows
    assert rows.tolist() == [row for row in range(8, 59) if row not in (20, 21)]


@pytest.mark.parametrize("shares", [(0.7, 0.15), (0.5, 0.49), (0.01, 0.9), (0.6, 0.2)])
def test_the_required_rows_are_just_enough(make_spec, shares):
    spec = make_spec("a.csv", train_share=shares[0], validation_share=shares[1])
    needed = required_rows(spec)
    targets = choose_targets(spec, np.ones(needed, np.bool_))
    assert min(len(targets.of(split)) for split in SPLITS) == 2
    with pytest.raises(DataError, match=f"too short: it has {needed - 1} rows.*expected at least {needed} rows"):
        choose_targets(spec, np.ones(needed - 1, np.bool_))


def test_a_series_too_short_names_context_lookback_and_filled_rows(make_spec):
    eligible = np.ones(12, np.bool_)
    eligible[9] = False
    with pytest.raises(DataError, match=r"12 rows, of which 1 are filled.*8 before .*context 8, lookback .* 5"):
        choose_targets(make_spec("a.csv"), eligible)


def test_the_first_target_has_a_feature_row_before_it(make_spec):
    assert first_target(make_spec("a.csv", context=2)) == 5


def test_classes_contain_their_upper_edge_and_exceeding_means_above():
    values = np.array([0.9, 1.1, 1.2, 2.0, 2.1], np.float32)
    assert classify(values, [1.1, 2.0]).tolist() == [0, 0, 1, 1, 2]
    assert exceeds(values, 1.1).tolist() == [False, False, True, True, True]


def test_class_quantiles_are_those_of_the_given_values(make_spec):
    spec = make_spec("a.csv", class_quantiles=[0.25, 0.5])
    assert class_edges(spec, np.arange(101, dtype=np.float32)) == [25, 50]
    assert len(class_edges(make_spec("a.csv"), np.arange(101, dtype=np.float32))) == 4
    assert class_edges(make_spec("a.csv", class_edges=[1, 2.5]), np.zeros(3, np.float32)) == [1, 2.5]


@pytest.mark.parametrize("values", [[0] * 9 + [1], [0] + [1] * 9])
def test_refuses_quantiles_that_coincide_or_leave_a_class_empty(make_spec, values):
    spec = make_spec("a.csv", class_quantiles=[0.3, 0.6])
    with pytest.raises(DataError, match="do not separate classes: too many train targets are equal"):
        class_edges(spec, np.array(values, np.float32))


def test_refuses_edges_that_float32_cannot_tell_apart(make_spec):
    with pytest.raises(DataError, match="coincide as float32"):
        class_edges(make_spec("a.csv", class_edges=[1, 1 + 1e-12]), np.zeros(3, np.float32))
