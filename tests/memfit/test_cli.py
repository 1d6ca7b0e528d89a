"""The command line as people and scripts use it: output, exit statuses, stopping and going on."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

import memfit
from memfit import cli
from memfit.files import read_json
from memfit.run_directory import RunDirectory


@pytest.fixture
def run_cli(monkeypatch, capsys, tmp_path):
    """Call `memfit ARGS` in this process; return its exit status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["memfit", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    yield call
    signal.signal(signal.SIGTERM, before)


def where(finished_run) -> list[object]:
    return ["--runs", finished_run.runs, "--store", finished_run.store]


def test_json_is_the_only_thing_on_stdout(finished_run):
    summary = json.loads(finished_run.stdout)
    assert summary["name"] == "tiny"
    assert set(summary["files"]) == {"config", "plan", "evaluation", "model", "card", "report"}
    assert [step["status"] for step in summary["steps"]] == ["ran"] * 7
    assert summary["metrics"]["mae"] > 0
    assert {"persistence", "train_mean", "majority"} == set(summary["baselines"])


def test_progress_and_the_way_to_use_the_model_go_to_stderr(finished_run):
    said = finished_run.stderr
    for expected in ("[1/7] prepare", "[7/7] report", "epoch 1/2", "confirm micro", "from infer import Model"):
        assert expected in said
    assert str(finished_run.path / "report.html") in said
    assert "Traceback" not in said


def test_the_printed_lines_use_the_model_without_memfit_or_torch(finished_run):
    lines = finished_run.stderr.splitlines()
    start = next(index for index, line in enumerate(lines) if "import sys; sys.path.insert" in line)
    program = "\n".join(line.strip() for line in lines[start : start + 3])
    program += "\nassert 'torch' not in sys.modules and 'memfit' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_a_second_run_says_from_which_run_it_reused(finished_run, run_cli):
    status, out, err = run_cli("evaluate", finished_run.config, *where(finished_run), "--json")
    assert status == 0
    assert f"reused from {finished_run.path.name}: inputs, config and code are the same" in err
    assert f"Every stage was reused, from run {finished_run.path.name}" in err
    steps = json.loads(out)["steps"]
    assert [step["name"] for step in steps] == ["prepare", "plan", "train:first", "train:second", "evaluate"]


def test_plan_alone_prepares_and_plans_and_no_more(finished_run, run_cli):
    status, out, err = run_cli("plan", finished_run.config, *where(finished_run), "--json")
    summary = json.loads(out)
    assert status == 0
    assert [plan["stage"] for plan in summary["plans"]] == ["first", "second"]
    assert set(summary["files"]) == {"config", "plan"}
    assert summary["metrics"] is None
    assert "16 x 1" in err


def test_a_run_directory_can_be_gone_on_with(finished_run, run_cli):
    _, out, _ = run_cli("plan", finished_run.config, *where(finished_run), "--json")
    path = json.loads(out)["run_dir"]
    status, out, _ = run_cli("train", path, *where(finished_run), "--json")
    assert status == 0
    assert json.loads(out)["run_dir"] == path
    assert [step["status"] for step in json.loads(out)["steps"]] == ["reused"] * 4


def test_report_of_a_run_is_written_again(finished_run, run_cli):
    report = finished_run.path / "report.html"
    before = report.stat().st_mtime_ns
    status, out, _ = run_cli("report", finished_run.path, "--json")
    assert status == 0
    assert json.loads(out) == {"report": str(report)}
    assert report.stat().st_mtime_ns > before


def test_fresh_does_not_touch_a_finished_run(finished_run, run_cli):
    status, _, err = run_cli("run", finished_run.path, *where(finished_run), "--fresh")
    assert status == 5
    assert "--fresh" in err


def test_another_configs_directory_is_refused(finished_run, run_cli):
    status, out, err = run_cli("plan", finished_run.config, "--set", "seed=8", "--run-dir", finished_run.path)
    assert status == 5
    assert out == ""
    assert "holds a run of another config" in err


def test_a_locked_directory_names_its_owner(finished_run, run_cli):
    with RunDirectory(finished_run.path).locked():
        status, _, err = run_cli("plan", finished_run.path, *where(finished_run))
    assert status == 5
    assert f"in use by process {os.getpid()} on" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "stages.0.lrr=1"], "the nearest valid one is 'lr'"),
        (["--set", "stages.7.lr=1"], "expected an index from 0 to 1"),
        (["--budget", "14gib"], "plan.budget"),
        (["--device", "tpu"], "plan.device"),
        (["--set", "data.train_share=0.9"], "leave a test share"),
        (["--set", "model.tcn_window=5"], "tcn_window: expected one of the windows [4, 8], got 5"),
    ],
)
def test_a_bad_config_writes_nothing(tiny_config, run_cli, tmp_path, arguments, said):
    status, out, err = run_cli("run", tiny_config, *arguments)
    assert (status, out) == (2, "")
    assert said in err
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.toml"]


