"""What checkpoints cost training, and what a kill costs a run.

    python -m benchmarks.recovery --csv benchmarks/recovery.csv

On the CPU, from the root of the repository. Stall: the first stage of a config is trained for some steps without
checkpoints inside the epoch, with them in the background, and with them at once, in turns; training waits for what the
row says, and the ratio is of the steps' rate to that without. Kill: the training child gets SIGKILL at a random step,
and the pipeline starts it again; or the whole command gets it, and is given again with --resume. Seconds are from the
kill, or from the second command, to the first step that had not been trained before; repeated are the steps since the
checkpoint.
"""

import argparse
import contextlib
import csv
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.planner_cases import stamp
from memfit import pipeline as pipelines
from memfit.config import load_config
from memfit.pipeline import Pipeline, open_run
from memfit.process import Emit, run_child

STALL = 0.01
"""Most of the training time that checkpoints may take."""
COLUMNS = (
    "date", "commit", "device", "torch", "config", "row", "round", "steps", "checkpoints", "checkpoint_bytes",
    "training_seconds", "stall_seconds", "stall_ms_per_checkpoint", "stall_share", "rate_ratio", "recovery_seconds",
    "steps_repeated",
)  # fmt: skip
AT_ONCE = "benchmarks.recovery:train_at_once"


