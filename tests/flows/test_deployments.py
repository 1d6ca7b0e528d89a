"""prefect.yaml against a real server and worker on the loopback interface: deploy, run, watch, refuse, cancel."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.flows.service import Service

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]
ONE_STAGE = "stages=[{name='first', epochs=1, global_batch_size=2, lr=1e-3, max_steps=4}]"
ONE_LONG_STAGE = "stages=[{name='only', epochs=1, global_batch_size=1, lr=1e-3}]"


@pytest.fixture(scope="module")
def service(tmp_path_factory, root) -> Iterator[Service]:
    """Server, work pool, both deployments, worker."""
    service = Service(tmp_path_factory.mktemp("service"), root)
    try:
        service.start_server()
        for arguments in (["work-pool", "create", "memfit-process", "--type", "process"], ["deploy", "--all"]):
            done = service.prefect(*arguments)
            assert done.returncode == 0, done.stdout + done.stderr
        service.start_worker()
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
    assert nightly["parameters"] == {"config": "configs/weather_quick.toml", "resume": True}
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
    assert service.started("memfit.process")
    service.post(f"{name}/set_state", {"state": {"type": "CANCELLING"}}).raise_for_status()
    wait_until(lambda: service.get(name)["state"]["type"] == "CANCELLED", 120, "cancelled run")
    wait_until(lambda: not service.started("memfit.process"), 60, "end of the training child")
    (checkpoint,) = runs.glob("*/stages/1-only/checkpoints/last/checkpoint.json")
    assert json.loads(checkpoint.read_text())["step"] >= 5
