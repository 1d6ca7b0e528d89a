"""memfit.plan against the exhaustive grid: every micro-batch size with and without checkpointing, a child for each.

    python -m benchmarks.oracle --csv benchmarks/oracle.csv

On the CPU, fp32, under the enforced budget, from the root of the repository. A layout of the grid fits if whole global
steps and an evaluation batch run under the budget and their peak stays within it. The grid's winner and the plan's
layout are then run again, interleaved; the ratio is of the medians of their throughputs. A winner that does not fit
every time is none: the next one takes its place.
"""

import argparse
import csv
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.planner_cases import CASES, MIB, Case, add_options, stamp
from benchmarks.planners import DEADLINE_SECONDS, Row
from memfit.memory.enforcement import enforce_budget, process_status
from memfit.memory.plan import Candidate, evaluation_batch_size
from memfit.memory.search import candidates, grid
from memfit.process import Emit, run_child
from memfit.step import CHECKPOINTINGS, StepLayout, TrainingStep, materialize_state

RATIO, CHILDREN, SECONDS, WITHOUT_OOM = 0.97, 3, 20.0, 0.95
TIMED_STEPS, TIMED_SECONDS = 8, 1.5
COLUMNS = (
    "date", "commit", "device", "torch", "case", "budget_bytes", "global_batch_size", "row", "micro_batch_size",
    "accumulation_steps", "checkpointing", "outcome", "peak_bytes", "samples_per_second", "ratio", "children", "probes",
    "ooms", "over_budget", "seconds",
)  # fmt: skip


def run(payload: dict[str, Any], _emit: Emit) -> dict[str, Any]:
    """Be the child: train whole global steps in one layout and evaluate one batch."""
    case, candidate = CASES[payload["case"]], Candidate(**payload["candidate"])
    torch.manual_seed(0)
    program, size = case.program(), case.global_batch_size
    enforce_budget(case.budget_bytes, "cpu")
    model = program.build().train()
    optimizer = program.optimizer(model)
    materialize_state(model, optimizer)
    layout = StepLayout(candidate.accumulation_steps, candidate.precision, candidate.checkpointing)
    step, batch, seconds = TrainingStep(layout, program, model, optimizer), program.make_batch(size), []
    step(batch)
    while len(seconds) < TIMED_STEPS and (len(seconds) < 2 or sum(seconds) < TIMED_SECONDS):
        seconds.append(step(batch).seconds)
    model.eval()
    with torch.no_grad():
        program.evaluate(model, program.make_batch(evaluation_batch_size(candidate, size)))
    return {"peak_bytes": process_status()["VmHWM"], "samples_per_second": size / statistics.median(seconds)}


@dataclass(frozen=True)
class Cell:
    """One layout of the grid, run once."""

    candidate: Candidate
    outcome: str
    """fits, over_budget, not_again (it fitted once), or how the child ended."""
    peak_bytes: int | None = None
    samples_per_second: float | None = None


def measure(case: Case, candidate: Candidate, log: Path) -> Cell:
    payload = {"case": case.name, "candidate": asdict(candidate)}
    ended = run_child("benchmarks.oracle:run", payload, log=log, deadline_seconds=DEADLINE_SECONDS)
    if ended.status != "ok":
        return Cell(candidate, ended.status)
    return Cell(candidate, "fits" if ended.value["peak_bytes"] <= case.budget_bytes else "over_budget", **ended.value)


def layouts(case: Case) -> Iterable[Candidate]:
    checkpointings = CHECKPOINTINGS if case.program().blocks else ("none",)
    for name in checkpointings:
        yield from grid(candidates(case.global_batch_size, precision="fp32", checkpointing=name, variant="only"))


@dataclass
class Result:
    """A case's grid, the search, and both winners run again."""

    case: Case
    cells: list[Cell]
    search: Row
    over_budget: int
    planned: Candidate | None
    again: dict[str, list[Cell]] = field(default_factory=lambda: {"grid": [], "plan": []})

    @property
    def winner(self) -> Cell | None:
        fitting = [cell for cell in self.cells if cell.outcome == "fits"]
        return max(fitting, key=lambda cell: cell.samples_per_second or 0.0, default=None)

    @property
    def ratio(self) -> float | None:
        """Of the plan's throughput to the winner's; None where something did not fit when run again."""
        if self.winner is None or self.planned is None:
            return None
        if self.winner.candidate == self.planned:
            return 1.0
        rates = [[cell.samples_per_second for cell in self.again[name]] for name in ("plan", "grid")]
        if not all(all(each) and each for each in rates):
            return None
        return statistics.median(rates[0]) / statistics.median(rates[1])


def search(case: Case, log: Path) -> tuple[Row, int, Candidate | None]:
    """Plan in a child; its start counts as part of the search."""
    row, over = Row(case, "memfit", children=0), 0

    def listen(event: dict[str, Any]) -> None:
        nonlocal over
        over += event["event"] == "over_budget"
        row.listen(event)

    payload = {"case": case.name, "planner": "memfit", "peers": []}
    found = run_child(
        "benchmarks.planners:search", payload, log=log, on_event=listen, deadline_seconds=DEADLINE_SECONDS
    )
    row.seconds, row.status, row.message = found.seconds, found.status, found.message
    if found.status != "ok":
        return row, over, None
    answer = row.answer = found.value
    planned = Candidate(answer["size"], answer["accumulation_steps"], "fp32", answer["checkpointing"], "only")
    return row, over, planned


