import pytest
import torch

from memfit.models.multiscale import MultiScaleNet, build_multiscale

TINY = {
    "windows": (8, 24),
    "tcn_window": 8,
    "transformer_window": 24,
    "num_features": 5,
    "num_classes": 3,
    "value_mean": 40.0,
    "value_std": 8.0,
    "feature_mean": [1.0, 2.0, 3.0, 4.0, 5.0],
    "feature_std": [1.0, 2.0, 0.0, 0.5, 1.0],
    "d_model": 16,
    "num_layers": 1,
    "num_heads": 2,
    "ff": 32,
    "nbeats_hidden": 16,
    "tcn_channels": 8,
    "feature_hidden": 8,
    "fusion_hidden": 32,
}


@pytest.fixture(scope="session")
def tiny_arguments():
    """Return what changes the light net into a miniature that a test trains in a second."""
    return TINY


@pytest.fixture(scope="session")
def make_tiny():
    """Build the light net in miniature, with overrides; seeded."""

    def make(**overrides) -> MultiScaleNet:
        torch.manual_seed(0)
        return build_multiscale("light", **(TINY | overrides))

    return make


@pytest.fixture(scope="session")
def make_rows():
    """Draw n rows of raw history and features for the tiny net; seeded."""

    def make(n: int, length: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(n)
        history = 40 + 8 * torch.randn(n, length, generator=generator)
        return history, 3 + torch.randn(n, 5, generator=generator)

    return make
