"""Killed flows, workers and servers, and cancelled runs, with real processes: the next run goes on, and none is left.

One run of the pipeline is interrupted again and again, by one fault per test; the last test lets it end.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.prepare_server import HEARTBEAT_SECONDS
from memfit.errors import RunStateError
from tests.conftest import TINY_CONFIG, series_csv
from tests.flows.service import Service, wait_until

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]
ROOT = Path(__file__).parents[2]
STAGE = "stages=[{name='only', epochs=16, global_batch_size=2, lr=1e-3, checkpoint_every_steps=20}]"
OVERRIDES = (STAGE, "plan.checkpointing=['none']", "export.samples=4")
CRASH_AFTER = 40
"""Seconds without a heartbeat in these tests: more than the 30 between two, less than what is shipped."""


class Story:
    """A service and the one run directory that all of its flow runs work in."""

    def __init__(self, service: Service, folder: Path) -> None:
        self.service, self.runs, self.config = service, folder / "runs", folder / "tiny.toml"
        self.server: subprocess.Popen[bytes] | None = None
        self.worker: subprocess.Popen[bytes] | None = None
        self.parameters = {
            "config": str(self.config),
            "overrides": list(OVERRIDES),
            "runs": str(self.runs),
            "store": str(folder / "store"),
            "resume": True,
        }

    def schedule(self) -> str:
        """Ask for a flow run; return its path below the API."""
        deployment = self.service.get("/deployments/name/train-model/smoke")["id"]
        path = f"/deployments/{deployment}/create_flow_run"
        return f"/flow_runs/{self.service.post(path, {'parameters': self.parameters}).raise_for_status().json()['id']}"

    def state(self, run: str) -> str:
        return str(self.service.get(run)["state"]["type"])

    def wait_for(self, run: str, state: str, seconds: float) -> None:
        wait_until(lambda: self.state(run) == state, seconds, f"{state} run\n{self.service.log('worker')[-3000:]}")

    def train(self) -> str:
        """Start a run, and wait until it has gone on from the last checkpoint, and written another."""
        before = self.checkpoint_step()
        run = self.schedule()

        def trains_on() -> bool:
            assert self.state(run) not in ("FAILED", "CRASHED", "COMPLETED"), self.service.log("worker")[-3000:]
            return self.checkpoint_step() > before and self.step() > self.checkpoint_step()

        wait_until(trains_on, 90, f"step after a checkpoint that is newer than {before}")
        assert not before or f"resumed after step {before} " in self.service.log("worker")
        return run

    @property
    def stage(self) -> Path:
        (run_dir,) = (self.runs / "tiny").iterdir()  # one, whatever happened
        return run_dir / "stages/1-only"

    def events(self) -> list[dict[str, Any]]:
        try:
            lines = (self.stage / "events.jsonl").read_text().splitlines()
        except (FileNotFoundError, ValueError):
            return []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def step(self) -> int:
        return max((event["step"] for event in self.events() if event["event"] == "step"), default=0)

    def checkpoint_step(self) -> int:
        try:
            return int(json.loads((self.stage / "checkpoints/last/checkpoint.json").read_text())["step"])
        except (FileNotFoundError, ValueError):
            return 0

    def processes(self) -> dict[int, str]:
        """Return what belongs to a flow run: all that is not of the server's or the worker's session."""
        services = {process.pid for process in (self.server, self.worker) if process is not None}
        found = {}
        for pid, command in self.service.started("").items():
            with contextlib.suppress(ProcessLookupError):
                if os.getsid(pid) not in services and HOLD not in command:
                    found[pid] = command
        return found

    def flow(self) -> int:
        (pid,) = [pid for pid, command in self.processes().items() if "memfit.process" not in command]
        return pid

    def wait_for_no_process(self) -> None:
        wait_until(lambda: not self.processes(), 20, f"end of what belonged to the run: {self.processes()}")

    def weights(self) -> list[bytes]:
        return [(self.stage / "checkpoints" / name / "model.safetensors").read_bytes() for name in ("last", "best")]

    def prepare_server(self, *options: str) -> str:
        """Run the shipped command; return what it says."""
        line = [sys.executable, "-m", "flows.prepare_server", *options]
        done = subprocess.run(line, cwd=ROOT, env=self.service.environment, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    def automation(self) -> dict[str, Any]:
        (found,) = self.service.post("/automations/filter", {}).json()
        return dict(found)


@pytest.fixture(scope="module")
def story(tmp_path_factory) -> Iterator[Story]:
    """Server, worker and deployment, and a run from the command line beside them that nothing disturbs."""
    folder = tmp_path_factory.mktemp("story")
    (folder / "tiny.toml").write_text(TINY_CONFIG.format(csv=series_csv(folder / "load.csv")), encoding="utf-8")
    story = Story(Service(tmp_path_factory.mktemp("service"), ROOT), folder)
    options = [part for override in OVERRIDES for part in ("--set", override)]
    line = [sys.executable, "-m", "memfit", "train", str(story.config), *options, "--run-dir", str(folder / "whole")]
    whole = subprocess.Popen([*line, "--store", story.parameters["store"]])
    try:
        story.server = story.service.start_server()
        pool = story.service.prefect("work-pool", "create", "memfit-process", "--type", "process")
        assert pool.returncode == 0, pool.stdout + pool.stderr
        deployed = story.service.prefect("deploy", "--name", "smoke")
        story.worker = story.service.start_worker()
        assert deployed.returncode == 0, deployed.stdout + deployed.stderr
        assert whole.wait(timeout=120) == 0
        yield story
    finally:
        whole.kill()
        whole.wait()
        story.service.kill()


@pytest.fixture(scope="module")
def whole(story) -> list[bytes]:
    """The weights of the undisturbed training."""
    checkpoints = story.runs.parent / "whole/stages/1-only/checkpoints"
    return [(checkpoints / name / "model.safetensors").read_bytes() for name in ("last", "best")]


HOLD = """
import sys
from prefect import flow
from flows.ownership import device_slot
@flow
def hold():
    with device_slot("cuda:0"):
        print("holds", flush=True)
        sys.stdin.read()
