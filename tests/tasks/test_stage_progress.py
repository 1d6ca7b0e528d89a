import logging
import uuid

import httpx
import pytest

from tasks import stage_progress
from tasks.stage_progress import StageProgress, progress_key

START = {"event": "stage_start", "epochs": 4, "steps_per_epoch": 25}


def step(number: int) -> dict:
    return {"event": "step", "step": number, "epoch": 1 + number // 25}


def epoch(number: int) -> dict:
    return {
        "event": "epoch",
        "epoch": number,
        "step": 25 * number,
        "validation": {"total": 0.5, "mae": 1.25},
        "eta_seconds": 30.0,
    }


@pytest.fixture
def sent(monkeypatch) -> list[tuple[float, str]]:
    """Collect the updates instead of sending them to a server."""
    updates: list[tuple[float, str]] = []
    monkeypatch.setattr(stage_progress, "create_progress_artifact", lambda *_args, **_options: uuid.uuid4())
    monkeypatch.setattr(
        stage_progress,
        "update_progress_artifact",
        lambda _id, share, description: updates.append((share, description)),
    )
    return updates


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(stage_progress.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("stage", "key"), [("broad", "progress-broad"), ("2nd_Stage.B", "progress-2nd-stage-b"), ("x-", "progress-x")]
)
def test_key_has_what_prefect_allows(stage, key):
    assert progress_key(stage) == key


def test_updates_are_at_least_two_seconds_apart(sent, clock):
    progress = StageProgress("broad")
    progress(START)
    for number in range(1, 101):
        clock[0] += 0.25
        progress(step(number))
    assert [round(share, 6) for share, _ in sent] == [8.0 * count for count in range(1, 13)]


def test_epoch_shows_its_figures(sent, clock):
    progress = StageProgress("broad")
    progress(START)
    clock[0] += 3
    progress(epoch(2))
    assert sent == [(50.0, "stage broad: epoch 2/4: validation 0.5, mae 1.25, about 30 s left")]


def test_end_is_always_shown_with_its_origin(sent, clock):
    StageProgress("broad").close({"status": "reused", "from_run": "run-7"})
    assert sent == [(100.0, "stage broad: reused from run-7")]


def test_training_survives_a_server_that_is_away(sent, clock, monkeypatch, caplog):
    def away(*_args, **_options):
        raise httpx.ConnectError("refused")

    monkeypatch.setattr(stage_progress, "update_progress_artifact", away)
    monkeypatch.setattr(stage_progress, "get_run_logger", lambda: logging.getLogger("run"))
    progress = StageProgress("broad")
    progress(START)
    clock[0] += 3
    progress(epoch(1))
    assert "was not shown" in caplog.text
