"""What a person reads of a training's events."""

import io

import pytest
from rich.console import Console

from memfit.console import RunView


@pytest.fixture
def view():
    """A view, and what it has printed as `view.text()`."""
    printed = io.StringIO()
    view = RunView(Console(file=printed, width=200))
    view.text = printed.getvalue
    return view


def health(epoch, *kinds):
    warnings = [{"kind": kind, "layers": ["a[0]"], "message": f"{kind} in a[0]"} for kind in kinds]
    return {"event": "health", "epoch": epoch, "warnings": warnings}


def test_a_kind_of_warning_is_shown_once_a_stage_and_all_of_an_epoch_on_one_line(view):
    view(health(1))
    assert view.text() == ""
    view(health(2, "vanishing", "exploding"))
    view(health(3, "exploding"))
    view(health(4, "exploding", "dead_units"))
    assert [line.strip() for line in view.text().splitlines()] == [
        "epoch 2: vanishing in a[0]; exploding in a[0]",
        "epoch 4: dead_units in a[0]",
    ]


def test_the_next_stage_is_warned_of_again(view):
    view(health(1, "exploding"))
    view({"event": "resume", "step": 3, "epoch": 1, "epochs": 2, "steps_per_epoch": 3})
    view(health(2, "exploding"))
    assert view.text().count("exploding") == 2


def test_events_that_it_does_not_know_are_not_shown(view):
    view({"event": "of_another_version"})
    assert view.text() == ""
