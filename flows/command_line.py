"""Run a flow from the command line, with the options, the summary and the exit statuses of `memfit`."""

import json
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from prefect import Flow, get_client, tags
from prefect.exceptions import ParameterTypeError
from prefect.settings import get_current_settings

from flows.flow_parameters import read_parameters
from memfit import cli
from memfit.console import show_summary, stderr_console
from memfit.errors import ConfigError, MemfitError, Resumable

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="A TOML config.")]


def run_from_command_line(flow: Flow[..., dict[str, Any]]) -> None:
    """Parse the arguments and run the flow; errors go to stderr as one message, with an exit status of their own.

    SIGTERM becomes an exception, so that the training child and the temporary server end before this process does.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        _application(flow)()
    except MemfitError as error:
        typer.echo(f"memfit: {type(error).__name__}: {error}", err=True)
        sys.exit(error.exit_status)


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _application(flow: Flow[..., dict[str, Any]]) -> typer.Typer:
    application = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

    @application.command(help=f"{flow.description} Runs as the Prefect flow {flow.name!r}.")
    def command(
        config: Config,
        overrides: cli.Overrides = None,
        budget: cli.Budget = None,
        device: cli.Device = None,
        run_dir: cli.RunDir = None,
        resume: cli.Resume = False,
        fresh: cli.Fresh = False,
        as_json: cli.Json = False,
        runs: cli.Runs = Path("runs"),
        store: cli.Store = Path("store"),
    ) -> None:
        parameters = {
            "config": str(config),
            "overrides": tuple(overrides or ()),
            "budget": budget or "",
            "device": device or "",
            "run_dir": str(run_dir or ""),
            "resume": resume,
            "fresh": fresh,
            "runs": str(runs),
            "store": str(store),
        }
        summary = _run(flow, parameters)
        show_summary(stderr_console(), summary)
        if as_json:
            typer.echo(json.dumps(summary, indent=2))

    return application


def _run(flow: Flow[..., dict[str, Any]], parameters: dict[str, Any]) -> dict[str, Any]:
    """Run the flow once its parameters and its config are known to be good: a bad one makes no flow run."""
    config = read_parameters(*(parameters[key] for key in ("config", "overrides", "budget", "device")))
    try:
        flow.validate_parameters(parameters)
    except ParameterTypeError as error:
        raise ConfigError(str(error)) from None
    _reach_server()
    try:
        with tags(config.name):
            summary: dict[str, Any] = flow(**parameters)
    except KeyboardInterrupt:
        raise Resumable("stopped on request. Go on with --resume.") from None
    return summary


def _reach_server() -> None:
    """Start the temporary server now, if no API is configured, and see that the API answers."""
    settings = get_current_settings()
    if settings.api.url is None and settings.server.ephemeral.enabled:
        from flows.temporary_server import TemporaryServer  # with all of Prefect's server: not for those who have one

        TemporaryServer().start()
    with get_client(sync_client=True):
        pass
