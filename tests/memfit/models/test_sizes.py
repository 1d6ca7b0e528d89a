import dataclasses

import pytest

from memfit.errors import ConfigError
from memfit.models.sizes import SIZES


def test_the_transformer_has_the_reference_sizes():
    full, light = SIZES["full"], SIZES["light"]
    assert (full.d_model, full.num_layers, full.num_heads, full.ff) == (256, 4, 8, 1024)
    assert (light.d_model, light.num_layers, light.num_heads, light.ff) == (128, 2, 4, 512)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 130}, "multiple of num_heads; got d_model 130 and num_heads 4"),
        ({"d_model": 15, "num_heads": 5}, "must be even"),
        ({"num_layers": 0}, "num_layers must be a whole number of at least 1; got 0"),
        ({"ff": 1.5}, "ff must be a whole number"),
        ({"nbeats_blocks": True}, "nbeats_blocks must be a whole number"),
        ({"fusion_hidden": None}, "fusion_hidden must be a whole number"),
    ],
)
def test_an_impossible_size_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(SIZES["light"], **changes)
