"""Flow runs under MEMFIT_LOG_FORMAT=json: Prefect's lines and memfit's are JSON objects on stdout."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from flows import JSON_LOGS
from tests.flows.service import Service

pytestmark = pytest.mark.timeout(600)
KEPT = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MEMFIT_LOG"))}


def read(text: str) -> list[dict]:
    lines = [json.loads(line) for line in text.splitlines()]
    assert all(set(line) >= {"time", "level", "message"} for line in lines)
    return lines


def from_memfit(lines: list[dict]) -> list[dict]:
    return [line for line in lines if "event" in line]


SAY = "from prefect import flow; from prefect.logging import get_logger; get_logger('here').warning('said')"


@pytest.mark.parametrize(
    "order", ["import flows; {}", "import prefect, flows; {}", "from prefect import flow; import flows; {}"]
)
def test_prefect_writes_json_whichever_is_imported_first(root, tmp_path, order):
    environment = {**KEPT, "PREFECT_HOME": str(tmp_path), "MEMFIT_LOG_FORMAT": "json"}
    command = [sys.executable, "-c", order.format(SAY)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
    (line,) = read(done.stdout)
    assert (line["message"], line["level"], line["logger"]) == ("said", "warning", "prefect.here")
    assert done.stderr == ""


def test_prefect_s_own_format_stays_where_nothing_else_is_asked_for(root, tmp_path):
    environment = {**KEPT, "PREFECT_HOME": str(tmp_path)}
    command = [sys.executable, "-c", f"import flows; {SAY}"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert "said" in done.stderr


def test_a_bad_config_is_one_line(root, tmp_path):
    environment = {**KEPT, "PREFECT_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "flows.train_model", "none.toml", "--log-format", "json"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    (line,) = read(done.stdout)
    assert (done.returncode, done.stderr) == (2, "")
    assert line["fields"] == {"kind": "ConfigError", "exit_status": 2}


@pytest.mark.end_to_end
def test_every_line_of_a_flow_on_the_command_line_is_json(root, tmp_path, folders, small):
    overrides = [part for override in small for part in ("--set", override)]
    command = [sys.executable, "-m", "flows.plan_memory", "configs/smoke.toml", *overrides, "--json"]
    where = ["--runs", str(tmp_path / "runs"), "--store", folders["store"], "--log-format", "json"]
    environment = {**KEPT, "PREFECT_HOME": str(tmp_path / "home")}
    done = subprocess.run([*command, *where], cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    lines = from_memfit(read(done.stdout))
    assert [line["event"] for line in lines if line["event"] not in ("probe", "progress")] == [
        "step_start", "step_end", "step_start", "step_end", "finished", "summary"
    ]  # fmt: skip
    (run_dir,) = (tmp_path / "runs/smoke").iterdir()
    assert {(line["name"], line["run_id"]) for line in lines} == {("smoke", run_dir.name)}
    assert all("flow_run_id" in line for line in lines[:-2])


@pytest.fixture(scope="module")
def service(tmp_path_factory, root) -> Iterator[Service]:
    """A server that knows the flow plan-memory as a container would run it."""
    service = Service(tmp_path_factory.mktemp("service"), root)
    try:
        service.start_server()
        yield service
    finally:
        service.stop()


@pytest.fixture(scope="module")
def deployment(service, root) -> str:
    flow = service.post("/flows/", {"name": "plan-memory"}).json()
    step = {"prefect.deployments.steps.set_working_directory": {"directory": str(root)}}
    entry = {"entrypoint": "flows/plan_memory.py:plan_config", "enforce_parameter_schema": False, "pull_steps": [step]}
    return service.post("/deployments/", {"name": "logs", "flow_id": flow["id"], **entry}).json()["id"]


@pytest.fixture
def execute(service, deployment, tmp_path):
    """Run the flow as a container's command does: `prefect flow-run execute`."""

    def run(parameters: dict) -> tuple[subprocess.CompletedProcess, dict]:
        asked = {"parameters": parameters, "state": {"type": "PENDING"}}
        flow_run = service.post(f"/deployments/{deployment}/create_flow_run", asked).json()["id"]
        environment = {**service.environment, **JSON_LOGS, "MEMFIT_LOG_FORMAT": "json"}
        command = [sys.executable, "-m", "prefect", "flow-run", "execute", flow_run]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        return done, service.get(f"/flow_runs/{flow_run}")

    return run


@pytest.mark.server
@pytest.mark.end_to_end
def test_every_line_of_a_flow_run_in_a_container_is_json(execute, folders, small, tmp_path):
    runs = str(tmp_path / "runs")
    done, run = execute({"config": "configs/smoke.toml", "overrides": small, "runs": runs, "store": folders["store"]})
    assert run["state"]["type"] == "COMPLETED", done.stdout + done.stderr
    assert done.stderr == ""
    lines = read(done.stdout)
    assert {"set_working_directory" in line["message"] for line in lines} == {True, False}  # Prefect's first lines too
    assert {line["event"] for line in from_memfit(lines)} >= {"step_start", "step_end"}
    assert {line["flow_run_id"] for line in lines if "flow_run_id" in line} == {run["id"]}


@pytest.mark.server
@pytest.mark.end_to_end
def test_a_flow_run_that_does_not_fit_says_why_in_its_lines_and_in_the_gauges(execute, folders, small, tmp_path):
    parameters = {"config": "configs/smoke.toml", "overrides": small, "budget": "40MiB", "runs": str(tmp_path / "runs")}
    done, run = execute({**parameters, "store": folders["store"]})
    assert run["state"]["type"] == "FAILED", done.stdout + done.stderr
    told = [line["fields"] for line in read(done.stdout) if line.get("event") == "error"]
    assert ("DoesNotFitError", 4) in {(fields["kind"], fields["exit_status"]) for fields in told}
    text = (tmp_path / "runs/metrics/smoke.prom").read_text()
    found = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    assert [sample.labels["state"] for sample in found if sample.name.endswith("_state") and sample.value] == ["failed"]
    assert [sample.value for sample in found if sample.name == "memfit_run_exit_status"] == [4]
