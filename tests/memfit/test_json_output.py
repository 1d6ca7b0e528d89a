"""Commands under MEMFIT_LOG_FORMAT=json: every line of stdout is a JSON object, and nothing goes to stderr."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from memfit.run_directory import RunDirectory


@pytest.fixture
def lines(tmp_path):
    """Run `memfit ARGS` in a process of its own; return its exit status and its lines."""

    def run(*arguments: object, **environment: str) -> tuple[int, list[dict]]:
        done = subprocess.run(
            [sys.executable, "-m", "memfit", *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, "MEMFIT_LOG_FORMAT": "json", **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stderr == ""
        return done.returncode, read(done.stdout)

    return run


def read(text: str) -> list[dict]:
    lines = [json.loads(line) for line in text.splitlines()]
    assert all(set(line) >= {"time", "level", "message", "event", "fields"} for line in lines)
    return lines


def where(finished_run) -> list[object]:
    return ["--runs", finished_run.runs, "--store", finished_run.store]


@pytest.mark.end_to_end
def test_every_line_of_a_run_is_json_and_the_summary_is_the_last(lines, finished_run):
    status, found = lines("run", finished_run.config, "--json", "--fresh", *where(finished_run))
    assert status == 0
    kinds = [line["event"] for line in found]
    assert kinds[0] == "run"
    assert kinds[-2:] == ["finished", "summary"]
    assert {"step_start", "step_end", "probe", "stage_start", "epoch", "stage_end"} <= set(kinds)
    assert len({(line["run_id"], line["name"]) for line in found}) == 1
    assert {line["step"] for line in found if line["event"] == "epoch"} == {"train:first", "train:second"}
    epoch = next(line for line in found if line["event"] == "epoch")
    assert epoch["message"].startswith("epoch 1/2: train ")
    assert epoch["fields"]["memory"]["peak_bytes"] > 0
    assert found[-1]["fields"]["run_id"] == found[-1]["run_id"]
    assert [step["status"] for step in found[-1]["fields"]["steps"]] == ["ran"] * 7
    assert found[-2]["fields"]["metrics"] == found[-1]["fields"]["metrics"]
    assert max(len(json.dumps(line)) for line in found[:-1]) < 1 << 14  # what Docker keeps in one piece


def test_the_option_does_as_the_environment(lines, finished_run):
    text = {"MEMFIT_LOG_FORMAT": "text"}
    status, found = lines("evaluate", finished_run.config, "--log-format", "json", *where(finished_run), **text)
    assert status == 0
    frame = [line for line in found if line["event"] in ("run", "step_start", "step_end", "finished")]
    assert [line["event"] for line in frame] == ["run", *["step_start", "step_end"] * 5, "finished"]


def test_a_failed_run_ends_with_kind_message_and_exit_status(lines, finished_run):
    with RunDirectory(finished_run.path).locked():
        status, found = lines("plan", finished_run.path, *where(finished_run))
    assert status == 5
    assert found[-1]["fields"] == {"kind": "RunStateError", "exit_status": 5}
    assert (found[-1]["event"], found[-1]["level"]) == ("error", "error")
    assert f"in use by process {os.getpid()} on" in found[-1]["message"]
    assert found[-1]["run_id"] == finished_run.path.name


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        (["plan", "nowhere.toml"], "ConfigError", "nowhere.toml: cannot be read"),
        (["plan", "nowhere.toml", "--bugdet", "1GiB"], "NoSuchOption", "--bugdet"),
        (["init", "."], "ConfigError", "or empty"),
    ],
)
def test_what_is_refused_at_once_is_one_line(lines, tmp_path, arguments, kind, said):
    (tmp_path / "not-empty").write_text("")
    status, (line,) = lines(*arguments)
    assert status == 2
    assert line["fields"] == {"kind": kind, "exit_status": 2}
    assert said in line["message"]


def test_a_format_that_is_neither_is_a_usage_error():
    environment = {**os.environ, "MEMFIT_LOG_FORMAT": "xml"}
    command = [sys.executable, "-m", "memfit", "devices"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--log-format" in done.stderr
    assert "xml" in done.stderr


def test_a_defect_is_one_line_with_its_traceback():
    program = (
        "from memfit import cli, command\n"
        "def broken(*_, **__): raise ZeroDivisionError('a defect')\n"
        "cli.run_until = broken\n"
        "import sys; sys.argv = ['memfit', 'run', 'x.toml']; cli.main()"
    )
    environment = {**os.environ, "MEMFIT_LOG_FORMAT": "json"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    (line,) = read(done.stdout)
    assert (done.returncode, done.stderr) == (1, "")
    assert (line["level"], line["fields"]["kind"]) == ("critical", "ZeroDivisionError")
    assert "in broken" in line["fields"]["traceback"]


def test_other_commands_answer_in_one_line(lines, finished_run, tmp_path):
    _, (line,) = lines("devices", "--json")
    assert line["event"] == "devices"
    assert {"here", "catalog"} == set(line["fields"])
    _, (line,) = lines("report", finished_run.path)
    assert line["fields"] == {"report": str(finished_run.path / "report.html")}
    _, (line,) = lines("init", tmp_path / "mine")
    assert line["fields"] == {"folder": str(tmp_path / "mine")}


def test_what_an_explained_script_prints_does_not_come_between(tmp_path):
    (tmp_path / "script.py").write_text("print('of the script')")
    command = [sys.executable, "-m", "memfit", "explain-oom", "--log-format", "json", "script.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    (line,) = read(done.stdout)
    assert (line["event"], line["fields"]["status"]) == ("explain_oom", "ended")
    assert "of the script" in done.stderr


@pytest.mark.end_to_end
def test_a_run_that_is_stopped_ends_with_how_to_go_on(tiny_config, tmp_path):
    command = [sys.executable, "-m", "memfit", "train", str(tiny_config), "--run-dir", "run"]
    stages = "stages=[{name='long', epochs=25, global_batch_size=16, lr=1e-3, patience=0}]"
    events, end = tmp_path / "run/stages/1-long/events.jsonl", time.monotonic() + 120
    with subprocess.Popen(
        [*command, "--set", stages, "--log-format", "json"], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    ) as process:
        while not (events.exists() and events.read_bytes().count(b'"event": "step"') >= 3):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
    last = read(out)[-1]
    assert process.returncode == 75
    assert last["fields"] == {"kind": "Resumable", "exit_status": 75}
    assert last["level"] == "warning"
    assert "memfit train run" in last["message"]
