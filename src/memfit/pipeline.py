"""The steps of a run, in order: prepare, plan, train each stage, evaluate, export, report.

The command line and the Prefect flow both call `open_run` and `Pipeline.perform`; what is reused, resumed or run is
decided here alone, by fingerprints.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import memfit
from memfit.config import MIN_SAMPLES, RunConfig, Stage, load_config, to_toml
from memfit.errors import ChildOutOfMemoryError, ConfigError, DoesNotFitError, RunStateError
from memfit.files import disk_errors, fingerprint, read_if_whole, read_json, sha256_file, write_json, write_text
from memfit.locks import device_locked
from memfit.memory.answers import what_would_fit
from memfit.memory.budget import check_device, resolve_budget
from memfit.memory.devices import is_here, read_devices
from memfit.memory.host import oom_kills
from memfit.memory.plan import HEADROOM, Plan, Probe
from memfit.memory.planner import check_feasible, plan_stage, planning
from memfit.memory.request import PlanRequest
from memfit.parts import ModelPart
from memfit.process import Emit, run_child, start_template
from memfit.run_directory import RunDirectory, environment, new_run_id, unfinished
from memfit.run_gauges import RunGauges
from memfit.starting_point import starting_point

PACKAGE = Path(memfit.__file__).parent
_STEP = ("step.py", "chunked_loss.py", "memory/enforcement.py", "memory/host.py")
CODE = {
    "data": ("data",),
    "plan": ("step.py", "chunked_loss.py", "process.py", "memory", "models", "workloads", "training"),
    "train": (*_STEP, "recovery.py", "random_state.py", "models", "metrics", "workloads", "training"),
    "evaluate": (*_STEP, "models", "metrics", "workloads", "evaluation", "training/evaluate.py"),
    "export": (*_STEP, "models", "workloads", "export", "data/features.py"),
}
"""Which source files a step's result depends on; a change in one of them runs the step again."""
MAX_DEATHS = 3
"""How often a training child may die without having come to another checkpoint."""
LIBRARIES = ("torch", "numpy", "pandas", "onnx", "onnxruntime", "tokenizers")


def code_version(part: str) -> str:
    """Hash the source files that a step's result depends on, and the versions of the libraries."""
    files = [file for entry in CODE[part] for file in _sources(PACKAGE / entry)]
    hashes = {str(file.relative_to(PACKAGE)): sha256_file(file) for file in files}
    return fingerprint({"files": hashes, "versions": {name: version(name) for name in LIBRARIES}})


