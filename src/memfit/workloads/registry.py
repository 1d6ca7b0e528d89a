"""Workloads by name, built in a child from what the pipeline hands over."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memfit.workloads.base import Workload
from memfit.workloads.series import SeriesWorkload

WORKLOADS = {"series": SeriesWorkload}


def load_workload(job: Mapping[str, Any]) -> Workload:
    """Build the workload of a job: its keys workload, data_dir, model and loss."""
    return WORKLOADS[job["workload"]](Path(job["data_dir"]), job["model"], job["loss"])
