"""How a command speaks: in text to a person, or in lines of JSON to a container platform."""

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from memfit.console import RunView, show_oom, show_summary, stderr_console
from memfit.errors import MemfitError, Resumable
from memfit.log_lines import VARIABLE, LogFormat, error_fields, log_line
from memfit.process import Emit
from memfit.report.gate import gate_sentence

Write = Callable[[str, str, dict[str, Any]], None]
"""Takes a line's level, its message and its facts."""
_WARNINGS = ("warning", "restart", "layout", "spike", "health")
_BULKY = ("probes", "timeline", "samples", "layers", "recurrent")
"""Fields of events that fill pages, and are in the run's files."""


class Screen:
    """Text: progress and tables on stderr, and on stdout the answer alone."""

    def __init__(self) -> None:
        self._console = stderr_console()
        self.on_event: Emit = RunView(self._console)

    def begin(self, run_id: str, name: str, path: str) -> None:
        """Say which run this is."""
        self._console.print(f"run {run_id} of {name!r} in {path}", soft_wrap=True)

    def finish(self, summary: dict[str, Any], *, as_json: bool) -> None:
        """Show tables, and how the model is used."""
        show_summary(self._console, summary)
        if as_json:
            typer.echo(json.dumps(summary, indent=2))

    def answer(self, kind: str, document: dict[str, Any], text: str, *, as_json: bool) -> None:  # noqa: ARG002
        """Print the text, or the document."""
        typer.echo(json.dumps(document, indent=2) if as_json else text)

    def continue_text(self, prompt: str, pieces: Iterable[str], *, as_json: bool) -> None:
        """Print the text as it comes."""
        if as_json:
            typer.echo(json.dumps({"prompt": prompt, "text": "".join(pieces)}))
            return
        typer.echo(prompt, nl=False)
        for piece in pieces:
            typer.echo(piece, nl=False)
        typer.echo()

    def explain(self, report: dict[str, Any], *, as_json: bool) -> None:
        """Show tables of what was held."""
        show_oom(self._console, report)
        if as_json:
            typer.echo(json.dumps(report, indent=2))

    def fail(self, error: MemfitError) -> None:
        """Print one message."""
        typer.echo(f"memfit: {type(error).__name__}: {error}", err=True)

    def misuse(self, error: Any) -> None:
        """Print the usage."""
        error.show()

    def crash(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Print the traceback."""
        sys.__excepthook__(kind, error, trace)


class LineView:
    """Turns events into the lines that a person would read, each with its level and its facts."""

    def __init__(self, write: Write) -> None:
        self.run: dict[str, str] = {}
        """run_id and name, as soon as they are known."""
        self._write, self._step = write, ""
        self._page = _Page()
        self._view = RunView(self._page)

    def __call__(self, event: dict[str, Any]) -> None:
        """Write what is to be said of one event."""
        kind = event["event"]
        self._step = event["step"] if kind == "step_start" else self._step
        self._view(event)
        level = "warning" if kind in _WARNINGS else "info"
        for line in self._page.take():
            self.say(level, line, kind, _fields(event, self._step))
        self._step = "" if kind == "step_end" else self._step

    def say(self, level: str, message: str, kind: str, fields: dict[str, Any]) -> None:
        """Write one line."""
        step = {"step": self._step} if self._step else {}
        self._write(level, message, {"event": kind, **self.run, **step, "fields": fields})


class _Page(Console):
    """A console that keeps its lines, as plain text."""

    def __init__(self) -> None:
        super().__init__(quiet=True, force_terminal=False)
        self._lines: list[str] = []

    def print(self, *objects: Any, **_options: Any) -> None:
        self._lines.append(" ".join(Text.from_markup(str(thing)).plain for thing in objects).strip())

    def take(self) -> list[str]:
        taken, self._lines = self._lines, []
        return taken


def _fields(event: Mapping[str, Any], step: str) -> dict[str, Any]:
    """Return an event's own facts, without what fills pages and without the step, which every line names."""
    return {
        name: _fields(value, step) if isinstance(value, Mapping) else value
        for name, value in event.items()
        if name not in (*_BULKY, "event") and (value != step or not step)
    }


class LogLines:
    """Lines of JSON on stdout, and nothing else."""

    def __init__(self) -> None:
        self.on_event: LineView = LineView(_print)

    def begin(self, run_id: str, name: str, path: str) -> None:
        """Name the run in this line and every later one."""
        self.on_event.run = {"run_id": run_id, "name": name}
        self.on_event.say("info", f"run {run_id} of {name!r} in {path}", "run", {"run_dir": path})

    def finish(self, summary: dict[str, Any], *, as_json: bool) -> None:
        """Say what came of it in one line; with `as_json` the last line holds the whole summary."""
        self.on_event.run = {"run_id": summary["run_id"], "name": summary["name"]}
        gate = summary.get("gate")
        told = f"finished {summary['run_id']}. {gate_sentence(gate) if gate else ''}".strip()
        kept = ("run_dir", "files", "metrics", "baselines", "gate", "unit")
        self.on_event.say("info", told, "finished", {name: summary.get(name) for name in kept})
        if as_json:
            self.on_event.say("info", "summary", "summary", summary)

    def answer(self, kind: str, document: dict[str, Any], text: str, *, as_json: bool) -> None:  # noqa: ARG002
        """Give both in one line."""
        self.on_event.say("info", text, kind, document)

    def continue_text(self, prompt: str, pieces: Iterable[str], *, as_json: bool) -> None:  # noqa: ARG002
        """Give the whole text in one line."""
        text = "".join(pieces)
        self.on_event.say("info", prompt + text, "text", {"prompt": prompt, "text": text})

    def explain(self, report: dict[str, Any], *, as_json: bool) -> None:  # noqa: ARG002
        """Give the report in one line."""
        self.on_event.say("info", f"explain-oom: {report['status']}", "explain_oom", report)

    def fail(self, error: MemfitError) -> None:
        """Give kind, message and exit status in one line; being stopped on request is no fault."""
        level = "warning" if isinstance(error, Resumable) else "error"
        self.on_event.say(level, str(error), "error", error_fields(error))

    def misuse(self, error: Any) -> None:
        """Give the message in one line."""
        fields = {"kind": type(error).__name__, "exit_status": error.exit_code}
        self.on_event.say("error", error.format_message(), "error", fields)

    def crash(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Give the traceback in one line."""
        told = "".join(traceback.format_exception(kind, error, trace))
        self.on_event.say("critical", f"{kind.__name__}: {error}", "error", error_fields(error, told))


def _print(level: str, message: str, facts: dict[str, Any]) -> None:
    sys.stdout.write(log_line(level, message, facts) + "\n")
    sys.stdout.flush()


Output = Screen | LogLines


def chosen() -> Output:
    """Return what $MEMFIT_LOG_FORMAT asks for; text where it is not valid, as somebody has to say so."""
    return LogLines() if os.environ.get(VARIABLE) == LogFormat.json else Screen()