def compare(case: Case, rounds: int, log: Path) -> Result:
    print(f"\n{case.name}: {case.budget_mib} MiB, global batch {case.global_batch_size}")
    started = time.perf_counter()
    row, over, planned = search(case, log)
    cells = []
    for candidate in layouts(case):
        cells.append(measure(case, candidate, log))
        print_cell(case, cells[-1], planned)
    result = Result(case, cells, row, over, planned)
    while planned is not None and result.winner is not None and result.winner.candidate != planned:
        winner, result.again = result.winner, {"grid": [], "plan": []}
        for _ in range(rounds):
            result.again["grid"].append(measure(case, winner.candidate, log))
            if result.again["grid"][-1].outcome != "fits":
                break
            result.again["plan"].append(measure(case, planned, log))
        else:
            break
        print(f"micro {winner.candidate.micro_batch_size}, {winner.candidate.checkpointing}: fitted once, not again")
        cells[cells.index(winner)] = replace(winner, outcome="not_again")
    print_result(result)
    print(f"{time.perf_counter() - started:.0f} s in all", flush=True)
    return result


def print_cell(case: Case, cell: Cell, planned: Candidate | None) -> None:
    peak = f"{cell.peak_bytes / MIB:5.0f} MiB {cell.peak_bytes / case.budget_bytes:6.1%}" if cell.peak_bytes else ""
    speed = f"{cell.samples_per_second:9.1f} samples/s" if cell.samples_per_second else ""
    layout = f"{cell.candidate.micro_batch_size:4d} x {cell.candidate.accumulation_steps:<4d}"
    mark = "  <- the plan" if cell.candidate == planned else ""
    print(f"  {layout} {cell.candidate.checkpointing:6s} {cell.outcome:11s} {peak:18s} {speed}{mark}", flush=True)


def _cell_of(result: Result, candidate: Candidate | None) -> Cell | None:
    return next((cell for cell in result.cells if cell.candidate == candidate), None)


def print_result(result: Result) -> None:
    row, winner, planned = result.search, result.winner, _cell_of(result, result.planned)
    print(
        f"search: {row.children} children, {row.trials} probes, {row.ooms} out of memory, {result.over_budget} over "
        f"budget, {row.seconds:.1f} s" + (f"; {row.status}: {row.message:.200}" if row.status != "ok" else "")
    )
    for name, cell in (("winner of the grid", winner), ("the plan", planned)):
        if cell is not None:
            used = (
                f"{cell.peak_bytes / result.case.budget_bytes:.1%} of the budget" if cell.peak_bytes else cell.outcome
            )
            print(f"{name}: micro {cell.candidate.micro_batch_size}, {cell.candidate.checkpointing}, {used}")
    if result.ratio is not None:
        same = " (the same layout)" if winner and winner.candidate == result.planned else ""
        print(f"throughput of the plan / of the grid's winner: {result.ratio:.3f}{same}")
    elif result.planned is not None and winner is not None:
        print("no ratio: the plan did not fit every time that it was run again")


def print_marks(results: list[Result]) -> None:
    ratios = [result.ratio for result in results]
    good = sum(ratio is not None and ratio >= RATIO for ratio in ratios)
    few = sum(r.search.status == "ok" and r.search.children <= CHILDREN and not r.search.ooms for r in results)
    soon = sum(result.search.status == "ok" and result.search.seconds <= SECONDS for result in results)
    total = len(results)
    print(f"\nratio >= {RATIO}: {good} of {total}")
    print(f"at most {CHILDREN} child processes and none out of memory: {few} of {total} (mark: {WITHOUT_OOM:.0%})")
    print(f"searched within {SECONDS:.0f} s: {soon} of {total}")


def rows_of(result: Result) -> Iterable[dict[str, Any]]:
    case, row = result.case, result.search
    of_case = {"case": case.name, "budget_bytes": case.budget_bytes, "global_batch_size": case.global_batch_size}

    def of(cell: Cell, name: str) -> dict[str, Any]:
        layout = {
            key: getattr(cell.candidate, key) for key in ("micro_batch_size", "accumulation_steps", "checkpointing")
        }
        speed = cell.samples_per_second and f"{cell.samples_per_second:.1f}"
        measured = {"outcome": cell.outcome, "peak_bytes": cell.peak_bytes, "samples_per_second": speed}
        return {**of_case, "row": name, **layout, **measured}

    yield from (of(cell, "grid") for cell in result.cells)
    yield from (of(cell, f"{name} again") for name, cells in result.again.items() for cell in cells)
    planned = _cell_of(result, result.planned)
    searched = {"children": row.children, "probes": row.trials, "ooms": row.ooms, "over_budget": result.over_budget}
    searched |= {"seconds": f"{row.seconds:.1f}", "ratio": result.ratio and f"{result.ratio:.3f}"}
    yield {**(of(planned, "plan") if planned else {**of_case, "row": "plan", "outcome": row.status}), **searched}


def write(path: Path, results: Iterable[Result]) -> None:
    stamped = stamp()
    with path.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(stamped | row for result in results for row in rows_of(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--rounds", type=int, default=5, help="how often the winner and the plan are run again")
    parser.add_argument("--csv", type=Path, default=None, help="write a row a layout here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results: list[Result] = []
        for name in options.cases:
            results.append(compare(CASES[name], options.rounds, Path(folder) / "child.log"))
            if options.csv:
                write(options.csv, results)
    print_marks(results)


if __name__ == "__main__":
    sys.exit(main())
