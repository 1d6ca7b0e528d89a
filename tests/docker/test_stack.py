"""docker/compose.yaml on a real engine: server on PostgreSQL, services, a process and a docker worker, deployments.

PostgreSQL and Redis are stand-ins from Debian's packages. The tests go in order, on one stack.
"""

import json
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.docker.engine import POSTGRES, REDIS, Engine

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1800)]
SHORT = "stages=[{name='first', epochs=1, global_batch_size=64, lr=1e-3, max_steps=8}]"
LONG = "stages=[{name='only', epochs=20, max_steps=600, global_batch_size=16, lr=1e-3, checkpoint_every_steps=20}]"
FAST = "plan.checkpointing=['none']"
MIB = 2**20


class Stack:
    """The services of docker/compose.yaml, with a password of their own."""

    def __init__(self, engine: Engine) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.engine, self.url, self.user = engine, f"http://127.0.0.1:{port}/api", ("memfit", secrets.token_hex(12))
        self.environment = {
            "COMPOSE_PROJECT_NAME": "memfit",
            "COMPOSE_PROFILES": "cpu,docker",
            "POSTGRES_PASSWORD": secrets.token_hex(12),
            "PREFECT_AUTH": ":".join(self.user),
            "PREFECT_PORT": str(port),
            "MEMFIT_IMAGE": "memfit:cpu",
            "MEMFIT_MEMORY": "4g",
            "DOCKER_SOCKET": str(engine.socket),
            "DOCKER_GID": str(engine.socket.stat().st_gid),
        }

    def compose(self, *arguments: str, check: bool = True) -> str:
        done = self.engine.compose(*arguments, check=check, **self.environment)
        return done.stdout + done.stderr

    def post(self, path: str, document: dict[str, Any]) -> Any:
        return httpx.post(f"{self.url}{path}", json=document, auth=self.user, timeout=60).raise_for_status().json()

    def get(self, path: str) -> Any:
        return httpx.get(f"{self.url}{path}", auth=self.user, timeout=60).raise_for_status().json()

    def prefect(self, *arguments: str) -> str:
        """Run a prefect command where docker/README.md says: in the server's container."""
        return self.compose("exec", "-T", "server", "prefect", *arguments)

    def in_volume(self, command: str) -> str:
        """Run a shell command where the volume is mounted."""
        return self.engine.run(
            "memfit:cpu", "sh", "-c", command, options=("--volume", "memfit-data:/data"), check=False
        )

    def wait_for(self, condition: Callable[[], Any], seconds: float, what: str) -> Any:
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            logs = self.compose("logs", "--tail", "60", "worker-cpu", "worker-docker", check=False)
            assert time.monotonic() < deadline, f"after {seconds} s still no {what}\n{logs[-6000:]}"
            time.sleep(1)
        return found

    def begin(self, deployment: str, *overrides: str, **variables: Any) -> str:
        """Ask for a flow run; return its id."""
        known = self.get(f"/deployments/name/train-model/{deployment}")
        document = {"parameters": {"overrides": [*overrides, FAST], "resume": True}, "job_variables": variables}
        return str(self.post(f"/deployments/{known['id']}/create_flow_run", document)["id"])

    def state(self, run: str) -> str:
        return str(self.get(f"/flow_runs/{run}")["state"]["type"])

    def finish(self, run: str) -> None:
        """Wait for a flow run's good end."""
        ends = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
        self.wait_for(lambda: self.state(run) in ends, 600, "end of the flow run")
        state = self.get(f"/flow_runs/{run}")["state"]
        assert state["type"] == "COMPLETED", (state, self.compose("logs", "--tail", "100", check=False)[-8000:])

    def flow_container(self, run: str) -> dict[str, Any]:
        """Inspect the container of a flow run of the docker pool."""
        wanted = f"label=io.prefect.flow-run-id={run}"
        name = self.engine.docker("ps", "--all", "--quiet", "--filter", wanted).stdout.strip()
        return dict(json.loads(self.engine.docker("inspect", name).stdout)[0]) if name else {}


