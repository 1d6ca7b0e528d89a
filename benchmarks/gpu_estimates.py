"""Predicted against measured peaks on a GPU: each case runs in a fresh child; this process makes no CUDA context.

    python -m benchmarks.gpu_estimates --csv benchmarks/gpu_estimates.csv [--only 'gpt/*'] [--limit 40] [--cap 14GiB]

From the root of the repository. Rows that the CSV already has of this device, torch and commit are taken over, so that
a run cut short goes on. `--dry-run` predicts every case for a card that need not be here, and runs none.
"""

import argparse
import contextlib
import csv
import fnmatch
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_cases import CASES, GpuCase
from memfit.errors import MemfitError
from memfit.memory.devices import Device, find_device
from memfit.memory.estimate import estimate
from memfit.memory.units import parse_bytes
from memfit.process import Emit, run_child
from memfit.step import StepLayout, TrainingStep, materialize_state

MIB = 2**20
DEADLINE_SECONDS = 180.0
STEPS = 2


@dataclass(frozen=True)
class Row:
    """A case's outcome. Sizes are bytes without the CUDA context; 0: not known."""

    date: str
    commit: str
    device: str
    torch: str
    case: str
    outcome: str
    """ok, oom, timeout, failed, or (nothing was run) predicted."""
    predicted_bytes: int = 0
    upper_bytes: int = 0
    fits: bool = True
    """Whether the case was predicted to fit."""
    reserved_bytes: int = 0
    """torch.cuda.max_memory_reserved: what the prediction is compared with."""
    allocated_bytes: int = 0
    nvml_bytes: int = 0
    """How far the card's used memory rose, as cudaMemGetInfo and NVML tell it; others' memory is in it too."""
    process_bytes: int = 0
    """What nvidia-smi shows of the process, context included, where it is there and sees it."""
    context_bytes: int = 0
    estimate_seconds: float = 0.0
    run_seconds: float = 0.0
    message: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        return self.device, self.torch, self.commit, self.case

    @property
    def error_percent(self) -> float:
        return 100 * (self.predicted_bytes / self.reserved_bytes - 1)


COLUMNS = tuple(each.name for each in fields(Row))


def describe(payload: dict[str, Any], _emit: Emit) -> dict[str, Any]:
    """Be a child: look at the card, so that the parent need not."""
    return asdict(find_device(payload["device"]))


def run(payload: dict[str, Any], _emit: Emit) -> dict[str, int]:
    """Be the child: materialize optimizer state, run a few steps, report what the card gave."""
    case, device = GpuCase(**payload["case"]), payload["device"]
    torch.manual_seed(0)
    torch.zeros(1, device=device)
    torch.cuda.empty_cache()  # of the context alone
    torch.cuda.reset_peak_memory_stats(device)
    free, total = torch.cuda.mem_get_info(device)
    if payload["cap"] is not None:
        torch.cuda.set_per_process_memory_fraction(min(payload["cap"] / total, 1.0), device)
    program = case.program()
    model = program.build().to(device).train()
    optimizer = program.optimizer(model)
    materialize_state(model, optimizer)
    layout = StepLayout(case.accumulation_steps, case.precision, case.checkpointing, device, case.chunked_loss)
    step = TrainingStep(layout, program, model, optimizer)
    batch = program.batch(case.micro_batch_size * case.accumulation_steps)
    for _ in range(STEPS):
        step(batch)
    torch.cuda.synchronize(device)
    return {
        "reserved_bytes": torch.cuda.max_memory_reserved(device),
        "allocated_bytes": torch.cuda.max_memory_allocated(device),
        "nvml_bytes": free - torch.cuda.mem_get_info(device)[0],
        "process_bytes": _shown_by_nvidia_smi(),
        "context_bytes": total - free,
    }


def _shown_by_nvidia_smi() -> int:
    """Read this process's memory; 0 where nvidia-smi is missing, or a container hides process ids."""
    query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
        said = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
        own = Path("/proc/self").resolve().name
        return sum(int(line.split(",")[1]) * MIB for line in said.splitlines() if line.split(",")[0].strip() == own)
    return 0


