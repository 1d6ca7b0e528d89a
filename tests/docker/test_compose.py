"""docker/compose.yaml as the real client reads it, for every profile; nothing is started."""

import os
import subprocess

import pytest
import yaml

from tests.docker.engine import ROOT

pytestmark = pytest.mark.docker
SECRETS = {"POSTGRES_PASSWORD": "one", "PREFECT_AUTH": "memfit:two"}


def configured(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["docker-compose", "--file", str(ROOT / "docker/compose.yaml"), "config"],
        env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def services() -> dict:
    done = configured(**SECRETS)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)["services"]


def test_profiles_choose_the_workers():
    profiles = {name: service.get("profiles") for name, service in services().items()}
    assert {name: chosen for name, chosen in profiles.items() if chosen} == {
        "worker-gpu": ["gpu"],
        "worker-cpu": ["cpu"],
        "worker-docker": ["docker"],
    }


@pytest.mark.parametrize("name", SECRETS)
def test_a_missing_password_is_refused_in_words(name):
    done = configured(**{key: value for key, value in SECRETS.items() if key != name})
    assert done.returncode != 0
    assert "docker/.env" in done.stderr


def test_no_password_has_a_default():
    text = (ROOT / "docker/env.example").read_text(encoding="utf-8")
    assert {f"{name}=" for name in SECRETS} <= set(text.splitlines())


def test_every_service_is_hardened_and_its_log_rotates():
    for name, service in services().items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["logging"]["options"]["max-size"], name
        assert service["restart"] == ("no" if name == "setup" else "unless-stopped")


def test_only_the_server_is_published_and_only_on_the_loopback():
    published = {name: service["ports"] for name, service in services().items() if "ports" in service}
    assert published == {"server": ["127.0.0.1:4200:4200/tcp"]}


def test_a_gpu_worker_reserves_one_card_and_has_time_to_write_a_checkpoint():
    worker = services()["worker-gpu"]
    (card,) = worker["deploy"]["resources"]["reservations"]["devices"]
    assert (card["driver"], card["count"], card["capabilities"]) == ("nvidia", 1, ["gpu"])
    assert worker["stop_grace_period"] == "150s"
    assert worker["shm_size"] == "2g"
    assert worker["read_only"]
    assert worker["volumes"] == ["data:/data:rw"]


def test_everything_long_lived_says_how_it_is_and_starts_in_order():
    found = services()
    assert {name for name, service in found.items() if "healthcheck" not in service} == {"services", "setup"}
    assert set(found["server"]["depends_on"]) == {"postgres", "redis"}
    for name in ("worker-cpu", "worker-gpu", "worker-docker"):
        assert found[name]["depends_on"] == {"setup": {"condition": "service_completed_successfully"}}


def test_only_the_docker_worker_holds_the_engine_s_socket():
    holders = [name for name, service in services().items() if "docker.sock" in str(service.get("volumes"))]
    assert holders == ["worker-docker"]
