"""How far cold estimates are from GPU runs that others measured, beside four other estimators on the same rows.

    python -m benchmarks.estimates --data ../shared/data/gpu_memory_measured.csv --csv benchmarks/estimates.csv

No GPU is needed, but torchvision and transformers 4.51.3 beside memfit are (see benchmarks.measured_cases); 75 cases
take about two minutes on two cores. Errors count runs that did not crash; language models from batch 15 on.
"""

import argparse
import csv
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.measured_cases import ESTIMATORS, Case, load_cases, usable
from benchmarks.step_overhead import commit
from memfit.memory.devices import find_device
from memfit.memory.estimate import UPPER_MARGIN, Estimate, estimate
from memfit.step import Batch, TrainingProgram

MIB = 2**20
COVERED = 0.95
TOO_LOW = -0.02
OF_THE_CASE = ("family", "task", "optimizer", "batch_size", "sequence_length", "zero_grad_mode", "device")
OF_THE_CASE += ("real_oom", "ground_bytes")
OF_THE_ESTIMATE = ("peak_bytes", "upper_bytes", "live_bytes", "fits")
COLUMNS = (
    "date",
    "commit",
    "torch",
    "case",
    *OF_THE_CASE,
    "counted",
    *OF_THE_ESTIMATE,
    "error",
    "seconds",
    "cpu_seconds",
)
COLUMNS += tuple(ESTIMATORS.values())


@dataclass(frozen=True)
class Row:
    case: Case
    estimate: Estimate
    capacity: int
    """What the device has for segments: its memory without the context."""
    seconds: float
    cpu_seconds: float

    @property
    def error(self) -> float:
        return self.estimate.peak_bytes / self.case.ground_bytes - 1

    @property
    def bound(self) -> float:
        """The upper bound before its margin."""
        return self.estimate.upper_bytes / (1 + UPPER_MARGIN)


def estimated(case: Case) -> Row:
    """Estimate a case as their script ran it: from scratch, variables rebound in the order of their loop.

    Their loop drops the last inputs before the next are moved, so the step makes the batch where it is wanted; the one
    that it is handed is a stand-in of a byte a sample.
    """
    kept: dict[str, Any] = {}

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, stand_in: Batch) -> None:
        def batch() -> dict[str, torch.Tensor]:
            with torch.device("meta"):
                return case.make_batch(len(stand_in), case.sequence_length or None)

        case.step(model, optimizer, batch, kept)

    program = TrainingProgram(
        build_model=case.build_model,
        make_batch=lambda n, _seq_len=None: torch.zeros(n, dtype=torch.uint8),
        optimizer=case.make_optimizer,
    )
    device, started, cpu_started = find_device(case.device), time.perf_counter(), time.process_time()
    result = estimate(program, micro_batch_size=case.batch_size, device=device, step=step)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    return Row(case, result, device.memory_bytes - device.context_bytes, seconds, cpu_seconds)


