import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from memfit.report.page import SECTIONS
from memfit.report.run_files import read_run
from memfit.report.sections.illustrations import illustrations

PARTS = ("config.toml", "run.json", "plan.json", "stages", "evaluation.json", "predictions.npz", "export")


@pytest.mark.parametrize("part", [*PARTS, "export/model_card.json"])
def test_a_missing_part_is_not_yet_there(run_dir, page_of, fast_plots, part):
    path = run_dir / part
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    assert "Not yet" in "".join(page_of(run_dir).texts.values())


def test_an_empty_directory_gives_a_page_of_things_to_come(tmp_path, page_of, fast_plots):
    page = page_of(tmp_path)
    assert "No result yet" in page.texts["header"]
    for make in SECTIONS:
        assert make is illustrations or "Not yet" in page.texts[make.__name__]


def test_a_run_that_only_planned_shows_its_plan(run_dir, edit_json, page_of, fast_plots):
    for part in ("stages", "export"):
        shutil.rmtree(run_dir / part)
    for part in ("evaluation.json", "predictions.npz"):
        (run_dir / part).unlink()
    running = {"name": "train:coarse", "status": "running", "seconds": None}
    edit_json(run_dir / "run.json", lambda it: it.update(finished=None, steps=[*it["steps"][:2], running]))
    page = page_of(run_dir)
    assert "unfinished: at train:coarse" in page.texts["header"]
    assert page.row("plan", "✓ chosen")
    assert page.row("steps", "train:coarse")[1:3] == ["running", "–"]
    assert "Not yet" in page.texts["training"]


def test_the_report_step_itself_may_still_be_running(run_dir, edit_json, page_of, fast_plots):
    def at_report(document):
        document["finished"] = None
        document["steps"][-1] = {"name": "report", "status": "running", "seconds": None}

    edit_json(run_dir / "run.json", at_report)
    assert "complete" in page_of(run_dir).texts["header"]


def test_a_stage_under_way_shows_what_it_has(run_dir, write_stage, stage_events, page_of, fast_plots):
    shutil.rmtree(run_dir / "stages" / "3-fine")
    events = stage_events(1, epochs=3, ended=False)
    events[0]["epochs"] = 8
    write_stage(1, events)
    row = page_of(run_dir).row("training", "middle")
    assert row[1] == "not yet"
    assert row[2] == "3 of 8"
    assert row[6:] == ["3", "–", "–"]


def test_a_stage_before_its_first_epoch_is_shown(run_dir, write_stage, stage_events, page_of):
    for stage in (0, 1, 2):
        write_stage(stage, stage_events(stage)[:4])
    page = page_of(run_dir)
    assert "no epoch has ended" in page.texts["training"]
    assert "Step loss" in page.texts["training"]
    assert "Not yet" in page.texts["memory"]


def test_a_single_epoch_is_drawn(run_dir, write_stage, stage_events, page_of):
    for stage in (0, 1, 2):
        write_stage(stage, stage_events(stage, epochs=1, steps_per_epoch=1))
    page = page_of(run_dir)
    assert page.row("training", "coarse")[2:4] == ["1 of 1", "1"]
    assert "Memory per epoch" in page.texts["memory"]


def test_stages_stand_in_the_order_of_their_numbers(run_dir, page_of, fast_plots):
    source = run_dir / "stages" / "1-coarse" / "events.jsonl"
    for number in range(4, 12):
        target = run_dir / "stages" / f"{number}-extra-{number}" / "events.jsonl"
        target.parent.mkdir()
        target.write_text(source.read_text().replace('"coarse"', f'"extra-{number}"'))
    names = [stage.name for stage in read_run(run_dir).stages]
    assert names == ["coarse", "middle", "fine", *(f"extra-{number}" for number in range(4, 12))]


def test_an_unreadable_file_is_named_and_the_rest_is_shown(run_dir, page_of, fast_plots):
    (run_dir / "plan.json").write_text('{"stages": [')
    (run_dir / "evaluation.json").write_text("[1, 2]")
    (run_dir / "predictions.npz").write_bytes(b"PK\x03\x04 torn")
    (run_dir / "config.toml").write_bytes(b"name = \xff")
    text = page_of(run_dir).texts
    for name in ("plan.json", "evaluation.json", "predictions.npz", "config.toml"):
        assert name in text["header"]
    assert "all epochs done" in text["training"]


def test_a_torn_event_is_named_in_the_headline(run_dir, page_of, fast_plots):
    with (run_dir / "stages" / "3-fine" / "events.jsonl").open("a") as events:
        events.write('{"event": "st')
    assert "1 line of stage fine's events" in page_of(run_dir).texts["header"]


def test_predictions_without_a_finite_row_or_a_column_are_reported(run_dir, page_of, fast_plots):
    nothing = np.full(5, np.nan)
    np.savez(run_dir / "predictions.npz", times=np.arange(5), truth=nothing, value=nothing)
    assert "No test row has a finite prediction" in page_of(run_dir).texts["predictions"]
    np.savez(run_dir / "predictions.npz", truth=nothing)
    assert "There is nothing to draw" in page_of(run_dir).texts["predictions"]
    np.savez(run_dir / "predictions.npz", truth=nothing, value=np.arange(3), times=np.arange(5))
    assert "arrays of different lengths" in page_of(run_dir).texts["predictions"]


@pytest.mark.parametrize("num_rows", [1, 2])
def test_very_few_predictions_are_drawn(run_dir, page_of, num_rows):
    arrays = {name: column[:num_rows] for name, column in read_run(run_dir).predictions.items()}
    np.savez(run_dir / "predictions.npz", **arrays)
    assert "Prediction over truth" in page_of(run_dir).texts["predictions"]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("damage", ["null", "drop", "swap"])
def test_no_missing_or_odd_value_keeps_the_page_from_being_written(
    run_dir, edit_json, page_of, undrawn_plots, seed, damage
):
    """A quarter of all values are null, absent or of another type."""
    chance = random.Random(seed)

    def spoil(value):
        if isinstance(value, dict):
            return {key: spoil(item) for key, item in value.items() if damage != "drop" or chance.random() < 0.75}
        if isinstance(value, list):
            return [spoil(item) for item in value]
        if damage == "drop" or chance.random() < 0.75:
            return value
        return None if damage == "null" else chance.choice(["text", [1], {"a": 1}, True, -1, 0, 1e300])

    data_dir = Path(read_run(run_dir).info["data_dir"])
    edit_json(data_dir / "manifest.json", spoil)
    for name in ("plan.json", "evaluation.json", "export/model_card.json", "run.json"):
        edit_json(run_dir / name, spoil)
    edit_json(run_dir / "run.json", lambda it: it.update(data_dir=str(data_dir)))
    for path in run_dir.glob("stages/*/events.jsonl"):
        events = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("\n".join(json.dumps(spoil(event) | {"event": event["event"]}) for event in events))
    page = page_of(run_dir)
    assert len([tag for tag, _ in page.elements if tag == "section"]) >= len(SECTIONS) - 1  # no illustrations


def test_the_data_directory_may_be_named_from_the_run_directory(run_dir, edit_json, page_of, fast_plots):
    edit_json(run_dir / "run.json", lambda it: it.update(data_dir="../../../store/fedcba9876543210"))
    assert "wind_speed" in page_of(run_dir).texts["data"]
