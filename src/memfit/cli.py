"""The command line: `memfit init | run | plan | train | evaluate | export | generate | report | ...`, no Prefect."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import memfit
from memfit.command import LogFormatOption, output, run_application, telling_failures
from memfit.errors import ConfigError, Resumable, RunStateError
from memfit.log_lines import LogFormat

if TYPE_CHECKING:
    from memfit.output import Output
    from memfit.pipeline import Pipeline

app = typer.Typer(
    help="Training for PyTorch that fits the memory you have: from data to a checked ONNX model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)

Target = Annotated[Path, typer.Argument(metavar="CONFIG_OR_RUN_DIR", help="A TOML config, or the directory of a run.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting: --set stages.0.lr=3e-4")
]
Budget = Annotated[
    str | None,
    typer.Option(help="Memory budget: 14GiB, 80%, or auto (what is free now). Short for --set plan.budget=."),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:n. Short for --set plan.device=.")]
RunDir = Annotated[Path | None, typer.Option(help="Directory of this run; default: runs/<name>/<new id>.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the newest unfinished run of the same config.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Reuse nothing: prepare, plan and train again.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout; progress goes to stderr.")]
Runs = Annotated[Path, typer.Option(envvar="MEMFIT_RUNS", help="Where runs are kept.")]
Store = Annotated[Path, typer.Option(envvar="MEMFIT_STORE", help="Where prepared data and plans are kept.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"memfit {memfit.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Give it data, a model and a memory budget; it works out how the training fits, trains, and exports ONNX."""


def run_until(
    last: str,
    target: Path,
    *,
    overrides: list[str],
    run_dir: Path | None,
    resume: bool,
    fresh: bool,
    as_json: bool,
    runs: Path,
    store: Path,
) -> dict[str, Any]:
    """Run the pipeline up to a step and print what came of it; return the summary."""
    from memfit.pipeline import open_run, read_config  # takes seconds: not for --help

    said = output()
    with telling_failures(said):
        config, own_dir = read_config(target, overrides)
        pipeline = open_run(
            config,
            runs=runs,
            store=store,
            run_dir=run_dir or own_dir,
            resume=resume,
            fresh=fresh,
            on_event=said.on_event,
        )
        _perform(pipeline, last, said)
        summary = pipeline.summary()
        said.finish(summary, as_json=as_json)
    return summary


def _perform(pipeline: "Pipeline", last: str, said: "Output") -> None:
    path = pipeline.run.path
    if pipeline.fresh and pipeline.run.record["finished"]:
        raise RunStateError(f"{path}: --fresh trains again in a new run, and this one is finished. Leave out the run.")
    said.begin(pipeline.run.run_id, pipeline.config.name, str(path))
    try:
        with pipeline.locked():
            pipeline.perform_until(last)
    except KeyboardInterrupt:  # here, as typer would turn it into an exit status of its own
        verb = "run" if last == "report" else last
        raise Resumable(f"run {pipeline.run.run_id} stopped on request. Go on with: memfit {verb} {path}") from None


def _command(name: str, last: str, doc: str) -> Callable[..., None]:
    def command(
        target: Target,
        overrides: Overrides = None,
        budget: Budget = None,
        device: Device = None,
        run_dir: RunDir = None,
        resume: Resume = False,
        fresh: Fresh = False,
        as_json: Json = False,
        runs: Runs = Path("runs"),
        store: Store = Path("store"),
        _log_format: LogFormatOption = LogFormat.text,
    ) -> None:
        run_until(
            last,
            target,
            overrides=with_shortcuts(overrides or [], budget, device),
            run_dir=run_dir,
            resume=resume,
            fresh=fresh,
            as_json=as_json,
            runs=runs,
            store=store,
        )

    return app.command(name, help=doc)(command)


def with_shortcuts(overrides: list[str], budget: str | None, device: str | None) -> list[str]:
    """Add --budget and --device as overrides."""
    shortcuts = {"plan.budget": budget, "plan.device": device}
    return [*overrides, *(f"{key}={json.dumps(value)}" for key, value in shortcuts.items() if value is not None)]