def test_an_unknown_option_file_or_command_is_a_usage_error(tiny_config, run_cli, tmp_path):
    assert run_cli("run", tiny_config, "--bugdet", "1GiB")[0] == 2
    assert run_cli("run", tmp_path / "nowhere.toml")[0] == 2
    assert run_cli("walk", tiny_config)[0] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.toml"]


def test_a_missing_source_is_a_data_error(tiny_config, run_cli):
    status, _, err = run_cli("run", tiny_config, "--set", "data.source.paths=['nowhere.csv']")
    assert status == 3
    assert "nowhere.csv" in err


def test_a_device_that_is_not_here_is_refused_before_any_child(tiny_config, run_cli):
    status, _, err = run_cli("plan", tiny_config, "--device", "cuda:99")
    assert status == 2
    assert "is not here" in err


def test_version_and_help_are_quick_and_need_no_torch():
    program = "import sys; from memfit.cli import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    for option, expected in (("--version", f"memfit {memfit.__version__}"), ("--help", "checked ONNX bundle")):
        done = subprocess.run([sys.executable, "-c", program, option], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout


@pytest.mark.parametrize("command", ["run", "plan", "train", "evaluate", "export", "report"])
def test_every_command_explains_itself(run_cli, command):
    status, out, _ = run_cli(command, "--help")
    assert status == 0
    assert "CONFIG_OR_RUN_DIR" in out
    assert "--json" in out


LONG = ["--set", "stages=[{name='long', epochs=25, global_batch_size=16, lr=1e-3, patience=0}]"]


def wait_for_steps(run_dir, count: int, process: subprocess.Popen, seconds: float = 120.0) -> None:
    log = run_dir / "stages" / "1-long" / "events.jsonl"
    end = time.monotonic() + seconds
    while not (log.exists() and log.read_bytes().count(b'"event": "step"') >= count):
        assert process.poll() is None, "it ended before it could be stopped"
        assert time.monotonic() < end, "it never got so far"
        time.sleep(0.01)


@pytest.mark.end_to_end
def test_sigterm_in_mid_training_writes_a_checkpoint_and_resume_ends_the_run(tiny_config, tmp_path):
    run_dir, command = tmp_path / "run", [sys.executable, "-m", "memfit", "train", str(tiny_config), *LONG]
    process = subprocess.Popen([*command, "--run-dir", str(run_dir)], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    with process:
        wait_for_steps(run_dir, 13, process)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert f"memfit train {run_dir}" in said
    assert "Traceback" not in said
    assert read_json(run_dir / "run.json")["steps"][-1]["status"] == "running"
    stopped_at = read_json(run_dir / "stages/1-long/checkpoints/last/checkpoint.json")["step"]
    assert 13 <= stopped_at < 250

    done = subprocess.run(
        [*command, "--run-dir", str(run_dir), "--resume", "--json"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"resumed after step {stopped_at} " in done.stderr
    assert json.loads(done.stdout)["steps"][-1]["status"] == "ran"
    lines = (run_dir / "stages/1-long/events.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    assert [event["step"] for event in events if event["event"] == "step"] == list(range(1, 251))
    assert events[-1]["event"] == "stage_end"


def test_init_makes_a_folder_that_runs_and_overwrites_nothing(tmp_path, run_cli):
    status, out, _ = run_cli("init", tmp_path / "mine")
    assert status == 0
    assert "memfit run config.toml" in out
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {"task.py", "config.toml", "README.md"}
    status, _, err = run_cli("init", tmp_path / "mine")
    assert status == 2
    assert "or empty" in err
