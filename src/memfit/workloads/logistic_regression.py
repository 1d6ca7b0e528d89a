"""Multinomial logistic regression on pixels: what an image classifier must beat."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

MAX_VALUES = 1 << 28
"""Most pixel values that are fitted on, over all images: a pass over them takes a quarter of a second or so."""
MAX_SIDE = 32
"""Larger images are averaged over squares of pixels, to this many at most on a side."""
MAX_ITERATIONS = 60
VALUES_PER_PIECE = 1 << 20
"""How many pixel values are in memory at once, as float32."""
Images = Callable[[NDArray[np.int64]], NDArray[np.uint8]]


def num_fitted(count: int, height: int, width: int, channels: int) -> int:
    """Return how many of so many train images are fitted on."""
    return min(count, max(1, MAX_VALUES // _num_values(height, width, channels)))


def fit_and_predict(
    train: Images, labels: NDArray[np.int64], num_classes: int, test: Images, num_test: int
) -> NDArray[np.float32]:
    """Fit on train images by their labels [n], predict class probabilities [num_test, C] of test images.

    train, test: indices -> images uint8 [., H, W, C]. The mean cross-entropy plus |W|^2 / (2 n), scikit-learn's
    default, is minimized by L-BFGS from zero in at most MAX_ITERATIONS steps. Pixels are standardized by the train
    images. Deterministic; draws no random numbers; holds VALUES_PER_PIECE pixels at a time.
    """
    with torch.no_grad():
        fit = _Fit(train, labels, num_classes)
        optimizer = torch.optim.LBFGS(
            [fit.weights], max_iter=MAX_ITERATIONS, history_size=10, line_search_fn="strong_wolfe"
        )
        optimizer.step(fit.loss_and_gradient)
        parts = [fit.logits(rows).softmax(dim=1) for _, rows in _pieces(test, num_test)]
    found: NDArray[np.float32] = torch.cat(parts).numpy()
    return found


@dataclass
class _Fit:
    """Weights [D + 1, C] for standardized pixels and the bias, and what they are fitted to.

    Rows stay on their raw scale: (x - mean) / std W is x (W / std) less a constant, which saves two passes.
    """

    train: Images
    labels: NDArray[np.int64]
    num_classes: int

    def __post_init__(self) -> None:
        self.mean, self.std = _moments(self.train, len(self.labels))
        self.weights = torch.zeros(len(self.mean) + 1, self.num_classes)

    @cached_property
    def truth(self) -> Tensor:
        return torch.from_numpy(np.asarray(self.labels, np.int64))

    def logits(self, rows: Tensor) -> Tensor:
        """Map raw rows [n, D] to [n, C]."""
        scaled = self.weights[:-1] / self.std[:, None]
        return rows @ scaled + (self.weights[-1] - self.mean @ scaled)

    def loss_and_gradient(self) -> float:
        """Return the loss at the weights, and leave its gradient with them."""
        loss, by_pixel, by_class = 0.0, torch.zeros_like(self.weights[:-1]), torch.zeros(self.num_classes)
        for chosen, rows in _pieces(self.train, len(self.labels)):
            truth, log_shares = self.truth[chosen], self.logits(rows).log_softmax(dim=1)
            loss += float(F.nll_loss(log_shares, truth, reduction="sum"))
            error = log_shares.exp()
            error[torch.arange(len(truth)), truth] -= 1
            by_pixel += rows.T @ error
            by_class += error.sum(dim=0)
        by_pixel = (by_pixel - self.mean[:, None] * by_class) / self.std[:, None]
        decayed = self.weights[:-1]  # the bias is not decayed
        self.weights.grad = torch.cat((by_pixel + decayed, by_class[None])) / len(self.labels)
        return (loss + 0.5 * float(decayed.square().sum())) / len(self.labels)


def _factor(height: int, width: int) -> int:
    return -(-max(height, width) // MAX_SIDE)


def _num_values(height: int, width: int, channels: int) -> int:
    """Count the values of an image, averaged over squares if it is large."""
    factor = _factor(height, width)
    return -(-height // factor) * -(-width // factor) * channels


def _pieces(images: Images, count: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield places and rows float32 [., D] of all images, a few at a time."""
    height, width, channels = images(np.arange(1)).shape[1:]
    size = max(1, VALUES_PER_PIECE // (height * width * channels))
    for start in range(0, count, size):
        chosen = slice(start, min(start + size, count))
        yield chosen, _rows(images(np.arange(chosen.start, chosen.stop)))


def _rows(images: NDArray[np.uint8]) -> Tensor:
    """Return images as rows float32 [n, D], averaged over squares where they are large."""
    values = torch.from_numpy(np.ascontiguousarray(images)).float()
    factor = _factor(*images.shape[1:3])
    if factor > 1:
        values = F.avg_pool2d(values.permute(0, 3, 1, 2), factor, ceil_mode=True, count_include_pad=False)
    return values.flatten(1)


def _moments(train: Images, count: int) -> tuple[Tensor, Tensor]:
    """Return mean and std of every value, float32 [D]; 1 for the std of one that hardly varies."""
    first = second = torch.zeros((), dtype=torch.float64)
    for _, part in _pieces(train, count):
        rows = part.double()
        first, second = first + rows.sum(dim=0), second + rows.square().sum(dim=0)
    mean = first / count
    std = (second / count - mean.square()).clamp(min=0).sqrt()
    return mean.float(), torch.where(std > 1e-3, std, 1.0).float()
