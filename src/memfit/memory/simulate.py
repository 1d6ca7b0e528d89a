"""Run the real step on tensors that hold no memory, as the wanted device would, and record what it allocates."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from memfit.errors import ConfigError
from memfit.memory import workspaces
from memfit.memory.devices import Device
from memfit.memory.kernels import Kernels, pretend
from memfit.memory.trace import Recorder, Trace
from memfit.step import Batch, TrainingProgram, TrainingStep, autocast, map_tensors, num_samples, tensors_of

Step = Callable[[nn.Module, torch.optim.Optimizer, Batch], Any]


class CannotSimulateError(Exception):
    """The program does something that only real tensors can do: measure it instead."""


@dataclass(frozen=True)
class Layout:
    """How a step is laid out while it is simulated."""

    accumulation_steps: int
    precision: str
    checkpointing: str
    device: str = "meta"


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
) -> Trace:
    """Record what `num_steps` steps (or, with phase "evaluate", evaluation batches) allocate on a device.

    With `resumed`, optimizer state is there before the first forward pass, as in a run that goes on. `step` is a
    user's own loop body in place of memfit's step; what it returns stays referenced until its successor is made.
    More than two micro-steps repeat the second, so at most two are run.

    Raises: CannotSimulateError where the program needs real values.
    """
    with _Simulation(device) as simulation:
        model, optimizer = simulation.place(program, variant, train=phase == "train" or step is not None)
        if resumed and optimizer is not None:
            simulation.materialize(model, optimizer)
        micro_steps = min(2, accumulation_steps)
        if phase == "evaluate":
            batch = simulation.batch(program, micro_batch_size, seq_len)
            run: Callable[[], None] = partial(simulation.evaluate, program, model, batch, precision)
        elif step is not None:
            run = partial(simulation.own_step, program, model, optimizer, step, micro_batch_size, seq_len)
        else:
            batch = simulation.batch(program, micro_batch_size * micro_steps, seq_len)
            layout = Layout(micro_steps, precision, checkpointing)
            counted = replace(program, count=lambda _batch: defaultdict(lambda: 1.0))
            training = TrainingStep(layout, counted, model, optimizer, clip=clip)
            run = partial(simulation.train, training, batch)
        for _ in range(num_steps):
            simulation.recorder.phase = "begin"
            run()
        return simulation.finish(optimizer)


class _Simulation:
    """Everything that is pretended while a step is simulated."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.recorder = Recorder(workspaces.Workspaces(device, self._lasting))
        self.kernels = Kernels(device, self._is_host)
        self._host: set[int] = set()
        self._host_batches: list[Batch] = []
        self._stack = ExitStack()
        self._results: list[Any] = []

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

    def place(self, program: TrainingProgram, variant: str | None, *, train: bool) -> tuple[nn.Module, Any]:
        """Build the model without memory and put it on the device, one tensor after the other."""
        model = build_on_meta(lambda: program.build(variant))
        model.train(train)
        self.recorder.phase = "build"
        for module in reversed_depth_first(model):
            self.recorder.hold(module.parameters(recurse=False), "parameters")
            self.recorder.hold(module.buffers(recurse=False), "buffers")
        for name, module in model.named_modules():
            module.register_forward_pre_hook(self._entering(name))
        if not train:
            return model, None
        optimizer = program.optimizer(model)
        optimizer.register_step_pre_hook(lambda *_: setattr(self.recorder, "phase", "optimizer"))
        optimizer.register_step_post_hook(lambda *_: setattr(self.recorder, "phase", "forward"))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._accumulated)
        return model, optimizer

    def _entering(self, name: str) -> Callable[..., None]:
        def enter(_module: nn.Module, _args: Any) -> None:
            self.recorder.module = name

        return enter

    def _accumulated(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.recorder.hold([parameter.grad], "gradients")

    def materialize(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Give the optimizer its state before the first forward pass."""
        with self._recording("resume"):
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            self._hold_state(optimizer)
            optimizer.zero_grad(set_to_none=True)

    def _hold_state(self, optimizer: torch.optim.Optimizer) -> None:
        for state in optimizer.state.values():
            tensors = [value for value in state.values() if isinstance(value, Tensor)]
            self.recorder.hold([value for value in tensors if value.device.type == "meta"], "optimizer_state")

    def batch(self, program: TrainingProgram, size: int, seq_len: int | None) -> Batch:
        """Make a batch on the pretended host: it takes no device memory until it is moved."""
        batch = batch_on_meta(program, size, seq_len)
        self._host |= {tensor.untyped_storage()._cdata for tensor in tensors_of(batch)}
        self._host_batches.append(batch)  # storages must not be freed: others would take over their identity
        return batch

    def evaluate(self, program: TrainingProgram, model: nn.Module, batch: Batch, precision: str) -> None:
        """Run one evaluation batch."""
        model.eval()
        evaluate = program.evaluate or (lambda net, rows: program.loss(net, rows))
        with self._recording("evaluate"), torch.no_grad(), autocast(precision, "meta"):
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

    def finish(self, optimizer: Any) -> Trace:
        """Name what is known to be gradients and optimizer state; return the trace."""
        if optimizer is not None:
            self._hold_state(optimizer)
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
    except (NotImplementedError, RuntimeError):
        model = build()
    if any(tensor.device.type != "meta" for tensor in (*model.parameters(), *model.buffers())):
        model = model.to("meta")
    return model


def batch_on_meta(program: TrainingProgram, size: int, seq_len: int | None) -> Batch:
    """Make a batch without memory; a maker that needs real values is run for real, its tensors emptied."""
    try:
        with torch.device("meta"):
            batch = program.make_batch(size, seq_len)
    except (NotImplementedError, RuntimeError, TypeError):
        batch = program.make_batch(size, seq_len)
    if num_samples(batch) != size:
        raise ConfigError(
            f"make_batch: expected {size} samples, got {num_samples(batch)}. Return as many as asked for."
        )
    return map_tensors(lambda tensor: tensor.to("meta"), batch)
