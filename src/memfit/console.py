"""What a person sees of a run: progress on stderr, a summary at the end."""

import os
import sys
import time
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from memfit.memory.plan import describe_change
from memfit.report.gate import gate_sentence

MIB = 2**20
_QUIET_SECONDS = 10.0


def stderr_console() -> Console:
    """Return a console on stderr; without a terminal it is wide enough for the tables."""
    width = None if sys.stderr.isatty() else int(os.environ.get("COLUMNS", "120"))
    return Console(stderr=True, width=width, highlight=False)


class RunView:
    """Shows a pipeline's events: lines for steps and epochs, a bar for steps where there is a terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._epochs = self._steps_per_epoch = 0
        self._last_line = time.monotonic()
        self._unhealthy: set[str] = set()

    def __call__(self, event: dict[str, Any]) -> None:
        """Show one event; unknown kinds are not shown."""
        show = getattr(self, f"_{event['event']}", None)
        if show is not None:
            show(event)

    def _step_start(self, event: dict[str, Any]) -> None:
        self.console.print(f"[bold]\\[{event['index']}/{event['count']}] {event['step']}[/bold]")

    def _step_end(self, event: dict[str, Any]) -> None:
        self._close_bar()
        if event["status"] == "reused":
            self.console.print(f"      reused from {event['from_run']}: inputs, config and code are the same")
        else:
            self.console.print(f"      done in {event['seconds']:.1f} s")

    def _progress(self, event: dict[str, Any]) -> None:
        now = time.monotonic()
        if now - self._last_line > _QUIET_SECONDS:
            self._last_line = now
            self.console.print(f"      {event['message']}, {event['share']:.0%}")

    def _replan(self, event: dict[str, Any]) -> None:
        self.console.print(f"      {event['stage']}: planned anew, as {', '.join(event['changed'])} changed")

    def _probe(self, event: dict[str, Any]) -> None:
        probe = event["probe"]
        num_bytes = probe["peak_bytes"] or probe["predicted_bytes"]
        peak = f"{num_bytes / MIB:,.0f} MiB" if num_bytes else "-"
        rate = f"{_rate(probe['samples_per_second'])} samples/s" if probe["samples_per_second"] else "-"
        kind = "estimate" if probe["peak_bytes"] is None and num_bytes else "probe"
        kind = "confirm" if probe["verifying"] and kind == "probe" else kind
        self.console.print(
            f"      {event['stage']}: {kind} micro {probe['micro_batch_size']} x {probe['accumulation_steps']}, "
            f"{probe['precision']}, checkpointing {probe['checkpointing']}: {probe['outcome']}, {peak}, {rate}"
        )

    def _stage_start(self, event: dict[str, Any]) -> None:
        plan = event["plan"]
        self.console.print(
            f"      {event['parameters']:,} parameters, {event['num_train']:,} samples, "
            f"up to {event['epochs']} epochs of {event['steps_per_epoch']} steps; "
            f"{plan['micro_batch_size']} x {plan['accumulation_steps']} samples, {plan['precision']}"
        )
        self._open_bar(event)

    def _open_bar(self, event: dict[str, Any]) -> None:
        self._unhealthy = set()
        self._epochs, self._steps_per_epoch = event["epochs"], event["steps_per_epoch"]
        if self.console.is_terminal:
            columns = (
                TextColumn("      {task.description}"),
                BarColumn(),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task("training", total=self._epochs * self._steps_per_epoch)

    def _resume(self, event: dict[str, Any]) -> None:
        self.console.print(f"      resumed after step {event['step']} (epoch {event['epoch']} of {event['epochs']})")
        self._open_bar(event)

    def _restart(self, event: dict[str, Any]) -> None:
        self._close_bar()
        message = escape(event["message"])
        self.console.print(f"      [yellow]{message}: started again from the last checkpoint[/yellow]")

    def _warning(self, event: dict[str, Any]) -> None:
        self.console.print(f"      [yellow]{escape(event['message'])}[/yellow]")

    def _spike(self, event: dict[str, Any]) -> None:
        self.console.print(
            f"      [yellow]step {event['step']}: update skipped, gradient norm {_figure(event['gradient_norm'])} "
            f"against a median of {_figure(event['median'])}[/yellow]"
        )

    def _health(self, event: dict[str, Any]) -> None:
        """Show each kind of warning once a stage; the report has them all."""
        said = [warning["message"] for warning in event["warnings"] if warning["kind"] not in self._unhealthy]
        self._unhealthy |= {warning["kind"] for warning in event["warnings"]}
        if said:
            self.console.print(f"      [yellow]epoch {event['epoch']}: {escape('; '.join(said))}[/yellow]")

    def _layout(self, event: dict[str, Any]) -> None:
        self.console.print(f"      [yellow]{describe_change(event)}[/yellow]")

    def _step(self, event: dict[str, Any]) -> None:
        if self._bar is not None and self._task is not None:
            loss = _figure(event["losses"]["total"])
            self._bar.update(self._task, completed=event["step"], description=f"loss {loss}")

    def _epoch(self, event: dict[str, Any]) -> None:
        eta = f", about {event['eta_seconds']:.0f} s left" if event["eta_seconds"] else ""
        self.console.print(
            f"      epoch {event['epoch']}/{self._epochs or '?'}: train {_figure(event['train']['total'])}, "
            f"{validation_figures(event)}, peak {event['memory']['peak_bytes'] / MIB:,.0f} MiB, "
            f"{_rate(event['samples_per_second'])} samples/s{eta}{' (best)' if event['best'] else ''}"
        )

    def _stage_end(self, event: dict[str, Any]) -> None:
        self._close_bar()
        self.console.print(
            f"      ended by {event['reason'].replace('_', ' ')} after {event['epochs']} epochs; best: epoch "
            f"{event['best_epoch']}"
        )

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def validation_figures(event: dict[str, Any]) -> str:
    """Write an epoch's validation loss, what the stage monitors, and the mean absolute error where there is one."""
    validation = event["validation"]
    names = dict.fromkeys(["total", event.get("monitor", "total"), "mae"])
    known = [name for name in names if validation.get(name) is not None]
    shown = {name: "validation" if name == "total" else name.replace("_", " ") for name in known}
    return ", ".join(f"{words} {_figure(validation[name])}" for name, words in shown.items())


