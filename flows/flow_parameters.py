"""What the flows take. Prefect shows the descriptions in its form; its server refuses what does not match, unrun."""

import os
from pathlib import Path
from typing import Annotated, Any

from prefect.runtime import flow_run
from pydantic import Field

from memfit.cli import with_shortcuts
from memfit.config import RunConfig, load_config
from memfit.errors import ConfigError
from memfit.memory.devices import CATALOG
from memfit.memory.units import PATTERN as BUDGET_PATTERN
from memfit.pipeline import Pipeline, open_run


def _described(text: str) -> Any:
    """Put a description where Prefect leaves it alone: it empties a Field's own, having read only the docstring."""
    return Field(json_schema_extra={"description": text})


ConfigPath = Annotated[
    str,
    Field(pattern=r"\.toml$"),
    _described("Path of a TOML config, from the flow run's working directory: configs/x.toml"),
]
Override = Annotated[str, Field(pattern=r"^\s*[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\s*=")]
Overrides = Annotated[
    tuple[Override, ...],
    _described("Settings that differ from the config, as key.path=value: stages.0.lr=3e-4"),
]
Budget = Annotated[
    str,
    Field(pattern=rf"^({BUDGET_PATTERN})?$"),
    _described("Memory budget: 14GiB, 80% of the device, or auto (what is free then). Empty: the config's."),
]
Device = Annotated[
    str,
    Field(pattern=r"^(cpu|cuda(:\d+)?)?$"),
    _described("cpu, cuda or cuda:n. Empty: the config's device."),
]
PlannedDevice = Annotated[
    str,
    Field(pattern=rf"^(cpu|cuda(:\d+)?|{'|'.join(card.name for card in CATALOG)})?$"),
    _described("cpu, cuda, cuda:n, or a card that is not here, such as t4. Empty: the config's device."),
]
RunDir = Annotated[
    str,
    _described("Directory of the run; one that holds the same config goes on. Empty: a new one under runs."),
]
Resume = Annotated[bool, _described("Go on with the newest unfinished run of the same config, if there is one.")]
Fresh = Annotated[bool, _described("Reuse nothing of earlier runs: prepare, plan and train again.")]
Runs = Annotated[str, _described("Folder where runs are kept. Empty: $MEMFIT_RUNS of where it runs, else runs.")]
Store = Annotated[
    str, _described("Folder of prepared data and plans. Empty: $MEMFIT_STORE of where it runs, else store.")
]


def read_parameters(config: str, overrides: tuple[str, ...], budget: str, device: str) -> RunConfig:
    """Return the config that a flow's parameters describe. Raises: ConfigError."""
    return load_config(Path(config), with_shortcuts(list(overrides), budget or None, device or None))


def open_directory(config: RunConfig, *, run_dir: str, resume: bool, fresh: bool, runs: str, store: str) -> Pipeline:
    """Make or find the run's directory, as an absolute path. A flow run that Prefect starts again goes on."""
    again = (flow_run.run_count or 0) > 1
    return open_run(
        config,
        runs=_folder(runs, "MEMFIT_RUNS", "runs"),
        store=_folder(store, "MEMFIT_STORE", "store"),
        run_dir=Path(run_dir).resolve() if run_dir else None,
        resume=resume or again,
        fresh=fresh,
    )


def _folder(given: str, variable: str, default: str) -> Path:
    """Choose a folder as the command line does: what is given, else the environment's, else the default."""
    return Path(given or os.environ.get(variable) or default).resolve()


def name_from_config() -> str:
    """Name a flow run by its config and start, such as `smoke 2026-01-31 02:00:00`."""
    given = flow_run.parameters
    try:
        keys = ("config", "overrides", "budget", "device")
        name = read_parameters(**{key: given[key] for key in keys}).name
    except ConfigError:  # the run itself will say what is wrong
        name = Path(given["config"]).stem
    return f"{name} {flow_run.scheduled_start_time:%Y-%m-%d %H:%M:%S}"
