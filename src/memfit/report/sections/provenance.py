"""Where the result comes from: the run's steps, the machine, the versions, the resolved config."""

from typing import Any

from memfit.report.blocks import (
    Block,
    Cell,
    Code,
    Column,
    Details,
    Facts,
    Row,
    Section,
    Table,
    absent,
    measured,
    pending,
    text_cell,
)
from memfit.report.run_files import Run, mapping, objects
from memfit.report.units import bytes_text, capitalized, finite, seconds_text, time_text

_STATUS = {"ran": "good", "reused": "muted", "running": "warn"}


def steps(run: Run) -> Section:
    """List the run's steps: which ran, which were reused and from where, and how long each took."""
    title = "Steps of this run"
    listed = objects(run.info.get("steps"))
    if not listed:
        return pending("steps", title, "no step is recorded")
    longest = max([finite(step.get("seconds")) or 0.0 for step in listed]) or 1.0
    rows = tuple(Row(_step_cells(step, longest)) for step in listed)
    names = ("Step", "Status", "Seconds", "Reused from", "Fingerprint")
    total = sum(finite(step.get("seconds")) or 0.0 for step in listed)
    return Section("steps", title, (Table(tuple(map(Column, names)), rows),), lead=f"{seconds_text(total)} in all.")


def _step_cells(step: dict[str, Any], longest: float) -> tuple[Cell, ...]:
    status = str(step.get("status") or "")
    seconds = finite(step.get("seconds"))
    timed = absent("under way, or not timed") if seconds is None else Cell(seconds_text(seconds), bar=seconds / longest)
    return (
        text_cell(step.get("name")),
        Cell(status or "–", tone=_STATUS.get(status, "")),
        timed,
        text_cell(step.get("from_run"), "it was not reused"),
        Cell(str(step.get("fingerprint") or "–"), tone="code"),
    )


def environment(run: Run) -> Section:
    """List the machine and the versions."""
    title = "Environment"
    if not run.info:
        return pending("environment", title, "run.json has not been written")
    pairs: list[tuple[str, Cell]] = [
        ("memfit", text_cell(run.info.get("memfit_version"))),
        ("Code version", _plain(run.info.get("code_version"))),
    ]
    for key, value in mapping(run.info, "environment").items():
        name = capitalized(key.removesuffix("_bytes").removeprefix("num_"))
        pairs.append((name, measured(value, bytes_text, "not known") if key.endswith("_bytes") else _plain(value)))
    for key in ("created", "finished"):
        value = run.info.get(key)
        pairs.append((key.capitalize(), Cell(time_text(value)) if value else absent("not yet")))
    return Section("environment", title, (Facts(tuple(pairs)),))


def _plain(value: Any) -> Cell:
    if isinstance(value, dict):
        return Cell(", ".join(f"{key} {item}" for key, item in value.items()))
    return text_cell(value, "not known")


def config(run: Run) -> Section:
    """Show the resolved config, which reproduces the run."""
    title = "Config"
    if not run.config_text:
        return pending("config", title, "config.toml has not been written")
    lines = len(run.config_text.splitlines())
    blocks: tuple[Block, ...] = (Details(f"config.toml, resolved ({lines} lines)", (Code(run.config_text),)),)
    return Section("config", title, blocks, lead="Every default and every override written out.")
