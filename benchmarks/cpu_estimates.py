"""Predicted against measured peaks on this CPU: each case runs in a fresh child, above what its imports take."""

import argparse
import csv
import fnmatch
import math
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.cpu_cases import CASES, Case
from memfit.memory.enforcement import process_status
from memfit.memory.estimate import Estimate, estimate
from memfit.memory.host import num_cores, processor_title
from memfit.process import Emit, run_child
from memfit.step import StepLayout, TrainingStep, materialize_state

MIB = 2**20
DEADLINE_SECONDS = 120.0
COLUMNS = ("case", "predicted_bytes", "upper_bytes", "measured_bytes", "error_percent", "estimate_seconds")


@dataclass(frozen=True)
class Row:
    """A case's outcome; sizes are bytes above the import baseline."""

    case: str
    predicted: int
    upper: int
    measured: int
    seconds: float

    @property
    def error_percent(self) -> float:
        return 100 * (self.predicted / self.measured - 1)


def run(payload: dict[str, Any], _emit: Emit) -> dict[str, int]:
    """Be the child: materialize optimizer state, run two steps, report resident bytes."""
    case = Case(**payload)
    torch.manual_seed(0)
    baseline = process_status()["VmRSS"]
    program = case.program()
    model = program.build().train()
    optimizer = program.optimizer(model)
    materialize_state(model, optimizer)
    layout = StepLayout(case.accumulation_steps, case.precision, case.checkpointing)
    step = TrainingStep(layout, program, model, optimizer)
    batch = program.make_batch(case.micro_batch_size * case.accumulation_steps, None)
    for _ in range(2):
        step(batch)
    return {"baseline": baseline, "peak": process_status()["VmHWM"]}


def measure(case: Case, log: Path) -> int:
    """Run a case in a child; return its peak resident bytes above the import baseline."""
    outcome = run_child("benchmarks.cpu_estimates:run", vars(case), log=log, deadline_seconds=DEADLINE_SECONDS)
    sizes = outcome.unwrap(case.name)
    return int(sizes["peak"]) - int(sizes["baseline"])


def predict(case: Case) -> Estimate:
    return estimate(
        case.program(),
        micro_batch_size=case.micro_batch_size,
        accumulation_steps=case.accumulation_steps,
        precision=case.precision,
        checkpointing=case.checkpointing,
        device="cpu",
    )


def compare(case: Case, log: Path) -> Row:
    started = time.perf_counter()
    predicted = predict(case)
    seconds = time.perf_counter() - started
    return Row(case.name, predicted.peak_bytes, predicted.upper_bytes, measure(case, log), seconds)


def summary(rows: list[Row]) -> str:
    errors = sorted(abs(row.error_percent) for row in rows)
    covered = sum(row.upper >= row.measured for row in rows)
    slack = statistics.median(100 * (row.upper / row.measured - 1) for row in rows)
    p95 = errors[math.ceil(0.95 * len(errors)) - 1]
    seconds = statistics.median(row.seconds for row in rows)
    return (
        f"{len(rows)} cases: median error {statistics.median(errors):.2f} %, p95 {p95:.2f} %, upper bound covers "
        f"{covered} of {len(rows)} ({100 * covered / len(rows):.0f} %, median slack {slack:.1f} %), "
        f"{seconds:.2f} s per estimate"
    )


def write(path: Path, rows: list[Row]) -> None:
    described = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    device = f"{processor_title()}, {num_cores()} cores"
    stamp = [datetime.now(UTC).date().isoformat(), described.stdout.strip(), device, torch.__version__]
    with path.open("w", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow(["date", "commit", "device", "torch", *COLUMNS])
        for row in rows:
            sizes = (row.case, row.predicted, row.upper, row.measured)
            writer.writerow([*stamp, *sizes, f"{row.error_percent:.2f}", f"{row.seconds:.3f}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", default="*", metavar="GLOB", help="run the cases whose name matches")
    parser.add_argument("--csv", type=Path, default=None, help="write the rows here")
    options = parser.parse_args()
    rows = []
    print(f"{'case':56s} {'predicted':>9s} {'upper':>9s} {'measured':>9s} {'error':>8s}  (MiB above the imports)")
    with tempfile.TemporaryDirectory() as folder:
        for case in (case for case in CASES if fnmatch.fnmatch(case.name, options.cases)):
            row = compare(case, Path(folder) / "child.log")
            rows.append(row)
            sizes = " ".join(f"{size / MIB:9.0f}" for size in (row.predicted, row.upper, row.measured))
            print(f"{row.case:56s} {sizes} {row.error_percent:+7.1f}%  {row.seconds:.2f} s", flush=True)
    if not rows:
        sys.exit(f"--cases: no case matches {options.cases!r}; the first is {CASES[0].name!r}.")
    print(summary(rows))
    if options.csv:
        write(options.csv, rows)


if __name__ == "__main__":
    main()
