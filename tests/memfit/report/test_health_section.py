"""What the page says of a training's health, from the events of its epochs."""

import random
import re

import pytest

from memfit.report.health_charts import MAX_ROWS, Bounds, norm_map, singular_charts
from memfit.report.history import StageHistory
from memfit.report.run_files import Run, read_run
from memfit.report.sections.health import health as section

GATES = ("input", "forget", "cell", "output")


def layer(norm, **changes):
    figures = {
        "gradient_norm": norm, "gradient_norm_max": 2 * norm, "ratio": norm / 10, "weight_norm": 10.0, "mean": 0.01,
        "std": 0.25, "min": -1.0, "max": 1.5, "dead_units": 3, "num_units": 1200,
    }  # fmt: skip
    return {**figures, **changes}


def health(epoch, layers=None, warnings=(), **changes):
    """One epoch's event, as training writes it."""
    layers = {"body.0": layer(0.5), "body.norm": layer(0.02, num_units=0, dead_units=0)} if layers is None else layers
    total = {"gradient_norm": 0.6, "gradient_norm_max": 1.2, "ratio": 0.05, "weight_norm": 12.0}
    return {
        "event": "health", "epoch": epoch, "sampled_steps": 3, "layers": layers, "total": total, "recurrent": {},
        "warnings": [{"kind": kind, "layers": named, "message": ""} for kind, named in warnings],
        "vanishing_below": 0.001, "exploding_above": 100.0, **changes,
    }  # fmt: skip


def with_health(events, make=health):
    """Put an event before that of every epoch."""
    found = []
    for event in events:
        found += [make(event["epoch"]), event] if event["event"] == "epoch" else [event]
    return found


@pytest.fixture
def page_with(write_stage, stage_events, page_of, run_dir, fast_plots):
    """`page_with(make)`: the page of a run whose first stage has the events that `make(epoch)` makes."""

    def build(make=health, epochs=3):
        write_stage(0, with_health(stage_events(0, epochs=epochs, steps_per_epoch=2), make))
        return page_of(run_dir)

    return build


def history(*events, epochs=None):
    stage = StageHistory("one")
    for event in events:
        stage.take(event)
        if epochs is None:
            stage.take({"event": "epoch", "epoch": event["epoch"], "step": event["epoch"]})
    return stage


def test_layers_warnings_and_the_whole_net_are_shown(page_with):
    page = page_with()
    text = page.texts["health"]
    assert "No warnings: every layer got a gradient, and the norms lay between 0.001 and 100." in text
    for drawn in ("Gradient norm by layer and epoch", "Gradient norm / weight norm", "Weight norm", "weak to strong"):
        assert drawn in text
    assert "Stage coarse after epoch 3, gradients of 3 of its steps." in text
    row = page.row("health", "body.0")
    assert row[1:] == ["0.500", "1.00", "0.0500", "10.0", "0.0100", "0.250", "-1.00", "1.50", "3 of 1,200"]
    assert page.row("health", "body.norm")[-1] == "–"
    assert "Recurrent" not in text


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("vanishing", "gradient norms were low, so that little is learned there (below 0.001) in body.0. Normali"),
        ("exploding", "gradient norms were high (above 100) in body.0. Set clip, lower lr"),
        ("no_gradient", "there was no gradient at all in body.0. The loss does not depend on these layers"),
        ("dead_units", "half or more of the units had no gradient in body.0."),
        ("not_finite", "gradients were not finite in body.0. Lower lr"),
        ("of_another_version", "of another version in body.0."),
    ],
)
def test_a_warning_says_where_and_what_to_try(page_with, kind, expected):
    page = page_with(lambda epoch: health(epoch, warnings=[(kind, ["body.0"])]))
    assert f"Stage coarse, epochs 1–3: {expected}" in page.texts["health"]
    tone = "bad" if kind == "not_finite" else "warn"
    assert ("p", {"class": f"note {tone}"}) in page.elements
    assert "No warnings" not in page.texts["health"]


def test_a_warning_that_is_over_is_said_to_be(page_with):
    page = page_with(lambda epoch: health(epoch, warnings=[("exploding", [])] if epoch in (1, 2, 4) else ()), epochs=6)
    expected = "epochs 1–2, 4, but no longer in the last one: gradient norms were high (above 100) in the whole net."
    assert expected in page.texts["health"]