def predict(case: GpuCase, device: Device) -> dict[str, Any]:
    started = time.perf_counter()
    try:
        said = estimate(
            case.program(),
            micro_batch_size=case.micro_batch_size,
            accumulation_steps=case.accumulation_steps,
            precision=case.precision,
            checkpointing=case.checkpointing,
            chunked_loss=case.chunked_loss,
            device=device,
        )
    except Exception as error:  # noqa: BLE001  (a case that cannot be predicted is a row)
        return {"outcome": "failed", "message": f"prediction: {type(error).__name__}: {error}"[:300]}
    sizes = {"predicted_bytes": said.peak_bytes, "upper_bytes": said.upper_bytes, "fits": said.fits}
    return {"outcome": "predicted", **sizes, "estimate_seconds": round(time.perf_counter() - started, 3)}


def measure(case: GpuCase, device: str, cap: int | None, log: Path) -> dict[str, Any]:
    payload = {"case": vars(case), "device": device, "cap": cap}
    outcome = run_child("benchmarks.gpu_estimates:run", payload, log=log, deadline_seconds=DEADLINE_SECONDS)
    found = {"outcome": outcome.status, "run_seconds": round(outcome.seconds, 2)}
    return found | (outcome.value if outcome.status == "ok" else {"message": outcome.message[:300]})


@dataclass
class Run:
    """One call of this benchmark."""

    device: Device
    csv: Path | None
    cap: int | None = None
    dry: bool = False
    rows: list[Row] = field(default_factory=list)
    stamp: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        label = self.device.title if self.cap is None else f"{self.cap / 2**30:g} GiB on {self.device.title}"
        self.stamp = {
            "date": datetime.now(UTC).date().isoformat(),
            "commit": commit(),
            "device": label,
            "torch": torch.__version__,
        }

    def target(self) -> Device:
        """The card as the prediction sees it: under a cap, no larger than the cap and its context."""
        if self.cap is None:
            return self.device
        return replace(self.device, memory_bytes=min(self.device.memory_bytes, self.cap + self.device.context_bytes))

    def all(self, cases: Sequence[GpuCase]) -> None:
        found = read(self.csv) if self.csv else []
        known = {row.key: row for row in found if self.dry or row.outcome != "predicted"}
        with tempfile.TemporaryDirectory() as folder:
            for number, case in enumerate(cases, start=1):
                key = (self.stamp["device"], self.stamp["torch"], self.stamp["commit"], case.name)
                row = known.get(key)
                if row is None:
                    row = self.one(case, Path(folder) / "child.log")
                    if self.csv:
                        append(self.csv, row)
                self.rows.append(row)
                print(f"[{number}/{len(cases)}] {described(row)}", file=sys.stderr, flush=True)

    def one(self, case: GpuCase, log: Path) -> Row:
        found = predict(case, self.target())
        if not self.dry:
            found |= measure(case, self.device.name, self.cap, log)
        return Row(**self.stamp, case=case.name, **found)


def commit() -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return "unknown"


def read(path: Path) -> list[Row]:
    """Read rows back; the file need not be there yet."""
    if not path.exists():
        return []
    kinds = {each.name: each.type for each in fields(Row)}
    parse: dict[Any, Any] = {int: int, float: float, bool: lambda text: text == "True", str: str}
    with path.open(newline="") as opened:
        return [
            Row(**{name: parse[kinds[name]](text) for name, text in line.items() if name in kinds})
            for line in csv.DictReader(opened)
        ]


def append(path: Path, row: Row) -> None:
    """Write one row at once: a run that is cut short keeps what it found."""
    is_new = not path.exists()
    with path.open("a", newline="") as opened:
        writer = csv.writer(opened)
        if is_new:
            writer.writerow([*COLUMNS, "error_percent"])
        error = f"{row.error_percent:.2f}" if row.reserved_bytes else ""
        writer.writerow([*(getattr(row, name) for name in COLUMNS), error])


