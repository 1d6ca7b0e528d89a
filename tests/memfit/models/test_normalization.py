import math

import pytest
import torch

from memfit.errors import ConfigError
from memfit.models.normalization import Normalization


def make(**changes):
    constants = {"value_mean": 10.0, "value_std": 4.0, "feature_mean": [1.0, 2.0], "feature_std": [2.0, 0.0]}
    return Normalization(**(constants | changes))


def test_values_and_features_by_hand():
    normalization = make()
    assert normalization.values(torch.tensor([[10.0, 18.0]])).tolist() == [[0.0, 2.0]]
    assert normalization.features(torch.tensor([[5.0, 2.0]])).tolist() == [[2.0, 0.0]]


def test_denormalize_undoes_normalization():
    raw = torch.tensor([-3.0, 0.0, 12.5])
    torch.testing.assert_close(make().denormalize(make().values(raw)), raw)


def test_a_constant_counts_as_std_one():
    assert make().feature_std.tolist() == [2.0, 1.0]
    assert make(value_std=0).value_std.item() == 1.0


def test_half_precision_inputs_are_normalized_in_single_precision():
    assert make().values(torch.tensor([11.0], dtype=torch.bfloat16)).dtype == torch.float32


def test_constants_are_saved_with_the_weights():
    assert set(make().state_dict()) == {"value_mean", "value_std", "feature_mean", "feature_std"}


@pytest.mark.parametrize(
    "changes",
    [
        {"value_mean": math.nan},
        {"value_std": -1.0},
        {"feature_mean": [0.0, math.inf]},
        {"feature_std": [1.0]},
    ],
)
def test_constants_that_cannot_normalize_are_refused(changes):
    with pytest.raises(ConfigError):
        make(**changes)
