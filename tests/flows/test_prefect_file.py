"""prefect.yaml held against the flows, the configs and the pools, without a server."""

import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.objects import DeploymentSchedule
from prefect.client.schemas.schedules import CronSchedule
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import validate

from flows.flow_parameters import read_parameters
from flows.plan_memory import plan_config
from flows.prefect_file import deployments_of, read_prefect_file, slugs_of, with_states
from flows.train_model import train_model
from flows.work_pools import POOLS, read_template
from memfit.errors import ConfigError

ROOT = Path(__file__).parents[2]
DOCUMENT = read_prefect_file(ROOT / "prefect.yaml")
DEPLOYMENTS = {each["name"]: each for each in deployments_of(DOCUMENT).values()}
FLOWS = {"flows/train_model.py:train_model": train_model, "flows/plan_memory.py:plan_config": plan_config}


@pytest.fixture(params=DEPLOYMENTS)
def deployment(request) -> dict[str, Any]:
    return DEPLOYMENTS[request.param]


def test_parameters_are_those_of_the_flow(deployment):
    assert deployment["enforce_parameter_schema"]
    schema = parameter_schema(FLOWS[deployment["entrypoint"]]).model_dump_for_openapi()
    assert deployment["parameters"].keys() <= schema["properties"].keys()
    validate(deployment["parameters"], schema, raise_on_error=True)


def test_config_is_shipped_and_takes_the_parameters(deployment, monkeypatch):
    monkeypatch.chdir(ROOT)
    given = {"overrides": (), "budget": "", "device": "", **deployment["parameters"]}
    overrides = tuple(given["overrides"])
    config = read_parameters(given["config"], overrides, given["budget"], given["device"])
    assert config.workload in deployment["tags"]


def test_job_variables_are_known_to_the_pool(deployment):
    pool = deployment["work_pool"]
    variables = read_template(POOLS[pool["name"]])["variables"]
    assert pool["job_variables"].keys() <= variables["properties"].keys()
    validate(pool["job_variables"], variables, raise_on_error=True)


def test_device_class_is_what_the_parameters_and_the_pool_say(deployment, monkeypatch):
    monkeypatch.chdir(ROOT)
    (kind,) = {"cpu", "t4"} & set(deployment["tags"])
    plan = tomllib.loads(Path(deployment["parameters"]["config"]).read_text())["plan"]
    device = deployment["parameters"].get("device", plan.get("device", "cpu"))
    assert device == {"cpu": "t4" if "plan" in deployment["tags"] else "cpu", "t4": "cuda"}[kind]
    variables = deployment["work_pool"]["job_variables"]
    if deployment["work_pool"]["name"] != "memfit-process":  # whose workers have what their own container has
        assert variables.get("num_gpus", len(variables.get("device_requests", []))) == (kind == "t4")
    image = {"cpu": "memfit:cpu", "t4": "memfit:cuda"}[kind]
    assert variables.get("image", image) == image


def test_every_deployment_is_tagged_described_and_one_at_a_time(deployment):
    assert deployment["tags"][0] == "memfit"
    assert len(deployment["description"]) > 20
    assert deployment["concurrency_limit"]["limit"] == 1
    assert deployment["concurrency_limit"]["collision_strategy"] in ("ENQUEUE", "CANCEL_NEW")


def test_no_shipped_schedule_begins_switched_on(deployment):
    assert all(schedule["active"] is False for schedule in deployment["schedules"])
    assert bool(deployment["schedules"]) == ("nightly" in deployment["tags"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "expected YAML"),
        ("name: memfit", "KeyError('deployments')"),
        ("deployments: [{name: one}]", "KeyError('entrypoint')"),
        ("deployments: [{name: one, entrypoint: f.py:f, schedules: [{cron: '0 2 * * *'}]}]", "expected a slug"),
    ],
)
def test_a_bad_file_is_named(tmp_path, text, message):
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(ConfigError) as raised:
        read_prefect_file(tmp_path / "own.yaml")
    assert message in str(raised.value)
    assert "own.yaml" in str(raised.value)


def test_a_file_that_is_away_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        read_prefect_file(tmp_path / "none.yaml")


def test_what_was_switched_on_the_server_stays_so_and_its_twin_in_the_file_does_not():
    shared = [{"slug": "night", "cron": "0 3 * * *", "active": False}, {"slug": "new", "cron": "0 4 * * *"}]
    document = {"deployments": [{"name": name, "entrypoint": "f", "schedules": shared} for name in ("one", "two")]}
    there = DeploymentSchedule(
        deployment_id=uuid4(),
        **DeploymentScheduleCreate(schedule=CronSchedule(cron="0 2 * * *"), active=True, slug="night").model_dump(),
    )
    kept = with_states(document, {("f", "one"): SimpleNamespace(schedules=[there], paused=True)})
    one, two = kept["deployments"]
    assert [(each["slug"], each["cron"], each["active"]) for each in one["schedules"]] == [
        ("night", "0 3 * * *", True),
        ("new", "0 4 * * *", True),
    ]
    assert one["paused"]
    assert two == document["deployments"][1]
    assert slugs_of(document["deployments"][0]) == {"night", "new"}
    assert shared[0]["active"] is False