def described(row: Row) -> str:
    sizes = (row.predicted_bytes, row.upper_bytes, row.reserved_bytes, row.nvml_bytes)
    figures = " ".join(f"{size / MIB:9.0f}" if size else f"{'-':>9s}" for size in sizes)
    error = f"{row.error_percent:+7.1f}%" if row.outcome == "ok" and row.predicted_bytes else f"{row.outcome:>8s}"
    return f"{row.case:56s} {figures} {error}  {row.message[:100]}".rstrip()


def summary(rows: Sequence[Row]) -> list[str]:
    """Say how far predictions were off, how often the upper bound held, and whether fitting was foreseen."""
    good = [row for row in rows if row.outcome == "ok" and row.predicted_bytes]
    said = []
    if good:
        errors = sorted(abs(row.error_percent) for row in good)
        covered = sum(row.upper_bytes >= row.reserved_bytes for row in good)
        slack = statistics.median(100 * (row.upper_bytes / row.reserved_bytes - 1) for row in good)
        low = sum(row.error_percent < -2 for row in good)
        said.append(
            f"{len(good)} cases: median error {statistics.median(errors):.2f} %, p95 "
            f"{errors[math.ceil(0.95 * len(errors)) - 1]:.2f} %, more than 2 % too low {low}, upper bound covers "
            f"{covered} of {len(good)} ({100 * covered / len(good):.0f} %, median slack {slack:.1f} %)"
        )
    out = [row for row in rows if row.outcome == "oom" and row.predicted_bytes]
    if out or any(not row.fits for row in good):
        foreseen, alarms = sum(not row.fits for row in out), sum(not row.fits for row in good)
        said.append(f"{len(out)} ran out of memory, {foreseen} of them foreseen; {alarms} false alarms")
    other = [row.case for row in rows if row.outcome in ("failed", "timeout")]
    return [*said, *([f"{len(other)} failed: {', '.join(other)}"] if other else [])]


def find_card(name: str, log: Path) -> Device:
    """Describe a card that is here; a child looks at it."""
    found = run_child("benchmarks.gpu_estimates:describe", {"device": name}, log=log).unwrap("looking at the card")
    lists = {key: tuple(value) for key, value in found.items() if isinstance(value, list)}
    return Device(**{**found, **lists})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="*", metavar="GLOB", help="run the cases whose name matches")
    parser.add_argument("--limit", type=int, default=None, metavar="N", help="run at most N cases")
    parser.add_argument("--csv", type=Path, default=None, help="append rows here, and skip those already there")
    parser.add_argument(
        "--cap", type=parse_bytes, default=None, metavar="14GiB", help="let torch have no more than this"
    )
    parser.add_argument("--device", default=None, help="cuda:0; with --dry-run a card of the catalog, h100")
    parser.add_argument("--dry-run", action="store_true", help="predict only; no card is needed")
    options = parser.parse_args()
    if options.dry_run:
        device = find_device(options.device or "h100")
    else:
        with tempfile.TemporaryDirectory() as folder:
            try:
                device = find_card(options.device or "cuda:0", Path(folder) / "log")
            except MemfitError as error:
                sys.exit(str(error))
    cases = [case for case in CASES if fnmatch.fnmatch(case.name, options.only)]
    cases = [case for case in cases if case.precision in device.precisions][: options.limit]
    if not cases:
        sys.exit(f"--only: no case matches {options.only!r}; the first is {CASES[0].name!r}.")
    benchmark = Run(device, options.csv, options.cap, options.dry_run)
    print(f"{benchmark.stamp['device']}, torch {torch.__version__}, commit {benchmark.stamp['commit']}")
    benchmark.all(cases)
    print(f"{'case':56s} {'predicted':>9s} {'upper':>9s} {'reserved':>9s} {'nvml':>9s} {'error':>8s}  (MiB)")
    print(*map(described, benchmark.rows), *summary(benchmark.rows), sep="\n")
    if options.dry_run and any(row.outcome == "failed" for row in benchmark.rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