_command("run", "report", "Run every step: prepare, plan, train, evaluate, export, report.")
_command("train", "train", "Run up to the end of training.")
_command("evaluate", "evaluate", "Run up to the scores on the test rows, beside baselines.")
_command("export", "export", "Run up to the checked ONNX bundle.")


@app.command("plan", help="Prepare the data and find out how every stage fits into the budget.")
def plan(
    target: Target,
    overrides: Overrides = None,
    budget: Budget = None,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda, cuda:n, or a card that is not here: see `memfit devices`. Sets plan.device."),
    ] = None,
    estimate_only: Annotated[
        bool, typer.Option("--estimate-only", help="Predict and run nothing; always so for a card that is not here.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw every stage's memory over one step into this PNG.")] = None,
    run_dir: RunDir = None,
    resume: Resume = False,
    fresh: Fresh = False,
    as_json: Json = False,
    runs: Runs = Path("runs"),
    store: Store = Path("store"),
    _log_format: LogFormatOption = LogFormat.text,
) -> None:
    """Plan every stage, and say what was considered."""
    settings = with_shortcuts(overrides or [], budget, device)
    summary = run_until(
        "plan",
        target,
        overrides=[*settings, "plan.estimate_only=true"] if estimate_only else settings,
        run_dir=run_dir,
        resume=resume,
        fresh=fresh,
        as_json=as_json,
        runs=runs,
        store=store,
    )
    if plot is not None:
        from memfit.report.memory_timeline import save_timelines

        save_timelines(summary["plans"], plot)


@app.command("report", help="Write report.html of a run, finished or not; with a config, run every step first.")
def report(
    target: Target,
    overrides: Overrides = None,
    as_json: Json = False,
    runs: Runs = Path("runs"),
    store: Store = Path("store"),
    _log_format: LogFormatOption = LogFormat.text,
) -> None:
    """Write the report."""
    if target.is_dir() and not overrides:
        from memfit.report.page import write_report

        path = str(write_report(target))
        output().answer("report", {"report": path}, path, as_json=as_json)
        return
    run_until(
        "report",
        target,
        overrides=overrides or [],
        run_dir=None,
        resume=False,
        fresh=False,
        as_json=as_json,
        runs=runs,
        store=store,
    )


@app.command("generate", help="Continue a text with an exported language model, token by token.")
def generate(
    target: Annotated[Path, typer.Argument(metavar="RUN_DIR_OR_BUNDLE", help="A finished run, or its export folder.")],
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text to continue, given as often as wanted; none begins a document.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 100,
    temperature: Annotated[float, typer.Option(help="What logits are divided by; 0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Choose among so many of the likeliest tokens; 0: among all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Choose among the likeliest tokens of this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed and prompt give the same text.")] = 0,
    as_json: Json = False,
    _log_format: LogFormatOption = LogFormat.text,
) -> None:
    """Write prompts and what follows them to stdout, as it comes."""
    from memfit.export.infer import BundleError, InputError, Model
    from memfit.workloads.generate import Sampling, TextModel

    folder = target / "export" if (target / "export").is_dir() else target
    try:
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        model = TextModel(Model(folder), folder)
        said = output()
        for text in prompt or [""]:
            said.continue_text(text, model.generate(text, sampling, max_tokens), as_json=as_json)
    except (BundleError, InputError, ValueError) as error:
        raise ConfigError(f"generate: {error}") from error


@app.command("init", help="Make a folder with a task of your own that runs at once: your model and data go in there.")
def init(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder that is not there yet, or empty.")],
    _log_format: LogFormatOption = LogFormat.text,
) -> None:
    """Copy the template project."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: expected a folder that is not there yet, or empty. Choose another name.")
    template = Path(__file__).with_name("template_project")
    shutil.copytree(template, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    said = f"{folder}: task.py, config.toml, README.md. Next: cd {folder} && memfit run config.toml"
    output().answer("init", {"folder": str(folder)}, said, as_json=False)


@app.command("devices", help="List what is here to train on, and the cards that can be planned for without being here.")
def devices(as_json: Json = False, _log_format: LogFormatOption = LogFormat.text) -> None:
    """Show this machine's devices above the catalog."""
    from memfit.memory.devices import CATALOG

    document = {"here": {"cpu": _cpu_here(), "cuda": _cards_here()}, "catalog": [asdict(card) for card in CATALOG]}
    output().answer("devices", document, _device_tables(document), as_json=as_json)


