"""Run a model over a split in batches: losses, predictions and scores."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from memfit.step import Batch, Layout, evaluating, map_tensors, num_samples
from memfit.workloads.base import Arrays, Workload


def batches(workload: Workload, split: str, size: int) -> Iterator[Batch]:
    """Cut a split into batches, in order."""
    for start in range(0, workload.num_samples(split), size):
        yield workload.batch(split, np.arange(start, min(start + size, workload.num_samples(split))))


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
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for host in batches(workload, split, batch_size):
            batch = map_tensors(lambda tensor: tensor.to(layout.device), host)
            with evaluating(layout):
                losses, predictions = workload.loss(model, batch), workload.predict(model, batch)
            for term, count in workload.count(host).items():
                sums[term] = sums.get(term, 0.0) + float(losses[term])
                counts[term] = counts.get(term, 0.0) + count
            for name, tensor in predictions.items():
                part = tensor.float().cpu().numpy()
                if name not in found:
                    found[name] = np.empty((size, *part.shape[1:]), part.dtype)
                found[name][done : done + len(part)] = part
            done += num_samples(host)
    model.train(was_training)
    means = {term: sums[term] / counts[term] if counts[term] else 0.0 for term in sums}
    means["total"] = sum(means.values())
    return means, found