@pytest.fixture(scope="module")
def stack(engine, image) -> Iterator[Stack]:
    for stand_in in (POSTGRES, REDIS):
        engine.build_stand_in(stand_in)
    stack = Stack(engine)
    stack.compose("down", "--volumes", check=False)
    try:
        stack.compose("up", "--detach")
        yield stack
    finally:
        stack.compose("down", "--volumes", "--timeout", "20", check=False)
        left = engine.docker("ps", "--all", "--quiet").stdout.split()
        if left:
            engine.docker("rm", "--force", *left, check=False)
        engine.docker("volume", "rm", "--force", "memfit-data", check=False)


def events(stack: Stack, name: str, stage: str) -> list[dict[str, Any]]:
    lines = stack.in_volume(f"cat /data/runs/{name}/*/stages/{stage}/events.jsonl 2>/dev/null").splitlines()
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


def last_step(stack: Stack, name: str, stage: str) -> int:
    return max((event["step"] for event in events(stack, name, stage) if event["event"] == "step"), default=0)


def test_one_command_brings_everything_up_and_installs_the_deployments(stack):
    names = {each["name"] for each in stack.post("/deployments/filter", {})}
    assert {"smoke", "smoke-docker", "nightly", "multiscale-t4"} <= names
    pools = {each["name"]: each["type"] for each in stack.post("/work_pools/filter", {})}
    assert pools == {"memfit-process": "process", "memfit-docker": "docker", "memfit-kubernetes": "kubernetes"}


def test_the_api_asks_for_its_password_and_listens_on_the_loopback_only(stack):
    assert httpx.post(f"{stack.url}/deployments/filter", json={}, timeout=30).status_code == 401
    ports = stack.engine.docker("ps", "--format", "{{.Ports}}").stdout
    published = [part for part in ports.replace("\n", ", ").split(", ") if "->" in part]
    assert published
    assert all(part.startswith("127.0.0.1:") for part in published)


def test_the_page_of_the_server_opens(stack):
    page = httpx.get(stack.url.removesuffix("/api"), follow_redirects=True, timeout=30)
    assert page.status_code == 200
    assert "<html" in page.text.lower()


def test_the_nightly_run_is_switched_on_as_the_page_says(stack):
    nightly = stack.get("/deployments/name/train-model/nightly")
    (schedule,) = nightly["schedules"]
    assert not schedule["active"]
    stack.prefect("deployment", "schedule", "resume", "train-model/nightly", schedule["id"])
    (schedule,) = stack.get("/deployments/name/train-model/nightly")["schedules"]
    assert schedule["active"]
    stack.compose("up", "--detach")  # installs the deployments again
    (schedule,) = stack.get("/deployments/name/train-model/nightly")["schedules"]
    assert schedule["active"]


def test_workers_become_healthy(stack):
    def healthy() -> bool:
        states = stack.engine.docker("ps", "--filter", "name=worker", "--format", "{{.Status}}").stdout.splitlines()
        return len(states) == 2 and all("(healthy)" in state for state in states)

    stack.wait_for(healthy, 240, "healthy workers")


def test_a_deployment_runs_on_the_process_pool(stack):
    said = stack.prefect(
        "deployment", "run", "train-model/smoke", "--watch", "--watch-timeout", "600",
        "--param", f"overrides={json.dumps([SHORT, FAST])}",
    )  # fmt: skip
    assert "COMPLETED" in said.upper()
    run = json.loads(stack.in_volume("cat /data/runs/smoke/*/run.json"))
    assert {step["status"] for step in run["steps"]} == {"ran"}
    card = json.loads(stack.in_volume("cat /data/runs/smoke/*/export/model_card.json"))
    assert card["workload"] == "series"


def test_a_deployment_runs_in_a_container_of_its_own_within_its_memory(stack):
    run = stack.begin("smoke-docker", SHORT, mem_limit="3g")
    stack.finish(run)
    found = stack.flow_container(run)
    assert found["HostConfig"]["Memory"] == 3 * 1024 * MIB
    assert (found["State"]["ExitCode"], found["State"]["OOMKilled"]) == (0, False)
    assert found["Config"]["User"] == "1000:1000"
    assert found["HostConfig"]["CapDrop"] == ["ALL"]
    assert found["HostConfig"]["ReadonlyRootfs"]
    gauges = stack.in_volume("cat /data/runs/metrics/smoke.prom")
    assert 'state="finished",workload="series"} 1.0' in gauges


