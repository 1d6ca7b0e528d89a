"""Is training healthy: gradients and weights of every layer, units without gradient, recurrent singular values.

Gradients are looked at in a few steps of each epoch, weights once at its end; nothing that training computes changes.
A recurrent layer's gradient is the sum over all time steps: where it does not vanish, that of the first ones still may.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from memfit.step import TrainingStep
from memfit.training.layers import Layer, layers_of, recurrent_singular_values, weight_figures
from memfit.training.stage import Progress

SAMPLED_STEPS = 8
"""Steps of an epoch whose gradients are looked at, evenly spaced from the first on."""
SPACING = 6
"""At most every so many steps, however short an epoch is."""
VANISHING, EXPLODING = 1e-3, 100.0
"""Gradient norms, before clipping, below and above which a layer or the whole net is warned of."""
DEAD_SHARE = 0.5
"""Share of a layer's units without gradient from which on it is warned of."""
MAX_NAMED = 4
"""Layers that a message names; the event lists them all."""

Figures = dict[str, Any]


def sampled_steps(num_steps: int) -> list[int]:
    """List the steps of an epoch, counted from 0, whose gradients are looked at."""
    count = min(SAMPLED_STEPS, -(-num_steps // SPACING))
    return [index * num_steps // count for index in range(count)]


@dataclass
class HealthWatch:
    """Looks at the gradients of a step from within, and sums up an epoch when it is closed.

    What it has seen of an epoch lies in `progress.health` and so in every checkpoint: a resumed epoch is summed up as
    one that was never stopped. After a checkpoint without it, only the rest of the epoch is summed up; the event's
    `sampled_steps` says how many steps were looked at.
    """

    step: TrainingStep
    progress: Progress
    """Tells which step of the epoch it is."""
    _layers: list[Layer] = field(init=False)
    _sampled: frozenset[int] = field(default=frozenset(), init=False)

    def __post_init__(self) -> None:
        self._layers = layers_of(self.step.model)
        self.step.observe = self

    def begin_epoch(self, num_steps: int) -> None:
        """Choose the steps of an epoch of so many, whether it begins or is resumed."""
        self._sampled = frozenset(sampled_steps(num_steps))

    @torch.no_grad()
    def __call__(self) -> None:
        """Look at the gradients, if it is the step's turn: no copy of them, one transfer from the device."""
        if self.progress.batch not in self._sampled or not self._layers:
            return
        weights = [weight for layer in self._layers for weight in layer.weights]
        rows = [weight.rows() for weight in weights]
        norms = torch.stack([norm.float() for norm in torch._foreach_norm(rows)])
        units = [norm for weight, norm in zip(weights, rows, strict=True) if weight.num_units]
        on_host = torch.cat([norms, *units]).cpu()
        self._add(on_host[: len(norms)].tolist(), on_host[len(norms) :] != 0)

    def _add(self, norms: Iterable[float], alive: Tensor) -> None:
        rest = iter(norms)
        found = [_length(islice(rest, len(layer.weights))) for layer in self._layers]
        seen = self._seen()
        seen["sampled_steps"] += 1
        for entry, norm in zip(seen["norms"], [*found, _length(found)], strict=True):
            if math.isfinite(norm):
                entry[:] = [entry[0] + 1, entry[1] + norm, max(entry[2], norm)]
        seen["alive"] |= alive
        self.progress.health = seen

    def _seen(self) -> Figures:
        """Return what was seen of the epoch: per layer, and last of the net, [finite norms, their sum, the largest]."""
        return self.progress.health or {
            "sampled_steps": 0,
            "norms": [[0, 0.0, 0.0] for _ in range(len(self._layers) + 1)],
            "alive": torch.zeros(sum(layer.num_units for layer in self._layers), dtype=torch.bool),
        }

    def close_epoch(self) -> Figures:
        """Sum up the epoch for its event, and begin a new one. Figures are finite, or None where there is none."""
        seen, self.progress.health = self._seen(), {}
        looks, norms = seen["sampled_steps"], seen["norms"]
        *layers, total = map(_figures, norms, weight_figures(self._layers))
        alive = seen["alive"].split([layer.num_units for layer in self._layers])
        for figures, units in zip(layers, alive, strict=True):
            figures.update(dead_units=int((~units).sum()) if looks else None, num_units=len(units))
        named = {layer.name: figures for layer, figures in zip(self._layers, layers, strict=True)}
        enough = 1 if self.step.scaler.is_enabled() else looks  # a loss scale is found by what overflows
        not_finite = [layer.name for layer, entry in zip(self._layers, norms, strict=False) if entry[0] < enough]
        return {
            "sampled_steps": looks,
            "layers": named,
            "total": {name: total[name] for name in ("gradient_norm", "gradient_norm_max", "ratio", "weight_norm")},
            "recurrent": {
                name: {gate: [_plain(value) for value in values] for gate, values in gates.items()}
                for name, gates in recurrent_singular_values(self.step.model).items()
            },
            "warnings": list(_warnings(named, total, not_finite)) if looks else [],
            "vanishing_below": VANISHING,
            "exploding_above": EXPLODING,
        }


def _length(norms: Iterable[float]) -> float:
    """Return the norm of a vector whose parts have these norms."""
    return math.sqrt(sum(norm * norm for norm in norms))


def _figures(norms: Sequence[float], weights: Mapping[str, float]) -> Figures:
    looks, total, largest = norms
    mean, norm = (total / looks if looks else math.nan), weights["weight_norm"]
    gradients = {
        "gradient_norm": mean,
        "gradient_norm_max": largest if looks else math.nan,
        "ratio": mean / norm if norm else math.nan,
    }
    return {name: _plain(value) for name, value in {**gradients, **weights}.items()}


def _plain(value: float) -> float | None:
    """Cut a figure to six digits; None stands for what is not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _warnings(layers: Mapping[str, Figures], total: Figures, not_finite: Sequence[str]) -> Iterator[Figures]:
    """Yield {kind, layers, message}; no layers where the whole net is meant."""
    if not_finite:
        yield _warning("not_finite", not_finite, "gradients that are not finite")
    unused = [name for name, of in layers.items() if of["gradient_norm_max"] == 0]
    if unused:
        yield _warning("no_gradient", unused, "no gradient")
    largest = total["gradient_norm_max"] or 0.0
    if largest > EXPLODING:
        high = [name for name, of in layers.items() if (of["gradient_norm_max"] or 0.0) > EXPLODING]
        yield _warning("exploding", high, f"gradient norms above {EXPLODING:g} (up to {largest:.3g} in all)")
    low = [name for name, of in layers.items() if name not in unused and _vanishes(of)]
    if low:
        yield _warning("vanishing", [] if _vanishes(total) else low, f"gradient norms below {VANISHING:g}")
    dead = [name for name, of in layers.items() if name not in unused and _dead_share(of) >= DEAD_SHARE]
    if dead:
        yield _warning("dead_units", dead, f"no gradient in {DEAD_SHARE:.0%} or more of the units")


def _vanishes(figures: Figures) -> bool:
    return figures["gradient_norm"] is not None and figures["gradient_norm"] < VANISHING


def _dead_share(figures: Figures) -> float:
    return figures["dead_units"] / figures["num_units"] if figures["num_units"] else 0.0


def _warning(kind: str, layers: Sequence[str], what: str) -> Figures:
    more = f" and {len(layers) - MAX_NAMED} more" if layers[MAX_NAMED:] else ""
    where = ", ".join(layers[:MAX_NAMED]) + more if layers else "the whole net"
    return {"kind": kind, "layers": list(layers), "message": f"{what} in {where}"}
