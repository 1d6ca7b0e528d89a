"""Install on the Prefect server what memfit's runs rely on; what is there already is brought up to date.

PREFECT_API_URL=http://127.0.0.1:4200/api python -m flows.prepare_server --device cuda:0
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Annotated, Any

import httpx
import typer
from prefect import get_client
from prefect.automations import AutomationCore, ChangeFlowRunState, EventTrigger, Posture
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import StateType
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings

from flows.ownership import slot_name
from memfit.errors import ConfigError, MemfitError

HEARTBEAT_SECONDS = 30
"""How often a flow run says that it lives: PREFECT_FLOWS_HEARTBEAT_FREQUENCY in prefect.yaml, Prefect's minimum."""
CRASH_AFTER_SECONDS = 3 * HEARTBEAT_SECONDS
AUTOMATION = "memfit: a run without a heartbeat has crashed"
FLOWS = ("train-model", "plan-memory")
LEASES_ON_DISK = "prefect.server.concurrency.lease_storage.filesystem"
_ENDS = ("Completed", "Failed", "TimedOut", "Crashed", "Cancelled", "Paused", "Suspended", "AwaitingRetry")
"""States in which heartbeats stop and nothing is wrong."""
_OURS = ("description", "trigger", "actions")
"""What of the automation is brought up to date; whether it is switched on is the server's matter."""
CrashAfter = Annotated[
    int, typer.Option(min=10, metavar="SECONDS", help="How long after its last heartbeat a run counts as crashed.")
]


def heartbeat_automation(crash_after: int) -> AutomationCore:
    """Describe the automation that marks memfit's runs as Crashed, `crash_after` seconds after their last heartbeat."""
    heartbeat = "prefect.flow-run.heartbeat"
    return AutomationCore(
        name=AUTOMATION,
        description="Its process, its worker or its machine was killed. The next run of its config goes on.",
        trigger=EventTrigger(
            after={heartbeat},
            expect={heartbeat, *(f"prefect.flow-run.{name}" for name in _ENDS)},
            match={"prefect.resource.id": "prefect.flow-run.*"},
            match_related={"prefect.resource.role": "flow", "prefect.resource.name": list(FLOWS)},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=crash_after),
        ),
        actions=[
            ChangeFlowRunState(
                name="Crashed",
                state=StateType.CRASHED,
                force=False,
                message=f"no heartbeat for {crash_after} s: the process, its worker or its machine is gone",
            )
        ],
    )


def install(client: SyncPrefectClient, devices: Sequence[str], crash_after: int) -> dict[str, str]:
    """Install the automation and a limit of one run for every device; return what was done to each."""
    done = {f"automation {AUTOMATION!r}, after {crash_after} s": _install_automation(client, crash_after)}
    for name in map(slot_name, devices):
        done[f"concurrency limit {name!r}, 1 run"] = _install_limit(client, name)
    return done


def _install_automation(client: SyncPrefectClient, crash_after: int) -> str:
    automation = heartbeat_automation(crash_after)
    known = client.read_automations_by_name(AUTOMATION)
    for copy in known[1:]:
        client.delete_automation(copy.id)
    if not known:
        client.create_automation(automation)
        return "created"
    if len(known) == 1 and all(getattr(known[0], name) == getattr(automation, name) for name in _OURS):
        return "unchanged"
    client.update_automation(known[0].id, automation)
    return "changed"


def _install_limit(client: SyncPrefectClient, name: str) -> str:
    try:
        known = client.read_global_concurrency_limit_by_name(name)
    except ObjectNotFound:
        known = None
    if known is not None and known.active and known.limit == 1:
        return "unchanged"
    client.upsert_global_concurrency_limit_by_name(name, 1)
    return "created" if known is None else "changed"


def lease_warning(client: SyncPrefectClient) -> str | None:
    """Tell whether the server forgets on a restart who holds which slot; None where it does not."""
    answer: dict[str, Any] = client.request("GET", "/admin/settings").json()
    storage = answer["server"]["concurrency"]["lease_storage"]
    if not storage.endswith(".memory"):
        return None
    return (
        "the server keeps leases in memory: when it is restarted, it ends runs of deployments with a concurrency limit "
        "within minutes, and slots stay taken for ever. Start it with "
        f"PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE={LEASES_ON_DISK}"
    )


def warn_of_leases(client: SyncPrefectClient) -> None:
    """Print the warning of `lease_warning` on stderr, if there is one."""
    if (warning := lease_warning(client)) is not None:
        typer.echo(f"warning: {warning}", err=True)


@contextmanager
def connected() -> Iterator[SyncPrefectClient]:
    """Talk to the server of PREFECT_API_URL while the block runs. Raises: ConfigError where that does not answer."""
    url = get_current_settings().api.url
    if not url:
        raise ConfigError(
            "expected the URL of a Prefect server, got none. Start one (prefect server start), and set PREFECT_API_URL."
        )
    try:
        with get_client(sync_client=True) as client:
            yield client
    except httpx.TransportError as error:
        raise ConfigError(
            f"PREFECT_API_URL: expected a Prefect server at {url}, got: {error}. Start it, or mend the URL."
        ) from error
    except httpx.HTTPStatusError as error:
        if error.response.status_code not in (401, 403):
            raise
        raise ConfigError(
            f"{url}: expected to be let in, got status {error.response.status_code}. "
            "Set PREFECT_API_AUTH_STRING to the server's user:password, or PREFECT_API_KEY."
        ) from error


def _command(
    device: Annotated[
        list[str] | None,
        typer.Option(
            metavar="cuda:N",
            help="A CUDA device of a worker, counted as nvidia-smi does: one run at a time. Repeat for several.",
        ),
    ] = None,
    crash_after: CrashAfter = CRASH_AFTER_SECONDS,
) -> None:
    """Install memfit's heartbeat automation, and concurrency limits of CUDA devices, on the server of PREFECT_API_URL.

    Run it again at any time: nothing is installed twice. Where several machines share a server, set MEMFIT_MACHINE
    here and in each machine's worker to a name of the machine: limits are then per machine.
    """
    with connected() as client:
        for thing, what in install(client, device or [], crash_after).items():
            typer.echo(f"{thing}: {what}")
        warn_of_leases(client)


def run_command(command: Callable[..., None]) -> None:
    """Run a command line; errors go to stderr as one message, with an exit status of their own."""
    application = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    application.command()(command)
    try:
        application()
    except MemfitError as error:
        typer.echo(f"memfit: {type(error).__name__}: {error}", err=True)
        sys.exit(error.exit_status)


def main() -> None:
    """Run this module's command."""
    run_command(_command)


if __name__ == "__main__":
    main()
