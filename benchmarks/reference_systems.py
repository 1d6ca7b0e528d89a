"""The five reference systems on one pipeline: memfit's figures beside the ones that their authors report.

    python -m benchmarks.reference_systems --csv benchmarks/reference_systems.csv [--text FILE]

On the CPU, from the root of the repository, about fifteen minutes. Each system is trained as far as a CPU goes, by its
quick config, through the whole pipeline: seconds are those of all steps but the preparation of data, scores are of the
untouched test split, and so are those of the best baseline. What needs a card is planned by estimate: predicted peaks
and their upper bounds for the card that the row names, on made-up images for the classifier. Nobody else's code is run:
the reported figures are quoted from their authors, and were measured on other data and machines where the row does not
say that they compare. The last columns are the README's table, which is printed at the end.

--text: a text of some 4 MB, documents separated by blank lines, for the recurrent model at 16 x 128 tokens a step; of
Debian's packages bible-kjv and bible-kjv-text: `bible gen1:1-rev22:21 < /dev/null > FILE`. About four minutes
more. --only runs some systems; the other rows of the CSV stay.
"""

import argparse
import csv
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.planner_cases import stamp
from memfit.config import load_config
from memfit.files import read_json
from memfit.metrics.directions import higher_is_better
from memfit.pipeline import open_run
from memfit.workloads.registry import load_workload

CONFIGS = Path("configs")
MIB = 1 << 20
RUN_COLUMNS = (
    "config", "parameters", "budget", "plan", "seconds", "scored_by", "score", "baseline", "baseline_score", "gate",
)  # fmt: skip
COLUMNS = ("date", "commit", "device", "torch", "system", "row", "memfit", "reported", "note", *RUN_COLUMNS)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    system: str
    row: str
    memfit: str
    reported: str = "-"
    note: str = ""
    run: Mapping[str, Any] = field(default_factory=dict)
    """RUN_COLUMNS of a run or a plan, where the row is of one."""


@dataclass
class Bench:
    """Where runs and prepared data go."""

    folder: Path

    def run(self, name: str, *overrides: str) -> dict[str, Any]:
        """Run a config through the whole pipeline; return its summary, with what the stages wrote."""
        config = load_config(CONFIGS / f"{name}.toml", overrides)
        pipeline = open_run(config, runs=self.folder / "runs", store=self.folder / "store", fresh=True)
        pipeline.perform_until("report")
        path = pipeline.run.path
        stages = [_events(folder / "events.jsonl") for folder in sorted((path / "stages").iterdir())]
        evaluation = read_json(path / "evaluation.json")
        return {**pipeline.summary(), "config": config, "stages": stages, "evaluation": evaluation}

    def plan(self, name: str, device: str, budget: str, *overrides: str) -> tuple[list[dict[str, Any]], list[int]]:
        """Plan a config's stages by estimate for a card; return the plans, and the parameters of each stage's model."""
        settings = (f'plan.device="{device}"', f'plan.budget="{budget}"', "plan.estimate_only=true", *overrides)
        config = load_config(CONFIGS / f"{name}.toml", settings)
        pipeline = open_run(config, runs=self.folder / "plans", store=self.folder / "store")
        pipeline.perform_until("plan")
        sizes = []
        for stage, model in zip(config.stages, config.stage_models(), strict=True):
            variants = model.all_variants()
            wanted = next(iter(variants))
            job = {"workload": config.workload, "data_dir": pipeline.run.record["data_dir"]}
            job |= {"model": {"variant": wanted, "variants": variants}, "loss": stage.loss.model_dump(mode="json")}
            sizes.append(sum(each.numel() for each in load_workload(job).variants()[wanted]().parameters()))
        return [plan.to_dict() for plan in pipeline.plans], sizes


