"""memfit's work pools, one per kind of infrastructure: what a worker of each may be told, and what it starts."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.objects import WorkPool
from prefect.exceptions import ObjectNotFound
from prefect.workers.process import ProcessWorker

from memfit.errors import ConfigError

POOLS = {"memfit-process": "process", "memfit-docker": "docker", "memfit-kubernetes": "kubernetes"}
"""Name and worker type of every pool."""
HANDED_ON = ("MEMFIT_MACHINE", "MEMFIT_LOG_FORMAT")
"""Variables of whoever installs a Docker pool that its containers get: a worker hands on none of its own."""
TEMPLATES = Path(__file__).parents[1] / "docker" / "pools"


def read_template(
    kind: str, networks: Sequence[str] = (), environment: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Any]:
    """Return the base job template of a kind of pool; Docker containers join the `networks`, in this environment."""
    if kind == "process":
        return ProcessWorker.get_default_base_job_template()
    template: dict[str, Any] = json.loads((TEMPLATES / f"{kind}.json").read_text(encoding="utf-8"))
    properties = template["variables"]["properties"]
    if kind == "docker":
        properties["networks"]["default"] = list(networks)
        properties["env"]["default"].update(environment)
    return template


def install_pools(client: SyncPrefectClient, networks: Sequence[str]) -> dict[str, str]:
    """Make the pools that are missing, and bring the others' templates up to date; return what was done to each.

    A process pool that is there is left as it is: its template is Prefect's own.
    Raises: ConfigError for a pool of another type.
    """
    environment = {name: os.environ[name] for name in HANDED_ON if os.environ.get(name)}
    templates = {name: read_template(kind, networks, environment) for name, kind in POOLS.items()}
    return {f"work pool {name}": _install(client, name, POOLS[name], each) for name, each in templates.items()}


def _install(client: SyncPrefectClient, name: str, kind: str, template: dict[str, Any]) -> str:
    known = _read(client, name)
    if known is None:
        client.create_work_pool(WorkPoolCreate(name=name, type=kind, base_job_template=template))
        return "created"
    if known.type != kind:
        raise ConfigError(
            f"work pool {name!r}: expected type {kind!r}, got {known.type!r}. Delete it, or take another server."
        )
    if kind == "process" or known.base_job_template == template:
        return "unchanged"
    client.update_work_pool(name, WorkPoolUpdate(base_job_template=template))
    return "changed (base job template)"


def _read(client: SyncPrefectClient, name: str) -> WorkPool | None:
    try:
        return client.read_work_pool(name)
    except ObjectNotFound:
        return None
