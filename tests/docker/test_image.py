"""The CPU target, built by a real engine on a stand-in for its base."""

import json
import subprocess

import pytest

from tests.docker.engine import PYTHON_BASE, ROOT

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1800)]
GB = 1e9
MOST_BYTES = 2.5 * GB
"""What the CPU target may add to its base, uncompressed; docker/README.md states it."""
MOUNTED = ("--volume", "/data")
"""An unnamed volume, which goes with its container."""


def inspected(engine, image: str) -> dict:
    return json.loads(engine.docker("image", "inspect", image).stdout)[0]


def git(*arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_runs_as_a_user_with_a_name_and_a_home(engine, image):
    code = "import os, pwd, pathlib; u = pwd.getpwuid(os.getuid()); print(u.pw_uid, u.pw_name, pathlib.Path.home())"
    assert engine.run(image, "python", "-c", code).split() == ["1000", "memfit", "/data/home"]
    assert inspected(engine, image)["Config"]["User"] == "1000:1000"


def test_labels_name_the_commit(engine, image):
    labels = inspected(engine, image)["Config"]["Labels"]
    assert labels["org.opencontainers.image.revision"] == git("rev-parse", "HEAD")
    assert labels["org.opencontainers.image.created"] == git("log", "-1", "--format=%cI")
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"


def test_keeps_to_its_size(engine, image):
    added = inspected(engine, image)["Size"] - inspected(engine, PYTHON_BASE)["Size"]
    assert added <= MOST_BYTES
    assert f"{MOST_BYTES / GB:.1f} GB" in (ROOT / "docker/README.md").read_text(encoding="utf-8")


def test_first_process_reaps_and_forwards(engine, image):
    assert engine.run(image, "cat", "/proc/1/comm").strip() == "tini"


def test_ends_with_the_command_s_status_after_what_that_left_running(engine, image, volume):
    command = "(sleep 2; echo late > /data/late) & exit 5"
    done = engine.docker(
        "run", "--rm", "--network", "none", "--volume", f"{volume}:/data", image, "sh", "-c", command, check=False
    )
    assert done.returncode == 5
    assert engine.run(image, "cat", "/data/late", options=("--volume", f"{volume}:/data")).strip() == "late"


def test_an_unknown_command_is_refused_in_words(engine, image):
    done = engine.docker("run", "--rm", "--network", "none", image, "memfitt", check=False)
    assert done.returncode == 127
    assert "'memfitt'" in done.stderr


def test_without_a_command_it_says_what_there_is(engine, image):
    assert "memfit" in engine.run(image)
    assert engine.run(image, "memfit", "--version").startswith("memfit ")


def test_root_may_be_read_only(engine, image):
    said = engine.run(image, "memfit", "devices", options=("--read-only", "--tmpfs", "/tmp", *MOUNTED))
    assert "cpu" in said
    refused = engine.run(image, "touch", "/opt/memfit/x", options=("--read-only", "--tmpfs", "/tmp"), check=False)
    assert "Read-only" in refused


def test_a_volume_of_somebody_else_is_refused_in_words(engine, image):
    done = engine.docker("run", "--rm", "--user", "4242", "--tmpfs", "/data:mode=700", image, "memfit", check=False)
    assert done.returncode == 73
    assert "writable by user 4242" in done.stderr


def test_has_one_onnxruntime_no_pip_and_no_compiler(engine, image):
    code = "from importlib.metadata import distributions; print(*sorted(d.name for d in distributions()))"
    names = engine.run(image, "python", "-c", code).split()
    assert [name for name in names if name.startswith("onnxruntime")] == ["onnxruntime"]
    assert {"memfit", "torch", "prefect", "prefect-docker"} <= set(names)
    assert "pip" not in names
    assert "none" in engine.run(image, "sh", "-c", "command -v gcc cc || echo none")


def test_versions_are_those_of_the_constraints(engine, image):
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    code = "import json, importlib.metadata as m; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    found = json.loads(engine.run(image, "python", "-c", code))
    wrong = {
        name: version
        for name, version in found.items()
        if name != "memfit" and pins.get(name, version).partition("+")[0] != version.partition("+")[0]
    }
    assert wrong == {}


def test_bill_of_materials_lists_libraries_and_system_packages(engine, image):
    bill = json.loads(engine.run(image, "cat", "/opt/memfit/sbom.json"))
    urls = [part.get("purl", "").partition("?")[0] for part in bill["components"]]
    assert bill["bomFormat"] == "CycloneDX"
    assert any(url.startswith("pkg:pypi/torch@2.13.0") for url in urls)
    assert any(url.startswith("pkg:deb/debian/tini@0.19") for url in urls)
    assert any(url.startswith("pkg:deb/debian/libc6@") for url in urls)


def test_layers_hold_no_secret_and_no_leftover(engine, image):
    environment = dict(line.split("=", 1) for line in inspected(engine, image)["Config"]["Env"])
    words = ("PASSWORD", "TOKEN", "SECRET", "KEY", "AUTH")
    assert [name for name in environment if any(word in name for word in words)] == []
    history = engine.docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", image).stdout
    assert not any(word in history.upper() for word in words)
    folders = "/root/.cache /tools /source /locked /system.sh /tmp /var/lib/apt/lists"
    leftovers = engine.run(image, "sh", "-c", f"find {folders} -mindepth 1 2>/dev/null", check=False)
    assert leftovers == ""
    shipped = engine.run(image, "ls", "-A", "/opt/memfit/app").split()
    assert shipped == ["configs", "docker", "flows", "prefect.yaml", "tasks"]


def test_nothing_is_kept_of_where_it_was_built(engine, image):
    found = engine.run(image, "sh", "-c", f"grep -rl '{ROOT}/' /opt/memfit/app /opt/memfit/sbom.json || echo none")
    assert found.strip() == "none"


def test_same_inputs_make_the_same_layers(engine, image):
    engine.make("image", "TARGET=cpu", "ARGS=--network host --no-cache --tag memfit:again")
    one, other = (inspected(engine, name)["RootFS"]["Layers"] for name in ("memfit:again", image))
    engine.docker("image", "rm", "memfit:again")
    assert one == other
