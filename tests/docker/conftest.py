import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docker import engine as engines
from tests.docker.engine import Engine


@pytest.fixture(scope="session")
def engine(tmp_path_factory) -> Iterator[Engine]:
    """An engine of the tests' own with a stand-in for the base. MEMFIT_ENGINE names a folder that is kept for later."""
    if lacks := engines.missing():
        why = f"a container engine needs {', '.join(lacks)} (apt-get install docker.io docker-compose debootstrap)"
        pytest.fail(why) if os.environ.get("CI") else pytest.skip(why)
    kept = os.environ.get("MEMFIT_ENGINE")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("engine")
    with engines.running(folder) as started:
        yield started
    if not kept:
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def image(engine) -> str:
    """The CPU target, as `make image` builds it."""
    engine.make("image", "TARGET=cpu", "ARGS=--network host")
    return "memfit:cpu"


@pytest.fixture
def volume(engine) -> Iterator[str]:
    """A new volume."""
    name = engine.docker("volume", "create").stdout.strip()
    yield name
    engine.docker("volume", "rm", "--force", name)