def _sources(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


class Pipeline:
    """One run: its config, its directory, and its steps."""

    def __init__(
        self, config: RunConfig, run: RunDirectory, runs: Path, store: Path, *, fresh: bool, on_event: Emit
    ) -> None:
        self.config, self.run, self.runs, self.store = config, run, runs, store
        self.fresh, self.on_event = fresh, on_event
        self._gauges = RunGauges(run, {"config": config.name, "workload": config.workload}, on_event)
        self._performed: dict[str, Callable[[], None]] = {
            "prepare": self._prepare,
            "plan": self._plan,
            **{f"train:{stage.name}": self._trainer(index) for index, stage in enumerate(config.stages)},
            "evaluate": self._evaluate,
            "export": self._export,
            "report": self._report,
        }

    @property
    def steps(self) -> list[str]:
        """Name the steps in order."""
        return list(self._performed)

    def steps_until(self, last: str) -> list[str]:
        """Name the steps up to one of prepare, plan, train, evaluate, export or report."""
        if last not in ("prepare", "plan"):
            self.check_trainable()
        index = max(i for i, step in enumerate(self.steps) if step.split(":")[0] == last)
        return self.steps[: index + 1]

    def perform_until(self, last: str) -> None:
        """Perform all steps up to one, as `steps_until` names them."""
        steps = self.steps_until(last)
        with planning(self.config.plan.device):  # from the first look, before data is prepared, to the last plan
            for step in steps[: self.steps.index("plan") + 1]:
                self.perform(step)
        for step in steps[self.steps.index("plan") + 1 :]:
            self.perform(step)

    @property
    def _only_predicts(self) -> bool:
        return self.config.plan.estimate_only or not is_here(self.config.plan.device)

    def check_trainable(self) -> None:
        """Refuse, before any work, to train with plans that nobody has run. Raises: ConfigError."""
        settings = self.config.plan
        if self._only_predicts:
            why = "plan.estimate_only" if settings.estimate_only else f"the device {settings.device!r}"
            raise ConfigError(
                f"train: expected a plan that is run before it is trained with, got {why}, for which a plan is only "
                "predicted. Use `memfit plan`, or train with --device cpu, cuda or cuda:n."
            )

    @property
    def used_device(self) -> str:
        """Name the device that the steps compute on: cpu where plans are only predicted."""
        return "cpu" if self._only_predicts else self.config.plan.device.strip().lower()

    @contextmanager
    def locked(self, waiting: AbstractContextManager[None] | None = None) -> Iterator[None]:
        """Own the run's directory and its device while the block runs; `waiting` is entered between the two.

        The run's gauges tell of the block, and of how it ends. Raises: RunStateError that names the owner.
        """
        device = device_locked(self.used_device, self.run.path)
        with self.run.locked(), self._gauges.begin(self.runs), waiting or nullcontext(), device:
            yield

    def perform(self, step: str) -> None:
        """Reuse, resume or run one step; the steps before it must be done."""
        count = len(self.steps)
        self.on_event({"event": "step_start", "step": step, "index": self.steps.index(step) + 1, "count": count})
        intact = f"Free space or restore {self.run.path}, and run it again: what was finished is intact."
        with disk_errors(f"step {step!r}", intact):
            self._performed[step]()
        entry = self.run.step(step)
        assert entry is not None
        self.on_event({"event": "step_end", **{k: entry[k] for k in ("name", "status", "from_run", "seconds")}})
        self._gauges.update()
        if step == self.steps[-1]:
            self.run.record["finished"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            self.run.save()

    def _do(self, step: str, key: Any, outputs: list[str], work: Callable[[], None]) -> None:
        """Take a step's outputs from this run or an earlier one if nothing changed; do the work otherwise."""
        digest = fingerprint({"step": step, "key": key})
        if self.run.done(step, digest) and all((self.run.path / output).exists() for output in outputs):
            return
        begun = self.run.step(step) is not None  # an interrupted step of this very run goes on
        found = None if self.fresh or begun else self.run.find_earlier(step, digest, outputs)
        started = time.perf_counter()
        if found is not None:
            self.run.take(found, outputs)
            self.run.note(step, digest, "reused", from_run=found.run_id, outputs=outputs)
            return
        self.run.note(step, digest, "running")
        work()
        self.run.note(step, digest, "ran", seconds=time.perf_counter() - started, outputs=outputs)

    # prepare

    @cached_property
    def data_key(self) -> str:
        """Fingerprint the data: sources, settings and code."""
        return self.config.kind.fingerprint(self.config.data, self.config.model, code_version("data"))

    def _prepare(self) -> None:
        existed = (self.store / self.data_key / "manifest.json").exists()
        started = time.perf_counter()
        self.run.note("prepare", self.data_key, "running")
        if not existed and not self._only_predicts:
            self._check_feasible()
        path = self.config.kind.prepare(
            self.config.data,
            self.config.model,
            self.store,
            code_version=code_version("data"),
            fresh=self.fresh,
            on_progress=self._progress,
        )
        self.run.record["data_dir"] = str(path.resolve())
        reused = existed and not self.fresh
        self.run.note(
            "prepare",
            self.data_key,
            "reused" if reused else "ran",
            from_run="the store" if reused else None,
            seconds=time.perf_counter() - started,
        )

    def _check_feasible(self) -> None:
        """Refuse what cannot fit by far before data is prepared, on made-up data of the same shapes.

        Raises: DoesNotFitError.
        """
        with tempfile.TemporaryDirectory(prefix="memfit-outline-") as folder:
            start_template(self._log("plan"))
            if not self.config.kind.outline(self.config.data, self.config.model, Path(folder) / "data"):
                return None
            data_dir = str(Path(folder) / "data")
            different = {self._weight(stage): stage for stage in self.config.stages}.values()
            failure: DoesNotFitError | None = None
            for lighter in self._lighter:
                requests = [
                    self._request(stage, lighter or self._wanted(stage), "", data_dir=data_dir) for stage in different
                ]
                try:
                    return check_feasible(requests)
                except DoesNotFitError as error:
                    failure = failure or error
            assert failure is not None
            raise failure

    def _weight(self, stage: Stage) -> str:
        """Tell apart stages whose smallest step takes different amounts of memory."""
        model, optimizer = self._models[stage.name].own, stage.optimizer.model_dump(mode="json")
        return fingerprint([model, optimizer, list(stage.train), bool(stage.clip)])

    def _progress(self, message: str, share: float) -> None:
        self.on_event({"event": "progress", "message": message, "share": share})
        self._gauges.beat()

    # plan

    @cached_property
    def _models(self) -> dict[str, ModelPart]:
        """The model of each stage, by the stage's name."""
        names = (stage.name for stage in self.config.stages)
        return dict(zip(names, self.config.stage_models(), strict=True))

    def _wanted(self, stage: Stage) -> str:
        """Name a stage's own variant."""
        return next(iter(self._models[stage.name].all_variants()))

    @property
    def _lighter(self) -> list[str | None]:
        """List what may be planned, in order: the wanted variants (None), then the lighter ones that are allowed."""
        first = self._wanted(self.config.stages[0])
        return [None, *(name for name in dict.fromkeys(self.config.plan.variants) if name != first)]

    def _job(self, stage: Stage, data_dir: str | None = None) -> dict[str, Any]:
        model, wanted = self._models[stage.name], self._wanted(stage)
        allowed = [wanted, *(name for name in self._lighter if name)]
        return {
            "workload": self.config.workload,
            "min_micro_batch_size": self.config.kind.min_micro_batch_size(model),
            "data_dir": data_dir or self.run.record["data_dir"],
            "model": {"variant": wanted, "variants": {name: model.all_variants()[name] for name in allowed}},
            "sources": self.config.kind.sources_fingerprint(model),
            "loss": stage.loss.model_dump(mode="json"),
            "stage": stage.arguments(),
        }

    def _log(self, name: str) -> Path:
        return self.run.path / "logs" / f"{name.replace(':', '-')}.log"

    @cached_property
    def _budget_bytes(self) -> int:
        settings = self.config.plan
        if settings.device == "cpu" or not is_here(settings.device):
            return resolve_budget(settings.budget, settings.device, user_devices=read_devices(settings.devices))
        payload = {"budget": settings.budget, "device": settings.device}
        outcome = run_child("memfit.memory.budget:resolve_in_child", payload, log=self._log("device"))
        return int(outcome.unwrap("measuring the device"))

    def _plan_parts(self, stage: Stage, variant: str) -> dict[str, str]:
        """Fingerprint what a plan depends on, part by part."""
        job = {key: value for key, value in self._job(stage).items() if key != "data_dir"}
        settings = self.config.plan.model_dump(mode="json")
        parts = {
            "the budget": settings.pop("budget"),
            "the stage or the model": {"job": job, "variant": variant},
            "the data": self.data_key,
            "the planning settings": settings,
            "the machine, the driver or torch": environment(),
            "memfit's code": code_version("plan"),
        }
        return {name: fingerprint(part) for name, part in parts.items()}

    def _plan_key(self, stage: Stage, variant: str) -> str:
        return fingerprint(self._plan_parts(stage, variant))

    def _say_what_changed(self, stage: Stage, variant: str) -> None:
        """Tell why the plan of an earlier run of this name is not taken, and leave word for the next run."""
        latest, parts = self._latest_plan_parts(stage, variant), self._plan_parts(stage, variant)
        before = read_if_whole(latest)
        changed = [name for name, digest in parts.items() if before and before.get(name) != digest]
        changed += ["the memory at hand"] if before.get("ran_out") else []
        if changed:
            self.on_event({"event": "replan", "stage": stage.name, "changed": changed})
        write_json(latest, parts)

    def _latest_plan_parts(self, stage: Stage, variant: str) -> Path:
        return self.store / "planned" / f"{fingerprint([self.config.name, stage.name, variant])}.json"

    def _plan(self) -> None:
        if is_here(self.config.plan.device):
            check_device(self.config.plan.device)
        keys = [
            self._plan_key(stage, name or self._wanted(stage)) for stage in self.config.stages for name in self._lighter
        ]
        digest = fingerprint(keys)
        if self.run.done("plan", digest) and "stages" in read_if_whole(self.run.path / "plan.json"):
            return
        started = time.perf_counter()
        self.run.note("plan", digest, "running")
        with planning(self.config.plan.device):
            plans, reused = self._first_variant_that_fits()
        write_json(self.run.path / "plan.json", {"schema": 1, "stages": [plan.to_dict() for plan in plans]})
        status = "reused" if all(reused) else "ran"
        origin = "the store" if all(reused) else None
        self.run.note("plan", digest, status, from_run=origin, seconds=time.perf_counter() - started)

    def _first_variant_that_fits(self) -> tuple[list[Plan], list[bool]]:
        """Plan all stages with what is wanted, else with the first allowed variant that fits everywhere."""
        failure: DoesNotFitError | None = None
        for lighter in self._lighter:
            try:
                pairs: list[tuple[Plan, bool]] = []
                for stage in self.config.stages:
                    known = self._known([plan for plan, _ in pairs], stage)
                    pairs.append(self._stage_plan(stage, lighter or self._wanted(stage), known))
                return [plan for plan, _ in pairs], [reused for _, reused in pairs]
            except DoesNotFitError as error:
                failure = error
        assert failure is not None
        raise failure

    def _known(self, plans: list[Plan], stage: Stage) -> list[Probe]:
        """Return what was measured for the first stage that takes as much memory and time per micro-step."""
        for before, plan in zip(self.config.stages, plans, strict=False):
            same = all(getattr(before, name) == getattr(stage, name) for name in ("optimizer", "loss", "train", "clip"))
            same = same and self._models[before.name] == self._models[stage.name]
            if same and before.global_batch_size >= stage.global_batch_size:
                return list(plan.probes)
        return []

    def _stage_plan(self, stage: Stage, variant: str, known: list[Probe]) -> tuple[Plan, bool]:
        key = self._plan_key(stage, variant)
        stored = self.store / "plans" / f"{key}.json"
        if stored.exists() and not self.fresh:
            try:
                plan = Plan.from_dict(read_json(stored))
                if (plan.measured_peak_bytes or plan.upper_peak_bytes or 0) <= self._budget_bytes * (1 - HEADROOM):
                    return replace(plan, budget_bytes=self._budget_bytes), True  # `auto` differs from day to day
            except (ValueError, TypeError, KeyError, RunStateError):
                stored.unlink()  # torn or of another version: plan again
        self._say_what_changed(stage, variant)
        plan = plan_stage(self._request(stage, variant, key, known), lambda probe: self._on_probe(stage.name, probe))
        write_json(stored, plan.to_dict())
        return plan, False

    def _request(
        self, stage: Stage, variant: str, key: str, known: Sequence[Probe] = (), data_dir: str | None = None
    ) -> PlanRequest:
        settings = self.config.plan
        return PlanRequest(
            stage=stage.name,
            program={"factory": "memfit.training.program:from_job", "arguments": self._job(stage, data_dir)},
            global_batch_size=stage.global_batch_size,
            budget_bytes=self._budget_bytes,
            device=settings.device,
            precisions=settings.precisions,
            checkpointings=settings.checkpointing,
            variant=variant,
            wanted_variant=self._wanted(stage),
            fingerprint=key,
            clip=stage.clip or None,
            deadline_seconds=settings.deadline_seconds,
            estimate_only=settings.estimate_only,
            user_devices=settings.devices,
            min_micro_batch_size=self.config.kind.min_micro_batch_size(self._models[stage.name]),
            known=known,
            log=self._log("plan"),
        )

    def _on_probe(self, stage: str, probe: Probe) -> None:
        self.on_event({"event": "probe", "stage": stage, "probe": vars(probe)})
        self._gauges.beat()

    @property
    def plans(self) -> list[Plan]:
        """Read the run's plans, one per stage."""
        return [Plan.from_dict(plan) for plan in read_json(self.run.path / "plan.json")["stages"]]

    # train

    def stage_dir(self, index: int) -> str:
        """Name a stage's folder inside the run directory."""
        return f"stages/{index + 1}-{self.config.stages[index].name}"

    def _train_key(self, index: int) -> str:
        plan, stage = self.plans[index], self.config.stages[index]
        layout = (
            "micro_batch_size",
            "accumulation_steps",
            "precision",
            "checkpointing",
            "variant",
            "device",
            "eval_batch_size",
            "chunked_loss",
            "foreach",
        )
        return fingerprint(
            {
                "data": self.data_key,
                "job": {key: value for key, value in self._job(stage).items() if key != "data_dir"},
                "layout": {key: getattr(plan, key) for key in layout},
                "seed": self.config.seed,
                "before": self._train_key(index - 1) if index else self._start_key,
                "code": code_version("train"),
            }
        )

    @cached_property
    def _start_key(self) -> str | None:
        """Name the weights that the first stage starts from. Raises: ConfigError where there are none."""
        return starting_point(self.config.model.start).sha256 if self.config.model.start else None

    def _trainer(self, index: int) -> Callable[[], None]:
        def train() -> None:
            key, folder = self._train_key(index), self.stage_dir(index)
            self._do(f"train:{self.config.stages[index].name}", key, [folder], lambda: self._train(index, key))

        return train

    def _train(self, index: int, key: str) -> None:
        stage = self.config.stages[index]
        before = self.run.path / self.stage_dir(index - 1) / "checkpoints" / "best"
        job = {
            **self._job(stage),
            "stage_index": index,
            "seed": self.config.seed,
            "plan": self.plans[index].to_dict(),
            "stage_dir": str(self.run.path / self.stage_dir(index)),
            "fingerprint": key,
            "initial_weights": str(before) if index else self.config.model.start or None,
        }
        try:
            self._train_through(index, job)
        except DoesNotFitError as error:
            plan = self.plans[index]
            if not plan.in_flight:
                raise
            request = self._request(stage, plan.variant or self._wanted(stage), plan.fingerprint)
            raise DoesNotFitError(f"{error} {what_would_fit(request, plan)}") from None

    def _train_through(self, index: int, job: dict[str, Any]) -> None:
        """Start the training child again where it was killed or hung: it goes on from its last checkpoint.

        One that the kernel killed for want of memory goes on with less. Gives up after MAX_DEATHS without a checkpoint.
        """
        step, checkpoints = f"train:{job['stage']['name']}", Path(job["stage_dir"]) / "checkpoints"
        deaths, shortages, reached, kills = 0, list[str](), None, oom_kills()
        while True:
            outcome = run_child(
                "memfit.training.worker:run",
                {**job, "shortages": shortages},
                log=self._log(step),
                on_event=partial(self._on_training, index),
                silence_seconds=self.config.hang_minutes * 60 or None,
            )
            at = (checkpoints / "last").resolve().name
            deaths, shortages = (deaths + 1, shortages) if at == reached else (1, [])
            if not (outcome.status == "hung" or outcome.error.startswith("SIG")) or deaths > MAX_DEATHS:
                outcome.unwrap(f"step {step!r}")
                return
            if outcome.error == "SIGABRT" or oom_kills() > kills:
                shortages.append(f"the process {outcome.message} in phase {outcome.phase!r}")
            reached, kills = at, oom_kills()
            self.on_event({"event": "restart", "step": step, "message": outcome.message, "attempt": deaths + 1})

    def _on_training(self, index: int, event: dict[str, Any]) -> None:
        if event["event"] == "layout":
            self._note_in_flight(index, {key: value for key, value in event.items() if key != "event"})
        self.on_event(event)
        self._gauges.beat()

    def _note_in_flight(self, index: int, change: dict[str, Any]) -> None:
        """Keep a change of the layout with the run's plan; one that failed is planned anew in the next run."""
        plans = self.plans
        if change not in plans[index].in_flight:  # a resumed stage may come by it once more
            plans[index] = replace(plans[index], in_flight=(*plans[index].in_flight, change))
            write_json(self.run.path / "plan.json", {"schema": 1, "stages": [plan.to_dict() for plan in plans]})
        if change["reason"] == "out_of_memory":
            plan, stage = plans[index], self.config.stages[index]
            (self.store / "plans" / f"{Path(plan.fingerprint).name}.json").unlink(missing_ok=True)
            latest = self._latest_plan_parts(stage, plan.variant or self._wanted(stage))
            write_json(latest, {**read_if_whole(latest), "ran_out": change["message"]})

    def _child(self, step: str, target: str, job: dict[str, Any], on_event: Emit | None = None) -> Any:
        outcome = run_child(target, job, log=self._log(step), on_event=on_event or self.on_event)
        return outcome.unwrap(f"step {step!r}")

    # evaluate, export, report

    def _finished_job(self) -> dict[str, Any]:
        last = len(self.config.stages) - 1
        return {
            **self._job(self.config.stages[last]),
            "plan": self.plans[last].to_dict(),
            "weights": str(self.run.path / self.stage_dir(last) / "checkpoints" / "best"),
            "run_dir": str(self.run.path),
        }

    def _evaluate(self) -> None:
        gate = self.config.gate.model_dump(mode="json")
        key = {"train": self._train_key(len(self.config.stages) - 1), "gate": gate, "code": code_version("evaluate")}
        outputs = ["evaluation.json", "predictions.npz"]
        target = "memfit.evaluation.evaluate:run"
        self._do(
            "evaluate", key, outputs, lambda: self._child("evaluate", target, self._finished_job() | {"gate": gate})
        )

    def _export(self) -> None:
        settings = self.config.export.model_dump(mode="json")
        trained = self._train_key(len(self.config.stages) - 1)
        key = {"train": trained, "export": settings, "code": code_version("export")}
        evaluation = read_json(self.run.path / "evaluation.json")
        card = {
            "name": self.config.name,
            "workload": self.config.workload,
            "model": self._finished_model(),
            "metrics": evaluation["metrics"],
            "baselines": evaluation["baselines"],
            "hashes": {
                "data": self.data_key,
                "config": fingerprint(self.config.model_dump(mode="json")),
                "code": code_version("export"),
                "training": trained,
            },
            "plan": [{k: v for k, v in plan.to_dict().items() if k != "probes"} for plan in self.plans],
        }
        job = {"export_dir": str(self.run.path / "export"), **settings, "card": card}
        self._do("export", key, ["export"], lambda: self._export_through({**self._finished_job(), **job}))

    def _finished_model(self) -> dict[str, Any]:
        """Return the settings of the model that was trained last."""
        stage, plan = self.config.stages[-1], self.plans[-1]
        return self._models[stage.name].all_variants()[plan.variant or self._wanted(stage)]

    def _export_through(self, job: dict[str, Any]) -> None:
        """Export; where memory runs out, once more with as few sample rows as parity is checked on."""
        run = partial(run_child, "memfit.export.worker:run", log=self._log("export"), on_event=self.on_event)
        outcome = run(job)
        if outcome.status == "oom" or outcome.error == ChildOutOfMemoryError.__name__:
            said = f"{outcome.message} Tried once more with {MIN_SAMPLES} sample rows."
            self.on_event({"event": "warning", "message": said})
            outcome = run({**job, "samples": MIN_SAMPLES})
        outcome.unwrap("step 'export'")

    def _report(self) -> None:
        started = time.perf_counter()
        key = fingerprint({"steps": self.run.record["steps"]})
        self.run.note("report", key, "ran")
        from memfit.report.page import write_report  # matplotlib: half a second that a plan need not wait for

        write_report(self.run.path)
        self.run.note("report", key, "ran", seconds=time.perf_counter() - started)

    def summary(self) -> dict[str, Any]:
        """Say what there is now: paths, what was reused, plans, metrics."""
        path = self.run.path
        present = {name: str(path / file) for name, file in FILES.items() if (path / file).exists()}
        evaluation = read_json(path / "evaluation.json") if "evaluation" in present else {}
        return {
            "run_dir": str(path),
            "run_id": self.run.run_id,
            "name": self.config.name,
            "files": present,
            "steps": self.run.record["steps"],
            "plans": [plan.to_dict() for plan in self.plans] if "plan" in present else [],
            "metrics": evaluation.get("metrics"),
            "baselines": evaluation.get("baselines"),
            "unit": evaluation.get("unit"),
            "gate": evaluation.get("gate"),
        }


FILES = {
    "config": "config.toml",
    "plan": "plan.json",
    "evaluation": "evaluation.json",
    "model": "export/model.onnx",
    "card": "export/model_card.json",
    "report": "report.html",
}


def open_run(
    config: RunConfig,
    *,
    runs: Path,
    store: Path,
    run_dir: Path | None = None,
    resume: bool = False,
    fresh: bool = False,
    on_event: Emit = lambda _event: None,
) -> Pipeline:
    """Open a run: a new directory, the one given, or with `resume` the newest unfinished one of this config.

    Raises: RunStateError where the directory holds a run of another config.
    """
    if config.model.start:
        starting_point(config.model.start)  # refused before any work
    text = to_toml(config)
    path = run_dir or (unfinished(runs / config.name, text) if resume else None) or runs / config.name / new_run_id()
    if path.exists() and not path.is_dir():
        raise RunStateError(f"{path}: expected a directory or nothing, got a file. Take another --run-dir.")
    run = RunDirectory(path)
    stored = _read_text_if_any(path / "config.toml")
    if not text.startswith(stored):  # one that was torn is written again
        raise RunStateError(
            f"{path}: holds a run of another config. Take another --run-dir, or continue it: memfit run {path}"
        )
    if not run.record or stored != text:
        write_text(path / "config.toml", text)  # before the record: a run with a record has a config
    if not run.record:
        facts = {
            "memfit_version": memfit.__version__,
            "code_version": {part: code_version(part) for part in CODE},
            "environment": environment() | {"device": config.plan.device},
            "data_dir": None,
        }
        run = RunDirectory.create(path, config.name, facts)
    return Pipeline(config, run, runs, store, fresh=fresh, on_event=on_event)


def _read_text_if_any(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def read_config(path: Path, overrides: list[str]) -> tuple[RunConfig, Path | None]:
    """Read a config file, or the config of a run directory; return it with the directory, if it was one."""
    if path.is_dir():
        return load_config(path / "config.toml", overrides), path
    return load_config(path, overrides), None
