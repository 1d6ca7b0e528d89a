"""What the pools' templates and prefect.yaml make of a flow run, by the real workers' classes and the real clients.

There is no cluster: manifests are held against the Kubernetes client's models only.
"""

import asyncio
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from uuid import uuid4

import kubernetes_asyncio.client
import pytest
import yaml
from kubernetes_asyncio.client import ApiClient, V1Job
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect_docker.worker import DockerWorker
from prefect_kubernetes.worker import KubernetesWorker

import docker
from flows.work_pools import POOLS, read_template

ROOT = Path(__file__).parents[2]
DEPLOYMENTS = {each["name"]: each for each in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]}
WORKERS = {"memfit-docker": DockerWorker, "memfit-kubernetes": KubernetesWorker}
GIB = 2**30
ONE_GPU = {"driver": "nvidia", "count": 1, "capabilities": [["gpu"]]}


@pytest.fixture(autouse=True, scope="module")
def server() -> Iterator[None]:
    """Name a server that nobody asks anything: else Prefect starts one."""
    with temporary_settings({PREFECT_API_URL: "http://server:4200/api"}):
        yield


def prepared(name: str, **overrides: Any) -> Any:
    """Return the job configuration of a flow run of a deployment, as its worker makes it."""
    pool = DEPLOYMENTS[name]["work_pool"]
    variables = {**pool["job_variables"], **overrides}
    made = WORKERS[pool["name"]].job_configuration.from_template_and_values(
        base_job_template=read_template(POOLS[pool["name"]]), values=variables
    )
    configuration = asyncio.run(made)
    configuration.prepare_for_flow_run(FlowRun(id=uuid4(), name="smoke 2026-01-31", flow_id=uuid4()))
    return configuration


class Engine(BaseHTTPRequestHandler):
    """Answers as a Docker engine does, and keeps what it is asked to create."""

    asked: dict[str, Any]

    def do_GET(self) -> None:
        self._answer({"Version": "27.0.0", "ApiVersion": "1.46", "Id": "1", "Name": "/run", "State": {}})

    def do_POST(self) -> None:
        type(self).asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._answer({"Id": "1", "Warnings": []})

    def _answer(self, document: dict[str, Any]) -> None:
        body = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_arguments: object) -> None:
        return


@pytest.fixture(scope="module")
def engine() -> Iterator[docker.DockerClient]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Engine)
    Thread(target=server.serve_forever, daemon=True).start()
    client = docker.DockerClient(f"tcp://127.0.0.1:{server.server_port}", version="1.46")
    yield client
    client.close()
    server.shutdown()
    server.server_close()


@pytest.fixture
def created(engine):
    """Return what a Docker engine is asked to create for a flow run of a deployment."""

    def ask(name: str, **overrides: Any) -> dict[str, Any]:
        worker = DockerWorker(work_pool_name="memfit-docker")
        engine.containers.create(**worker._build_container_settings(engine, prepared(name, **overrides)))
        return Engine.asked

    return ask


def read_as(model: str, document: dict[str, Any]) -> Any:
    """Return the Kubernetes client's own reading of a document, none of which may be lost on its models."""

    class Response:
        data = json.dumps(document)

    async def read() -> Any:
        async with ApiClient(kubernetes_asyncio.client.Configuration()) as client:
            found = client.deserialize(Response, model)
            assert kept(client.sanitize_for_serialization(found), document), "the models lack a field"
            return found

    return asyncio.run(read())


def job_of(name: str, **overrides: Any) -> V1Job:
    return read_as("V1Job", prepared(name, **overrides).job_manifest)


def kept(there: Any, asked: Any) -> bool:
    """Tell whether all of a manifest is in the models, but for two that Prefect wants where Kubernetes has none."""
    if isinstance(asked, dict):
        return all(
            name in ("completions", "parallelism") or kept(there.get(name), value)
            for name, value in asked.items()
            if value not in ({}, [], None)
        )
    if isinstance(asked, list):
        return len(asked) == len(there) and all(map(kept, there, asked))
    return str(there) == str(asked)


def pod_of(name: str, **overrides: Any) -> tuple[Any, Any]:
    """Return the pod's specification, and its one container."""
    pod = job_of(name, **overrides).spec.template.spec
    (container,) = pod.containers
    return pod, container


def environment_of(container: Any) -> dict[str, str]:
    return {each.name: each.value for each in container.env}


