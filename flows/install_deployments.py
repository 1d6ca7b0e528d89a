"""Install all of memfit on the Prefect server: work pools, limits, the automation, and what prefect.yaml deploys.

PREFECT_API_URL=http://127.0.0.1:4200/api python -m flows.install_deployments
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterTags
from prefect.client.schemas.responses import DeploymentResponse

from flows import prefect_file
from flows.prefect_file import Key
from flows.prepare_server import CRASH_AFTER_SECONDS, FLOWS, CrashAfter, connected, install, run_command, warn_of_leases
from flows.work_pools import install_pools

TAG = "memfit"
"""Marks the deployments that are removed when prefect.yaml no longer has them."""
_COMPARED = (
    "description",
    "tags",
    "parameters",
    "parameter_openapi_schema",
    "enforce_parameter_schema",
    "pull_steps",
    "work_pool_name",
    "job_variables",
    "concurrency_options",
    "paused",
)


def install_deployments(client: SyncPrefectClient, document: Mapping[str, Any]) -> dict[str, str]:
    """Bring the server's deployments to what a document asks for; return what was done to each thing by name.

    Schedules that the document lacks go before Prefect deploys, which would leave them; deployments go after.
    Raises: ConfigError.
    """
    before, wanted = read_deployments(client), prefect_file.deployments_of(document)
    done = remove_schedules(client, before, wanted)
    prefect_file.deploy(prefect_file.with_states(document, before))
    after = read_deployments(client)
    flow_names = {flow.id: flow.name for flow in client.read_flows()}
    for key, deployment in after.items():
        name = f"deployment {flow_names[deployment.flow_id]}/{deployment.name}"
        if key in wanted:
            done[name] = compare(before.get(key), deployment)
        elif flow_names[deployment.flow_id] in FLOWS:
            client.delete_deployment(deployment.id)
            done[name] = "removed"
    return done


def read_deployments(client: SyncPrefectClient) -> dict[Key, DeploymentResponse]:
    """Return the server's deployments that carry memfit's tag, by entrypoint and name."""
    tagged = DeploymentFilter(tags=DeploymentFilterTags(all_=[TAG]))
    found: list[DeploymentResponse] = []
    while page := client.read_deployments(deployment_filter=tagged, limit=100, offset=len(found)):
        found += page
    return {(each.entrypoint or "", each.name): each for each in found}


def remove_schedules(
    client: SyncPrefectClient, known: Mapping[Key, DeploymentResponse], wanted: Mapping[Key, Mapping[str, Any]]
) -> dict[str, str]:
    """Delete the schedules of wanted deployments that their document lacks; return what was done."""
    done = {}
    for key in sorted(known.keys() & wanted.keys()):
        slugs = prefect_file.slugs_of(wanted[key])
        for schedule in known[key].schedules:
            if schedule.slug not in slugs:
                client.delete_deployment_schedule(known[key].id, schedule.id)
                done[f"schedule {schedule.slug or schedule.id} of {key[1]}"] = "removed"
    return done


def switched(document: Mapping[str, Any], known: Mapping[Key, DeploymentResponse]) -> list[str]:
    """Return a line for every schedule that was switched on or off on the server, against what its document says."""
    lines = []
    for key, deployment in prefect_file.deployments_of(document).items():
        asked = {each["slug"]: prefect_file.is_active(each) for each in deployment.get("schedules") or []}
        for schedule in known[key].schedules:
            if schedule.active != asked[schedule.slug]:
                state = "on" if schedule.active else "off"
                lines.append(f"schedule {schedule.slug} of {key[1]}: {state}, as it was switched on the server")
    return lines


def compare(before: DeploymentResponse | None, after: DeploymentResponse) -> str:
    """Say how a deployment differs from what it was."""
    if before is None:
        return "created"
    old, new = _content(before), _content(after)
    changed = [name for name in new if old[name] != new[name]]
    return f"changed ({', '.join(changed)})" if changed else "unchanged"


def _content(deployment: DeploymentResponse) -> dict[str, Any]:
    limit = deployment.global_concurrency_limit
    schedules = [(each.slug, each.active, each.schedule, each.parameters) for each in deployment.schedules]
    return {
        **{name: getattr(deployment, name) for name in _COMPARED},
        "concurrency_limit": limit and limit.limit,
        "schedules": sorted(schedules, key=lambda each: str(each[0])),
    }


def _command(
    device: Annotated[
        list[str] | None,
        typer.Option(
            metavar="cuda:N",
            help="A CUDA device of a worker: one run at a time. Repeat for several; cuda:0 if not given.",
        ),
    ] = None,
    network: Annotated[
        list[str] | None,
        typer.Option(
            envvar="MEMFIT_NETWORK",
            help="A Docker network that flow runs join, to reach the server by the name that the worker uses.",
        ),
    ] = None,
    file: Annotated[Path, typer.Option("--prefect-file", metavar="FILE", help="What is deployed.")] = prefect_file.ROOT
    / "prefect.yaml",
    crash_after: CrashAfter = CRASH_AFTER_SECONDS,
) -> None:
    """Install work pools, the heartbeat automation, limits of CUDA devices, and all deployments on the Prefect server.

    Run it again at any time: what is as it should be is left alone, and what prefect.yaml no longer has is removed:
    schedules, and deployments of memfit's flows with the tag memfit. What was switched on or off on the server stays.
    """
    document = prefect_file.read_prefect_file(file)
    with connected() as client:
        done = install_pools(client, network or [])
        done |= install(client, device or ["cuda:0"], crash_after)
        done |= install_deployments(client, document)
        for thing, what in done.items():
            typer.echo(f"{thing}: {what}")
        for line in switched(document, read_deployments(client)):
            typer.echo(line)
        changes = sum(what != "unchanged" for what in done.values())
        typer.echo(f"{changes} changes" if changes else "nothing changed")
        warn_of_leases(client)


if __name__ == "__main__":
    run_command(_command)
