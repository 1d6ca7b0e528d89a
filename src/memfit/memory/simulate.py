"""Run the real step on tensors that hold no memory, as the wanted device would, and record what it allocates."""

import copy
import gc
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from memfit.errors import MemfitError
from memfit.memory import workspaces
from memfit.memory.devices import Device
from memfit.memory.kernels import Kernels, pretend
from memfit.memory.operators import Operators
from memfit.memory.trace import Recorder, Trace
from memfit.step import (
    Batch,
    StepLayout,
    TrainingProgram,
    TrainingStep,
    evaluating,
    loss_terms,
    map_tensors,
    materialize_state,
    tensors_of,
)

Step = Callable[[nn.Module, torch.optim.Optimizer, Batch], Any]


class CannotSimulateError(Exception):
    """The program does something that only real tensors can do: measure it instead."""


def simulate(
    program: TrainingProgram,
    device: Device,
    *,
    micro_batch_size: int,
    accumulation_steps: int = 1,
    precision: str = "fp32",
    checkpointing: str = "none",
    seq_len: int | None = None,
    variant: str | None = None,
    phase: str = "train",
    step: Step | None = None,
    clip: float | None = None,
    resumed: bool = True,
    num_steps: int = 2,
    quick: bool = False,
    chunked_loss: bool = False,
    foreach: bool = True,
    operators: Operators | None = None,
) -> Trace:
    """Record what `num_steps` steps (or, with phase "evaluate", evaluation batches) allocate on a device.

    With `resumed`, optimizer state is there before the first forward pass, as in a run that goes on. `step` is a
    user's own loop body in place of memfit's step; what it returns stays referenced until its successor is made.
    More than two micro-steps repeat the second, so at most two are run; `quick` runs only that one, with gradients in
    place, in a single step. `operators` remembers shapes from one simulation on the same device to the next.

    Raises: CannotSimulateError where the program needs real values.
    """
    micro_steps = 1 if quick else min(2, accumulation_steps)
    layout = StepLayout(micro_steps, precision, checkpointing, "meta", chunked_loss, foreach)
    try:
        with _random_numbers_kept(), _garbage_left_alone(), _Simulation(device, operators) as simulation:
            run = simulation.prepare(
                program, layout, micro_batch_size, seq_len, variant, phase=phase, step=step, clip=clip, resumed=resumed
            )
            for _ in range(1 if quick else num_steps):
                if quick and accumulation_steps > 1:
                    simulation.hold_gradients()
                simulation.recorder.phase = "begin"
                run()
            return simulation.finish()
    except MemfitError:
        raise
    except Exception as error:  # whatever a program does to tensors without values
        raise CannotSimulateError(f"{type(error).__name__}: {error}") from error


@contextmanager
def _random_numbers_kept() -> Iterator[None]:
    """Leave all generators as they were: what is built for real draws from them."""
    numpy = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python_state)
        if numpy:
            numpy.random.set_state(numpy_state)


@contextmanager
def _garbage_left_alone() -> Iterator[None]:
    """Collect only garbage that is made in here: to look through all of torch's objects takes longer than a step."""
    others = gc.get_freeze_count()
    gc.freeze()
    try:
        yield
    finally:
        if not others:
            gc.unfreeze()


