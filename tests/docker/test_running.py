"""The pipeline in containers of the CPU target: a memory limit, a stop in mid-training, what is written where."""

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.docker.engine import Engine

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1800)]
GIB = 2**30
HARDENED = ("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
LONG = 'stages=[{name="only", epochs=20, max_steps=600, global_batch_size=16, lr=1e-3, checkpoint_every_steps=20}]'
RESUMABLE = 75


class Container:
    """A container that runs in the background."""

    def __init__(self, engine: Engine, image: str, *command: str, options: tuple[str, ...]) -> None:
        self.engine = engine
        started = engine.docker("run", "--detach", "--network", "none", *HARDENED, *options, image, *command)
        self.id = started.stdout.strip()

    def wait(self) -> dict[str, Any]:
        """Wait for its end; return its state."""
        self.engine.docker("wait", self.id, timeout=900)
        state: dict[str, Any] = json.loads(self.engine.docker("inspect", self.id).stdout)[0]["State"]
        return state

    def logs(self) -> tuple[str, str]:
        """Return what it wrote to stdout and to stderr."""
        done = self.engine.docker("logs", self.id)
        return done.stdout, done.stderr

    def remove(self) -> None:
        self.engine.docker("rm", "--force", self.id)


@pytest.fixture
def start(engine, image, volume) -> Iterator[Callable[..., Container]]:
    """Start memfit in a hardened container with the test's volume: `start(*arguments, options=())`."""
    started = []

    def begin(*arguments: str, options: tuple[str, ...] = ()) -> Container:
        mounted = ("--volume", f"{volume}:/data", *options)
        started.append(Container(engine, image, "memfit", *arguments, options=mounted))
        return started[-1]

    yield begin
    for container in started:
        container.remove()


@pytest.fixture
def read(engine, image, volume) -> Callable[[str], str]:
    """Print files of the volume: `read("/data/runs/*/plan.json")`."""

    def cat(pattern: str) -> str:
        return engine.run(image, "sh", "-c", f"cat {pattern}", options=("--volume", f"{volume}:/data"), check=False)

    return cat


def test_plans_within_the_container_s_limit_and_is_not_killed(start, read):
    container = start(
        "run", "configs/smoke.toml", "--budget", "auto", "--json", options=("--memory", "3g", "--memory-swap", "3g")
    )
    state, (stdout, stderr) = container.wait(), container.logs()
    assert (state["ExitCode"], state["OOMKilled"]) == (0, False), stderr
    for plan in json.loads(stdout)["plans"]:
        assert 1 * GIB < plan["budget_bytes"] <= 3 * GIB
        assert plan["verified"]
        assert plan["measured_peak_bytes"] <= plan["budget_bytes"]
    assert 'memfit_run_state{config="smoke",state="finished",workload="series"} 1.0' in read(
        "/data/runs/metrics/*.prom"
    )


def test_what_cannot_fit_under_the_limit_is_an_answer_not_a_kill(start):
    huge = ("--set", "model.d_model=4096", "--set", "model.ff=16384", "--set", "model.num_layers=6")
    container = start(
        "plan", "configs/smoke.toml", "--budget", "auto", *huge, options=("--memory", "2g", "--memory-swap", "2g")
    )
    state, (_, stderr) = container.wait(), container.logs()
    assert (state["ExitCode"], state["OOMKilled"]) == (4, False), stderr
    assert "MiB" in stderr


def test_stop_ends_in_a_checkpoint_and_the_next_start_resumes(start, read, engine):
    command = ("run", "configs/smoke.toml", "--set", LONG, "--set", "plan.checkpointing=['none']", "--resume")
    first = start(*command)
    events = "/data/runs/smoke/*/stages/1-only/events.jsonl"
    deadline = time.monotonic() + 600
    while '"step": 30,' not in read(events):
        assert time.monotonic() < deadline, first.logs()
        time.sleep(1)
    began = time.monotonic()
    engine.docker("stop", "--time", "100", first.id)
    assert time.monotonic() - began < 60
    state = first.wait()
    assert (state["ExitCode"], state["OOMKilled"]) == (RESUMABLE, False), first.logs()
    reached = json.loads(read("/data/runs/smoke/*/stages/1-only/checkpoints/last/checkpoint.json"))["step"]
    assert reached >= 30
    second = start(*command)
    assert second.wait()["ExitCode"] == 0, second.logs()
    assert f"resumed after step {reached} " in second.logs()[1]
    lines = map(json.loads, read(events).splitlines())
    numbers = [event["step"] for event in lines if event["event"] == "step"]
    assert numbers == list(range(1, 601))
    assert read("/data/runs/smoke/*/export/model_card.json")


def test_logs_are_lines_of_json_when_asked(start):
    container = start("plan", "configs/smoke.toml", options=("--env", "MEMFIT_LOG_FORMAT=json"))
    state, (stdout, stderr) = container.wait(), container.logs()
    assert (state["ExitCode"], stderr) == (0, "")
    lines = [json.loads(line) for line in stdout.splitlines()]
    assert len(lines) > 3
    assert all({"time", "level", "message"} <= line.keys() for line in lines)