def test_a_deployment_for_a_card_runs_on_what_is_here_with_other_parameters_and_job_variables(stack):
    said = stack.prefect(
        "deployment", "run", "train-model/multiscale-t4", "--watch", "--watch-timeout", "600",
        "--param", "config=configs/smoke.toml", "--param", "device=cpu", "--param", "budget=2GiB",
        "--param", f"overrides={json.dumps([SHORT, FAST])}",
        "--job-variable", "image=memfit:cpu", "--job-variable", "device_requests=[]",
        "--job-variable", "mem_limit=2500m",
    )  # fmt: skip
    assert "COMPLETED" in said.upper()
    memory = stack.engine.docker(
        "inspect", "--format", "{{.HostConfig.Memory}}", *stack.engine.docker("ps", "--all", "--quiet").stdout.split()
    )
    assert str(2500 * MIB) in memory.stdout.split()


def test_a_stopped_worker_leaves_a_checkpoint_and_goes_on_when_it_is_back(stack):
    run = stack.begin("smoke", LONG, 'name="stopped"')
    stack.wait_for(lambda: last_step(stack, "stopped", "1-only") >= 30, 300, "thirtieth step")
    stack.compose("stop", "worker-cpu")
    reached = json.loads(stack.in_volume("cat /data/runs/stopped/*/stages/1-only/checkpoints/last/checkpoint.json"))
    assert reached["step"] == last_step(stack, "stopped", "1-only")
    stack.wait_for(lambda: stack.state(run) == "CRASHED", 200, "crashed run")
    stack.compose("start", "worker-cpu")
    stack.finish(stack.begin("smoke", LONG, 'name="stopped"'))
    assert f"resumed after step {reached['step']} " in stack.compose("logs", "worker-cpu")
    seen = events(stack, "stopped", "1-only")
    assert [event["step"] for event in seen if event["event"] == "step"] == list(range(1, 601))


def test_a_stopped_flow_container_leaves_a_checkpoint_and_the_next_run_goes_on(stack):
    run = stack.begin("smoke-docker", LONG, 'name="contained"')
    stack.wait_for(lambda: last_step(stack, "contained", "1-only") >= 30, 300, "thirtieth step")
    stack.engine.docker("stop", "--time", "100", stack.flow_container(run)["Id"])
    reached = json.loads(stack.in_volume("cat /data/runs/contained/*/stages/1-only/checkpoints/last/checkpoint.json"))
    assert reached["step"] == last_step(stack, "contained", "1-only")
    stack.wait_for(lambda: stack.state(run) == "CRASHED", 200, "crashed run")
    again = stack.begin("smoke-docker", LONG, 'name="contained"')
    stack.finish(again)
    said = stack.engine.docker("logs", stack.flow_container(again)["Id"])
    assert f"resumed after step {reached['step']} " in said.stdout + said.stderr


def test_data_survive_one_command_down_and_one_up(stack):
    before = {run["id"]: run["state"]["type"] for run in stack.post("/flow_runs/filter", {})}
    assert before
    stack.compose("down")
    assert (
        stack.engine.docker("ps", "--all", "--quiet", "--filter", "label=com.docker.compose.project=memfit").stdout
        == ""
    )
    stack.compose("up", "--detach")
    after = {run["id"]: run["state"]["type"] for run in stack.post("/flow_runs/filter", {})}
    assert after == before
    assert "model.onnx" in stack.in_volume("ls /data/runs/stopped/*/export")
    stack.finish(stack.begin("smoke", SHORT))


def test_records_are_backed_up_as_the_page_says(stack):
    dump = "pg_dump --username prefect --format custom prefect | pg_restore --list"
    assert "TABLE DATA public flow_run " in stack.compose("exec", "-T", "postgres", "sh", "-c", dump)


def test_credentials_are_rotated_as_the_page_says(stack):
    old, new = stack.user, ("memfit", secrets.token_hex(12))
    password = secrets.token_hex(12)
    sql = f"alter user prefect password '{password}'"
    stack.compose("exec", "-T", "postgres", "psql", "--username", "prefect", "--command", sql)
    stack.user = new
    stack.environment.update(PREFECT_AUTH=":".join(new), POSTGRES_PASSWORD=password)
    stack.compose("up", "--detach")
    assert httpx.post(f"{stack.url}/deployments/filter", json={}, auth=old, timeout=30).status_code == 401
    stack.finish(stack.begin("smoke", SHORT))
