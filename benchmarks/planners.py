"""memfit.plan beside Lightning's BatchSizeFinder, Accelerate's find_executable_batch_size and plain halving.

    python -m benchmarks.planners --peers DIR --csv benchmarks/planners.csv

Same models, same enforced budget (RLIMIT_DATA in a child process of its own), on the CPU, from the root of the
repository. The peers are wanted for this benchmark alone: `pip install --target DIR --no-deps lightning accelerate
lightning-utilities torchmetrics`. Each answer then trains in a fresh child under the same budget, with an evaluation
pass every 20 steps: memfit's by its step, on a whole global batch; the peers' by accumulating micro-batches of their
answer to the same global batch, loaded one at a time, without the peer imported. A peer's limit is raised by what its
own imports take. Then the answers that survived train again, a few steps each in turns; throughput is the global batch
over the median seconds of a step, batches made outside of it, and of these the median over the turns.
"""

import argparse
import csv
import importlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import memfit
from benchmarks.planner_cases import CASES, MIB, Case, add_options, cut, stamp
from memfit.errors import ConfigError
from memfit.memory import planner
from memfit.memory.enforcement import enforce_budget, process_status
from memfit.process import Emit, Outcome, is_out_of_memory, run_child
from memfit.step import StepLayout, TrainingProgram, TrainingStep

DEADLINE_SECONDS = 400.0
STEPS_PER_TRIAL = 3  # Lightning's default, and what the others get
EVALUATE_EVERY = 20
STEPS_PER_TURN = 12
COLUMNS = (
    "date", "commit", "device", "torch", "case", "budget_bytes", "global_batch_size", "planner", "version", "status",
    "trials", "ooms", "children", "seconds", "micro_batch_size", "checkpointing", "ever_run", "steps", "survived",
    "steps_done", "peak_bytes", "samples_per_second", "message",
)  # fmt: skip


@dataclass(frozen=True)
class Room:
    """What a process takes before a peer is imported, so that the peer's own imports are not held against it."""

    before: int = field(default_factory=lambda: Room.taken())

    @staticmethod
    def taken() -> int:
        status = process_status()
        return status["VmRSS"]

    def enforce(self, case: Case) -> None:
        enforce_budget(case.budget_bytes + self.taken() - self.before, "cpu")


def _peer(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"{name}: expected it to be importable, got {error}. Give --peers a folder that it is installed in: "
            "pip install --target DIR --no-deps lightning accelerate lightning-utilities torchmetrics."
        ) from error


def _trial(emit: Emit, size: int, run: Callable[[], object]) -> None:
    emit({"event": "trial", "size": size})
    try:
        run()
    except Exception as error:
        emit({"event": "oom" if is_out_of_memory(error) else "crash", "size": size, "message": str(error)[:300]})
        raise
    emit({"event": "ran", "size": size})


def _some_steps(program: TrainingProgram, size: int) -> None:
    model = program.build().train()
    optimizer = program.optimizer(model)
    for _ in range(STEPS_PER_TRIAL):
        program.loss(model, program.make_batch(size)).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        program.evaluate(model, program.make_batch(size))


def by_memfit(case: Case, emit: Emit) -> dict[str, Any]:
    """Plan in this process; its probes enforce the budget in children of their own."""
    spawn = planner.run_child

    def counted(*arguments: Any, **options: Any) -> Outcome:
        emit({"event": "child"})
        return spawn(*arguments, **options)

    def on_probe(probe: Any) -> None:
        emit({"event": "trial", "size": probe.micro_batch_size})
        emit({"event": {"fits": "ran"}.get(probe.outcome, probe.outcome), "size": probe.micro_batch_size})

    planner.run_child = counted
    plan = memfit.plan(
        case.program(), global_batch_size=case.global_batch_size, budget=f"{case.budget_mib}MiB", on_probe=on_probe
    )
    return {
        "size": plan.micro_batch_size,
        "accumulation_steps": plan.accumulation_steps,
        "checkpointing": plan.checkpointing,
        "eval_size": plan.eval_batch_size,
        "ever_run": plan.verified,
        "version": memfit.__version__,
        "explained": plan.explain(),
    }


