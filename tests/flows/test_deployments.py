"""`make deploy` and prefect.yaml with a real server and worker on the loopback interface: deploy, run, refuse, cancel.

Pools for containers have no worker here: their runs are asked for, and stay scheduled.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.flows.service import Service

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]
ONE_STAGE = "stages=[{name='first', epochs=1, global_batch_size=2, lr=1e-3, max_steps=4}]"
ONE_LONG_STAGE = "stages=[{name='only', epochs=1, global_batch_size=1, lr=1e-3}]"


@pytest.fixture(scope="module")
def service(tmp_path_factory, root) -> Iterator[Service]:
    """Server, work pools, all deployments, process worker."""
    service = Service(tmp_path_factory.mktemp("service"), root)
    try:
        service.start_server()
        done = service.deploy(MEMFIT_HOME="/where/the/deployer/is")
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
    wanted = {"deployments": {"id": {"any_": [deployment(service, "smoke")["id"]]}}}
    (run,) = service.post("/flow_runs/filter", wanted).json()
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


def identities(service: Service) -> dict[str, Any]:
    """Return ids and schedules of all deployments, and templates of all pools: what a second deploy must leave."""
    deployments = {
        each["name"]: (each["id"], each["paused"], [{**s, "updated": ""} for s in each["schedules"]])
        for each in service.post("/deployments/filter", {}).json()
    }
    pools = {each["name"]: each["base_job_template"] for each in service.post("/work_pools/filter", {}).json()}
    return {**deployments, **pools}


def changes(service: Service, *arguments: str) -> list[str]:
    """Deploy, and return what that says it did."""
    done = service.deploy(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if not line.endswith(": unchanged")]


def test_second_deploy_changes_nothing_and_says_so(service):
    before = identities(service)
    assert {"memfit-process", "memfit-docker", "memfit-kubernetes", "multiscale-t4", "plan-t4"} <= before.keys()
    assert changes(service) == ["nothing changed"]
    assert identities(service) == before


def test_deploy_keeps_what_was_switched_on_the_server(service):
    (schedule,) = deployment(service, "nightly")["schedules"]
    done = service.prefect("deployment", "schedule", "resume", "train-model/nightly", schedule["id"])
    assert done.returncode == 0, done.stdout + done.stderr
    service.post(f"/deployments/{deployment(service, 'recurrent-tiny')['id']}/pause_deployment", {}).raise_for_status()
    before = identities(service)
    kept = "schedule every-night of nightly: on, as it was switched on the server"
    assert changes(service) == [kept, "nothing changed"]
    assert identities(service) == before
    assert deployment(service, "nightly")["schedules"][0]["active"]
    service.prefect("deployment", "schedule", "pause", "train-model/nightly", schedule["id"])


def test_deploy_follows_the_file_edited_removed_and_back(service, root, tmp_path):
    text = (root / "prefect.yaml").read_text()
    document = yaml.safe_load(text)
    by_name = {each["name"]: each for each in document["deployments"]}
    by_name["nightly"]["schedules"] = [{**by_name["nightly"]["schedules"][0], "cron": "30 4 * * *"}]
    by_name["nightly-docker"]["schedules"] = []
    by_name["multiscale-t4-kubernetes"]["name"] = "renamed"
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump(document))
    old = deployment(service, "nightly")

    assert changes(service, "--prefect-file", str(own)) == [
        "schedule every-night of nightly-docker: removed",
        "deployment train-model/multiscale-t4-kubernetes: removed",
        "deployment train-model/nightly: changed (schedules)",
        "deployment train-model/nightly-docker: changed (schedules)",
        "deployment train-model/renamed: created",
        "5 changes",
    ]
    new = deployment(service, "nightly")
    assert new["schedules"][0]["schedule"]["cron"] == "30 4 * * *"
    assert (new["id"], new["schedules"][0]["id"]) == (old["id"], old["schedules"][0]["id"])
    assert deployment(service, "nightly-docker")["schedules"] == []
    assert service.post("/deployments/filter", {}).text.count('"name":"multiscale-t4-kubernetes"') == 0

    assert changes(service)[-1] == "4 changes"
    assert deployment(service, "nightly")["schedules"][0]["schedule"]["cron"] == "0 2 * * *"


def test_deploy_leaves_a_deployment_of_one_s_own(service, tmp_path):
    done = service.prefect(
        *("deploy", "flows/train_model.py:train_model", "--name", "mine", "--pool", "memfit-process", "--tag", "own")
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert changes(service) == ["nothing changed"]
    mine = deployment(service, "mine")
    assert mine["tags"] == ["own"]


def test_deploy_says_what_prefect_refused(service, tmp_path):
    (tmp_path / "own.yaml").write_text("deployments: [{name: one, entrypoint: 'flows/none.py:none'}]")
    before = identities(service)
    done = service.deploy("--prefect-file", str(tmp_path / "own.yaml"))
    assert done.returncode == 2
    assert "prefect deploy: expected exit status 0" in done.stderr
    assert "none.py" in done.stderr
    assert "Traceback" not in done.stderr.split("prefect deploy:")[0]
    assert identities(service) == before


@pytest.mark.parametrize(
    ("url", "message"), [("", "PREFECT_API_URL"), ("http://127.0.0.1:9/api", "expected a Prefect server at http://127")]
)
def test_deploy_without_a_server_says_what_to_do(service, url, message):
    done = service.deploy(PREFECT_API_URL=url, PREFECT_CLIENT_MAX_RETRIES="0")
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_of_a_container_s_deployment_takes_parameters_and_job_variables(service):
    done = service.prefect(
        *("deployment", "run", "train-model/multiscale-t4", "--param", "budget=7GiB"),
        *("--param", 'overrides=["stages.0.epochs=2"]', "--job-variable", "mem_limit=6g"),
        *("--job-variable", "image=memfit:cuda", "--job-variable", "env.MEMFIT_MACHINE=attic"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    wanted = {"deployments": {"id": {"any_": [deployment(service, "multiscale-t4")["id"]]}}}
    (run,) = service.post("/flow_runs/filter", wanted).json()
    assert run["job_variables"] == {"mem_limit": "6g", "image": "memfit:cuda", "env.MEMFIT_MACHINE": "attic"}
    assert run["parameters"]["budget"] == "7GiB"
    assert run["parameters"]["overrides"] == ["stages.0.epochs=2"]
    assert run["parameters"]["config"] == "configs/multiscale_t4.toml"
    assert (run["work_pool_name"], run["state"]["type"]) == ("memfit-docker", "SCHEDULED")


@pytest.mark.parametrize(
    ("name", "variables", "bad"),
    [
        ("multiscale-t4", {"mem_limit": "lots"}, "mem_limit"),
        ("multiscale-t4", {"mem_limt": "6g"}, "mem_limt"),
        ("multiscale-t4", {"device_requests": 1}, "device_requests"),
        ("multiscale-t4-kubernetes", {"num_gpus": -1}, "num_gpus"),
        ("multiscale-t4-kubernetes", {"memory_limit": "12GiB"}, "memory_limit"),
        ("multiscale-t4-kubernetes", {"gpus": 1}, "gpus"),
    ],
)
def test_server_refuses_bad_job_variables_before_a_run_exists(service, name, variables, bad):
    before = num_flow_runs(service)
    path = f"/deployments/{deployment(service, name)['id']}/create_flow_run"
    answer = service.post(path, {"job_variables": variables})
    assert answer.status_code == 422
    assert bad in answer.text
    assert num_flow_runs(service) == before


def test_plan_for_a_card_that_is_not_here_runs_under_a_worker(service, parameters):
    chosen = json.dumps(parameters)
    done = service.prefect(
        "deployment", "run", "plan-memory/plan-t4", "--params", chosen, "--watch", "--watch-timeout", "280"
    )
    assert done.returncode == 0, done.stdout + done.stderr + service.log("worker")
    (plan,) = Path(parameters["runs"]).glob("multiscale-t4/*/plan.json")
    stages = json.loads(plan.read_text())["stages"]
    assert [stage["verified"] for stage in stages] == [False] * 3


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
