"""prefect.yaml as memfit deploys it: what it asks for, beside what a server has."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from prefect.client.schemas.responses import DeploymentResponse

from memfit.errors import ConfigError

ROOT = Path(__file__).parents[1]
"""Where entrypoints and configs are looked for: the checkout, or its copy in the image."""
Key = tuple[str, str]
"""Entrypoint and name of a deployment."""


def read_prefect_file(path: Path) -> dict[str, Any]:
    """Read deployments from YAML. Raises: ConfigError."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        found = deployments_of(document)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: expected YAML with deployments, each with a name and an entrypoint, got: {error!r}. Mend it."
        ) from error
    for deployment in found.values():
        for schedule in deployment.get("schedules") or []:
            if "slug" not in schedule:
                raise ConfigError(
                    f"{path}, deployment {deployment['name']}: expected a slug for every schedule, by which the server "
                    f"knows it again, got {schedule}. Add one."
                )
    return dict(document)


def deployments_of(document: Mapping[str, Any]) -> dict[Key, dict[str, Any]]:
    """Return a document's deployments by entrypoint and name."""
    return {(each["entrypoint"], each["name"]): each for each in document["deployments"]}


def slugs_of(deployment: Mapping[str, Any]) -> set[str]:
    """Return the slugs of a deployment's schedules."""
    return {schedule["slug"] for schedule in deployment.get("schedules") or []}


def with_states(document: Mapping[str, Any], known: Mapping[Key, DeploymentResponse]) -> dict[str, Any]:
    """Return the document with what was switched on or off on the server as it is there: Prefect would switch it back.

    So `active` says how a schedule begins, and `paused` how a deployment does.
    """
    kept = {**document, "deployments": [dict(each) for each in document["deployments"]]}
    for key, deployment in deployments_of(kept).items():
        if key in known:
            active = {schedule.slug: schedule.active for schedule in known[key].schedules}
            asked = deployment.get("schedules") or []
            deployment["schedules"] = [{**each, "active": active.get(each["slug"], is_active(each))} for each in asked]
            deployment["paused"] = known[key].paused
    return kept


def is_active(schedule: Mapping[str, Any]) -> bool:
    """Tell whether a schedule begins switched on: it does unless it says otherwise."""
    return bool(schedule.get("active", True))


def deploy(document: Mapping[str, Any]) -> None:
    """Have Prefect deploy all of a document. Raises: ConfigError with Prefect's words.

    Without MEMFIT_HOME, whose value Prefect would write into the pull steps of every deployment.
    """
    environment = {name: value for name, value in os.environ.items() if name != "MEMFIT_HOME"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prefect.yaml"
        file.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
        line = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(file)]
        done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-20:])
        raise ConfigError(f"prefect deploy: expected exit status 0, got {done.returncode}:\n{said}")