def by_lightning(case: Case, emit: Emit, mode: str) -> dict[str, Any]:
    """Run Tuner.scale_batch_size as it is, with its defaults."""
    room = Room()
    lightning, scaling = _peer("lightning.pytorch"), _peer("lightning.pytorch.tuner.batch_size_scaling")
    tuner_of, program = _peer("lightning.pytorch.tuner").Tuner, case.program()

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.batch_size = program.build(), 2

        def training_step(self, batch: Any, _index: int) -> torch.Tensor:
            return program.loss(self.net, batch)

        def validation_step(self, batch: Any, _index: int) -> None:
            program.evaluate(self.net, batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return program.optimizer(self.net)

        def train_dataloader(self) -> Any:
            samples = range(1 << 16)
            collate = lambda chosen: program.make_batch(len(chosen))  # noqa: E731
            return torch.utils.data.DataLoader(samples, batch_size=self.batch_size, collate_fn=collate)

        val_dataloader = train_dataloader

    run = scaling._try_loop_run
    scaling._try_loop_run = lambda trainer, parameters: _trial(
        emit, trainer.lightning_module.batch_size, lambda: run(trainer, parameters)
    )
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    with tempfile.TemporaryDirectory() as folder:
        module, trainer = Module(), lightning.Trainer(accelerator="cpu", default_root_dir=folder, max_epochs=1, **quiet)
        room.enforce(case)
        size = tuner_of(trainer).scale_batch_size(module, mode=mode)
    return {"size": size, "version": lightning.__version__}


def by_accelerate(case: Case, emit: Emit) -> dict[str, Any]:
    room, accelerate = Room(), _peer("accelerate")
    find = _peer("accelerate.utils").find_executable_batch_size
    program = case.program()
    room.enforce(case)

    @find(starting_batch_size=case.global_batch_size)
    def train(batch_size: int) -> int:
        _trial(emit, batch_size, lambda: _some_steps(program, batch_size))
        return batch_size

    return {"size": train(), "version": accelerate.__version__}


def by_halving(case: Case, emit: Emit) -> dict[str, Any]:
    program, size = case.program(), case.global_batch_size
    enforce_budget(case.budget_bytes, "cpu")
    while size:
        try:
            _trial(emit, size, lambda tried=size: _some_steps(program, tried))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        else:
            return {"size": size, "version": ""}
        size //= 2
    raise MemoryError("not even one sample fits")


PLANNERS: dict[str, Callable[[Case, Emit], dict[str, Any]]] = {
    "memfit": by_memfit,
    "lightning power": lambda case, emit: by_lightning(case, emit, "power"),
    "lightning binsearch": lambda case, emit: by_lightning(case, emit, "binsearch"),
    "accelerate": by_accelerate,
    "halving": by_halving,
}


def search(payload: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Be the child that searches."""
    sys.path.extend(payload["peers"])  # behind everything else: torch is the environment's
    torch.manual_seed(0)
    return PLANNERS[payload["planner"]](CASES[payload["case"]], emit)


def train(payload: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Be the child that trains at an answer, under the budget."""
    case, answer = CASES[payload["case"]], payload["answer"]
    torch.manual_seed(0)
    program, size = case.program(), case.global_batch_size
    enforce_budget(case.budget_bytes, "cpu")
    model = program.build().train()
    optimizer = program.optimizer(model)
    layout = StepLayout(answer.get("accumulation_steps", 1), checkpointing=answer.get("checkpointing", "none"))
    step, seconds = TrainingStep(layout, program, model, optimizer), []
    for index in range(1, payload["steps"] + 1):
        if "accumulation_steps" in answer:
            seconds.append(step(program.make_batch(size)).seconds)
        else:
            seconds.append(_accumulated(step, program, cut(size, answer["size"]), size))
        emit({"event": "step", "step": index})
        if index % EVALUATE_EVERY == 0:
            model.eval()
            with torch.no_grad():
                for part in cut(size, answer["eval_size"]):
                    program.evaluate(model, program.make_batch(part))
            model.train()
    return {"peak_bytes": process_status()["VmHWM"], "samples_per_second": size / statistics.median(seconds)}


def _accumulated(step: TrainingStep, program: TrainingProgram, parts: Iterable[int], size: int) -> float:
    spent = 0.0
    for part in parts:
        batch, started = program.make_batch(part), time.perf_counter()
        step.accumulate(batch, None, size)
        spent += time.perf_counter() - started
    started = time.perf_counter()
    step.update()
    return spent + time.perf_counter() - started


@dataclass
class Row:
    """What one planner did with one case."""

    case: Case
    planner: str
    steps: int = 0
    trials: int = 0
    ooms: int = 0
    children: int = 1
    ran: set[int] = field(default_factory=set)
    seconds: float = 0.0
    answer: dict[str, Any] | None = None
    status: str = ""
    message: str = ""
    survived: bool = False
    steps_done: int = 0
    peak_bytes: int | None = None
    samples_per_second: float | None = None
    payload: dict[str, Any] = field(default_factory=dict)

    def listen(self, event: dict[str, Any]) -> None:
        if event["event"] == "ran":
            self.ran.add(event["size"])
        elif event["event"] == "step":
            self.steps_done = event["step"]
        else:
            counter = {"trial": "trials", "oom": "ooms", "child": "children"}.get(event["event"])
            if counter:
                setattr(self, counter, getattr(self, counter) + 1)

    @property
    def ever_run(self) -> bool | None:
        return None if self.answer is None else bool(self.answer.get("ever_run", self.answer["size"] in self.ran))

    def values(self) -> dict[str, Any]:
        answer, case = self.answer or {}, self.case
        return {
            "case": case.name, "budget_bytes": case.budget_bytes, "global_batch_size": case.global_batch_size,
            "planner": self.planner, "version": answer.get("version", ""), "status": self.status,
            "trials": self.trials, "ooms": self.ooms, "children": self.children, "seconds": f"{self.seconds:.1f}",
            "micro_batch_size": answer.get("size"), "checkpointing": answer.get("checkpointing", "none"),
            "ever_run": self.ever_run, "steps": self.steps, "survived": self.survived,
            "steps_done": self.steps_done, "peak_bytes": self.peak_bytes,
            "samples_per_second": self.samples_per_second and f"{self.samples_per_second:.1f}",
            "message": self.message,
        }  # fmt: skip


def measure(case: Case, name: str, steps: int, peers: list[str], log: Path) -> Row:
    """Search in one child, train at its answer in another."""
    row, payload = Row(case, name, steps), {"case": case.name, "planner": name, "peers": peers, "steps": steps}
    found = run_child(
        "benchmarks.planners:search", payload, log=log, on_event=row.listen, deadline_seconds=DEADLINE_SECONDS
    )
    row.seconds, row.status, row.message = found.seconds, found.status, found.message
    if found.status != "ok":
        row.ooms += found.status == "oom" and found.error.startswith("SIG")  # nobody else could count that one
        return row
    row.answer = found.value
    used = min(row.answer["size"], case.global_batch_size)
    payload["answer"] = {"eval_size": used, **row.answer, "size": used}
    trained = run_child(
        "benchmarks.planners:train", payload, log=log, on_event=row.listen, deadline_seconds=DEADLINE_SECONDS
    )
    row.survived, row.payload = trained.status == "ok", payload
    if row.survived:
        row.peak_bytes = trained.value["peak_bytes"]
    else:
        row.message = f"{trained.status} after {row.steps_done} steps: {trained.message}"
    return row


def in_turns(rows: Iterable[Row], turns: int, log: Path) -> None:
    """Train the answers that survived again, in turns, so that what the machine does meanwhile is shared."""
    surviving = [row for row in rows if row.survived]
    rates: list[list[float]] = [[] for _ in surviving]
    for _ in range(turns):
        for row, found in zip(surviving, rates, strict=True):
            payload = {**row.payload, "steps": STEPS_PER_TURN}
            trained = run_child("benchmarks.planners:train", payload, log=log, deadline_seconds=DEADLINE_SECONDS)
            found += [trained.value["samples_per_second"]] if trained.status == "ok" else []
    for row, found in zip(surviving, rates, strict=True):
        row.samples_per_second = statistics.median(found) if found else None


def print_row(row: Row) -> None:
    answer = "none" if row.answer is None else str(row.answer["size"])
    if (row.answer or {}).get("checkpointing") == "blocks":
        answer += " + blocks"
    ran = {None: "-", True: "yes", False: "no"}[row.ever_run]
    trained = f"{'survived' if row.survived else f'died at {row.steps_done}':>11s}" if row.answer else f"{'-':>11s}"
    peak = f"{row.peak_bytes / MIB:5.0f} MiB {row.peak_bytes / row.case.budget_bytes:5.1%}" if row.peak_bytes else ""
    print(
        f"{row.case.name:8s} {row.planner:20s} {row.trials:6d} {row.ooms:4d} {row.seconds:7.1f} {answer:>12s} "
        f"{ran:>8s} {trained} {peak:16s}",
        flush=True,
    )
    if row.message:
        print(f"         {row.message.splitlines()[0]:.100}", flush=True)


def print_verdict(rows: list[Row]) -> None:
    """Print, per case, how memfit's plan stands beside the fastest peer whose answer survived."""
    for name in dict.fromkeys(row.case.name for row in rows):
        mine = next((row for row in rows if row.case.name == name and row.planner == "memfit"), None)
        peers = [row for row in rows if row.case.name == name and row.planner != "memfit" and row.survived]
        if mine is None or not mine.samples_per_second or not peers:
            print(f"{name}: memfit {'survived' if mine and mine.survived else 'gave nothing that survived'}, "
                  f"{len(peers)} of the peers' answers survived")  # fmt: skip
            continue
        fastest, soonest = max(peers, key=lambda row: row.samples_per_second), min(peers, key=lambda row: row.seconds)
        ratio = mine.samples_per_second / fastest.samples_per_second
        print(
            f"{name}: memfit trains at {ratio:.2f} of the fastest surviving answer ({fastest.planner}) and searched "
            f"{mine.seconds / soonest.seconds:.1f} times as long as the quickest ({soonest.planner})"
        )


def write(path: Path, rows: Iterable[Row]) -> None:
    stamped = stamp()
    with path.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(stamped | row.values() for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--peers", type=Path, default=None, help="a folder that lightning and accelerate are in")
    parser.add_argument("--planners", nargs="+", default=list(PLANNERS), choices=list(PLANNERS))
    parser.add_argument("--steps", type=int, default=200, help="how many steps each answer then trains")
    parser.add_argument("--turns", type=int, default=3, help="how often the surviving answers are timed in turns")
    parser.add_argument("--csv", type=Path, default=None, help="write a row a case and planner here")
    parser.add_argument("--explain", action="store_true", help="print what memfit considered")
    options = parser.parse_args()
    peers, rows = [str(options.peers.resolve())] if options.peers else [], []
    with tempfile.TemporaryDirectory() as folder:
        for case in (CASES[name] for name in options.cases):
            print(f"\n{case.name}: {case.budget_mib} MiB, global batch {case.global_batch_size}, {options.steps} steps")
            print(f"{'case':8s} {'planner':20s} trials ooms seconds       answer ever run    training peak, of budget")
            for name in options.planners:
                rows.append(measure(case, name, options.steps, peers, Path(folder) / "child.log"))
                print_row(rows[-1])
                if options.explain and name == "memfit" and rows[-1].answer:
                    print(rows[-1].answer["explained"], flush=True)
            of_case = [row for row in rows if row.case is case]
            in_turns(of_case, options.turns, Path(folder) / "child.log")
            for row in of_case:
                if row.samples_per_second:
                    print(f"{case.name:8s} {row.planner:20s} {row.samples_per_second:9.1f} samples/s", flush=True)
            if options.csv:
                write(options.csv, rows)
    print()
    print_verdict(rows)


if __name__ == "__main__":
    sys.exit(main())