def _peak(plan: dict[str, Any]) -> str:
    if plan["verified"]:
        return f"{plan['measured_peak_bytes'] / MIB:,.0f} MiB"
    return f"{plan['predicted_peak_bytes'] / MIB:,.0f} MiB predicted, {plan['upper_peak_bytes'] / MIB:,.0f} at most"


def _rate(samples_per_second: float | None) -> str:
    if samples_per_second is None:
        return "-"
    return f"{samples_per_second:,.0f}" if samples_per_second >= 10 else f"{samples_per_second:.2g}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def show_plans(console: Console, plans: list[dict[str, Any]]) -> None:
    """Print a table of the plans."""
    table = Table(title="Plan", title_justify="left")
    for name in ("stage", "global batch", "micro x steps", "precision", "checkpointing", "variant", "peak", "budget"):
        table.add_column(name)
    table.add_column("samples/s", justify="right")
    for plan in plans:
        table.add_row(
            plan["stage"],
            str(plan["global_batch_size"]),
            f"{plan['micro_batch_size']} x {plan['accumulation_steps']}",
            plan["precision"],
            plan["checkpointing"],
            str(plan["variant"]),
            _peak(plan),
            f"{plan['budget_bytes'] / MIB:,.0f} MiB",
            _rate(plan["samples_per_second"]),
        )
    console.print(table)


def show_metrics(console: Console, summary: dict[str, Any]) -> None:
    """Print the scores beside the baselines."""
    columns = {"model": summary["metrics"], **summary["baselines"]}
    table = Table(title="Scores on the untouched test rows", title_justify="left")
    table.add_column("")
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right")
    for metric in summary["metrics"]:
        values = (scores[metric] for scores in columns.values())
        table.add_row(metric.replace("_", " "), *("-" if value is None else f"{value:.3f}" for value in values))
    console.print(table)