def percentile(values: Iterable[float], share: float) -> float:
    """Return the smallest value that at least this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def print_row(number: int, total: int, row: Row) -> None:
    case, said = row.case, row.estimate
    xmem = case.others["xmem"]
    beside = "      " if xmem is None else f"{xmem / case.ground_bytes - 1:+6.1%}"
    mark = "" if usable(case) else "crashed" if case.real_oom else "too short"
    verdict = "fits" if said.fits else "out of memory"
    print(
        f"{number:3d}/{total} {case.name:42.42s} {case.ground_bytes / MIB:7.0f} {said.peak_bytes / MIB:7.0f} "
        f"{row.error:+6.1%} {said.upper_bytes / MIB:7.0f} {beside} {row.seconds:5.1f} s {verdict:13s} {mark}",
        flush=True,
    )


def print_marks(rows: Sequence[Row]) -> None:
    """Print median, 95th percentile and how many are too low, for each estimator on the rows that it covers."""
    print(f"\n{'estimator':12s} {'rows':>9s} {'median':>8s} {'p95':>8s} {'more than 2 % too low':>23s}")
    ours = [("memfit", [row.error for row in rows])]
    for name in ESTIMATORS:
        given = [(row.case.others[name], row.case.ground_bytes) for row in rows]
        ours.append((name, [said / ground - 1 for said, ground in given if said is not None]))
    for name, errors in ours:
        if errors:
            sizes, low = [abs(error) for error in errors], sum(error < TOO_LOW for error in errors) / len(errors)
            print(
                f"{name:12s} {len(errors):3d} of {len(rows):2d} {statistics.median(sizes):8.2%} "
                f"{percentile(sizes, 0.95):8.1%} {low:23.0%}"
            )
    covered = [row.estimate.upper_bytes >= row.case.ground_bytes for row in rows]
    slack = statistics.median(row.estimate.upper_bytes / row.case.ground_bytes - 1 for row in rows)
    print(f"upper_bytes covers {statistics.mean(covered):.1%}, median slack {slack:.1%}")


def print_crashes(rows: Sequence[Row]) -> None:
    """Print how many real crashes were foreseen and how many false alarms there were, by two criteria."""
    criteria: tuple[tuple[str, Callable[[Row], bool]], ...] = (
        ("peak_bytes, replayed within the memory", lambda row: row.estimate.fits),
        ("upper_bytes, as plans are fitted", lambda row: row.estimate.upper_bytes <= row.capacity),
    )
    crashed, ran = [[row for row in rows if row.case.real_oom is oom] for oom in (True, False)]
    for name, fits in criteria:
        missed, alarms = [row for row in crashed if fits(row)], [row for row in ran if not fits(row)]
        foreseen = len(crashed) - len(missed)
        print(
            f"out of memory by {name}: {foreseen} of {len(crashed)} foreseen, {len(alarms)} false alarms in {len(ran)}"
        )
        for kind, rows_of_it in (("missed", missed), ("false alarm", alarms)):
            print(*(f"    {kind}: {row.case.name}\n" for row in rows_of_it), sep="", end="")


def print_left_out(rows: Sequence[Row]) -> None:
    """Print the only fitted figure, refitted without a family, and how well it then covers that family."""
    families = sorted({row.case.family for row in rows})
    if len(families) < 2:
        return
    print(f"\nUPPER_MARGIN is {UPPER_MARGIN:.1%}; refitted without a family, the smallest that covers {COVERED:.0%}:")
    covered = []
    for family in families:
        others = [row for row in rows if row.case.family != family]
        margin = percentile((row.case.ground_bytes / row.bound - 1 for row in others), COVERED)
        held_out = [row for row in rows if row.case.family == family]
        hits = [row.bound * (1 + margin) >= row.case.ground_bytes for row in held_out]
        covered += hits
        print(f"{family:12s} left out: margin {margin:.1%} covers {sum(hits):2d} of {len(hits):2d}")
    print(f"all families, each when left out: {statistics.mean(covered):.1%} covered")


def write(path: Path, rows: Sequence[Row]) -> None:
    stamp = {"date": datetime.now(UTC).date().isoformat(), "commit": commit(), "torch": torch.__version__}
    with path.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            case, said = row.case, row.estimate
            others = {ESTIMATORS[name]: "" if value is None else round(value) for name, value in case.others.items()}
            writer.writerow(
                stamp
                | {"case": case.name, "counted": usable(case), "error": f"{row.error:.4f}"}
                | {"seconds": f"{row.seconds:.2f}", "cpu_seconds": f"{row.cpu_seconds:.2f}"}
                | {name: getattr(case, name) for name in OF_THE_CASE}
                | {name: getattr(said, name) for name in OF_THE_ESTIMATE}
                | others
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the measured runs: a CSV, as shown above")
    parser.add_argument("--only", default="", help="only cases with this in their name")
    parser.add_argument("--csv", type=Path, default=None, help="write a row a case here")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # of the models' own libraries
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    cases = [case for case in load_cases(options.data) if options.only.lower() in case.name.lower()]
    if not cases:
        parser.error(f"--only: no case has {options.only!r} in its name")
    print(f"    {'case':45s} {'ground':>6s} {'memfit':>7s} {'error':>6s} {'upper':>7s} {'xmem':>6s}   MiB; seconds")
    rows: list[Row] = []
    for number, case in enumerate(cases, 1):
        rows.append(estimated(case))
        print_row(number, len(cases), rows[-1])
    counted = [row for row in rows if usable(row.case)]
    if counted:
        print_marks(counted)
    print_crashes(rows)
    wall, cpu = (statistics.median(values) for values in zip(*((r.seconds, r.cpu_seconds) for r in rows), strict=True))
    print(f"seconds a case: median {wall:.2f}, of which on the processor {cpu:.2f}")
    if counted:
        print_left_out(counted)
    if options.csv:
        write(options.csv, rows)


if __name__ == "__main__":
    sys.exit(main())
