"""What can be told of every target without an engine."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docker.engine import ROOT

DOCKERFILE = (ROOT / "docker/Dockerfile").read_text(encoding="utf-8")
STAGES = {
    match[2]: match
    for match in re.finditer(r"^FROM (\S+) AS (\S+)\n(.*?)(?=^FROM |\Z)", DOCKERFILE, re.MULTILINE | re.DOTALL)
}


def steps(stage: str) -> list[str]:
    """Return a stage's instructions, continued lines joined, without comments."""
    text = re.sub(r"^#.*\n", "", STAGES[stage][3], flags=re.MULTILINE)
    return [re.sub(r"\s+", " ", step) for step in re.sub(r"\\\n", " ", text).strip().splitlines() if step]


def requirements(target: str, extras: str = "samples,pools") -> list[str]:
    command = [sys.executable, "docker/requirements.py", "pyproject.toml", target, extras]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")


def test_is_clean_for_hadolint():
    done = subprocess.run(
        [Path(sys.executable).with_name("hadolint"), "docker/Dockerfile"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_bases_are_pinned_arguments():
    defaults = dict(re.findall(r"^ARG (\w+_BASE)=(\S+)$", DOCKERFILE, re.MULTILINE))
    assert re.fullmatch(r"python:3\.\d+-slim-\w+", defaults["CPU_BASE"])
    assert re.fullmatch(r"nvidia/cuda:13\.0\.\d+-base-ubuntu24\.04", defaults["CUDA_BASE"])
    assert (STAGES["cpu-base"][1], STAGES["cuda-base"][1]) == ("${CPU_BASE}", "${CUDA_BASE}")


def test_targets_differ_only_in_what_cuda_needs():
    cuda = [step for step in steps("cuda") if "NVIDIA_" not in step]
    assert [step.replace("cuda", "cpu") for step in cuda] == steps("cpu")
    assert [step.replace("cuda", "cpu") for step in steps("cuda-build")] == steps("cpu-build")
    (gpu,) = (step for step in steps("cuda") if "NVIDIA_" in step)
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility" in gpu


def test_libraries_come_before_the_source():
    libraries, source = (step for step in steps("cpu-build") if step.startswith("RUN"))
    assert "from=locked" in libraries
    assert "from=source" in source
    assert not any("src" in step for step in steps("locked"))


def test_final_stages_are_numeric_users_behind_tini():
    for stage in ("cpu", "cuda"):
        assert "USER 1000:1000" in steps(stage)
        assert 'ENTRYPOINT ["tini", "--", "python", "/opt/memfit/entrypoint.py"]' in steps(stage)
    assert steps("compile")[-1] == "USER 1000:1000"


def test_a_compiler_comes_only_into_the_target_that_is_for_it():
    assert "gcc" in " ".join(steps("compile"))
    assert STAGES["compile"][1] == "cuda"
    assert not any("gcc" in " ".join(steps(stage)) for stage in STAGES if stage != "compile")


def test_no_argument_or_variable_takes_a_secret():
    names = re.findall(r"^\s*(?:ARG |ENV )?([A-Z_]+)=", DOCKERFILE, re.MULTILINE)
    assert "COMMIT" in names
    assert not [name for name in names if re.search("PASSWORD|TOKEN|SECRET|KEY|AUTH", name)]


@pytest.mark.parametrize(("target", "runtime"), [("cpu", "onnxruntime"), ("cuda", "onnxruntime-gpu")])
def test_each_target_has_its_onnxruntime_and_not_the_other(target, runtime):
    found = [line for line in requirements(target) if line.startswith("onnxruntime")]
    assert [re.match(r"[a-z-]+", line)[0] for line in found] == [runtime]


def test_extras_bring_those_that_they_name():
    wanted = requirements("cpu", "pools")
    assert any(line.startswith("prefect>=") for line in wanted)  # of the extra flows, which pools names
    assert any(line.startswith("prefect-docker") for line in wanted)
    assert not any(line.startswith("memfit") for line in wanted)


def test_an_unknown_extra_is_refused_by_name():
    done = subprocess.run(
        [sys.executable, "docker/requirements.py", "pyproject.toml", "cpu", "sample"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "'sample'" in done.stderr


def test_the_context_leaves_out_what_the_image_is_not_made_of():
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    assert patterns[0] == "*"
    allowed = {line[1:] for line in patterns if line.startswith("!")}
    assert not {entry for entry in allowed if entry.startswith((".git", ".env", "tests", "runs", "store"))}
    assert {"src", "flows", "tasks", "configs", "prefect.yaml", "constraints.txt"} <= allowed
