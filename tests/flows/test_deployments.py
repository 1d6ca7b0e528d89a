"""prefect.yaml against a real server and worker on the loopback interface: deploy, run, watch, refuse, cancel."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]
ONE_STAGE = "stages=[{name='first', epochs=1, global_batch_size=2, lr=1e-3, max_steps=4}]"
ONE_LONG_STAGE = "stages=[{name='only', epochs=1, global_batch_size=1, lr=1e-3}]"


class Service:
    """A Prefect server of the test's own, with one worker, and the prefect command pointed at it."""

    def __init__(self, folder: Path, root: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.root = folder, root
        self.url = f"http://127.0.0.1:{self.port}/api"
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MEMFIT_"))}
        self.environment = {
            **kept,
            "PREFECT_HOME": str(folder / "home"),
            "PREFECT_API_URL": self.url,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PREFECT_RUNNER_POLL_FREQUENCY": "1",
            "COLUMNS": "200",
        }
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, *arguments: str, **extra: str) -> subprocess.Popen[bytes]:
        """Start a prefect command that stays, in a process group of its own."""
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "prefect", *arguments],
                cwd=self.folder,
                env={**self.environment, **extra},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def stop(self) -> None:
        """End what was started, the last first, and whatever those had started."""
        for process in reversed(self.processes):
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def prefect(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a prefect command to its end, in the repository."""
        line = [sys.executable, "-m", "prefect", "--no-prompt", *arguments]
        return subprocess.run(line, cwd=self.root, env=self.environment, capture_output=True, text=True, timeout=300)

    def get(self, path: str) -> Any:
        return httpx.get(f"{self.url}{path}", timeout=30).raise_for_status().json()

    def post(self, path: str, document: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=document, timeout=30)

    def up(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()


@pytest.fixture(scope="module")
def service(tmp_path_factory, root, wait_until) -> Iterator[Service]:
    """Server, work pool, both deployments, worker."""
    service = Service(tmp_path_factory.mktemp("service"), root)
    try:
        server = service.start("server", "server", "start", "--host", "127.0.0.1", "--port", str(service.port))
        wait_until(lambda: service.up() or server.poll() is not None, 120, "Prefect server")
        assert server.poll() is None, service.log("server")
        for arguments in (["work-pool", "create", "memfit-process", "--type", "process"], ["deploy", "--all"]):
            done = service.prefect(*arguments)
            assert done.returncode == 0, done.stdout + done.stderr
        worker = ["worker", "start", "--pool", "memfit-process", "--type", "process"]
        service.start("worker", *worker, MEMFIT_HOME=str(root))
        yield service
    finally:
        service.stop()


@pytest.fixture
def parameters(folders, tmp_path) -> dict[str, Any]:
    return {"store": folders["store"], "runs": str(tmp_path / "runs")}


def deployment(service: Service, name: str) -> dict[str, Any]:
    return service.get(f"/deployments/name/train-model/{name}")


def num_flow_runs(service: Service) -> int:
    return int(service.post("/flow_runs/count", {}).json())


def children_of(service: Service) -> list[int]:
    """List the living memfit children whose environment names this test's Prefect home."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, environ = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if b"memfit.process" in command and service.environment["PREFECT_HOME"].encode() in environ:
            found.append(int(folder.name))
    return found


def test_smoke_deployment_runs_under_a_worker_and_leaves_artifacts(service, parameters):
    chosen = {**parameters, "overrides": [ONE_STAGE, "plan.checkpointing=['none']"]}
    done = service.prefect(
        "deployment", "run", "train-model/smoke", "--params", json.dumps(chosen), "--watch", "--watch-timeout", "280"
    )
    assert done.returncode == 0, done.stdout + done.stderr + service.log("worker")
    (run,) = service.post("/flow_runs/filter", {}).json()
    assert run["state"]["type"] == "COMPLETED", service.log("worker")
    assert {"memfit", "smoke"} <= set(run["tags"])
    assert run["name"].startswith("smoke 2")
    wanted = {"artifacts": {"flow_run_id": {"any_": [run["id"]]}}}
    artifacts = {artifact["key"]: artifact["data"] for artifact in service.post("/artifacts/filter", wanted).json()}
    (run_dir,) = (Path(parameters["runs"]) / "smoke").iterdir()
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    assert json.loads(artifacts["plan"])[0]["stage"] == "first"
    assert json.loads(artifacts["metrics"])[0]["mae"] == pytest.approx(evaluation["metrics"]["mae"], rel=1e-4)
    assert float(artifacts["progress-first"]) == 100
    assert (run_dir / "report.html").as_uri() in artifacts["report"]
    assert (run_dir / "export" / "model.onnx").is_file()


@pytest.mark.parametrize(
    ("bad", "name"),
    [({"budget": "12 bananas"}, "budget"), ({"overrides": ["lr"]}, "overrides"), ({"device": "tpu"}, "device")],
)
def test_server_refuses_bad_parameters_before_a_run_exists(service, bad, name):
    before = num_flow_runs(service)
    answer = service.post(f"/deployments/{deployment(service, 'smoke')['id']}/create_flow_run", {"parameters": bad})
    assert answer.status_code == 409
    assert name in answer.text
    assert num_flow_runs(service) == before


def test_prefect_command_says_which_parameter_is_bad(service):
    before = num_flow_runs(service)
    done = service.prefect("deployment", "run", "train-model/smoke", "-p", "budget=12 bananas")
    assert done.returncode != 0
    assert "12 bananas" in done.stdout + done.stderr
    assert num_flow_runs(service) == before


def test_pull_step_names_the_worker_s_directory_not_the_deployer_s(service, root):
    (step,) = deployment(service, "smoke")["pull_steps"]
    assert step == {"prefect.deployments.steps.set_working_directory": {"directory": "{{ $MEMFIT_HOME }}"}}


def test_nightly_is_deployed_inactive_and_one_at_a_time(service):
    nightly = deployment(service, "nightly")
    (schedule,) = nightly["schedules"]
    assert (schedule["schedule"]["cron"], schedule["active"]) == ("0 2 * * *", False)
    assert nightly["parameters"] == {"config": "configs/weather_quick.toml"}
    assert nightly["global_concurrency_limit"]["limit"] == 1
    assert nightly["concurrency_options"]["collision_strategy"] == "CANCEL_NEW"
    assert nightly["enforce_parameter_schema"]


def test_cancelled_run_leaves_a_checkpoint_and_no_child(service, parameters, wait_until):
    chosen = {**parameters, "overrides": [ONE_LONG_STAGE]}
    answer = service.post(
        f"/deployments/{deployment(service, 'smoke')['id']}/create_flow_run", {"parameters": chosen}
    ).json()
    runs = Path(parameters["runs"]) / "smoke"
    name = f"/flow_runs/{answer['id']}"

    def trains() -> bool:
        assert service.get(name)["state"]["type"] not in ("FAILED", "CRASHED", "COMPLETED"), service.log("worker")
        return any('"step": 5,' in events.read_text() for events in runs.glob("*/stages/1-only/events.jsonl"))

    wait_until(trains, 240, "fifth step of training")
    assert children_of(service)
    service.post(f"{name}/set_state", {"state": {"type": "CANCELLING"}}).raise_for_status()
    wait_until(lambda: service.get(name)["state"]["type"] == "CANCELLED", 120, "cancelled run")
    wait_until(lambda: not children_of(service), 60, "end of the training child")
    (checkpoint,) = runs.glob("*/stages/1-only/checkpoints/last/checkpoint.json")
    assert json.loads(checkpoint.read_text())["step"] >= 5
