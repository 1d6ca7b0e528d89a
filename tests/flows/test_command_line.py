"""`python -m flows.train_model`: what it says, how it ends, and that nothing is left behind when it is stopped."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flows.command_line import run_from_command_line
from flows.plan_memory import plan_config
from flows.train_model import train_model
from memfit.files import read_json
from tests.flows.service import alive_with

pytestmark = pytest.mark.timeout(600)
ONE_LONG_STAGE = "stages=[{name='only', epochs=1, global_batch_size=1, lr=1e-3}]"


@pytest.fixture
def says(monkeypatch, capsys, prefect_api):
    """Run a flow's command line in this process; return exit status, stdout and stderr."""

    def run(flow, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["flow", *map(str, arguments)])
        before = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit) as left:
                run_from_command_line(flow)
        finally:
            signal.signal(signal.SIGTERM, before)
        said = capsys.readouterr()
        return int(left.value.code or 0), said.out, said.err

    return run


@pytest.fixture
def home(tmp_path) -> Path:
    """The Prefect home of a user who has no server."""
    return tmp_path / "prefect-home"


@pytest.fixture
def command(root, home):
    """Start the flow as a process group of its own, as a terminal does."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MEMFIT_"))}

    def start(*arguments: object, log: Path) -> subprocess.Popen:
        with log.open("w") as file:
            return subprocess.Popen(
                [sys.executable, "-W", "error", "-m", "flows.train_model", *map(str, arguments)],
                cwd=root,
                env={**kept, "PREFECT_HOME": str(home)},
                stdout=file,
                stderr=file,
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # pytest itself may ignore it
            )

    return start


def set_each(overrides: list[str]) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


def others_with(marker: Path, but: int) -> list[int]:
    """List the living processes that carry a path in their environment, but for one."""
    return [pid for pid in alive_with(str(marker)) if pid != but]


def test_help_names_the_flow_and_the_options(says):
    code, out, _ = says(train_model, "--help")
    options = ("--set", "--budget", "--device", "--run-dir", "--resume", "--fresh", "--json")
    assert code == 0
    assert "'train-model'" in " ".join(out.split())
    assert all(option in out for option in options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.toml"], "none.toml: cannot be read"),
        (["smoke.toml", "--budget", "12 bananas"], "got '12 bananas'"),
        (["smoke.toml", "--set", "stages.0.lrr=1"], "stages.0.lrr: unknown key"),
        (["smoke.toml", "--device", "tpu"], "got 'tpu'"),
    ],
)
def test_bad_config_is_refused_before_there_is_a_flow_run(says, client, root, arguments, message):
    before = len(client.read_flow_runs())
    name, *options = arguments
    code, out, err = says(train_model, root / "configs" / name, *options)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert len(client.read_flow_runs()) == before


def test_config_must_be_a_toml_file_by_name(says, root, tmp_path):
    copy = tmp_path / "smoke.txt"
    copy.write_text((root / "configs/smoke.toml").read_text())
    code, _, err = says(train_model, copy)
    assert code == 2
    assert "config" in err


def test_plan_memory_prints_one_json_document_and_trains_nothing(says, trained, folders, small, root):
    where = ["--runs", folders["runs"], "--store", folders["store"]]
    code, out, err = says(plan_config, root / "configs/smoke.toml", *set_each(small), "--json", *where)
    assert code == 0, err
    summary = json.loads(out)
    assert [step["name"] for step in summary["steps"]] == ["prepare", "plan"]
    assert {step["from_run"] for step in summary["steps"]} == {"the store"}
    assert [plan["stage"] for plan in summary["plans"]] == ["first", "second"]


@pytest.fixture
def training(command, root, tmp_path, folders, wait_until, trained):
    """Start the flow and wait until it trains; return its process, its log and the stage's folder."""
    started = []

    def start() -> tuple[subprocess.Popen, Path, Path]:
        options = [*set_each([ONE_LONG_STAGE, "stages.0.checkpoint_every_steps=5"]), "--store", folders["store"]]
        options += ["--runs", str(tmp_path / "runs")]
        log, stage = tmp_path / "log", tmp_path / "run/stages/1-only"
        process = command(root / "configs/smoke.toml", *options, "--run-dir", tmp_path / "run", log=log)
        started.append(process)
        events = stage / "events.jsonl"
        wait_until(
            lambda: process.poll() is not None or (events.exists() and '"step": 7,' in events.read_text()),
            240,
            "seventh step of training",
        )
        return process, log, stage

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.end_to_end
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_of_it_writes_a_checkpoint_and_ends_everything(training, home, wait_until, stop, tmp_path):
    process, log, stage = training()
    assert len(others_with(home, but=process.pid)) == 2  # the training child and Prefect's server
    os.killpg(process.pid, stop)  # as a terminal or a service manager does
    code = process.wait(timeout=60)
    text = log.read_text()
    assert code == 75, text
    assert "stopped on request" in text
    assert "Finished in state Crashed" in text  # so the server lived to hear of it
    gauges = (tmp_path / "runs/metrics/smoke.prom").read_text()
    assert 'memfit_run_state{config="smoke",state="stopped",workload="series"} 1.0' in gauges
    assert 'memfit_run_exit_status{config="smoke",workload="series"} 75.0' in gauges
    wait_until(lambda: not others_with(home, but=process.pid), 30, "end of what the flow had started")
    saved = read_json(stage / "checkpoints/last/checkpoint.json")
    assert saved["step"] == json.loads((stage / "events.jsonl").read_text().splitlines()[-1])["step"] >= 7


@pytest.mark.end_to_end
def test_a_flow_that_is_killed_leaves_a_checkpoint_and_no_process(training, home, wait_until):
    process, _log, stage = training()
    process.kill()
    process.wait()
    wait_until(lambda: not others_with(home, but=process.pid), 30, "end of what the flow had started")
    assert read_json(stage / "checkpoints/last/checkpoint.json")["step"] >= 5
