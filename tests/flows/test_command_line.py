"""`python -m flows.train_model`: what it says, how it ends, and that nothing is left behind when it is stopped."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from memfit.files import read_json

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """Settings of a user without a Prefect server, at home in a new folder."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MEMFIT_"))}
    return {**kept, "PREFECT_HOME": str(tmp_path / "prefect-home"), "PYTHONWARNINGS": "error"}


@pytest.fixture
def command(root, environment):
    def start(*arguments: str, module: str = "flows.train_model", **options) -> subprocess.Popen:
        line = [sys.executable, "-m", module, *arguments]
        return subprocess.Popen(line, cwd=root, env=environment, text=True, **options)

    return start


@pytest.fixture
def says(command):
    def run(*arguments: str, module: str = "flows.train_model") -> tuple[int, str, str]:
        process = command(*arguments, module=module, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err

    return run


def session_of(process: subprocess.Popen, marker: str) -> list[int]:
    """List the processes that carry the marker in their environment: the flow's, and all that it started."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != process.pid:
            try:
                environ, state = (folder / "environ").read_bytes(), (folder / "stat").read_text().rsplit(")")[1].split()
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
            if marker.encode() in environ and state[0] != "Z":
                found.append(int(folder.name))
    return found


def test_help_names_the_flow_and_the_options(says):
    code, out, _ = says("--help")
    assert code == 0
    assert "'train-model'" in " ".join(out.split())
    assert all(
        option in out for option in ("--set", "--budget", "--device", "--run-dir", "--resume", "--fresh", "--json")
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["configs/none.toml"], "configs/none.toml: cannot be read"),
        (["configs/smoke.toml", "--budget", "12 bananas"], "got '12 bananas'"),
        (["configs/smoke.toml", "--set", "stages.0.lrr=1"], "the nearest valid one is lr"),
    ],
)
def test_bad_config_is_refused_before_prefect_hears_of_it(says, environment, arguments, message):
    code, out, err = says(*arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert out == ""
    assert not list(Path(environment["PREFECT_HOME"]).glob("*.db"))


def test_ctrl_c_writes_a_checkpoint_and_ends_everything(
    command, says, environment, tmp_path, folders, small, wait_until, trained
):
    overrides = [part for value in [*small, "stages.0.max_steps=2000"] for part in ("--set", value)]
    where = ["--run-dir", str(tmp_path / "run"), "--store", folders["store"]]
    events = tmp_path / "run/stages/1-first/events.jsonl"
    with (tmp_path / "log").open("w") as log:
        process = command(
            "configs/smoke.toml",
            *overrides,
            *where,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            wait_until(
                lambda: process.poll() is not None or (events.exists() and '"step": 5,' in events.read_text()),
                240,
                "fifth step of training",
            )
            assert session_of(process, environment["PREFECT_HOME"])
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the flow and Prefect's server alike
            code = process.wait(timeout=90)
        finally:
            process.kill()
    text = (tmp_path / "log").read_text()
    assert code == 75, text
    assert "stopped on request" in text
    assert "Crashed" in text  # Prefect's server lived to hear of it
    assert session_of(process, environment["PREFECT_HOME"]) == []
    saved = read_json(tmp_path / "run/stages/1-first/checkpoints/last/checkpoint.json")
    assert saved["step"] == json.loads(events.read_text().splitlines()[-1])["step"]


def test_plan_memory_prints_one_json_document_and_trains_nothing(says, trained, folders, small):
    overrides = [part for value in small for part in ("--set", value)]
    options = ["--json", "--runs", folders["runs"], "--store", folders["store"]]
    code, out, err = says("configs/smoke.toml", *overrides, *options, module="flows.plan_memory")
    assert code == 0, err
    summary = json.loads(out)
    assert [step["name"] for step in summary["steps"]] == ["prepare", "plan"]
    assert {step["from_run"] for step in summary["steps"]} == {"the store"}
    assert [plan["stage"] for plan in summary["plans"]] == ["first", "second"]
