import logging
import threading
import uuid

import httpx
import pytest

from tasks import publishing, stage_progress
from tasks.stage_progress import Outbox, StageProgress, progress_key

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


class AtOnce:
    """An outbox whose updates are seen in order, and all of them."""

    def __init__(self, send) -> None:
        self.put = send

    def close(self) -> None:
        pass


@pytest.fixture
def sent(monkeypatch) -> list[tuple[float, str]]:
    """Collect the updates instead of sending them to a server."""
    updates: list[tuple[float, str]] = []
    monkeypatch.setattr(stage_progress, "Outbox", AtOnce)
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
    assert sent == [(50.0, "stage broad: epoch 2/4: validation 0.5000, mae 1.2500, about 30 s left")]


def test_end_is_always_shown_with_its_origin(sent, clock):
    StageProgress("broad").close({"status": "reused", "from_run": "run-7"})
    assert sent == [(100.0, "stage broad: reused from run-7")]


@pytest.mark.parametrize("call", ["create_progress_artifact", "update_progress_artifact"])
def test_training_survives_a_server_that_is_away(sent, clock, monkeypatch, caplog, call):
    def away(*_args, **_options):
        raise httpx.ConnectError("refused")

    monkeypatch.setattr(stage_progress, call, away)
    monkeypatch.setattr(publishing, "get_run_logger", lambda: logging.getLogger("run"))
    progress = StageProgress("broad")
    progress(START)
    clock[0] += 3
    progress(epoch(1))
    assert caplog.messages == ["progress of stage broad was not shown: ConnectError('refused')"]


def test_a_stage_that_ends_in_an_error_shows_no_end(sent, clock):
    StageProgress("broad").close(None)
    assert sent == []


def test_a_slow_server_gets_the_newest_update_and_holds_up_nobody():
    answered, asked, sent = threading.Event(), threading.Event(), []

    def send(update):
        sent.append(update)
        asked.set()
        answered.wait(10)

    outbox = Outbox(send)
    outbox.put((0.1, "first"))
    assert asked.wait(10)
    for share in (0.2, 0.3, 1.0):
        outbox.put((share, "later"))
    answered.set()
    outbox.close()
    assert sent == [(0.1, "first"), (1.0, "later")]


def test_the_run_goes_on_without_an_answer_to_the_last_update(monkeypatch):
    never = threading.Event()
    monkeypatch.setattr(stage_progress, "CLOSING_SECONDS", 0.1)
    outbox = Outbox(lambda _update: never.wait(10) and None)
    outbox.put((1.0, "finished"))
    outbox.close()
    never.set()