def show_summary(console: Console, summary: dict[str, Any]) -> None:
    """Print where everything is, and how the model is used."""
    if summary["plans"]:
        show_plans(console, summary["plans"])
    if summary["metrics"]:
        show_metrics(console, summary)
    if summary.get("gate"):
        console.print(gate_sentence(summary["gate"]), markup=False, soft_wrap=True)
    origins = {step["from_run"] for step in summary["steps"] if step["name"] != "report"}
    if summary["steps"] and all(step["status"] == "reused" for step in summary["steps"] if step["name"] != "report"):
        runs = ", ".join(sorted(str(origin) for origin in origins if origin != "the store"))
        console.print(f"Every stage was reused, from run {runs}. Train again with --fresh.")
    console.print(f"run directory  {summary['run_dir']}", soft_wrap=True)
    for name in ("report", "model"):
        if name in summary["files"]:
            console.print(f"{name:<14} {summary['files'][name]}", soft_wrap=True)
    if "model" in summary["files"]:
        folder = summary["files"]["model"].rsplit("/", 1)[0]
        console.print("use it         (needs numpy and onnxruntime only)")
        for line in (
            f"import sys; sys.path.insert(0, {folder!r})",
            "from infer import Model",
            USE.format(folder=folder),
        ):
            console.print(f"    {line}", soft_wrap=True, markup=False)


USE = "print(Model({folder!r}).check())"


def show_oom(console: Console, report: dict[str, Any]) -> None:
    """Print what a script's tensors held when memory ran out, or at most, and what would fit."""
    if report["status"] in ("oom", "killed"):
        _show_failure(console, report)
        _show_held(console, report, "What held the memory")
        for number, each in enumerate(report["advice"], 1):
            fits = {True: "would fit: ", False: "would not fit: ", None: ""}[each["fits"]]
            console.print(f"{number}. {fits}{each['text']}", markup=False)
    elif report["status"] == "ended":
        peaks = ", ".join(f"{bytes_ / MIB:,.0f} MiB on {name}" for name, bytes_ in report.get("peaks", {}).items())
        console.print(f"memfit: ended without running out of memory; tensors held at most {peaks or 'nothing'}")
        if "categories" in report:
            _show_held(console, report, "Near the peak")
    if report["status"] != "oom" and report["times_out_of_memory"]:
        console.print(f"memfit: memory ran out {report['times_out_of_memory']} times, and the script went on")


def _show_failure(console: Console, report: dict[str, Any]) -> None:
    request = "" if report["request_bytes"] is None else f", asking for {report['request_bytes'] / MIB:,.0f} MiB"
    where = f" in {report['module']}" if report["module"] else ""
    console.print(
        f"memfit: out of memory on {report['device']}, phase {report['phase']}{where}{request}; the process held "
        f"{report['process_bytes'] / MIB:,.0f} of {report['capacity_bytes'] / MIB:,.0f} MiB",
        markup=False,
    )
    if report["source"]:
        source = report["source"]
        console.print(f"  {source['file']}:{source['line']}: {source['code']}", markup=False, soft_wrap=True)
    if report["status"] == "killed":
        console.print(f"  {report['message']}", markup=False)


def _show_held(console: Console, report: dict[str, Any], title: str) -> None:
    table = Table(title=title, title_justify="left")
    names = [name for name, num_bytes in report["categories"].items() if num_bytes]
    for name in ("module", "MiB", *(name.replace("_", " ") for name in names)):
        table.add_column(name, justify="left" if name == "module" else "right")
    rows = [("all tensors", report["tensor_bytes"], report["categories"])]
    rows += [(row["module"], row["bytes"], row["categories"]) for row in report["modules"]]
    for name, num_bytes, parts in rows:
        table.add_row(escape(name), _whole_mib(num_bytes), *(_whole_mib(parts.get(each, 0)) for each in names))
    console.print(table)
    rest = max(report["process_bytes"] - report["tensor_bytes"], 0)
    console.print(f"Besides tensors the process held {rest / MIB:,.0f} MiB: Python, libraries, the allocator's slack.")


def _whole_mib(num_bytes: int) -> str:
    return f"{num_bytes / MIB:,.1f}" if num_bytes else "-"