def test_a_gpu_container_is_asked_for_with_card_shared_memory_limits_and_volume(created):
    asked = created("multiscale-t4")
    host = asked["HostConfig"]
    assert asked["Image"] == "memfit:cuda"
    (gpu,) = host["DeviceRequests"]
    assert {"Driver": "nvidia", "Count": 1, "Capabilities": [["gpu"]]}.items() <= gpu.items()
    assert (host["Memory"], host["MemorySwap"], host["ShmSize"]) == (12 * GIB, 12 * GIB, GIB)
    assert host["Binds"] == ["memfit-data:/data"]


@pytest.mark.parametrize("name", [n for n, each in DEPLOYMENTS.items() if each["work_pool"]["name"] == "memfit-docker"])
def test_every_container_has_few_rights(created, name):
    asked = created(name)
    host = asked["HostConfig"]
    assert asked["User"] == "1000:1000"
    assert (host["CapDrop"], host["SecurityOpt"]) == (["ALL"], ["no-new-privileges"])
    assert not host.get("Privileged")
    assert host["ReadonlyRootfs"]
    assert set(host["Tmpfs"]) == {"/tmp"}
    assert host["PidsLimit"] == 4096
    assert not host.get("AutoRemove")  # the worker reads the exit status afterwards
    assert "PREFECT_HOME=/data/prefect" in asked["Env"]
    assert "PREFECT_FLOWS_HEARTBEAT_FREQUENCY=30" in asked["Env"]


def test_a_container_without_a_gpu_asks_for_none(created):
    asked = created("smoke-docker")
    assert asked["Image"] == "memfit:cpu"
    assert not asked["HostConfig"].get("DeviceRequests")
    assert asked["HostConfig"]["Memory"] == 4 * GIB


def test_job_variables_reach_the_engine(created):
    second = {"driver": "nvidia", "device_ids": ["1"], "capabilities": [["gpu"]]}
    asked = created(
        "multiscale-t4",
        mem_limit="3g",
        shm_size="64m",
        image="memfit:mine",
        volumes=["/srv/memfit:/data"],
        user="1234:1234",
        nano_cpus=2 * 10**9,
        networks=["backend"],
        device_requests=[second],
        **{"env.MEMFIT_MACHINE": 2},
    )
    host = asked["HostConfig"]
    assert (host["Memory"], host["MemorySwap"], host["ShmSize"]) == (3 * GIB, 3 * GIB, 64 * 2**20)
    assert (asked["Image"], asked["User"], host["Binds"]) == ("memfit:mine", "1234:1234", ["/srv/memfit:/data"])
    assert (host["NanoCpus"], host["NetworkMode"]) == (2 * 10**9, "backend")
    assert host["DeviceRequests"][0]["DeviceIDs"] == ["1"]
    assert {"MEMFIT_MACHINE=2", "DO_NOT_TRACK=1"} <= set(asked["Env"])


def test_network_and_machine_of_the_deployer_become_the_docker_pool_s_defaults():
    properties = read_template("docker", ["memfit"], {"MEMFIT_MACHINE": "attic"})["variables"]["properties"]
    assert properties["networks"]["default"] == ["memfit"]
    assert properties["env"]["default"] == {"PREFECT_HOME": "/data/prefect", "MEMFIT_MACHINE": "attic"}
    plain = read_template("docker")["variables"]["properties"]
    assert plain["networks"]["default"] == []
    assert "MEMFIT_MACHINE" not in plain["env"]["default"]


@pytest.mark.parametrize(("name", "num_gpus"), [("multiscale-t4-kubernetes", "1"), ("smoke-kubernetes", "0")])
def test_a_pod_requests_what_it_is_limited_to(name, num_gpus):
    _, container = pod_of(name)
    limits, requests = container.resources.limits, container.resources.requests
    assert str(limits["nvidia.com/gpu"]) == num_gpus
    assert {key: str(value) for key, value in requests.items()} == {key: str(value) for key, value in limits.items()}
    assert set(limits) == {"cpu", "memory", "nvidia.com/gpu"}


