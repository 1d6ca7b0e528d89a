"""What the artifacts show, from the documents of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from memfit.console import MIB, USE

Row = dict[str, Any]


def plan_rows(plans: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Return one row per stage; a figure that was not measured is None."""
    return [
        {
            "stage": plan["stage"],
            "device": plan["device"],
            "global batch": plan["global_batch_size"],
            "micro batch": plan["micro_batch_size"],
            "accumulation steps": plan["accumulation_steps"],
            "precision": plan["precision"],
            "checkpointing": plan["checkpointing"],
            "variant": plan["variant"],
            "peak MiB": _mib(plan["measured_peak_bytes"]),
            "predicted MiB": _mib(plan["predicted_peak_bytes"]),
            "budget MiB": _mib(plan["budget_bytes"]),
            "samples/s": _rounded(plan["samples_per_second"]),
            "probes": len(plan["probes"]),
            "why": plan["reason"],
        }
        for plan in plans
    ]


def metric_rows(metrics: Mapping[str, Any], baselines: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """Return the model's scores and, below, each baseline's; an undefined score is None."""
    scores = {"model": metrics, **baselines}
    return [{"of": name, **{key: _rounded(value) for key, value in row.items()}} for name, row in scores.items()]


def report_links(summary: Mapping[str, Any]) -> str:
    """Return Markdown that names the run, links its report and its ONNX bundle, and shows how the model is used."""
    files = {name: Path(path) for name, path in summary["files"].items()}
    bundle = files["model"].parent
    return "\n".join(
        [
            f"# {summary['name']}: run {summary['run_id']}",
            f"- Report: [{files['report']}]({files['report'].as_uri()})",
            f"- ONNX bundle: [{bundle}]({bundle.as_uri()})",
            f"- Run directory: `{summary['run_dir']}`",
            "",
            "The links open on the machine that ran this. The bundle needs numpy and onnxruntime only:",
            "",
            "```python",
            f"import sys; sys.path.insert(0, {str(bundle)!r})",
            "from infer import Model",
            USE.format(folder=str(bundle)),
            "```",
        ]
    )


def _mib(num_bytes: int | None) -> float | None:
    return None if num_bytes is None else round(num_bytes / MIB, 1)


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")
