"""Workloads by name: what the parent knows of them, and what a child builds from what the pipeline hands over."""

import re
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from memfit.workloads.base import Workload
    from memfit.workloads.kind import Kind


class Known(NamedTuple):
    """Where a workload is, as module:name; nothing is imported before it is asked for."""

    kind: str
    """For the parent: needs no torch."""
    workload: str
    """For children."""


WORKLOADS = {
    "series": Known("memfit.workloads.series_settings:SeriesKind", "memfit.workloads.series:SeriesWorkload"),
    "forecast": Known("memfit.workloads.forecast_settings:ForecastKind", "memfit.workloads.forecast:ForecastWorkload"),
    "language": Known("memfit.workloads.language_settings:LanguageKind", "memfit.workloads.language:LanguageWorkload"),
    "vision": Known("memfit.workloads.vision_settings:VisionKind", "memfit.workloads.vision:VisionWorkload"),
}


CUSTOM = Known("memfit.workloads.custom_settings:CustomKind", "memfit.workloads.custom:load")
"""A user's own; both take the import path first."""
IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)
"""package.module:function."""


def is_known(name: str) -> bool:
    """Tell whether a workload is one of memfit's, or an import path."""
    return name in WORKLOADS or IMPORT_PATH.fullmatch(name) is not None


def load_kind(name: str) -> "Kind":
    """Return what the parent knows of a workload."""
    build: Callable[..., Kind] = _find((WORKLOADS.get(name) or CUSTOM).kind)
    return build() if name in WORKLOADS else build(name)


def load_workload(job: Mapping[str, Any]) -> "Workload":
    """Build the workload of a job: its keys workload, data_dir, model and loss."""
    name, settings = job["workload"], (Path(job["data_dir"]), job["model"], job["loss"])
    build: Callable[..., Workload] = _find((WORKLOADS.get(name) or CUSTOM).workload)
    return build(*settings) if name in WORKLOADS else build(name, *settings)


def _find(place: str) -> Any:
    module, name = place.split(":")
    return getattr(import_module(module), name)
