"""Run a model over a split in batches: losses, predictions and scores."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from memfit.process import is_out_of_memory
from memfit.random_state import random_states, set_random_states
from memfit.recovery import release_memory
from memfit.step import Batch, Layout, evaluating, map_tensors, num_samples
from memfit.workloads.base import Arrays, Workload


def batches(workload: Workload, split: str, size: int) -> Iterator[Batch]:
    """Cut a split into batches, in order."""
    for start in range(0, workload.num_samples(split), size):
        yield workload.batch(split, np.arange(start, min(start + size, workload.num_samples(split))))


def evaluate_in_pieces(
    workload: Workload,
    model: nn.Module,
    split: str,
    *,
    batch_size: int,
    layout: Layout,
    on_shrink: Callable[[int, str], None],
    relieve: Callable[[], bool] = lambda: False,
) -> tuple[dict[str, float], Arrays]:
    """Do what `evaluate_split` does, from the start with half the batch where memory runs out.

    on_shrink: told the new batch size and the error. relieve: asked first, as that of `RecoveringStep`. Raises: the
    error itself where a single sample does not fit.
    """
    states = random_states()
    while True:
        try:
            return evaluate_split(workload, model, split, batch_size=batch_size, layout=layout)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            relieved = relieve()
            if batch_size == 1 and not relieved:
                raise
            message = str(error)[:300] or type(error).__name__
        set_random_states(states)  # outside the handler: a traceback pins tensors
        release_memory(layout.device)
        if not relieved:
            batch_size //= 2
            on_shrink(batch_size, message)


@contextmanager
def _as_evaluated(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def evaluate_split(
    workload: Workload, model: nn.Module, split: str, *, batch_size: int, layout: Layout
) -> tuple[dict[str, float], Arrays]:
    """Return the mean loss per term (and their total), and the predictions of every sample, in order.

    The model is left in the mode that it came in.
    """
    sums: dict[str, float] = {}
    counts: dict[str, float] = {}
    found: Arrays = {}
    done, size = 0, workload.num_samples(split)
    with _as_evaluated(model), torch.no_grad():
        for host in batches(workload, split, batch_size):
            batch = map_tensors(lambda tensor: tensor.to(layout.device), host)
            with evaluating(layout):
                losses, predictions = workload.loss(model, batch), workload.predict(model, batch)
            counted = workload.count(host)
            for term, loss in losses.items():
                sums[term] = sums.get(term, 0.0) + float(loss)
                counts[term] = counts.get(term, 0.0) + counted.get(term, num_samples(host))
            for name, tensor in predictions.items():
                part = tensor.float().cpu().numpy()
                if name not in found:
                    found[name] = np.empty((size, *part.shape[1:]), part.dtype)
                found[name][done : done + len(part)] = part
            done += num_samples(host)
    means = {term: sums[term] / counts[term] if counts[term] else 0.0 for term in sums}
    means["total"] = sum(means.values())
    return means, found
