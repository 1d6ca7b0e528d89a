"""Run a flow from the command line, with the options, the summary and the exit statuses of `memfit`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from prefect import Flow, get_client, tags
from prefect.exceptions import ParameterTypeError
from prefect.settings import get_current_settings

from flows.flow_parameters import read_parameters
from flows.prefect_logs import follow_log_format
from memfit import cli
from memfit.command import LogFormatOption, output, run_application
from memfit.errors import ConfigError, Resumable
from memfit.log_lines import LogFormat

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="A TOML config.")]


def run_from_command_line(flow: Flow[..., dict[str, Any]]) -> None:
    """Parse the arguments and run the flow; errors are told in one message, with an exit status of their own."""
    run_application(_application(flow))


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
        _log_format: LogFormatOption = LogFormat.text,
    ) -> None:
        follow_log_format()
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
        output().finish(summary, as_json=as_json)

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