def test_a_net_without_gradient_is_told_to_stop_earlier(page_with):
    text = page_with(lambda epoch: health(epoch, warnings=[("vanishing", [])])).texts["health"]
    assert "(below 0.001) in the whole net. Nothing is left to learn" in text


def test_many_layers_of_a_warning_are_counted(page_with):
    names = [f"layer{number}" for number in range(20)]
    text = page_with(lambda epoch: health(epoch, warnings=[("vanishing", names)])).texts["health"]
    assert "layer4, layer5 and 14 more layers" in text


def test_norms_out_of_bounds_stand_out_in_the_map_and_in_the_table(page_with):
    layers = {"low": layer(1e-4), "within": layer(1.0, dead_units=700), "high": layer(250.0)}
    page = page_with(lambda epoch: health(epoch, layers))
    assert "below 0.001" in page.texts["health"]
    assert "above 100" in page.texts["health"]
    tones = [attributes.get("class") for tag, attributes in page.elements if tag == "td"]
    assert {"number warn", "number bad"} <= set(tones)
    assert page.row("health", "within")[-1] == "700 of 1,200"


def test_a_figure_that_is_undefined_is_a_dash(page_with):
    undefined = layer(1.0, ratio=None, gradient_norm=None, max=None, dead_units=None)
    row = page_with(lambda epoch: health(epoch, {"a": undefined, "b": layer(1.0)})).row("health", "a")
    assert [place for place, cell in enumerate(row) if cell == "–"] == [1, 3, 8, 9]


@pytest.mark.parametrize("events", [[], [{"event": "health"}], [{"event": "health", "layers": 7, "warnings": [3]}]])
def test_what_was_not_recorded_or_is_odd_is_no_error(run_dir, write_stage, stage_events, page_of, fast_plots, events):
    write_stage(0, [*events, *stage_events(0)])
    text = page_of(run_dir).texts["health"]
    assert ("Not recorded" in text) == (not events)


def test_each_stage_has_its_layers_in_one_map_and_its_own_table(
    run_dir, write_stage, stage_events, page_of, fast_plots
):
    write_stage(0, with_health(stage_events(0, epochs=2)))
    write_stage(1, with_health(stage_events(1, epochs=2), lambda epoch: health(epoch, {"head": layer(0.1)})))
    page = page_of(run_dir)
    text = page.texts["health"]
    assert text.index("Stage middle after epoch 2") < text.index("Layers of coarse, 2 rows")
    assert "Stage coarse after epoch 2" in text
    labels = [attributes.get("aria-label", "") for tag, attributes in page.elements if tag == "svg"]
    assert "Gradient norms of 3 layers over 4 epochs." in labels  # the third stage was not watched


def test_singular_values_are_drawn_by_gate_and_listed(page_with):
    values = {gate: [1.5 + place, 0.5, 0.01] for place, gate in enumerate(GATES)}
    page = page_with(lambda epoch: health(epoch, recurrent={"rnn.weight_hh_l0": values}))
    text = page.texts["health"]
    assert all(gate in text for gate in GATES)
    assert page.row("health", "rnn.weight_hh_l0", "forget")[2:] == ["2.50", "0.500", "0.0100"]


def test_a_plain_rnn_has_one_gate_and_three_curves():
    recurrent = {"weight_hh_l0": {"hidden": [1.1, 0.5, None]}}
    (figure,) = singular_charts([history(health(1, recurrent=recurrent))])
    assert [key.label for key in figure.legend] == ["largest", "median"]


def test_many_recurrent_matrices_are_folded_away(page_with):
    recurrent = {f"rnn.weight_hh_l{index}": {"hidden": [1.0, 0.5, 0.1]} for index in range(14)}
    text = page_with(lambda epoch: health(epoch, recurrent=recurrent), epochs=1).texts["health"]
    assert "Further recurrent weights" in text
    assert "Singular values of coarse, 14 rows" in text


def test_layers_beyond_the_maps_height_are_joined_by_the_beginnings_of_their_names():
    layers = {f"blocks.{block}.{part}": layer(3.0 + part) for block in range(60) for part in (0, 1)}
    figure = norm_map([history(health(1, layers))])
    assert "joined by the first 2 parts" in figure.caption
    assert "From 5.0 to 5.0" in figure.caption
    assert 'aria-label="Gradient norms of 60 layers over 1 epochs."' in figure.svg
    flat = norm_map([history(health(1, {f"layer{index}": layer(1.0) for index in range(200)}))])
    assert f"of {MAX_ROWS} layers" in flat.svg


