from pathlib import Path

from tasks.artifact_tables import metric_rows, plan_rows, report_links

PLAN = {
    "stage": "broad",
    "device": "cpu",
    "budget_bytes": 2 * 2**30,
    "global_batch_size": 64,
    "micro_batch_size": 16,
    "accumulation_steps": 4,
    "precision": "fp32",
    "checkpointing": "blocks",
    "variant": "full",
    "measured_peak_bytes": 401 * 2**20 + 2**19,
    "predicted_peak_bytes": 395 * 2**20,
    "samples_per_second": 123.456789,
    "probes": [{}, {}, {}],
    "reason": "the fastest that fits",
}


def test_plan_row_gives_memory_in_mib_and_counts_probes():
    (row,) = plan_rows([PLAN])
    assert (row["peak MiB"], row["budget MiB"], row["samples/s"], row["probes"]) == (401.5, 2048.0, 123.46, 3)
    assert row["predicted MiB"] == 395.0
    assert (row["micro batch"], row["accumulation steps"], row["why"]) == (16, 4, "the fastest that fits")


def test_figures_that_were_not_measured_stay_empty():
    (row,) = plan_rows([{**PLAN, "measured_peak_bytes": None, "samples_per_second": None}])
    assert row["peak MiB"] is None
    assert row["samples/s"] is None


def test_model_comes_before_the_baselines_and_undefined_scores_stay_empty():
    rows = metric_rows({"mae": 0.0, "loss_risk": None}, {"persistence": {"mae": 1.23456789, "loss_risk": 0.5}})
    assert rows == [
        {"of": "model", "mae": 0.0, "loss_risk": None},
        {"of": "persistence", "mae": 1.2346, "loss_risk": 0.5},
    ]


def test_links_survive_spaces_in_paths():
    files = {"report": "/data/my runs/report.html", "model": "/data/my runs/export/model.onnx"}
    text = report_links({"name": "wind", "run_id": "7", "run_dir": "/data/my runs", "files": files})
    assert "(file:///data/my%20runs/report.html)" in text
    assert f"({Path('/data/my runs/export').as_uri()})" in text


def test_shown_python_compiles():
    files = {"report": "/r/report.html", "model": "/r/export/model.onnx"}
    text = report_links({"name": "wind", "run_id": "7", "run_dir": "/r", "files": files})
    compile(text.split("```python\n")[1].split("```")[0], "shown", "exec")
