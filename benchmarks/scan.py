"""The recurrence y_t = decay_t y_{t-1} + value_t, forward and backward: memfit's scan beside three other ways.

    python -m benchmarks.scan --csv benchmarks/scan.csv

All ways take turns in one process; a row has the medians, and how many times as fast as the loop it was. `loop` takes
one step after the other; `doubling` is the scan of Kogge and Stone (1973), log2 T passes over the whole sequence;
`cumprod` is y = P (initial + cumsum(value / P)) with P = cumprod(decay). Errors are the largest difference to the loop
in float64, as a share of each channel's largest value, for two kinds of decays: those of a new model (time constants
of 1 to 300 tokens, each with noise) and uniform in [0, 1). memfit's children run with OMP_WAIT_POLICY=PASSIVE. Where
others use the machine too, whatever needs two threads is slow.
"""

import argparse
import csv
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.planner_cases import stamp
from memfit.models.linear_recurrence import linear_recurrence

SHAPES = ((4, 128, 256), (16, 128, 256), (4, 1024, 256), (16, 1024, 256))
COLUMNS = (
    "date", "commit", "device", "torch", "threads", "waiting", "n", "steps", "channels", "way", "forward_ms",
    "step_ms", "forward_ratio", "step_ratio", "error_new_model", "error_uniform",
)  # fmt: skip
Way = Callable[[Tensor, Tensor, Tensor], Tensor]


def loop(decay: Tensor, value: Tensor, initial: Tensor) -> Tensor:
    state, states = initial, []
    for one, other in zip(decay.unbind(1), value.unbind(1), strict=True):
        state = torch.addcmul(other, one, state)
        states.append(state)
    return torch.stack(states, 1)


def doubling(decay: Tensor, value: Tensor, initial: Tensor) -> Tensor:
    states = torch.cat([torch.addcmul(value[:, :1], decay[:, :1], initial[:, None]), value[:, 1:]], 1)
    shift = 1
    while shift < decay.shape[1]:
        later = torch.addcmul(states[:, shift:], decay[:, shift:], states[:, :-shift])
        states = torch.cat([states[:, :shift], later], 1)
        decay = torch.cat([decay[:, :shift], decay[:, shift:] * decay[:, :-shift]], 1)
        shift *= 2
    return states


def cumprod(decay: Tensor, value: Tensor, initial: Tensor) -> Tensor:
    product = decay.cumprod(1)
    return product * (initial[:, None] + (value / product).cumsum(1))


WAYS: dict[str, Way] = {"loop": loop, "memfit": linear_recurrence, "doubling": doubling, "cumprod": cumprod}


def new_model(n: int, steps: int, channels: int) -> Tensor:
    """Return decays as a new model makes them."""
    tokens = torch.logspace(0, math.log10(300), channels)
    return torch.sigmoid(-torch.expm1(1 / tokens).log() + 0.2 * torch.randn(n, steps, channels))


def uniform(n: int, steps: int, channels: int) -> Tensor:
    return torch.rand(n, steps, channels)


def error(way: Way, decay: Tensor, value: Tensor, initial: Tensor) -> float:
    truth = loop(decay.double(), value.double(), initial.double())
    worst = ((way(decay, value, initial) - truth).abs() / truth.abs().amax(1, keepdim=True)).max()
    return float(worst)


def timed(way: Way, inputs: tuple[Tensor, ...], gradient: Tensor) -> tuple[float, float]:
    """Return milliseconds of a forward pass without gradients, and of one with them and its backward pass."""
    torch.autograd.grad(way(*inputs), inputs, gradient)  # the way before has left the caches full of its own
    started = time.perf_counter()
    with torch.no_grad():
        way(*inputs)
    between = time.perf_counter()
    torch.autograd.grad(way(*inputs), inputs, gradient)
    return 1e3 * (between - started), 1e3 * (time.perf_counter() - between)


def measure(shape: tuple[int, int, int], rounds: int) -> list[dict[str, Any]]:
    n, _, channels = shape
    initial, value = torch.randn(n, channels), torch.randn(shape)
    inputs = tuple(tensor.requires_grad_() for tensor in (new_model(*shape), value.clone(), initial.clone()))
    gradient, times = torch.randn(shape), {name: [] for name in WAYS}
    for index in range(rounds + 3):
        for name, way in WAYS.items():
            found = timed(way, inputs, gradient)
            times[name] += [found] if index >= 3 else []
    rows = []
    for name, way in WAYS.items():
        medians = [statistics.median(values) for values in zip(*times[name], strict=True)]
        base = [statistics.median(values) for values in zip(*times["loop"], strict=True)]
        rows.append(
            dict(zip(("n", "steps", "channels"), shape, strict=True))
            | {"way": name, "forward_ms": medians[0], "step_ms": medians[1]}
            | {"forward_ratio": base[0] / medians[0], "step_ratio": base[1] / medians[1]}
            | {"error_new_model": error(way, new_model(*shape), value, initial)}
            | {"error_uniform": error(way, uniform(*shape), value, initial)}
        )
    return rows


def show(row: dict[str, Any]) -> str:
    return (
        f"[{row['n']}, {row['steps']}, {row['channels']}] {row['way']:9s} forward {row['forward_ms']:8.3f} ms, "
        f"{row['forward_ratio']:5.1f} times the loop; with backward {row['step_ms']:8.3f} ms, {row['step_ratio']:5.1f} "
        f"times; errors {row['error_new_model']:.1e} and {row['error_uniform']:.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--csv", type=Path, default=None, help="append the rows here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    stamped = stamp() | {"threads": options.threads, "waiting": os.environ.get("OMP_WAIT_POLICY", "default").lower()}
    rows = []
    for shape in SHAPES:
        rows += measure(shape, options.rounds)
        print(*map(show, rows[-len(WAYS) :]), sep="\n", flush=True)
    print(f"load of the machine at the end: {os.getloadavg()[0]:.1f}")
    if options.csv:
        new = not options.csv.exists()
        with options.csv.open("a", newline="") as opened:
            writer = csv.DictWriter(opened, COLUMNS, lineterminator="\n")
            if new:
                writer.writeheader()
            for row in rows:
                digits = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}
                writer.writerow(stamped | digits)


if __name__ == "__main__":
    sys.exit(main())
