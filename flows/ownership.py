"""What a flow run owns while it works: its run's directory and its device; and whose it is: its worker's."""

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import httpx
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency
from prefect.exceptions import PrefectException
from prefect.logging import get_run_logger
from prefect.settings import get_current_settings
from rich.console import Console

from flows.parent import when_gone
from memfit.errors import ConfigError
from memfit.locks import visible_device
from memfit.pipeline import Pipeline

LEASE_SECONDS = 60
"""How long the slot of a run that was killed stays taken: the least that Prefect allows."""


@contextmanager
def owned(pipeline: Pipeline) -> Iterator[None]:
    """Own the run's directory and its device while the block runs; wait for the device's turn, and end with the worker.

    Raises: RunStateError that names the owner of a directory or device in use; ConfigError for a missing limit.
    """
    end_with_worker()
    with pipeline.locked(device_slot(pipeline.used_device)):
        yield


@contextmanager
def device_slot(device: str) -> Iterator[None]:
    """Hold the server's one slot of a CUDA device while the block runs; wait until it is free.

    The cpu is shared, and a temporary server serves one run: there is no slot then; nor where the run has been given a
    device for itself, as a pod is (MEMFIT_OWN_DEVICE=true). A server that is away when the lease is to be renewed or
    given back does not end the run: the device's lock file still keeps others off.
    Raises: ConfigError where the server has no such limit.
    """
    if device == "cpu" or get_current_settings().api.url is None or os.environ.get("MEMFIT_OWN_DEVICE") == "true":
        yield
        return
    name, logger, held = slot_name(device), get_run_logger(), ExitStack()
    logger.info("waiting for the slot %s", name)
    try:
        slot = concurrency(name, lease_duration=LEASE_SECONDS, strict=True, raise_on_lease_renewal_failure=False)
        held.enter_context(slot)
    except ConcurrencySlotAcquisitionError as error:
        raise ConfigError(
            f"device {device}: expected a concurrency limit {name!r} on the server, so that two runs never share "
            f"the card, got: {error}. Install it: python -m flows.prepare_server --device {device}"
        ) from error
    try:
        yield
    finally:
        try:
            held.close()
        except (httpx.HTTPError, PrefectException) as error:
            logger.warning("the slot %s was not given back; its lease ends in %d s: %r", name, LEASE_SECONDS, error)


def slot_name(device: str) -> str:
    """Name the concurrency limit of a device: memfit-cuda-0, or memfit-$MEMFIT_MACHINE-cuda-0 where that is set.

    Devices are counted as the driver does, whatever CUDA_VISIBLE_DEVICES leaves of them.
    """
    return "-".join(filter(None, ["memfit", os.environ.get("MEMFIT_MACHINE"), visible_device(device)]))


def end_with_worker() -> None:
    """Stop this flow run, as SIGTERM does, when the worker that started it is gone.

    The training child then writes its checkpoint, and the run ends as Crashed; without its worker it could not be
    cancelled any more. A flow that a person started is left alone.
    """
    if "PREFECT__FLOW_RUN_ID" in os.environ:
        Console.on_broken_pipe = _go_on  # type: ignore[assignment,method-assign]
        when_gone(os.getppid(), lambda: os.kill(os.getpid(), signal.SIGTERM))


def _go_on(console: Console) -> None:
    """Print no more: the worker that showed it is gone. rich would exit, in the middle of whatever is logged."""
    console.quiet = True