class _Simulation:
    """Everything that is pretended while a step is simulated."""

    def __init__(self, device: Device, operators: Operators | None) -> None:
        self.device = device
        self.recorder = Recorder(workspaces.Workspaces(device, self._lasting), operators or Operators(device))
        self.kernels = Kernels(device, self._is_host, lambda tensor: self.recorder.hold([tensor], "batch"))
        self._host = self.recorder.host
        self._host_batches: list[Batch] = []
        self._stack = ExitStack()
        self._results: list[Any] = []
        self._optimizer: torch.optim.Optimizer | None = None
        self._owners: dict[Tensor, str] = {}
        self._running: list[str] = []

    def _lasting(self, num_bytes: int, op: str) -> None:
        self.recorder.lasting(num_bytes, "workspaces", op)

    def _is_host(self, tensor: Tensor) -> bool:
        return tensor.device.type != "meta" or tensor.untyped_storage()._cdata in self._host

    def __enter__(self) -> "_Simulation":
        self._stack.enter_context(pretend(self.kernels))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        self._results.clear()

    @contextmanager
    def _recording(self, phase: str) -> Iterator[None]:
        self.recorder.phase = phase
        with self.kernels, self.recorder:
            yield

    def prepare(
        self,
        program: TrainingProgram,
        layout: StepLayout,
        size: int,
        seq_len: int | None,
        variant: str | None,
        *,
        phase: str,
        step: Step | None,
        clip: float | None,
        resumed: bool,
    ) -> Callable[[], None]:
        """Put model and optimizer in place; return what runs one step, or one evaluation batch."""
        model = self.place(program, variant, train=phase == "train")
        if phase == "evaluate":
            batch = self.batch(program, size, seq_len)
            return partial(self.evaluate, program, model, batch, layout)
        optimizer = self.optimize(program, model)
        if resumed:
            self.materialize(model, optimizer)
        if step is not None:
            return partial(self.own_step, program, model, optimizer, step, size, seq_len)
        self.recorder.in_program = False
        counted = replace(program, count=lambda _batch: defaultdict(lambda: 1.0), loss=partial(self._loss, program))
        training = TrainingStep(layout, counted, model, optimizer, clip=clip)
        return partial(self.train, training, self.batch(program, size * layout.accumulation_steps, seq_len))

    def _loss(self, program: TrainingProgram, model: nn.Module, batch: Batch) -> Any:
        self.recorder.in_program = True
        terms = loss_terms(program, model, batch)
        self.recorder.in_program = False
        return terms

    def place(self, program: TrainingProgram, variant: str | None, *, train: bool) -> nn.Module:
        """Build the model without memory and put it on the device, one tensor after the other."""
        model = build_on_meta(lambda: program.build(variant))
        model.train(train)
        self.recorder.phase = "build"
        names = {module: name for name, module in model.named_modules()}
        for module in reversed_depth_first(model):
            self.recorder.hold(module.parameters(recurse=False), "parameters", names[module])
            self.recorder.hold(module.buffers(recurse=False), "buffers", names[module])
            self._owners |= dict.fromkeys(module.parameters(recurse=False), names[module])
        for module, name in names.items():
            module.register_forward_pre_hook(partial(self._enter, name))
            module.register_forward_hook(self._leave)
        return model

    def optimize(self, program: TrainingProgram, model: nn.Module) -> torch.optim.Optimizer:
        """Build the optimizer; follow its steps and the gradients."""
        optimizer = self._optimizer = program.optimizer(model)
        optimizer.register_step_pre_hook(lambda *_: setattr(self.recorder, "phase", "optimizer"))
        optimizer.register_step_post_hook(lambda *_: setattr(self.recorder, "phase", "forward"))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._accumulated)
        return optimizer

    def _enter(self, name: str, _module: nn.Module, _args: Any) -> None:
        self._running.append(name)
        self.recorder.module = name

    def _leave(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        self._running.pop()
        self.recorder.module = self._running[-1] if self._running else ""

    def _accumulated(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.recorder.hold([parameter.grad], "gradients", self._owners[parameter])

    def materialize(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Give the optimizer its state before the first forward pass."""
        with self._recording("resume"):
            materialize_state(model, optimizer)
            self._hold_state(optimizer)

    def hold_gradients(self) -> None:
        """Give every trained parameter a gradient, as an earlier micro-step leaves it."""
        assert self._optimizer is not None
        with self._recording("accumulated"):
            for group in self._optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.empty_like(parameter)
                    self.recorder.hold([parameter.grad], "gradients")

    def _hold_state(self, optimizer: torch.optim.Optimizer) -> None:
        for parameter, state in optimizer.state.items():
            tensors = [value for value in state.values() if isinstance(value, Tensor) and value.is_meta]
            self.recorder.hold(tensors, "optimizer_state", self._owners.get(parameter, ""))

    def batch(self, program: TrainingProgram, size: int, seq_len: int | None) -> Batch:
        """Make a batch on the pretended host: it takes no device memory until it is moved, unless they are one."""
        batch = batch_on_meta(program, size, seq_len)
        if self.device.kind == "cpu":
            self.recorder.hold(tensors_of(batch), "batch")
            return batch
        self._host |= {tensor.untyped_storage()._cdata for tensor in tensors_of(batch)}
        self._host_batches.append(batch)  # storages must not be freed: others would take over their identity
        return batch

    def evaluate(self, program: TrainingProgram, model: nn.Module, batch: Batch, layout: StepLayout) -> None:
        """Run one evaluation batch."""
        model.eval()
        evaluate = program.evaluate or partial(loss_terms, program)
        with self._recording("evaluate"), evaluating(layout):
            evaluate(model, map_tensors(lambda tensor: tensor.to("meta"), batch))

    def own_step(
        self, program: TrainingProgram, model: nn.Module, optimizer: Any, step: Step, size: int, seq_len: int | None
    ) -> None:
        """Run a user's loop body on a batch that is on the device; its former result lives until the backward pass."""
        host = batch_on_meta(program, size, seq_len)
        with self._recording("forward"):
            batch = map_tensors(torch.empty_like, host)
            self.recorder.hold(tensors_of(batch), "batch")
            self.recorder.on_backward = self._results.clear
            result = step(model, optimizer, batch)
            self._results[:] = [result, batch]

    def train(self, training: TrainingStep, batch: Batch) -> None:
        """Run memfit's step."""
        with self._recording("forward"):
            training(batch)

    def finish(self) -> Trace:
        """Name optimizer state and activations; return the trace."""
        if self._optimizer is not None:
            self._hold_state(self._optimizer)
        trace = self.recorder.trace
        name_activations(trace)
        return trace


def name_activations(trace: Trace) -> None:
    """Call what the forward pass leaves behind for the backward pass by its name."""
    backward = {index for index, phase in trace.marks if phase == "backward"}
    alive: set[int] = set()
    for index, event in enumerate(trace.events):
        if index in backward:
            for number in alive:
                if trace.storages[number].category == "temporaries":
                    trace.storages[number].category = "activations"
        if event >= 0:
            alive.add(event)
        else:
            alive.discard(~event)


def reversed_depth_first(model: nn.Module) -> Iterator[nn.Module]:
    """Yield modules in the order in which `Module.to` moves them: children first."""
    for child in model.children():
        yield from reversed_depth_first(child)
    yield model


def build_on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a model without memory; a constructor that computes with its tensors is run for real, then emptied."""
    try:
        with torch.device("meta"):
            model = build()
    except (NotImplementedError, RuntimeError, TypeError):
        model = build()
    real = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.device.type != "meta"]
    # a copy, since the builder may hand out a model that somebody keeps
    return copy.deepcopy(model, {id(tensor): _emptied(tensor) for tensor in real}) if real else model


def _emptied(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def batch_on_meta(program: TrainingProgram, size: int, seq_len: int | None) -> Batch:
    """Make a batch without memory; a maker that needs real values is run for real, its tensors emptied."""
    try:
        with torch.device("meta"):
            batch = program.batch(size, seq_len)
    except (NotImplementedError, RuntimeError, TypeError):
        batch = program.batch(size, seq_len)
    return map_tensors(lambda tensor: tensor.to("meta"), batch)
