"""What every command line shares: the log format, and one message with an exit status where it fails."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from memfit.errors import MemfitError
from memfit.log_lines import VARIABLE, LogFormat

if TYPE_CHECKING:
    from memfit.output import Output

UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""A command line that does not parse, as the command line library calls it."""


def _choose(wanted: LogFormat) -> LogFormat:
    """Let the rest of this process, and its children, speak so."""
    os.environ[VARIABLE] = wanted
    return wanted


LogFormatOption = Annotated[
    LogFormat,
    typer.Option(
        "--log-format",
        envvar=VARIABLE,
        callback=_choose,
        is_eager=True,
        help="json: every line, the answer too, goes to stdout as one JSON object.",
    ),
]


def output() -> "Output":
    """Return what speaks for the command, as $MEMFIT_LOG_FORMAT asks for."""
    from memfit.output import chosen  # rich takes a tenth of a second: not for --help

    return chosen()


@contextmanager
def telling_failures(to: "Output") -> Iterator[None]:
    """Have an output that knows its run tell of a failure of the block; end with its exit status."""
    try:
        yield
    except MemfitError as error:
        to.fail(error)
        raise typer.Exit(error.exit_status) from error


def run_application(application: typer.Typer) -> NoReturn:
    """Run a command line and end the process; whatever ended it is told, and has an exit status of its own.

    SIGTERM becomes a KeyboardInterrupt, so that children end before this process does.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    sys.excepthook = _crash
    try:
        status = typer.main.get_command(application)(standalone_mode=False)
    except MemfitError as error:
        output().fail(error)
        status = error.exit_status
    except UsageError as error:
        output().misuse(error)
        status = error.exit_code  # type: ignore[attr-defined]
    sys.exit(status)


def _interrupt(_signal: int, _frame: Any) -> None:
    raise KeyboardInterrupt


def _crash(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    output().crash(kind, error, trace)