def test_a_pod_has_data_shared_memory_and_a_place_for_files():
    pod, container = pod_of("multiscale-t4-kubernetes")
    volumes = {volume.name: volume for volume in pod.volumes}
    assert {mount.mount_path: mount.name for mount in container.volume_mounts} == {
        "/data": "data",
        "/dev/shm": "shm",
        "/tmp": "tmp",
    }
    assert volumes["data"].persistent_volume_claim.claim_name == "memfit-data"
    assert (volumes["shm"].empty_dir.medium, volumes["shm"].empty_dir.size_limit) == ("Memory", "1Gi")
    assert volumes["tmp"].empty_dir is not None


@pytest.mark.parametrize("name", ["multiscale-t4-kubernetes", "smoke-kubernetes"])
def test_every_pod_has_few_rights_and_time_to_write_a_checkpoint(name):
    job = job_of(name)
    pod, container = pod_of(name)
    assert (job.spec.backoff_limit, job.spec.ttl_seconds_after_finished) == (0, 86400)
    assert (pod.termination_grace_period_seconds, pod.restart_policy) == (120, "Never")
    security = pod.security_context
    assert (security.run_as_non_root, security.run_as_user, security.fs_group) == (True, 1000, 1000)
    assert security.seccomp_profile.type == "RuntimeDefault"
    assert container.security_context.capabilities.drop == ["ALL"]
    assert container.security_context.read_only_root_filesystem
    assert container.security_context.allow_privilege_escalation is False
    assert pod.automount_service_account_token is False


def test_a_pod_takes_its_card_without_a_slot_and_goes_on_after_an_eviction():
    _, container = pod_of("multiscale-t4-kubernetes", **{"env.EXTRA": "1"})
    wanted = {"MEMFIT_OWN_DEVICE": "true", "PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR": "reschedule", "EXTRA": "1"}
    assert (wanted | {"DO_NOT_TRACK": "1", "PREFECT_HOME": "/data/prefect"}).items() <= environment_of(
        container
    ).items()


def test_job_variables_reach_the_manifest():
    selector = {"nvidia.com/gpu.product": "Tesla-T4"}
    pod, container = pod_of(
        "multiscale-t4-kubernetes",
        num_gpus=2,
        memory_limit="3Gi",
        shm_size="64Mi",
        image="memfit:mine",
        data_claim="other",
        node_selector=selector,
        grace_seconds=300,
        image_pull_secrets=[{"name": "registry"}],
    )
    assert (str(container.resources.limits["nvidia.com/gpu"]), container.resources.limits["memory"]) == ("2", "3Gi")
    assert container.resources.requests["memory"] == "3Gi"
    volumes = {volume.name: volume for volume in pod.volumes}
    assert volumes["shm"].empty_dir.size_limit == "64Mi"
    assert volumes["data"].persistent_volume_claim.claim_name == "other"
    assert (container.image, pod.node_selector, pod.termination_grace_period_seconds) == ("memfit:mine", selector, 300)
    assert [secret.name for secret in pod.image_pull_secrets] == ["registry"]


def test_only_pods_with_a_gpu_tolerate_the_taint_of_gpu_nodes():
    assert [taint.key for taint in pod_of("multiscale-t4-kubernetes")[0].tolerations] == ["nvidia.com/gpu"]
    assert not pod_of("smoke-kubernetes")[0].tolerations


def test_the_claim_of_the_pods_is_one():
    claim = read_as("V1PersistentVolumeClaim", yaml.safe_load((ROOT / "docker/pools/data_claim.yaml").read_text()))
    default = read_template("kubernetes")["variables"]["properties"]["data_claim"]["default"]
    assert claim.metadata.name == default
    assert claim.spec.resources.requests["storage"] == "100Gi"


@pytest.mark.parametrize("pool", WORKERS)
def test_templates_keep_up_with_the_workers(pool):
    """A field that a newer worker has must be in the template, or be left out on purpose."""
    ours, theirs = read_template(POOLS[pool]), WORKERS[pool].get_default_base_job_template()
    left_out = {"memfit-docker": {"privileged"}, "memfit-kubernetes": set()}[pool]
    assert theirs["job_configuration"].keys() - ours["job_configuration"].keys() == left_out


@pytest.mark.parametrize("pool", WORKERS)
def test_every_variable_is_described_and_used(pool):
    template = read_template(POOLS[pool])
    used = json.dumps(template["job_configuration"])
    for name, variable in template["variables"]["properties"].items():
        assert len(variable["description"]) > 15, name
        assert f"{{{{ {name} }}}}" in used, name