def test_the_map_of_a_long_run_of_many_layers_is_small():
    layers = [{f"blocks.{place}": layer(10.0 ** ((place * 7 + epoch * 3) % 5 - 2)) for place in range(90)}
              for epoch in range(50)]  # fmt: skip
    stage = history(*(health(epoch + 1, layers[epoch % 50]) for epoch in range(1000)))
    figure = norm_map([stage])
    assert len(figure.svg) + len(figure.narrow) < 600_000


def test_a_map_of_equal_norms_has_one_shade():
    figure = norm_map([history(health(1, {"a": layer(1.0)}), health(2, {"a": layer(1.0)}))])
    assert len(re.findall("opacity: 0.95", figure.svg)) == 1
    assert norm_map([history(health(1, {"a": layer(1.0, gradient_norm=None)}))]) is None


def test_the_bounds_are_those_that_training_had():
    bounds = Bounds.of([history(health(1, vanishing_below=0.5, exploding_above=2.0))])
    assert [bounds.tone(norm) for norm in (0.1, 0.5, 2.0, 3.0, None)] == ["warn", "", "", "bad", ""]


def test_a_resumed_stage_forgets_the_health_of_epochs_that_are_run_again():
    stage = history(health(1), health(2))
    stage.take({"event": "resume", "step": 1, "epoch": 1})
    assert [event["epoch"] for event in stage.health] == [1]
    assert stage.newest_health == {}
    stage.take(health(2, {"again": layer(1.0)}))
    assert list(stage.newest_health["layers"]) == ["again"]


def test_only_the_newest_epoch_is_kept_whole():
    stage = history(health(1), health(2))
    assert [event["layers"] for event in stage.health] == [{"body.0": 0.5, "body.norm": 0.02}] * 2
    assert stage.newest_health["layers"]["body.0"]["std"] == 0.25


def test_hostile_names_are_shown_as_text(run_dir, write_stage, stage_events, page_of, fast_plots):
    name = "<script>alert(1)</script>.$x$"
    make = lambda epoch: health(  # noqa: E731
        epoch, {name: layer(1.0)}, [("vanishing", [name])], recurrent={name: {name: [1.0, 0.5, 0.1]}}
    )
    write_stage(0, with_health(stage_events(0, epochs=2), make))
    page = page_of(run_dir)
    assert "script" not in {tag for tag, _ in page.elements}
    assert name in page.texts["health"]


def test_a_stage_that_ended_no_epoch_has_no_health_yet(run_dir, write_stage, stage_events):
    for stage in range(3):
        write_stage(stage, stage_events(stage)[:3])
    (note,) = section(read_run(run_dir)).blocks
    assert note.tone == "pending"


@pytest.mark.parametrize("seed", range(4))
def test_no_missing_or_odd_value_keeps_the_section_from_being_made(tmp_path, undrawn_plots, seed):
    """A fifth of all values are absent or of another type."""
    chance = random.Random(seed)

    def spoil(value):
        if chance.random() < 0.2:
            return chance.choice([None, "text", [1], {"a": 1}, True, -1, 0, 1e300, -1e300, 1e-320])
        if isinstance(value, dict):
            return {key: spoil(item) for key, item in value.items() if chance.random() < 0.9}
        return [spoil(item) for item in value] if isinstance(value, list) else value

    run = Run(tmp_path, stages=[StageHistory("one"), StageHistory("two")])
    recurrent = {"a": {"hidden": [1.0, 0.5, 0.1]}, "b": {gate: [1.0, 0.5, 0.1] for gate in GATES}}
    warnings = [("vanishing", ["body.0"]), ("dead_units", [])]
    for epoch in range(1, 20):
        event = spoil(health(epoch, warnings=warnings, recurrent=recurrent))
        for stage in run.stages:
            stage.take({**(event if isinstance(event, dict) else {}), "event": "health"})
            stage.take({"event": "epoch", "epoch": spoil(epoch), "step": epoch})
    assert section(run).blocks