def _events(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def layout(plan: Mapping[str, Any]) -> str:
    """Say how a stage fits."""
    told = f"{plan['micro_batch_size']} x {plan['accumulation_steps']}, {plan['precision']}"
    return told + (", activation checkpointing" if plan["checkpointing"] == "blocks" else "")


def predicted(plan: Mapping[str, Any]) -> str:
    """Say how a stage fits, and into how much."""
    return (
        f"{layout(plan)}: {plan['predicted_peak_bytes'] / MIB:,.0f} MiB, at most {plan['upper_peak_bytes'] / MIB:,.0f}"
    )


def facts(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return RUN_COLUMNS of a run: of stages that differ, one after the other."""
    name = run["evaluation"]["headline"]
    known = {rival: scores[name] for rival, scores in run["baselines"].items() if scores.get(name) is not None}
    best = (max if higher_is_better(name) else min)(known, key=lambda rival: known[rival])
    sizes = [next(event["parameters"] for event in stage if event["event"] == "stage_start") for stage in run["stages"]]
    return {
        "config": run["config"].name,
        "parameters": _then(f"{size:,}" for size in sizes),
        "budget": run["config"].plan.budget,
        "plan": _then(map(layout, run["plans"])),
        "seconds": round(sum(step["seconds"] or 0 for step in run["steps"] if step["name"] != "prepare")),
        "scored_by": name,
        "score": f"{run['metrics'][name]:.4g}",
        "baseline": best,
        "baseline_score": f"{known[best]:.4g}",
        "gate": "passed" if run["gate"]["passed"] else "not passed",
    }


def _then(parts: Iterator[str]) -> str:
    return "; then ".join(dict.fromkeys(parts))


def scored(system: str, run: Mapping[str, Any], reported: str = "-", note: str = "") -> Row:
    """Put the score that decides beside that of the best baseline."""
    found = facts(run)
    told = f"{found['scored_by']} {found['score']}, {found['baseline']} {found['baseline_score']}"
    return Row(system, "score", told, reported, note, found)


def planned(system: str, bench: Bench, name: str, budget: str, *overrides: str, reported: str = "-") -> Row:
    """Plan a reference config for a T4."""
    plans, sizes = bench.plan(name, "t4", budget, *overrides)
    found = {"config": name, "budget": f"{budget} (t4)", "plan": _then(map(layout, plans))}
    found["parameters"] = _then(f"{size:,}" for size in sizes)
    row = f"{name} on a T4, {budget}"
    return Row(system, row, "; then ".join(map(predicted, plans)), reported, "predicted, not run", found)


def custom(bench: Bench) -> Iterator[Row]:
    """A workload of one's own: no reference system, but on the same pipeline."""
    yield scored("custom", bench.run("custom_quick"), note="the project that `memfit init` makes, on made-up numbers")


def series(bench: Bench) -> Iterator[Row]:
    """System 1: the multi-scale series net."""
    theirs = "asks for 15.90 GiB at batch 64; then without the 1000 window: 8-10 GiB"
    yield planned("series", bench, "multiscale_t4", "14GiB", reported=theirs)
    for budget in ("4GiB", "2GiB", "1GiB"):
        yield planned("series", bench, "multiscale_t4", budget)
    run = bench.run("weather_quick")
    yield scored("series", run, "MAE < 2.0 of another unit", "wind speed in mph; other data")
    yield Row("series", "loss risk", f"{run['metrics']['loss_risk']:.1%}", "< 20 %", "a goal of theirs, other data")


def experts(bench: Bench) -> Iterator[Row]:
    """System 2: experts that share a backbone."""
    yield planned("experts", bench, "experts_t4", "14GiB")
    run = bench.run("experts_quick")
    losses = [event["train"]["token"] for event in run["stages"][-1] if event["event"] == "epoch"]
    note = "ours is of held-out documents: theirs is a training loss that only repetition explains"
    yield Row("experts", "loss", f"{run['metrics']['nll']:.3f} test, {losses[-1]:.3f} train", "0.0004 train", note)
    yield scored("experts", run)
    table = Path("benchmarks/experts.csv")
    if table.exists():
        yield Row("experts", "memory over the number of experts", f"see {table}", "flat at 1.20 GB", "0.6 B backbone")


def recurrent(bench: Bench) -> Iterator[Row]:
    """System 3: the small recurrent language model, on the packaged text."""
    yield from _tiny("4 x 128 tokens a step; theirs is not stated", bench.run("recurrent_tiny"))
    yield scored("recurrent", bench.run("language_quick"), note="grows after its first stage")


def recurrent_on(bench: Bench, text: Path) -> Iterator[Row]:
    """System 3 on a larger text."""
    source = ('kind="files"', f"paths={json.dumps([str(text.resolve())])}", 'separator="\\n\\n"')
    overrides = [*(f"data.source.{setting}" for setting in source), "data.min_chars=64"]
    overrides += ["stages.0.global_batch_size=16"]
    yield from _tiny(
        f"16 x 128 tokens a step, {text.stat().st_size / 1e6:.1f} MB of text",
        bench.run("recurrent_tiny", *overrides),
    )


def _tiny(about: str, run: Mapping[str, Any]) -> Iterator[Row]:
    steps = [event for event in run["stages"][0] if event["event"] == "step"]
    end = next(event for event in run["stages"][0] if event["event"] == "stage_end")
    checkpoint = Path(run["run_dir"]) / "stages/1-tiny/checkpoints/last"
    size = sum(file.stat().st_size for file in checkpoint.resolve().iterdir())
    first, last = steps[0]["losses"]["token"], steps[-1]["losses"]["token"]
    yield Row("recurrent", "parameters", facts(run)["parameters"], "1.96 M", about)
    yield Row("recurrent", "training", f"{end['seconds'] / 60:.2f} min for {len(steps)} steps", "33 min for 378", about)
    yield Row("recurrent", "train loss", f"{first:.2f} to {last:.2f}", "8.65 to 0.82", "theirs on a repeating corpus")
    yield scored("recurrent", run, "none: no held-out data", about)
    yield Row("recurrent", "checkpoint", f"{size / 1e6:.2f} MB", "22.55 MB", "weights and two moments")


def vision(bench: Bench) -> Iterator[Row]:
    """System 4: the image classifier."""
    images = bench.folder / "cifar10"
    images.mkdir()
    random = np.random.default_rng(0)
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):  # planning reads no pixels
        records = random.integers(0, 256, (200, 1 + 3 * 32 * 32), np.uint8)
        records[:, 0] %= 10
        (images / f"{name}.bin").write_bytes(records.tobytes())
    yield planned("vision", bench, "cifar10_resnet18", "14GiB", f'data.source.path="{images}"')
    yield scored("vision", bench.run("digits_quick"), note="scikit-learn's digits; CIFAR-10 is not at hand")


def forecast(bench: Bench) -> Iterator[Row]:
    """System 5's models."""
    yield planned("forecast", bench, "forecast_reference", "14GiB")
    yield scored("forecast", bench.run("forecast_quick"), "0.01 to 0.08 on toy series", "24 hours of temperature")


SYSTEMS = {
    "series": series, "experts": experts, "recurrent": recurrent, "vision": vision, "forecast": forecast,
    "custom": custom,
}  # fmt: skip
TEXT = "recurrent, a text"
"""Rows of --text count as a system of their own."""


def rows(bench: Bench, only: Sequence[str], text: Path | None) -> Iterator[Row]:
    """Yield the table, system by system."""
    for name, system in SYSTEMS.items():
        if name in only or not only:
            yield from system(bench)
    if text:
        yield from (replace(row, system=TEXT) for row in recurrent_on(bench, text))


def print_table(found: Iterable[Mapping[str, Any]]) -> None:
    """Print the README's table of what was run."""
    print("\n| config | parameters | plan (micro-batch x accumulation) | budget | seconds | score | best baseline |")
    print("|---|---|---|---|---|---|---|")
    for run in (row for row in found if row.get("score")):
        score, rival = f"{run['scored_by']} **{run['score']}**", f"{run['baseline']} {run['baseline_score']}"
        cells = (run["parameters"], run["plan"], run["budget"], run["seconds"], score, rival)
        print(f"| `{run['config']}` |", *(f"{cell} |" for cell in cells))


def read(path: Path) -> list[dict[str, Any]]:
    """Read the rows of earlier times, if there are any."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def write(path: Path, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put the rows of systems that were run in the place of their former ones."""
    order = [*SYSTEMS, TEXT]
    again = {row["system"] for row in found}
    kept = [row for row in read(path) if row["system"] in order and row["system"] not in again]
    merged = sorted([*kept, *found], key=lambda row: order.index(row["system"]))
    with path.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(merged)
    return merged


def main() -> None:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--text", type=Path, help="a text for the recurrent model at 16 x 128 tokens a step")
    parser.add_argument("--only", nargs="*", choices=[*SYSTEMS, "text"], default=[], help="run these alone")
    options = parser.parse_args()
    found, stamped = [], stamp()
    with tempfile.TemporaryDirectory(prefix="memfit-reference-") as folder:
        for row in rows(Bench(Path(folder)), options.only, options.text):
            print(row.system, row.row, row.memfit, row.reported, row.note, sep=" | ", flush=True)
            found.append({**stamped, **asdict(row), **row.run})
    print_table(write(options.csv, found) if options.csv else found)


if __name__ == "__main__":
    main()
