"""Workloads by name, built in a child from what the pipeline hands over."""

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from memfit.workloads.base import Workload


class Known(NamedTuple):
    """What the pipeline knows of a workload without importing it, and torch with it."""

    module: str
    name: str
    min_micro_batch_size: int = 1
    """The fewest samples that its loss or its batch statistics make sense of."""


WORKLOADS = {"series": Known("memfit.workloads.series", "SeriesWorkload")}


def load_workload(job: Mapping[str, Any]) -> "Workload":
    """Build the workload of a job: its keys workload, data_dir, model and loss."""
    known = WORKLOADS[job["workload"]]
    build: Callable[..., Workload] = getattr(import_module(known.module), known.name)
    return build(Path(job["data_dir"]), job["model"], job["loss"])
