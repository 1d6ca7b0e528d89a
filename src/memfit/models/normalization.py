"""Normalization inside the model: raw units in, constants saved with the weights and exported with the graph."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from memfit.errors import ConfigError


def constant_buffer(name: str, numbers: Sequence[float], *, is_std: bool) -> Tensor:
    """Return fp32 constants; raise ConfigError for what cannot normalize. A std of 0 (a constant) counts as 1."""
    lowest = 0.0 if is_std else -math.inf
    for position, number in enumerate(numbers):
        if not (math.isfinite(number) and number >= lowest):
            raise ConfigError(
                f"{name}[{position}] must be a finite number{' not below 0' if is_std else ''}; got {number}. "
                "Fit the normalization on rows without NaN or infinity."
            )
    constant = torch.tensor([float(number) for number in numbers], dtype=torch.float32)
    return torch.where(constant == 0, 1.0, constant) if is_std else constant


class Normalization(nn.Module):
    """Hold mean and std of the value and of each feature as buffers; compute in fp32, under autocast too."""

    value_mean: Tensor
    value_std: Tensor
    feature_mean: Tensor
    feature_std: Tensor

    def __init__(
        self,
        *,
        value_mean: float,
        value_std: float,
        feature_mean: Sequence[float],
        feature_std: Sequence[float],
    ) -> None:
        super().__init__()
        if len(feature_mean) != len(feature_std):
            raise ConfigError(
                f"feature_mean and feature_std must be as long as each other; got {len(feature_mean)} and "
                f"{len(feature_std)}. Take both from one manifest."
            )
        self.register_buffer("value_mean", constant_buffer("value_mean", [value_mean], is_std=False)[0])
        self.register_buffer("value_std", constant_buffer("value_std", [value_std], is_std=True)[0])
        self.register_buffer("feature_mean", constant_buffer("feature_mean", feature_mean, is_std=False))
        self.register_buffer("feature_std", constant_buffer("feature_std", feature_std, is_std=True))

    def values(self, raw: Tensor) -> Tensor:
        """Normalize values of any shape."""
        return (raw.float() - self.value_mean) / self.value_std

    def features(self, raw: Tensor) -> Tensor:
        """Normalize features [..., F]."""
        return (raw.float() - self.feature_mean) / self.feature_std

    def denormalize(self, value: Tensor) -> Tensor:
        """Take normalized values of any shape back to the user's units."""
        return value.float() * self.value_std + self.value_mean
