"""Artifacts are for people: a server that does not answer costs one, and not the run."""

from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from prefect.exceptions import PrefectException
from prefect.logging import get_run_logger


@contextmanager
def published(what: str) -> Iterator[None]:
    """Publish something while the block runs; if the server refuses or does not answer, warn and go on."""
    try:
        yield
    except (httpx.HTTPError, PrefectException, RuntimeError) as error:  # the last: a client that was closed meanwhile
        get_run_logger().warning("%s was not shown: %r", what, error)
