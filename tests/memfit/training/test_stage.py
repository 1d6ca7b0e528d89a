import math
import random

import numpy as np
import pytest
import torch

from memfit.random_state import seed_everything
from memfit.training.stage import Progress, sample_order


def test_the_order_of_samples_is_a_function_of_seed_stage_and_epoch_alone():
    first = sample_order(50, seed=1, stage=0, epoch=0)
    seed_everything(4)
    np.random.seed(3)  # noqa: NPY002
    assert sample_order(50, seed=1, stage=0, epoch=0).tolist() == first.tolist()
    assert sorted(first) == list(range(50))
    others = [sample_order(50, seed=s, stage=t, epoch=e) for s, t, e in ((2, 0, 0), (1, 1, 0), (1, 0, 1))]
    assert len({tuple(order) for order in [first, *others]}) == 4


def test_asking_for_an_order_draws_nothing_from_the_global_generators():
    seed_everything(4)
    expected = torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
    seed_everything(4)
    sample_order(50, seed=1, stage=0, epoch=0)
    got = torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
    assert torch.equal(got[0], expected[0])
    assert got[1:] == expected[1:]


@pytest.mark.parametrize(
    ("best", "value", "mode", "improves"),
    [
        (None, 1.0, "min", True),
        (1.0, 0.9, "min", True),
        (1.0, 1.0, "min", False),
        (1.0, 1.1, "min", False),
        (1.0, 1.1, "max", True),
        (1.0, 1.0, "max", False),
        (1.0, None, "min", False),
        (None, None, "max", False),
        (None, math.nan, "min", False),
        (1.0, math.nan, "max", False),
        (None, math.inf, "min", True),
    ],
)
def test_better_is_strictly_better_and_never_undefined(best, value, mode, improves):
    assert Progress(best_value=best).improves(value, mode) is improves