def train_at_once(job: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Be a training child that has no room for copies: every checkpoint waits."""
    from memfit.training import worker, writer

    worker.room_for_copies = writer.room_for_copies = lambda _plan: 0
    return worker.run(job, emit)


@dataclass
class Bench:
    """A config, and where its runs go."""

    config: Path
    folder: Path
    steps: int
    every: int

    def overrides(self, every: int) -> list[str]:
        stage = {"max_steps": self.steps, "checkpoint_every_steps": every, "checkpoint_every_minutes": 0, "epochs": 1}
        return [f"stages.0.{name}={value}" for name, value in stage.items()]

    def open(self, name: str, every: int, on_event: Emit = lambda _event: None) -> Pipeline:
        config = load_config(self.config, self.overrides(every))
        runs = self.folder / name
        return open_run(config, runs=runs, store=self.folder / "store", fresh=False, on_event=on_event)

    def train(self, run: Pipeline) -> None:
        for step in run.steps[: 2 + 1]:
            run.perform(step)


@contextlib.contextmanager
def target(name: str | None) -> Iterator[None]:
    """Train in another child than memfit's own."""
    original = pipelines.run_child
    if name is not None:
        pipelines.run_child = lambda asked, *given, **settings: run_child(
            name if asked == "memfit.training.worker:run" else asked, *given, **settings
        )
    try:
        yield
    finally:
        pipelines.run_child = original


def read_events(run: Pipeline) -> list[dict[str, Any]]:
    lines = (run.run.path / run.stage_dir(0) / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def stall(bench: Bench, row: str, number: int) -> dict[str, Any]:
    """Train with one way of writing checkpoints."""
    every = 0 if row == "epochs only" else bench.every
    run = bench.open(f"{row}-{number}", every)
    with target(AT_ONCE if row == "at once" else None):
        bench.train(run)
    events = read_events(run)
    end = events[-1]
    steps = sum(event["seconds"] for event in events if event["event"] == "step")
    last = run.run.path / run.stage_dir(0) / "checkpoints" / "last"
    written = (bench.steps // every if every else 0) + 1
    return {
        "row": row,
        "round": number,
        "steps": end["steps"],
        "checkpoints": written,
        "checkpoint_bytes": sum(path.stat().st_size for path in last.iterdir()),
        "training_seconds": end["seconds"],
        "stall_seconds": end["stall_seconds"],
        "stall_ms_per_checkpoint": 1000 * end["stall_seconds"] / written,
        "stall_share": end["stall_seconds"] / end["seconds"],
        "rate": end["steps"] / steps,
    }


def training_children() -> list[int]:
    """List the children of this process that train."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = (entry / "stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()[1]
                if int(parent) == os.getpid() and b"memfit.process" in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
    return found


def kill_child(bench: Bench, number: int, at: int) -> dict[str, Any]:
    """Kill the training child after a step, and wait until the pipeline has trained the next one."""
    killed: list[float] = []
    trained: list[float] = []
    resumed: list[int] = []

    def listen(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == at and not killed:
            for pid in training_children():
                os.kill(pid, signal.SIGKILL)
            killed.append(time.perf_counter())
        elif event["event"] == "resume":
            resumed.append(event["step"])
        elif event["event"] == "step" and event["step"] == at + 1 and not trained:
            trained.append(time.perf_counter())

    bench.train(bench.open(f"child-{number}", bench.every, listen))
    return _recovered("child killed", number, at, resumed[0], trained[0] - killed[0])


def _recovered(row: str, number: int, at: int, resumed: int, seconds: float) -> dict[str, Any]:
    return {"row": row, "round": number, "steps": at, "steps_repeated": at - resumed, "recovery_seconds": seconds}


def kill_command(bench: Bench, number: int, at: int) -> dict[str, Any]:
    """Kill `memfit run` and all its children after a step, and give the command again."""
    runs = bench.folder / f"command-{number}"
    settings = [part for override in bench.overrides(bench.every) for part in ("--set", override)]
    where = ["--runs", str(runs), "--store", str(bench.folder / "store")]
    command = [sys.executable, "-m", "memfit", "run", str(bench.config), *settings, *where]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    first = subprocess.Popen(command, **quiet)
    _wait_for_step(runs, at, first)
    first.kill()
    first.wait()
    reached = max(_steps(runs), default=at)
    saved = max(int(path.name[5:]) for path in runs.glob("*/*/stages/1-*/checkpoints/step-*"))
    started = time.perf_counter()
    second = subprocess.Popen([*command, "--resume"], **quiet)
    _wait_for_step(runs, reached + 1, second)
    seconds = time.perf_counter() - started
    second.kill()
    second.wait()
    return _recovered("command killed", number, reached, saved, seconds)


def _steps(runs: Path) -> list[int]:
    found = []
    for log in runs.glob("*/*/stages/1-*/events.jsonl"):
        for line in log.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError, KeyError):  # the last line may be half written
                found.append(json.loads(line)["step"])
    return found


def _wait_for_step(runs: Path, step: int, process: "subprocess.Popen[bytes]") -> None:
    while max(_steps(runs), default=0) < step:
        if process.poll() is not None:
            raise RuntimeError(f"the command ended with {process.returncode} before step {step}")
        time.sleep(0.02)


def print_marks(rows: list[dict[str, Any]]) -> None:
    print()
    for name in ("background", "at once"):
        chosen = [row for row in rows if row["row"] == name]
        each = statistics.median(row["stall_ms_per_checkpoint"] for row in chosen)
        share = statistics.median(row["stall_share"] for row in chosen)
        ratio = statistics.median(row["rate_ratio"] for row in chosen)
        print(
            f"{name}: {each:.1f} ms a checkpoint, {share:.2%} of the training time at one every {chosen[0]['every']} "
            f"steps (mark: {STALL:.0%}); steps at {ratio:.3f} of the rate without"
        )
    for name in ("child killed", "command killed"):
        chosen = [row for row in rows if row["row"] == name]
        seconds = statistics.median(row["recovery_seconds"] for row in chosen)
        repeated = statistics.mean(row["steps_repeated"] for row in chosen)
        print(f"{name}: {seconds:.1f} s to the next new step, {repeated:.1f} steps repeated")


def write(path: Path, rows: list[dict[str, Any]], stamped: dict[str, Any]) -> None:
    def shown(row: dict[str, Any]) -> dict[str, Any]:
        digits = {key: f"{value:.4f}" if isinstance(value, float) else value for key, value in row.items()}
        return {key: digits[key] for key in COLUMNS if key in digits}

    with path.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(stamped | shown(row) for row in rows)


def measure(bench: Bench, rounds: int, csv_path: Path | None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    draw = random.Random(1)
    bench.train(bench.open("warm-up", 0))
    for number in range(rounds):
        turn = {name: stall(bench, name, number) for name in ("epochs only", "background", "at once")}
        plain = turn["epochs only"]["rate"]
        rows += [{**row, "every": bench.every, "rate_ratio": row["rate"] / plain} for row in turn.values()]
        for kill in (partial(kill_child, bench), partial(kill_command, bench)):
            rows.append(kill(number, draw.randrange(bench.every + 1, bench.steps - 1)))
        for row in rows[-5:]:
            print(
                {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}, flush=True
            )
        if csv_path:
            write(csv_path, rows, {**stamp(), "config": bench.config.stem})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/weather_quick.toml"))
    parser.add_argument("--steps", type=int, default=80, help="steps of a training")
    parser.add_argument("--every", type=int, default=10, help="steps from checkpoint to checkpoint")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--csv", type=Path, default=None, help="write a row a training here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options.config, Path(folder), options.steps, options.every)
        print_marks(measure(bench, options.rounds, options.csv))


if __name__ == "__main__":
    sys.exit(main())
