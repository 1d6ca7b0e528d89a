"""The training loop of one stage: epochs of global batches, validation, best weights, early stopping."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from memfit.errors import ConfigError, MemfitError, Resumable
from memfit.memory import enforcement
from memfit.memory.plan import Plan
from memfit.process import stop_requested
from memfit.recovery import Change, RecoveringStep
from memfit.step import StepStats
from memfit.training.evaluate import evaluate_in_pieces
from memfit.training.events import EventLog
from memfit.training.health import HealthWatch
from memfit.training.memory_watch import MemoryWatch
from memfit.training.numbers import first_bad
from memfit.training.optimizers import Schedule
from memfit.training.spikes import SpikeGuard
from memfit.training.stage import Progress, capture, sample_order
from memfit.training.writer import CheckpointWriter
from memfit.workloads.base import Workload

MAX_BAD_STEPS = 3
"""Steps in a row with a loss or gradient that is not finite, before training stops."""


@dataclass
class StageLoop:
    """Trains one stage from wherever its progress stands to its end."""

    workload: Workload
    step: RecoveringStep
    schedule: Schedule
    progress: Progress
    events: EventLog
    plan: Plan
    stage: Mapping[str, Any]
    """The stage's settings: epochs, monitor, patience, checkpoint_every_*, keep_checkpoints, max_steps and more."""
    stage_index: int
    seed: int
    writer: CheckpointWriter
    record: Mapping[str, Any]
    """What every checkpoint names: stage, fingerprint."""
    phases: Callable[[str], None] = lambda _phase: None
    """Told "train", "evaluate" and "save" as the loop comes to them."""

    def __post_init__(self) -> None:
        self.step.on_change, self.step.relieve = self.note_change, self.writer.give_way
        factor, progress = self.stage["skip_spikes"], self.progress
        self._spikes = SpikeGuard(factor, progress.norms, progress.spikes_in_a_row) if factor else None
        self.step.accepts = self._spikes.accepts if self._spikes else None
        self._health = HealthWatch(self.step, progress)

    def run(self) -> str:
        """Train to the end; return why it ended: epochs, early_stopping or max_steps.

        Raises: Resumable after a requested stop, a checkpoint written.
        """
        self._saved = time.perf_counter()
        self._started = self._saved - self.progress.seconds
        self._watch = MemoryWatch(self.plan, self.step, self.writer.give_way)
        while (reason := self._finished()) is None:
            self._epoch()
        with self._stalling():
            self.writer.finish()
        self.progress.seconds = time.perf_counter() - self._started
        return reason

    def _finished(self) -> str | None:
        if self._at_max_steps() and not self.progress.batch:
            return "max_steps"
        if self.progress.epoch >= self.stage["epochs"]:
            return "epochs"
        patience = self.stage["patience"]
        if patience and self.progress.epochs_since_best >= patience:
            return "early_stopping"
        return None

    def _at_max_steps(self) -> bool:
        limit = self.stage["max_steps"]
        return limit is not None and self.progress.step >= limit

    def _epoch(self) -> None:
        started, before = time.perf_counter(), self.progress.samples
        size = self.plan.global_batch_size
        order = sample_order(
            self.workload.num_samples("train"), seed=self.seed, stage=self.stage_index, epoch=self.progress.epoch
        )
        order = order[: (self.stage["epoch_steps"] or len(order)) * size]
        self._health.begin_epoch(num_steps=-(-len(order) // size))
        self.phases("train")
        while self.progress.batch * size < len(order) and not self._at_max_steps():
            chosen = order[self.progress.batch * size : (self.progress.batch + 1) * size]
            self._watch()
            self._train(chosen)
            self.writer.check()
            if stop_requested():
                self._stop()
            if self._checkpoint_is_due():
                self._save(("last",))
                self.phases("train")
        trained = time.perf_counter() - started
        self._close_epoch(trained, (self.progress.samples - before) / trained, len(order))

    def _checkpoint_is_due(self) -> bool:
        steps, minutes = self.stage["checkpoint_every_steps"], self.stage["checkpoint_every_minutes"]
        by_steps = bool(steps) and self.progress.step % steps == 0
        return by_steps or (bool(minutes) and time.perf_counter() - self._saved >= 60 * minutes)

    def _train(self, indices: np.ndarray) -> None:
        stats = self.step(self.workload.batch("train", indices))
        if stats.stepped:
            self.schedule.after_step()
        progress = self.progress
        progress.step, progress.batch = progress.step + 1, progress.batch + 1
        progress.samples += stats.num_samples
        for term, value in stats.losses.items():
            progress.sums[term] = progress.sums.get(term, 0.0) + value * stats.num_samples
        self.events.write(
            "step",
            step=progress.step,
            epoch=progress.epoch + 1,
            losses={**stats.losses, "total": stats.total},
            lr=self._lr(),
            gradient_norm=stats.gradient_norm,
            loss_scale=stats.loss_scale,
            seconds=stats.seconds,
        )
        if self._spikes is not None:
            self._note_spike(self._spikes, stats, indices)
        self._check_numbers(stats, indices)

    def _note_spike(self, spikes: SpikeGuard, stats: StepStats, indices: np.ndarray) -> None:
        if spikes.in_a_row > self.progress.spikes_in_a_row:
            self.progress.skipped += 1
            self.events.write(
                "spike",
                step=self.progress.step,
                gradient_norm=stats.gradient_norm,
                median=spikes.last_median,
                factor=spikes.factor,
                samples=indices.tolist(),
            )
        self.progress.spikes_in_a_row = spikes.in_a_row

    def _check_numbers(self, stats: StepStats, indices: np.ndarray) -> None:
        # An overflow is the loss scaler's business, until scaling down did not help.
        scaled_away = self.plan.precision == "fp16" and math.isfinite(stats.total) and stats.loss_scale >= 1
        bad = not (math.isfinite(stats.total) and math.isfinite(stats.gradient_norm))
        progress = self.progress
        progress.bad_steps = [*progress.bad_steps, indices.tolist()] if bad and not scaled_away else []
        if len(progress.bad_steps) >= MAX_BAD_STEPS:
            first = progress.bad_steps[0]
            where = first_bad(self.step, self.workload.batch("train", np.array(first)))
            raise MemfitError(
                f"stage {self.stage['name']!r}: loss or gradients were not finite in {MAX_BAD_STEPS} steps up to step "
                f"{progress.step}, {where}. The first such batch was samples {first}. Lower lr, set "
                f"clip, or use fp32 or bf16; the last checkpoint in {self.writer.checkpoints} is intact."
            )

    def _lr(self) -> float:
        return float(self.step.optimizer.param_groups[0]["lr"])

    def _stop(self) -> None:
        self._save(("last",), wait=True)
        raise Resumable(
            f"stage {self.stage['name']!r} stopped on request after step {self.progress.step}, checkpoint written."
        )

    def _close_epoch(self, seconds: float, rate: float, epoch_samples: int) -> None:
        """Validate, keep the best weights, log, and write the checkpoint that a resume starts from."""
        progress = self.progress
        lr = self._lr()
        train = {term: value / max(progress.samples, 1) for term, value in progress.sums.items()}
        validation = self._validate()
        monitored = self._monitored(validation)
        best = progress.improves(monitored, self.stage["monitor_mode"])
        progress.epoch, progress.batch, progress.sums, progress.samples = progress.epoch + 1, 0, {}, 0
        progress.epochs_since_best = 0 if best else progress.epochs_since_best + 1
        if best:
            progress.best_value, progress.best_epoch = monitored, progress.epoch
        if monitored is not None:
            self.schedule.after_epoch(monitored)
        device = self.plan.device
        self.events.write("health", epoch=progress.epoch, **self._health.close_epoch())
        self.events.write(
            "epoch",
            epoch=progress.epoch,
            step=progress.step,
            train={**train, "total": sum(train.values())},
            validation=validation,
            memory={"now_bytes": enforcement.now_bytes(device), "peak_bytes": enforcement.peak_bytes(device)},
            samples_per_second=rate,
            eta_seconds=(self.stage["epochs"] - progress.epoch) * epoch_samples / rate if rate else None,
            seconds=seconds,
            lr=lr,
            monitor=self.stage["monitor"],
            best=best,
        )
        if best or progress.best_epoch == 0:
            progress.best_step = progress.step
        self._save(("last", "best") if progress.best_step == progress.step else ("last",))

    def _monitored(self, validation: Mapping[str, float | None]) -> float | None:
        if self.stage["monitor"] not in validation:
            raise ConfigError(
                f"stage {self.stage['name']!r}: monitor: expected one of {', '.join(validation)}, "
                f"got {self.stage['monitor']!r}."
            )
        return validation[self.stage["monitor"]]

    def _validate(self) -> dict[str, float | None]:
        self.phases("evaluate")
        losses, predictions = evaluate_in_pieces(
            self.workload,
            self.step.model,
            "validation",
            batch_size=self.progress.eval_batch_size or self.plan.eval_batch_size,
            layout=self.step.layout,
            on_shrink=self._note_smaller_evaluation,
            relieve=self.writer.give_way,
        )
        truth = self.workload.truth("validation", np.arange(self.workload.num_samples("validation")))
        return {**losses, **self.workload.score(truth, predictions)}

    def _note_smaller_evaluation(self, batch_size: int, message: str) -> None:
        self.progress.eval_batch_size = batch_size
        self._note("out_of_memory", "evaluate", message, eval_batch_size=batch_size)

    def note_change(self, change: Change) -> None:
        """Log that the step goes on with another layout."""
        levers = {name: value for name, value in vars(change).items() if name not in ("reason", "phase", "message")}
        self._note(change.reason, change.phase, change.message, **levers)

    def _note(self, reason: str, phase: str, message: str, **levers: Any) -> None:
        step = self.progress.step + 1 if phase == "train_step" else self.progress.step
        self.events.write("layout", step=step, reason=reason, phase=phase, message=message, **levers)

    def _save(self, links: tuple[str, ...], *, wait: bool = False) -> None:
        self.phases("save")
        progress = self.progress
        with self._stalling():
            progress.seconds = time.perf_counter() - self._started
            progress.events_bytes = self.events.sync()
            every = self.stage["checkpoint_every_epochs"]
            if every and not progress.batch and progress.epoch % every == 0:
                links = (*links, f"epoch-{progress.epoch}")
            state = capture(self.step, self.schedule, progress)
            where = {name: getattr(progress, name) for name in ("step", "epoch", "batch", "best_step")}
            self.writer.write((self.step.model.state_dict(), state, {**self.record, **where}, links), wait=wait)
        self._saved = time.perf_counter()

    @contextmanager
    def _stalling(self) -> Iterator[None]:
        """Count the time of the block as waiting for a checkpoint."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.progress.stall_seconds += time.perf_counter() - started