def _cpu_here() -> dict[str, Any]:
    from memfit.memory.devices import find_device
    from memfit.memory.host import NO_LIMIT, cgroup_memory, host_memory, machine_memory

    limit = cgroup_memory()[0]
    return {
        **asdict(find_device("cpu")),
        "ram_bytes": machine_memory().total_bytes,
        "free_bytes": host_memory().free_bytes,
        "cgroup_limit_bytes": None if limit >= NO_LIMIT else limit,
    }


def _cards_here() -> list[dict[str, Any]]:
    import torch

    from memfit.memory.budget import device_memory, other_processes
    from memfit.memory.devices import find_device

    cards = []
    for name in [] if torch.version.hip else [f"cuda:{index}" for index in range(torch.cuda.device_count())]:
        try:
            free_bytes = device_memory(name).free_bytes
        except RuntimeError:  # too full for a context, or held exclusively by another process
            free_bytes = None
        cards.append({**asdict(find_device(name)), "free_bytes": free_bytes, "others": other_processes(name)})
    return cards


def _device_tables(document: dict[str, Any]) -> str:
    cpu, cards = document["here"]["cpu"], document["here"]["cuda"]
    limit = "none" if cpu["cgroup_limit_bytes"] is None else _gib(cpu["cgroup_limit_bytes"])
    here = [
        f"{cpu['name']:<8}{cpu['title']}, {cpu['multiprocessors']} cores, RAM {_gib(cpu['ram_bytes'])}, "
        f"{_gib(cpu['free_bytes'])} free, cgroup limit {limit}"
    ]
    here += [_card_line(card) for card in cards] or ["cuda    none that this torch sees"]
    heads = ("name", "card", "memory", "sm", "precisions", "attention kernels", "context")
    rows = [heads, *(_card_row(card) for card in document["catalog"])]
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    table = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip() for row in rows]
    sources = "Contexts are approximate; --json says where each figure comes from."
    return "\n".join(["Here", *here, "", "Catalog: plan for one with --device NAME", *table, "", sources])


def _card_line(card: dict[str, Any]) -> str:
    free = "unknown" if card["free_bytes"] is None else _gib(card["free_bytes"])
    others = "".join(f"; process {pid} holds {_gib(used)}" for pid, used in card["others"])
    return f"{card['name']:<8}{card['title']}, {_gib(card['memory_bytes'])}, {free} free{others}"


def _card_row(card: dict[str, Any]) -> tuple[str, ...]:
    return (
        card["name"],
        card["title"],
        _gib(card["memory_bytes"]),
        ".".join(map(str, card["compute_capability"])),
        " ".join(card["precisions"]),
        " ".join(card["attention_kernels"]),
        f"{card['context_bytes'] / 2**20:.0f} MiB",
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


@app.command(
    "explain-oom",
    help="Run your own training script; if it runs out of memory, say what held it, and what would fit.",
    context_settings={"allow_interspersed_args": False},
)
def explain_oom(
    script: Annotated[Path, typer.Argument(metavar="SCRIPT", help="A Python script; its own arguments follow it.")],
    args: Annotated[list[str] | None, typer.Argument(metavar="[ARGS]...", help="What the script gets.")] = None,
    budget: Annotated[
        str | None, typer.Option(help="Enforce a budget: 2GiB, 80%, or auto. Default: whatever memory there is.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:n: where the budget is enforced.")] = "cpu",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document on stdout; what the script prints goes to stderr.")
    ] = False,
    log_format: LogFormatOption = LogFormat.text,
) -> None:
    """Explain one script; end with its exit status, or with 9 where memory ran out."""
    from memfit.memory.explain import explain_script

    own_stdout = as_json or log_format is LogFormat.json
    report = explain_script(script, args or [], budget=budget, device=device, own_stdout=own_stdout)
    output().explain(report, as_json=as_json)
    raise typer.Exit(report["exit_status"])


def main() -> None:
    """Run the command line; errors are told in one message, with an exit status of their own."""
    run_application(app)


if __name__ == "__main__":
    main()
