"""One Prefect test server and one trained run for all tests of the flows.

They end with this folder's last test: Prefect's client draws from `random` in a thread of its own, which other tests
hold still.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flows  # noqa: F401  (before Prefect: it settles what that may do)

# isort: split
import pytest
from prefect import get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.settings import PREFECT_HOME, temporary_settings
from prefect.testing.utilities import prefect_test_harness

from tests.flows import service

ROOT = Path(__file__).parents[2]
SMALL = (
    "stages.0.global_batch_size=2",
    "stages.1.global_batch_size=1",
    "stages.0.max_steps=4",
    "stages.1.max_steps=2",
    "plan.checkpointing=['none']",
)
"""Overrides of configs/smoke.toml that leave every step in place, and little to plan."""


class Trained(NamedTuple):
    """A run of the flow, and where it put things."""

    summary: dict[str, Any]
    parameters: dict[str, Any]
    flow_run_id: Any


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def small() -> list[str]:
    return list(SMALL)


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., Any]:
    return service.wait_until


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Where the session's runs and prepared data are: what one test planned, the next need not plan again."""
    base = tmp_path_factory.mktemp("memfit")
    return {"runs": str(base / "runs"), "store": str(base / "store")}


@pytest.fixture(scope="package")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    home = tmp_path_factory.mktemp("prefect-home")
    with temporary_settings({PREFECT_HOME: home}), prefect_test_harness(server_startup_timeout=60):
        yield


@pytest.fixture(scope="package")
def client(prefect_api: None) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as found:
        yield found


@pytest.fixture(scope="package")
def trained(client: SyncPrefectClient, folders: dict[str, str]) -> Trained:
    from flows.train_model import train_model

    parameters = {"config": str(ROOT / "configs" / "smoke.toml"), "overrides": SMALL, **folders}
    summary = train_model(**parameters)
    flow_run = client.read_flow_runs()[0]
    return Trained(summary, parameters, flow_run.id)
