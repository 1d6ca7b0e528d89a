"""Run a model over a split in batches: losses, predictions and scores."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from memfit.step import Batch, autocast, map_tensors
from memfit.workloads.base import Arrays, Workload


def batches(workload: Workload, split: str, size: int) -> Iterator[Batch]:
    """Cut a split into batches, in order."""
    for start in range(0, workload.num_samples(split), size):
        yield workload.batch(split, np.arange(start, min(start + size, workload.num_samples(split))))


def evaluate_split(
    workload: Workload, model: nn.Module, split: str, *, batch_size: int, precision: str, device: str
) -> tuple[dict[str, float], Arrays]:
    """Return the mean loss per term (and their total), and the predictions of every sample, in order.

    The model is left in the mode that it came in.
    """
    sums: dict[str, float] = {}
    counts: dict[str, float] = {}
    parts: list[dict[str, np.ndarray]] = []
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for host in batches(workload, split, batch_size):
            batch = map_tensors(lambda tensor: tensor.to(device), host)
            with autocast(precision, device):
                losses, predictions = workload.loss(model, batch), workload.predict(model, batch)
            for term, count in workload.count(host).items():
                sums[term] = sums.get(term, 0.0) + float(losses[term])
                counts[term] = counts.get(term, 0.0) + count
            parts.append({name: tensor.float().cpu().numpy() for name, tensor in predictions.items()})
    model.train(was_training)
    means = {term: sums[term] / counts[term] if counts[term] else 0.0 for term in sums}
    means["total"] = sum(means.values())
    return means, {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