hold()
"""


@pytest.fixture(scope="module")
def waiting(story) -> Iterator[subprocess.Popen[str]]:
    """A run that waits for the slot of a card, whose holder is killed."""

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", HOLD],
            cwd=ROOT,
            env=story.service.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    holder = start()
    assert holder.stdout.readline() == "holds\n"
    waiting = start()
    assert not select.select([waiting.stdout], [], [], 8)[0]
    for pipe in (holder.stdin, holder.stdout):
        pipe.close()
    holder.kill()
    holder.wait()
    yield waiting
    waiting.kill()
    waiting.communicate()


def test_the_server_is_prepared_once_however_often_it_is_asked(story):
    assert "'memfit-cuda-0', 1 run: created" in story.prepare_server("--device", "cuda:0")
    first = story.automation()
    assert first["trigger"]["within"] == 3 * HEARTBEAT_SECONDS == 90
    assert story.service.get("/v2/concurrency_limits/memfit-cuda-0")["limit"] == 1
    story.prepare_server("--device", "cuda:0", "--crash-after", str(CRASH_AFTER))
    again = story.automation()
    assert (again["id"], again["trigger"]["within"]) == (first["id"], CRASH_AFTER)


def test_a_flow_that_is_killed_is_crashed_and_its_child_gone(story):
    run = story.train()
    assert b"PREFECT_FLOWS_HEARTBEAT_FREQUENCY=30\0" in Path(f"/proc/{story.flow()}/environ").read_bytes()
    os.kill(story.flow(), signal.SIGKILL)
    story.wait_for_no_process()
    story.wait_for(run, "CRASHED", 30)
    assert story.checkpoint_step()


def test_a_second_run_in_the_same_directory_is_refused_by_the_name_of_the_first(story):
    run = story.train()
    line = [sys.executable, "-m", "memfit", "train", str(story.stage.parents[1])]
    second = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert second.returncode == RunStateError.exit_status
    assert f"in use by process {story.flow()} on " in second.stderr
    os.kill(story.flow(), signal.SIGTERM)  # from outside, as a machine that is shut down does
    story.wait_for(run, "CRASHED", 30)
    story.wait_for_no_process()


def test_a_worker_that_is_killed_takes_its_run_with_it_and_the_run_writes_a_checkpoint(story):
    run = story.train()
    trained = story.step()
    story.worker.kill()
    story.worker.wait()
    story.wait_for_no_process()
    story.wait_for(run, "CRASHED", 5)
    assert story.checkpoint_step() >= trained
    story.worker = story.service.start_worker()


def test_a_worker_that_is_told_to_stop_waits_until_its_run_has_written_a_checkpoint(story):
    story.worker.terminate()
    story.worker.wait()
    story.worker = story.service.start_stoppable_worker()
    run = story.train()
    trained = story.step()
    story.worker.terminate()
    assert story.worker.wait(60) == 0
    assert story.checkpoint_step() == story.step() >= trained
    story.wait_for(run, "CRASHED", 5)
    story.wait_for_no_process()
    story.worker = story.service.start_worker()


def test_a_cancelled_run_writes_a_checkpoint_and_leaves_nothing(story):
    run = story.train()
    trained = story.step()
    state = {"state": {"type": "CANCELLING"}}
    story.service.post(f"{run}/set_state", state).raise_for_status()
    story.wait_for(run, "CANCELLED", 60)
    story.wait_for_no_process()
    assert story.checkpoint_step() >= trained


def test_a_run_that_dies_with_its_worker_is_crashed_when_its_heartbeat_stops(story, waiting):
    run = story.train()
    flow = story.flow()
    story.worker.kill()
    os.kill(flow, signal.SIGKILL)
    story.worker.wait()
    story.wait_for_no_process()
    assert story.state(run) == "RUNNING"
    story.worker = story.service.start_worker()
    story.wait_for(run, "CRASHED", CRASH_AFTER + 30)
    assert "no heartbeat" in story.service.get(run)["state"]["message"]


def test_a_server_that_is_killed_and_comes_back_costs_nothing_and_the_weights_are_the_undisturbed_ones(story, whole):
    story.prepare_server()
    run = story.train()
    os.killpg(story.server.pid, signal.SIGKILL)
    story.server.wait()
    trained = story.step()
    story.server = story.service.start_server()
    assert story.step() > trained  # training did not wait for it
    story.wait_for(run, "COMPLETED", 120)
    story.wait_for_no_process()
    assert story.weights() == whole


def test_the_run_after_all_this_starts_and_takes_everything_over(story):
    before = set((story.runs / "tiny").iterdir())
    story.wait_for(story.schedule(), "COMPLETED", 60)
    (run_dir,) = set((story.runs / "tiny").iterdir()) - before
    steps = json.loads((run_dir / "run.json").read_text())["steps"]
    assert {step["status"] for step in steps if step["name"] != "report"} == {"reused"}
    story.wait_for_no_process()


def test_the_slot_of_a_run_that_was_killed_goes_to_the_one_that_waits(waiting):
    assert select.select([waiting.stdout], [], [], 90)[0], "still waiting for the slot"
    assert waiting.stdout.readline() == "holds\n"
